"""What a step of ShadowKV attends to: chunks of the shadow that are brought into slots, and the latest tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from pyramid_cache.caches.shadow_kv.host import HostPlace
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.caches.shadow_kv.store import ROW_TENSORS, Shadow, tokens_of
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace
from pyramid_cache.engine.rope import (
    FREQUENCY_TENSORS,
    RotaryFrequencies,
    SharedFrequencies,
    export_frequencies,
    import_frequencies,
)
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.registration import needs_gradients


class ShadowKVLayer(CompressedLayer):
    """
    One layer of `ShadowKVCache`. The slots are `num_outlier_chunks` chunks, then `num_sparse_chunks` chunks that steps
    exchange, then the tail. A row whose tokens all fit is exact: they are in the slots as they came, whatever other
    rows do. Of a longer one the first `row_shadow` tokens are in the shadow, the others in the tail, and the slots
    before it hold some of the shadow's chunks: the outliers as they were, and those of `held_chunks`
    `(batch, kv_heads, num_sparse_chunks)` int64, -1 for none.
    """

    row_tensors = (*CompressedLayer.row_tensors, "held_chunks")
    row_counts = (*CompressedLayer.row_counts, "row_shadow", "row_sparse")
    state_numbers = (*CompressedLayer.state_numbers, "num_croppable")
    extra_tensors = (*ROW_TENSORS, "host_values", *FREQUENCY_TENSORS)
    heads_share_positions = False
    evicts = False

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        settings: ShadowSettings,
        host: HostPlace,
        frequencies: SharedFrequencies,
    ) -> None:
        self.settings, self.host, self.frequencies = settings, host, frequencies
        super().__init__(place, None, masks)

    def _clear(self) -> None:
        super()._clear()
        self.shadow = Shadow(self.settings, self.host)
        self.row_sparse: list[int] = []  # chunks of the shadow that a step of the row attends to
        self.num_croppable = 0  # columns of which it is known which rows have a token there

    @property
    def row_shadow(self) -> list[int]:
        """How many tokens of each row are in the shadow."""
        return self.shadow.row_tokens

    @row_shadow.setter
    def row_shadow(self, counts: list[int]) -> None:
        self.shadow.row_tokens = counts

    # Sizes.

    def num_tokens_to_keep(self, row_length: int) -> int:
        return self.settings.max_exact_tokens(row_length)

    @property
    def max_slots(self) -> int:
        return max(self.row_kept) + 1 if self.positions is None else self.tail + self.settings.tail_capacity

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
        return (self.settings.num_outlier_chunks + self.held_chunks.shape[-1]) * self.settings.chunk_size

    def _movable(self, least: int) -> list[int]:
        """
        How many tokens of each row move to the shadow: of exact rows that are too long, and of others once so many are
        outside of it.
        """
        moved = []
        for length, shadow, kept in zip(self.row_lengths, self.row_shadow, self.row_kept, strict=True):
            moves = length - shadow >= least if shadow else length > kept
            moved.append(self.settings.num_movable(length - shadow) if moves else 0)
        return moved

    # Attention.

    def _take_in(self, seen: Tokens, num_new: int) -> Tokens:
        before = self.row_lengths
        tokens = super()._take_in(seen, num_new)
        # Padding in front of all else is where a row begins.
        begun = [length - earlier for length, earlier in zip(self.row_lengths, before, strict=True) if earlier]
        num_full = min(begun, default=num_new)
        self.num_croppable = self.num_croppable + num_new if num_full == num_new else num_full
        self.row_sparse = [self.settings.num_sparse_chunks(length) for length in self.row_lengths]
        return tokens

    def _check_call(self, call: AttentionCall) -> None:
        super()._check_call(call)
        if self.positions is not None and needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                "Gradients do not pass through keys that are rebuilt and values that come from the host. Call the "
                "model under `torch.no_grad()`."
            )

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.attend_recorded(call, tokens)
        if self.positions is not None or self.must_evict:
            self.require_left_padding(tokens)
            self._absorb_turn(call, tokens)
        return output

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.num_croppable += 1
        if self.positions is None:
            output = call.run()
            if self.must_evict:
                self._absorb_turn(call, self.column_tokens)
            return output
        arguments = call.logit_arguments
        self._fetch(call.query, arguments["scaling"])
        output = decode_attention(call.query, call.key, call.value, mask=self.slot_mask(), **arguments)[0], None
        if self._move_tail(self.settings.tail_capacity):
            self._fetch(call.query, arguments["scaling"])  # which may be attended to again
        return output

    @torch.no_grad()
    def _fetch(self, query: torch.Tensor | None = None, scaling: float = 1.0) -> None:
        """
        Brings the chunks that a query `(batch, heads, 1, head_dim)` attends to most into the slots. Without a query
        the latest ones, which the next one is free to exchange.
        """
        if not self.shadow.num_tokens:
            return
        places, sparse = self.held_chunks.shape[-1], self.sparse_slots
        wanted = self.shadow.latest(places) if query is None else self.shadow.select(query, scaling, places)
        if min(self.row_sparse) < places:
            is_beyond = torch.arange(places, device=self.device) >= self.per_row(self.row_sparse)
            wanted = wanted.masked_fill(is_beyond, -1)
        self.shadow.load(self.keys[:, :, sparse], self.values[:, :, sparse], self.held_chunks, wanted)
        self._mark(sparse, self.held_chunks)

    def _mark(self, slots: slice, chunks: torch.Tensor) -> None:
        """Slots of rows that have a shadow hold these chunks of it."""
        positions = tokens_of(chunks, self.settings.chunk_size)
        if not all(self.row_shadow):
            positions = torch.where(self.per_row(self.row_shadow) > 0, positions, self.positions[..., slots])
        self.positions[..., slots] = positions

    # From the slots to the shadow.

    @torch.no_grad()
    def _absorb_turn(self, call: AttentionCall, tokens: Tokens) -> None:
        """What follows several tokens: rows that have a shadow, or are too long now to be exact, take them into it."""
        if self.positions is None:
            rotary = self.frequencies.frequencies_of(call.module, self.device)
            self.shadow.begin(call.key, call.value, rotary or RotaryFrequencies(torch.zeros(0)))
            self.column_positions = None
            self._make_slots(call.key, call.value, 0)
        elif self.held_chunks.shape[-1] != max(self.row_sparse):
            self._make_slots(self.keys, self.values, self.outlier_slots.stop)
        first = self.shadow.num_tokens
        outside = call.key[:, :, first:], call.value[:, :, first:], tokens.positions[..., first:]
        self._arrange(*outside, self._movable(0), refit=True)
        self._fetch(call.query[:, :, -1:], call.logit_arguments["scaling"])

    def _make_slots(self, key: torch.Tensor, value: torch.Tensor, num_kept: int) -> None:
        """Slots for the chunks that rows ask for, which hold none yet, and for the tail; the first ones are kept."""
        positions = key.new_empty(*key.shape[:2], 0, dtype=torch.int32) if self.positions is None else self.positions
        self.held_chunks = positions.new_full((*key.shape[:2], max(self.row_sparse)), -1, dtype=torch.int64)
        missing = self.tail + self.settings.tail_capacity - num_kept
        self.keys, self.values = (pad(tensor[:, :, :num_kept], (0, 0, 0, missing)) for tensor in (key, value))
        self.positions = pad(positions[..., :num_kept], (0, missing), value=-1)

    @torch.no_grad()
    def _move_tail(self, least: int) -> bool:
        """
        Moves tokens to the shadow, of rows with `least` outside of it and of exact rows whose slots are full.
        Returns whether there are such rows; they do not hold yet what has moved.
        """
        moved = self._movable(least)
        if any(moved) or self.length == self.max_slots:
            self._arrange(*self._outside(), moved)
        return any(moved)

    def _outside(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of keys, values and positions `(batch, 1, columns)` of what is not in the shadow."""
        slots = slice(self.tail if all(self.row_shadow) else 0, self.length)
        positions = self.positions[:, :1, slots].clone()
        if slots.start == 0:
            positions[..., : self.tail].masked_fill_(self.per_row(self.row_shadow) > 0, -1)
        return self.keys[:, :, slots].clone(), self.values[:, :, slots].clone(), positions

    def _arrange(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, moved: list[int], refit: bool = False
    ) -> None:
        """
        Moves tokens to the shadow and puts the others into the slots.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`, of all that is not in the shadow.
            positions (`torch.Tensor`): `(batch, 1, columns)` int32, theirs, -1 for none.
            moved (`list[int]`): How many of each row move, its first ones.
            refit (`bool`): Whether the basis is fitted anew in rows that have one.
        """
        order = positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)
        if any(moved):
            first = order[..., : max(moved)]
            self._move(gather_tokens(key, first), gather_tokens(value, first), moved, refit)
        # The others of a row stand side by side: from its tail on, or from the first slot on if it is exact.
        counts = [length - shadow for length, shadow in zip(self.row_lengths, self.row_shadow, strict=True)]
        firsts = [self.tail if shadow else 0 for shadow in self.row_shadow]
        self.length = max(self.tail, *map(sum, zip(firsts, counts, strict=True)))
        slots = slice(min(firsts), self.length)
        places = torch.arange(slots.start, slots.stop, device=self.device) - self.per_row(firsts)
        is_token = (places >= 0) & (places < self.per_row(counts))  # (batch, 1, slots)
        index = order.gather(-1, (places + self.per_row(moved)).clamp(0, max(order.shape[-1] - 1, 0)))
        self.positions[..., : self.tail].masked_fill_(self.per_row(self.row_shadow) == 0, -1)
        self.positions[..., self.tail :] = -1
        for tensor, source in ((self.keys, key), (self.values, value), (self.positions, positions)):
            mask = is_token[..., None] if tensor.dim() == 4 else is_token
            tensor[:, :, slots] = torch.where(mask, gather_tokens(source, index), tensor[:, :, slots])
        first, size = self.outlier_slots.stop, self.settings.chunk_size
        rows = zip(self.row_shadow, self.row_sparse, counts, strict=True)
        self.row_held = [min(shadow, first + sparse * size) + count for shadow, sparse, count in rows]

    def _move(self, key: torch.Tensor, value: torch.Tensor, counts: list[int], refit: bool) -> None:
        """Moves the first `counts` tokens of each row to the shadow; the outliers among them stay in slots as well."""
        slots, size = self.outlier_slots, self.settings.chunk_size
        with torch.autocast(self.device.type, enabled=False):
            chosen = self.shadow.add(key, value, counts, refit=refit)
        for tensor, new in ((self.keys, key), (self.values, value)):
            candidates = torch.cat([tensor[:, :, slots], new], dim=2)
            tensor[:, :, slots] = gather_tokens(candidates, tokens_of(chosen, size).long())
        self._mark(slots, self.shadow.outlier_chunks)
        # A chunk is not attended to twice.
        is_outlier = (self.held_chunks[..., None] == self.shadow.outlier_chunks[..., None, :]).any(dim=-1)
        self._mark(self.sparse_slots, self.held_chunks.masked_fill_(is_outlier, -1))

    # All that was seen: several tokens attend to it, and `crop` begins with it.

    def _sorted_slots(self) -> dict[str, torch.Tensor]:
        """The tokens of the shadow, then the others."""
        shadow = self.shadow.everything(self.keys[:, :, self.outlier_slots])
        parts = zip(self.slot_tensors, shadow, self._outside(), strict=True)
        return {name: torch.cat(both, dim=2) for name, *both in parts}

    def _take_slots(self) -> dict[str, torch.Tensor]:
        return self._sorted_slots()

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        tokens = super()._behind_slots(seen, slot_positions, num_new)
        return replace(tokens, row_present=list(seen.row_lengths))

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return True

    def require_croppable(self, tokens_to_remove: int) -> None:
        super().require_croppable(tokens_to_remove)
        num_columns = -tokens_to_remove - (self.get_seq_length() - self.num_seen)
        if self.positions is not None and num_columns > self.num_croppable:
            raise NotImplementedError(
                f"`crop({tokens_to_remove})`: {num_columns} columns back some rows have padding in a later turn, and "
                "which it is is no longer known. Take back at most "
                f"{-tokens_to_remove - num_columns + self.num_croppable}."
            )

    def _crop_held(self, num_columns: int) -> None:
        self.num_croppable = max(self.num_croppable - num_columns, 0)
        if self.positions is None:
            super()._crop_held(num_columns)
            return
        key, value, positions = self._sorted_slots().values()
        self.num_seen -= num_columns
        self.row_lengths = [max(length - num_columns, 0) for length in self.row_lengths]
        self.next_position = self.per_row(self.row_lengths)
        # Rows of which tokens in the shadow go begin it anew with those that stay, or are exact if these fit.
        rows = zip(self.row_lengths, self.row_shadow, strict=True)
        self.shadow.forget([row for row, (length, shadow) in enumerate(rows) if length < shadow])
        shadow = self.per_row(self.row_shadow)
        self.held_chunks.masked_fill_(shadow == 0, -1)
        goes = (positions >= self.next_position) | (positions < shadow)
        moved = self._movable(self.settings.tail_capacity)
        self._arrange(key, value, positions.masked_fill(goes, -1), moved)
        self._fetch()

    def compress(self) -> None:
        if self.positions is not None and self._move_tail(least=0):
            self._fetch()

    # Rows and files.

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        self.shadow.map_rows(function)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        frequencies = enumerate(self.frequencies.held_tensors())
        held = super().held_tensors() | self.shadow.held_tensors()
        return held | {f"frequencies_{index}": tensor for index, tensor in frequencies}

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        numbers, tensors = super().export_state()
        numbers["rotary"], frequencies = export_frequencies(self.shadow.rotary)
        return numbers, tensors | self.shadow.export_tensors() | frequencies

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().import_state(numbers, tensors)
        self.shadow.import_tensors(tensors)
        if self.positions is not None:
            found = import_frequencies(numbers["rotary"], tensors)
            self.shadow.rotary = self.frequencies.shared(found) if found else RotaryFrequencies(torch.zeros(0))
            self._resize(self.max_slots)
