"""
KIVI of Liu et al., 2024: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (https://arxiv.org/abs/2402.02750).

Some channels of keys have large numbers in all tokens, while values have no such channels. KIVI therefore quantises
keys in groups of tokens, each channel by itself, and values in groups of channels, each token by itself. The latest
tokens stay in full precision. Nothing is evicted.

Departure from the paper, which quantises a group of keys as soon as it is full, and each value as it leaves the
residual: both are quantised together, in blocks of `group_size` tokens that have left the residual. So the latest
`residual_length` keys stay in full precision as well.
"""

from numbers import Integral

from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.policy import AllPolicy
from pyramid_cache.engine.policy_cache import PolicyCache
from pyramid_cache.engine.quantization import GROUP_SIZE, RESIDUAL_LENGTH, Quantizer


class KIVICache(PolicyCache):
    """
    Keeps all tokens in 4 or 2 bits (KIVI, https://arxiv.org/abs/2402.02750).

    Of `tokens` tokens `n = (tokens - residual_length) // group_size * group_size` are quantised. A layer holds
    `batch * kv_heads * 2 * head_dim * (n * (nbits / 8 + 4 / group_size) + (tokens - n) * itemsize)` bytes, if values
    have groups of the same size, and 4 more for each token of a row. A later turn restores the tokens of one layer at
    a time. See docs/quantized.md.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        nbits (`int`, defaults to 4): Bits of a number, 4 or 2.
        residual_length (`int`, defaults to 128): How many of the latest tokens stay in full precision, and up to
            `group_size - 1` more. Larger values cost memory and keep recent tokens exact.
        group_size (`int`, defaults to 32): How many tokens of a channel of keys share a scale, a multiple of 8.
            Smaller values cost memory and quantise more finely. For values it is 32 channels, or as many as divide
            both 32 and the width of a head.

    Raises:
        ValueError: For an argument outside its range, or a model that cannot be compressed. At the first forward pass
            for heads whose width is no multiple of 4.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KIVICache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KIVICache(model.config, nbits=4, residual_length=32)
    >>> tokens = model.generate(torch.arange(200)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.num_kept_tokens(), cache.memory()["cpu"]["keys"] < 207 * 2 * 64 * 4 / 2
    ([207, 207], True)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        nbits: int = 4,
        *,
        residual_length: int = RESIDUAL_LENGTH,
        group_size: int = GROUP_SIZE,
    ) -> None:
        if isinstance(nbits, bool) or not isinstance(nbits, Integral) or nbits not in (2, 4):
            raise ValueError(f'`nbits={nbits!r}` must be 4 or 2. Other caches take `quantize="int8"` or "fp8".')
        if read_count("group_size", group_size, least=8) % 8:
            raise ValueError(f"`group_size={group_size}` must be a multiple of 8, such as {GROUP_SIZE}.")
        residual_length = read_count("residual_length", residual_length, least=1)
        quantizer = Quantizer(f"kivi{nbits}", residual_length, channel_group=group_size)
        super().__init__(config, 1.0, AllPolicy(), quantize=quantizer)
        self.settings = {"nbits": nbits, "residual_length": residual_length, "group_size": group_size}
