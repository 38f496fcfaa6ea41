"""
The seam to transformers: the only file that wraps what belongs to it.

A `Cache` never sees a query. The attention function that a model calls right after `update` sees it. Every model asks
`AttentionInterface.get_interface` for that function in each forward pass. The first cache that is built wraps this one
method. A call whose key tensor carries the attribute `cache_layer` goes to the `attend` of that layer, together with
the function that would have run. All other calls go straight to the original function. The models' own eager functions
pass through the same method, so eager is served like sdpa and flash-attention.

`generate` is wrapped as well, to notice a model that does not use the cache that it was given (`generation.py`).
Nothing here refers to a cache.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyramid_cache.engine.generation import generate, generate_batch, may_compile, update_model_kwargs


try:
    from transformers.utils import output_capturing
except ImportError:  # where transformers has moved it, outputs that do not fit go unnoticed
    output_capturing = None


# The methods that are wrapped, as they were: by class and name.
_originals: dict[tuple[type, str], Any] = {}
_lock = threading.Lock()


def is_asked_for(name: str) -> bool:
    """Whether the running forward pass collects "attentions" or "hidden_states": attention functions are not told."""
    collector = None if output_capturing is None else output_capturing._active_collector.get()
    return collector is not None and name in collector


@contextlib.contextmanager
def without_collectors() -> Iterator[None]:
    """A forward pass within another one, whose attentions and hidden states are not the user's."""
    if output_capturing is None:
        yield
        return
    token = output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)


@dataclass(frozen=True)
class AttentionCall:
    """A call that a model makes to its attention function."""

    function: Callable  # the attention function that would run
    module: Any  # the attention layer that calls it
    query: torch.Tensor  # (batch, heads, num_queries, head_dim)
    key: torch.Tensor  # (batch, kv_heads, num_keys, head_dim)
    value: torch.Tensor  # (batch, kv_heads, num_keys, value_dim)
    mask: torch.Tensor | None  # in the form that `function` takes
    kwargs: dict[str, Any]  # whatever else the model passes
    # (batch, heads, num_queries) float32: the log-sum-exps of the queries over these keys, if they are known
    lse: torch.Tensor | None = None
    # (batch, kv_heads, num_keys) float32, which is added to the logits of each key, where slots stand for more tokens
    bias: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output `(batch, num_queries, heads, value_dim)`, and attention weights where the function gives them."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.kwargs)

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]

    @property
    def logit_arguments(self) -> dict[str, Any]:
        """The arguments of the call that decide its logits, by the names that the ops give them."""
        given = self.kwargs
        scaling, softcap, sink_logits = (  # without `get`, which a step would call for each
            given["scaling"] if "scaling" in given else None,
            given["softcap"] if "softcap" in given else None,
            given["s_aux"] if "s_aux" in given else None,
        )
        return {
            "scaling": scaling or self.query.shape[-1] ** -0.5,
            # transformers' sdpa leaves the cap out (before 5.18) or refuses it.
            "softcap": None if self.function is sdpa_attention_forward else softcap,
            "sink_logits": sink_logits,
        }


def install() -> None:
    """Wraps methods of transformers; nothing happens if they are wrapped already."""
    with _lock:
        if not _originals:
            _wrap()


def _wrap() -> None:
    for owner, name, replacement in (
        (AttentionInterface, "get_interface", _get_interface),
        (GenerationMixin, "generate", generate),
        (GenerationMixin, "generate_batch", generate_batch),
        (GenerationMixin, "_valid_auto_compile_criteria", may_compile),
        (GenerationMixin, "_update_model_kwargs_for_generation", update_model_kwargs),
    ):
        original = getattr(owner, name)
        # A method that is inherited is removed again.
        _originals[owner, name] = vars(owner).get(name)
        setattr(owner, name, _wrapped(original, replacement))


def uninstall() -> None:
    """Puts the original methods back. The next cache that is built installs the wraps again."""
    while _originals:
        (owner, name), original = _originals.popitem()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _wrapped(original: Callable, replacement: Callable) -> Callable:
    """A method that calls `replacement` with the original method in front of its arguments."""

    @functools.wraps(original)
    def method(*args, **kwargs) -> Any:
        return replacement(original, *args, **kwargs)

    return method


def _get_interface(original: Callable, self: AttentionInterface, *args, **kwargs) -> Callable:
    return functools.partial(_dispatch, original(self, *args, **kwargs))


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
    if args:
        raise NotImplementedError(
            f"{type(module).__name__} passes more to its attention function by position than transformers' own models "
            "do. Use DynamicCache for it."
        )
    return layer.attend(AttentionCall(attention, module, query, key, value, attention_mask, kwargs))
