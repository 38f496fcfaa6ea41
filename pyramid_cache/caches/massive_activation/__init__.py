"""Massive activations: the cache, and the detection of massive tokens."""
