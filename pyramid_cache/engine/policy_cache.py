"""The layer and the cache that keep what a `Policy` scores highest."""

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import Budget, parse_budget, read_count
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace, grown
from pyramid_cache.engine.policy import Policy, PromptView, ScoringView
from pyramid_cache.engine.rope import RotaryFrequencies, SharedFrequencies
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.selection import best_tokens, gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.cpu import is_plain_on_cpu
from pyramid_cache.ops.reference import decode_probabilities


DEFAULT_EVICTION_INTERVAL = 32


class PolicyLayer(CompressedLayer):
    """
    One layer of a `PolicyCache`. After a prompt it keeps the tokens of the highest scores. New tokens are stored
    behind them. After `eviction_interval` new tokens all are scored, and those that stay move into the first slots.

    `attention` `(batch, kv_heads or 1, slots)` float32 is `ScoringView.attention`.
    """

    def __init__(
        self,
        place: LayerPlace,
        budget: Budget,
        masks: MaskReader,
        policy: Policy,
        eviction_interval: int,
        frequencies: SharedFrequencies,
    ) -> None:
        self.policy = policy
        self.num_spare_slots = eviction_interval
        self.frequencies = frequencies
        self.heads_share_positions = policy.heads_share_tokens
        if policy.window_size:
            self.slot_tensors = (*CompressedLayer.slot_tensors, "attention")
        self.row_tensors = (*type(self).row_tensors, *policy.state_names)
        super().__init__(place, budget, masks)

    def _clear(self) -> None:
        self.attention: torch.Tensor | None = None
        self._rotary: tuple[RotaryFrequencies | None] | None = None
        super()._clear()

    # The sizes change with every token: compilers would make a graph for each.
    update = torch.compiler.disable(CompressedLayer.update)
    attend = torch.compiler.disable(CompressedLayer.attend)

    def num_tokens_to_keep(self, row_length: int) -> int:
        kept = self.policy.num_tokens(row_length, self.token_budget, self.place.depth, self.place.num_layers)
        return max(kept, 1)

    @property
    def score_label(self) -> str | None:
        window_size = self.policy.window_size
        return f"mean attention of the last {window_size} queries (probability)" if window_size else None

    def _slot_scores(self) -> torch.Tensor | None:
        return None if self.attention is None else self.attention[..., : self.length]

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return super().is_croppable and not self.state

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that `Policy.observe` returned last, by name."""
        state = {name: getattr(self, name) for name in self.policy.state_names}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    # Several tokens.

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.budget.is_unlimited:
            return call.run()
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        if self.policy.state_names:
            self._remember(call, tokens)
        output, attention = self._attend_and_observe(call, tokens)
        if self.positions is not None or self.must_evict:
            self._keep_best(call.key, call.value, attention, tokens)
        elif attention is not None:
            self.attention = grown(attention, self.length, self.keys.shape[2], fill=0)
        return output

    def _attend_and_observe(
        self, call: AttentionCall, tokens: Tokens
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """The output of attention, and `ScoringView.attention` of all keys."""
        window_size = self.policy.window_size
        if not window_size:
            return self._attend_and_sum(call, tokens, 0, None)
        # Padding between the tokens of a row puts its last queries further back.
        num_rows = min(window_size, call.num_queries) if tokens.is_ascending else call.num_queries
        row_positions = tokens.positions[:, 0, -num_rows:]
        is_in_window = (row_positions >= 0) & (row_positions >= self.next_position[:, 0] - window_size)
        row_weights = None if tokens.is_ascending else is_in_window.float()
        output, sums = self._attend_and_sum(call, tokens, num_rows, row_weights)
        attention = self._mean_over_heads(sums, call)
        if self.attention is not None:
            num_earlier = call.num_keys - call.num_queries
            share_left = 1 - is_in_window.sum(dim=-1)[:, None, None] / window_size
            attention[..., :num_earlier] += share_left * self.attention[..., :num_earlier]
        return output, attention

    def _attend_and_sum(
        self, call: AttentionCall, tokens: Tokens, num_rows: int, row_weights: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """The output of attention, and the sums that the last `num_rows` queries gave to each key, if any counts."""
        return attend_and_score(call, tokens, num_rows, row_weights) if num_rows else (call.run(), None)

    def _mean_over_heads(self, sums: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Sums of probabilities over query groups `(batch, kv_heads, keys)` as shares of a window of means."""
        means = sums * (call.key.shape[1] / call.query.shape[1] / self.policy.window_size)
        return means.mean(dim=1, keepdim=True) if self.policy.heads_share_tokens else means

    @torch.no_grad()
    def _remember(self, call: AttentionCall, tokens: Tokens) -> None:
        module = call.module
        prompt = PromptView(
            call.query,
            tokens.positions[:, :1, -call.num_queries :],
            self.next_position,
            call.logit_arguments["scaling"],
            self.state,
            lambda: self.rotary_of(module),
            max(self.row_lengths) if self.replayed is None else self.replayed.longest,
        )
        with torch.autocast(self.device.type, enabled=False):
            state = self.policy.observe(prompt)
        for name in self.policy.state_names:
            setattr(self, name, state[name])

    def rotary_of(self, module: torch.nn.Module) -> RotaryFrequencies | None:
        """How the attention module rotates keys. The first call finds out, in a few milliseconds."""
        if self._rotary is None:
            self._rotary = (self.frequencies.frequencies_of(module, self.device),)
        return self._rotary[0]

    def held_tensors(self) -> dict[str, torch.Tensor]:
        shared = {f"frequencies_{index}": tensor for index, tensor in enumerate(self.frequencies.held_tensors())}
        return super().held_tensors() | shared

    def _priority(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` float32: the policy's scores, -inf for what is no token."""
        num_kept = self.per_row(self.row_kept)
        view = ScoringView(
            key, value, positions, self.next_position, num_kept, attention, self.state, self.place.layer_idx
        )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            scores = self.policy.score(view)
        expected = (key.shape[0], 1 if self.heads_share_positions else key.shape[1], key.shape[2])
        if scores.shape != expected:
            raise ValueError(
                f"`{type(self.policy).__name__}.score` returned {tuple(scores.shape)} instead of {expected}: (batch, "
                f"{'1, since heads share tokens' if self.heads_share_positions else 'kv_heads'}, tokens)."
            )
        return scores.float().masked_fill(positions < 0, float("-inf"))

    def _keep_best(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, tokens: Tokens
    ) -> None:
        """Keeps the best of ordered tokens, those of a prompt."""
        priority = self._priority(key, value, attention, tokens.positions)
        max_kept = max(min(held, kept) for held, kept in zip(self.row_held, self.row_kept, strict=True))
        indices = best_tokens(priority, self.per_row(self.row_kept).flatten(), max_kept)
        if attention is not None:
            self.attention = gather_tokens(attention, indices).masked_fill(indices < 0, 0)
        self.keep(key, value, tokens, indices)

    # One token.

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            return self._attend_dense_step(call)
        mask = self.slot_mask()
        output: tuple[torch.Tensor, torch.Tensor | None]
        if self.policy.window_size:
            arguments = call.logit_arguments
            attended, _, sums = decode_attention(call.query, call.key, call.value, mask=mask, **arguments)
            output = attended, None
            self._add_query(self.attention[..., : self.length], sums.detach(), call)
        elif is_plain_on_cpu(call.query, call.key, call.value, **call.logit_arguments):
            output = decode_attention(call.query, call.key, call.value, mask=mask, **call.logit_arguments)[0], None
        else:
            output = self.with_slot_mask(call, mask).run()
        self._evict_if_due()
        return output

    def _evict_if_due(self) -> None:
        is_due = self._is_due()
        if any(is_due) or self.length >= self.max_slots:
            self._evict(is_due)

    def _attend_dense_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step before the first eviction: the model's own attention, and beside it `ScoringView.attention`."""
        output = call.run()
        if self.budget.is_unlimited:
            return output
        if self.policy.window_size:
            key_mask = None if self.column_positions is None else self.column_tokens.positions >= 0
            with torch.no_grad():
                probabilities, _ = decode_probabilities(call.query, call.key, key_mask, **call.logit_arguments)
            self._add_query(self.attention[..., : self.length], probabilities.sum(dim=2), call)
        if any(self._is_due()):
            attention = None if self.attention is None else self.attention[..., : self.length]
            # Rows that are not due keep what they have.
            row_kept, self.row_kept = self.row_kept, self._row_left(self._is_due())
            self._keep_best(call.key, call.value, attention, self.column_tokens)
            self.row_kept = row_kept
        return output

    def _add_query(self, attention: torch.Tensor, sums: torch.Tensor, call: AttentionCall) -> None:
        """Puts the newest query into the window of `attention`; `sums` are its probabilities."""
        attention.mul_(1 - 1 / self.policy.window_size).add_(self._mean_over_heads(sums, call))

    def _is_due(self) -> list[bool]:
        """Which rows must evict: those with `eviction_interval` tokens beyond their budget."""
        return [held >= kept + self.num_spare_slots for held, kept in zip(self.row_held, self.row_kept, strict=True)]

    def _row_left(self, is_due: list[bool]) -> list[int]:
        """How many tokens each row holds after the rows that are due have evicted."""
        rows = zip(self.row_held, self.row_kept, is_due, strict=True)
        return [min(held, kept) if due else held for held, kept, due in rows]

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super()._write(key_states, value_states)
        if self.attention is not None:
            self.attention[..., self.length - 1 : self.length] = 0

    def _evict(self, is_due: list[bool]) -> None:
        """
        Evicts from the rows that are due, and closes the gaps: tokens behind the last slot that is needed move into
        free slots before it.
        """
        row_left = self._row_left(is_due)
        num_left = max(row_left)
        positions = self.positions[..., : self.length]
        key, value = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        attention = None if self.attention is None else self.attention[..., : self.length]
        priority = self._priority(key, value, attention, positions)
        order = positions.argsort(dim=-1)
        indices = best_tokens(priority.gather(-1, order), self.per_row(row_left).flatten(), num_left)
        # One more slot takes the indices that are -1.
        slots = torch.where(indices < 0, self.length, order.gather(-1, indices.clamp(min=0)))
        is_kept = torch.zeros(*positions.shape[:2], self.length + 1, dtype=torch.bool, device=self.device)
        is_kept = is_kept.scatter_(-1, slots, True)[..., : self.length]
        self._move_tokens(is_kept, num_left)
        self.row_held = row_left

    def _move_tokens(self, is_kept: torch.Tensor, num_left: int) -> None:
        """Moves the kept tokens, marked in `is_kept` `(batch, kv_heads or 1, slots)`, into the first slots."""
        is_kept_before, is_kept_behind = is_kept[..., :num_left], is_kept[..., num_left:]
        num_moves = min(num_left, is_kept_behind.shape[-1])
        free = is_kept_before.int().argsort(dim=-1, stable=True)[..., :num_moves]
        movers = (~is_kept_behind).int().argsort(dim=-1, stable=True)[..., :num_moves] + num_left
        moves = torch.arange(num_moves, device=self.device) < is_kept_behind.sum(dim=-1, keepdim=True)
        source = torch.where(moves, movers, free)
        self._spare_autograd()
        self.positions[..., :num_left].masked_fill_(~is_kept_before, -1)
        for name in self.slot_tensors:
            tensor = getattr(self, name)
            target = free[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3]) if tensor.dim() == 4 else free
            moved = gather_tokens(tensor, source)
            if tensor.requires_grad:  # autograd has saved it for the gathering
                setattr(self, name, tensor.scatter(2, target, moved))
            else:
                tensor.scatter_(2, target, moved)
        self.length = num_left

    def compress(self) -> None:
        if not self.is_initialized or self.budget.is_unlimited:
            return
        self.row_kept = [self.num_tokens_to_keep(length) for length in self.row_lengths]
        if self.positions is None:
            if self.must_evict:
                attention = None if self.attention is None else self.attention[..., : self.length]
                key, value = self.keys[:, :, : self.length], self.values[:, :, : self.length]
                self._keep_best(key, value, attention, self.column_tokens)
            return
        if self.must_evict:
            self._evict([True] * self.batch_size)
        if self.keys.shape[2] > self.length:  # slots for tokens that would have come in before as many go
            self._resize(self.length)


class PolicyCache(CompressedCache):
    """
    Keeps the tokens with the highest scores of a policy. Use it for a `Policy` of your own; the caches whose method is
    a score derive from it.

    A layer holds `budget` tokens and up to `eviction_interval` more, however much is generated. The prompt is read
    with full attention, so the first new token is exact.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        budget (`float`, `int` or `str`): What each layer keeps: a fraction of the prompt, a number of tokens, or bytes
            for all layers that evict ("256MiB"). In later turns, a fraction is of all tokens seen. 1.0 never evicts.
        policy (`Policy`): Scores the tokens.
        eviction_interval (`int`, defaults to 32): How many generated tokens wait for an eviction. Larger values take
            more memory and less time.

    Raises:
        ValueError: For a budget or an interval outside these ranges, or a model that cannot be compressed.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import Policy, PolicyCache
    >>> import torch

    >>> @dataclass(frozen=True)
    ... class LargestValues(Policy):
    ...     def score(self, view):
    ...         return view.value.norm(dim=-1)

    >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> cache = PolicyCache(model.config, budget=16, policy=LargestValues())
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.compress()
    >>> cache.num_kept_tokens()
    [16, 16]

    ```
    """

    layer_class: type[PolicyLayer] = PolicyLayer

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str,
        policy: Policy,
        *,
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
    ) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        parsed_budget = parse_budget(budget)
        if not isinstance(policy, Policy):
            raise ValueError(f"`policy={policy!r}` must be an instance of a class that derives from Policy.")
        eviction_interval = read_count("eviction_interval", eviction_interval, least=1)
        self.policy = policy
        self.frequencies = SharedFrequencies(config)

        def build_layer(place: LayerPlace, masks: MaskReader) -> PolicyLayer:
            return self.layer_class(place, parsed_budget, masks, policy, eviction_interval, self.frequencies)

        settings: dict[str, Any] | None = None
        if type(self).__init__ is not PolicyCache.__init__:
            # A cache with a constructor of its own takes the fields of its policy as arguments.
            settings = {"budget": budget, **fields_of(policy), "eviction_interval": eviction_interval}
        super().__init__(config, build_layer, settings)

    def reset(self) -> None:
        self.frequencies.forget()
        super().reset()


def fields_of(policy: Policy) -> dict[str, Any]:
    """The hyper-parameters of a policy, by name."""
    return dataclasses.asdict(policy) if dataclasses.is_dataclass(policy) else {}
