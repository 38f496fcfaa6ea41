"""
The meeting of one decoder layer with its cache: `update` takes new tokens and returns what attention sees, `attend`
attends in the place of the model's attention function and lets the method evict.

Every check of a call comes before the call changes anything. A call that is refused leaves the layer as it was.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from pyramid_cache.engine import checks
from pyramid_cache.engine.arguments import as_tokens_to_remove, check_states
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fingerprint import WeightFingerprint
from pyramid_cache.engine.pending import PendingTokens, RecordedChunk
from pyramid_cache.engine.store import LayerState, SlotStore, own_storage
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops.registration import needs_gradients


@dataclass(frozen=True)
class LayerPlace:
    """
    The place of a layer in its model.

    Attributes:
        layer_idx (`int`): Its index in the model.
        depth (`int`): Its rank among the layers that evict.
        num_layers (`int`): How many layers evict.
        model_depth (`int`): How many layers of all kinds the model has.
    """

    layer_idx: int
    depth: int
    num_layers: int
    model_depth: int


@dataclass(frozen=True)
class Layout:
    """The shapes, dtypes and device that all keys and values of a layer have."""

    batch_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    value_dtype: torch.dtype  # under autocast another one than that of keys
    device: torch.device


@dataclass(frozen=True)
class Arrival:
    """
    New tokens between `update` and `attend`. The tensor of keys that `update` returns carries it to the attention
    function, in its attribute `cache_layer`.

    Attributes:
        layer (`CompressedLayer`): The layer that they came to.
        num_new (`int`): How many there are in each row.
        slot_positions (`torch.Tensor`, *optional*): `(batch, kv_heads or 1, slots)`, of the tokens before them in the
            keys, if these were in slots and have been brought into order.
        put_aside (`tuple`, *optional*): The new keys and values, if `crop` may take them back.
    """

    layer: "CompressedLayer"
    num_new: int
    slot_positions: torch.Tensor | None = None
    put_aside: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.layer.attend(call)


class CompressedLayer(CacheLayerMixin):
    """
    What all layers of this package have in common.

    Args:
        place (`LayerPlace`): Which layer of the model this is.
        masks (`MaskReader`): Shared by the layers of a cache.
        store (`SlotStore`): Where the layer puts its tokens.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    # Whether tokens that are not held are lost. ShadowKV brings them back when they are attended to.
    evicts = True
    # The name and the unit of `held_scores`, None for a method without scores.
    score_label: str | None = None

    def __init__(self, place: LayerPlace, masks: MaskReader, store: SlotStore) -> None:
        self.place, self.masks, self.store = place, masks, store
        self._clear()

    def _clear(self) -> None:
        self.store.reset()
        self.is_initialized = False
        self.pending = PendingTokens()
        self.arrival: Arrival | None = None
        self._module: weakref.ref | None = None
        # The weights of the attention module that filled this layer, if it was loaded from a file.
        self.expected_weights: WeightFingerprint | None = None

    # What a method decides.

    @abstractmethod
    def num_tokens_to_keep(self, row_length: int) -> int:
        """How many tokens of a row stay after `row_length` of them have been seen."""

    @abstractmethod
    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of several queries (or of the very first one), and the eviction that follows. The keys of `call` are
        those that the layer held, and the new ones behind them; `tokens` has their positions.
        """

    @abstractmethod
    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of one query over all held tokens, the new one included, and the eviction that follows. `longest` is
        the length of the longest row in the forward pass that the query is of.
        """

    # The meeting with the model.

    @property
    def state(self) -> Any:
        """The `LayerState` of the store."""
        return self.store.state

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """`(batch, kv_heads, slots, head_dim)`, with slots that are not in use."""
        return self.state.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.state.values

    @property
    def module(self) -> torch.nn.Module | None:
        """The attention module that fills the layer; None before the first one, and when the model is gone."""
        return None if self._module is None else self._module()

    @staticmethod
    def layout_of(key: torch.Tensor, value: torch.Tensor) -> Layout:
        """The layout of keys and values `(batch, kv_heads, tokens, head_dim)`."""
        return Layout(*key.shape[:2], key.shape[3], value.shape[3], key.dtype, value.dtype, key.device)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.layout = self.layout_of(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state.row_lengths, self.state.row_held = [0] * self.batch_size, [0] * self.batch_size
        self.state.next_position = torch.zeros(self.batch_size, 1, 1, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """How many rows the layer holds."""
        return self.layout.batch_size

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the new tokens.

        Args:
            key_states, value_states (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The keys and values that attention sees, `(batch, kv_heads, keys,
            head_dim)`, the new ones last.

        Raises:
            ValueError: The tensors do not fit those that the cache holds.
            RuntimeError: The attention function never got the keys of the last `update`.
        """
        checks.check_attended(self)
        check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        checks.check_fit(self, key_states, value_states)
        self.store.leave_inference_mode()
        if self.pending.is_on:
            keys, values, self.arrival = self._put_aside(key_states, value_states)
        else:
            keys, values, self.arrival = self._store(key_states, value_states)
        keys.cache_layer = self.arrival  # type: ignore[attr-defined]
        return keys, values

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        """Stores new tokens; returns all keys and values that they attend to."""
        num_new = key.shape[2]
        if self.state.is_dense or self._is_step(num_new):
            self.store.append(key, value, self.max_slots)
            return *self.store.attended(), Arrival(self, num_new)
        held = self.store.take_in_order()
        keys, values = torch.cat([held["keys"], key], dim=2), torch.cat([held["values"], value], dim=2)
        return keys, values, Arrival(self, num_new, held["positions"])

    @property
    def max_slots(self) -> int:
        """How many slots the layer needs once it evicts."""
        return 0

    def _is_step(self, num_new: int) -> bool:
        """Whether new tokens are a decode step: one token in each row, and none is the first of its row."""
        return num_new == 1 and all(self.state.row_lengths)

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attends in the place of the model's attention function.

        Args:
            call (`AttentionCall`): The model's call. Its keys and values are those that `update` returned. Its mask
                has a column for each column seen.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: The output `(batch, num_queries, heads, head_dim)`, and the
            attention weights if the attention function returned them.
        """
        # Autograd may save the key. A way from it back to the layer would be a cycle that no collector can free.
        call.key.cache_layer = None  # type: ignore[attr-defined]
        arrival, self.arrival = self.arrival, None
        is_step = self._is_step(arrival.num_new) and arrival.put_aside is None
        try:
            self.check(call, arrival, is_step)
            seen = None if is_step else self._read(call, arrival)
        except (ValueError, NotImplementedError):
            self._refuse(arrival)
            raise
        # Autograd saves keys that need no gradient, if queries need one, as with adapters on some projections.
        self.store.is_saved = needs_gradients(call.query, call.key, call.value)
        if is_step:
            output = self._attend_next(call)
        else:
            output = self._attend_several(call, arrival, seen)
        if not self.state.is_dense:
            checks.check_attentions()
        return output

    def check(self, call: AttentionCall, arrival: Arrival, is_step: bool) -> None:
        """Raises unless the layer can attend; nothing has been counted so far."""
        if self.module is None:
            checks.check_module(self, call.module)
            self._module = weakref.ref(call.module)
        checks.check_call(self, call, arrival.num_new)
        self.store.check_call(call)
        if is_step:
            checks.check_step(self, call)

    def _refuse(self, arrival: Arrival) -> None:
        """Takes back the tokens of a call that is refused."""
        if arrival.put_aside is not None or arrival.slot_positions is not None:
            return
        self.state.length -= arrival.num_new
        if not any(self.state.row_lengths):
            self._clear()

    def _read(self, call: AttentionCall, arrival: Arrival) -> Tokens:
        """The columns seen, as the mask shows them."""
        seen = checks.read_tokens(self, call).to(self.device)
        if arrival.put_aside is not None:
            checks.check_recordable(seen)
        elif self.loses_tokens(seen):
            checks.check_left_padding(seen)
        return seen

    def loses_tokens(self, seen: Tokens) -> bool:
        """Whether the layer evicts from, or rearranges, the tokens that it holds with these."""
        if not self.state.is_dense:
            return True
        return any(length > self.num_tokens_to_keep(length) for length in seen.row_lengths)

    @torch.compiler.disable
    def _attend_several(
        self, call: AttentionCall, arrival: Arrival, seen: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to a prompt, or to tokens that may be taken back. Compilers break the graph here, not in steps."""
        if arrival.put_aside is None:
            return self.attend_prompt(call, self._take_in(seen, arrival))
        num_new = call.num_keys - (0 if arrival.slot_positions is None else arrival.slot_positions.shape[-1])
        tokens = seen if arrival.slot_positions is None else self._behind_slots(seen, arrival.slot_positions, num_new)
        output = self.attend_recorded(call, tokens)
        self.pending.chunks.append(RecordedChunk.of(call, *arrival.put_aside, seen))
        return output

    def _attend_next(self, call: AttentionCall, longest: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Counts the new token of each row and attends to it."""
        state = self.state
        state.num_seen += 1
        state.row_lengths = [length + 1 for length in state.row_lengths]
        state.row_held = [held + 1 for held in state.row_held]
        state.next_position += 1
        return self.attend_step(call, longest or max(state.row_lengths))

    def _take_in(self, seen: Tokens, arrival: Arrival) -> Tokens:
        """The tokens in the columns of the keys that attention gets. Updates the counts of the rows."""
        state, tokens = self.state, seen
        if arrival.slot_positions is not None:
            tokens = self._behind_slots(seen, arrival.slot_positions, arrival.num_new)
        else:
            state.column_positions = seen.positions if seen.has_gaps else None
            state.columns_ascend = int(seen.is_ascending)
        state.num_seen = seen.num_seen
        state.row_lengths, state.row_held = list(tokens.row_lengths), list(tokens.row_present)
        state.next_position = self.store.per_row(state.row_lengths)
        self._count_kept()
        return tokens

    def _count_kept(self) -> None:
        """How many tokens each row may hold now."""
        self.state.row_kept = [self.num_tokens_to_keep(length) for length in self.state.row_lengths]
        self.state.num_kept = self.store.per_row(self.state.row_kept)

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        """
        The tokens in slots with these positions, and in `num_new` columns behind them: the last columns of `seen`.
        """
        new = seen.positions[..., -num_new:].expand(-1, slot_positions.shape[1], -1)
        rows = zip(seen.row_lengths, self.state.row_lengths, strict=True)
        num_new_tokens = [length - before for length, before in rows]
        return replace(
            seen,
            positions=torch.cat([slot_positions, new], dim=-1),
            row_present=[held + count for held, count in zip(self.state.row_held, num_new_tokens, strict=True)],
            is_ascending=min(num_new_tokens) == num_new,
        )

    # Tokens that may be taken back.

    @property
    def record_past(self) -> bool:
        """
        Whether new tokens are put aside until `crop` is called; transformers' own layers have the same attribute.
        """
        return self.pending.is_on

    @record_past.setter
    def record_past(self, is_on: bool) -> None:
        if not is_on:
            self._settle()
        self.pending.is_on = is_on

    def activate_past_recording(self) -> None:
        """
        Nothing is evicted from now on until the next `crop`, which may take tokens back. Of the tokens that stay,
        those of the next forward pass are then treated as a prompt, and later ones as generated one by one.
        """
        self.pending.begins_turn |= not self.pending.is_on
        self.pending.is_on = True

    @property
    def last_recorded(self) -> tuple[torch.nn.Module | None, RecordedChunk]:
        """The chunk that was recorded last, and the attention module that it came from."""
        return self.module, self.pending.chunks[-1]

    def put_aside(self, module: torch.nn.Module, chunk: RecordedChunk) -> None:
        """Records a chunk of another layer, as if it had come from the attention module of this one."""
        checks.check_module(self, module)
        self.lazy_initialization(chunk.key, chunk.value)
        self._module = weakref.ref(module)
        self.activate_past_recording()
        self.pending.chunks.append(chunk)

    def _put_aside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        """Keys and values for attention: the held, the recorded and the new ones, which wait for `attend`."""
        new = own_storage(key), own_storage(value)
        parts, positions = [], None
        if not self.state.is_dense:
            held = self.store.in_order()
            parts, positions = [(held["keys"], held["values"])], held["positions"]
        elif self.state.keys is not None:
            parts = [(self.store.in_use("keys"), self.store.in_use("values"))]
        parts += [*((chunk.key, chunk.value) for chunk in self.pending.chunks), new]
        keys, values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True)) if len(parts) > 1 else new
        return keys[:], values, Arrival(self, key.shape[2], positions, new)

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of tokens that may be taken back. The layer stays as it is. The keys of `call` are the held ones in
        order of position, then the recorded and the new ones; `tokens` has their positions.
        """
        return self.store.attend_several(call, tokens)[0]

    def _settle(self) -> None:
        """Stores and scores the recorded tokens as if they came now, and evicts."""
        checks.check_settleable(self)
        for piece, is_prompt in self.pending.settle(lambda: all(self.state.row_lengths)):
            *states, arrival = self._store(piece.key, piece.value)
            call = piece.call(self.module, *states)
            if is_prompt:
                self.attend_prompt(call, self._take_in(replace(piece.seen, longest=piece.longest), arrival))
            else:
                self._attend_next(call, piece.longest)

    # What `generate` asks of any layer.

    def get_seq_length(self) -> int:
        """The number of columns seen, padding included. Position ids and the slicing of inputs go by it."""
        arrived = 0 if self.arrival is None else self.arrival.num_new
        return self.state.num_seen + self.pending.num_columns + arrived

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and the offset of the mask: a column for each column seen. `attend` reads what it needs."""
        num_seen = self.get_seq_length()
        checks.check_new_tokens(query_length, num_seen)
        return num_seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: a cache may see any number of tokens."""
        return -1

    def reset(self) -> None:
        """Forgets everything and frees the tensors."""
        self._clear()

    def compress(self) -> None:
        """Evicts the tokens beyond the budget, if the method lets them wait."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take back tokens that were not recorded: only if none was evicted and none scored."""
        return self.state.is_dense

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes back the last `-tokens_to_remove` tokens; then, if the past was recorded, does the evictions that waited.

        Raises:
            ValueError: A positive number, or more than the layer has seen.
            NotImplementedError: Tokens that were not recorded have been evicted or scored since, which cannot be
                undone.
        """
        tokens_to_remove = as_tokens_to_remove(tokens_to_remove)
        self.require_croppable(tokens_to_remove)
        if not self.is_initialized:
            return
        self.store.leave_inference_mode()
        if num_left := self.pending.take_back(-tokens_to_remove):
            self._crop_held(num_left)
        self._settle()

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raises unless `crop(tokens_to_remove)` is possible."""
        if self.is_initialized:
            checks.check_crop(self, tokens_to_remove)

    def _crop_held(self, num_columns: int) -> None:
        """Takes back the last columns of a dense layer."""
        state = self.state
        positions = self.store.column_tokens().positions[..., : state.length - num_columns]
        state.length -= num_columns
        state.num_seen -= num_columns
        state.row_lengths = [state.length] * self.batch_size
        if state.column_positions is not None:
            state.column_positions = positions.contiguous()
            state.row_lengths = (positions[:, 0] >= 0).sum(dim=-1).tolist()
        state.row_held = list(state.row_lengths)
        state.next_position = self.store.per_row(state.row_lengths)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices`, in that order."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices, device=self.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
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
            self.layout = replace(self.layout, batch_size=len(rows))

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
        # One row is enough to tell shapes, and a budget in bytes may not pay for rows that were repeated later.
        self.lazy_initialization(keys[:1], values[:1])
        self.layout = self.layout_of(keys, values)
        self.store.load_state_dict(numbers, tensors)

    # What users ask.

    def held_positions(self) -> torch.Tensor:
        """
        `(batch, kv_heads, slots)` int64: the positions of the tokens in the slots, -1 for empty ones and padding.
        """
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
