"""
PyramidKV of Cai et al., 2024 (https://arxiv.org/abs/2406.02069).

Attention is spread over the whole context in the first layers and narrows to few tokens in the last ones. Layers
therefore share the budget unevenly. Their numbers of tokens beside the observation window fall along a line, from `2 *
mean - mean / beta` to `mean / beta`. Each layer chooses its tokens as SnapKV does.

Departures from the authors' code: the window counts as part of the budget, and the layers together keep exactly
`budget` times their number. Where a prompt is shorter than a layer's share, the other layers get the rest in
proportion (theirs makes the line flatter). Each layer keeps at least as many other tokens as its window has, if the
budget allows it in all layers. Else all layers keep the same. The departures of `SnapKVCache` apply too.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.budget import MAX_TOKENS, Budget, linear_decay, pyramid_schedule, read_number
from pyramid_cache.engine.policy import setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache


@dataclass(frozen=True)
class PyramidKVPolicy(SnapKVPolicy):
    """SnapKV's scores, with fewer tokens the deeper the layer. See `PyramidKVCache` for the fields."""

    beta: float = setting(2.0, read_number, f"[1, {MAX_TOKENS}]")

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        mean = budget.num_tokens(prompt_length)
        if mean >= prompt_length:  # which may grow up to it
            return mean
        window_size = min(self.window_size, mean // 2)
        total = num_layers * (mean - window_size)
        line = tuple(linear_decay(num_layers, 1 / (2 * self.beta - 1)))
        least = max(min(self.window_size, mean - window_size), 1)
        return window_size + pyramid_schedule(prompt_length - window_size, total, line, minimum=least)[depth]


class PyramidKVCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that the last queries attend to, with their neighbours: many
    in the first layers, few in the last (PyramidKV, https://arxiv.org/abs/2406.02069).

    The layers hold `budget` tokens on average, and each up to `eviction_interval` more: `layers * batch
    * kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes together. See `SnapKVCache` for
    the other arguments, and `PolicyCache` for the errors.

    Args:
        beta (`float`, defaults to 2.0): Beside the window, the last layer keeps the layers' average divided by `beta`,
            but not less than `window_size`, if the average allows it. Larger values make the pyramid steeper (20.0 in
            the authors' code). With 1 all layers keep the same.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import PyramidKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
    >>> cache = PyramidKVCache(model.config, budget=24, window_size=4)
    >>> tokens = model.generate(torch.arange(70)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.compress()
    >>> cache.num_kept_tokens()
    [34, 24, 14]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        window_size: int = 64,
        kernel_size: int = 5,
        beta: float = 2.0,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = PyramidKVPolicy(window_size, kernel_size, beta)
        super().__init__(config, budget, policy, **options)
