"""The methods, one file each."""

from pyramid_cache.caches.adakv import AdaKVCache
from pyramid_cache.caches.expected_attention import ExpectedAttentionCache
from pyramid_cache.caches.h2o import H2OCache
from pyramid_cache.caches.keydiff import KeyDiffCache
from pyramid_cache.caches.knorm import KnormCache
from pyramid_cache.caches.massive_activation import MassiveActivationCache
from pyramid_cache.caches.pyramid import PyramidCache
from pyramid_cache.caches.pyramidkv import PyramidKVCache
from pyramid_cache.caches.rkv import RKVCache
from pyramid_cache.caches.shadow_kv import ShadowKVCache
from pyramid_cache.caches.snapkv import SnapKVCache
from pyramid_cache.caches.streaming_llm import StreamingLLMCache
from pyramid_cache.caches.tova import TOVACache


__all__ = [
    "AdaKVCache",
    "ExpectedAttentionCache",
    "H2OCache",
    "KeyDiffCache",
    "KnormCache",
    "MassiveActivationCache",
    "PyramidCache",
    "PyramidKVCache",
    "RKVCache",
    "ShadowKVCache",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
]
