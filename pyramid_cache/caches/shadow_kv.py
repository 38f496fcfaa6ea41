"""
ShadowKV of Sun et al., 2024 (https://arxiv.org/abs/2410.21465).

Nothing is evicted. Before RoPE, the keys of a layer have low rank: their factors stay on the device, and values move
to the host. Each chunk of tokens has a landmark: the mean of its keys and how far they spread around it. A step
attends to the chunks whose landmarks score highest: it rebuilds their keys and fetches their values. The latest tokens
and the outliers, the chunks that their mean represents worst, stay exact on the device.

Departures from the authors' code: the basis comes from an eigendecomposition of the keys' Gram matrix, and is fitted
again when later turns bring tokens. Generated tokens move to the shadow as prompt tokens do; theirs has room for 57 to
128 of them, and silently loses the rest. Later turns attend to everything, with keys rebuilt and values fetched for
one layer at a time; theirs treats up to 4,096 tokens as one decode step. Rows of a batch may have different lengths.
Their landmarks are means, which hide a single key that is unlike the others of its chunk. The spread beside the mean
shows it, as the bounds of Quest do (https://arxiv.org/abs/2406.10774), and takes less room.
"""

import copy
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import floor_of_product, is_number, read_count
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.host import beside, fetch_values, join, read_host, wait_for_host
from pyramid_cache.engine.landmarks import landmarks_of, probe_of
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace, grown
from pyramid_cache.engine.low_rank import TOKENS_PER_BLOCK, add_keys
from pyramid_cache.engine.quantization import QUANTIZE, add_scaled, stored
from pyramid_cache.engine.rope import (
    FREQUENCY_TENSORS,
    RotaryFrequencies,
    SharedFrequencies,
    export_frequencies,
    import_frequencies,
    refuse_unsupported_rope,
)
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.sizes import with_room, with_size, write_rows
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.registration import needs_gradients
from pyramid_cache.ops.shadow import plan_chunks, reconstruct_keys, select_chunks


