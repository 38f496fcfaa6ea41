"""
A store whose older tokens are quantised (`pyramid_cache.engine.quantization`), or whose older keys are thin.

Between two forward passes the first slots hold codes, and keys and values hold the latest tokens alone. A step attends
to both and restores the codes tile by tile. A forward pass of several tokens, and an eviction, restore all tokens of
one layer. The codes stay beside them, move with them, and take their place again when the layer is done. So a token is
quantised once, unless its key or value changes.
"""

from typing import Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.quantization import Quantizer
from pyramid_cache.engine.ragged_store import CompetingHeads
from pyramid_cache.engine.selection import best_of_all_heads, gather_tokens, in_order
from pyramid_cache.engine.state import CODES, LayerState, grown
from pyramid_cache.engine.store import MIN_GROWTH, Compaction, SlotStore
from pyramid_cache.engine.thin_keys import WINDOW, best_channels, mean_squares
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops.quantized import Coded, Plain, decode_quantized_attention, packed_slots
from pyramid_cache.ops.registration import needs_gradients


# Of keys and of values: their codes, and the scales of these.
FIELDS = {"keys": ("key_codes", "key_scales"), "values": ("value_codes", "value_scales")}


class QuantizedStore(SlotStore):
    """
    Args:
        rewrites (`bool`): Whether the method changes keys or values that it holds.
        heads_share_tokens (`bool`): Whether all heads hold the same tokens.
    """

    def __init__(
        self, state_class: type[LayerState], quantizer: Quantizer, rewrites: bool, heads_share_tokens: bool
    ) -> None:
        self.quantizer, self.heads_share_tokens, self.rewrites = quantizer, heads_share_tokens, rewrites
        super().__init__(state_class)

    def check_call(self, call: AttentionCall) -> None:
        if needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                f"{self.quantizer.option}: gradients do not pass through quantised or thin keys and values. Call the "
                "model under `torch.no_grad()`, or use DynamicCache."
            )

    def is_full(self) -> bool:
        return False

    def observe(self, call: AttentionCall, tokens: Tokens | None = None) -> None:
        """Takes notice of the queries of tokens, or of one new token in each row."""
        state, num_queries = self.state, call.num_queries
        if not self.quantizer.thin_keys or (state.row_quantized and all(state.row_quantized)):
            return
        if tokens is None:
            positions = state.next_position[:, 0] - 1
        else:
            if tokens.is_ascending:  # padding between the tokens of a row puts its last queries further back
                num_queries = min(num_queries, WINDOW)
            positions = tokens.positions[:, 0, -num_queries:]
        query, kv_heads = call.query[:, :, -num_queries:], call.key.shape[1]
        state.query_squares = mean_squares(query, positions, state.next_position, state.query_squares, kv_heads)

    def _make_room(self, num_new: int) -> None:
        if self.state.num_quantized:
            self.resize(self.state.length + max(MIN_GROWTH, num_new))
        else:
            super()._make_room(num_new)

    def unpack(self) -> None:
        """Restores the quantised tokens. Their codes stay, in slots of as many."""
        state, num_quantized = self.state, self.state.num_quantized
        if not num_quantized:
            return
        for name in FIELDS:
            latest = self.in_use(name)
            setattr(state, name, torch.cat([self._restored(name, latest.dtype), latest], dim=2))
        for name, codes in self._codes_in_slots().items():
            setattr(state, name, grown(codes, num_quantized, state.length, fill=0))
        state.num_quantized = 0

    def _coded(self, name: str) -> Coded | Plain:
        """Keys or values of quantised slots, as they are held."""
        codes, scales = FIELDS[name]
        if name == "keys" and self.quantizer.channel_group:
            scales = "key_groups"
        return self.quantizer.coded(name, getattr(self.state, codes), getattr(self.state, scales))

    def _restored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Keys or values `(batch, kv_heads, tokens, any)` of quantised slots, with 0 for channels that keys lost."""
        held = self._coded(name).tile(0, self.state.num_quantized, self._starts()).restored(dtype)
        channels = self.state.key_channels if name == "keys" else None
        if channels is None:
            return held
        keys = held.new_zeros(*held.shape[:-1], self.state.keys.shape[3])
        return keys.scatter_(-1, channels[:, :, None].expand_as(held), held)

    def _codes_in_slots(self) -> dict[str, torch.Tensor]:
        """Codes and scales of quantised slots, by name."""
        return {name: getattr(self.state, name) for name in self.state.tensors("slot").keys() & CODES}

    def _starts(self) -> torch.Tensor | None:
        """Where the codes of each head begin, if these are packed: see `decode_quantized_attention`."""
        return None

    def _with_codes(self, fields: dict[str, torch.Tensor], old: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes and scales in the form in which they are held; -1 in `old` is no token."""
        return fields

    def _num_old(self) -> list[int]:
        """How many of the first tokens of each row are to be quantised."""
        return [self.quantizer.num_quantized(length) for length in self.state.row_lengths]

    def is_due(self) -> bool:
        """Whether tokens are to be quantised that are not."""
        num_old = self._num_old()
        return any(num_old) and num_old != self.state.row_quantized

    def pack(self) -> None:
        """Quantises what is due, and frees restored tokens."""
        state, quantizer, num_old = self.state, self.quantizer, self._num_old()
        is_restored = not state.num_quantized and state.key_codes is not None
        if not any(num_old) or (num_old == state.row_quantized and not is_restored):
            return
        slots = self.slots()
        if state.num_quantized:
            slots |= self._codes_in_slots()
        if state.is_dense:
            heads = 1 if self.heads_share_tokens else state.keys.shape[1]
            slots["positions"] = self.column_tokens().positions.expand(-1, heads, -1)
        positions, starts = slots["positions"], self.per_row(num_old)
        if quantizer.thin_keys:
            self._choose_channels(slots["keys"], positions[..., state.num_quantized :] >= 0, num_old)
        is_old, is_latest = (positions >= 0) & (positions < starts), positions >= starts
        # How many tokens are old differs between heads. This waits for the device, once for a block of tokens.
        counts = torch.stack([each.sum(dim=-1).amax() for each in (is_old, is_latest)]).tolist()
        old, latest = in_order(positions, is_old, counts[0]), in_order(positions, is_latest, max(counts[1], 1))
        found = self._with_codes(self._quantized(slots, old), old) if counts[0] else {}
        found |= {name: gather_tokens(slots[name], latest - state.num_quantized) for name in FIELDS}
        indices = torch.cat([old, latest], dim=-1)
        self.fill_slots({name: slots[name] for name in slots.keys() - {*FIELDS, *CODES}}, indices)
        for name in {*found, *CODES}:
            setattr(state, name, found.get(name))
        state.num_quantized, state.length = counts[0], indices.shape[-1]
        state.row_quantized, state.column_positions, state.free_slots = num_old, None, None

    def _choose_channels(self, key: torch.Tensor, is_token: torch.Tensor, num_old: list[int]) -> None:
        """Chooses the channels of the rows whose first tokens are quantised now, by all keys that they hold."""
        state = self.state
        before = state.row_quantized or [0] * len(num_old)
        is_first = [not earlier and old > 0 for earlier, old in zip(before, num_old, strict=True)]
        if not any(is_first):
            return
        number = self.quantizer.key_width(key.shape[3])
        chosen, held = best_channels(state.query_squares, key, is_token, number), state.key_channels
        state.key_channels = chosen if held is None else torch.where(self.per_row(is_first) > 0, chosen, held)
        if all(num_old):
            state.query_squares = None

    def _thin(self, key: torch.Tensor) -> torch.Tensor:
        """The channels that stay of keys `(batch, kv_heads, tokens, head_dim)`."""
        channels = self.state.key_channels
        return key if channels is None else key.gather(-1, channels[:, :, None].expand(-1, -1, key.shape[2], -1))

    def _quantized(self, slots: dict[str, torch.Tensor], old: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Codes and scales of the tokens in the slots `(batch, kv_heads or 1, any)`; -1 is none. Tokens that have them
        keep them.
        """
        state, quantizer, found = self.state, self.quantizer, {}
        before = self.per_row(state.row_quantized or [0] * len(old))
        has_codes = gather_tokens(slots["positions"], old) < before
        for name, fields in FIELDS.items():
            numbers = gather_tokens(slots[name], old - state.num_quantized)
            numbers = self._thin(numbers) if name == "keys" else numbers
            held = [slots.get(field) for field in fields]
            held = [None if each is None else gather_tokens(each, old.clamp(max=each.shape[2] - 1)) for each in held]
            stays = has_codes
            if self.rewrites and held[0] is not None and not state.num_quantized:
                stays = has_codes & (quantizer.coded(name, *held).restored(numbers.dtype) == numbers).all(dim=-1)
            for field, new, earlier in zip(fields, quantizer.stored(name, numbers), held, strict=True):
                if field == "key_scales" and quantizer.channel_group:
                    found["key_groups"] = self._groups(new, before)
                elif new is not None:
                    found[field] = new if earlier is None else torch.where(stays[..., None], earlier, new)
        return found

    def _groups(self, new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Scales of groups of tokens. Those of groups before these positions stay."""
        if (held := self.state.key_groups) is None:
            return new
        held = grown(held, min(held.shape[2], new.shape[2]), new.shape[2], fill=0)
        starts = torch.arange(new.shape[2], device=new.device) * self.quantizer.channel_group
        return torch.where((starts < before)[..., None], held, new)

    def attend_step(
        self, call: AttentionCall, scores: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        state = self.state
        if not state.num_quantized:
            return super().attend_step(call, scores)
        output, sums = decode_quantized_attention(
            call.query,
            self._coded("keys"),
            self._coded("values"),
            state.num_quantized,
            call.key,
            call.value,
            mask=self.in_use("positions") >= 0 if state.has_empty_slots else None,
            bias=self.in_use("bias"),
            starts=self._starts(),
            channels=state.key_channels,
            **call.logit_arguments,
        )
        return (output, None), sums if scores else None

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(numbers, tensors)
        self._check_channels()
        for name, fields in FIELDS.items() if self.state.num_quantized else ():
            quantizer, width = self.quantizer, tensors[name].shape[3]
            width = quantizer.key_width(width) if name == "keys" else width
            has_groups = name == "keys" and quantizer.channel_group
            expected = quantizer.stored(name, tensors[name].new_zeros(1, 1, quantizer.block_length, width))
            for field, like in zip((fields[0], "key_groups") if has_groups else fields, expected, strict=True):
                if like is None and field not in tensors:
                    continue
                found = tensors[field]
                shape = (*self._code_slots(field), *like.shape[3:]) if like is not None else None
                if like is None or (found.dtype, tuple(found.shape)) != (like.dtype, shape):
                    raise ValueError(f"`{field}` is {found.dtype} {tuple(found.shape)}")

    def _code_slots(self, field: str) -> tuple[int, int, int]:
        """The rows, heads and slots of codes or scales."""
        num_slots, starts = self.state.num_quantized, self._starts()
        if field == "key_groups":
            num_slots //= self.quantizer.channel_group
        batch, kv_heads = self.state.keys.shape[:2]
        return (batch, kv_heads, num_slots) if starts is None else (batch, 1, int(starts[:, -1].amax()))

    def _check_channels(self) -> None:
        """Raises ValueError unless the channels of thin keys, and what they are chosen by, can be those of rows."""
        state, quantizer = self.state, self.quantizer
        *rows, _, width = state.keys.shape
        has_chosen = state.row_quantized or [0] * rows[0]
        expected = {
            "key_channels": (torch.int64, quantizer.key_width(width), any(has_chosen)),
            "query_squares": (torch.float32, width, not all(has_chosen)),
        }
        for name, (dtype, size, is_needed) in expected.items():
            tensor, is_thin = getattr(state, name), bool(quantizer.thin_keys)
            if tensor is None and not (is_thin and is_needed):
                continue
            if tensor is None or not is_thin or (tensor.dtype, list(tensor.shape)) != (dtype, [*rows[:2], size]):
                raise ValueError(f"`{name}` is {None if tensor is None else (tensor.dtype, tuple(tensor.shape))}")
        if state.key_channels is not None and not ((state.key_channels >= 0) & (state.key_channels < width)).all():
            raise ValueError(f"`key_channels` are not those of keys of width {width}")

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Codes, scales and channels count as keys and values."""
        roles = {field: f"{name} {field}" for name, fields in FIELDS.items() for field in fields}
        roles |= {field: f"keys {field}" for field in ("key_groups", "key_channels")}
        return {roles.get(name, name): tensor for name, tensor in super().held_tensors().items()}


class QuantizedHeads(CompetingHeads, QuantizedStore):
    """
    A quantised store of heads that compete. The codes of all heads of a row are packed, one head behind the other:
    `(batch, 1, tokens, any)`. All else is in slots, of which some are empty.
    """

    def __init__(
        self, state_class: type[LayerState], quantizer: Quantizer, rewrites: bool, floor_ratio: float
    ) -> None:
        self.floor_ratio = floor_ratio
        QuantizedStore.__init__(self, state_class, quantizer, rewrites, heads_share_tokens=False)

    def keep(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: torch.Tensor | None,
        priority: torch.Tensor,
        tokens: Tokens,
        row_kept: list[int],
        compact: Compaction | None = None,
    ) -> None:
        row_left = [min(held, kept) for held, kept in zip(self.state.row_held, row_kept, strict=True)]
        self._keep_best(self._columns(key, value, attention, tokens), priority, row_left, compact)

    def evict(self, priority: torch.Tensor, row_left: list[int], compact: Compaction | None = None) -> None:
        self._keep_best(self.slots(), priority, row_left, compact)

    def _keep_best(
        self,
        columns: dict[str, torch.Tensor],
        priority: torch.Tensor,
        row_left: list[int],
        compact: Compaction | None,
    ) -> None:
        state, is_kept = self.state, best_of_all_heads(priority, row_left, self.floor_ratio)
        if compact is not None:
            columns |= compact(columns, is_kept)
        positions = columns["positions"].expand_as(is_kept)
        indices = in_order(positions, is_kept, int(is_kept.sum(dim=-1).amax()))
        self.fill_slots(columns, indices)
        state.row_held, state.length = row_left, indices.shape[-1]
        state.column_positions = state.free_slots = None

    def _codes_in_slots(self) -> dict[str, torch.Tensor]:
        packed, starts, stop = super()._codes_in_slots(), self._starts(), self.state.num_quantized
        return {name: packed_slots(tensor, starts, 0, stop) for name, tensor in packed.items()}

    def _starts(self) -> torch.Tensor:
        is_token = self.in_use("positions")[:, :, : self.state.num_quantized] >= 0
        return torch.nn.functional.pad(is_token.sum(dim=-1).cumsum(dim=-1), (1, 0))

    def _with_codes(self, fields: dict[str, torch.Tensor], old: torch.Tensor) -> dict[str, torch.Tensor]:
        is_token = (old >= 0).flatten(1)[:, None]
        places = (~is_token).int().argsort(dim=-1, stable=True)[..., : int(is_token.sum(dim=-1).amax())]
        return {name: gather_tokens(tensor.flatten(1, 2)[:, None], places) for name, tensor in fields.items()}
