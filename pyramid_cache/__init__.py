"""KV-cache compression for plain `model.generate`: `transformers.Cache` subclasses that keep what attention needs."""

from pyramid_cache.caches import H2OCache, PyramidCache, StreamingLLMCache
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.policy_cache import PolicyCache


__all__ = ["H2OCache", "Policy", "PolicyCache", "PyramidCache", "StreamingLLMCache"]
