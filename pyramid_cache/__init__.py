"""KV-cache compression for plain `model.generate`: `transformers.Cache` subclasses that keep what attention needs."""

from pyramid_cache.caches.adakv import AdaKVCache
from pyramid_cache.caches.attention_matching import AttentionMatchingCache
from pyramid_cache.caches.critical_kv import CriticalKVCache, CriticalPolicy
from pyramid_cache.caches.defensive_kv import DefensiveKVCache, LayerDefensiveKVCache
from pyramid_cache.caches.expected_attention import ExpectedAttentionCache
from pyramid_cache.caches.h2o import H2OCache
from pyramid_cache.caches.keydiff import KeyDiffCache
from pyramid_cache.caches.kivi import KIVICache
from pyramid_cache.caches.knorm import KnormCache
from pyramid_cache.caches.kv_merger import KVMergerCache
from pyramid_cache.caches.kv_sharer import KVSharerCache
from pyramid_cache.caches.kvzip import KVzipCache, KVzipPlusCache
from pyramid_cache.caches.massive_activation.cache import MassiveActivationCache
from pyramid_cache.caches.minicache.cache import MiniCache
from pyramid_cache.caches.pyramid.cache import PyramidCache
from pyramid_cache.caches.pyramidkv import PyramidKVCache
from pyramid_cache.caches.rkv import RKVCache
from pyramid_cache.caches.scissorhands import ScissorhandsCache
from pyramid_cache.caches.shadow_kv.cache import ShadowKVCache
from pyramid_cache.caches.snapkv import SnapKVCache
from pyramid_cache.caches.streaming_llm import StreamingLLMCache
from pyramid_cache.caches.tova import TOVACache
from pyramid_cache.caches.vl_cache import VLCache
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.policy_cache import PolicyCache
from pyramid_cache.engine.replay import ReplayTexts


__all__ = [
    "AdaKVCache",
    "AttentionMatchingCache",
    "CriticalKVCache",
    "CriticalPolicy",
    "DefensiveKVCache",
    "ExpectedAttentionCache",
    "H2OCache",
    "KeyDiffCache",
    "KIVICache",
    "KVMergerCache",
    "KVSharerCache",
    "KVzipCache",
    "KVzipPlusCache",
    "KnormCache",
    "LayerDefensiveKVCache",
    "MassiveActivationCache",
    "MiniCache",
    "Policy",
    "PolicyCache",
    "PyramidCache",
    "PyramidKVCache",
    "RKVCache",
    "ReplayTexts",
    "ScissorhandsCache",
    "ShadowKVCache",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
    "VLCache",
]
