"""
What `generate` must do with a cache that it is given: use it. Some models set it to None and go on with a new one.

`attention.py` puts these functions in the place of methods of `GenerationMixin`. Each gets the original method first.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT


@dataclass
class GivenCache:
    """A cache of ours that `generate` was given."""

    cache: Any
    # Whether `generate` compiles decode steps, once it has asked.
    compiles: bool | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None


# That of the innermost running `generate`.
_given: ContextVar[GivenCache | None] = ContextVar("given", default=None)


def generate(original: Callable, model: PreTrainedModel, *args, **kwargs) -> Any:
    """`GenerationMixin.generate`, which remembers the cache that it is given while it runs."""
    cache = given_cache(kwargs)
    compressed: Any = getattr(cache, "self_attention_cache", cache)
    token = _given.set(None if cache is None else GivenCache(cache))
    try:
        if cache is not None:
            compressed.release()
        return original(model, *args, **kwargs)
    finally:
        _given.reset(token)
        if cache is not None and compressed.is_counted:  # else its next use says that a step broke off
            compressed.release()


def may_compile(original: Callable, model: PreTrainedModel, model_kwargs: dict[str, Any], config: Any) -> bool:
    """`_valid_auto_compile_criteria`, by which `generate` decides before it reads the prompt."""
    given, cache = _given.get(), given_cache(model_kwargs)
    if given is None or cache is not given.cache:
        return original(model, model_kwargs, config)
    if given.compiles is not None:  # it asks again before it reads chunks of the prompt
        return False
    is_plain = config.num_beams == 1 and not config.output_attentions
    is_plain = is_plain and not modes_of(model.device.type)[2] and getattr(model, "_tp_size", None) in (None, 1)
    cache.offers_to_compile = is_plain and getattr(cache, "can_compile", False)
    given.compiles = original(model, model_kwargs, config)
    given.max_length, given.max_new_tokens = config.max_length, config.max_new_tokens
    cache.offers_to_compile = False
    return given.compiles


def generate_batch(original: Callable, model: PreTrainedModel, *args, **kwargs) -> Any:
    """`GenerationMixin.generate_batch`, to which `generate(..., cache_implementation="paged")` leads."""
    cache = given_cache(kwargs)
    if cache is not None:
        raise ValueError(
            f"Continuous batching (`cache_implementation='paged'`, `generate_batch`) has a cache of its own and would "
            f"ignore the {type(cache).__name__}. Leave one of the two out."
        )
    return original(model, *args, **kwargs)


def update_model_kwargs(
    original: Callable, model: PreTrainedModel, outputs: Any, model_kwargs: dict[str, Any], *args, **kwargs
) -> Any:
    """`_update_model_kwargs_for_generation`, which follows each forward pass of `generate`."""
    given, used = _given.get(), outputs.get(CACHE_ARGUMENT)
    is_checkpointing = model.training and getattr(model, "is_gradient_checkpointing", False)
    if given is not None and is_checkpointing and not given.cache.get_seq_length():
        raise NotImplementedError(
            f"{type(model).__name__} uses no cache while it is in training mode with gradient checkpointing. Call "
            "`model.eval()` before `generate`, or `model.gradient_checkpointing_disable()`."
        )
    if given is not None and used is not None and used is not given.cache:
        way_out = "Use DynamicCache for this model."
        length = getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None)
        if length is not None:
            way_out = (
                f"Beyond {length} tokens its positions are scaled in another way, for which it reads everything anew. "
                f"Prompts work whose answers end within {length} tokens. Longer ones work once the cache has seen "
                f"more than {length} tokens: call `model(prompt[:, :-1], {CACHE_ARGUMENT}=cache)` before `generate`."
            )
        raise ValueError(
            f"{type(model).__name__} did not use the {type(given.cache).__name__} that `generate` was given, but a "
            f"new {type(used).__name__}. {way_out}"
        )
    if given is not None and given.compiles:
        seen = given.cache.get_seq_length()
        given.cache.advance(max(given.max_length or 0, seen + (given.max_new_tokens or 0)))
    return original(model, outputs, model_kwargs, *args, **kwargs)


def given_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of `generate`, if it is one of ours or has one for the decoder."""
    for name in (CACHE_ARGUMENT, "past_key_values"):
        cache = arguments.get(name)
        own = getattr(cache, "self_attention_cache", cache)
        if isinstance(own, Cache) and hasattr(own, "compressed_layers"):
            return cache
    return None


def modes_of(device_type: str) -> tuple[bool, ...]:
    """What a forward pass runs in: inference mode, gradients, autocast."""
    has_autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), has_autocast
