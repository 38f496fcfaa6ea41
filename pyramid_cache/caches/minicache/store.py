"""
The stores of a pair of layers. Older tokens of both are merged, and the store of the first layer holds them. The keys
and values of each store are those of the latest tokens.

Between two forward passes the merged tokens of a row come in the first slots, each in that of its position. Attention
restores them for one layer at a time. When the second layer is done, both hand over the blocks that are due.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from pyramid_cache.caches.minicache.merging import MergedLayers, Merger
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.selection import gather_tokens, in_order
from pyramid_cache.engine.state import LayerState, grown, row
from pyramid_cache.engine.store import MIN_GROWTH, SlotStore
from pyramid_cache.ops.registration import needs_gradients


# Of keys and of values: the fields of `MergedLayers`.
FIELDS = {
    name: tuple(f"{name[:-1]}_{field}" for field in MergedLayers._fields)  # key_directions, …, value_places
    for name in ("keys", "values")
}


@dataclass(eq=False)
class PairState(LayerState):
    """
    The state of a layer of a pair. The first `num_quantized` slots are of merged tokens; `row_quantized` tells how
    many of them each row has. The further fields are those of `MergedLayers`; the second layer leaves them empty.
    """

    key_directions: torch.Tensor | None = row()
    key_norms: torch.Tensor | None = row()
    key_exact: torch.Tensor | None = row()
    key_places: torch.Tensor | None = row()
    value_directions: torch.Tensor | None = row()
    value_norms: torch.Tensor | None = row()
    value_exact: torch.Tensor | None = row()
    value_places: torch.Tensor | None = row()


class PairStore(SlotStore):
    """
    Args:
        merger (`Merger`): How layers are merged.
        first (`PairStore`, *optional*): The store of the first layer, for that of the second.
    """

    state: PairState

    def __init__(self, merger: Merger, first: "PairStore | None" = None) -> None:
        self.merger, self.first = merger, first
        super().__init__(PairState)

    def check_call(self, call: AttentionCall) -> None:
        if needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                "Gradients do not pass through merged keys and values. Call the model under `torch.no_grad()`, or use "
                "DynamicCache."
            )

    def is_full(self) -> bool:
        return False

    def _make_room(self, num_new: int) -> None:
        if self.state.num_quantized:
            self.resize(self.state.length + max(MIN_GROWTH, num_new))
        else:
            super()._make_room(num_new)

    def whole(self, name: str) -> torch.Tensor:
        """Keys or values of all slots."""
        latest, holder = self.in_use(name), self if self.first is None else self.first
        merged = MergedLayers(*(getattr(holder.state, field) for field in FIELDS[name]))
        restored = merged.restored(int(self.first is not None), self.merger.block_length)
        return torch.cat([restored.to(latest.device), latest], dim=2)

    def unpack(self) -> None:
        """Restores the merged tokens of this layer."""
        if self.state.num_quantized:
            self.state.keys, self.state.values = self.whole("keys"), self.whole("values")
            self.state.num_quantized = 0

    @torch.no_grad()
    def pack(self) -> None:
        """Frees restored tokens. If this is the second layer, merges the blocks that are due."""
        state = self.state
        before = state.row_quantized or [0] * len(state.row_lengths)
        if not state.num_quantized and any(before):
            self.leave(before)
        after = [self.merger.num_merged(length) for length in state.row_lengths]
        if self.first is None or after == before:
            return
        pair = (self.first, self)
        for store in pair:
            store.leave(before)
        num_new = max(stop - start for start, stop in zip(before, after, strict=True))
        device = self.first.state.next_position.device
        for name in FIELDS:
            # The first token that is not merged is the first one here. Of rows with fewer the others are not taken.
            new = (store.in_use(name)[:, :, :num_new].to(device) for store in pair)
            self.first.take(name, self.merger.merge(*new), before, after)
        for store in pair:
            store.leave(after)

    def trim(self) -> None:
        """Frees the slots of merged tokens that no row has any more."""
        state, num_before, num_merged = self.state, self.state.num_quantized, max(self.state.row_quantized, default=0)
        if num_merged >= num_before:
            return
        for field in (field for fields in FIELDS.values() for field in fields):
            if (tensor := getattr(state, field)) is not None:  # with some tokens of each block, or all
                length = tensor.shape[2] * num_merged // num_before
                setattr(state, field, grown(tensor, length, length, fill=0) if length else None)
        state.positions = torch.cat([state.positions[..., :num_merged], state.positions[..., num_before:]], dim=-1)
        state.num_quantized, state.length = num_merged, state.length - num_before + num_merged

    def take(self, name: str, new: MergedLayers, before: list[int], after: list[int]) -> None:
        """Stores blocks of keys or values: those of each row from position `before` on, up to `after`."""
        num_new = new.directions.shape[2]
        for field, tensor in zip(FIELDS[name], new, strict=True):
            if tensor is None:
                continue
            starts, stops, counts = (  # of fields that have some tokens of each block, these
                [tokens * tensor.shape[2] // num_new for tokens in numbers]
                for numbers in (before, after, [stop - start for start, stop in zip(before, after, strict=True)])
            )
            held = getattr(self.state, field)
            held = tensor[:, :, :0] if held is None else held
            held = grown(held, held.shape[2], max(stops), fill=0)
            for row_index, (start, stop, count) in enumerate(zip(starts, stops, counts, strict=True)):
                held[row_index, :, start:stop] = tensor[row_index, :, :count]
            setattr(self.state, field, held)

    def leave(self, counts: list[int]) -> None:
        """Keys and values of each row are those from these positions on, in order. Earlier ones are merged."""
        state = self.state
        num_merged = max(counts)
        num_latest = max(length - count for length, count in zip(state.row_lengths, counts, strict=True))
        positions = self.column_tokens().positions if state.is_dense else self.in_use("positions")
        starts = self.per_row(counts)
        latest = in_order(positions, positions >= starts, num_latest)
        for name in FIELDS:
            setattr(state, name, gather_tokens(self.in_use(name), latest - state.num_quantized))
        merged = torch.arange(num_merged, dtype=torch.int32, device=positions.device).expand(len(counts), 1, -1)
        latest_positions = gather_tokens(positions, latest).masked_fill(latest < 0, -1)
        state.positions = torch.cat([merged.masked_fill(merged >= starts, -1), latest_positions], dim=-1)
        state.num_quantized, state.length = num_merged, num_merged + num_latest
        state.row_quantized, state.column_positions, state.free_slots = counts, None, None

    def attend_step(
        self, call: AttentionCall, scores: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        if self.state.num_quantized:
            call = replace(call, key=self.whole("keys"), value=self.whole("values"))
        return super().attend_step(call, scores)

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(numbers, tensors)
        state, num_merged = self.state, numbers["num_quantized"]
        if self.first is not None:
            if state.row_quantized != self.first.state.row_quantized:
                raise ValueError(f"{state.row_quantized} tokens are merged, {self.first.state.row_quantized} below")
            return
        num_exact = num_merged // self.merger.block_length * self.merger.num_exact
        for name, fields in FIELDS.items() if num_merged else ():
            batch, heads, _, width = tensors[name].shape
            sizes = [(num_merged, width), (num_merged, 2), (num_exact, width), (num_exact,)]
            for index, (field, size) in enumerate(zip(fields, sizes, strict=True)):
                tensor = getattr(state, field)
                dtype = torch.uint8 if index == 3 else tensors[name].dtype
                is_there = tensor is not None
                if is_there != (size[0] > 0) or (
                    is_there and (tensor.dtype, tensor.shape) != (dtype, (batch, heads, *size))
                ):
                    raise ValueError(f"`{field}` is {(tensor.dtype, tuple(tensor.shape)) if is_there else None}")

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Merged keys count as keys, and merged values as values."""
        roles = {field: f"{name} {field}" for name, fields in FIELDS.items() for field in fields}
        return {roles.get(name, name): tensor for name, tensor in super().held_tensors().items()}
