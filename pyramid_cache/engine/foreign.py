"""
What the layers hold that hybrid models keep from transformers, for files: sliding-window attention, linear attention,
and the places of layers without a cache of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer


STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NUMBER = 2**31 - 1  # positions are int32

Numbers = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignKind:
    """
    How layers of a class go into files.

    Attributes:
        tensor_names (`Callable`): The names of the tensors that a layer may have.
        export (`Callable`): Numbers, as JSON has them, and tensors of a layer.
        fill (`Callable`): Gives them to an empty layer; a ValueError where they cannot be those of one.
        num_seen (`Callable`): The tokens that a layer has seen, None if it does not know.
        batch_size (`Callable`): Its rows, None if it does not know.
    """

    tensor_names: Callable[[Any], tuple[str, ...]]
    export: Callable[[Any], tuple[Numbers, Tensors]]
    fill: Callable[[Any, Numbers, Tensors], None]
    num_seen: Callable[[Any], int | None] = lambda layer: None
    batch_size: Callable[[Any], int | None] = lambda layer: None


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


def is_count(value: Any) -> bool:
    """Whether it is a number that positions, slots and rows can have."""
    return type(value) is int and 0 <= value <= MAX_NUMBER


def require_states(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raises ValueError unless keys and values are `(batch, kv_heads, slots, head_dim)` of the same tokens."""
    is_state = keys.dim() == values.dim() == 4 and keys.dtype == values.dtype and keys.dtype in STATE_DTYPES
    if (
        not is_state
        or keys.shape[:3] != values.shape[:3]
        or 0 in (*keys.shape[:2], *keys.shape[3:], *values.shape[3:])
    ):
        raise ValueError(
            f"keys are {keys.dtype} {tuple(keys.shape)} and values {values.dtype} {tuple(values.shape)} instead of "
            "(batch, kv_heads, slots, head_dim) of one floating dtype"
        )


# Sliding-window attention.


def sliding_length(layer: DynamicSlidingWindowLayer, num_seen: int) -> int:
    """How many tokens a layer holds after so many: one less than the window, in which the next one is."""
    return num_seen if layer.sliding_window == 1 else min(num_seen, layer.sliding_window - 1)


def export_sliding(layer: DynamicSlidingWindowLayer) -> tuple[Numbers, Tensors]:
    if layer.keys is not None and layer.keys.shape[-2] > sliding_length(layer, layer.cumulative_length):
        raise ValueError(
            "The sliding-window layers of the cache hold tokens that may still be taken back. Settle them with "
            "`cache.crop(0)` before you save it."
        )
    return {"cumulative_length": layer.cumulative_length}, {"keys": layer.keys, "values": layer.values}


def fill_sliding(layer: DynamicSlidingWindowLayer, numbers: Numbers, tensors: Tensors) -> None:
    num_seen = numbers.get("cumulative_length")
    if numbers.keys() != {"cumulative_length"} or not is_count(num_seen):
        raise ValueError(f"its numbers are {numbers!r}")
    if tensors.keys() != {"keys", "values"}:
        raise ValueError(f"it has the tensors {sorted(tensors)} instead of keys and values")
    keys, values = tensors["keys"], tensors["values"]
    require_states(keys, values)
    if keys.shape[2] != sliding_length(layer, num_seen):
        raise ValueError(f"a window of {layer.sliding_window} holds {keys.shape[2]} tokens after {num_seen}")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, num_seen


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
    has_previous = numbers.get("has_previous_state")
    is_list = type(has_previous) is list and all(type(has) is bool for has in has_previous)
    if numbers.keys() != {"has_previous_state"} or not is_list or len(has_previous) != layer.number_of_states:
        raise ValueError(f"its numbers are {numbers!r}")
    for name, state in tensors.items():
        if state.dtype not in STATE_DTYPES or state.dim() < 2 or 0 in state.shape:
            raise ValueError(f"`{name}` is {state.dtype} {tuple(state.shape)}")
    if len({state.shape[0] for state in tensors.values()}) > 1:
        raise ValueError(f"its states {sorted(tensors)} differ in their rows")
    layer.device = layer.dtype = None  # it takes those of the first state it is given
    for i, has in enumerate(has_previous):
        convolved, recurrent = tensors.get(f"conv_states.{i}"), tensors.get(f"recurrent_states.{i}")
        if has and convolved is None:
            raise ValueError(f"it has no `conv_states.{i}`")
        # What transformers allocates is filled, for the addresses of compiled models.
        if convolved is not None:
            layer.lazy_initialization(conv_states=convolved, state_idx=i, conv_kernel_size=convolved.shape[-1])
            layer.conv_states[i].copy_(convolved)
        if recurrent is not None:
            layer.lazy_initialization(recurrent_states=recurrent, state_idx=i)
            layer.recurrent_states[i].copy_(recurrent)
        layer.has_previous_state[i] = has


def linear_batch_size(layer: LinearAttentionLayer) -> int | None:
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return next((state.shape[0] for state in states if state is not None), None)


# Places without a cache.


def fill_nothing(layer: Any, numbers: Numbers, tensors: Tensors) -> None:
    if numbers or tensors:
        raise ValueError(f"a layer without a cache has {[*numbers, *tensors]}")


FOREIGN_KINDS = {
    "DynamicSlidingWindowLayer": ForeignKind(
        tensor_names=lambda layer: ("keys", "values"),
        export=export_sliding,
        fill=fill_sliding,
        num_seen=lambda layer: layer.get_seq_length(),
        batch_size=lambda layer: layer.keys.shape[0],
    ),
    "LinearAttentionLayer": ForeignKind(
        tensor_names=linear_names, export=export_linear, fill=fill_linear, batch_size=linear_batch_size
    ),
    "DummyLayer": ForeignKind(tensor_names=lambda layer: (), export=lambda layer: ({}, {}), fill=fill_nothing),
}
