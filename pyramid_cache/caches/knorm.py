"""
Knorm of Devoto et al., 2024: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression
(https://arxiv.org/abs/2406.11430).

Keys of low L2 norm tend to be those that later queries attend to much. Each KV head therefore keeps the tokens whose
keys have the lowest norm. A norm is known when a token comes in and never changes: attention weights are never needed.

Departure from the paper, which compresses all layers but the first two in its experiments: all layers are compressed,
so that the budget is what is held.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import DEFAULT_EVICTION_INTERVAL, PolicyCache


@dataclass(frozen=True)
class KnormPolicy(Policy):
    """A token is worth more the lower the norm of its key."""

    def score(self, view: ScoringView) -> torch.Tensor:
        # Steps of 0.02 %: in the first layer a token has the same norm wherever it stands, but for rounding, and which
        # of these equals goes must not hang on that.
        return -(torch.linalg.vector_norm(view.key.float(), dim=-1).log2() * 4096).round()


class KnormCache(PolicyCache):
    """
    Keeps, per KV head, the tokens whose keys have the lowest L2 norm (https://arxiv.org/abs/2406.11430).

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
    >>> from pyramid_cache import KnormCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = KnormCache(model.config, budget=16)
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
        super().__init__(config, budget, KnormPolicy(), eviction_interval=eviction_interval)
