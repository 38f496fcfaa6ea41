"""Massive activations: the cache, and the detection of massive tokens."""

from pyramid_cache.caches.massive_activation.cache import MassiveActivationCache


__all__ = ["MassiveActivationCache"]
