"""
The store of a layer: its shadow, the tokens of each row but for its latest ones in a form that takes less of the
device, and beside it slots of outliers, of chunks that steps exchange, and of the latest tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from pyramid_cache.caches.shadow_kv.host import HostPlace, HostValues, extended, with_room
from pyramid_cache.caches.shadow_kv.landmarks import landmarks_of, lowest_cosines
from pyramid_cache.caches.shadow_kv.low_rank import add_keys
from pyramid_cache.caches.shadow_kv.quantization import QUANTIZE, add_scaled, stored
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.engine.rotation import RotaryFrequencies, export_frequencies
from pyramid_cache.engine.state import LayerState, counts, number, row
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.ops.transfer import numbers_on


# How many tokens' keys are copied to float32 at once.
TOKENS_PER_BLOCK = 8192


@dataclass(eq=False)
class ShadowState(LayerState):
    """
    Attributes:
        held_chunks (`torch.Tensor`): `(batch, kv_heads, num_sparse_chunks)` int64, the chunk in each place that steps
            exchange, -1 for none.
        factors (`torch.Tensor`): `(batch, tokens, rank)`. Their product with `basis` is the keys before RoPE.
        basis (`torch.Tensor`): `(batch, kv_heads, rank, head_dim)`.
        landmarks (`torch.Tensor`): `(batch, kv_heads, chunks, head_dim + num_bands)`, of `landmarks_of`.
        landmark_scales (`torch.Tensor`): `(batch, kv_heads, 1, head_dim + num_bands)` float32, of quantised landmarks.
        is_selectable (`torch.Tensor`): `(batch, kv_heads, chunks)` bool, False for outliers and for what is no chunk.
        outlier_chunks (`torch.Tensor`): `(batch, kv_heads, num_outlier_chunks)` int64, -1 for none.
        outlier_cosines (`torch.Tensor`): Like it, float32: the lowest cosine of a key of the chunk and their mean.
        row_shadow (`list[int]`): How many tokens of each row are in the shadow.
        row_sparse (`list[int]`): Chunks of the shadow that a step of each row attends to.
        num_croppable (`int`): Columns of which it is known which rows have a token there.
    """

    held_chunks: torch.Tensor | None = row()
    factors: torch.Tensor | None = row()
    basis: torch.Tensor | None = row()
    landmarks: torch.Tensor | None = row()
    landmark_scales: torch.Tensor | None = row()
    is_selectable: torch.Tensor | None = row()
    outlier_chunks: torch.Tensor | None = row()
    outlier_cosines: torch.Tensor | None = row()
    row_shadow: list[int] = counts()
    row_sparse: list[int] = counts()
    num_croppable: int = number(0)


@dataclass
class Shadow:
    """
    The first `row_shadow` tokens of each row. Chunk `c` is its tokens `c * chunk_size` to `(c + 1) * chunk_size - 1`.

    Attributes:
        place (`HostPlace`): Where values go.
        rotary (`RotaryFrequencies`): What keys are turned by. Any frequencies would do as long as keys are turned back
            and forth by the same: those of the model are the ones that make them of low rank.
    """

    settings: ShadowSettings
    place: HostPlace
    state: ShadowState
    rotary: RotaryFrequencies = None  # type: ignore[assignment]
    values: HostValues = None  # type: ignore[assignment]

    @property
    def num_tokens(self) -> int:
        """Of the longest row, as is `num_chunks`."""
        return max(self.state.row_shadow, default=0)

    @property
    def num_chunks(self) -> int:
        return self.num_tokens // self.settings.chunk_size

    @property
    def num_bands(self) -> int:
        """At most one for each two dimensions of a head."""
        return min(self.settings.num_spread_bands, -(-self.state.basis.shape[3] // 2))

    def _per_row(self, numbers: list[int]) -> torch.Tensor:
        return numbers_on(self.state.basis.device, numbers, torch.int32).view(-1, 1, 1)

    def begin(self, key: torch.Tensor, value: torch.Tensor, rotary: RotaryFrequencies) -> None:
        """Empty tensors for rows, heads, dtypes and device as those of keys and values `(batch, kv_heads, ...)`."""
        state, places, head_dim, quantize = self.state, key.shape[:2], key.shape[3], self.settings.quantize
        dtype = key.dtype if quantize is None else QUANTIZE[quantize]
        state.row_shadow, self.rotary, self.values = [0] * len(key), rotary, HostValues(self.place, value)
        state.factors, state.basis = key.new_zeros(len(key), 0, 0, dtype=dtype), key.new_zeros(*places, 0, head_dim)
        width, outliers = head_dim + self.num_bands, (*places, self.settings.num_outlier_chunks)
        state.landmarks = key.new_zeros(*places, 0, width, dtype=dtype)
        if quantize is not None:
            state.landmark_scales = key.new_ones(*places, 1, width, dtype=torch.float32)
        state.is_selectable = key.new_zeros(*places, 0, dtype=torch.bool)
        state.outlier_chunks = key.new_full(outliers, -1, dtype=torch.int64)
        state.outlier_cosines = key.new_full(outliers, float("inf"), dtype=torch.float32)

    def add(self, key: torch.Tensor, value: torch.Tensor, counts: list[int], *, refit: bool) -> torch.Tensor:
        """
        Takes full chunks behind those of each row, and chooses the outliers anew.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
            counts (`list[int]`): How many of the tokens each row has, its first ones.
            refit (`bool`): Whether the basis is fitted anew in rows that have one.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, num_outlier_chunks)` int64, where each outlier comes from: an index into
            the outliers so far with the new chunks behind them.
        """
        state, starts, size, device = self.state, self.state.row_shadow, self.settings.chunk_size, key.device
        refits = [count > 0 and (refit or not start) for start, count in zip(starts, counts, strict=True)]
        is_token = torch.arange(key.shape[2], device=device) < self._per_row(counts)  # (batch, 1, tokens)
        self._add_factors(key, is_token, counts, refits)
        self.values.add(value, starts, counts)
        chunks = key.unflatten(2, (-1, size)).float()  # (batch, kv_heads, chunks, chunk_size, head_dim)
        is_chunk, landmarks = is_token[..., ::size], landmarks_of(chunks, self.num_bands)
        cosines = lowest_cosines(chunks, landmarks[..., : key.shape[3]]).masked_fill(~is_chunk, float("inf"))
        landmarks = landmarks.masked_fill(~is_chunk[..., None], 0)
        if state.landmark_scales is not None:
            state.landmarks, state.landmark_scales, landmarks = add_scaled(
                state.landmarks, state.landmark_scales, landmarks, refits
            )
        first, num_new = ([number // size for number in numbers] for numbers in (starts, counts))
        state.landmarks = extended(state.landmarks, stored(landmarks, state.landmarks.dtype), first, num_new)
        new = (self._per_row(first) + torch.arange(cosines.shape[2], device=device)).expand_as(cosines)
        cosines = torch.cat([state.outlier_cosines, cosines], dim=-1)
        # Of equal cosines the older chunk.
        chosen = cosines.sort(dim=-1, stable=True).indices[..., : self.settings.num_outlier_chunks]
        state.outlier_cosines = cosines.gather(-1, chosen)
        chunks = torch.cat([state.outlier_chunks, new], dim=-1).gather(-1, chosen)
        state.outlier_chunks = chunks.masked_fill(state.outlier_cosines.isinf(), -1)
        state.row_shadow = [start + count for start, count in zip(starts, counts, strict=True)]
        index = torch.arange(state.landmarks.shape[2], device=device)
        is_outlier = (state.outlier_chunks[..., None] == index).any(dim=2)
        state.is_selectable = (index < self._per_row(state.row_shadow) // size) & ~is_outlier
        return chosen

    def _add_factors(self, key: torch.Tensor, is_token: torch.Tensor, counts: list[int], refits: list[bool]) -> None:
        """Projects keys onto the basis, which is first fitted to them and to those held so far where `refits` asks."""
        state = self.state
        positions = self._per_row(state.row_shadow) + torch.arange(key.shape[2], device=key.device)

        def unrotated() -> Iterator[torch.Tensor]:  # (batch, tokens, kv_heads * head_dim)
            for start in range(0, key.shape[2], TOKENS_PER_BLOCK):
                block = slice(start, start + TOKENS_PER_BLOCK)
                angles = self.rotary.model_angles(positions[..., block], longest=0)
                keys = self.rotary.rotate(key[:, :, block].float(), -angles)
                yield keys.masked_fill(~is_token[..., block, None], 0).transpose(1, 2).flatten(2)

        joint = state.basis.transpose(1, 2).flatten(2)
        state.factors, joint, factors = add_keys(unrotated, state.factors, joint, self.settings.rank, refits)
        state.basis = joint.unflatten(2, (key.shape[1], key.shape[3])).transpose(1, 2).contiguous()
        state.factors = extended(state.factors, factors, state.row_shadow, counts)

    def end(self) -> None:
        """Undoes `begin`, as long as nothing has moved here."""
        for name in {*self.state.names("row")} - {*LayerState().names("row")}:
            setattr(self.state, name, None)
        self.state.row_shadow, self.rotary, self.values = [], None, None  # type: ignore[assignment]

    def reserve(self, num_tokens: int) -> None:
        """
        Room for so many tokens of each row, so that tensors stay where they are when tokens come. A rank that is a
        share of the sum of squares is known only once there are keys.
        """
        state, num_chunks = self.state, num_tokens // self.settings.chunk_size
        if not state.basis.shape[2]:
            _, kv_heads, _, head_dim = state.basis.shape
            rank = self.settings.rank
            missing = min(rank, kv_heads * head_dim) if isinstance(rank, int) else 1
            state.basis, state.factors = pad(state.basis, (0, 0, 0, missing)), pad(state.factors, (0, missing))
        state.factors, state.landmarks = with_room(state.factors, num_tokens), with_room(state.landmarks, num_chunks)
        state.is_selectable = pad(state.is_selectable, (0, state.landmarks.shape[2] - state.is_selectable.shape[2]))
        self.values.reserve(num_tokens)

    def forget(self, rows: list[int]) -> None:
        """Empties these rows."""
        state = self.state
        state.row_shadow = [0 if index in rows else count for index, count in enumerate(state.row_shadow)]
        for index in rows:
            state.factors[index] = state.landmarks[index] = 0  # they would count for the next basis and scales
            state.is_selectable[index] = False
            state.outlier_chunks[index], state.outlier_cosines[index] = -1, float("inf")

    def latest(self, num_chunks: int) -> torch.Tensor:
        """The latest chunks `(batch, kv_heads, num_chunks)` int64 that are no outliers, -1 for none."""
        is_selectable = self.state.is_selectable[..., : self.num_chunks]
        chunks = torch.where(is_selectable, torch.arange(self.num_chunks, device=is_selectable.device), -1)
        chunks = chunks.sort(dim=-1, descending=True).values[..., :num_chunks]
        return pad(chunks, (0, num_chunks - chunks.shape[-1]), value=-1)

    def everything(self, outlier_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Keys, rebuilt but for the outliers, values, and positions `(batch, 1, tokens)` int32 of all tokens, -1 behind
        the last of a shorter row. `outlier_keys` are `(batch, kv_heads, num_outlier_chunks * chunk_size, head_dim)`.
        """
        state, num_tokens, device = self.state, self.num_tokens, outlier_keys.device
        with torch.autocast(device.type, enabled=False):
            keys = state.factors[:, None, :num_tokens].float() @ state.basis.float()
        positions = torch.arange(num_tokens, dtype=torch.int32, device=device).expand(len(state.row_shadow), 1, -1)
        keys = self.rotary.rotate(keys, self.rotary.model_angles(positions, longest=0)).to(outlier_keys.dtype)
        keys = pad(keys, (0, 0, 0, 1))  # one place more, for slots of no outlier
        places = tokens_of(state.outlier_chunks, self.settings.chunk_size).long()
        index = torch.where(places < 0, num_tokens, places)[..., None].expand_as(outlier_keys)
        keys = keys.scatter_(2, index, outlier_keys)[:, :, :num_tokens]
        positions = positions.masked_fill(positions >= self._per_row(state.row_shadow), -1)
        return keys, self.values.on_device(num_tokens), positions

    def trimmed(self) -> dict[str, torch.Tensor]:
        """The tensors that have room for later tokens, without it, and the values."""
        return {
            "factors": self.state.factors[:, : self.num_tokens],
            "landmarks": self.state.landmarks[:, :, : self.num_chunks],
            "is_selectable": self.state.is_selectable[..., : self.num_chunks],
            "host_values": self.values.on_host(self.num_tokens),
        }


class ShadowStore(SlotStore):
    """The tokens of a layer: those of the shadow, and those in slots. See `ShadowKVLayer`."""

    state: ShadowState

    def __init__(self, settings: ShadowSettings, host: HostPlace) -> None:
        self.settings, self.host = settings, host
        super().__init__(ShadowState)

    def reset(self) -> None:
        super().reset()
        self.shadow = Shadow(self.settings, self.host, self.state)

    @property
    def outlier_slots(self) -> slice:
        """The slots of what no landmark stands for well."""
        return slice(0, self.settings.num_outlier_chunks * self.settings.chunk_size)

    @property
    def sparse_slots(self) -> slice:
        """The slots that steps exchange, for the row with the most chunks. They stay as many until the next turn."""
        return slice(self.outlier_slots.stop, self.tail)

    @property
    def tail(self) -> int:
        """The first slot of the latest tokens."""
        return (self.settings.num_outlier_chunks + self.state.held_chunks.shape[-1]) * self.settings.chunk_size

    def outside(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of keys, values and positions `(batch, 1, columns)` of what is not in the shadow."""
        state, row_shadow = self.state, self.state.row_shadow
        slots = slice(self.tail if all(row_shadow) else 0, state.length)
        positions = state.positions[:, :1, slots].clone()
        if slots.start == 0:
            positions[..., : self.tail].masked_fill_(self.per_row(row_shadow) > 0, -1)
        return state.keys[:, :, slots].clone(), state.values[:, :, slots].clone(), positions

    def in_order(self) -> dict[str, torch.Tensor]:
        """The tokens of the shadow, then the others."""
        shadow = self.shadow.everything(self.state.keys[:, :, self.outlier_slots])
        parts = zip(("keys", "values", "positions"), shadow, self.outside(), strict=True)
        return {name: torch.cat(both, dim=2) for name, *both in parts}

    def put_in_order(self, held: dict[str, torch.Tensor]) -> None:
        """Nothing: the shadow is in order, and no slot has room for all of it."""

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Values stay on the host: the function tells which rows it takes, and from where."""
        super().map_rows(function)
        if (values := self.shadow.values) is not None:
            values.select(function(torch.arange(len(values.tensor), device=values.device)))

    def leave_inference_mode(self) -> None:
        keys = self.state.keys
        super().leave_inference_mode()
        if self.state.keys is not keys and self.shadow.values is not None:
            self.shadow.values.select(torch.arange(len(keys), device=self.shadow.values.device))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().held_tensors()
        if self.shadow.values is not None:
            tensors |= {f"keys in {name}": tensors.pop(name) for name in ("factors", "basis", "landmarks")}
            tensors["host values"] = self.shadow.values.tensor
        return tensors

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        numbers, tensors = super().state_dict()
        rotary, frequencies = export_frequencies(self.shadow.rotary)
        trimmed = {} if self.shadow.values is None else self.shadow.trimmed()
        return numbers | {"rotary": rotary}, tensors | trimmed | frequencies

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        known = self.state.names("slot", "row")
        super().load_state_dict(numbers, {name: tensor for name, tensor in tensors.items() if name in known})
        if "host_values" in tensors:
            values = tensors["host_values"]
            self.shadow.values = HostValues(self.host, values)
            self.shadow.values.add(values, [0] * len(values), [values.shape[2]] * len(values))


def tokens_of(chunks: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The tokens `(batch, kv_heads, chunks * chunk_size)` int32 of chunks, -1 for those of none, which is -1."""
    tokens = chunks[..., None] * chunk_size + torch.arange(chunk_size, device=chunks.device)
    return tokens.clamp(min=-1).flatten(2).int()
