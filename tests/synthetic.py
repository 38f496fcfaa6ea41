"""Attention layers without weights, which drive a cache as a model does, with queries, keys and values from outside.

Nothing in this file turns keys by their positions, and no name in it may say so: caches look through the file of an
attention layer for that.
"""

from collections.abc import Callable
from typing import Any

import torch
from test_flash_masks import attend_like_flash
from transformers import Cache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from pyramid_cache.engine.attention import AttentionCall


ATTENTION_FUNCTIONS: dict[str, Callable] = {
    "sdpa": sdpa_attention_forward,
    "eager": eager_attention_forward,
    "flash_on_cpu": attend_like_flash,
}


class BareAttention(torch.nn.Module):
    """What attention functions and caches ask of an attention layer."""

    is_causal = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


class SyntheticModel:
    """The attention layers of a model.

    Args:
        num_layers: How many.
        kv_heads: KV heads of each.
        group: Query heads for each KV head.
        head_dim: Width of keys and values.
        attention: The attention function, one of `ATTENTION_FUNCTIONS`.
        attention_class: Built for each layer from the config and the layer's index.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        attention: str = "sdpa",
        attention_class: Callable[[LlamaConfig, int], torch.nn.Module] = BareAttention,
    ) -> None:
        self.config = LlamaConfig(
            num_hidden_layers=num_layers,
            num_key_value_heads=kv_heads,
            num_attention_heads=kv_heads * group,
            head_dim=head_dim,
            hidden_size=kv_heads * group * head_dim,
            intermediate_size=8,
            vocab_size=8,
        )
        self.config._attn_implementation = attention
        self.attention = attention
        self.scaling = head_dim**-0.5
        self.layers = [attention_class(self.config, index).eval() for index in range(num_layers)]

    def mask(self, is_token: torch.Tensor, num_queries: int, is_explicit: bool) -> torch.Tensor | None:
        """The mask that transformers hands to the layers of this model.

        Args:
            is_token: `(batch, seen)` bool, False for padding; the last `num_queries` columns are those of the queries.
            num_queries: Columns of this forward pass.
            is_explicit: Whether there is a mask even where the attention function needs none.
        """
        num_seen = is_token.shape[1]
        is_needed = is_explicit or not bool(is_token.all())
        if self.attention == "flash_on_cpu":
            return is_token.long() if is_needed else None
        if self.attention == "sdpa" and not is_needed and num_queries in (1, num_seen):
            return None
        causal = torch.ones(num_queries, num_seen, dtype=torch.bool).tril(num_seen - num_queries)
        allowed = causal & is_token[:, None, None]  # (batch, 1, num_queries, num_seen)
        if self.attention == "sdpa":
            return allowed
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def run_layer(
        self,
        cache: Cache,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer of a forward pass: the cache takes the new tokens in, then attends.

        Args:
            cache: The cache.
            layer_idx: Which layer.
            query: `(batch, heads, num_queries, head_dim)`.
            key: `(batch, kv_heads, num_queries, head_dim)`.
            value: `(batch, kv_heads, num_queries, head_dim)`.
            mask: As `mask` gives it, the same tensor for all layers.
            kwargs: What else a model passes to its attention function.

        Returns:
            `(batch, num_queries, heads, head_dim)`.
        """
        keys, values = cache.update(key, value, layer_idx)
        function, module = ATTENTION_FUNCTIONS[self.attention], self.layers[layer_idx]
        arguments = {"scaling": self.scaling, "dropout": 0.0, **kwargs}
        return keys.cache_layer.attend(AttentionCall(function, module, query, keys, values, mask, arguments))[0]