class ShadowKVLayer(CompressedLayer):
    """
    One layer of `ShadowKVCache`. The slots are `num_outlier_chunks` chunks, then `num_sparse_chunks` chunks that steps
    exchange, then the tail. A row whose tokens all fit is exact: they are in the slots as they came, whatever other
    rows do. Of a longer one the first `row_shadow` tokens are in the shadow, the others in the tail, and the slots
    before it hold some of the shadow's chunks; chunk `c` is its tokens `c * chunk_size` to `(c + 1) * chunk_size - 1`.
    In the shadow:

    - `factors` `(batch, tokens, rank)` and `basis` `(batch, kv_heads, rank, head_dim)`, whose product is the keys
      before RoPE;
    - `host_values` `(batch, kv_heads, tokens, value_dim)`, on the host;
    - `landmarks` `(batch, kv_heads, chunks, head_dim + num_bands)`, of `landmarks_of`, and `is_selectable`
      `(batch, kv_heads, chunks)` bool, False for outliers and for what is no chunk;
    - `held_chunks` `(batch, kv_heads, num_sparse_chunks)` int64, which chunk each place holds, -1 for none;
    - `outlier_chunks` `(batch, kv_heads, num_outlier_chunks)` int64, -1 for none, and `outlier_cosines` float32, the
      lowest cosine of a key of the chunk and their mean.
    """

    row_tensors = (
        *("next_position", "column_positions", "factors", "basis", "landmarks", "is_selectable"),
        *("held_chunks", "outlier_chunks", "outlier_cosines", "landmark_scales"),
    )
    row_counts = (*CompressedLayer.row_counts, "row_shadow", "row_sparse")
    state_numbers = (*CompressedLayer.state_numbers, "num_croppable")
    extra_tensors = ("host_values", *FREQUENCY_TENSORS)
    heads_share_positions = False
    evicts = False

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        settings: dict[str, Any],
        frequencies: SharedFrequencies,
    ) -> None:
        self.sparse_budget: int | float = settings["budget"]
        self.rank: int | float = settings["rank"]
        self.chunk_size: int = settings["chunk_size"]
        self.num_spread_bands: int = settings["num_spread_bands"]
        self.num_outlier_chunks: int = settings["num_outlier_chunks"]
        self.num_local_tokens: int = settings["num_local_tokens"]
        self.offload_interval: int = settings["offload_interval"]
        self.quantize: str | None = settings["quantize"]
        self.host = read_host(settings["host"], settings["host_budget"], place.num_layers)
        self.frequencies = frequencies
        super().__init__(place, None, masks)

    def _clear(self) -> None:
        super()._clear()
        self.row_shadow: list[int] = []
        self.row_sparse: list[int] = []  # chunks of the shadow that a step of the row attends to
        self.num_croppable = 0  # columns of which it is known which rows have a token there
        self.host_values: torch.Tensor | None = None
        self.rotary: RotaryFrequencies | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of factors and landmarks."""
        return self.dtype if self.quantize is None else QUANTIZE[self.quantize]

    # Sizes.

    @property
    def num_bands(self) -> int:
        """At most one for each two dimensions."""
        return min(self.num_spread_bands, -(-self._key_shape[1] // 2))

    def num_sparse_chunks_of(self, row_length: int) -> int:
        """How many chunks a step attends to beside outliers and tail."""
        budget = self.sparse_budget
        num_tokens = floor_of_product(budget, row_length) if isinstance(budget, float) else budget
        return max(-(-num_tokens // self.chunk_size), 1)

    @property
    def tail_capacity(self) -> int:
        """Slots for the latest tokens."""
        return self.num_local_tokens + self.offload_interval + self.chunk_size

    def num_tokens_to_keep(self, row_length: int) -> int:
        """Up to how many tokens a row is exact: with one more, which is attended to as well, the slots are full."""
        num_chunks = self.num_outlier_chunks + self.num_sparse_chunks_of(row_length)
        return num_chunks * self.chunk_size + self.tail_capacity - 1

    @property
    def num_sparse_chunks(self) -> int:
        """The largest chunk count of any row. It does not shrink before the next turn."""
        return max(self.row_sparse) if self.held_chunks is None else self.held_chunks.shape[-1]

    @property
    def num_chunk_slots(self) -> int:
        """Slots before the tail."""
        return (self.num_outlier_chunks + self.num_sparse_chunks) * self.chunk_size

    @property
    def max_slots(self) -> int:
        return max(self.row_kept) + 1 if self.positions is None else self.num_chunk_slots + self.tail_capacity

    @property
    def outlier_slots(self) -> slice:
        """The slots of what no landmark stands for well."""
        return slice(0, self.num_outlier_chunks * self.chunk_size)

    @property
    def sparse_slots(self) -> slice:
        """The slots that steps exchange."""
        return slice(self.outlier_slots.stop, self.num_chunk_slots)

    def num_movable(self, num_outside: int) -> int:
        """Of so many tokens outside of the shadow those that can move there: full chunks, but for the local tokens."""
        return max((num_outside - self.num_local_tokens) // self.chunk_size, 0) * self.chunk_size

    # Attention.

    def _take_in(self, seen: Tokens, num_new: int) -> Tokens:
        before = self.row_lengths
        tokens = super()._take_in(seen, num_new)
        # Padding in front of all else is where a row begins.
        begun = [length - earlier for length, earlier in zip(self.row_lengths, before, strict=True) if earlier]
        num_full = min(begun, default=num_new)
        self.num_croppable = self.num_croppable + num_new if num_full == num_new else num_full
        sparse = [self.num_sparse_chunks_of(length) for length in self.row_lengths]
        if self.positions is not None and max(sparse) != self.num_sparse_chunks:
            self._resize_sparse(max(sparse))
        self.row_sparse = sparse
        return tokens

    def _check_call(self, call: AttentionCall) -> None:
        super()._check_call(call)
        if self.positions is not None and needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                "Gradients do not pass through keys that are rebuilt and values that come from the host. Call the "
                "model under `torch.no_grad()`."
            )

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        output = call.run()
        if self.positions is not None or self.must_evict:
            self.require_left_padding(tokens)
            self._absorb_turn(call, tokens)
        return output

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.num_croppable += 1
        if self.positions is None:
            output = call.run()
            if self.must_evict:
                self._absorb_turn(call, self.column_tokens)
            return output
        arguments = call.logit_arguments
        self._fetch(call.query, arguments["scaling"])
        output = decode_attention(call.query, call.key, call.value, mask=self.slot_mask(), **arguments)[0], None
        if self._move_tail():
            self._fetch(call.query, arguments["scaling"])  # which may be attended to again
        return output

    @torch.no_grad()
    def _fetch(self, query: torch.Tensor, scaling: float) -> None:
        """Brings the chunks that a query `(batch, heads, 1, head_dim)` attends to most into the slots."""
        num_chunks = max(self.row_shadow) // self.chunk_size
        if not num_chunks:
            return
        probe = probe_of(query, self.num_bands)
        if self.landmark_scales is not None:
            group = query.shape[1] // self.landmarks.shape[1]
            probe = (probe * self.landmark_scales.repeat_interleave(group, dim=1)).to(query.dtype)
        wanted = select_chunks(
            probe,
            self.landmarks[:, :, :num_chunks],
            num_chunks=self.num_sparse_chunks,
            scaling=scaling,
            mask=self.is_selectable[..., :num_chunks],
        )
        self._bring(wanted)

    def _fetch_latest(self) -> None:
        """Brings the latest chunks into the slots, which a query is free to exchange."""
        num_chunks = max(self.row_shadow) // self.chunk_size
        if not num_chunks:
            return
        index = torch.arange(num_chunks, device=self.device)
        chunks = torch.where(self.is_selectable[..., :num_chunks], index, -1).sort(dim=-1, descending=True).values
        missing = max(self.num_sparse_chunks - num_chunks, 0)
        self._bring(torch.nn.functional.pad(chunks[..., : self.num_sparse_chunks], (0, missing), value=-1))

    def _bring(self, wanted: torch.Tensor) -> None:
        """
        Brings chunks `(batch, kv_heads, num_sparse_chunks)` int64 into the slots, -1 for none, of each row its first
        ones.
        """
        num_tokens, sparse = max(self.row_shadow), self.sparse_slots
        if min(self.row_sparse) < self.num_sparse_chunks:
            ranks = torch.arange(wanted.shape[-1], device=self.device)
            wanted = wanted.masked_fill(ranks >= self.per_row(self.row_sparse), -1)
        incoming = plan_chunks(self.held_chunks, wanted)
        with beside(self.device):
            fetch_values(
                self.values[:, :, sparse], self.host_values[:, :, :num_tokens], incoming, chunk_size=self.chunk_size
            )
        reconstruct_keys(
            self.keys[:, :, sparse],
            self.factors[:, :num_tokens],
            self.basis,
            incoming,
            self._ranks(num_tokens),
            self._inverse_frequencies(),
            chunk_size=self.chunk_size,
            interleaved=self.rotary is not None and self.rotary.layout == "interleaved",
        )
        join(self.device)
        held = self._tokens_of(self.held_chunks)
        self.positions[..., sparse] = held if all(self.row_shadow) else self._where_shadow(held, sparse)

    def _where_shadow(self, positions: torch.Tensor, slots: slice) -> torch.Tensor:
        """These positions in rows that have a shadow, what the slots hold in those that are exact."""
        return torch.where(self.per_row(self.row_shadow) > 0, positions, self.positions[..., slots])

    def _ranks(self, num_tokens: int) -> torch.Tensor:
        """`(batch, num_tokens)` int32: the rank of each token in the shadow."""
        return torch.arange(num_tokens, dtype=torch.int32, device=self.device).expand(self.batch_size, -1)

    def _inverse_frequencies(self) -> torch.Tensor:
        """
        What keys are turned by, `(rotary_dim / 2,)`. Any frequencies would do as long as keys are turned back and
        forth by the same: those of the model are the ones that make them of low rank.
        """
        if self.rotary is None:
            return torch.zeros(0, device=self.device)
        return self.rotary.inv_freq.to(self.device)

    def _tokens_of(self, chunks: torch.Tensor) -> torch.Tensor:
        """The tokens `(batch, kv_heads, chunks * chunk_size)` int32 of chunks, -1 for those of none."""
        offsets = torch.arange(self.chunk_size, device=chunks.device)
        tokens = chunks[..., None] * self.chunk_size + offsets
        return tokens.masked_fill(chunks[..., None] < 0, -1).flatten(2).int()

    # From the slots to the shadow.

    @torch.no_grad()
    def _absorb_turn(self, call: AttentionCall, tokens: Tokens) -> None:
        """What follows several tokens: rows that have a shadow, or are too long now to be exact, take them into it."""
        if self.rotary is None:
            self.rotary = self.frequencies.frequencies_of(call.module, self.device)
        if self.positions is None:
            self._make_shadow(call.key, call.value)
        num_shadow = max(self.row_shadow)
        moved = []
        for length, shadow, held, kept in zip(
            self.row_lengths, self.row_shadow, self.row_held, self.row_kept, strict=True
        ):
            moved.append(self.num_movable(length - shadow) if shadow or held > kept else 0)
        columns = tokens.positions[..., num_shadow:]
        refits = [count > 0 for count in moved]
        self._arrange(call.key[:, :, num_shadow:], call.value[:, :, num_shadow:], columns, moved, refits)
        self._fetch(call.query[:, :, -1:], call.logit_arguments["scaling"])

    @torch.no_grad()
    def _move_tail(self, at_once: bool = False) -> bool:
        """
        What follows a step: rows whose tail is full move it, and those whose slots are all full begin their shadow.
        Returns whether there are such rows; they do not hold yet what has moved.
        """
        if self.length < self.max_slots and all(self.row_shadow) and not at_once:
            return False
        moved, refits = [], []
        for length, shadow, held, kept in zip(
            self.row_lengths, self.row_shadow, self.row_held, self.row_kept, strict=True
        ):
            num_outside = length - shadow
            moves = (at_once or num_outside >= self.tail_capacity) if shadow else held > kept
            moved.append(self.num_movable(num_outside) if moves else 0)
            refits.append(moves and not shadow)
        if any(moved) or self.length == self.max_slots:
            self._arrange(*self._outside(), moved, refits)
        return any(moved)

    def _outside(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of keys, values and positions `(batch, 1, columns)` of what is not in the shadow."""
        slots = slice(self.num_chunk_slots if all(self.row_shadow) else 0, self.length)
        positions = self.positions[:, :1, slots].clone()
        if slots.start == 0:
            in_shadow = self.per_row(self.row_shadow) > 0
            positions[..., : self.num_chunk_slots].masked_fill_(in_shadow, -1)
        return self.keys[:, :, slots].clone(), self.values[:, :, slots].clone(), positions

    def _arrange(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, moved: list[int], refits: list[bool]
    ) -> None:
        """
        Moves tokens to the shadow and puts the others into the slots.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`, of all tokens that are not in the
                shadow.
            positions (`torch.Tensor`): `(batch, 1, columns)` int32, theirs, -1 for none.
            moved (`list[int]`): How many of each row move, its first ones.
            refits (`list[bool]`): Whether the basis of a row is fitted anew.
        """
        order = order_of(positions)
        if any(moved):
            indices = self._part_of(order, [0] * self.batch_size, moved)
            with torch.autocast(self.device.type, enabled=False):
                self._add(gather_tokens(key, indices), gather_tokens(value, indices), indices >= 0, moved, refits)
        self._fill_slots(key, value, positions, order, moved)

    def _fill_slots(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, order: torch.Tensor, starts: list[int]
    ) -> None:
        """Puts what is not in the shadow into the slots, of each row from its `starts`-th column in order on."""
        if self.keys.shape[2] < self.max_slots:  # as files have them
            self._resize(self.max_slots)
        counts = [length - shadow for length, shadow in zip(self.row_lengths, self.row_shadow, strict=True)]
        fronts = [0] * self.batch_size
        if not all(self.row_shadow):
            is_exact = self.per_row(self.row_shadow) == 0
            self.positions[..., : self.num_chunk_slots].masked_fill_(is_exact, -1)
            fronts = [
                0 if shadow else min(count, self.num_chunk_slots)
                for shadow, count in zip(self.row_shadow, counts, strict=True)
            ]
            indices = self._part_of(order, starts, fronts)
            front = slice(0, indices.shape[-1])
            for tensor, source in ((self.keys, key), (self.values, value)):
                tensor[:, :, front] = torch.where(
                    is_exact[..., None], gather_tokens(source, indices), tensor[:, :, front]
                )
            front_positions = gather_tokens(positions, indices).masked_fill(indices < 0, -1)
            self.positions[..., front] = torch.where(is_exact, front_positions, self.positions[..., front])
            starts = [start + count for start, count in zip(starts, fronts, strict=True)]
        tails = [count - front for count, front in zip(counts, fronts, strict=True)]
        indices = self._part_of(order, starts, tails)
        tail = slice(self.num_chunk_slots, self.num_chunk_slots + indices.shape[-1])
        self.keys[:, :, tail], self.values[:, :, tail] = gather_tokens(key, indices), gather_tokens(value, indices)
        self.positions[..., tail.start :] = -1
        self.positions[..., tail] = gather_tokens(positions, indices).masked_fill(indices < 0, -1)
        self.length = tail.stop
        self.row_held = [
            min(shadow // self.chunk_size, self.num_outlier_chunks + sparse) * self.chunk_size + front + rest
            for shadow, sparse, front, rest in zip(self.row_shadow, self.row_sparse, fronts, tails, strict=True)
        ]

    def _part_of(self, order: torch.Tensor, starts: list[int], counts: list[int]) -> torch.Tensor:
        """
        Of indices `(batch, 1, tokens)` those of `counts` tokens from `starts` on; -1 behind the last of a shorter row.
        """
        offsets = torch.arange(max(counts), device=order.device)
        indices = (self.per_row(starts) + offsets).clamp(max=order.shape[-1] - 1)
        return order.gather(-1, indices.long()).masked_fill(offsets >= self.per_row(counts), -1)

    # The shadow.

    def _make_shadow(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """A shadow that holds nothing, and slots that hold nothing."""
        batch_size, kv_heads, _, head_dim = key.shape
        num_outliers, places = self.num_outlier_chunks, (batch_size, kv_heads)
        self.row_shadow = [0] * batch_size
        self.column_positions = None
        num_slots = self.num_chunk_slots + self.tail_capacity
        self.keys, self.values = (tensor.new_zeros(*places, num_slots, tensor.shape[-1]) for tensor in (key, value))
        self.positions = torch.full((*places, num_slots), -1, dtype=torch.int32, device=self.device)
        self.held_chunks = torch.full((*places, self.num_sparse_chunks), -1, device=self.device)
        self.outlier_chunks = torch.full((*places, num_outliers), -1, device=self.device)
        self.outlier_cosines = torch.full((*places, num_outliers), float("inf"), device=self.device)
        self.factors = torch.zeros(batch_size, 0, 0, dtype=self.stored_dtype, device=self.device)
        self.basis = key.new_zeros(*places, 0, head_dim)
        width = head_dim + self.num_bands
        self.landmarks = torch.zeros(*places, 0, width, dtype=self.stored_dtype, device=self.device)
        if self.quantize is not None:
            self.landmark_scales = torch.ones(*places, 1, width, device=self.device)
        self.is_selectable = torch.zeros(*places, 0, dtype=torch.bool, device=self.device)
        self.host_values = self._host_zeros((*places, 0, value.shape[-1]))

    def _resize_sparse(self, num_sparse_chunks: int) -> None:
        """Slots for that many chunks that steps exchange, which hold none yet; outliers stay, the tail does not."""
        num_outlier_slots = self.outlier_slots.stop
        self.held_chunks = self.outlier_chunks.new_full((*self.outlier_chunks.shape[:2], num_sparse_chunks), -1)
        num_slots = num_outlier_slots + num_sparse_chunks * self.chunk_size + self.tail_capacity
        for name in self.slot_tensors:
            kept = getattr(self, name)[:, :, :num_outlier_slots]
            setattr(self, name, grown(kept, num_outlier_slots, num_slots, -1 if name == "positions" else 0))

    def _add(
        self, key: torch.Tensor, value: torch.Tensor, is_token: torch.Tensor, counts: list[int], refits: list[bool]
    ) -> None:
        """
        Takes full chunks into the shadow, and chooses the outliers anew.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
            is_token (`torch.Tensor`): `(batch, 1, tokens)`, False behind the `counts` tokens of a shorter row.
            refits (`list[bool]`): Whether the basis of a row is fitted anew.
        """
        self._add_factors(key, is_token, counts, refits)
        self._add_values(value, counts)
        chunks = key.unflatten(2, (-1, self.chunk_size)).float()  # (batch, kv_heads, chunks, chunk_size, head_dim)
        landmarks = landmarks_of(chunks, self.num_bands)
        means = landmarks[..., : chunks.shape[-1]]
        cosines = torch.cosine_similarity(chunks, means[..., None, :], dim=-1).amin(dim=-1).nan_to_num(nan=-1.0)
        if self.chunk_size == 1:  # each stands for itself, but for rounding
            cosines = torch.ones_like(cosines)
        is_chunk = is_token[..., :: self.chunk_size]
        landmarks = landmarks.masked_fill(~is_chunk[..., None], 0)
        cosines = cosines.masked_fill(~is_chunk, float("inf"))
        if self.quantize is not None:
            self.landmarks, self.landmark_scales, landmarks = add_scaled(
                self.landmarks, self.landmark_scales, landmarks, refits
            )
        first, num_chunks = (
            [number // self.chunk_size for number in numbers] for numbers in (self.row_shadow, counts)
        )
        stops = self._stops(counts)
        self.landmarks = with_room(self.landmarks, 2, max(stops) // self.chunk_size)
        write_rows(self.landmarks, stored(landmarks, self.stored_dtype), first, num_chunks)
        self._choose_outliers(key, value, cosines)
        self.row_shadow = stops
        self.is_selectable = self._selectable(self.landmarks.shape[2])

    def _stops(self, counts: list[int]) -> list[int]:
        """Where the shadow of each row ends with so many tokens more."""
        return [start + count for start, count in zip(self.row_shadow, counts, strict=True)]

    def _selectable(self, num_chunks: int) -> torch.Tensor:
        """`(batch, kv_heads, num_chunks)` bool: which of these chunks there are, without the outliers."""
        index = torch.arange(num_chunks, device=self.device)
        exists = index < self.per_row(self.row_shadow) // self.chunk_size
        return exists & ~(self.outlier_chunks[..., None] == index).any(dim=2)

    def _add_values(self, value: torch.Tensor, counts: list[int]) -> None:
        """Copies values to the host, behind those that are there, while the device goes on."""
        num_tokens = max(self._stops(counts))
        if num_tokens > self.host_values.shape[2]:
            wait_for_host(self.device)
            self.host_values = with_room(self.host_values, 2, num_tokens, self._host_zeros)
        with beside(self.device, value):
            write_rows(self.host_values, value, self.row_shadow, counts)

    def _host_zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for values on the host."""
        return self.host.zeros(shape, self._value_dtype, self.device)

    def _add_factors(self, key: torch.Tensor, is_token: torch.Tensor, counts: list[int], refits: list[bool]) -> None:
        """
        Projects keys onto the basis, which is first fitted to them and to the tokens held so far in rows that ask for
        it.
        """
        kv_heads, head_dim = self._key_shape
        starts = self.row_shadow
        positions = self.per_row(starts) + torch.arange(key.shape[2], device=self.device)
        blocks = [slice(start, start + TOKENS_PER_BLOCK) for start in range(0, key.shape[2], TOKENS_PER_BLOCK)]

        def unrotated(block: slice) -> torch.Tensor:  # (batch, tokens, kv_heads * head_dim)
            keys = key[:, :, block].float()
            if self.rotary is not None:
                keys = self.rotary.rotate(keys, -self._angles(positions[..., block]))
            return keys.masked_fill(~is_token[..., block, None], 0).transpose(1, 2).flatten(2)

        self.factors, basis, factors = add_keys(
            lambda: map(unrotated, blocks),
            self.factors,
            self.basis.transpose(1, 2).flatten(2),
            self.rank,
            refits,
        )
        self.basis = basis.unflatten(2, (kv_heads, head_dim)).transpose(1, 2).contiguous()
        self.factors = with_room(self.factors, 1, max(self._stops(counts)))
        write_rows(self.factors, factors, starts, counts)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """By how much keys at these positions are turned, as `reconstruct_keys` turns them."""
        return (positions[..., None].float() * self._inverse_frequencies()).double()

    def _choose_outliers(self, key: torch.Tensor, value: torch.Tensor, cosines: torch.Tensor) -> None:
        """Of the outliers so far and of new chunks those that their means stand for worst stay exact."""
        slots = self.outlier_slots
        first = self.per_row(self.row_shadow) // self.chunk_size
        chunks = (first + torch.arange(cosines.shape[-1], device=self.device)).expand_as(cosines)
        cosines = torch.cat([self.outlier_cosines, cosines], dim=-1)
        chunks = torch.cat([self.outlier_chunks, chunks], dim=-1)
        # Of equal cosines the older chunk.
        chosen = cosines.sort(dim=-1, stable=True).indices[..., : self.num_outlier_chunks]
        self.outlier_cosines = cosines.gather(-1, chosen)
        self.outlier_chunks = chunks.gather(-1, chosen).masked_fill(self.outlier_cosines.isinf(), -1)
        index = chosen[..., None] * self.chunk_size + torch.arange(self.chunk_size, device=self.device)
        for tensor, new in ((self.keys, key), (self.values, value)):
            candidates = torch.cat([tensor[:, :, slots], new], dim=2)
            tensor[:, :, slots] = gather_tokens(candidates, index.flatten(2))
        self.positions[..., slots] = self._tokens_of(self.outlier_chunks)
        # A chunk is not attended to twice.
        is_outlier = (self.held_chunks[..., None] == self.outlier_chunks[..., None, :]).any(dim=-1)
        self.held_chunks.masked_fill_(is_outlier, -1)
        self.positions[..., self.sparse_slots] = self._tokens_of(self.held_chunks)

    # Several tokens: all that was seen, for one layer at a time.

    def _sorted_slots(self) -> dict[str, torch.Tensor]:
        """
        All tokens: keys that are rebuilt, or exact where those are held, and values from the host; then the others.
        """
        num_tokens = max(self.row_shadow)
        with torch.autocast(self.device.type, enabled=False):
            keys = self.factors[:, None, :num_tokens].float() @ self.basis.float()
        ranks = self._ranks(num_tokens)[:, None]
        if self.rotary is not None:
            keys = self.rotary.rotate(keys, self._angles(ranks))
        # One place more, for slots of no outlier.
        keys = with_size(keys.to(self.dtype), 2, num_tokens + 1)
        places = self._tokens_of(self.outlier_chunks).long()
        index = torch.where(places < 0, num_tokens, places)[..., None].expand(-1, -1, -1, keys.shape[3])
        keys.scatter_(2, index, self.keys[:, :, self.outlier_slots])
        join(self.device)
        values = self.host_values[:, :, :num_tokens].to(self.device)
        positions = ranks.masked_fill(ranks >= self.per_row(self.row_shadow), -1)
        shadow = (keys[:, :, :num_tokens], values, positions)
        return {
            name: torch.cat(parts, dim=2)
            for name, *parts in zip(self.slot_tensors, shadow, self._outside(), strict=True)
        }

    def _take_slots(self) -> dict[str, torch.Tensor]:
        return self._sorted_slots()

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        tokens = super()._behind_slots(seen, slot_positions, num_new)
        return replace(tokens, row_present=list(seen.row_lengths))

    # What `generate` asks of any layer.

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return True

    def _crop_held(self, num_columns: int) -> None:
        self.num_croppable = max(self.num_croppable - num_columns, 0)
        if self.positions is None:
            super()._crop_held(num_columns)
            return
        key, value, positions = self._sorted_slots().values()
        self.num_seen -= num_columns
        self.row_lengths = [max(length - num_columns, 0) for length in self.row_lengths]
        self.next_position = self.per_row(self.row_lengths)
        # Rows of which tokens in the shadow go begin it anew with those that stay, or are exact if these fit.
        cut = [length < shadow for length, shadow in zip(self.row_lengths, self.row_shadow, strict=True)]
        moved = [
            self.num_movable(length) if is_cut and length > kept else 0
            for length, kept, is_cut in zip(self.row_lengths, self.row_kept, cut, strict=True)
        ]
        self.row_shadow = [0 if is_cut else shadow for shadow, is_cut in zip(self.row_shadow, cut, strict=True)]
        goes = (positions >= self.next_position) | (positions < self.per_row(self.row_shadow))
        self._forget_shadow(self.per_row(cut) > 0)
        self._arrange(key, value, positions.masked_fill(goes, -1), moved, [count > 0 for count in moved])
        self._fetch_latest()

    def _forget_shadow(self, is_cut: torch.Tensor) -> None:
        """Empties the shadow of some rows, `(batch, 1, 1)` bool."""
        for name in ("factors", "landmarks"):  # which would count for the next basis and scales
            numbers = getattr(self, name)
            mask = is_cut.view(-1, *[1] * (numbers.dim() - 1))
            setattr(self, name, torch.where(mask, torch.zeros_like(numbers), numbers))
        self.is_selectable = self.is_selectable & ~is_cut
        self.held_chunks.masked_fill_(is_cut, -1)
        self.outlier_chunks.masked_fill_(is_cut, -1)
        self.outlier_cosines.masked_fill_(is_cut, float("inf"))

    def require_croppable(self, tokens_to_remove: int) -> None:
        super().require_croppable(tokens_to_remove)
        num_columns = -tokens_to_remove - (self.get_seq_length() - self.num_seen)
        if self.positions is not None and num_columns > self.num_croppable:
            raise NotImplementedError(
                f"`crop({tokens_to_remove})`: {num_columns} columns back some rows have padding in a later turn, and "
                "which it is is no longer known. Take back at most "
                f"{-tokens_to_remove - num_columns + self.num_croppable}."
            )

    def compress(self) -> None:
        if self.positions is not None and self._move_tail(at_once=True):
            self._fetch_latest()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.host_values is not None:
            # Which rows it takes, and from where: values stay on the host.
            rows = function(torch.arange(self.host_values.shape[0], device=self.device)).to("cpu")
            if self.host_values.is_inference() or rows.tolist() != list(range(self.host_values.shape[0])):
                self.host_values = self._host_copy(rows)
        super()._map_rows(function)

    def _host_copy(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The values on the host, of rows `(rows,)` if they are given, in memory of the same kind."""
        wait_for_host(self.device)
        num_rows = self.host_values.shape[0] if rows is None else rows.shape[0]
        result = self._host_zeros((num_rows, *self.host_values.shape[1:]))
        if rows is None:
            return result.copy_(self.host_values)
        return torch.index_select(self.host_values, 0, rows, out=result)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShadowKVLayer":
        if self.host_values is not None:  # a plain copy would be neither pinned nor in a file
            memo[id(self.host_values)] = self._host_copy()
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin

    # Files.

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        numbers, tensors = super().export_state()
        numbers["rotary"], frequencies = export_frequencies(self.rotary)
        if self.positions is None:
            return numbers, tensors | frequencies
        num_tokens = max(self.row_shadow)
        num_chunks = num_tokens // self.chunk_size
        tensors["factors"] = self.factors[:, :num_tokens]
        tensors["landmarks"] = self.landmarks[:, :, :num_chunks]
        tensors["is_selectable"] = self.is_selectable[..., :num_chunks]
        wait_for_host(self.device)
        return numbers, tensors | frequencies | {"host_values": self.host_values[:, :, :num_tokens]}

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().import_state(numbers, tensors)
        rotary = import_frequencies(numbers["rotary"], tensors)
        self.rotary = None if rotary is None else self.frequencies.shared(rotary)
        values = tensors.get("host_values")
        if values is not None:
            self.host_values = self._host_zeros(tuple(values.shape))
            self.host_values.copy_(values)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        held = super().held_tensors()
        held |= {f"keys in {name}": held.pop(name) for name in ("factors", "basis", "landmarks") if name in held}
        if self.host_values is not None:
            held["host values"] = self.host_values
        return held | {f"frequencies_{index}": tensor for index, tensor in enumerate(self.frequencies.held_tensors())}


def order_of(positions: torch.Tensor) -> torch.Tensor:
    """The indices of tokens in order of their positions, those of none last."""
    return positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)


class ShadowKVCache(CompressedCache):
    """
    Evicts nothing: keys of low rank stay on the device, values go to the host, and each step attends to a few chunks
    of both (ShadowKV, https://arxiv.org/abs/2410.21465). The prompt is read with full attention, so the first new
    token is exact.

    Per row, a layer holds these bytes on the device (the paper's section 3.2, and the buffer that it leaves out):
    - factors: `tokens * rank * itemsize`;
    - basis: `kv_heads * rank * head_dim * itemsize`;
    - landmarks: `tokens / chunk_size * kv_heads * ((head_dim + num_spread_bands) * itemsize + 1)`;
    - slots, to which a step attends: `slots * kv_heads * (2 * head_dim * itemsize + 4)`, with `slots =
      num_outlier_chunks * chunk_size + budget + num_local_tokens + offload_interval + chunk_size`.

    On the host it holds `tokens * kv_heads * head_dim * itemsize` bytes. `cache.memory()` lists the host apart. Later
    turns attend to everything: keys are rebuilt and values fetched for one layer at a time, which takes that layer's
    full memory. `num_kept_tokens` and `positions` describe what a step attends to.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself. Give the model
            if it was cast with `model.to(torch.bfloat16)` after loading, which rounds its rotary frequencies too.
        budget (`int` or `float`, defaults to 2048): Tokens that a step attends to beside outliers and the latest
            tokens, or their share of the prompt. Larger values miss less and take more time. A prompt that fits into
            the slots is kept as it is, and the cache is `DynamicCache` bit for bit.
        rank (`int` or `float`, defaults to 160): Dimensions of keys before RoPE, over all heads of a layer, or the
            share of their sum of squares that is kept. With a share, each layer has its own rank. A few directions
            hold most of the sum: 0.99 is coarse and 0.999 fine. Larger values rebuild keys more exactly and take more
            memory.
        chunk_size (`int`, defaults to 8): Tokens that one landmark stands for. Larger values save memory and choose
            more coarsely.
        num_outlier_chunks (`int`, defaults to 48): Chunks of each KV head that stay exact: those that their mean
            represents worst.
        num_spread_bands (`int`, defaults to 4): Bands into which the dimensions of a head are cut, at most half as
            many as it has dimensions. A landmark has one spread per band. With 0 it is the mean alone, as in the
            paper, and steps miss single keys that are unlike their neighbours.
        num_local_tokens (`int`, defaults to 32): How many of the latest tokens stay exact at least.
        offload_interval (`int`, defaults to 32): Generated tokens that arrive before full chunks of them go to the
            host. Larger values take more memory and less time.
        quantize (`str`, *optional*): "int8" or "fp8" stores factors and landmarks in one byte a number.
        host (`str`, defaults to `"memory"`): Where values go. `"disk:PATH"` maps unnamed files in that folder, which
            must exist, for contexts that exceed the host's memory. The files vanish with the cache.
        host_budget (`int` or `str`, *optional*): Bytes that values of all layers may take there, such as "16GiB". What
            exceeds it is refused before anything is allocated.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed; at run time, for values
            that exceed `host_budget`.
        NotImplementedError: For a model whose rotary embedding depends on the length (dynamic NTK) or has several
            axes, at the first forward pass where the config does not tell. For gradients, once values are on the host.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import ShadowKVCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=2999
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = ShadowKVCache(model.config, budget=64, rank=16, num_outlier_chunks=4)
    >>> tokens = model.generate(torch.arange(2000)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (2007, [135, 135])
    >>> memory, full = cache.memory(), 2007 * 2 * 2 * 64 * 4  # layers, keys and values, width, bytes
    >>> sum(memory["cpu"].values()) / full < 0.3, memory["host"]["values"] / full < 0.5
    (True, True)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: int | float = 2048,
        *,
        rank: int | float = 160,
        chunk_size: int = 8,
        num_outlier_chunks: int = 48,
        num_spread_bands: int = 4,
        num_local_tokens: int = 32,
        offload_interval: int = 32,
        quantize: str | None = None,
        host: str = "memory",
        host_budget: int | str | None = None,
    ) -> None:
        config, model = config_and_model(config)
        check_decoder_config(config)
        refuse_unsupported_rope(config)
        settings = {
            "budget": read_share_or_count("budget", budget),
            "rank": read_share_or_count("rank", rank),
            "chunk_size": read_count("chunk_size", chunk_size, least=1),
            "num_outlier_chunks": read_count("num_outlier_chunks", num_outlier_chunks, least=0),
            "num_spread_bands": read_count("num_spread_bands", num_spread_bands, least=0),
            "num_local_tokens": read_count("num_local_tokens", num_local_tokens, least=0),
            "offload_interval": read_count("offload_interval", offload_interval, least=1),
            "quantize": quantize,
            "host": host,
            "host_budget": host_budget,
        }
        if quantize is not None and (not isinstance(quantize, str) or quantize not in QUANTIZE):
            raise ValueError(f"`quantize={quantize!r}` is unknown. Choose one of {sorted(QUANTIZE)}, or None.")
        self.frequencies = SharedFrequencies(config, None if model is None else weakref.ref(model))

        def build_layer(place: LayerPlace, masks: MaskReader) -> ShadowKVLayer:
            return ShadowKVLayer(place, masks, settings, self.frequencies)

        super().__init__(config, build_layer, settings)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | PreTrainedModel,
        *,
        device: torch.device | str | int | None = None,
        host: str | None = None,
        host_budget: int | str | None = None,
    ) -> "ShadowKVCache":
        """
        Reads a cache that `save` wrote; see `CompressedCache.load`. Values go where the saved cache had them.

        Args:
            path (`str` or `os.PathLike`): The file.
            config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model.
            device (`torch.device`, *optional*): Where the cache belongs.
            host (`str`, *optional*): Where values go instead, as the constructor takes it.
            host_budget (`int` or `str`, *optional*): Bytes they may take there. A `host` that is given comes with its
                own budget, or none.
        """
        if host is not None:
            return cls._load(path, config, device, host=host, host_budget=host_budget)
        return cls._load(path, config, device, **({} if host_budget is None else {"host_budget": host_budget}))

    def reset(self) -> None:
        self.frequencies.forget()
        super().reset()


def read_share_or_count(name: str, number: int | float) -> int | float:
    """A number of tokens or dimensions, or a share, as users write it."""
    if isinstance(number, Integral) and not isinstance(number, bool):
        return read_count(name, number, least=1)
    if not is_number(number) or not 0 < number <= 1:
        raise ValueError(f"`{name}={number!r}` must be a positive integer, or a share: a float from above 0 to 1.")
    return float(number)
