"""
What a layer holds between two forward passes: its tokens, those that may be taken back, and all that `generate`, beam
search, files and users ask of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from pyramid_cache.engine import checks
from pyramid_cache.engine.budget import Budget
from pyramid_cache.engine.fingerprint import WeightFingerprint
from pyramid_cache.engine.pending import PendingTokens
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import MaskReader


@dataclass(frozen=True)
class LayerPlace:
    """The place of a layer in its model."""

    layer_idx: int
    depth: int  # its rank among the layers that evict
    num_layers: int  # that evict
    model_depth: int  # layers of all kinds


class Layout(NamedTuple):
    """The shapes, dtypes and device that all keys and values of a layer have."""

    batch_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    value_dtype: torch.dtype  # under autocast another one than that of keys
    device: torch.device

    def __str__(self) -> str:
        kinds = f"{self.dtype} and {self.value_dtype} on {self.device}"
        return f"{self.kv_heads} KV heads of width {self.key_dim} (keys) and {self.value_dim} (values) in {kinds}"


class StoredLayer(CacheLayerMixin):
    """Tokens in a store, and the tokens that `crop` may take back. The layers of a cache share `masks`."""

    is_sliding = False
    supports_early_init = False

    # Whether tokens that are not held are lost. ShadowKV brings them back when they are attended to.
    evicts = True
    # Whether a choice needs the keys and values of all heads, which tensor parallelism splits.
    needs_whole_layers = False
    # How many tokens the layer may keep. A method with a limit of its own has none.
    budget: Budget | None = None
    # The name and the unit of `held_scores`, None for a method without scores.
    score_label: str | None = None

    def __init__(self, place: LayerPlace, masks: MaskReader, store: SlotStore) -> None:
        self.place, self.masks, self.store = place, masks, store
        self._clear()

    def _clear(self) -> None:
        self.store.reset()
        self.state: Any = self.store.state
        self.is_initialized = False
        self.pending = PendingTokens()
        # New tokens between `update` and `attend`: an `Arrival`.
        self.arrival: Any = None
        # The weights of the attention module that filled this layer, if it was loaded from a file.
        self.expected_weights: WeightFingerprint | None = None

    def reset(self) -> None:
        """Forgets everything and frees the tensors."""
        self._clear()

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """`(batch, kv_heads, slots, head_dim)`, with slots that are not in use."""
        return self.state.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.state.values

    @staticmethod
    def layout_of(key: torch.Tensor, value: torch.Tensor) -> Layout:
        """The layout of keys and values `(batch, kv_heads, tokens, head_dim)`."""
        batch_size, kv_heads, _, head_dim = key.shape
        return Layout(batch_size, kv_heads, head_dim, value.shape[3], key.dtype, value.dtype, key.device)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.layout = self.layout_of(key_states, value_states)
        self.device = key_states.device
        self.state.row_lengths, self.state.row_held = [0] * self.batch_size, [0] * self.batch_size
        self.state.next_position = torch.zeros(self.batch_size, 1, 1, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.layout.batch_size

    # What `generate` asks of any layer.

    def get_seq_length(self) -> int:
        """The number of columns seen, padding included. Position ids and the slicing of inputs go by it."""
        num_seen = self.state.num_seen if self.arrival is None else self.state.num_seen + self.arrival.num_new
        return num_seen + self.pending.num_columns if self.pending.chunks else num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and the offset of the mask: a column for each column seen. `attend` reads what it needs."""
        num_seen = self.get_seq_length()
        checks.check_new_tokens(query_length, num_seen)
        return num_seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: a cache may see any number of tokens."""
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at the int64 `indices`, in that order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        # Where all rows have the same counts, the indices need not be read from the device.
        counts = [getattr(self.state, name) for name in self.state.names("counts")]
        counts += [chunk.seen.row_lengths for chunk in self.pending.chunks]
        are_alike = all(len(set(numbers)) <= 1 for numbers in counts)
        rows = [0] * indices.shape[0] if are_alike else indices.tolist()
        self._map_rows(lambda tensor: tensor[indices], rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, copies side by side."""
        if self.is_initialized:
            rows = [row for row in range(self.batch_size) for _ in range(repeats)]
            self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0), rows)

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: list[int] | None = None) -> None:
        """Applies a function to all tensors, and selects the counts of `rows` if they change."""
        self.store.map_rows(function)
        self.pending.map(lambda chunk: chunk.map_tensors(function))
        if rows is not None:
            self.state.map_counts(rows)
            self.pending.map(lambda chunk: chunk.map_rows(rows))
            self.layout = self.layout._replace(batch_size=len(rows))

    def offload(self) -> None:
        """Moves the layer's tensors to the CPU."""
        self._map_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the layer's tensors back to its device."""
        if self.is_initialized:
            self._map_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    # Files.

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The state of the layer: numbers as JSON has them, and tensors without their unused slots."""
        checks.check_savable(self)
        return self.store.state_dict()

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `export_state` gave."""
        self._clear()
        keys, values = tensors["keys"], tensors["values"]
        if keys.dim() != 4 or keys.dtype != values.dtype or not keys.is_floating_point():
            raise ValueError(f"keys are {keys.dtype} {tuple(keys.shape)} and values {values.dtype}")
        # One row is enough to tell shapes, and a budget in bytes may not pay for rows that were repeated later.
        self.lazy_initialization(keys[:1], values[:1])
        self.layout = self.layout_of(keys, values)
        self.store.load_state_dict(numbers, tensors)

    # What users ask.

    def held_positions(self) -> torch.Tensor:
        """`(batch, kv_heads, slots)` int64: positions of the tokens in the slots, -1 for empty ones and padding."""
        parts = [self.store.held_positions()]
        parts += [chunk.seen.positions[..., -chunk.num_columns :] for chunk in self.pending.chunks]
        return torch.cat([part.expand(-1, self.layout.kv_heads, -1) for part in parts], dim=-1).long()

    def held_scores(self) -> torch.Tensor | None:
        """
        `(batch, kv_heads, slots)` float32: the scores of the tokens of `held_positions`, NaN where there is no token
        and for tokens that the method does not score. None if nothing has been scored yet.
        """
        scores = self.store.held_attention()
        if scores is None:
            return None
        positions = self.held_positions()
        result = torch.full(positions.shape, torch.nan, dtype=torch.float32, device=positions.device)
        result[..., : scores.shape[-1]] = scores
        return result.masked_fill(positions < 0, torch.nan)

    @property
    def num_seen_per_row(self) -> list[int]:
        """How many tokens each row has seen: padding does not count, recorded tokens do."""
        return self.pending.chunks[-1].seen.row_lengths if self.pending.chunks else self.state.row_lengths

    @property
    def num_held_per_row(self) -> list[int]:
        """How many tokens of each row the layer holds; recorded tokens count."""
        rows = zip(self.state.row_held, self.state.row_lengths, self.num_seen_per_row, strict=True)
        return [held + length - settled for held, settled, length in rows]

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the layer refers to, by a name whose first word is its role."""
        return self.store.held_tensors() | self.pending.held_tensors()
