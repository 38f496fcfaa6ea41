"""
Layers that share a budget: the tokens of all layers compete, and a layer keeps as many as are among the best of all.

The scores of all layers must be known before any layer evicts. So a prompt stays whole in each layer until the last
layer has attended to it, and takes as much memory as in `DynamicCache` until then.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pyramid_cache.engine.layer import CompressedLayer


class WaitingEviction(NamedTuple):
    """What one layer would evict."""

    layer: CompressedLayer  # its `state.row_kept` is what it would keep on its own
    priority: torch.Tensor  # `(batch, kv_heads or 1, tokens)` float32, -inf for what is no token
    row_present: list[int]  # how many tokens each row holds
    must_evict: bool  # whether it would evict on its own
    evict: Callable[[], None]


class SharedBudget:
    """The evictions of the layers of one cache."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.waiting: list[WaitingEviction] = []

    def add(self, eviction: WaitingEviction) -> None:
        """Lets an eviction wait for those of the other layers. That of the last layer starts them all."""
        self.waiting.append(eviction)
        if len(self.waiting) < self.num_layers:
            return
        waiting, self.waiting = self.waiting, []
        if any(each.must_evict for each in waiting):
            for each, row_kept in zip(waiting, share(waiting), strict=True):
                each.layer.set_kept(row_kept)
                each.evict()


def share(waiting: list[WaitingEviction]) -> list[list[int]]:
    """
    How many tokens of each row stay in each layer: at least one, and together no more than the layers would keep each
    on its own. Heads of a layer keep equal numbers: as many as its best tokens make on average.
    """
    kept = [list(each.layer.state.row_kept) for each in waiting]
    for row in range(len(kept[0])):
        if all(each.row_present[row] <= each.layer.state.row_kept[row] for each in waiting):
            continue
        scores = [each.priority[row].flatten() for each in waiting]
        heads = [each.priority.shape[1] for each in waiting]
        sizes = torch.tensor([len(each) for each in scores], device="cpu")
        layer_of = torch.arange(len(waiting), device="cpu").repeat_interleave(sizes)
        # One token of each layer is its own; the others go to the best.
        num_best = sum((numbers[row] - 1) * num_heads for numbers, num_heads in zip(kept, heads, strict=True))
        best = torch.cat(scores).topk(num_best).indices.cpu()
        counts = torch.bincount(layer_of[best], minlength=len(waiting)).tolist()
        for each, numbers, count, num_heads in zip(waiting, kept, counts, heads, strict=True):
            numbers[row] = min(count // num_heads + 1, each.row_present[row])
    return kept
