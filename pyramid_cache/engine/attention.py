"""
The seam to transformers: the only file that touches its attention registry.

A `Cache` never sees a query. The attention function that a model calls right after `update` does, and every model asks
`AttentionInterface.get_interface` for it at each forward. That one method is wrapped when the first cache is built: a
key tensor that carries the attribute `cache_layer` is handed, with the function that would have run, to that layer's
`attend`; all other calls go straight to the original function. The models' own eager functions pass through the same
method, so eager is served like sdpa and flash-attention. Nothing here refers to a cache.
"""

import functools
from collections.abc import Callable

import torch
from transformers import AttentionInterface


_original_get_interface: Callable | None = None


def install() -> None:
    """Wraps `AttentionInterface.get_interface`; nothing happens if it is wrapped already."""
    global _original_get_interface
    if _original_get_interface is not None:
        return
    _original_get_interface = original = AttentionInterface.get_interface

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, *args, **kwargs) -> Callable:
        return functools.partial(_dispatch, original(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface


def uninstall() -> None:
    """Puts the original method back. The next cache that is built installs the wrap again."""
    global _original_get_interface
    if _original_get_interface is not None:
        AttentionInterface.get_interface = _original_get_interface
        _original_get_interface = None


def _dispatch(
    attention: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = getattr(key, "cache_layer", None)
    if layer is None:
        return attention(module, query, key, value, attention_mask, *args, **kwargs)
    return layer.attend(
        functools.partial(attention, module), module, query, key, value, attention_mask, *args, **kwargs
    )
