"""
The decode step of fixed shapes of a `RaggedStore`.

A new token goes to a slot behind the other latest ones, and attends to these and to the packed tokens. In a graph
where heads begin is a tensor, and evictions between steps move the tokens that stay to the front of the same tensors.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep, SlotStep


if TYPE_CHECKING:
    from pyramid_cache.engine.evicting import EvictingLayer
    from pyramid_cache.engine.ragged_store import RaggedStore


class RaggedStep(SlotStep):
    """
    The step of a layer whose heads hold different numbers of tokens. In a graph tokens are packed even if none has
    been evicted, until `release`.
    """

    store: "RaggedStore"
    evicts = False  # in the graph

    def __init__(self, layer: "EvictingLayer", in_graph: bool) -> None:
        FixedStep.__init__(self, layer, in_graph)
        store = self.store
        self.scores = layer.policy.window_size != 0
        self.window = layer.window() if layer.policy.window_size else None
        self.remember_columns()
        self.is_steady = False
        if store.packed is None:
            self.make_bias()
        store.pack_all()
        if in_graph:
            self.begin_counting()
            self._make_room()
        self.packed = store.packed
        self._make_slots()
        self._plan()

    def _make_room(self) -> None:
        """Makes the packed tensors as large as they will need to be."""
        layer, state, packed = self.layer, self.state, self.store.packed
        num_packed = [held - state.length for held in state.row_held]
        # Rows that are not all full are packed once more before each of them evicts.
        num_more = 0 if num_packed == state.row_kept else layer.eviction_interval - 1
        rows = zip(num_packed, state.row_kept, strict=True)
        row_sizes = [layer.layout.kv_heads * max(held, kept + num_more) for held, kept in rows]
        self.longest = max(row_sizes)
        tensors = {name: with_room(tensor, sum(row_sizes)) for name, tensor in packed.tensors.items()}
        self.store.packed = replace(packed, tensors=tensors)

    def _make_slots(self) -> None:
        self.store.resize(self.layer.eviction_interval)
        self.store.clear_behind(self.state.length)
        self.slots = self.state.tensors("slot")

    def _plan(self) -> None:
        if self.store.packed is not self.packed:
            self._repack()
        if not self.in_graph:
            self.longest = self.packed.longest
        super()._plan()

    def _repack(self) -> None:
        """Takes over the tokens that were packed anew, in a graph into the tensors that it knows."""
        store = self.store
        if not self.in_graph:
            self.packed = store.packed
            self._make_slots()
            return
        for name, tensor in store.packed.tensors.items():
            if name not in self.packed.tensors:
                raise ValueError(
                    f"`{name}` was remembered for the first time while steps have fixed shapes. Let the policy "
                    "remember it in `observe`."
                )
            self.packed.tensors[name][: len(tensor)] = tensor
        self.packed.starts.copy_(store.packed.starts)
        self.packed = store.packed = replace(store.packed, tensors=self.packed.tensors, starts=self.packed.starts)
        for name, tensor in self.slots.items():
            setattr(self.state, name, tensor)
        store.clear_behind(0)

    def own_tensors(self) -> dict[str, torch.Tensor]:
        return super().own_tensors() | self.packed.held_tensors()

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, state, packed = self.layer, self.state, self.packed
        state.next_position.add_(1)
        mask = state.positions >= 0 if self.in_graph else None
        output, *sums = packed.attend(call.query, self.longest, call.key, call.value, mask, **call.logit_arguments)
        if self.scores:
            if layer.policy.measure is not None:
                num_latest = call.num_keys if mask is None else mask.sum(dim=-1, keepdim=True)
                sums = packed.measured(sums, num_latest, partial(layer.measured, call))
            latest = state.attention[:, :, : call.key.shape[2]]
            packed.add_attention(latest, sums, self.window, lambda given, window: layer.mean_of(given, call, window))
        return output, None

    def release(self) -> None:
        store = self.store
        num_packed = sum(store.packed.row_sizes)
        tensors = {name: tensor[:num_packed] for name, tensor in store.packed.tensors.items()}
        store.packed = replace(store.packed, tensors=tensors)
        super().release()


def with_room(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Packed tokens with zeros behind them."""
    result = tensor.new_zeros(size, *tensor.shape[1:])
    result[: len(tensor)] = tensor
    return result
