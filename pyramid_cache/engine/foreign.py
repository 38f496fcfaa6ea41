"""
What the layers hold that hybrid models keep from transformers, for files: sliding-window attention, linear attention,
and the places of layers without a cache of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer


Numbers = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignKind:
    """
    How layers of a class go into files.

    Attributes:
        tensor_names (`Callable`): The names of the tensors that a layer may have.
        export (`Callable`): Numbers, as JSON has them, and tensors of a layer.
        fill (`Callable`): Gives them to an empty layer.
        num_seen (`Callable`): The tokens that a layer has seen, None if it does not know.
    """

    tensor_names: Callable[[Any], tuple[str, ...]]
    export: Callable[[Any], tuple[Numbers, Tensors]]
    fill: Callable[[Any, Numbers, Tensors], None]
    num_seen: Callable[[Any], int | None] = lambda layer: None


def foreign_kind(index: int, layer: Any) -> ForeignKind:
    """
    The kind of a layer of transformers.

    Raises:
        NotImplementedError: It is none that is known.
    """
    # By name: not every version of transformers has each class.
    kind = FOREIGN_KINDS.get(type(layer).__name__)
    if kind is None:
        raise NotImplementedError(
            f"Layer {index} is a {type(layer).__name__} of transformers, which cannot be saved: only full, "
            "sliding-window and linear attention can. Read the prompt again instead."
        )
    return kind


# Sliding-window attention.


def export_sliding(layer: DynamicSlidingWindowLayer) -> tuple[Numbers, Tensors]:
    # It holds one token less than the window, in which the next one is; of a window of one token, all.
    if layer.keys is not None and layer.keys.shape[-2] >= layer.sliding_window > 1:
        raise ValueError(
            "The sliding-window layers of the cache hold tokens that may still be taken back. Settle them with "
            "`cache.crop(0)` before you save it."
        )
    return {"cumulative_length": layer.cumulative_length}, {"keys": layer.keys, "values": layer.values}


def fill_sliding(layer: DynamicSlidingWindowLayer, numbers: Numbers, tensors: Tensors) -> None:
    keys, values = tensors["keys"], tensors["values"]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, numbers["cumulative_length"]


# Linear attention.


def linear_names(layer: LinearAttentionLayer) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for name in ("conv_states", "recurrent_states") for i in range(layer.number_of_states))


def export_linear(layer: LinearAttentionLayer) -> tuple[Numbers, Tensors]:
    states = {f"conv_states.{i}": state for i, state in layer.conv_states.items()}
    for i, state in layer.conv_states.items():
        if state is not None and state.shape[-1] > layer.conv_kernel_size[i]:
            raise ValueError(
                "The linear-attention layers of the cache hold tokens that may still be taken back. Settle them with "
                "`cache.crop(0)` before you save it."
            )
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
    "DynamicSlidingWindowLayer": ForeignKind(
        tensor_names=lambda layer: ("keys", "values"),
        export=export_sliding,
        fill=fill_sliding,
        num_seen=lambda layer: layer.get_seq_length(),
    ),
    "LinearAttentionLayer": ForeignKind(tensor_names=linear_names, export=export_linear, fill=fill_linear),
    # The place of a layer without a cache.
    "DummyLayer": ForeignKind(
        tensor_names=lambda layer: (),
        export=lambda layer: ({}, {}),
        fill=lambda layer, numbers, tensors: None,
    ),
}
