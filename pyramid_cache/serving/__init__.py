"""Requests whose keys and values are compressed, in transformers' continuous batching: see docs/serving.md."""

import transformers


try:
    from transformers.generation.continuous_batching import cache_allocators as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"`pyramid_cache.serving` needs transformers 5.24 or newer, whose paged cache has allocators. This is "
        f"transformers {transformers.__version__}: upgrade it, or call `model.generate` with a cache."
    ) from error

from pyramid_cache.serving.manager import compressed


__all__ = ["compressed"]
