"""
Decode steps of fixed shapes. They are light, and `torch.compile` turns them into one graph.

Once tokens have been evicted, a layer needs no more slots than its budget and the eviction interval. Its tensors get
as many, and stay where they are. A step reads and writes these tensors and nothing else in `update` and `attend`, so
that both can be part of a graph. `count` follows each step on the host. It counts what the step did, and evicts in
place where that is not part of the graph.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.selection import gather_tokens, lowest_token
from pyramid_cache.engine.state import grown
from pyramid_cache.ops.reference import decode_probabilities, weighted
from pyramid_cache.ops.scores import decode_attention_unchecked


if TYPE_CHECKING:
    from pyramid_cache.engine.evicting import EvictingLayer
    from pyramid_cache.engine.layer import CompressedLayer


class FixedStep(ABC):
    """
    The decode step of a layer whose tensors stay where they are: a new token in each row, whose call needs no checks.

    Args:
        in_graph (`bool`): Whether the step is to be compiled: nothing that it reads may change but tensors.
    """

    def __init__(self, layer: "CompressedLayer", in_graph: bool) -> None:
        # The layer holds on to its step.
        self._layer = weakref.ref(layer)
        self.state, self.store, self.in_graph = layer.state, layer.store, in_graph
        # The attention function of the last step.
        self.function: Callable | None = None
        # `(1,)` int64, in a graph: how many slots are in use, if new tokens go behind them.
        self.cursor: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:  # noqa: B027
        """A copy of the layer makes a step of its own."""

    @property
    def layer(self) -> Any:
        """The layer whose step this is."""
        return self._layer()

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """How many slots attention sees in a graph, and columns masks have."""

    @property
    def is_full(self) -> bool:
        """Whether there is no slot for the next token."""
        return False

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What the step needs beside the state of the layer, by name."""
        return {} if self.cursor is None else {"cursor": self.cursor}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that steps read and write, by name."""
        return self.state.tensors() | self.own_tensors()

    @abstractmethod
    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a token of each row `(batch, kv_heads, 1, head_dim)`; returns the keys and values to attend to."""

    def begin_counting(self) -> None:
        """Lets the graph count the slots in use."""
        self.cursor = torch.full((1,), self.state.length, device=self.state.keys.device)

    def put_behind(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a token of each row into the slot behind those in use. The host counts on its own."""
        state, cursor = self.state, self.cursor
        if cursor is None:
            new = slice(state.length, state.length + 1)
            state.keys[:, :, new], state.values[:, :, new] = key, value
            state.positions[:, :, new] = state.next_position
            return
        state.keys.index_copy_(2, cursor, key)
        state.values.index_copy_(2, cursor, value)
        state.positions.index_copy_(2, cursor, state.next_position.expand(-1, state.positions.shape[1], -1))
        cursor.add_(1)

    def take_back_behind(self) -> None:
        """Takes out what `put_behind` has put there."""
        if self.cursor is None:
            self.state.positions[:, :, self.state.length - 1] = -1
        else:
            self.state.positions.index_fill_(2, self.cursor.sub_(1), -1)

    @abstractmethod
    def take_back(self) -> None:
        """Takes out the token of the last `update`, whose call is refused."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to the slots that are in use. The mask of the call is not looked at."""

    def count(self) -> None:
        """Counts on the host the token that has come: before `attend`, or after a graph has run."""
        state = self.state
        state.num_seen += 1
        state.row_lengths = [length + 1 for length in state.row_lengths]
        state.row_held = [held + 1 for held in state.row_held]

    def settle(self) -> None:  # noqa: B027
        """Evicts on the host if it is time; follows `attend`."""

    def release(self) -> None:  # noqa: B027
        """Brings the layer back to what it would be without fixed shapes."""


class SlotStep(FixedStep):
    """
    The step of an `EvictingLayer` with a `SlotStore`. The new token goes to the slot behind the others, at `cursor`,
    or, if a token goes for each that comes, to `state.free_slots`; then each step evicts.
    """

    def __init__(self, layer: "EvictingLayer", num_slots: int, in_graph: bool) -> None:
        super().__init__(layer, in_graph)
        state, store = self.state, self.store
        self.evicts = layer.eviction_interval == 1 and not layer.budget.is_unlimited
        self.scores = layer.policy.window_size != 0 and not layer.budget.is_unlimited
        self.remember_columns()
        if state.is_dense:
            heads = 1 if layer.policy.heads_share_tokens else layer.layout.kv_heads
            positions = store.column_tokens().positions.expand(-1, heads, -1)
            if state.column_positions is not None:
                positions = self._padding_last(positions)
            state.positions = grown(positions, state.length, state.keys.shape[2], fill=-1)
            state.column_positions = None
        self.make_bias()
        num_slots = max(num_slots, state.length + (state.free_slots is None))
        if state.keys.shape[2] != num_slots or not state.positions.is_contiguous():
            store.resize(num_slots)
        store.clear_behind(state.length)
        if self.evicts:
            if state.free_slots is None:
                state.free_slots = torch.full_like(state.positions[..., :1], state.length, dtype=torch.int64)
            state.length = num_slots
        elif in_graph:
            self.begin_counting()
        self.window = layer.window() if layer.policy.window_size and self.scores else None
        self.view, self.is_steady = layer.view_of_slots(), False
        if self.was_dense:
            layer.reposition(max(state.row_lengths))
        self._plan()

    def _padding_last(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Brings columns into the order of slots after an eviction, in which the first tokens of all rows are in the
        first slots; returns the positions `(batch, kv_heads or 1, columns)` in that order.
        """
        state = self.state
        order = positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)
        for name, tensor in self.store.slots().items():
            setattr(state, name, gather_tokens(tensor, order))
        return positions.gather(-1, order)

    def make_bias(self) -> None:
        """Makes the bias, if there will be one: an eviction between steps of a graph cannot bring a new tensor."""
        layer, state = self.layer, self.state
        if layer.compactor is not None and state.bias is None:
            state.bias = torch.zeros(state.keys.shape[:3], dtype=torch.float32, device=state.keys.device)

    def remember_columns(self) -> None:
        """Remembers how the tokens of a dense store came; afterwards its columns are slots like any others."""
        state = self.state
        self.was_dense, self.column_positions = state.is_dense, state.column_positions

    def release(self) -> None:
        state, store = self.state, self.store
        if self.evicts and self.in_graph and self.layer.policy.repositions:
            self._reposition()
        if not self.was_dense or state.row_held != state.row_lengths:
            return
        # None is evicted: they go back into the columns in which they came.
        held = store.in_order()
        num_slots = held.pop("positions").shape[-1]
        state.positions = state.free_slots = None
        state.length, state.column_positions = state.num_seen, self.column_positions
        positions = store.column_tokens().positions
        slots = positions + (num_slots - store.per_row(state.row_lengths))
        slots = slots.masked_fill(positions < 0, -1).long()
        for name, tensor in held.items():
            columns = gather_tokens(tensor, slots)
            setattr(state, name, columns if tensor.dim() == 4 else columns.masked_fill(slots < 0, state.fill_of(name)))

    def _plan(self) -> None:
        """Works out what stays the same until the next eviction, so that steps need not ask for it."""
        layer, state, store = self.layer, self.state, self.store
        # Whether each token that comes takes the slot of one that goes, in all rows.
        self.is_steady = self.is_steady or store.is_steady
        # Whether some slots that attention sees are empty.
        self.has_gaps = not self.is_steady and (self.evicts or self.in_graph or state.has_empty_slots)
        rows = zip(state.row_kept, state.row_held, strict=True)
        room = min(kept + layer.eviction_interval - held for kept, held in rows)
        self.num_steps_left = min(room, store.capacity - state.length)

    @property
    def num_slots(self) -> int:
        return self.state.keys.shape[2]

    @property
    def is_full(self) -> bool:
        return self.layer.budget.is_unlimited and self.state.length >= self.num_slots

    def own_tensors(self) -> dict[str, torch.Tensor]:
        own = super().own_tensors()
        return own | ({"window": self.window} if isinstance(self.window, torch.Tensor) else {})

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state
        if not self.evicts:
            self.put_behind(key, value)
            if not self.in_graph:
                state.length += 1
        elif self.in_graph:
            self._overwrite(key, value)
        else:
            self.store.overwrite(state.free_slots, key, value)
        return (state.keys[:], state.values) if self.in_graph else self.store.attended()

    def _overwrite(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """`SlotStore.overwrite` without `scatter_`, for which compilers copy the whole tensor."""
        state, slots = self.state, self.state.free_slots
        moved = self.layer.policy.moved_in_graph(self.view)
        if moved is None:
            put_tokens(state.keys, slots, key)
        else:  # in one go: for a second one compilers copy the tensor as well
            put_tokens(state.keys, torch.cat([slots, moved[0]], dim=2), torch.cat([key, moved[1]], dim=2))
        put_tokens(state.values, slots, value)
        put_tokens(state.positions, slots, state.next_position)
        for name in ("attention", *state.own_slots):
            if (tensor := getattr(state, name)) is not None:
                put_tokens(tensor, slots, tensor.new_tensor(state.fill_of(name)))

    def take_back(self) -> None:
        if self.evicts:
            self.state.positions.scatter_(2, self.state.free_slots, -1)
        else:
            self.take_back_behind()
            self.state.length -= not self.in_graph

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, state = self.layer, self.state
        state.next_position.add_(1)
        if layer.policy.repositions and layer.policy.moves_new(self.view):
            longest = state.next_position.amax() if self.in_graph else max(state.row_lengths)
            call = layer.repositioned_step(call, self.view, longest)
        needs_op = self.scores or self.has_gaps or state.bias is not None
        if not needs_op and (call.key.device.type != "cpu" or call.key.dtype != torch.float32):
            output, sums = replace(call, mask=None).run(), None
        else:
            mask = state.positions[:, :, : call.num_keys] >= 0 if self.has_gaps else None
            bias = None if state.bias is None else state.bias[:, :, : call.num_keys]
            attended, sums = attend_to_slots(call, mask, bias, self.scores)
            output = attended, None
        if self.scores:
            if layer.policy.measure is not None:
                num_visible = call.num_keys if mask is None else mask.sum(dim=-1, keepdim=True)
                sums = layer.measured(call, sums, num_visible)
            attention = state.attention[:, :, : call.num_keys]
            if self.window is not None:
                attention.mul_(1 - 1 / self.window)
            attention.add_(layer.mean_of(sums, call, self.window))
        if self.evicts:
            self._evict_one()
        return output

    def _evict_one(self) -> None:
        policy, state = self.layer.policy, self.state
        self.view.longest = state.next_position.amax() if self.in_graph else max(state.row_lengths)
        if self.is_steady and state.protected is None and self.store.ranks is None:
            slots = policy.first_to_go(self.view)
        else:
            scores = self.layer.shared_scores(policy.score(self.view).float())
            scores = self.layer.protected_scores(scores, state.positions)
            slots = lowest_token(scores, state.positions) if self.is_steady else self.store.next_to_free(scores)
        if self.in_graph:
            put_tokens(state.positions, slots, state.positions.new_tensor(-1))
            state.free_slots.copy_(slots)
        else:
            state.positions.scatter_(-1, slots, -1)
            state.free_slots = slots

    def settle(self) -> None:
        layer, state = self.layer, self.state
        if self.evicts:
            if self.is_steady:
                state.row_held = state.row_kept
            else:
                state.row_held = [min(held, kept) for held, kept in zip(state.row_held, state.row_kept, strict=True)]
                if not self.in_graph:
                    self._plan()
            if not self.in_graph:  # the view is up to date
                layer.policy.reposition_held(self.view, slots_stay=True)
            elif layer.policy.moves_between_steps(state):
                self._reposition()
            return
        state.length += self.in_graph
        self.num_steps_left -= 1
        if self.num_steps_left < 1 and not layer.budget.is_unlimited:
            layer.evict_if_due(max(state.row_lengths))
            if self.in_graph:
                self.cursor.fill_(state.length)
            self._plan()

    def _reposition(self) -> None:
        """Lets the policy move the keys that stayed."""
        self.view.longest = max(self.state.row_lengths)
        self.layer.policy.reposition_held(self.view, slots_stay=True)


def put_tokens(tensor: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """
    Writes values `(batch, any, tokens, ...)`, or one number, into slots `(batch, kv_heads or 1, tokens)` of a tensor
    `(batch, kv_heads or 1, slots, ...)`.
    """
    rows, heads = (torch.arange(size, device=tensor.device) for size in tensor.shape[:2])
    tensor.index_put_((rows[:, None, None], heads[:, None], slots), values)


def attend_to_slots(
    call: AttentionCall, mask: torch.Tensor | None, bias: torch.Tensor | None, scores: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `decode_attention` with a mask and a bias `(batch, kv_heads or 1, slots)`; the sums only with `scores`. On a CPU
    compilers see what it computes.
    """
    arguments = call.logit_arguments
    if call.key.device.type != "cpu":
        given = arguments["sink_logits"], arguments["scaling"], arguments["softcap"]
        return decode_attention_unchecked(call.query, call.key, call.value, mask, bias, *given)
    probabilities = decode_probabilities(call.query, call.key, mask, bias=bias, **arguments)
    return weighted(call.value, probabilities), probabilities.sum(dim=2) if scores else None
