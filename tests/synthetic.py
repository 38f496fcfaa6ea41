"""Attention layers without weights, which drive a cache with queries, keys and values from outside."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.rope import Finding, findings


def attend_like_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal and bottom-right aligned, with a `(batch, keys)` mask at most; `(batch, queries, heads, head_dim)`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], num_keys)
        allowed = allowed & attention_mask[:, None, None].bool()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    # Queries of padding see nothing; flash-attention leaves them out and fills in zeros.
    return output.nan_to_num().transpose(1, 2).contiguous(), None


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
        width = config.num_attention_heads * config.head_dim
        self.o_proj = torch.nn.Linear(width, width)
        findings[self] = Finding(None)  # no forward runs that could be probed, and keys are not rotated


class SyntheticModel:
    """
    The attention layers of a model with `group` query heads for each KV head. They use one of `ATTENTION_FUNCTIONS`,
    and are built from the config and their index.
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
        """
        The mask that transformers hands to the layers of this model. `is_token` `(batch, seen)` is False for padding;
        its last `num_queries` columns are those of the queries. An explicit mask is there even if it is not needed.
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
        """
        One layer of a forward pass: the cache takes the new tokens in, then attends. Queries, keys and values are
        `(batch, heads, num_queries, head_dim)`, the mask as `mask` gives it, and the output
        `(batch, num_queries, heads, head_dim)`.
        """
        keys, values = cache.update(key, value, layer_idx)
        function, module = ATTENTION_FUNCTIONS[self.attention], self.layers[layer_idx]
        arguments = {"scaling": self.scaling, "dropout": 0.0, **kwargs}
        return keys.cache_layer.attend(AttentionCall(function, module, query, keys, values, mask, arguments))[0]
