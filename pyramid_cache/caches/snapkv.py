"""
SnapKV of Li et al., 2024 (https://arxiv.org/abs/2404.14469).

An answer attends to what the last queries of the prompt attend to. Each KV head keeps this observation window, and the
tokens to which the window attends most. Scores are averaged over neighbouring tokens first, so that a fact stays
whole.

Departures from the authors' code: scores are averaged over the query heads of a KV head, which then stores each token
once (theirs selects for each query head). The tokens of the window count as part of the budget. Generated tokens,
which theirs keeps for ever, are scored too: each query takes over its share of the window. So memory is bounded.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.policy import Policy, ScoringView, kernel_setting, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class SnapKVPolicy(Policy):
    """A token's score is the attention of the last queries to it and its neighbours. See `SnapKVCache`."""

    window_size: int = setting(64, read_count, 1)
    kernel_size: int = kernel_setting(5)

    def score(self, view: ScoringView) -> torch.Tensor:
        is_recent = view.is_recent(self.window_size)
        # The window looks at itself most: its neighbours would be kept for that alone.
        scores = view.attention.masked_fill(is_recent, 0)
        return view.pool(scores, self.kernel_size).masked_fill(is_recent, float("inf"))


class SnapKVCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that the last queries attend to, with their neighbours
    (SnapKV, https://arxiv.org/abs/2404.14469).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 8)` bytes. See `PolicyCache` for the other arguments and the errors.

    Args:
        window_size (`int`, defaults to 64): How many of the last queries choose. As many of the last tokens always
            stay, but no more than half of the budget. Larger values cover a longer question, and leave less room.
        kernel_size (`int`, defaults to 5): Over how many neighbouring tokens scores are averaged. Odd. Larger values
            keep fewer and longer passages; 1 scores each token alone.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import SnapKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = SnapKVCache(model.config, budget=16, window_size=8)
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
        window_size: int = 64,
        kernel_size: int = 5,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = SnapKVPolicy(window_size, kernel_size)
        super().__init__(config, budget, policy, **options)
