"""What the functions that draw and show take: checks of caches, rows and layers, and what they all ask of a cache."""

import operator
from typing import Any

from transformers import Cache

from pyramid_cache.engine.layer import CompressedLayer


def compressed_layers(cache: Cache) -> list[CompressedLayer]:
    """
    The layers of a cache that evict, in the order of the model.

    Raises:
        ValueError: The cache is not of this library.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, CompressedLayer)]
    if not layers:
        inside = " Give its `self_attention_cache`." if hasattr(cache, "self_attention_cache") else ""
        raise ValueError(f"A {type(cache).__name__} is no cache of pyramid_cache, whose layers are drawn.{inside}")
    return layers


def require_filled(cache: Any) -> None:
    """
    Raises:
        ValueError: The cache is not of this library, or is empty.
        RuntimeError: The last forward pass with it broke off.
    """
    compressed_layers(cache)
    if not cache.get_seq_length():
        raise ValueError(f"The {type(cache).__name__} holds nothing yet: run the model with it first.")
    cache.require_whole()


def as_row(row: int, batch_size: int) -> int:
    """The index of a row; a negative one counts from the end."""
    try:
        index = operator.index(row)
    except TypeError:
        index = batch_size
    if isinstance(row, bool) or not -batch_size <= index < batch_size:
        raise ValueError(f"There is no row {row!r}: the cache holds {batch_size} rows, counted from 0.")
    return index % batch_size


def as_layer(layer_idx: int, cache: Cache) -> CompressedLayer:
    """The layer at an index of the model, which must be one that evicts."""
    layers = cache.layers
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not 0 <= layer_idx < len(layers):
        raise ValueError(f"There is no layer {layer_idx!r}: the cache has {len(layers)} layers, counted from 0.")
    layer = layers[layer_idx]
    if not isinstance(layer, CompressedLayer):
        raise ValueError(f"Layer {layer_idx} is a {type(layer).__name__} of transformers, which holds no scores.")
    return layer


def tokens_seen(cache: Cache, row: int | None = None) -> int:
    """How many tokens a row has seen, without padding; without `row`, the longest row."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return max(max(layer.num_seen_per_row[rows]) for layer in compressed_layers(cache))


def loses_tokens(cache: Cache) -> bool:
    """Whether a layer loses the tokens that it does not hold. `ShadowKVCache` loses none."""
    return all(layer.evicts for layer in compressed_layers(cache))
