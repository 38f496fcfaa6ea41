"""
Knorm of Devoto et al., 2024: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression
(https://arxiv.org/abs/2406.11430).

Later queries tend to attend to keys of low L2 norm. Each KV head therefore keeps the tokens whose keys have the lowest
norm. A norm is known when a token arrives and never changes, so that attention weights are never needed.

Departure from the paper, which leaves out the first two layers in its experiments: all layers are compressed, so that
the cache holds its budget.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class KnormPolicy(Policy):
    """A token scores higher the lower the norm of its key."""

    def score(self, view: ScoringView) -> torch.Tensor:
        # Steps of 0.02 %: in the first layer a token has the same norm wherever it stands, but for rounding, and which
        # of these equals goes must not hang on that.
        return -(torch.linalg.vector_norm(view.key.float(), dim=-1).log2() * 4096).round()


class KnormCache(PolicyCache):
    """
    Keeps, per KV head, the tokens whose keys have the lowest L2 norm (https://arxiv.org/abs/2406.11430).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 4)` bytes. The model's own attention runs, and its weights are not read.
    See `PolicyCache` for the arguments and the errors.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KnormCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KnormCache(model.config, budget=16)
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
        super().__init__(config, budget, KnormPolicy(), **options)
