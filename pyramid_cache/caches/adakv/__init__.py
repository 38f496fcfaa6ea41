"""Ada-KV: the cache, and the store of heads that keep different numbers of tokens."""

from pyramid_cache.caches.adakv.cache import AdaKVCache


__all__ = ["AdaKVCache"]
