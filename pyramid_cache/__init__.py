"""KV-cache compression for plain `model.generate`: `transformers.Cache` subclasses that keep what attention needs."""

from pyramid_cache.caches import (
    AdaKVCache,
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    KnormCache,
    MassiveActivationCache,
    PyramidCache,
    PyramidKVCache,
    RKVCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.policy_cache import PolicyCache


__all__ = [
    "AdaKVCache",
    "ExpectedAttentionCache",
    "H2OCache",
    "KeyDiffCache",
    "KnormCache",
    "MassiveActivationCache",
    "Policy",
    "PolicyCache",
    "PyramidCache",
    "PyramidKVCache",
    "RKVCache",
    "ShadowKVCache",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
]
