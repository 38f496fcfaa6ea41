"""
KeyDiff of Park et al., 2025 (https://arxiv.org/abs/2504.15364).

Keys that point another way than most are those that get much attention: no query has to be seen to tell them. The mean
of a head's normalised keys stands for all of them, and each KV head keeps the tokens whose keys have the lowest cosine
similarity with it. Attention weights are never needed.

Departure from the paper, which scores each block of 128 tokens of a prompt against what was kept of the earlier ones:
a prompt is scored as a whole (`prefill_chunk_size=128` of `generate` reads it in blocks).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import DEFAULT_EVICTION_INTERVAL, PolicyCache


@dataclass(frozen=True)
class KeyDiffPolicy(Policy):
    """A token is worth as much as its key differs in direction from the mean of all."""

    def score(self, view: ScoringView) -> torch.Tensor:
        directions = functional.normalize(view.key.float(), dim=-1)
        directions = directions.masked_fill(~view.is_token[..., None], 0)
        mean_direction = directions.sum(dim=2, keepdim=True)  # (batch, kv_heads, 1, head_dim), of any length
        return -functional.cosine_similarity(directions, mean_direction, dim=-1)


class KeyDiffCache(PolicyCache):
    """
    Keeps, per KV head, the tokens whose keys are most unlike the others (KeyDiff, https://arxiv.org/abs/2504.15364).

    A layer holds `budget` tokens and up to `eviction_interval` more, however much is generated: `batch * kv_heads *
    (budget + eviction_interval) * (2 * head_dim * itemsize + 4)` bytes. The prompt is read with full attention, so the
    first new token is exact. Attention runs as the model's own, without a look at its weights.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model, whose config is taken.
        budget (`float`, `int` or `str`): What each layer keeps: a fraction of the prompt (of everything seen, when a
            later turn brings several tokens at once), a number of tokens, or bytes for the layers that evict such as
            "256MiB". 1.0 never evicts.
        eviction_interval (`int`, defaults to 32): Generated tokens that come in before as many go. Larger values take
            more memory and less time.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KeyDiffCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = KeyDiffCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.compress()
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [16, 16])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
    ) -> None:
        super().__init__(config, budget, KeyDiffPolicy(), eviction_interval=eviction_interval)
