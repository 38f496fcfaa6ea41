"""The layer that keeps what a `Policy` scores highest: update, attend, observe, evict."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pyramid_cache.engine import checks
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import Budget, bytes_to_tokens
from pyramid_cache.engine.fixed import FixedStep
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import Arrival, CompressedLayer
from pyramid_cache.engine.policy import LayerView, Policy, PromptView, ScoringView
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.sharing import SharedBudget, WaitingEviction
from pyramid_cache.engine.state import expanded, grown
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops.reference import decode_probabilities


class EvictingLayer(CompressedLayer):
    """
    A layer of a `PolicyCache`. After a prompt it keeps the tokens of the highest scores. New tokens are stored behind
    them. After `eviction_interval` new tokens all are scored, and those that stay move into the first slots.
    `shared` is of a policy whose layers share a budget.
    """

    budget: Budget

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        budget: Budget,
        policy: Policy,
        eviction_interval: int,
        shared: SharedBudget | None = None,
    ) -> None:
        self.budget, self.policy = budget, policy
        self.eviction_interval, self.shared = eviction_interval, shared
        self.score_label, self.needs_rotary = policy.score_label, policy.needs_rotary
        super().__init__(place, masks, policy.build_store())
        self.store.interval = eviction_interval

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.layout = self.layout_of(key_states, value_states)
        if self.budget.kind == "bytes":  # raises if the bytes pay for no token, and changes nothing then
            self.state.budget_tokens = bytes_to_tokens(
                int(self.budget.amount),
                self.place.num_layers,
                self.batch_size,
                self.bytes_per_token,
                self.eviction_interval + self.policy.num_extra_slots,
            )
        super().lazy_initialization(key_states, value_states)

    @property
    def token_budget(self) -> Budget:
        """The budget; one in bytes as the tokens that it pays for."""
        return Budget("tokens", self.state.budget_tokens) if self.budget.kind == "bytes" else self.budget

    @property
    def bytes_per_token(self) -> int:
        """Keys, values and bookkeeping of one token of one row."""
        layout = self.layout
        bookkeeping = 4 if self.policy.window_size == 0 else 8
        return layout.kv_heads * (layout.key_dim + layout.value_dim) * layout.dtype.itemsize + bookkeeping * (
            1 if self.policy.heads_share_tokens else layout.kv_heads
        )

    def num_tokens_to_keep(self, row_length: int) -> int:
        place = self.place
        return max(self.policy.num_tokens(row_length, self.token_budget, place.depth, place.num_layers), 1)

    def has_room(self, row_lengths: list[int]) -> bool:
        num_tokens, depths = self.policy.num_tokens, range(self.place.num_layers)
        return self.budget.is_unlimited or all(
            length <= num_tokens(length, self.token_budget, depth, len(depths))
            for length in row_lengths
            for depth in depths
        )

    def _read(self, call: AttentionCall, arrival: Arrival) -> Tokens:
        seen = super()._read(call, arrival)
        if self.policy.repositions:
            new = replace(seen, positions=seen.positions[..., -call.num_queries :])
            num_kept = max(map(self.num_tokens_to_keep, seen.row_lengths))
            self.policy.check_prompt(
                new, call.kwargs.get("position_ids"), self.rotary_of(call.module), self.state, num_kept
            )
        return seen

    def _crop_held(self, num_columns: int) -> None:
        super()._crop_held(num_columns)
        self.state.has_traces |= self.policy.window_size != 0 or type(self.policy).observe is not Policy.observe

    def loses_tokens(self, seen: Tokens) -> bool:
        return not self.budget.is_unlimited and super().loses_tokens(seen)

    # Steps of fixed shapes.

    @property
    def can_fix(self) -> bool:  # type: ignore[override]
        return self.eviction_interval > 1 or not self.policy.reads_counts

    def may_fix(self, max_length: int | None = None) -> bool:
        has_room = not self.budget.is_unlimited or (max_length is not None and max_length > self.state.num_seen)
        return has_room and self.policy.may_fix(self.state)

    def fix(self, max_length: int | None = None, in_graph: bool = False) -> FixedStep:
        self.store.leave_inference_mode()
        num_slots = max_length if self.budget.is_unlimited else self.store.capacity
        return self.store.build_step(self, num_slots, in_graph)

    # Views.

    def _view(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, longest: int) -> dict[str, Any]:
        """The attributes of a `LayerView`."""
        return {
            "key": key,
            "value": value,
            "positions": positions,
            "length": self.state.next_position,
            "state": self.state,
            "layer_idx": self.place.layer_idx,
            "find_rotary": partial(find_rotary, weakref.ref(self)),
            "longest": longest,
        }

    def _scoring_view(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        attention: torch.Tensor | None,
        longest: int = 0,
    ) -> ScoringView:
        view = self._view(key, value, positions, longest)
        return ScoringView(**view, num_kept=self.state.num_kept, attention=attention)

    def view_of_slots(self) -> ScoringView:
        """A view of all slots, which stays right as long as their tensors stay where they are."""
        state = self.state
        view = self._scoring_view(state.keys, state.values, state.positions, state.attention)
        if self.needs_rotary:
            view.rotary  # noqa: B018 which it remembers
        return view

    def _plainly(self, function: Callable, view: LayerView) -> Any:
        """What a function of the policy returns, without autograd and autocast."""
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(self.device.type):
            return function(view)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return function(view)

    def _priority(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: torch.Tensor | None,
        positions: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` float32: the policy's scores, -inf for what is no token."""
        view = self._scoring_view(key, value, positions, attention, longest)
        scores = self._plainly(self.policy.score, view)
        checks.check_scores(self, scores, key)
        has_gaps = self.state.is_dense or self.state.has_empty_slots or key.shape[2] != self.state.length
        return scores.float().masked_fill(positions < 0, float("-inf")) if has_gaps else scores.float()

    # Several tokens.

    def _count_kept(self) -> None:
        super()._count_kept()
        if self.policy.window_size:
            self.state.row_windows = [
                max(self.policy.num_queries(length, self.token_budget, self.place.num_layers), 1)
                for length in self.state.row_lengths
            ]
        self.policy.prepare(self.state)

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.budget.is_unlimited:
            return call.run()
        state, longest = self.state, tokens.longest or max(tokens.row_lengths)
        new = [(call.num_queries, longest)]
        was_dense = state.is_dense
        call = call if was_dense else self._repositioned(call, tokens, new)
        output, attention = self._attend_and_score(call, tokens)
        self._observe(call, tokens, longest)
        if attention is not None and was_dense:
            state.attention = grown(attention, state.length, state.keys.shape[2], fill=0)
        must_evict = not was_dense or state.must_evict or tokens.row_present != tokens.row_lengths
        if must_evict or self.shared is not None:
            call = self._repositioned(call, tokens, new) if was_dense else call
            held = call.key, call.value, attention
            priority = self._priority(*held, tokens.positions, longest)

            def evict() -> None:
                self.store.keep(*held, priority, tokens, state.row_kept)
                self.reposition(longest)

            if self.shared is None:
                evict()
            else:
                self.shared.add(WaitingEviction(self, priority, tokens.row_present, must_evict, evict))
        return output

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        chunks = [(chunk.num_columns, chunk.longest) for chunk in self.pending.chunks]
        return super().attend_recorded(
            self._repositioned(call, tokens, [*chunks, (call.num_queries, max(tokens.row_lengths))]), tokens
        )

    def _attend_and_score(
        self, call: AttentionCall, tokens: Tokens
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """The output of attention, and `ScoringView.attention` of all keys."""
        policy, state = self.policy, self.state
        if policy.window_size == 0:
            return self.store.attend_several(call, tokens)
        num_rows, row_weights, share_left = call.num_queries, None, 1
        if policy.window_size is not None:
            if tokens.is_ascending:  # padding between the tokens of a row puts its last queries further back
                num_rows = min(max(state.row_windows), call.num_queries)
            positions, window = tokens.positions[:, 0, -num_rows:], self.store.per_row(state.row_windows)[:, 0]
            ages = state.next_position[:, 0] - 1 - positions
            is_in_window = (positions >= 0) & (ages < window)
            share_left = 1 - (is_in_window.sum(dim=-1, keepdim=True) / window)[..., None]
            if policy.newest_weight != 1 or not tokens.is_ascending or len(set(state.row_windows)) > 1:
                row_weights = (is_in_window * query_weights(ages, window, policy.newest_weight)).float()
        output, sums = self.store.attend_several(call, tokens, num_rows, row_weights)
        attention = self.mean_of(sums, call, None if policy.window_size is None else self.window())
        earlier = self.store.held_attention()
        if earlier is not None:
            attention[..., : earlier.shape[-1]] += share_left * earlier
        return output, attention

    def mean_of(self, sums: torch.Tensor, call: AttentionCall, window: int | torch.Tensor | None) -> torch.Tensor:
        """Sums of probabilities over query groups `(batch, kv_heads, keys)`, as `ScoringView.attention` has them."""
        if window is not None:
            sums = sums * (call.key.shape[1] / call.query.shape[1] / window)
        return sums.mean(dim=1, keepdim=True) if self.policy.heads_share_tokens else sums

    def _observe(self, call: AttentionCall, tokens: Tokens, longest: int) -> None:
        view = PromptView(
            **self._view(call.key, call.value, tokens.positions, longest),
            query=call.query,
            query_positions=tokens.positions[:, :1, -call.num_queries :],
            scaling=call.logit_arguments["scaling"],
        )
        state, num_slots = self.state, call.num_keys
        state.resize_own_slots(num_slots)
        self._plainly(self.policy.observe, view)
        checks.check_own_slots(self, call.key)
        if state.is_dense:  # whose tensors have room for later tokens
            state.resize_own_slots(state.keys.shape[2])

    # One token.

    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.budget.is_unlimited:
            return call.run()
        state, scores = self.state, self.policy.window_size != 0
        if state.is_dense:  # the model's own attention, and beside it what each token gets of it
            output, sums = call.run(), None
            if scores:
                mask = None if state.column_positions is None else self.store.column_tokens().positions >= 0
                with torch.no_grad():
                    probabilities = decode_probabilities(call.query, call.key, mask, **call.logit_arguments)
                sums = probabilities.sum(dim=2)
        else:
            view = LayerView(**self._view(call.key, call.value, self.store.in_use("positions"), longest))
            if self.policy.repositions and self.policy.moves_new(view):
                call = self.repositioned_step(call, view, longest)
            output, sums = self.store.attend_step(call, scores)
        if sums is not None:
            window = None if self.policy.window_size is None else self.window()
            self.store.add_attention(sums, window, lambda each, window: self.mean_of(each, call, window))
        self.evict_if_due(longest)
        return output

    def window(self) -> int | torch.Tensor:
        """How many queries count: one number, or one for each row, `(batch, 1, 1)`."""
        windows = self.state.row_windows
        return windows[0] if windows.count(windows[0]) == len(windows) else self.store.per_row(windows)

    def evict_if_due(self, longest: int, at_once: bool = False) -> None:
        """Evicts from the rows that have `eviction_interval` tokens beyond their budget, or `at_once` from all."""
        state, interval = self.state, 0 if at_once else self.eviction_interval
        is_due = [held >= kept + interval for held, kept in zip(state.row_held, state.row_kept, strict=True)]
        if not any(is_due) and (state.is_dense or not self.store.is_full()):
            return
        rows = zip(state.row_held, state.row_kept, is_due, strict=True)
        row_left = [min(held, kept) if due else held for held, kept, due in rows]
        self.store.unpack()
        held = self.store.in_use("keys"), self.store.in_use("values"), self.store.in_use("attention")
        if state.is_dense:
            tokens = self.store.column_tokens()
            self.store.keep(*held, self._priority(*held, tokens.positions, longest), tokens, row_left)
        else:
            self.store.evict(self._priority(*held, self.store.in_use("positions"), longest), row_left)
        self.reposition(longest)

    def compress(self) -> None:
        state = self.state
        if not self.is_initialized or self.budget.is_unlimited:
            return
        self.take_step(None)
        if self.shared is None or state.is_dense:  # else a prompt has decided for all layers
            self._count_kept()
        if state.must_evict:
            if self.policy.repositions:
                find_rotary(weakref.ref(self))
            self.evict_if_due(max(state.row_lengths), at_once=True)
        if not state.is_dense and state.keys.shape[2] > state.length:
            self.store.resize(state.length)  # frees the slots for tokens that would have come in before as many go

    # Other positions than the model's.

    def reposition(self, longest: int) -> None:
        """Lets the policy move the keys that stayed."""
        if self.policy.repositions:
            key, value, positions = (self.store.in_use(name) for name in ("keys", "values", "positions"))
            view = LayerView(**self._view(key, value, positions, longest))
            self._plainly(partial(self.policy.reposition_held, slots_stay=False), view)

    def _repositioned(self, call: AttentionCall, tokens: Tokens, chunks: list[tuple[int, int]]) -> AttentionCall:
        """
        The call with keys and queries where the policy wants them. Of the last columns of the keys, which are as the
        model rotated them, each of the `chunks` tells how many one forward pass brought, and the longest row by then.
        The queries belong to the last chunk.
        """
        view = LayerView(**self._view(call.key, call.value, tokens.positions, chunks[-1][1]))
        if not self.policy.repositions or not self.policy.moves_new(view):
            return call
        stop = call.num_keys - sum(num_columns for num_columns, _ in chunks)
        keys = [call.key[:, :, :stop]]
        for num_columns, longest in chunks:
            columns = slice(stop, stop + num_columns)
            positions = tokens.positions[..., columns]
            keys.append(self.policy.reposition_new(view, call.key[:, :, columns], positions, longest))
            stop += num_columns
        positions = tokens.positions[..., -call.num_queries :]
        query = self.policy.reposition_new(view, call.query, positions, chunks[-1][1])
        return replace(call, query=query, key=torch.cat(keys, dim=2))

    def repositioned_step(self, call: AttentionCall, view: LayerView, longest: int | torch.Tensor) -> AttentionCall:
        """The call of a step where the policy wants it; the new key moves as well, in its slot."""
        newest, move = self.state.next_position - 1, self.policy.reposition_new
        slot = expanded((view.positions == newest).int().argmax(dim=-1, keepdim=True), call.key)
        call.key.scatter_(2, slot, move(view, call.key.gather(2, slot), newest, longest))
        return replace(call, query=move(view, call.query, newest, longest))


def find_rotary(layer: weakref.ref[EvictingLayer]) -> RotaryFrequencies | None:
    """How a layer rotates keys. A view does not hold on to its layer, which may hold on to the view."""
    checks.check_rotary(layer())
    return layer().rotary_of(layer().module)


def query_weights(ages: torch.Tensor, window: torch.Tensor, newest_weight: float) -> torch.Tensor:
    """
    How much each query of a window counts: from 1 for the oldest to `newest_weight`, over the mean of both. `ages`
    `(batch, queries)` are 0 for the newest token of a row, `window` is `(batch, 1)`.
    """
    slope = (newest_weight - 1) / (window - 1).clamp(min=1)
    return (1 + slope * (window - 1 - ages)) / ((1 + newest_weight) / 2)
