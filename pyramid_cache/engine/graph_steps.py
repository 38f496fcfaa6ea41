"""The decode steps of a whole cache while their shapes are fixed: those of its layers, and what joins them."""

from typing import Any, NamedTuple

import torch

from pyramid_cache.engine import checks
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep


class GraphSteps:
    """
    The steps of all layers. A forward pass runs `update` and `attend` of each layer, which may be part of a graph;
    `count` follows it on the host.

    Args:
        layers (`dict`): The layers of the cache by their indices, in the order of the model.
        num_seen (`int`): How many tokens the cache has seen, padding included.
        max_length (`int`, *optional*): How many tokens a row may become long.
    """

    def __init__(self, layers: dict[int, Any], num_seen: int, max_length: int | None) -> None:
        self.by_layer: dict[int, FixedStep] = {
            index: layer.fix(max_length, in_graph=True) for index, layer in layers.items()
        }
        self.first, self.last = min(layers), max(layers)
        self.num_seen = torch.tensor(num_seen, device=layers[self.first].device)
        # Whether `count` followed the last step, and whether all layers took it.
        self.is_counted = self.is_whole = True
        tensors = [tensor for step in self.by_layer.values() for tensor in step.tensors().values()]
        for tensor in (self.num_seen, *layers[self.first].frequencies.held_tensors(), *tensors):
            torch._dynamo.mark_static_address(tensor, guard=False)
        for index, layer in layers.items():
            layer.take_step(self.by_layer[index])

    def require_counted(self) -> None:
        if not self.is_counted:
            raise RuntimeError(
                "Two steps of fixed shapes came one after the other. Call `cache.step()` after each forward pass, as "
                "docs/compile.md shows; after an interrupted one, call `cache.reset()`."
            )

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.by_layer[layer_idx]
        checks.check_fixed(step.layer, key, value)
        if layer_idx == self.first:
            self.require_counted()
            self.is_counted = self.is_whole = False
            self.num_seen.add_(1)
        keys, values = step.update(key, value)
        keys.cache_layer = GraphArrival(self, layer_idx)  # type: ignore[attr-defined]
        return keys, values

    def attend(self, layer_idx: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A call that the first layer refuses leaves no trace."""
        step = self.by_layer[layer_idx]
        try:
            checks.check_call(step.layer, call, 1)
            if not torch.compiler.is_dynamo_compiling():
                checks.check_attentions()
        except (ValueError, NotImplementedError):
            step.take_back()
            if layer_idx == self.first:
                self.is_counted = True
                self.num_seen.sub_(1)
            raise
        output = step.attend(call)
        if layer_idx == self.last:
            self.is_whole = True
        return output

    def count(self) -> bool:
        """Counts the step that has been taken, and evicts. Returns whether there is room for another one."""
        if not self.is_whole:
            raise RuntimeError(
                "The last step of fixed shapes broke off in some layer. Call `cache.reset()`, then read the whole "
                "sequence again."
            )
        for step in self.by_layer.values():
            step.count()
            step.settle()
        self.is_counted = True
        return not any(step.is_full for step in self.by_layer.values())

    def release(self) -> None:
        """Brings the layers back to what they would be without fixed shapes."""
        for step in self.by_layer.values():
            step.release()
            step.layer.take_step(None)


class GraphArrival(NamedTuple):
    """A token between `update` and `attend` of a layer."""

    steps: GraphSteps
    layer_idx: int

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.steps.attend(self.layer_idx, call)
