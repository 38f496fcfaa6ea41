"""Caches by the names of their classes, and what they hold: what the scripts beside this file share."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import pyramid_cache
from pyramid_cache import PolicyCache
from pyramid_cache.engine.cache import CompressedCache


FULL_CACHE = "DynamicCache"
CACHE_CLASSES: dict[str, type[CompressedCache]] = {
    name: found
    for name, found in vars(pyramid_cache).items()
    if isinstance(found, type) and issubclass(found, CompressedCache) and found is not PolicyCache
}
CACHE_NAMES = (FULL_CACHE, *sorted(CACHE_CLASSES))
# The first arguments of constructors that are called otherwise.
BUDGET_ARGUMENTS = {}

Budget = float | int | str


def read_number(text: str) -> Budget:
    """Reads "512" as an int and "0.4" as a float; anything else stays text, such as "256MiB"."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def build_cache(name: str, model: PreTrainedModel, budget: Budget | None = None, **settings: Any) -> Cache:
    """
    A new cache for a model, built from its config: whichever cache it is, no logit of a prompt is left out then.

    Args:
        name (`str`): One of `CACHE_NAMES`.
        budget (`float`, `int` or `str`, *optional*): As the class takes it; of `StreamingLLMCache` the length of the window,
            of `ShadowKVCache` how many tokens a step attends to. By default what the class has as its default.
        settings: Further arguments of the constructor.

    Raises:
        ValueError: There is no such cache, or it does not take the budget or a setting.
    """
    if name == FULL_CACHE:
        if budget is not None or settings:
            raise ValueError(f"{FULL_CACHE} keeps everything: leave out budget and settings, or name another cache.")
        return DynamicCache(config=model.config)
    if name not in CACHE_CLASSES:
        raise ValueError(f"There is no cache {name!r}. Choose one of {', '.join(CACHE_NAMES)}.")
    cache_class = CACHE_CLASSES[name]
    if budget is not None:
        settings = {BUDGET_ARGUMENTS.get(cache_class, "budget"): budget} | settings
    try:
        return cache_class(model.config, **settings)
    except TypeError as error:  # an argument is missing, or the class has none of that name
        raise ValueError(f"{name} cannot be built from {settings}: {error}") from error


def num_bytes(cache: Cache) -> int:
    """The bytes that a cache holds, on all devices."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def num_kept(cache: Cache) -> int:
    """The tokens that the layer which keeps most holds."""
    return max(cache.num_kept_tokens()) if isinstance(cache, CompressedCache) else cache.get_seq_length()
