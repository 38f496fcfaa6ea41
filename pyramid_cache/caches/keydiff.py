"""
KeyDiff of Park et al., 2025 (https://arxiv.org/abs/2504.15364).

Keys that point in unusual directions tend to get much attention, so that no query is needed to find them. The mean of
a head's normalised keys stands for all its keys. Each KV head keeps the tokens whose keys have the lowest cosine
similarity with that mean. Attention weights are never needed.

Departure from the paper, which scores each block of 128 prompt tokens against what it kept of earlier blocks: a prompt
is scored as a whole. `prefill_chunk_size=128` of `generate` reads it in blocks.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class KeyDiffPolicy(Policy):
    """A token scores higher the more its key differs in direction from the mean of all keys."""

    def score(self, view: ScoringView) -> torch.Tensor:
        directions = functional.normalize(view.key.float(), dim=-1)
        directions = directions.masked_fill(~view.is_token[..., None], 0)
        mean_direction = directions.sum(dim=2, keepdim=True)  # (batch, kv_heads, 1, head_dim), of any length
        return -functional.cosine_similarity(directions, mean_direction, dim=-1)


class KeyDiffCache(PolicyCache):
    """
    Keeps, per KV head, the tokens whose keys are most unlike the others (KeyDiff, https://arxiv.org/abs/2504.15364).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 4)` bytes. The model's own attention runs, and its weights are not read.
    See `PolicyCache` for the arguments and the errors.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KeyDiffCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KeyDiffCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [23, 23])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        **options: Unpack[EvictionOptions],
    ) -> None:
        super().__init__(config, budget, KeyDiffPolicy(), **options)
