"""
DefensiveKV of Feng et al., 2025 (https://arxiv.org/abs/2510.13334).

The mean attention of the last queries hides what a single one needs: which tokens are important differs from query to
query. A token's score is therefore the highest attention that any of them gave it, and no less than the mean of its
head. Scores are weighed by the values behind the output projection, as in CriticalKV. Heads of a layer, or of all
layers, compete.

Departures from the authors' code: tokens of the first stage, which rank above all others, are ranked among themselves
too. Each row of a batch has a threshold of its own. Of a small budget, the window has no more than half. Generated
tokens, which theirs keeps for ever, are scored by their mean attention: nothing keeps what single queries gave them.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.critical_kv import WeighedState, weigh_values
from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.policy import LayerView, Policy, PromptView, ScoringView, kernel_setting, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.state import slot


# The first stage keeps what gets this share of the attention (their code; CriticalKV's paper has half of the budget).
FIRST_STAGE_MASS = 0.9


@dataclass(eq=False)
class DefensiveState(WeighedState):
    """`peaks` `(batch, kv_heads, slots)` float32: the highest attention that a query of the window gave each token."""

    peaks: torch.Tensor | None = slot()


@dataclass(frozen=True)
class DefensivePolicy(Policy):
    """A token's score is the highest attention of the last queries, times the norm of its value behind `W_O`."""

    window_size: int = setting(32, read_count, 1)
    kernel_size: int = kernel_setting(5)

    ranking = "layer"
    reads_counts = weighs_values = True
    state_class = DefensiveState

    def observe(self, prompt: PromptView) -> None:
        self.weigh(prompt)
        windows = enumerate(prompt.window_attention(self.window_size))
        peaks = torch.stack([self._peaks_of_head(prompt, head, given) for head, given in windows], dim=1)
        earlier = prompt.remembered("peaks")
        if earlier is not None:  # some queries of the window may be of an earlier turn
            num_new = (prompt.query_positions >= 0).sum(dim=-1, keepdim=True)
            peaks = torch.maximum(peaks, earlier.masked_fill(num_new >= self.window_size, 0))
        prompt.remember("peaks", peaks)

    def weigh(self, view: LayerView) -> None:
        weigh_values(view, normalise=True)

    def _peaks_of_head(self, prompt: PromptView, head: int, attention: torch.Tensor) -> torch.Tensor:
        """
        `(batch, tokens)`: the highest attention that each token before the window gets with its neighbours. Of each
        query, `attention` `(batch, group, queries, tokens)` keeps its sum.
        """
        positions = prompt.positions[:, min(head, prompt.positions.shape[1] - 1)]
        order = positions.argsort(dim=-1)
        is_before = (positions >= 0) & (positions < prompt.length[:, 0] - self.window_size)
        is_before = is_before.gather(-1, order)[:, None]
        peaks = torch.zeros_like(attention[:, 0, 0])
        for given in attention.unbind(dim=1):
            given = given.gather(-1, order[:, None].expand_as(given)).masked_fill(~is_before, 0)
            pooled = functional.avg_pool1d(given, self.kernel_size, stride=1, padding=self.kernel_size // 2)
            pooled = pooled.masked_fill(~is_before, 0)
            tiny = torch.finfo(pooled.dtype).tiny
            pooled *= given.sum(dim=-1, keepdim=True) / pooled.sum(dim=-1, keepdim=True).clamp(min=tiny)
            peaks = torch.maximum(peaks, pooled.amax(dim=1))
        return torch.empty_like(peaks).scatter_(-1, order, peaks)

    def score(self, view: ScoringView) -> torch.Tensor:
        weights, is_recent = weigh_values(view, normalise=True), view.is_recent(self.window_size)
        is_before = (view.is_token & ~is_recent).expand_as(weights)
        scores = torch.maximum(view.remembered("peaks"), view.attention).masked_fill(~is_before, 0)
        means = scores.sum(dim=-1, keepdim=True) / is_before.sum(dim=-1, keepdim=True).clamp(min=1)
        scores = (torch.maximum(scores, means) * weights).clamp(min=torch.finfo(weights.dtype).tiny)
        # The order of both stages by score, in the precision of float32: of equal scores, layers cannot be ranked.
        scores = torch.where(self.first_stage(view, is_before), scores, -1 / scores)
        return scores.masked_fill(is_recent, float("inf"))

    def first_stage(self, view: ScoringView, is_before: torch.Tensor) -> torch.Tensor:
        """
        `(batch, kv_heads, tokens)` bool: of the tokens before the window, which `is_before` marks, those with most
        attention until they have 0.9 of it, less what tokens right before the window have. The budget of a head,
        without its window, bounds their number.
        """
        given = view.attention.masked_fill(~is_before, 0)
        is_near = view.positions >= view.length - 2 * self.window_size
        near_mass = view.mean_over_heads(given.masked_fill(~is_near, 0).sum(dim=-1, keepdim=True))
        newest_first = view.positions.expand_as(given).argsort(dim=-1, descending=True)
        by_attention = given.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
        order = newest_first.gather(-1, by_attention)
        total = given.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
        masses = given.gather(-1, order).cumsum(dim=-1) / total
        num_recent = view.is_token.sum(dim=-1, keepdim=True) - is_before.sum(dim=-1, keepdim=True)
        ranks = torch.arange(given.shape[-1], device=given.device)
        is_chosen = (masses < FIRST_STAGE_MASS - near_mass) & (ranks < view.num_kept - num_recent)
        return torch.empty_like(is_chosen).scatter_(-1, order, is_chosen) & is_before


class DefensiveKVCache(PolicyCache):
    """
    Keeps the tokens that some of the last queries attend to much, weighed by their values behind the output
    projection. The heads of a layer share its budget (DefensiveKV, https://arxiv.org/abs/2510.13334).

    A layer holds `budget` tokens per head on average, and up to `eviction_interval` more in each head: `batch *
    kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 16)` bytes. See `AdaKVCache` for heads of
    different lengths, and `PolicyCache` for the other arguments and the errors.

    Args:
        window_size (`int`, defaults to 32): How many of the last queries choose. As many of the last tokens always
            stay, but no more than half of the budget. Larger values cover a longer question, and leave less room.
        kernel_size (`int`, defaults to 5): Over how many neighbouring tokens attention is averaged. Odd. Larger values
            keep fewer and longer passages; 1 scores each token alone.

    Raises:
        NotImplementedError: At the first forward pass of a model whose output projection is not known, or with learned
            attention sinks (gpt-oss).

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import DefensiveKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = DefensiveKVCache(model.config, budget=16, window_size=4)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> (cache.positions(0) >= 0).sum().item() == 4 * 16
    True

    ```
    """

    default_ranking = "layer"

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        window_size: int = 32,
        kernel_size: int = 5,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = DefensivePolicy(window_size, kernel_size)
        options.setdefault("ranking", self.default_ranking)
        super().__init__(config, budget, policy, **options)


class LayerDefensiveKVCache(DefensiveKVCache):
    """
    `DefensiveKVCache` whose heads of all layers share one budget, so that layers keep what they need
    (Layer-DefensiveKV, https://arxiv.org/abs/2510.13334).

    All layers together hold `budget` tokens per head on average. A prompt stays whole until the last layer has read
    it. See `DefensiveKVCache` for the arguments and the errors.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import LayerDefensiveKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = LayerDefensiveKVCache(model.config, budget=16, window_size=4)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> sum(cache.num_kept_tokens()) <= 2 * 16
    True

    ```
    """

    default_ranking = "model"
