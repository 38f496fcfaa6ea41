"""KV-cache compression for plain `model.generate`: `transformers.Cache` subclasses that keep what attention needs."""

from pyramid_cache.caches import H2OCache, PyramidCache, StreamingLLMCache


__all__ = ["H2OCache", "PyramidCache", "StreamingLLMCache"]
