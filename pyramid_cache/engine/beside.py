"""
Attention beside a state-space part in one decoder layer, as in Falcon-H1 and Zamba: the attention is compressed, the
states are those of transformers' linear-attention layer.
"""

import functools
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from pyramid_cache.engine.foreign import export_linear, fill_linear, require_croppable
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.memory import tensors_of


if TYPE_CHECKING:
    import torch

PREFIX = "states."


class StatesBeside(CompressedLayer if TYPE_CHECKING else object):  # type: ignore[misc]
    """What comes in front of the class of a compressed layer that has states in addition."""

    states: LinearAttentionLayer
    # States are not among the tensors of a compiled step.
    can_fix = False
    # What a state has taken up cannot be taken back.
    is_croppable = False

    def __getattr__(self, name: str) -> Any:
        """Models and caches of transformers ask the layer for its states, and give them to it."""
        if name == "states":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.states, name)

    def reset(self) -> None:
        super().reset()
        self.states = LinearAttentionLayer(self.states.number_of_states)

    def _map_rows(self, function: Any, rows: list[int] | None = None) -> None:
        super()._map_rows(function, rows)
        for states in (self.states.conv_states, self.states.recurrent_states):
            states.update({index: function(state) for index, state in states.items() if state is not None})

    def require_croppable(self, tokens_to_remove: int) -> None:
        require_croppable(self.place.layer_idx, self.states, tokens_to_remove)
        super().require_croppable(tokens_to_remove)

    def held_tensors(self) -> dict[str, "torch.Tensor"]:
        return super().held_tensors() | tensors_of(self.states)

    def export_state(self) -> tuple[dict[str, Any], dict[str, "torch.Tensor"]]:
        numbers, tensors = super().export_state()
        state_numbers, states = export_linear(self.states)
        tensors |= {f"{PREFIX}{name}": state for name, state in states.items()}
        return {**numbers, "states": state_numbers}, tensors

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, "torch.Tensor"]) -> None:
        states = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
        own = {name: each for name, each in tensors.items() if not name.startswith(PREFIX)}
        super().import_state({name: each for name, each in numbers.items() if name != "states"}, own)
        fill_linear(self.states, numbers["states"], states)


# Caches of transformers ask by this class whether a layer has states, and masks whether it has attention as well.
LinearAttentionAndFullAttentionLayer.register(StatesBeside)


@functools.cache
def _class_with_states(layer_class: type[CompressedLayer]) -> type[CompressedLayer]:
    return type(f"{layer_class.__name__}WithStates", (StatesBeside, layer_class), {})


def with_states(layer: CompressedLayer, number_of_states: int) -> CompressedLayer:
    """The layer, with so many states in addition."""
    layer_class = _class_with_states(type(layer))
    twin = layer_class.__new__(layer_class)
    twin.__dict__ = vars(layer)
    twin.states = LinearAttentionLayer(number_of_states)  # type: ignore[attr-defined]
    return twin
