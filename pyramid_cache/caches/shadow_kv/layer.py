"""What a step of ShadowKV attends to: chunks of the shadow that are brought into slots, and the latest tokens."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from pyramid_cache.caches.shadow_kv.host import HostPlace
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.caches.shadow_kv.step import ShadowStep
from pyramid_cache.caches.shadow_kv.store import ShadowState, ShadowStore, tokens_of
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import Arrival, CompressedLayer
from pyramid_cache.engine.rotation import RotaryFrequencies, import_frequencies
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.registration import KERNEL_DTYPES, kernels_of, needs_gradients


class ShadowKVLayer(CompressedLayer):
    """
    One layer of `ShadowKVCache`. The slots are `num_outlier_chunks` chunks, then `num_sparse_chunks` chunks that steps
    exchange, then the tail. A row whose tokens all fit is exact: they are in the slots as they came, whatever other
    rows do. Of a longer one the first `row_shadow` tokens are in the shadow, the others in the tail, and the slots
    before it hold some of the shadow's chunks: the outliers as they were, and those of `held_chunks`.
    """

    evicts = False
    needs_whole_layers = True
    needs_rotary = True
    can_fix = True

    store: ShadowStore
    state: ShadowState

    def __init__(self, place: LayerPlace, masks: MaskReader, settings: ShadowSettings, host: HostPlace) -> None:
        self.settings = settings
        super().__init__(place, masks, ShadowStore(settings, host))

    def _clear(self) -> None:
        super()._clear()
        self.shadow = self.store.shadow
        # The query heads, and the factor on their logits, known from the first call of the model on.
        self.num_query_heads, self.scaling = 0, 1.0

    def num_tokens_to_keep(self, row_length: int) -> int:
        return self.settings.max_exact_tokens(row_length)

    @property
    def max_slots(self) -> int:
        state = self.state
        return max(state.row_kept, default=0) + 1 if state.is_dense else self.store.tail + self.settings.tail_capacity

    @property
    def num_steps_left(self) -> int:
        """How many tokens of each row may come until some move to the shadow, or the slots are full."""
        state, capacity = self.state, self.settings.tail_capacity
        rows = zip(state.row_lengths, state.row_shadow, state.row_kept, strict=True)
        room = [(capacity if shadow else kept + 1) + shadow - length for length, shadow, kept in rows]
        return min(*room, self.max_slots - state.length)

    def _movable(self, least: int) -> list[int]:
        """
        How many tokens of each row move to the shadow: of exact rows that are too long, and of others once so many are
        outside of it.
        """
        moved = []
        state = self.state
        for length, shadow, kept in zip(state.row_lengths, state.row_shadow, state.row_kept, strict=True):
            moves = length - shadow >= least if shadow else length > kept
            moved.append(self.settings.num_movable(length - shadow) if moves else 0)
        return moved

    def _take_in(self, seen: Tokens, arrival: Arrival) -> Tokens:
        before, num_new = self.state.row_lengths, arrival.num_new
        tokens = super()._take_in(seen, arrival)
        # Padding in front of all else is where a row begins.
        begun = [length - earlier for length, earlier in zip(self.state.row_lengths, before, strict=True) if earlier]
        num_full = min(begun, default=num_new)
        self.state.num_croppable = self.state.num_croppable + num_new if num_full == num_new else num_full
        self.state.row_sparse = [self.settings.num_sparse_chunks(length) for length in self.state.row_lengths]
        return tokens

    def check(self, call: AttentionCall, arrival: Arrival, is_step: bool) -> None:
        super().check(call, arrival, is_step)
        if call.key.dtype not in KERNEL_DTYPES:
            raise NotImplementedError(
                f"ShadowKVCache takes float16, bfloat16 and float32, not {call.key.dtype}: load the model in one."
            )
        if not self.state.is_dense and needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                "Gradients do not pass through keys that are rebuilt and values that come from the host. Call the "
                "model under `torch.no_grad()`."
            )

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._remember(call)
        output = self.attend_recorded(call, tokens)
        if not self.state.is_dense or self.state.must_evict:
            self._absorb_turn(call, tokens)
        return output

    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._remember(call)
        self.state.num_croppable += 1
        if self.state.is_dense:
            output = call.run()
            if self.state.must_evict:
                self._absorb_turn(call, self.store.column_tokens())
            return output
        self.fetch(call.query)
        mask = self.store.in_use("positions") >= 0 if self.state.has_empty_slots else None
        output = decode_attention(call.query, call.key, call.value, mask=mask, **call.logit_arguments)[0], None
        if self.move_tail():
            self.fetch(call.query)  # which may be attended to again
        return output

    def _remember(self, call: AttentionCall) -> None:
        self.num_query_heads, self.scaling = call.query.shape[1], call.logit_arguments["scaling"]

    @torch.no_grad()
    def fetch(self, query: torch.Tensor | None = None) -> None:
        """
        Brings the chunks that a query `(batch, heads, 1, head_dim)` attends to most into the slots. Without a query
        the latest ones, which the next one is free to exchange.
        """
        if self.shadow.num_tokens:
            with torch.autocast(self.device.type, enabled=False):
                ShadowStep(self).fetch(query)

    def _mark(self, slots: slice, chunks: torch.Tensor) -> None:
        """Slots of rows that have a shadow hold these chunks of it."""
        positions = tokens_of(chunks, self.settings.chunk_size)
        if not all(self.state.row_shadow):
            has_shadow = self.store.per_row(self.state.row_shadow) > 0
            positions = torch.where(has_shadow, positions, self.state.positions[..., slots])
        self.state.positions[..., slots] = positions

    @torch.no_grad()
    def _absorb_turn(self, call: AttentionCall, tokens: Tokens) -> None:
        """What follows several tokens: rows that have a shadow, or are too long now to be exact, take them into it."""
        if self.state.is_dense:
            self._begin_shadow(call.key, call.value, call.module)
            self._make_slots(call.key, call.value, 0)
        elif self.state.held_chunks.shape[-1] != max(self.state.row_sparse):
            self._make_slots(self.state.keys, self.state.values, self.store.outlier_slots.stop)
        first = self.shadow.num_tokens
        outside = call.key[:, :, first:], call.value[:, :, first:], tokens.positions[..., first:]
        self._arrange(*outside, self._movable(0), refit=True)
        self.fetch(call.query[:, :, -1:])

    def _begin_shadow(self, key: torch.Tensor, value: torch.Tensor, module: torch.nn.Module) -> None:
        """An empty shadow of a dense layer, which makes slots next."""
        no_rotation = RotaryFrequencies(torch.zeros(0, device="cpu"))
        self.shadow.begin(key, value, self.rotary_of(module) or no_rotation)
        self.state.column_positions = None

    def _make_slots(self, key: torch.Tensor, value: torch.Tensor, num_kept: int) -> None:
        """Slots for the chunks that rows ask for, which hold none yet, and for the tail; the first ones are kept."""
        state, places = self.state, key.shape[:2]
        positions = key.new_empty(*places, 0, dtype=torch.int32) if state.is_dense else state.positions
        state.held_chunks = positions.new_full((*places, max(state.row_sparse)), -1, dtype=torch.int64)
        missing = self.store.tail + self.settings.tail_capacity - num_kept
        state.keys, state.values = (pad(tensor[:, :, :num_kept], (0, 0, 0, missing)) for tensor in (key, value))
        state.positions = pad(positions[..., :num_kept], (0, missing), value=-1)

    @torch.no_grad()
    def move_tail(self, least: int | None = None) -> bool:
        """
        Moves tokens to the shadow, of rows with `least` outside of it, by default as many as the tail has slots, and
        of exact rows whose slots are full. Returns whether there are such rows; they do not hold yet what has moved.
        """
        least = self.settings.tail_capacity if least is None else least
        moved = self._movable(least)
        if any(moved) or self.state.length == self.max_slots:
            self._arrange(*self.store.outside(), moved)
        return any(moved)

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
        state, tail = self.state, self.store.tail
        counts = [length - shadow for length, shadow in zip(state.row_lengths, state.row_shadow, strict=True)]
        firsts = [tail if shadow else 0 for shadow in state.row_shadow]
        state.length = max(tail, *map(sum, zip(firsts, counts, strict=True)))
        slots = slice(min(firsts), state.length)
        places = torch.arange(slots.start, slots.stop, device=self.device) - self.store.per_row(firsts)
        is_token = (places >= 0) & (places < self.store.per_row(counts))  # (batch, 1, slots)
        index = order.gather(-1, (places + self.store.per_row(moved)).clamp(0, max(order.shape[-1] - 1, 0)))
        state.positions[..., :tail].masked_fill_(self.store.per_row(state.row_shadow) == 0, -1)
        state.positions[..., tail:] = -1
        for tensor, source in ((state.keys, key), (state.values, value), (state.positions, positions)):
            mask = is_token[..., None] if tensor.dim() == 4 else is_token
            tensor[:, :, slots] = torch.where(mask, gather_tokens(source, index), tensor[:, :, slots])
        first, size = self.store.outlier_slots.stop, self.settings.chunk_size
        rows = zip(state.row_shadow, state.row_sparse, counts, strict=True)
        state.row_held = [min(shadow, first + sparse * size) + count for shadow, sparse, count in rows]

    def _move(self, key: torch.Tensor, value: torch.Tensor, counts: list[int], refit: bool) -> None:
        """Moves the first `counts` tokens of each row to the shadow; the outliers among them stay in slots as well."""
        slots, size = self.store.outlier_slots, self.settings.chunk_size
        with torch.autocast(self.device.type, enabled=False):
            chosen = self.shadow.add(key, value, counts, refit=refit)
        for tensor, new in ((self.state.keys, key), (self.state.values, value)):
            candidates = torch.cat([tensor[:, :, slots], new], dim=2)
            tensor[:, :, slots] = gather_tokens(candidates, tokens_of(chosen, size).long())
        self._mark(slots, self.state.outlier_chunks)
        # A chunk is not attended to twice.
        is_outlier = (self.state.held_chunks[..., None] == self.state.outlier_chunks[..., None, :]).any(dim=-1)
        self._mark(self.store.sparse_slots, self.state.held_chunks.masked_fill_(is_outlier, -1))

    # Steps of fixed shapes.

    def may_fix(self, max_length: int | None = None) -> bool:
        """
        Needs a call of the model before, memory of the host that the device reads itself, and room there for all
        values. Without `max_length` tensors get no room for later tokens: they grow as these come.
        """
        if not self.num_query_heads or self.module is None:
            return False
        host, layout = self.store.host, self.layout
        has_kernels = self.device.type == "cuda" and kernels_of("triton_shadow", self.device) is not None
        if self.device.type != "cpu" and (host.folder is not None or not has_kernels):
            return False
        shape = layout.batch_size, layout.kv_heads, self._num_movable_in(max_length), layout.value_dim
        return host.has_room(shape, layout.value_dtype)

    def fix(self, max_length: int | None = None, in_graph: bool = False) -> FixedStep:
        if not in_graph:
            return ShadowStep(self)
        self.store.leave_inference_mode()
        was_dense = self.state.is_dense
        if was_dense:
            self._open_slots()
        self.shadow.reserve(self._num_movable_in(max_length))
        return ShadowStep(self, in_graph, was_dense)

    def _num_movable_in(self, max_length: int | None) -> int:
        """How many tokens of a sequence of this length, by default of the one so far, move to the shadow."""
        return self.settings.num_movable(self.get_seq_length() if max_length is None else max_length)

    def _open_slots(self) -> None:
        """Puts the tokens of a dense layer into slots, where rows are exact: in columns as they are, if these fit."""
        state = self.state
        key, value = self.store.in_use("keys"), self.store.in_use("values")
        positions = self.store.column_tokens().positions
        self._begin_shadow(key, value, self.module)
        self._make_slots(key, value, 0)
        if state.length < self.max_slots:
            for tensor, columns in ((state.keys, key), (state.values, value), (state.positions, positions)):
                tensor[:, :, : state.length] = columns
        else:
            self._arrange(key, value, positions, [0] * self.batch_size)

    # All that was seen: several tokens attend to it, and `crop` begins with it.

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        tokens = super()._behind_slots(seen, slot_positions, num_new)
        return replace(tokens, row_present=list(seen.row_lengths))

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return True

    def require_croppable(self, tokens_to_remove: int) -> None:
        super().require_croppable(tokens_to_remove)
        num_columns = -tokens_to_remove - (self.get_seq_length() - self.state.num_seen)
        if not self.state.is_dense and num_columns > self.state.num_croppable:
            raise NotImplementedError(
                f"`crop({tokens_to_remove})`: {num_columns} columns back some rows have padding in a later turn, and "
                "which it is is no longer known. Take back at most "
                f"{-tokens_to_remove - num_columns + self.state.num_croppable}."
            )

    def crop(self, tokens_to_remove: int) -> None:
        self.take_step(None)
        super().crop(tokens_to_remove)

    def _crop_held(self, num_columns: int) -> None:
        self.state.num_croppable = max(self.state.num_croppable - num_columns, 0)
        if self.state.is_dense:
            super()._crop_held(num_columns)
            return
        key, value, positions = self.store.in_order().values()
        self.state.num_seen -= num_columns
        self.state.row_lengths = [max(length - num_columns, 0) for length in self.state.row_lengths]
        self.state.next_position = self.store.per_row(self.state.row_lengths)
        # Rows of which tokens in the shadow go begin it anew with those that stay, or are exact if these fit.
        rows = zip(self.state.row_lengths, self.state.row_shadow, strict=True)
        self.shadow.forget([row for row, (length, shadow) in enumerate(rows) if length < shadow])
        shadow = self.store.per_row(self.state.row_shadow)
        self.state.held_chunks.masked_fill_(shadow == 0, -1)
        goes = (positions >= self.state.next_position) | (positions < shadow)
        moved = self._movable(self.settings.tail_capacity)
        self._arrange(key, value, positions.masked_fill(goes, -1), moved)
        self.fetch()

    def compress(self) -> None:
        self.take_step(None)
        if not self.state.is_dense and self.move_tail(least=0):
            self.fetch()

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().import_state(numbers, tensors)
        if not self.state.is_dense:
            self.shadow.rotary = self.frequencies.shared(import_frequencies(numbers["rotary"], tensors))
            self.store.resize(self.max_slots)
