"""
Layers that share a budget: the tokens of all heads of all layers compete, and a layer keeps as many as are among the
best of all.

Either the scores of all layers are known before any layer evicts (`SharedBudget`), or what tells the budget of each
(`DividedBudget`). A prompt then stays whole in each
layer until the last one has attended to it, and takes as much memory as in `DynamicCache` until then. Or each layer
evicts as soon as it has been scored (`OnlineBudget`), by a threshold that earlier layers have left.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging


if TYPE_CHECKING:
    from pyramid_cache.engine.evicting import EvictingLayer
    from pyramid_cache.engine.state import LayerState


# Compactors of longer prompts show their progress.
MAX_SILENT_TOKENS = 8192


class SharedBudget:
    """
    The layers of one cache that wait until all of them have been scored.

    Args:
        shares (`bool`): Whether their tokens compete. Otherwise each layer keeps what it would on its own.
        waits (`bool`): Whether they wait until the cache settles them, and not only for the last layer.
    """

    def __init__(self, num_layers: int, shares: bool = True, waits: bool = False) -> None:
        self.num_layers, self.shares, self.waits = num_layers, shares, waits
        self.forget()

    def forget(self) -> None:
        """No layer waits."""
        self.waiting: list[tuple[EvictingLayer, int]] = []

    def add(self, layer: "EvictingLayer", longest: int) -> None:
        """Lets a layer wait that holds all its tokens. After the last one they all evict."""
        self.waiting.append((layer, longest))
        if len(self.waiting) == self.num_layers and not self.waits:
            self.settle()

    def settle(self) -> None:
        """Lets all layers evict."""
        waiting = self.waiting
        self.forget()
        try:
            self._evict(waiting)
        except BaseException:
            for layer, _ in waiting:
                layer.break_off()
            raise
        for layer, _ in waiting:
            layer.forget_prompt()
            layer.pack()

    def _evict(self, waiting: list[tuple["EvictingLayer", int]]) -> None:
        must_evict = any(layer.state.must_evict for layer, _ in waiting)
        if not must_evict and not self.waits:
            return
        priorities = [layer.priority_of_held(longest) for layer, longest in waiting]
        if not must_evict:  # the scores are remembered
            return
        held, kept = ([getattr(layer.state, name) for layer, _ in waiting] for name in ("row_held", "row_kept"))
        shared = share(priorities, held, kept, waiting[0][0].state.row_protected) if self.shares else kept
        first, num_tokens = waiting[0]
        is_silent = first.compactor is None or num_tokens <= MAX_SILENT_TOKENS
        rows = list(zip(waiting, priorities, shared, strict=True))
        for (layer, longest), priority, row_kept in logging.tqdm(rows, desc="compress", disable=is_silent):
            layer.set_kept(row_kept)
            layer.evict_to([min(pair) for pair in zip(layer.state.row_held, row_kept, strict=True)], priority, longest)


class DividedBudget(SharedBudget):
    """
    The layers of one cache that wait until all of them have observed a prompt. Then `divide` tells from their states
    how many tokens each keeps of each row, as `Policy.divide` does.
    """

    def __init__(self, num_layers: int, divide: Callable[[Sequence["LayerState"]], list[list[int]]]) -> None:
        super().__init__(num_layers, shares=False)
        self.divide = divide

    def _evict(self, waiting: list[tuple["EvictingLayer", int]]) -> None:
        if not any(layer.state.must_evict for layer, _ in waiting):
            return
        numbers = self.divide([layer.state for layer, _ in waiting])
        for (layer, longest), row_kept in zip(waiting, numbers, strict=True):
            layer.set_kept(row_kept)
            row_left = [min(pair) for pair in zip(layer.state.row_held, row_kept, strict=True)]
            layer.evict_to(row_left, layer.priority_of_held(longest), longest)


def share(
    priorities: list[torch.Tensor], held: list[list[int]], kept: list[list[int]], protected: list[int]
) -> list[list[int]]:
    """
    How many tokens each head of a layer keeps on average: as many as are among the best of all layers, rounded down.

    Args:
        priorities (`list[torch.Tensor]`): Of each layer, `(batch, kv_heads, tokens)` float32, -inf for what is no
            token.
        held, kept (`list[list[int]]`): How many tokens of each row a layer holds, and would keep on its own.
        protected (`list[int]`): How many tokens of each row have a priority of inf in all heads of all layers; none if
            it is empty.

    Returns:
        `list[list[int]]`: For each layer and row, one token at least, and together no more than `kept` has.
    """
    heads = torch.tensor([priority.shape[1] for priority in priorities], device="cpu")
    sizes = torch.tensor([priority[0].numel() for priority in priorities], device="cpu")
    layer_of = torch.arange(len(priorities), device="cpu").repeat_interleave(sizes)
    shared = [list(numbers) for numbers in kept]
    for row in range(len(kept[0])):
        if all(numbers[row] <= most[row] for numbers, most in zip(held, kept, strict=True)):
            continue
        # One token of each head is its own, or those that are protected; the others go to the best.
        num_own = max([1, *protected[row : row + 1]])
        num_best = sum((numbers[row] - num_own) * num for numbers, num in zip(kept, heads.tolist(), strict=True))
        # Layers may be on different devices.
        scores = torch.cat([numbered(priority[row]).to(priorities[0].device) for priority in priorities])
        if protected:
            scores = scores.masked_fill(scores == float("inf"), float("-inf"))
        # Of equals the first: an order that padding does not change.
        best = scores.sort(descending=True, stable=True).indices[:num_best].cpu()
        counts = (torch.bincount(layer_of[best], minlength=len(priorities)) // heads + num_own).tolist()
        for numbers, before, count in zip(shared, held, counts, strict=True):
            numbers[row] = min(count, before[row])
    return shared


class OnlineBudget:
    """
    The budget of the layers of one cache, of which each takes its part in turn.

    A layer keeps its tokens that are among the best of all layers so far, as large a share of them as the budget that
    is left is of the tokens to come. So the threshold corrects itself: what a layer takes beyond its equal share,
    later ones have less.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.forget()

    def forget(self) -> None:
        """The next layer is the first."""
        self.scores: list[torch.Tensor] = []
        self.left: list[int] = []

    def fits(self, row_totals: list[int], row_lengths: list[int]) -> list[bool]:
        """
        Whether the layers together may keep all tokens that each row has seen, which all layers answer alike.
        `row_totals` are what they may keep, per head.
        """
        rows = zip(row_totals, row_lengths, strict=True)
        return [total >= self.num_layers * length for total, length in rows]

    def take(
        self, priority: torch.Tensor, row_present: list[int], row_totals: list[int], state: "LayerState", depth: int
    ) -> list[int]:
        """
        How many tokens each head of a layer keeps on average, for each row. All layers ask in turn, if one row does
        not fit.

        Args:
            priority (`torch.Tensor`): `(batch, kv_heads, tokens)` float32, -inf for what is no token.
            row_present (`list[int]`): How many tokens each row holds.
            row_totals (`list[int]`): See `fits`.
            state (`LayerState`): Of the layer, which knows what it would keep on its own, and how many tokens every
                head keeps.
            depth (`int`): The rank of the layer.
        """
        if depth == 0:
            self.forget()
            self.left = list(row_totals)
        device = self.scores[0].device if self.scores else priority.device
        self.scores.append(numbered(priority).view(priority.shape[0], -1).to(device))
        num_layers, kept, protected = self.num_layers - depth, [], state.row_protected
        fits = self.fits(row_totals, state.row_lengths)
        for row, present in enumerate(row_present):
            if fits[row]:
                kept.append(state.row_kept[row])
                continue
            own = max([1, *protected[row : row + 1]])
            most = max(min(self.left[row] - own * (num_layers - 1), present), own)
            if num_layers > 1:
                scores = torch.cat([each[row] for each in self.scores])
                num_best = int((scores > float("-inf")).sum() * min(self.left[row] / (num_layers * present), 1))
                threshold = scores.topk(max(num_best, 1)).values[-1]
                count = int((self.scores[-1][row] >= threshold).sum()) // priority.shape[1]
                most = min(max(count, own), most)
            self.left[row] -= most
            kept.append(most)
        if num_layers == 1:
            self.forget()
        return kept


def numbered(priority: torch.Tensor) -> torch.Tensor:
    """Priorities in one dimension. NaN is the lowest that a token can have."""
    infinity = float("inf")
    return priority.flatten().nan_to_num(torch.finfo(priority.dtype).min, posinf=infinity, neginf=-infinity)
