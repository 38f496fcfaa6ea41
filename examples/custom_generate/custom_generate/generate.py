"""Plain `generate` with a cache of pyramid_cache, chosen by its name."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.policy_cache import EvictionOptions
from pyramid_cache.lab.registry import BY_CLASS, CACHES


def generate(model: PreTrainedModel, cache: str | None = None, revision: str | None = None, **arguments: Any) -> Any:
    """
    Builds a cache, and generates with it.

    Args:
        cache (`str`): A name of `pyramid_cache.lab.registry.CACHES`, or of a class, such as "snapkv" or "SnapKVCache".
        revision (`str`, *optional*): Of this repository. transformers reads it, and hands it on.
        arguments: The settings of the cache, such as `budget`. All others are those of plain `generate`.

    Returns:
        What plain `generate` returns. With `return_dict_in_generate=True`, the cache is a part of it.

    Raises:
        ValueError: For another name, for `past_key_values`, and for what the cache and plain `generate` refuse.
    """
    if arguments.pop("past_key_values", None) is not None:
        raise ValueError("`past_key_values` is built here. Give a name as `cache`, or leave `custom_generate` out.")
    name = BY_CLASS.get(cache, cache) if isinstance(cache, str) else None
    if name not in CACHES:
        given = repr(cache) if isinstance(cache, str | None) else f"a {type(cache).__name__}"
        raise ValueError(
            f"`cache` is {given}, but must be one of {', '.join(CACHES)}, or the name of a class. For a cache that is "
            "built already, leave `custom_generate` out."
        )
    entry = CACHES[name]
    names = {*inspect.signature(entry.cache_class).parameters, *EvictionOptions.__annotations__}
    given = {name: value for name, value in arguments.items() if name in names}
    # A tokenizer serves both: plain `generate` reads it for `stop_strings`.
    others = {name: value for name, value in arguments.items() if name not in names or name == "tokenizer"}
    settings = {name: value for name, value in entry.settings.items() if name in names}
    built = entry.cache_class(model if entry.from_model else model.config, **{**settings, **given})
    return type(model).generate(model, **others, **{CACHE_ARGUMENT: built})
