"""The layer that keeps what a `Policy` scores highest: update, attend, observe, evict."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pyramid_cache.engine import checks
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import Budget, bytes_to_tokens
from pyramid_cache.engine.compaction import Compactor
from pyramid_cache.engine.fixed import FixedStep
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import Arrival, CompressedLayer
from pyramid_cache.engine.policy import LayerView, Policy, PromptView, ScoringView
from pyramid_cache.engine.projection import find_projection
from pyramid_cache.engine.protection import protected_first, protected_positions, spans_of_rows
from pyramid_cache.engine.quantization import Quantizer
from pyramid_cache.engine.quantized_store import QuantizedHeads, QuantizedStore
from pyramid_cache.engine.ragged_store import RaggedStore
from pyramid_cache.engine.ranks import HeadRanks
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.scoring import sum_of_measures
from pyramid_cache.engine.sharing import OnlineBudget, SharedBudget
from pyramid_cache.engine.state import expanded, grown
from pyramid_cache.engine.store import MIN_GROWTH, Compaction, SlotStore
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops.reference import decode_probabilities


class EvictingLayer(CompressedLayer):
    """
    A layer of a `PolicyCache`. After a prompt it keeps the tokens of the highest scores. New tokens are stored behind
    them. After `eviction_interval` new tokens all are scored, and those that stay move into the first slots. Layers
    that share a budget have `shared` in common. `protect` is what `read_protect` gives.
    """

    budget: Budget

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        budget: Budget,
        policy: Policy,
        eviction_interval: int,
        ranking: str = "head",
        shared: SharedBudget | OnlineBudget | None = None,
        protect: tuple[Sequence[int], ...] = (),
        compactor: Compactor | None = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.budget, self.policy, self.protect, self.compactor = budget, policy, protect, compactor
        self.eviction_interval, self.ranking, self.shared = eviction_interval, ranking, shared
        self.score_label, self.needs_rotary = policy.score_label, policy.needs_rotary
        super().__init__(place, masks, self._new_store())
        # Slots of quantised tokens are not given to others.
        self.store.interval = eviction_interval if quantizer is None else max(eviction_interval, 2)

    def _new_store(self) -> SlotStore:
        policy, quantizer = self.policy, self.quantizer
        heads_compete = self.ranking != "head"
        if quantizer is None:
            return (
                RaggedStore(policy.state_class, policy.floor_ratio) if heads_compete else SlotStore(policy.state_class)
            )
        rewrites = policy.repositions or self.compactor is not None
        if heads_compete:
            return QuantizedHeads(policy.state_class, quantizer, rewrites, policy.floor_ratio)
        return QuantizedStore(policy.state_class, quantizer, rewrites, policy.heads_share_tokens)

    def _clear(self) -> None:
        super()._clear()
        # What watches tokens that are read again, and then forgotten.
        self.replay: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.layout = self.layout_of(key_states, value_states)
        _ = self.bytes_per_token  # raises if heads cannot be packed
        self._read_byte_budget()  # raises if the bytes pay for no token, and changes nothing then
        super().lazy_initialization(key_states, value_states)
        if self.protect and (spans := spans_of_rows(self.protect, self.batch_size)):  # else `_read` raises
            self.state.row_protected = [len(span) for span in spans]
            self.state.protected = protected_positions(spans, self.device)

    def _read_byte_budget(self) -> None:
        if self.budget.kind != "bytes":
            return
        num_spare = self.eviction_interval + self.policy.num_extra_slots
        if self.quantizer is not None:  # the latest tokens take the memory of several
            layout, most_latest = self.layout, self.quantizer.most_latest + MIN_GROWTH
            bytes_of_latest = layout.kv_heads * (layout.key_dim + layout.value_dim) * layout.dtype.itemsize
            num_spare += -(-most_latest * bytes_of_latest // self.bytes_per_token)
        self.state.budget_tokens = bytes_to_tokens(
            int(self.budget.amount),
            self.place.num_layers,
            self.batch_size,
            self.bytes_per_token * self.state.num_ranks,  # those of all ranks
            num_spare,
        )

    @property
    def token_budget(self) -> Budget:
        """The budget; one in bytes as the tokens that it pays for."""
        return Budget("tokens", self.state.budget_tokens) if self.budget.kind == "bytes" else self.budget

    @property
    def bytes_per_token(self) -> int:
        """Keys, values and bookkeeping of one token of one row, quantised if it will be."""
        layout = self.layout
        # Of positions, attention, and what the method remembers. The bias belongs to each head.
        bookkeeping = 4 * (1 + (self.policy.window_size != 0) + len(self.state.own_slots) - 1)
        if self.quantizer is None:
            bytes_per_head = (layout.key_dim + layout.value_dim) * layout.dtype.itemsize
        else:
            bytes_per_head = self.quantizer.bytes_per_token(layout.key_dim, layout.value_dim, layout.dtype.itemsize)
        bytes_per_head += 4 * (self.compactor is not None)
        heads_apart = 1 if self.policy.heads_share_tokens else layout.kv_heads
        return layout.kv_heads * bytes_per_head + bookkeeping * heads_apart

    @property
    def chooses_channels(self) -> bool:
        """Whether the queries seen so far tell which channels older keys keep."""
        return self.quantizer is not None and self.quantizer.thin_keys > 0

    def num_tokens_to_keep(self, row_length: int) -> int:
        place = self.place
        return max(self.policy.num_tokens(row_length, self.token_budget, place.depth, place.num_layers), 1)

    def has_room(self, row_lengths: list[int]) -> bool:
        if self.chooses_channels and any(map(self.quantizer.num_quantized, row_lengths)):
            return False
        num_tokens, depths = self.policy.num_tokens, range(self.place.num_layers)
        return self.budget.is_unlimited or all(
            length <= num_tokens(length, self.token_budget, depth, len(depths))
            for length in row_lengths
            for depth in depths
        )

    def check(self, call: AttentionCall, arrival: Arrival, is_step: bool) -> None:
        if self.module is None and self.policy.weighs_values:
            find_projection(call.module, call.value.shape[1], call.value.shape[3], call.query.shape[1])
        super().check(call, arrival, is_step)

    def set_ranks(self, ranks: HeadRanks | None) -> None:
        if ranks is not None and isinstance(self.store, QuantizedHeads):
            raise NotImplementedError(
                f"The model is split over {ranks.size} ranks (tensor parallelism), and heads that compete "
                f"(`ranking={self.ranking!r}`) with {self.quantizer.option} are not. Leave one of the two out."
            )
        super().set_ranks(ranks)
        if ranks is not None:
            self._read_byte_budget()

    def _read(self, call: AttentionCall, arrival: Arrival) -> Tokens:
        seen = super()._read(call, arrival)
        checks.check_protected(self, seen.row_lengths)
        self.policy.check_rows(seen.row_lengths)
        if self.policy.repositions:
            new = replace(seen, positions=seen.positions[..., -call.num_queries :])
            num_kept = max(map(self.num_tokens_to_keep, seen.row_lengths))
            self.policy.check_prompt(
                new, call.kwargs.get("position_ids"), self.rotary_of(call.module), self.state, num_kept
            )
        return seen

    def _crop_held(self, num_columns: int) -> None:
        super()._crop_held(num_columns)
        observes = type(self.policy).observe is not Policy.observe or self.compactor is not None
        reads_again = isinstance(self.shared, SharedBudget) and self.shared.waits
        self.state.has_traces |= self.policy.window_size != 0 or observes or reads_again or self.chooses_channels

    def check_lengths(self, row_lengths: list[int]) -> None:
        super().check_lengths(row_lengths)
        checks.check_protected(self, row_lengths)

    def _row_totals(self) -> list[int]:
        """What all layers together keep of each row."""
        num_tokens, depths = self.policy.num_tokens, range(self.place.num_layers)
        return [
            sum(max(num_tokens(length, self.token_budget, depth, len(depths)), 1) for depth in depths)
            for length in self.state.row_lengths
        ]

    def pack(self) -> None:
        waits = isinstance(self.shared, SharedBudget) and any(layer is self for layer, _ in self.shared.waiting)
        if isinstance(self.store, QuantizedStore) and not waits:
            if self.policy.weighs_values and not self.budget.is_unlimited and self.store.is_due():
                self.store.unpack()
                keys, values, _ = self._held()
                view = LayerView(**self._view(keys, values, self.store.held_positions(), max(self.state.row_lengths)))
                self._plainly(self.policy.weigh, view)
            self.store.pack()

    def loses_tokens(self, seen: Tokens) -> bool:
        if self.quantizer is not None and (
            not self.state.is_dense or any(map(self.quantizer.num_quantized, seen.row_lengths))
        ):
            return True
        return not self.budget.is_unlimited and super().loses_tokens(seen)

    # Steps of fixed shapes.

    @property
    def can_fix(self) -> bool:  # type: ignore[override]
        return self.quantizer is None and (self.eviction_interval > 1 or not self.policy.reads_counts)

    def may_fix(self, max_length: int | None = None) -> bool:
        has_room = not self.budget.is_unlimited or (max_length is not None and max_length > self.state.num_seen)
        return has_room and self.quantizer is None and self.policy.may_fix(self.state)

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
            "find_module": partial(find_module, weakref.ref(self)),
            "find_rotary": partial(find_rotary, weakref.ref(self)),
            "ranks": self.store.ranks,
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
        return ScoringView(**view, num_kept=self.state.num_kept, attention=attention, ranking=self.ranking)

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
        scores = self.protected_scores(self.shared_scores(scores.float()), positions)
        state = self.state
        has_gaps = state.is_dense or state.has_empty_slots or key.shape[2] != state.length or state.num_ranks > 1
        return self._of_all_ranks(scores.masked_fill(positions < 0, float("-inf")) if has_gaps else scores)

    def shared_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores that heads share are means over the heads of all ranks."""
        ranks, policy = self.store.ranks, self.policy
        has_all = ranks is None or not policy.heads_share_tokens or policy.scores_positions
        return scores if has_all else ranks.mean(scores)

    def _of_all_ranks(self, priority: torch.Tensor) -> torch.Tensor:
        """Where heads compete, the priorities of those of other ranks as well."""
        ranks = self.store.ranks
        return priority if ranks is None or self.ranking == "head" else ranks.gathered(priority)

    def protected_scores(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Float scores in which those of protected tokens are the highest."""
        protected = self.state.protected
        return scores if protected is None else protected_first(scores, positions, protected)

    # Several tokens.

    def _count_kept(self) -> None:
        checks.check_protected(self, self.state.row_lengths)
        super()._count_kept()
        if self.policy.window_size:
            self.state.row_windows = [
                max(self.policy.num_queries(length, self.token_budget, self.place.num_layers), 1)
                for length in self.state.row_lengths
            ]
        self.policy.prepare(self.state)

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.store.observe(call, tokens)
        if self.budget.is_unlimited:
            return self._attend_and_keep(call, tokens)
        state, longest = self.state, tokens.longest or max(tokens.row_lengths)
        new = [(call.num_queries, longest)]
        was_dense = state.is_dense
        call = call if was_dense else self._repositioned(call, tokens, new)
        view = self._prompt_view(call, tokens, longest)
        if self.policy.window_size and (row_windows := self._plainly(self.policy.count_queries, view)) is not None:
            state.row_windows = row_windows
        output, attention = self._attend_and_score(call, tokens, view)
        self._observe(view)
        if attention is not None and was_dense:
            state.attention = grown(attention, state.length, state.keys.shape[2], fill=0)
        held, shared = (call.key, call.value, attention), self.shared
        if isinstance(shared, SharedBudget):
            if not was_dense:  # all tokens go back into slots
                self._keep_all(*held, tokens)
            shared.add(self, longest)
            return output
        totals = [] if shared is None else self._row_totals()
        takes_share = shared is not None and not all(shared.fits(totals, state.row_lengths))
        if not was_dense or state.must_evict or takes_share or tokens.row_present != tokens.row_lengths:
            if was_dense:
                call = self._repositioned(call, tokens, new)
                held = call.key, call.value, attention
            priority = self._priority(*held, tokens.positions, longest)
            if takes_share:
                self.set_kept(shared.take(priority, tokens.row_present, totals, state, self.place.depth))
            self.store.keep(*held, priority, tokens, state.row_kept, self.compaction(longest))
            self.reposition(longest)
        self.forget_prompt()
        return output

    def _attend_and_keep(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of several queries where nothing is ever evicted."""
        if self.state.is_dense:
            return call.run()
        output, _ = self.store.attend_several(call, tokens)
        self.state.resize_own_slots(call.num_keys)
        self._keep_all(call.key, call.value, None, tokens)
        return output

    def _keep_all(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, tokens: Tokens
    ) -> None:
        """Puts all tokens into slots."""
        heads = 1 if self.policy.heads_share_tokens else key.shape[1]
        any_order = torch.where(tokens.positions >= 0, 0.0, float("-inf")).expand(-1, heads, -1)
        self.store.keep(key, value, attention, self._of_all_ranks(any_order), tokens, tokens.row_present)

    def break_off(self) -> None:
        """The layer is half changed, as the next call of the cache shall notice."""
        self.arrival = Arrival(0)

    def forget_prompt(self) -> None:
        """Forgets what served the eviction after a prompt alone."""
        if self.compactor is not None:
            self.compactor.forget()

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        chunks = [(chunk.num_columns, chunk.longest) for chunk in self.pending.chunks]
        longest = max(tokens.row_lengths)
        call = self._repositioned(call, tokens, [*chunks, (call.num_queries, longest)])
        if self.replay is not None:
            self._plainly(self.replay.observe, self._prompt_view(call, tokens, longest))
        return super().attend_recorded(call, tokens)

    def _attend_and_score(
        self, call: AttentionCall, tokens: Tokens, view: PromptView
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
        if policy.measure is None:
            output, sums = self.store.attend_several(call, tokens, num_rows, row_weights)
        else:
            output, _ = self.store.attend_several(call, tokens)
            given = {"num_rows": num_rows, "row_weights": row_weights, "measure": policy.measure}
            sums = self._plainly(partial(sum_of_measures, **given), view)
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

    def _prompt_view(self, call: AttentionCall, tokens: Tokens, longest: int) -> PromptView:
        return PromptView(
            **self._view(call.key, call.value, tokens.positions, longest),
            query=call.query,
            query_positions=tokens.positions[:, :1, -call.num_queries :],
            bias=call.bias,
            **call.logit_arguments,
        )

    def measured(self, call: AttentionCall, sums: torch.Tensor, num_visible: int | torch.Tensor) -> torch.Tensor:
        """Sums of the probabilities of one query over query groups, with the policy's `measure` of their mean."""
        group = call.query.shape[1] // call.key.shape[1]
        return self.policy.measure(sums / group, num_visible) * group

    def _observe(self, view: PromptView) -> None:
        state = self.state
        state.resize_own_slots(view.key.shape[2])
        self._plainly(self.policy.observe, view)
        if self.compactor is not None:
            self._plainly(self.compactor.observe, view)
        checks.check_own_slots(self, view.key)
        if state.is_dense:  # whose tensors have room for later tokens
            state.resize_own_slots(state.keys.shape[2])

    # One token.

    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        state, scores = self.state, self.policy.window_size != 0
        self.store.observe(call)
        if self.budget.is_unlimited:
            return call.run() if state.is_dense else self.store.attend_step(call, scores=False)[0]
        if state.is_dense:  # the model's own attention, and beside it what each token gets of it
            output, sums = call.run(), None
            if scores:
                mask = None if state.column_positions is None else self.store.column_tokens().positions >= 0
                with torch.no_grad():
                    probabilities = decode_probabilities(call.query, call.key, mask, **call.logit_arguments)
                sums = probabilities.sum(dim=2)
        else:
            positions = self.store.in_use("positions")[..., -call.num_keys :]
            view = LayerView(**self._view(call.key, call.value, positions, longest))
            if self.policy.repositions and self.policy.moves_new(view):
                call = self.repositioned_step(call, view, longest)
            output, sums = self.store.attend_step(call, scores)
        if sums is not None:
            if self.policy.measure is not None:
                sums = self.store.measured(sums, partial(self.measured, call))
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
        self.evict_to(row_left, self.priority_of_held(longest), longest)

    def priority_of_held(self, longest: int) -> torch.Tensor:
        """The priority `(batch, kv_heads or 1, slots)` of all tokens that the layer holds, as they are in slots."""
        self.store.unpack()
        return self._priority(*self._held(), self.store.held_positions(), longest)

    def evict_to(self, row_left: list[int], priority: torch.Tensor, longest: int) -> None:
        """Keeps so many tokens of each row, by the `priority_of_held`."""
        compact = self.compaction(longest)
        if self.state.is_dense:
            self.store.keep(*self._held(), priority, self.store.column_tokens(), row_left, compact)
        else:
            self.store.evict(priority, row_left, compact)
        self.reposition(longest)

    def compaction(self, longest: int) -> Compaction | None:
        """How the tokens that stay come to stand for those that go; None if these leave nothing behind."""
        return None if self.compactor is None else partial(self._compacted, longest)

    def _compacted(
        self, longest: int, slots: dict[str, torch.Tensor], is_kept: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        view = LayerView(**self._view(slots["keys"], slots["values"], slots["positions"], longest))
        with torch.autocast(self.device.type, enabled=False):  # gradients pass
            return self.compactor.compact(view, is_kept, slots.get("bias"))

    def _held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.store.in_use("keys"), self.store.in_use("values"), self.store.in_use("attention")

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
        self.pack()
        if not state.is_dense and state.num_slots > state.length:
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


def find_module(layer: weakref.ref[EvictingLayer]) -> nn.Module:
    """The attention module of a layer. A view does not hold on to its layer, which may hold on to the view."""
    return layer().module


def find_rotary(layer: weakref.ref[EvictingLayer]) -> RotaryFrequencies | None:
    """How a layer rotates keys."""
    checks.check_rotary(layer())
    return layer().rotary_of(layer().module)


def query_weights(ages: torch.Tensor, window: torch.Tensor, newest_weight: float) -> torch.Tensor:
    """
    How much each query of a window counts: from 1 for the oldest to `newest_weight`, over the mean of both. `ages`
    `(batch, queries)` are 0 for the newest token of a row, `window` is `(batch, 1)`.
    """
    slope = (newest_weight - 1) / (window - 1).clamp(min=1)
    return (1 + slope * (window - 1 - ages)) / ((1 + newest_weight) / 2)
