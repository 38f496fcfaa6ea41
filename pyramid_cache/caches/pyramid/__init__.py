"""PyramidInfer: the cache, and the pruning of hidden states while a prompt is read."""

from pyramid_cache.caches.pyramid.cache import PyramidCache


__all__ = ["PyramidCache"]
