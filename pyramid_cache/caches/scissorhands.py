"""
Scissorhands of Liu et al., 2023 (https://arxiv.org/abs/2305.17118).

Tokens that mattered once will matter again. A query that sees `t` keys gives each `1 / t` of its attention on average.
A key that gets less is of little importance to it. Each key counts to how many of the last queries it was of little
importance. The keys with the highest counts are evicted, the latest tokens never.

Departures from the paper: generated tokens wait for an eviction, `eviction_interval` of them (theirs drops half of the
cache when the budget is full). A generated query takes over its share of the window, instead of the oldest query's
place. With grouped-query attention the mean probability over the query heads of a KV head counts. `t` is how many keys
the KV head holds, which have all of the attention.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.policy import Policy, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class ScissorhandsPolicy(Policy):
    """A token's score is the share of the last queries to which it was important. See `ScissorhandsCache`."""

    window_size: int = setting(400, read_count, 1)
    num_recent: int = setting(10, read_count, 1)

    def measure(self, probabilities: torch.Tensor, num_visible: int | torch.Tensor) -> torch.Tensor:
        return (probabilities * num_visible >= 1).float()

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.attention.masked_fill(view.is_recent(self.num_recent), float("inf"))

    @property
    def score_label(self) -> str:
        return f"importance to the last {self.window_size} queries (share of them)"


class ScissorhandsCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that got at least the average attention from most of the last
    queries (Scissorhands, https://arxiv.org/abs/2305.17118).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 8)` bytes. See `PolicyCache` for the other arguments and the errors.

    Args:
        window_size (`int`, defaults to 400): How many of the last queries count. Larger values ask more of the prompt,
            and let generated tokens matter less. Of a prompt, their attention is computed a second time.
        num_recent (`int`, defaults to 10): How many of the last tokens always stay, but no more than half of the
            budget. Larger values leave less room for what is important.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import ScissorhandsCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = ScissorhandsCache(model.config, budget=16)
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
        window_size: int = 400,
        num_recent: int = 10,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = ScissorhandsPolicy(window_size, num_recent)
        super().__init__(config, budget, policy, **options)
