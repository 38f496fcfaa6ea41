"""
Shows the hidden states between decoder layers to caches that were built from a model.

Some decoder layers of the model get a hook, once. The hook finds the cache among the arguments of its layer. It does
nothing unless that cache was built from this very model and asked for the output of this layer. It changes nothing.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel


class OutputProbes:
    """
    The decoder layers of one model whose outputs a cache sees. In each forward pass each of them calls
    `cache.observe_output(layer_idx, hidden_states)`. The cache holds this object in its attribute `output_probes`.

    Args:
        model (`PreTrainedModel`): Only weak references to its layers are kept.
        layer_indices (`list[int]`): The indices of these layers.

    Raises:
        NotImplementedError: The decoder has no list of layers, or gets its cache inside of another one.
    """

    def __init__(self, model: PreTrainedModel, layer_indices: list[int]) -> None:
        if model.config.is_encoder_decoder:
            raise NotImplementedError(
                f"{type(model).__name__} is an encoder-decoder, which calls its layers with a cache inside of "
                "another. Build the cache from `model.config`."
            )
        layers = decoder_layers(model)
        self._layers = {index: weakref.ref(layers[index]) for index in layer_indices}
        for index in layer_indices:
            # Looked up on the layer itself: copies of a model bring their hooks along.
            if _after_layer not in layers[index]._forward_hooks.values():
                layers[index].register_forward_hook(_after_layer, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OutputProbes":
        return self  # nothing in it changes, and weak references cannot be copied

    def index_of(self, layer: nn.Module) -> int | None:
        """The index of a decoder layer, if it is one of these."""
        return next((index for index, reference in self._layers.items() if reference() is layer), None)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The decoder layers of a model, by whatever name.

    Raises:
        NotImplementedError: There is no list of as many as the config says.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise NotImplementedError(
        f"{type(model).__name__} has no list of {depth} decoder layers whose outputs could be looked at. Build the "
        "cache from `model.config`: keys and values alone tell massive tokens as well."
    )


@torch.compiler.disable
def _after_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor | tuple) -> None:
    for value in (*kwargs.values(), *args):
        probes = getattr(value, "output_probes", None) if isinstance(value, Cache) else None
        index = probes.index_of(layer) if isinstance(probes, OutputProbes) else None
        if index is not None:
            value.observe_output(index, output[0] if isinstance(output, tuple) else output)
