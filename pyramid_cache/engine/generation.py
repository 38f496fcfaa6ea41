"""
What `generate` must do with a cache that it is given: use it. Some models set it to None and go on with a new one.

`attention.py` puts these functions in the place of methods of `GenerationMixin`. Each gets the original method first.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT


# The cache of ours that the innermost running `generate` was given.
_given: ContextVar[Cache | None] = ContextVar("given", default=None)


def generate(original: Callable, model: PreTrainedModel, *args, **kwargs) -> Any:
    """`GenerationMixin.generate`, which remembers the cache that it is given while it runs."""
    token = _given.set(given_cache(kwargs))
    try:
        return original(model, *args, **kwargs)
    finally:
        _given.reset(token)


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
    if given is not None and used is not None and used is not given:
        way_out = "Use DynamicCache for this model."
        length = getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None)
        if length is not None:
            way_out = (
                f"Beyond {length} tokens its positions are scaled in another way, for which it reads everything anew. "
                f"Prompts work whose answers end within {length} tokens. Longer ones work once the cache has seen "
                f"more than {length} tokens: call `model(prompt[:, :-1], {CACHE_ARGUMENT}=cache)` before `generate`."
            )
        raise ValueError(
            f"{type(model).__name__} did not use the {type(given).__name__} that `generate` was given, but a new "
            f"{type(used).__name__}. {way_out}"
        )
    return original(model, outputs, model_kwargs, *args, **kwargs)


def given_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of `generate`, if it is one of ours or has one for the decoder."""
    for name in (CACHE_ARGUMENT, "past_key_values"):
        cache = arguments.get(name)
        if hasattr(getattr(cache, "self_attention_cache", cache), "compressed_layers"):
            return cache
    return None
