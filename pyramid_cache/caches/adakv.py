"""
Ada-KV of Feng et al., 2024 (https://arxiv.org/abs/2407.11550).

Some heads of a layer attend to a few tokens, others to many. With equal shares, the first kind has too much and the
second too little. Here the heads of a layer compete: the tokens with the highest scores stay, whichever head scored
them (paper, Algorithm 1). A floor leaves every head some tokens. The scores are those of SnapKV, so that this is the
paper's Ada-SnapKV.

Departures from the authors' code: heads are stored without padding. The heads compete again whenever generated tokens
are evicted. With grouped-query attention, KV heads compete.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.budget import read_number
from pyramid_cache.engine.policy import setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class AdaKVPolicy(SnapKVPolicy):
    """SnapKV's scores, for heads that compete. See `AdaKVCache` for the fields."""

    floor_ratio: float = setting(0.2, read_number, "[0, 1]")

    ranking = "layer"


class AdaKVCache(PolicyCache):
    """
    Keeps the tokens that the last queries attend to most. The heads of a layer share its budget, so that heads which
    attend to many tokens keep more than others (Ada-KV, https://arxiv.org/abs/2407.11550).

    A layer holds `budget` tokens per head on average, and up to `eviction_interval` more in each head. It stores them
    without padding: `batch * kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes. While an
    answer grows, rows shorter than the longest may take up to `eviction_interval` slots more.
    `cache.positions(layer_idx)` shows what each head holds. `cache.num_kept_tokens()` gives the mean over heads. On a
    GPU, each eviction waits for the device. See `SnapKVCache` and `PolicyCache` for the other arguments and errors.

    Args:
        floor_ratio (`float`, defaults to 0.2): The share of the average that every head keeps of its own best tokens.
            Smaller values let heads differ more: with 0 they compete for everything. 1 is SnapKV.

    Raises:
        NotImplementedError: At the first forward pass of a model with learned attention sinks (gpt-oss).

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import AdaKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = AdaKVCache(model.config, budget=16, window_size=8)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> held_by_head = (cache.positions(0) >= 0).sum(dim=-1)
    >>> held_by_head.shape, held_by_head.sum().item() == 4 * 16
    (torch.Size([1, 4]), True)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        floor_ratio: float = 0.2,
        window_size: int = 64,
        kernel_size: int = 5,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = AdaKVPolicy(window_size, kernel_size, floor_ratio)
        super().__init__(config, budget, policy, **options)
