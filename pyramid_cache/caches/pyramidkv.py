"""
PyramidKV of Cai et al., 2024 (https://arxiv.org/abs/2406.02069).

Attention is spread over the whole context in the first layers and funnels into few tokens in the last ones. Layers
therefore share the budget unevenly: their numbers of tokens beside the observation window fall along a line, from
`2 * mean - mean / beta` to `mean / beta`. Which tokens these are is told as by SnapKV.

Departures from the authors' code: the window counts as part of the budget, and the layers together keep exactly
`budget` times their number. What a layer cannot take, for the prompt is no longer, goes to the others in proportion;
theirs makes the line flatter. Beside the window each layer keeps at least as many other tokens, as long as the budget
pays for that in all layers; below, all layers keep the same. The departures of `SnapKVCache` are these too.

Their `beta` is 20, for models of 7 billion parameters and more. In SmolLM2-135M-Instruct the last layers need more
than that: of eight numbers hidden in 1,024 tokens, a budget of 0.25 finds a log-likelihood per token of -1.17 with 20
and -1.02 with 2, which is the default, the question in view, and of -2.02 and -1.94 if it is asked later (24
questions).
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.budget import MAX_TOKENS, Budget, is_number, linear_decay, pyramid_schedule
from pyramid_cache.engine.policy_cache import DEFAULT_EVICTION_INTERVAL, PolicyCache


@dataclass(frozen=True)
class PyramidKVPolicy(SnapKVPolicy):
    """SnapKV's scores, and fewer tokens the deeper the layer. See `PyramidKVCache` for the fields."""

    beta: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.beta) or not 1 <= self.beta <= MAX_TOKENS:
            raise ValueError(
                f"`beta={self.beta!r}` must be a number of at least 1, where all layers keep the same, and at most "
                f"{MAX_TOKENS:,}."
            )
        object.__setattr__(self, "beta", float(self.beta))

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
    Keeps, per KV head, the tokens that the last queries attend to, with their neighbours, and the most recent ones:
    many in the first layers, few in the last (PyramidKV, https://arxiv.org/abs/2406.02069).

    The layers hold `budget` tokens on average and each up to `eviction_interval` more, however much is generated:
    `layers * batch * kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes together. The
    prompt is read with full attention, so the first new token is exact.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model, whose config is taken.
        budget (`float`, `int` or `str`): What the layers keep on average: a fraction of the prompt (of everything
            seen, when a later turn brings several tokens at once), a number of tokens, or bytes for the layers that
            evict such as "256MiB". 1.0 never evicts.
        window_size (`int`, defaults to 64): How many of the last queries choose, and how many of the last tokens are
            kept for certain (but no more than half of what a layer keeps). Larger values see more of a long question,
            and leave less room for the rest.
        kernel_size (`int`, defaults to 5): Odd: over how many neighbouring tokens scores are averaged. Larger values
            keep longer passages, and fewer of them; 1 scores each token alone.
        beta (`float`, defaults to 2.0): Beside the window, the last layer keeps what layers keep on average divided by
            this, but no less than `window_size` if that is the average or less. Larger values make the pyramid steeper
            (20.0 in the authors' code); with 1 all layers keep the same.
        eviction_interval (`int`, defaults to 32): Generated tokens that come in before as many go. Larger values take
            more memory and less time.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import PyramidKVCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
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
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
    ) -> None:
        policy = PyramidKVPolicy(window_size=window_size, kernel_size=kernel_size, beta=beta)
        super().__init__(config, budget, policy, eviction_interval=eviction_interval)
