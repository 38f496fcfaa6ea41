"""
ShadowKV of Sun et al., 2024 (https://arxiv.org/abs/2410.21465).

Nothing is evicted. Before RoPE the keys of a layer are of low rank: their factors stay on the device, and their values move
to the host. A step looks at the mean of each chunk of keys, its landmark, and attends to the chunks whose landmarks it
attends to most, for which keys are rebuilt and values fetched. Exact on the device remain the chunks that a landmark stands
for worst, the outliers, and the latest tokens.

Departures from the authors' code: the basis comes from an eigendecomposition of the keys' Gram matrix and is fitted again
when later turns bring tokens; generated tokens move to the shadow as the prompt's do (theirs has room for 57 to 128 of them,
and loses what comes then without a word); later turns attend to everything, with keys rebuilt and values fetched for one
layer at a time (theirs treats up to 4,096 tokens as one decode step); rows of a batch may have different lengths.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import floor_of_product, is_number, read_count
from pyramid_cache.engine.cache import CompressedCache, check_decoder_config, model_inside
from pyramid_cache.engine.host import read_host
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace, grown
from pyramid_cache.engine.low_rank import (
    TOKENS_PER_BLOCK,
    extended_gram,
    fit_basis,
    gram_matrix,
    project,
)
from pyramid_cache.engine.quantization import QUANTIZE, scale_of, stored, widened
from pyramid_cache.engine.rope import (
    FREQUENCY_TENSORS,
    RotaryFrequencies,
    SharedFrequencies,
    export_frequencies,
    import_frequencies,
    refuse_unsupported_rope,
)
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.registration import needs_gradients
from pyramid_cache.ops.shadow import gather_values, plan_chunks, reconstruct_keys, select_chunks


# What grows while an answer is generated grows by this part of its size.
GROWTH = 16


class ShadowKVLayer(CompressedLayer):
    """
    One layer of `ShadowKVCache`. Chunk `c` of a row is its tokens `c * chunk_size` to `(c + 1) * chunk_size - 1`; the first
    `row_shadow` tokens of a row are in the shadow, the others in the tail. The slots are `num_outlier_chunks` chunks, then
    `num_sparse_chunks` chunks that steps exchange, then the tail. In the shadow:

    - `factors` `(batch, tokens, rank)` and `basis` `(batch, kv_heads, rank, head_dim)`, whose product is the keys before RoPE;
    - `host_values` `(batch, kv_heads, tokens, value_dim)`, on the host;
    - `landmarks` `(batch, kv_heads, chunks, head_dim)`, and `is_selectable` `(batch, kv_heads, chunks)` bool, False for
      outliers and for what is no chunk;
    - `held_chunks` `(batch, kv_heads, num_sparse_chunks)` int64, which chunk each place holds, -1 for none;
    - `outlier_chunks` `(batch, kv_heads, num_outlier_chunks)` int64, -1 for none, and `outlier_cosines` float32, the lowest
      cosine of a key of the chunk and its landmark.
    """

    row_tensors = (
        *("next_position", "column_positions", "factors", "basis", "landmarks", "is_selectable"),
        *("held_chunks", "outlier_chunks", "outlier_cosines", "landmark_scales"),
    )
    row_counts = (*CompressedLayer.row_counts, "row_shadow")
    state_numbers = (*CompressedLayer.state_numbers, "num_sparse_chunks")
    extra_numbers = ("rotary",)
    extra_tensors = ("host_values", *FREQUENCY_TENSORS)
    heads_share_positions = False

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        settings: dict[str, Any],
        frequencies: SharedFrequencies,
    ) -> None:
        self.sparse_budget: int | float = settings["sparse_budget"]
        self.rank: int | float = settings["rank"]
        self.chunk_size: int = settings["chunk_size"]
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
        self.host_values: torch.Tensor | None = None
        self.num_sparse_chunks = 0
        self.rotary: RotaryFrequencies | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of factors and landmarks."""
        return self.dtype if self.quantize is None else QUANTIZE[self.quantize]

    # Sizes.

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
        """Up to how many tokens a row is kept as it is: what the slots would hold."""
        num_chunks = self.num_outlier_chunks + self.num_sparse_chunks_of(row_length)
        return num_chunks * self.chunk_size + self.tail_capacity

    @property
    def num_chunk_slots(self) -> int:
        """Slots before the tail."""
        return (self.num_outlier_chunks + self.num_sparse_chunks) * self.chunk_size

    @property
    def max_slots(self) -> int:
        return max(self.row_kept) if self.positions is None else self.num_chunk_slots + self.tail_capacity

    @property
    def sparse_slots(self) -> slice:
        """The slots that steps exchange."""
        return slice(self.num_outlier_chunks * self.chunk_size, self.num_chunk_slots)

    # Attention.

    def _check_call(self, call: AttentionCall) -> None:
        super()._check_call(call)
        if self.positions is not None and needs_gradients(call.query, call.key, call.value):
            raise NotImplementedError(
                "Gradients do not pass through keys that are rebuilt and values that come from the host. Call the model under "
                "`torch.no_grad()`."
            )

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        output = call.run()
        if self.positions is None and not self.must_evict:
            return output
        self.require_left_padding(tokens)
        if self.rotary is None:
            self.rotary = self.frequencies.frequencies_of(call.module, self.device)
        num_shadow = max(self.row_shadow, default=0)
        key, value = call.key[:, :, num_shadow:], call.value[:, :, num_shadow:]
        self._absorb(key, value, tokens.positions[..., num_shadow:], is_prompt=True)
        self._fetch(call.query[:, :, -1:], call.logit_arguments["scaling"])
        return output

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            if not self.must_evict:
                return call.run()
            return self.attend_prompt(call, self.column_tokens)
        arguments = call.logit_arguments
        self._fetch(call.query, arguments["scaling"])
        output = decode_attention(call.query, call.key, call.value, mask=self.slot_mask(), **arguments)[0], None
        if self.length == self.max_slots:
            self._move_tail()
        return output

    @torch.no_grad()
    def _fetch(self, query: torch.Tensor, scaling: float) -> None:
        """Brings the chunks that a query `(batch, heads, 1, head_dim)` attends to most into the slots."""
        num_tokens, sparse = max(self.row_shadow), self.sparse_slots
        if not num_tokens:
            return
        num_chunks = num_tokens // self.chunk_size
        if self.landmark_scales is not None:
            group = query.shape[1] // self.landmarks.shape[1]
            query = (query * self.landmark_scales.repeat_interleave(group, dim=1)).to(query.dtype)
        wanted = select_chunks(
            query,
            self.landmarks[:, :, :num_chunks],
            num_chunks=self.num_sparse_chunks,
            scaling=scaling,
            mask=self.is_selectable[..., :num_chunks],
        )
        incoming = plan_chunks(self.held_chunks, wanted)
        values = self.host_values[:, :, :num_tokens]
        gather_values(self.values[:, :, sparse], values, incoming, chunk_size=self.chunk_size)
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
        self.positions[..., sparse] = self._tokens_of(self.held_chunks)

    def _ranks(self, num_tokens: int) -> torch.Tensor:
        """`(batch, num_tokens)` int32: the rank of each token in the shadow."""
        return torch.arange(num_tokens, dtype=torch.int32, device=self.device).expand(self.batch_size, -1)

    def _inverse_frequencies(self) -> torch.Tensor:
        """
        What keys are turned by, `(rotary_dim / 2,)`. Any frequencies would do as long as keys are turned back and forth by the
        same: those of the model are the ones that make them of low rank.
        """
        if self.rotary is None:
            return torch.zeros(0, device=self.device)
        return self.rotary.inv_freq.to(self.device)

    def _tokens_of(self, chunks: torch.Tensor) -> torch.Tensor:
        """The tokens `(batch, kv_heads, chunks * chunk_size)` int32 of chunks, -1 for those of none."""
        offsets = torch.arange(self.chunk_size, device=chunks.device)
        tokens = chunks[..., None] * self.chunk_size + offsets
        return tokens.masked_fill(chunks[..., None] < 0, -1).flatten(2).int()

    # The shadow.

    def _move_tail(self) -> None:
        """Moves full chunks of generated tokens to the shadow."""
        tail = slice(self.num_chunk_slots, self.length)
        positions = self.positions[:, :1, tail].clone()
        self._absorb(self.keys[:, :, tail].clone(), self.values[:, :, tail].clone(), positions, is_prompt=False)

    @torch.no_grad()
    def _absorb(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, is_prompt: bool) -> None:
        """
        Moves all full chunks but the local tokens to the shadow, and the rest to the tail.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`, of all tokens that are not in the shadow.
            positions (`torch.Tensor`): `(batch, 1, tokens)` int32, theirs, -1 for none.
            is_prompt (`bool`): Whether the basis is fitted anew, and slots are made for the budget anew.
        """
        with torch.autocast(self.device.type, enabled=False):
            self._absorb_exactly(key, value, positions, is_prompt)

    def _absorb_exactly(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, is_prompt: bool
    ) -> None:
        if self.positions is None:
            self._make_shadow(key, value)
        num_rest = [length - before for length, before in zip(self.row_lengths, self.row_shadow, strict=True)]
        num_moved = [max((rest - self.num_local_tokens) // self.chunk_size, 0) * self.chunk_size for rest in num_rest]
        num_left = [rest - moved for rest, moved in zip(num_rest, num_moved, strict=True)]
        order = order_of(positions)
        left = self._part_of(order, num_moved, num_left)
        left_key, left_value = gather_tokens(key, left), gather_tokens(value, left)
        left_positions = gather_tokens(positions, left).masked_fill(left < 0, -1)
        if max(num_moved):
            moved = self._part_of(order, [0] * self.batch_size, num_moved)
            with torch.autocast(self.device.type, enabled=False):
                self._add(gather_tokens(key, moved), gather_tokens(value, moved), moved >= 0, num_moved, is_prompt)
        if is_prompt:
            self._make_slots(self.num_sparse_chunks_of(max(self.row_lengths)))
        self._set_tail(left_key, left_value, left_positions, num_left)

    def _part_of(self, order: torch.Tensor, starts: list[int], counts: list[int]) -> torch.Tensor:
        """Of indices `(batch, 1, tokens)` those of `counts` tokens from `starts` on; -1 behind the last of a shorter row."""
        offsets = torch.arange(max(counts), device=order.device)
        indices = (self.per_row(starts) + offsets).clamp(max=order.shape[-1] - 1)
        return order.gather(-1, indices.long()).masked_fill(offsets >= self.per_row(counts), -1)

    def _make_shadow(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """A shadow that holds nothing."""
        batch_size, kv_heads, _, head_dim = key.shape
        num_outliers = self.num_outlier_chunks
        self.row_shadow = [0] * batch_size
        self.num_sparse_chunks = 0
        self.column_positions = None
        self.keys = key.new_zeros(batch_size, kv_heads, num_outliers * self.chunk_size, head_dim)
        self.values = value.new_zeros(batch_size, kv_heads, num_outliers * self.chunk_size, value.shape[-1])
        self.outlier_chunks = torch.full((batch_size, kv_heads, num_outliers), -1, device=self.device)
        self.outlier_cosines = torch.full((batch_size, kv_heads, num_outliers), float("inf"), device=self.device)
        self.positions = self._tokens_of(self.outlier_chunks)
        self.factors = torch.zeros(batch_size, 0, 0, dtype=self.stored_dtype, device=self.device)
        self.basis = key.new_zeros(batch_size, kv_heads, 0, head_dim)
        self.landmarks = torch.zeros(batch_size, kv_heads, 0, head_dim, dtype=self.stored_dtype, device=self.device)
        self.host_values = self._host_zeros((batch_size, kv_heads, 0, value.shape[-1]))

    def _add(
        self, key: torch.Tensor, value: torch.Tensor, is_token: torch.Tensor, counts: list[int], is_prompt: bool
    ) -> None:
        """
        Takes full chunks into the shadow, and chooses the outliers anew.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
            is_token (`torch.Tensor`): `(batch, 1, tokens)`, False behind the `counts` tokens of a shorter row.
        """
        starts = self.row_shadow
        self._add_factors(key, is_token, counts, is_prompt)
        num_tokens = max(start + count for start, count in zip(starts, counts, strict=True))
        self.host_values = with_room(self.host_values, 2, num_tokens, self._host_zeros)
        chunks = key.unflatten(2, (-1, self.chunk_size)).float()  # (batch, kv_heads, chunks, chunk_size, head_dim)
        means = chunks.mean(dim=3)
        cosines = torch.cosine_similarity(chunks, means[..., None, :], dim=-1).amin(dim=-1)
        cosines = cosines.masked_fill(~is_token[..., :: self.chunk_size], float("inf"))
        if self.stored_dtype != self.dtype:
            means = self._scaled(means, is_prompt)
        landmarks = stored(means, self.stored_dtype)
        self.landmarks = with_room(self.landmarks, 2, num_tokens // self.chunk_size)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            self.host_values[row, :, start : start + count].copy_(value[row, :, :count])
            first, num_chunks = start // self.chunk_size, count // self.chunk_size
            self.landmarks[row, :, first : first + num_chunks] = landmarks[row, :, :num_chunks]
        self._choose_outliers(key, value, cosines)
        self.row_shadow = [start + count for start, count in zip(starts, counts, strict=True)]
        index = torch.arange(self.landmarks.shape[2], device=self.device)
        exists = index < self.per_row(self.row_shadow) // self.chunk_size
        is_outlier = (self.outlier_chunks[..., None] == index).any(dim=2)
        self.is_selectable = exists & ~is_outlier

    def _host_zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for values on the host."""
        return self.host.zeros(shape, self._value_dtype, self.device)

    def _scaled(self, means: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        """Landmarks over the scale of each dimension, which grows if they exceed it; those of a prompt make it anew."""
        if is_prompt or self.landmark_scales is None:
            old, largest = self.landmarks.float(), means.abs().amax(dim=2, keepdim=True)
            if self.landmark_scales is not None:
                old = old * self.landmark_scales
                largest = largest.maximum(old.abs().amax(dim=2, keepdim=True))
            self.landmark_scales = scale_of(largest, self.stored_dtype)
            self.landmarks = stored(old / self.landmark_scales, self.stored_dtype)
        self.landmarks, ratio = widened(self.landmarks, means / self.landmark_scales)
        self.landmark_scales = self.landmark_scales * ratio
        return means / self.landmark_scales

    def _add_factors(self, key: torch.Tensor, is_token: torch.Tensor, counts: list[int], is_prompt: bool) -> None:
        """Projects keys onto the basis, which is fitted to them and to the tokens held so far if they are of a prompt."""
        batch_size, kv_heads, _, head_dim = key.shape
        starts = self.row_shadow
        positions = self.per_row(starts) + torch.arange(key.shape[2], device=self.device)
        blocks = [slice(start, start + TOKENS_PER_BLOCK) for start in range(0, key.shape[2], TOKENS_PER_BLOCK)]

        def unrotated(block: slice) -> torch.Tensor:  # (batch, tokens, kv_heads * head_dim)
            keys = key[:, :, block].float()
            if self.rotary is not None:
                keys = self.rotary.rotate(keys, -self._angles(positions[..., block]))
            return keys.masked_fill(~is_token[..., block, None], 0).transpose(1, 2).flatten(2)

        basis = self.basis.float().transpose(1, 2).flatten(2)  # (batch, rank, kv_heads * head_dim)
        if is_prompt or not self.factors.shape[1]:
            gram = sum(gram_matrix(unrotated(block)) for block in blocks)
            if self.factors.shape[1]:
                gram = extended_gram(gram, self.factors, basis)
            old, basis = basis, fit_basis(gram, self.rank)
            if self.stored_dtype != self.dtype:
                # An axis is as long as to make the largest factor along it the largest number that is stored.
                factors = self.factors.float() @ project(old, basis)
                largest = [factors.abs().amax(dim=1)] if factors.shape[1] else []
                largest += [project(unrotated(block), basis).abs().amax(dim=1) for block in blocks]
                basis = basis * scale_of(torch.stack(largest).amax(dim=0), self.stored_dtype)[..., None]
            self.basis = basis.unflatten(2, (kv_heads, head_dim)).transpose(1, 2).to(key.dtype).contiguous()
            basis = self.basis.float().transpose(1, 2).flatten(2)
            self.factors = stored(self.factors.float() @ project(old, basis), self.stored_dtype)
        factors = torch.cat([project(unrotated(block), basis) for block in blocks], dim=1)
        if self.stored_dtype != self.dtype:
            self.factors, ratio = widened(self.factors, factors)
            self.basis = (self.basis * ratio.mT[:, None]).to(key.dtype)
            factors = factors / ratio
        factors = stored(factors, self.stored_dtype)
        num_tokens = max(start + count for start, count in zip(starts, counts, strict=True))
        self.factors = with_room(self.factors, 1, num_tokens)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            self.factors[row, start : start + count] = factors[row, :count]

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """By how much keys at these positions are turned, as `reconstruct_keys` turns them."""
        return (positions[..., None].float() * self._inverse_frequencies()).double()

    def _choose_outliers(self, key: torch.Tensor, value: torch.Tensor, cosines: torch.Tensor) -> None:
        """Of the outliers so far and of new chunks those that their landmarks stand for worst stay exact."""
        num_outliers, outlier_slots = self.num_outlier_chunks, slice(0, self.num_outlier_chunks * self.chunk_size)
        first = self.per_row(self.row_shadow) // self.chunk_size
        chunks = (first + torch.arange(cosines.shape[-1], device=self.device)).expand_as(cosines)
        cosines = torch.cat([self.outlier_cosines, cosines], dim=-1)
        chunks = torch.cat([self.outlier_chunks, chunks], dim=-1)
        # Of equal cosines the older chunk.
        chosen = cosines.sort(dim=-1, stable=True).indices[..., :num_outliers]
        self.outlier_cosines = cosines.gather(-1, chosen)
        self.outlier_chunks = chunks.gather(-1, chosen).masked_fill(self.outlier_cosines.isinf(), -1)
        index = chosen[..., None] * self.chunk_size + torch.arange(self.chunk_size, device=self.device)
        for tensor, new in ((self.keys, key), (self.values, value)):
            candidates = torch.cat([tensor[:, :, outlier_slots], new], dim=2)
            tensor[:, :, outlier_slots] = gather_tokens(candidates, index.flatten(2))
        self.positions[..., outlier_slots] = self._tokens_of(self.outlier_chunks)
        if self.held_chunks is not None:  # a chunk is not attended to twice
            is_outlier = (self.held_chunks[..., None] == self.outlier_chunks[..., None, :]).any(dim=-1)
            self.held_chunks.masked_fill_(is_outlier, -1)
            self.positions[..., self.sparse_slots] = self._tokens_of(self.held_chunks)

    def _make_slots(self, num_sparse_chunks: int) -> None:
        """Slots for that many chunks, which hold none yet, behind those of the outliers."""
        num_outlier_slots = self.num_outlier_chunks * self.chunk_size
        self.num_sparse_chunks = num_sparse_chunks
        self.held_chunks = self.outlier_chunks.new_full((*self.outlier_chunks.shape[:2], num_sparse_chunks), -1)
        for name in self.slot_tensors:
            fill = -1 if name == "positions" else 0
            setattr(
                self,
                name,
                grown(getattr(self, name)[:, :, :num_outlier_slots], num_outlier_slots, self.max_slots, fill),
            )

    def _set_tail(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, counts: list[int]) -> None:
        """Fills the tail with the tokens `(batch, kv_heads, tokens, head_dim)`, `counts` of them in each row."""
        tail = slice(self.num_chunk_slots, self.num_chunk_slots + key.shape[2])
        self.keys[:, :, tail], self.values[:, :, tail] = key, value
        self.positions[..., tail.start :] = -1
        self.positions[..., tail] = positions
        self.length = tail.stop
        num_chunks = [count // self.chunk_size for count in self.row_shadow]
        self.row_held = [
            min(number, self.num_outlier_chunks + self.num_sparse_chunks) * self.chunk_size + count
            for number, count in zip(num_chunks, counts, strict=True)
        ]

    # Several tokens: all that was seen, for one layer at a time.

    def _sorted_slots(self) -> dict[str, torch.Tensor]:
        """All tokens: keys that are rebuilt, or exact where those are held, and values from the host; then the tail."""
        num_tokens, tail = max(self.row_shadow), slice(self.num_chunk_slots, self.length)
        with torch.autocast(self.device.type, enabled=False):
            keys = self.factors[:, None, :num_tokens].float() @ self.basis.float()
        ranks = self._ranks(num_tokens)[:, None]
        if self.rotary is not None:
            keys = self.rotary.rotate(keys, self._angles(ranks))
        keys = keys.to(self.dtype)
        num_outlier_slots = self.num_outlier_chunks * self.chunk_size
        places = self.positions[..., :num_outlier_slots].long()
        # One place more, for slots of no outlier.
        index = torch.where(places < 0, num_tokens, places)[..., None]
        keys = torch.cat([keys, keys[:, :, :1]], dim=2)
        keys.scatter_(2, index.expand(-1, -1, -1, keys.shape[3]), self.keys[:, :, :num_outlier_slots])
        values = self.host_values[:, :, :num_tokens].to(self.device)
        positions = ranks.masked_fill(ranks >= self.per_row(self.row_shadow), -1)
        return {
            "keys": torch.cat([keys[:, :, :num_tokens], self.keys[:, :, tail]], dim=2),
            "values": torch.cat([values, self.values[:, :, tail]], dim=2),
            "positions": torch.cat([positions, self.positions[:, :1, tail]], dim=2),
        }

    def _take_slots(self) -> dict[str, torch.Tensor]:
        return self._sorted_slots()

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        tokens = super()._behind_slots(seen, slot_positions, num_new)
        return replace(tokens, row_present=list(seen.row_lengths))

    # What `generate` asks of any layer.

    @property
    def is_croppable(self) -> bool:
        return True

    def _crop_held(self, num_columns: int) -> None:
        if self.positions is None:
            super()._crop_held(num_columns)
            return
        everything = self._sorted_slots()
        self.num_seen -= num_columns
        self.row_lengths = [max(length - num_columns, 0) for length in self.row_lengths]
        self.next_position = self.per_row(self.row_lengths)
        num_shadow = [
            min(shadow, max(length - self.num_local_tokens, 0) // self.chunk_size * self.chunk_size)
            for shadow, length in zip(self.row_shadow, self.row_lengths, strict=True)
        ]
        num_left = [length - shadow for length, shadow in zip(self.row_lengths, num_shadow, strict=True)]
        positions = everything["positions"]
        order = order_of(positions)
        left = self._part_of(order, num_shadow, num_left)
        self.row_shadow = num_shadow
        num_chunks = self.per_row(num_shadow) // self.chunk_size
        for chunks in (self.outlier_chunks, self.held_chunks):
            chunks.masked_fill_(chunks >= num_chunks, -1)
        self.outlier_cosines.masked_fill_(self.outlier_chunks < 0, float("inf"))
        index = torch.arange(self.landmarks.shape[2], device=self.device)
        self.is_selectable = self.is_selectable & (index < num_chunks)
        sparse = self.sparse_slots
        self.positions[..., : sparse.start] = self._tokens_of(self.outlier_chunks)
        self.positions[..., sparse] = self._tokens_of(self.held_chunks)
        left_positions = gather_tokens(positions, left).masked_fill(left < 0, -1)
        self._set_tail(
            gather_tokens(everything["keys"], left),
            gather_tokens(everything["values"], left),
            left_positions,
            num_left,
        )

    def compress(self) -> None:
        if self.positions is not None:
            self._move_tail()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.host_values is not None:
            # Which rows it takes, and from where: values stay on the host.
            rows = function(torch.arange(self.host_values.shape[0], device=self.device)).tolist()
            is_other = rows != list(range(self.host_values.shape[0]))
            self.host_values = (
                self.host_values[rows] if is_other or self.host_values.is_inference() else self.host_values
            )
        super()._map_rows(function)

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
        return numbers, tensors | frequencies | {"host_values": self.host_values[:, :, :num_tokens]}

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().import_state(numbers, tensors)
        rotary = import_frequencies(numbers["rotary"], tensors, self._key_shape[1])
        self.rotary = None if rotary is None else self.frequencies.shared(rotary)
        values = tensors.get("host_values")
        if values is not None:
            self.host_values = self._host_zeros(tuple(values.shape))
            self.host_values.copy_(values)

    def check_state(self) -> None:
        if self.positions is None:
            if self.host_values is not None or self.row_shadow or self.factors is not None:
                raise ValueError("a layer that holds all tokens as they are has no shadow")
            return
        batch_size, (kv_heads, head_dim) = self.batch_size, self._key_shape
        num_tokens = max(self.row_shadow, default=0)
        num_chunks = num_tokens // self.chunk_size
        if len(self.row_shadow) != batch_size or any(count % self.chunk_size for count in self.row_shadow):
            raise ValueError(f"`row_shadow` is {self.row_shadow}")
        if self.num_sparse_chunks < 1 or not self.num_chunk_slots < self.length <= self.max_slots:
            raise ValueError(f"{self.length} slots are not {self.num_sparse_chunks} chunks and a tail")
        rank = self.factors.shape[-1] if self.factors is not None else 0
        self.require_tensor("factors", self.stored_dtype, batch_size, num_tokens, rank)
        self.require_tensor("basis", self.dtype, batch_size, kv_heads, rank, head_dim)
        self.require_tensor("landmarks", self.stored_dtype, batch_size, kv_heads, num_chunks, head_dim)
        self.require_tensor("is_selectable", torch.bool, batch_size, kv_heads, num_chunks)
        self.require_tensor("held_chunks", torch.int64, batch_size, kv_heads, self.num_sparse_chunks)
        self.require_tensor("outlier_chunks", torch.int64, batch_size, kv_heads, self.num_outlier_chunks)
        self.require_tensor("outlier_cosines", torch.float32, batch_size, kv_heads, self.num_outlier_chunks)
        self.require_tensor("host_values", self._value_dtype, batch_size, kv_heads, num_tokens, self._value_shape[1])
        limit = self.per_row(self.row_shadow) // self.chunk_size
        for name in ("held_chunks", "outlier_chunks"):
            chunks = getattr(self, name)
            if (chunks < -1).any() or (chunks >= limit).any():
                raise ValueError(f"`{name}` are not chunks of {self.row_shadow} tokens")
        exists = torch.arange(num_chunks, device=self.device) < limit
        is_outlier = (self.outlier_chunks[..., None] == torch.arange(num_chunks, device=self.device)).any(dim=2)
        if not torch.equal(self.is_selectable, exists & ~is_outlier):
            raise ValueError("`is_selectable` are not the chunks without the outliers")
        expected = torch.cat([self._tokens_of(self.outlier_chunks), self._tokens_of(self.held_chunks)], dim=-1)
        if not torch.equal(self.positions[..., : self.num_chunk_slots], expected):
            raise ValueError("the slots do not hold the chunks that they should")

    def held_tensors(self) -> dict[str, torch.Tensor]:
        held = super().held_tensors()
        held |= {f"keys in {name}": held.pop(name) for name in ("factors", "basis", "landmarks") if name in held}
        if self.host_values is not None:
            held["host values"] = self.host_values
        return held | {f"frequencies_{index}": tensor for index, tensor in enumerate(self.frequencies.held_tensors())}


def order_of(positions: torch.Tensor) -> torch.Tensor:
    """The indices of tokens in order of their positions, those of none last."""
    return positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1)


def with_room(
    tensor: torch.Tensor,
    dim: int,
    size: int,
    zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The tensor with at least `size` places in a dimension, and some more if it grows by little; new ones are zero. `zeros` makes
    what it moves into.
    """
    held = tensor.shape[dim]
    if size <= held:
        return tensor
    if held:
        size = max(size, held + held // GROWTH)
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    result = tensor.new_zeros(shape) if zeros is None else zeros(shape)
    result.narrow(dim, 0, held).copy_(tensor)
    return result


class ShadowKVCache(CompressedCache):
    """
    Evicts nothing: keys of low rank stay on the device, values go to the host, and each step attends to a few chunks of both
    (ShadowKV, https://arxiv.org/abs/2410.21465). The prompt is read with full attention, so the first new token is exact.

    Of each row a layer holds on the device, in bytes (the paper's section 3.2, with the buffer that it leaves out):
    `tokens * rank * itemsize` for factors, `kv_heads * rank * head_dim * itemsize` for the basis,
    `tokens / chunk_size * kv_heads * (head_dim * itemsize + 1)` for landmarks, and
    `slots * kv_heads * (2 * head_dim * itemsize + 4)` for what a step attends to, with `slots = num_outlier_chunks * chunk_size
    + sparse_budget + num_local_tokens + offload_interval + chunk_size`; on the host `tokens * kv_heads * head_dim * itemsize`.
    `cache.memory()` has the host apart. Later turns attend to everything: keys are rebuilt and values fetched for one layer
    at a time, which takes as much memory as that layer would have taken.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model itself. The model is needed only if
            it was cast with `model.to(torch.bfloat16)` after loading, which rounds its rotary frequencies too.
        sparse_budget (`int` or `float`, defaults to 2048): Tokens that a step attends to beside outliers and the latest, or
            their share of the prompt. Larger values miss less and take more time. A prompt that is no longer than the slots
            is kept as it is, and the cache is `DynamicCache` bit for bit.
        rank (`int` or `float`, defaults to 160): Dimensions that keys have before RoPE, over all heads of a layer; or the share
            of their sum of squares that is kept, by which each layer has a rank of its own. Larger values rebuild keys more
            exactly and take more memory.
        chunk_size (`int`, defaults to 8): Tokens that one landmark stands for. Larger values save memory and choose more
            coarsely.
        num_outlier_chunks (`int`, defaults to 48): Chunks of each KV head that stay exact, those whose landmark stands for them
            worst.
        num_local_tokens (`int`, defaults to 32): How many of the latest tokens stay exact at least.
        offload_interval (`int`, defaults to 64): Generated tokens that come in before full chunks of them go to the host.
            Larger values take more memory and less time.
        quantize (`str`, *optional*): "int8" or "fp8" holds factors and landmarks in one byte a number.
        host (`str`, defaults to `"memory"`): Where values go; `"disk:PATH"` maps files in that folder, for contexts that
            exceed the memory of the host.
        host_budget (`int` or `str`, *optional*): Bytes that values of all layers may take there, such as "16GiB". What
            exceeds it is refused before it is allocated.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed; while it runs, for values that
            exceed `host_budget`.
        NotImplementedError: For a model whose rotary embedding depends on the length (dynamic NTK) or has several axes, at
            the first forward pass where the config does not tell; and for gradients once values are on the host.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache.caches.shadow_kv import ShadowKVCache
    >>> import torch

    >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=2999)
    >>> model = LlamaForCausalLM(config)
    >>> cache = ShadowKVCache(model.config, sparse_budget=64, rank=16, num_outlier_chunks=4)
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
        sparse_budget: int | float = 2048,
        *,
        rank: int | float = 160,
        chunk_size: int = 8,
        num_outlier_chunks: int = 48,
        num_local_tokens: int = 32,
        offload_interval: int = 64,
        quantize: str | None = None,
        host: str = "memory",
        host_budget: int | str | None = None,
    ) -> None:
        model = model_inside(config)
        config = config if model is None else model.config
        check_decoder_config(config)
        refuse_unsupported_rope(config)
        settings = {
            "sparse_budget": read_share_or_count("sparse_budget", sparse_budget),
            "rank": read_share_or_count("rank", rank),
            "chunk_size": read_count("chunk_size", chunk_size, least=1),
            "num_outlier_chunks": read_count("num_outlier_chunks", num_outlier_chunks, least=0),
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
