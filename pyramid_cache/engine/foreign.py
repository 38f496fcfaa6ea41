"""
The layers that hybrid models keep from transformers: sliding-window attention, linear attention, full attention whose
keys other layers share, and the places of layers without a cache of their own. What they cannot do is refused, and
what they hold goes into files.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)


Numbers = dict[str, Any]
Tensors = dict[str, torch.Tensor]

UNSETTLED = "hold tokens that may still be taken back. Settle them with `cache.crop(0)` before you save it."


class ForeignKind(NamedTuple):
    """How layers of a class go into files."""

    export: Callable[[Any], tuple[Numbers, Tensors]]  # numbers as JSON has them, and tensors
    fill: Callable[[Any, Numbers, Tensors], None]  # gives them to an empty layer


def foreign_kind(index: int, layer: Any) -> ForeignKind:
    """The kind of a layer of transformers; NotImplementedError if it is none that is known."""
    # By name: not every version of transformers has each class.
    kind = FOREIGN_KINDS.get(type(layer).__name__)
    if kind is None:
        raise NotImplementedError(
            f"Layer {index} is a {type(layer).__name__} of transformers, which cannot be saved: only full, "
            "sliding-window and linear attention can. Read the prompt again instead."
        )
    return kind


# Layers that ours replace. An exact type: others that derive from them have their own way to store.
COMPRESSIBLE = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def require_bounded(model_type: str, layers: Sequence[Any]) -> None:
    """Raises NotImplementedError if a layer that hybrid models keep from transformers grows with every token."""
    for index, layer in enumerate(layers):
        is_bounded = not isinstance(layer, CacheLayerMixin) or getattr(layer, "is_sliding", False)
        if is_bounded or type(layer) in COMPRESSIBLE:
            continue
        raise NotImplementedError(
            f"A model of type {model_type!r} cannot be compressed: its layer {index} is a {type(layer).__name__} of "
            "transformers, which stores more than keys and values. Use DynamicCache for it."
        )


def require_croppable(index: int, layer: Any, tokens_to_remove: int) -> None:
    """Raises NotImplementedError if a layer of transformers has dropped what `crop` would need."""
    states = layer.recurrent_states if isinstance(layer, LinearAttentionCacheLayerMixin) else {}
    if tokens_to_remove and (layer_holds(states) or (states and not layer.record_past)):
        raise NotImplementedError(
            f"`crop({tokens_to_remove})`: layer {index} has taken tokens up into a state, which cannot be undone. "
            "Call `cache.reset()`, then read the sequence again without them."
        )
    is_sliding = getattr(layer, "is_sliding", False) and not layer.record_past
    if is_sliding and layer.get_seq_length() >= layer.sliding_window:
        raise NotImplementedError(
            f"`crop({tokens_to_remove})`: layer {index} has dropped tokens from its sliding window since, and that "
            "cannot be undone. Call `cache.activate_past_recording()` before the tokens that may be taken back are "
            "seen."
        )


def layer_holds(states: dict[int, torch.Tensor | None]) -> bool:
    """Whether any of the states of a linear-attention layer has been filled."""
    return any(state is not None for state in states.values())


def select_rows(layer: Any, rows: torch.Tensor) -> None:
    """Keeps the rows at the int64 indices `rows`, in that order. Linear attention only knows it by another name."""
    (layer.reorder_cache if is_linear(layer) else layer.batch_select_indices)(rows)


def is_linear(layer: Any) -> bool:
    """Whether a layer has states in the place of keys and values."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


# Full attention whose keys later layers share.


def export_full(layer: DynamicLayer) -> tuple[Numbers, Tensors]:
    return {}, {"keys": layer.keys, "values": layer.values}


def fill_full(layer: DynamicLayer, numbers: Numbers, tensors: Tensors) -> None:
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]


# Sliding-window attention.


def export_sliding(layer: DynamicSlidingWindowLayer) -> tuple[Numbers, Tensors]:
    # It holds one token less than the window, in which the next one is; of a window of one token, all.
    if layer.keys is not None and layer.keys.shape[-2] >= layer.sliding_window > 1:
        raise ValueError(f"The sliding-window layers of the cache {UNSETTLED}")
    return {"cumulative_length": layer.cumulative_length}, {"keys": layer.keys, "values": layer.values}


def fill_sliding(layer: DynamicSlidingWindowLayer, numbers: Numbers, tensors: Tensors) -> None:
    keys, values = tensors["keys"], tensors["values"]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, numbers["cumulative_length"]


# Linear attention.


def export_linear(layer: LinearAttentionLayer) -> tuple[Numbers, Tensors]:
    for i, state in layer.conv_states.items():
        if state is not None and state.shape[-1] > layer.conv_kernel_size[i]:
            raise ValueError(f"The linear-attention layers of the cache {UNSETTLED}")
    states = {f"conv_states.{i}": state for i, state in layer.conv_states.items()}
    states |= {f"recurrent_states.{i}": state for i, state in layer.recurrent_states.items()}
    numbers = {"has_previous_state": [bool(has) for has in layer.has_previous_state.values()]}
    return numbers, {name: state for name, state in states.items() if state is not None}


def fill_linear(layer: LinearAttentionLayer, numbers: Numbers, tensors: Tensors) -> None:
    layer.device = layer.dtype = None  # it takes those of the first state it is given
    for i, has in enumerate(numbers["has_previous_state"]):
        convolved, recurrent = tensors.get(f"conv_states.{i}"), tensors.get(f"recurrent_states.{i}")
        # What transformers allocates is filled, for the addresses of compiled models.
        if convolved is not None:
            layer.lazy_initialization(conv_states=convolved, state_idx=i, conv_kernel_size=convolved.shape[-1])
            layer.conv_states[i].copy_(convolved)
        if recurrent is not None:
            layer.lazy_initialization(recurrent_states=recurrent, state_idx=i)
            layer.recurrent_states[i].copy_(recurrent)
        layer.has_previous_state[i] = has


FOREIGN_KINDS = {
    "DynamicLayer": ForeignKind(export_full, fill_full),
    "DynamicSlidingWindowLayer": ForeignKind(export_sliding, fill_sliding),
    "LinearAttentionLayer": ForeignKind(export_linear, fill_linear),
    # The place of a layer without a cache.
    "DummyLayer": ForeignKind(lambda layer: ({}, {}), lambda layer, numbers, tensors: None),
}
