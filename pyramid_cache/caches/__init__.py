"""The methods, one file each."""

from pyramid_cache.caches.h2o import H2OCache
from pyramid_cache.caches.pyramid import PyramidCache
from pyramid_cache.caches.streaming_llm import StreamingLLMCache


__all__ = ["H2OCache", "PyramidCache", "StreamingLLMCache"]
