"""
CriticalKV of Feng et al., 2025 (https://arxiv.org/abs/2502.03805).

Attention does not tell what a token adds to the output: its value may be small, or vanish behind the output projection
`W_O`. Half of the tokens that stay are those with the highest scores of another policy. The others are chosen by the
score times the norm of the projected value, `‖v W_O‖₁` (paper, Algorithm 1).

Departures from the authors' code: where the heads of a layer compete, the first half is the best of all heads (theirs
shares the budget by the scores first, and halves what each head has). Generated tokens are scored too.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.budget import Budget, floor_of_product, read_number
from pyramid_cache.engine.policy import LayerView, Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.selection import best_of_all_heads, best_tokens, is_index
from pyramid_cache.engine.state import LayerState, counts, slot
from pyramid_cache.ops.transfer import numbers_on


@dataclass(eq=False)
class WeighedState(LayerState):
    """
    Attributes:
        value_weights (`torch.Tensor`): `(batch, kv_heads, slots)` float32, see `weigh_values`.
        row_weighed (`list[int]`): How many tokens of each row had come when the latest were weighed.
    """

    value_weights: torch.Tensor | None = slot()
    row_weighed: list[int] = counts()


@functools.cache
def weighed(state_class: type[LayerState]) -> type[LayerState]:
    """A state class with the fields of `WeighedState` beside its own."""
    if state_class is LayerState:
        return WeighedState
    return dataclass(eq=False)(type(f"Weighed{state_class.__name__}", (WeighedState, state_class), {}))


def weigh_values(view: LayerView, normalise: bool = False) -> torch.Tensor:
    """
    What the value of each token weighs behind the output projection: the mean of `‖v W_O‖₁` over the query heads of
    its KV head. Tokens are weighed once: those of a prompt, and later those that have come since, which all heads
    still hold.

    Args:
        view (`LayerView`): Its state derives from `WeighedState`.
        normalise (`bool`): Divides by the mean over the KV heads.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, tokens)` float32.
    """
    state, weights = view.state, view.remembered("value_weights")
    num_before = state.row_weighed or [0] * len(state.row_lengths)
    num_new = max(length - before for length, before in zip(state.row_lengths, num_before, strict=True))
    if weights is not None and num_new <= 0:
        return weights
    latest = None
    if weights is not None:
        latest = view.positions.topk(min(num_new, view.positions.shape[-1]), dim=-1).indices
    new = view.projected_value_norms(1, latest).unflatten(1, (view.key.shape[1], -1)).mean(dim=2)
    if normalise:
        new = new / view.mean_over_heads(new).clamp(min=torch.finfo(new.dtype).tiny)
    state.row_weighed = list(state.row_lengths)
    if latest is None:
        view.remember("value_weights", new)
        return new
    # Other rows may have fewer new tokens. The rest keep their weights.
    before = numbers_on(new.device, num_before, torch.int32).view(-1, 1, 1)
    is_new = view.positions.gather(-1, latest) >= before
    latest = latest.expand_as(new)
    return weights.scatter_(-1, latest, torch.where(is_new, new, weights.gather(-1, latest)))


@dataclass(frozen=True)
class CriticalPolicy(Policy):
    """
    A part of the tokens that stay have the highest scores of another policy. The others have the highest products of
    this score and of the norm of the value behind the output projection (CriticalKV,
    https://arxiv.org/abs/2502.03805). Tokens that the other policy scores `inf` stay, and count for the first part.

    Args:
        inner (`Policy`): Gives scores that are not negative, such as sums of attention, to each head of its own.
        first_ratio (`float`, defaults to 0.5): The share of the tokens that stay which the score chooses alone. With
            1 the norms choose nothing.
        epsilon (`float`, defaults to 1e-4): Added to the scores that are multiplied. Larger values let norms choose
            among tokens of small scores.

    Raises:
        ValueError: For an inner policy whose heads share tokens, or that moves keys.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import CriticalPolicy, H2OCache, PolicyCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> policy = CriticalPolicy(H2OCache(model.config).policy)
    >>> cache = PolicyCache(model.config, budget=16, policy=policy)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.num_kept_tokens()
    [23, 23]

    ```
    """

    inner: Policy
    first_ratio: float = setting(0.5, read_number, "[0, 1]")
    epsilon: float = setting(1e-4, read_number, "[0, 1]")

    reads_counts = weighs_values = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.inner
        if not isinstance(inner, Policy):
            raise ValueError(f"`inner={inner!r}` must be an instance of a class that derives from Policy.")
        if inner.heads_share_tokens or inner.repositions:
            reason = "lets all heads share tokens" if inner.heads_share_tokens else "moves keys"
            raise ValueError(
                f"{type(inner).__name__} {reason}, but values are weighed for each head. Use a policy that scores "
                "each head alone and leaves keys where they are, such as SnapKVPolicy."
            )
        if inner.divides_budget:
            raise ValueError(
                f"{type(inner).__name__} divides the budget over layers, which is not possible with weights. Use a "
                "policy whose layers keep numbers of their own, such as PyramidKVPolicy."
            )
        if inner.weighs_values:
            raise ValueError(
                f"{type(inner).__name__} weighs values itself. Use a policy that scores by attention or keys alone, "
                "such as SnapKVPolicy."
            )
        copied = "window_size", "newest_weight", "measure", "ranking", "floor_ratio", "needs_rotary", "needs_replay"
        for name in copied:
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "state_class", weighed(inner.state_class))  # type: ignore[arg-type]

    def score(self, view: ScoringView) -> torch.Tensor:
        scores = self.inner.score(view).float().masked_fill(~view.is_token, float("-inf"))
        stays = self._best(view, scores) | (scores == float("inf"))
        return ((scores + self.epsilon) * weigh_values(view)).masked_fill(stays, float("inf"))

    def _best(self, view: ScoringView, scores: torch.Tensor) -> torch.Tensor:
        """`(batch, kv_heads, tokens)` bool: the first part of the tokens that stay."""
        row_first = [floor_of_product(self.first_ratio, kept) for kept in view.state.row_kept]
        order = view.positions.expand_as(scores).argsort(dim=-1)
        ordered = scores.gather(-1, order)
        if view.ranking == "head":
            num_first = numbers_on(scores.device, row_first, torch.int64)
            best = is_index(best_tokens(ordered, num_first, max(row_first)), scores.shape[-1])
        else:
            best = best_of_all_heads(ordered, row_first, self.floor_ratio)
        return torch.empty_like(best).scatter_(-1, order, best)

    def observe(self, prompt: PromptView) -> None:
        self.inner.observe(prompt)
        self.weigh(prompt)

    def weigh(self, view: LayerView) -> None:
        weigh_values(view)

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        return self.inner.num_tokens(prompt_length, budget, depth, num_layers)

    def num_queries(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        return self.inner.num_queries(prompt_length, budget, num_layers)

    def prepare(self, state: Any) -> None:
        self.inner.prepare(state)

    def may_fix(self, state: Any) -> bool:
        return self.inner.may_fix(state)

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.inner.settings, "first_ratio": self.first_ratio, "epsilon": self.epsilon}

    @property
    def num_extra_slots(self) -> int:
        return self.inner.num_extra_slots


class CriticalKVCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that the last queries attend to, with their neighbours. For
    half of the budget, attention is weighed by the norm of the value behind the output projection (CriticalKV,
    https://arxiv.org/abs/2502.03805).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 12)` bytes. `PolicyCache(config, budget, CriticalPolicy(policy))` does the same for
    another policy. See `SnapKVCache` and `PolicyCache` for the other arguments and the errors.

    Args:
        first_ratio (`float`, defaults to 0.5): The share of the budget that attention chooses alone, the recent window
            among it. Smaller values weigh more of the choice by norms.
        epsilon (`float`, defaults to 1e-4): Added to the attention that is weighed. Larger values let the norm choose
            among tokens of little attention.

    Raises:
        NotImplementedError: At the first forward pass of a model whose output projection is not known.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import CriticalKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = CriticalKVCache(model.config, budget=16, window_size=4)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [23, 23])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        first_ratio: float = 0.5,
        epsilon: float = 1e-4,
        window_size: int = 64,
        kernel_size: int = 5,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = CriticalPolicy(SnapKVPolicy(window_size, kernel_size), first_ratio, epsilon)
        super().__init__(config, budget, policy, **options)
