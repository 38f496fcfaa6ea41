"""
The slots of a layer: a `SlotStore` puts tokens into the slots of a `LayerState`, and takes them out.

A store is *dense* until tokens are evicted: it holds all of them in order of arrival, padding included. Afterwards it
holds *slots*: keys and values of the tokens that stayed, and the position of each (-1: empty). Keys carry RoPE at
their original positions, so that slots need no order.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep, SlotStep
from pyramid_cache.engine.ranks import HeadRanks
from pyramid_cache.engine.scoring import attend_and_score, attend_with_bias
from pyramid_cache.engine.selection import best_tokens, gather_tokens, is_index, lowest_token
from pyramid_cache.engine.state import CODES, LayerState, expanded, grown
from pyramid_cache.engine.tokens import Tokens, causal_mask
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.scores import decode_attention_unchecked, is_plain_on_cpu
from pyramid_cache.ops.transfer import numbers_on


# A dense store without room for one more token grows by this many slots, or by a 64th of its length if that is more.
MIN_GROWTH = 16

Compaction = Callable[[dict[str, torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]


class SlotStore:
    """Tokens in slots: `(batch, kv_heads, slots, head_dim)`, the same number of slots for all heads."""

    # Whether all KV heads of a row hold the same number of tokens.
    heads_keep_equal_numbers = True

    def __init__(self, state_class: type[LayerState] = LayerState) -> None:
        self.state_class = state_class
        # How many tokens beyond their budget rows may hold. If it is one, a token takes the slot of one that went.
        self.interval = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the tensors."""
        self.state = self.state_class()
        # The ranks that share the heads of the layer, once the model has shown them.
        self.ranks: HeadRanks | None = None
        # Whether autograd may have saved the keys and values.
        self.is_saved = False

    # Sizes and copies.

    def per_row(self, numbers: Sequence[int]) -> torch.Tensor:
        """Numbers known on the host as a `(batch, 1, 1)` int32 tensor on the device of the keys."""
        return numbers_on(self.state.next_position.device, numbers, torch.int32).view(-1, 1, 1)

    def in_use(self, name: str) -> torch.Tensor | None:
        """The used slots of the tensor of that name."""
        tensor = getattr(self.state, name)
        return None if tensor is None else tensor[:, :, : self.state.num_used(name)]

    def slots(self) -> dict[str, torch.Tensor]:
        """The used slots of all tensors, by name."""
        return {name: tensor[:, :, : self.state.num_used(name)] for name, tensor in self.state.tensors("slot").items()}

    def unpack(self) -> None:
        """Brings all tokens into slots. Other stores have tokens elsewhere."""

    @property
    def capacity(self) -> int:
        """How many slots the rows need at most."""
        return max(self.state.row_kept, default=0) + self.interval

    def build_step(self, layer: Any, num_slots: int, in_graph: bool) -> FixedStep:
        """The step of a layer whose tensors stay where they are, with so many slots."""
        return SlotStep(layer, num_slots, in_graph)

    def is_full(self) -> bool:
        """Whether there is no slot for the next token."""
        return self.state.length >= self.capacity

    def resize(self, num_slots: int) -> None:
        """Moves the used slots into tensors of `num_slots` slots."""
        state, num_new = self.state, num_slots - self.state.length
        for name, tensor in state.tensors("slot").items():
            if not state.num_quantized or name not in CODES:
                used = state.num_used(name)
                setattr(state, name, grown(tensor, used, used + num_new, state.fill_of(name)))

    def _make_room(self, num_new: int) -> None:
        """Gets slots for new tokens: all that the rows will need, or some more if a dense store gets one."""
        length, capacity = self.state.length, self.capacity
        if not self.state.is_dense:
            self.resize(max(capacity, length + num_new))
            return
        num_slots = length + (max(MIN_GROWTH, length // 64) if num_new == 1 else num_new)
        self.resize(min(num_slots, capacity) if length + num_new <= capacity else num_slots)

    def leave_inference_mode(self) -> None:
        """Copies tensors that were made in inference mode: torch does not allow writes to them outside of it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(tensor.is_inference() for tensor in self.state.tensors().values()):
            self.state.map_tensors(torch.clone)

    def spare_autograd(self) -> None:
        """Copies keys and values that autograd may have saved, before they are written to."""
        for name in ("keys", "values") if torch.is_grad_enabled() else ():
            tensor = getattr(self.state, name)
            if tensor is not None and (tensor.requires_grad or self.is_saved):
                setattr(self.state, name, tensor.clone())

    # Tokens come.

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Puts new tokens `(batch, kv_heads, tokens, head_dim)` behind the others; of a store with slots, one of each
        row.
        """
        state, num_new = self.state, key.shape[2]
        if torch.is_grad_enabled():
            self.spare_autograd()
        if state.free_slots is not None:
            self.overwrite(state.free_slots, key, value)
            state.free_slots = None
            return
        if state.keys is None:
            state.keys, state.values = own_storage(key), own_storage(value)
        else:
            if state.length + num_new > state.num_slots:
                self._make_room(num_new)
            new = slice(state.length - state.num_quantized, state.length - state.num_quantized + num_new)
            state.keys[:, :, new], state.values[:, :, new] = key, value
            new = slice(state.length, state.length + num_new)
            if state.positions is not None:
                state.positions[:, :, new] = state.next_position
            if state.attention is not None:
                state.attention[:, :, new] = 0
            for name in state.own_slots:
                if (tensor := getattr(state, name)) is not None:
                    tensor[:, :, new] = state.fill_of(name)
        state.length += num_new

    def take_back(self, num_new: int, free_slots: torch.Tensor | None) -> None:
        """Takes out the tokens of the last `append`, before which these were the free slots."""
        if free_slots is None:
            self.state.length -= num_new
        else:
            self.state.positions.scatter_(2, free_slots, -1)
            self.state.free_slots = free_slots

    def overwrite(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts one token of each row into the slots `(batch, kv_heads or 1, 1)`."""
        state, index = self.state, slots[..., None]
        state.keys.scatter_(2, index.expand_as(key), key)
        state.values.scatter_(2, index.expand_as(value), value)
        state.positions.scatter_(2, slots, state.next_position.expand_as(slots))
        if state.attention is not None:
            state.attention.scatter_(2, slots, 0)
        for name in state.own_slots:
            if (tensor := getattr(state, name)) is not None:
                tensor.scatter_(2, expanded(slots, tensor), state.fill_of(name))

    def add_attention(self, sums: Any, window: int | torch.Tensor | None, mean: Callable) -> None:
        """
        Adds what a new query gave to `state.attention`, of which it takes over its share of the window. `mean` brings
        the sums that `attend_step` returned into the form of the attention; it is given the window too.
        """
        held = self.in_use("attention")
        if window is not None:
            held.mul_(1 - 1 / window)
        held.add_(mean(sums, window))

    def measured(self, sums: Any, measure: Callable) -> Any:
        """What `measure(sums, num_visible)` makes of the sums that `attend_step` returned."""
        if self.state.is_dense:
            return measure(sums, self.state.next_position)
        return measure(sums, (self.in_use("positions") >= 0).sum(dim=-1, keepdim=True))

    # Tokens go.

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
        """
        Copies the tokens of highest priority into new slots, in order of their positions. The old ones are freed.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`.
            attention (`torch.Tensor`, *optional*): `(batch, kv_heads or 1, columns)`, which becomes `state.attention`.
            priority (`torch.Tensor`): `(batch, kv_heads or 1, columns)`, -inf for what is no token.
            tokens (`Tokens`): In these columns.
            row_kept (`list[int]`): How many tokens of each row stay.
            compact (`Callable`, *optional*): Lets the tokens that stay stand for those that go. It is given all slot
                tensors by name, and which tokens stay `(batch, kv_heads or 1, columns)` bool. It returns the tensors
                that it changes, of the same shapes.
        """
        state = self.state
        row_left = [min(held, kept) for held, kept in zip(state.row_held, row_kept, strict=True)]
        indices = best_tokens(priority, self.per_row(row_left).flatten(), max(row_left))
        columns = self._columns(key, value, attention, tokens)
        if compact is not None:
            columns |= compact(columns, is_index(indices, key.shape[2]))
        self.fill_slots(columns, indices)
        state.column_positions = state.free_slots = None
        state.length, state.row_held = indices.shape[-1], row_left
        if self.interval == 1 and state.length < self.capacity:  # else the tokens wait
            self.resize(self.capacity)
            state.length = self.capacity
            state.free_slots = torch.full_like(indices[..., :1], state.length - 1)

    def fill_slots(self, columns: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
        """Makes slot tensors of the columns at the indices `(batch, kv_heads or 1, slots)`; -1 gives an empty slot."""
        for name, tensor in columns.items():
            kept = gather_tokens(tensor.expand(-1, max(indices.shape[1], tensor.shape[1]), *tensor.shape[2:]), indices)
            fill = self.state.fill_of(name)
            setattr(self.state, name, kept if tensor.dim() == 4 else kept.masked_fill(indices < 0, fill))

    def _columns(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, tokens: Tokens
    ) -> dict[str, torch.Tensor]:
        """What is known of each token in the columns of keys, by the names of slot tensors."""
        columns = {"keys": key, "values": value, "positions": tokens.positions, "attention": attention}
        columns |= {name: getattr(self.state, name) for name in (*self.state.own_slots, *CODES)}
        return {name: tensor[:, :, : key.shape[2]] for name, tensor in columns.items() if tensor is not None}

    def evict(self, priority: torch.Tensor, row_left: list[int], compact: Compaction | None = None) -> None:
        """
        Evicts in place, and closes the gaps: tokens in slots behind the last one that is needed move into free ones.
        Of each row `row_left` tokens stay; `priority` `(batch, kv_heads or 1, slots)` is -inf for empty slots. See
        `keep` for `compact`.
        """
        state, num_left = self.state, max(row_left)
        row_lost = [held - left for held, left in zip(state.row_held, row_left, strict=True)]
        if torch.is_grad_enabled():
            self.spare_autograd()
        # A row that loses none gives an empty slot, if it has one: it may hold more since its budget has grown.
        has_free_slots = all(lost or left < state.length for lost, left in zip(row_lost, row_left, strict=True))
        if self.interval == 1 and max(row_lost) <= 1 and has_free_slots:
            state.free_slots = self.next_to_free(priority)
            state.positions.scatter_(-1, state.free_slots, -1)
        else:
            state.free_slots = None
            positions = self.in_use("positions")
            order = positions.argsort(dim=-1)
            indices = best_tokens(priority.gather(-1, order), self.per_row(row_left).flatten(), num_left)
            # One more slot takes the indices that are -1.
            slots = torch.where(indices < 0, state.length, order.gather(-1, indices.clamp(min=0)))
            is_kept = torch.zeros(*positions.shape[:2], state.length + 1, dtype=torch.bool, device=positions.device)
            is_kept = is_kept.scatter_(-1, slots, True)[..., : state.length]
            if compact is not None:
                self._take(compact(self.slots(), is_kept))
            self._move(is_kept, num_left)
            state.length = num_left
            if state.keys.shape[2] > self.capacity:  # a turn has waited here as a whole
                self.resize(self.capacity)
        state.row_held = row_left

    def _take(self, changed: dict[str, torch.Tensor]) -> None:
        """Writes tensors of the used slots, by name, into those that are held."""
        state = self.state
        for name, tensor in changed.items():
            if getattr(state, name) is None:
                setattr(state, name, grown(tensor, state.length, state.keys.shape[2], state.fill_of(name)))
            else:
                self.in_use(name).copy_(tensor)

    def next_to_free(self, scores: torch.Tensor) -> torch.Tensor:
        """
        The slot of each row that the next token takes, `(batch, kv_heads or 1, 1)` int64: that of the worst token if
        the row holds more than it may, else an empty one. `scores` are `(batch, kv_heads or 1, slots)` float32, of
        empty slots any.
        """
        state, positions = self.state, self.state.positions
        is_token = positions >= 0
        is_over = is_token.sum(dim=-1, keepdim=True) > state.num_kept
        empty = torch.where(is_over, float("inf"), float("-inf"))
        # Other tokens may have the highest score too, and older ones go first.
        ages = positions.masked_fill(is_over & ~is_token, torch.iinfo(positions.dtype).max)
        return lowest_token(torch.where(is_token, scores, empty), ages)

    @property
    def is_steady(self) -> bool:
        """Whether each token that comes takes the slot of one that goes, in all rows."""
        state = self.state
        is_full = state.row_held == state.row_kept and min(state.row_kept) == state.length - 1
        return self.interval == 1 and state.free_slots is not None and is_full

    def _move(self, is_kept: torch.Tensor, num_left: int) -> None:
        """Moves the kept tokens, marked in `is_kept` `(batch, kv_heads or 1, slots)`, into the first slots."""
        is_kept_before, is_kept_behind = is_kept[..., :num_left], is_kept[..., num_left:]
        num_moves = min(num_left, is_kept_behind.shape[-1])
        free = is_kept_before.int().argsort(dim=-1, stable=True)[..., :num_moves]
        movers = (~is_kept_behind).int().argsort(dim=-1, stable=True)[..., :num_moves] + num_left
        moves = torch.arange(num_moves, device=is_kept.device) < is_kept_behind.sum(dim=-1, keepdim=True)
        source = torch.where(moves, movers, free)
        self.state.positions[..., :num_left].masked_fill_(~is_kept_before, -1)
        for name, tensor in self.state.tensors("slot").items():
            self._scatter(name, tensor, expanded(free, tensor), gather_tokens(tensor, source))
        self.clear_behind(num_left)

    def clear_behind(self, length: int) -> None:
        """Makes the slots behind the first ones what new slots are."""
        for name in ("positions", "attention", *self.state.own_slots):
            if (tensor := getattr(self.state, name)) is not None:
                tensor[:, :, length:] = self.state.fill_of(name)

    def _scatter(self, name: str, tensor: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
        if tensor.requires_grad:  # autograd has saved it for what was read
            setattr(self.state, name, tensor.scatter(2, index, source))
        else:
            tensor.scatter_(2, index, source)

    # Tokens are read.

    def column_tokens(self, length: int | None = None) -> Tokens:
        """The tokens in the columns of a dense store, or in the first `length` of them before the others count."""
        state, device = self.state, self.state.next_position.device
        batch_size = len(state.row_lengths)
        length = state.length if length is None else length
        if state.column_positions is None:
            return Tokens.without_padding(batch_size, length, device)
        # Columns that arrived one at a time are tokens.
        num_steps = length - state.column_positions.shape[-1]
        steps = state.next_position + torch.arange(-num_steps, 0, dtype=torch.int32, device=device)
        positions = torch.cat([state.column_positions, steps], dim=-1)
        return Tokens(
            positions, state.row_lengths, state.row_held, state.num_seen, is_ascending=bool(state.columns_ascend)
        )

    def held_positions(self) -> torch.Tensor:
        """`(batch, kv_heads or 1, slots)` int32, -1 for empty slots and padding."""
        return self.column_tokens().positions if self.state.is_dense else self.in_use("positions")

    def held_attention(self) -> torch.Tensor | None:
        """`(batch, kv_heads or 1, slots)` float32: `state.attention` in the order of `held_positions`."""
        return self.in_use("attention")

    def attended(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all tokens `(batch, kv_heads, slots, head_dim)`, in tensors of their own."""
        return self.in_use("keys"), self.in_use("values")

    def in_order(self) -> dict[str, torch.Tensor]:
        """Copies of the slots in order of their positions, those that are empty in some rows first, by name."""
        self.unpack()
        slots = self.slots()
        num_filled = max(self.state.row_held) if self.heads_keep_equal_numbers else self.state.length
        order = slots["positions"].argsort(dim=-1)[..., self.state.length - num_filled :]
        return {name: gather_tokens(tensor, order) for name, tensor in slots.items()}

    def put_in_order(self, held: dict[str, torch.Tensor]) -> None:
        """The slots become what `in_order` gave."""
        for name, tensor in held.items():
            setattr(self.state, name, tensor)
        self.state.length, self.state.free_slots = held["positions"].shape[-1], None

    # Attention over slots.

    def check_call(self, call: AttentionCall) -> None:
        """Raises if the store cannot attend in the place of the model's attention function."""

    def observe(self, call: AttentionCall, tokens: Tokens | None = None) -> None:
        """Takes notice of the queries of tokens, or of one new token in each row. Other stores have a use for them."""

    def attend_step(
        self, call: AttentionCall, scores: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """
        Attention of one query over the used slots. With `scores`, the probabilities `(batch, kv_heads, slots)`, summed
        over the query heads of a KV head, come second; else None does.
        """
        mask = self.in_use("positions") >= 0 if self.state.has_empty_slots else None
        differ = mask is not None and mask.shape[1] > 1  # heads, in their empty slots: `with_mask` knows one for all
        arguments, bias = call.logit_arguments, self.in_use("bias")
        if scores or differ or bias is not None or is_plain_on_cpu(call.query, call.key, call.value, **arguments):
            run = decode_attention if torch.is_grad_enabled() else decode_attention_unchecked
            output, sums = run(call.query, call.key, call.value, mask=mask, bias=bias, **arguments)
            return (output, None), sums.detach() if scores else None
        return self.with_mask(call, mask).run(), None

    def attend_several(
        self, call: AttentionCall, tokens: Tokens, num_rows: int = 0, row_weights: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """
        Attention of several queries over the held tokens in order and new ones behind them. Second, if `num_rows` is
        not 0, come the sums `(batch, kv_heads, keys)` of the probabilities that the last `num_rows` queries give.
        """
        if call.bias is not None and (num_rows or not takes_bias(call)):
            return attend_with_bias(call, tokens, num_rows, row_weights)
        if not self.state.is_dense:
            call = self.with_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        return attend_and_score(call, tokens, num_rows, row_weights) if num_rows else (call.run(), None)

    @staticmethod
    def with_mask(call: AttentionCall, is_token: torch.Tensor | None) -> AttentionCall:
        """
        The call with a causal mask over keys, and its bias in that; `is_token` is `(batch, any, keys)` bool, the same
        for all heads.
        """
        bias = call.bias
        if bias is not None:
            bias = bias.repeat_interleave(call.query.shape[1] // bias.shape[1], dim=1)
        mask = causal_mask(
            call.module.config._attn_implementation,
            None if is_token is None else is_token[:, :1],
            call.num_queries,
            call.num_keys,
            call.query.dtype,
            call.query.device,
            bias,
        )
        return dataclasses.replace(call, mask=mask, lse=None)

    # Rows and files.

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies a function that selects, repeats or moves rows to all tensors."""
        self.state.map_tensors(function)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The state for a file: numbers as JSON has them, and tensors without unused slots."""
        return self.state.numbers(), self.slots() | self.state.tensors("row")

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """
        Takes over what `state_dict` gave.

        Raises:
            KeyError: Something is missing.
            ValueError: A tensor has a shape or a dtype that the state cannot have.
        """
        batch_size, kv_heads, num_states = tensors["keys"].shape[:3]
        num_quantized = numbers["num_quantized"]
        lengths = {name: tensors[name].shape[2] for name in CODES if num_quantized and name in tensors}
        lengths |= {"keys": num_states, "values": num_states}
        slots, known = self.state.names("slot"), self.state.names("slot", "row")
        for name, tensor in tensors.items():
            length = lengths.get(name, num_states + num_quantized)
            shapes = [(batch_size, heads, length)[: 3 if name in slots else 1] for heads in (1, kv_heads)]
            types = {"positions": torch.int32, "attention": torch.float32, "bias": torch.float32}
            dtype, num_dims = types.get(name, tensor.dtype), tensor.dim() if name in types else len(shapes[0])
            # A bias is of each head.
            if name not in known or tuple(tensor.shape[:num_dims]) not in shapes[name == "bias" :]:
                raise ValueError(
                    f"`{name}` has the shape {tuple(tensor.shape)} in {length} slots of {batch_size} rows"
                )
            if name in slots and tensor.dtype != dtype:
                raise ValueError(f"`{name}` is {tensor.dtype} instead of {dtype}")
        for name in self.state.numbers():
            setattr(self.state, name, numbers[name])
        for name in known:
            setattr(self.state, name, tensors.get(name))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the store refers to, by a name whose first word is its role."""
        return self.state.tensors()


def takes_bias(call: AttentionCall) -> bool:
    """Whether the attention function of a call takes an additive mask."""
    return call.function is sdpa_attention_forward or call.module.config._attn_implementation == "eager"


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it fills its storage, else a copy: a view would keep all of a fused projection alive."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
