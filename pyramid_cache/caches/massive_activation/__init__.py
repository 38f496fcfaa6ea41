"""Massive activations: the cache, the detection of massive tokens, and the profile of a model."""

from pyramid_cache.caches.massive_activation.cache import MassiveActivationCache


__all__ = ["MassiveActivationCache"]
