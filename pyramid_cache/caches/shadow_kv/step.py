"""
The decode step of ShadowKV. In it are the choice of chunks, their way into the slots, and attention. Between steps,
full chunks of the tail move to the shadow, in place if the step is part of a graph.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from pyramid_cache.caches.shadow_kv.host import join
from pyramid_cache.caches.shadow_kv.landmarks import band_matrix, probe_of
from pyramid_cache.caches.shadow_kv.store import ShadowState, ShadowStore
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep, attend_to_slots
from pyramid_cache.ops import shadow_reference
from pyramid_cache.ops.shadow import (
    gather_values_unchecked,
    plan_chunks_unchecked,
    reconstruct_keys_unchecked,
    select_chunks_unchecked,
)


if TYPE_CHECKING:
    from pyramid_cache.caches.shadow_kv.layer import ShadowKVLayer


class Views(NamedTuple):
    """What a step reads of larger tensors, and writes to them."""

    keys: torch.Tensor  # of the slots that steps exchange, (batch, kv_heads, places * chunk_size, head_dim)
    values: torch.Tensor
    positions: torch.Tensor  # (batch, kv_heads, places, chunk_size)
    landmarks: torch.Tensor  # of the chunks of the shadow
    is_selectable: torch.Tensor


class ShadowStep(FixedStep):
    """
    The step of a `ShadowKVLayer` with slots. In a graph, the shadow has room for all tokens that will move there. If
    more come its tensors grow, and the step is compiled anew.
    """

    layer: "ShadowKVLayer"
    state: ShadowState
    store: ShadowStore

    def __init__(self, layer: "ShadowKVLayer", in_graph: bool = False, was_dense: bool = False) -> None:
        super().__init__(layer, in_graph)
        state, self.shadow, self.was_dense = self.state, layer.shadow, was_dense
        device, self.chunk_size = state.keys.device, layer.settings.chunk_size
        if in_graph:
            self.begin_counting()
        self.offsets = torch.arange(self.chunk_size, device=device)
        self.frequencies = self.shadow.rotary.inv_freq.to(device)
        self.is_interleaved = self.shadow.rotary.layout == "interleaved"
        dtype, head_dim = state.keys.dtype, state.keys.shape[3]
        self.bands = band_matrix(head_dim, self.shadow.num_bands, dtype, device)
        # Where rows ask for fewer chunks than others: which places they have.
        self.is_place: torch.Tensor | None = None
        if min(state.row_sparse) < state.held_chunks.shape[-1]:
            places = torch.arange(state.held_chunks.shape[-1], device=device)
            self.is_place = places < self.store.per_row(state.row_sparse)
        # Where some rows are exact: which ones are not.
        self.has_shadow = None if all(state.row_shadow) else self.store.per_row(state.row_shadow)[..., None] > 0
        self.query: torch.Tensor | None = None
        self.scaling = layer.scaling
        if in_graph:
            self.query = state.keys.new_zeros(layer.batch_size, layer.num_query_heads, 1, head_dim)
        self._plan()

    def _plan(self) -> None:
        """Works out what stays the same until tokens move to the shadow, so that steps need not ask for it."""
        self.num_steps_left = self.layer.num_steps_left
        # Whether some slots that attention sees are empty.
        self.has_gaps = self.in_graph or self.state.has_empty_slots
        # Compilers see that views share memory where they are made.
        self.views = None if self.in_graph else self._views()

    def _views(self) -> Views:
        state, sparse = self.state, self.store.sparse_slots
        num_chunks = state.landmarks.shape[2] if self.in_graph else self.shadow.num_chunks
        return Views(
            state.keys[:, :, sparse],
            state.values[:, :, sparse],
            state.positions[:, :, sparse].unflatten(2, (-1, self.chunk_size)),
            state.landmarks[:, :, :num_chunks],
            state.is_selectable[:, :, :num_chunks],
        )

    @property
    def num_slots(self) -> int:
        return self.state.keys.shape[2]

    def own_tensors(self) -> dict[str, torch.Tensor]:
        names = "offsets", "frequencies", "bands", "is_place", "has_shadow", "query"
        own = {name: getattr(self, name) for name in names}
        return super().own_tensors() | {name: tensor for name, tensor in own.items() if tensor is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {"values on the host": self.shadow.values.seen}

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state
        self.put_behind(key, value)
        stop = None if self.in_graph else state.length + 1
        return state.keys[:, :, :stop], state.values[:, :, :stop]

    def take_back(self) -> None:
        if self.in_graph:
            self.take_back_behind()
        else:
            self.state.positions[:, :, self.state.length] = -1

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = self.state
        if self.in_graph:
            self.query.copy_(call.query)
        else:
            self.query = call.query
        state.next_position.add_(1)
        if state.landmarks.shape[2]:
            self.fetch(call.query)
        mask = state.positions[:, :, : call.num_keys] >= 0 if self.has_gaps else None
        return attend_to_slots(call, mask, None, False)[0], None

    def fetch(self, query: torch.Tensor | None) -> None:
        """See `ShadowKVLayer.fetch`."""
        held, shadow, size = self.state.held_chunks, self.shadow, self.chunk_size
        views, num_places = self._views() if self.views is None else self.views, held.shape[-1]
        if query is None:
            wanted = shadow.latest(num_places)
        else:
            wanted = self._select(query, num_places, views)
        if self.is_place is not None:
            wanted = torch.where(self.is_place, wanted, -1)
        # Compilers see what the reference computes.
        is_seen = self.in_graph and held.device.type == "cpu"
        incoming = shadow_reference.plan_chunks(held, wanted) if is_seen else plan_chunks_unchecked(held, wanted)
        if self.in_graph:
            gather_values_unchecked(views.values, shadow.values.seen, incoming, size)
        else:
            shadow.values.load(views.values, incoming, size)
        low_rank = self.state.factors, self.state.basis, incoming, self.frequencies
        reconstruct_keys_unchecked(views.keys, *low_rank, self.is_interleaved, size)
        if not self.in_graph:
            join(held.device)
        # Places of no chunk have numbers below zero.
        positions = torch.add(self.offsets, held[..., None], alpha=size).clamp(min=-1)
        if self.has_shadow is not None:
            positions = torch.where(self.has_shadow, positions, views.positions)
        views.positions.copy_(positions)

    def _select(self, query: torch.Tensor, num_chunks: int, views: Views) -> torch.Tensor:
        """
        The chunks `(batch, kv_heads, num_chunks)` int64 that a query `(batch, heads, 1, head_dim)` attends to most, -1
        for none.
        """
        probe, scales = probe_of(query, self.bands), self.state.landmark_scales
        if scales is not None:
            probe = (probe * scales.repeat_interleave(query.shape[1] // scales.shape[1], dim=1)).to(query.dtype)
        # The reference is the op on all devices.
        select = shadow_reference.select_chunks if self.in_graph else select_chunks_unchecked
        return select(probe, views.landmarks, views.is_selectable, num_chunks, self.scaling)

    def settle(self) -> None:
        state = self.state
        state.num_croppable += 1
        state.length += 1
        self.num_steps_left -= 1
        if self.num_steps_left < 1:
            self._move_tail()

    def _move_tail(self) -> None:
        """Moves the tail to the shadow, and brings chunks that the last query may attend to again into the slots."""
        state, before = self.state, self.state.tensors("row") if self.in_graph else {}
        has_moved = self.layer.move_tail()
        self._restore(before)
        if self.has_shadow is not None:
            self.has_shadow.copy_(self.store.per_row(state.row_shadow)[..., None] > 0)
        if self.in_graph:
            self.cursor.fill_(state.length)
        self._plan()
        if has_moved:
            self.fetch(self.query)

    def _restore(self, before: dict[str, torch.Tensor]) -> None:
        """What is in new tensors goes into those `before`, which the graph reads, or stays there if it is larger."""
        for name, tensor in before.items():
            new = getattr(self.state, name)
            if new is not tensor and new.shape == tensor.shape:
                setattr(self.state, name, tensor.copy_(new))
        if self.in_graph:
            self.shadow.values.show()
            for tensor in self.tensors().values():
                torch._dynamo.mark_static_address(tensor, guard=False)

    def release(self) -> None:
        state, self.shadow.values.seen = self.state, None
        if self.was_dense and not any(state.row_shadow) and state.length == state.num_seen:
            has_padding = any(length < state.num_seen for length in state.row_lengths)
            state.column_positions = state.positions[:, :1, : state.length].contiguous() if has_padding else None
            state.positions = None
            self.shadow.end()
