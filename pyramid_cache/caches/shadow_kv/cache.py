"""
ShadowKV of Sun et al., 2024 (https://arxiv.org/abs/2410.21465).

Nothing is evicted. Before RoPE, the keys of a layer have low rank: their factors stay on the device, and values move
to the host. Each chunk of tokens has a landmark: the mean of its keys and how far they spread around it. A step
attends to the chunks whose landmarks score highest: it rebuilds their keys and fetches their values. The latest tokens
and the outliers, the chunks that their mean represents worst, stay exact on the device.

Departures from the authors' code: the basis comes from an eigendecomposition of the keys' Gram matrix, and is fitted
again when later turns bring tokens. Generated tokens move to the shadow as prompt tokens do; theirs has room for 57 to
128 of them, and silently loses the rest. Later turns attend to everything, with keys rebuilt and values fetched for
one layer at a time; theirs treats up to 4,096 tokens as one decode step. Rows of a batch may have different lengths.
Their landmarks are means, which hide a single key that is unlike the others of its chunk. The spread beside the mean
shows it, as the bounds of Quest do (https://arxiv.org/abs/2406.10774), and takes less room.
"""

import os
from dataclasses import asdict, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.caches.shadow_kv.host import read_host
from pyramid_cache.caches.shadow_kv.layer import ShadowKVLayer
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.engine.architectures import refuse_unsupported_rope
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.tokens import MaskReader


class ShadowKVCache(CompressedCache):
    """
    Evicts nothing: keys of low rank stay on the device, values go to the host, and each step attends to a few chunks
    of both (ShadowKV, https://arxiv.org/abs/2410.21465). The prompt is read with full attention.

    Per row, a layer holds these bytes on the device (the paper's section 3.2, and the buffer that it leaves out):
    - factors: `tokens * rank * itemsize`;
    - basis: `kv_heads * rank * head_dim * itemsize`;
    - landmarks: `tokens / chunk_size * kv_heads * ((head_dim + num_spread_bands) * itemsize + 1)`;
    - slots, to which a step attends: `slots * kv_heads * (2 * head_dim * itemsize + 4)`, with `slots =
      num_outlier_chunks * chunk_size + budget + num_local_tokens + offload_interval + chunk_size`.

    On the host it holds `tokens * kv_heads * head_dim * itemsize` bytes. `cache.memory()` lists the host apart. Later
    turns attend to everything: keys are rebuilt and values fetched for one layer at a time, which takes that layer's
    full memory. `num_kept_tokens` and `positions` describe what a step attends to. While a compiled `generate` runs,
    factors, landmarks and values have room for the longest answer that it may give.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        budget (`int` or `float`, defaults to 2048): Tokens that a step attends to beside outliers and the latest
            tokens, or their share of the prompt. Larger values miss less and take more time. A prompt that fits into
            the slots is kept as it is, and the cache is `DynamicCache` bit for bit.
        rank (`int` or `float`, defaults to 160): Dimensions of keys before RoPE, over all heads of a layer, or the
            share of their sum of squares that is kept (0.99 is coarse, 0.999 fine), with a rank for each layer. Larger
            values rebuild keys more exactly and take more memory, up to all dimensions, `kv_heads * head_dim`.
        chunk_size (`int`, defaults to 8): Tokens that one landmark stands for. Larger values save memory and choose
            more coarsely.
        num_outlier_chunks (`int`, defaults to 48): Chunks of each KV head that stay exact: those that their mean
            represents worst.
        num_spread_bands (`int`, defaults to 4): Bands into which the dimensions of a head are cut, at most half as
            many as it has dimensions. A landmark has one spread per band. With 0 it is the mean alone, as in the
            paper, and steps miss single keys that are unlike their neighbours.
        num_local_tokens (`int`, defaults to 32): How many of the latest tokens stay exact at least.
        offload_interval (`int`, defaults to 32): Generated tokens that arrive before chunks of them go to the host.
        quantize (`str`, *optional*): "int8" or "fp8" stores factors and landmarks in one byte a number.
        host (`str`, defaults to `"memory"`): Where values go. `"disk:PATH"` maps unnamed files in that folder, which
            must exist, for contexts that exceed the host's memory. The files vanish with the cache.
        host_budget (`int` or `str`, *optional*): Bytes that values of all layers may take there, such as "16GiB". What
            exceeds it is refused before anything is allocated.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed; at run time, for values
            that exceed `host_budget`.
        NotImplementedError: For a model whose rotary embedding depends on the length (dynamic NTK) or has several
            axes, at the first forward pass where the config does not tell. For gradients, once values are on the host.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import ShadowKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = ShadowKVCache(model.config, budget=64, rank=16, num_outlier_chunks=4)
    >>> tokens = model.generate(torch.arange(2000)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (2007, [135, 135])
    >>> memory, full = cache.memory(), 2007 * 2 * 2 * 64 * 4  # layers, keys and values, width, bytes
    >>> sum(memory["cpu"].values()) / full < 0.3, memory["host"]["values"] / full < 0.5
    (True, True)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: int | float = 2048,
        *,
        rank: int | float = 160,
        chunk_size: int = 8,
        num_outlier_chunks: int = 48,
        num_spread_bands: int = 4,
        num_local_tokens: int = 32,
        offload_interval: int = 32,
        quantize: str | None = None,
        host: str = "memory",
        host_budget: int | str | None = None,
    ) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        refuse_unsupported_rope(config)
        sizes = (budget, rank, chunk_size, num_outlier_chunks, num_spread_bands, num_local_tokens, offload_interval)
        settings = ShadowSettings(*sizes, quantize, host, host_budget)
        host_place = read_host(host, host_budget)

        def build_layer(place: LayerPlace, masks: MaskReader) -> ShadowKVLayer:
            layer_host = replace(host_place, num_layers=place.num_layers)
            return ShadowKVLayer(place, masks, settings, layer_host)

        super().__init__(config, build_layer, asdict(settings))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | PreTrainedModel,
        *,
        device: torch.device | str | int | None = None,
        host: str | None = None,
        host_budget: int | str | None = None,
    ) -> "ShadowKVCache":
        """
        Reads a cache that `save` wrote. See `CompressedCache.load` for the other arguments and the errors.

        Args:
            host (`str`, *optional*): Where values go, if not where the saved cache had them.
            host_budget (`int` or `str`, *optional*): Bytes they may take there. A `host` that is given comes with its
                own budget, or none.
        """
        if host is not None:
            return cls._load(path, config, device, host=host, host_budget=host_budget)
        return cls._load(path, config, device, **({} if host_budget is None else {"host_budget": host_budget}))
