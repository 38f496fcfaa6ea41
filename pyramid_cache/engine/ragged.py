"""
Layers whose heads keep different numbers of tokens, stored without padding.

The tokens that heads keep are packed: one head behind the other. The latest tokens, which all heads hold, are in slots
as in any layer. A step attends to both at once (`pyramid_cache.ops.decode_packed_attention`). A forward pass of
several tokens, and an eviction, unpack the tokens into slots, some of which are empty. The next step packs them again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import floor_of_product
from pyramid_cache.engine.policy_cache import PolicyLayer
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.selection import best_tokens
from pyramid_cache.engine.tokens import Tokens, causal_mask
from pyramid_cache.ops import decode_packed_attention
from pyramid_cache.ops.packed import segment_starts
from pyramid_cache.ops.transfer import numbers_on


@dataclass(frozen=True)
class PackedTokens:
    """
    The tokens of all rows and heads, one segment behind the other, each in order of position.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): By the names of slot tensors, each with the tokens in its first dimension.
        head_lengths (`list[list[int]]`): For each row, how many tokens each KV head holds.
        starts (`torch.Tensor`): `(segments + 1,)` int64 on the device: where each segment begins, and where the last
            one ends.
    """

    tensors: dict[str, torch.Tensor]
    head_lengths: list[list[int]]
    starts: torch.Tensor

    @staticmethod
    def of(slots: dict[str, torch.Tensor], is_kept: torch.Tensor) -> "PackedTokens":
        """
        Packs the slots `(batch, kv_heads, slots, ...)` that `is_kept` `(batch, kv_heads, slots)` marks.
        """
        _, kv_heads, num_slots = is_kept.shape
        # The only wait for the device: how many tokens each head keeps is known there alone.
        head_lengths = is_kept.sum(dim=-1).tolist()
        index = torch.nonzero_static(is_kept.flatten(), size=sum(flat(head_lengths))).squeeze(1)
        places = (index // (kv_heads * num_slots), index // num_slots % kv_heads, index % num_slots)
        tensors = {name: tensor[places] for name, tensor in slots.items()}
        return PackedTokens(tensors, head_lengths, segment_starts(flat(head_lengths), is_kept.device))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each segment."""
        return flat(self.head_lengths)

    def in_slots(self) -> dict[str, torch.Tensor]:
        """The tensors with as many slots as the longest segment has tokens. Shorter ones begin with empty slots."""
        positions = self.tensors["positions"]
        lengths = numbers_on(positions.device, self.head_lengths, torch.int64)  # (batch, kv_heads)
        ends = lengths.flatten().cumsum(dim=0).view_as(lengths)[..., None]
        longest = max(self.lengths)
        offsets = torch.arange(-longest, 0, device=positions.device)
        is_empty = offsets < -lengths[..., None]
        index = (ends + offsets).masked_fill(is_empty, 0)
        slots = {name: tensor[index] for name, tensor in self.tensors.items()}
        slots["positions"] = slots["positions"].masked_fill(is_empty, -1)
        if "attention" in slots:
            slots["attention"] = slots["attention"].masked_fill(is_empty, 0)
        return slots

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PackedTokens":
        """The result of a function that selects, repeats or moves the rows of tensors."""
        indices = function(torch.arange(len(self.head_lengths), device=self.starts.device))
        device = indices.device
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        rows = indices.tolist()
        if rows == list(range(len(self.head_lengths))):
            return PackedTokens(tensors, self.head_lengths, self.starts.to(device))
        row_sizes = [sum(row) for row in self.head_lengths]
        for name, tensor in tensors.items():
            parts = tensor.split(row_sizes)
            tensors[name] = torch.cat([parts[row] for row in rows]) if rows else tensor[:0]
        head_lengths = [self.head_lengths[row] for row in rows]
        return PackedTokens(tensors, head_lengths, segment_starts(flat(head_lengths), device))


class RaggedLayer(PolicyLayer):
    """
    A `PolicyLayer` whose heads share its budget (Ada-KV, https://arxiv.org/abs/2407.11550, Algorithm 1). With a budget
    of `n` tokens, a layer keeps of each row the best `kv_heads * n` tokens of all heads together. Each head keeps at
    least its own best `Policy.floor_ratio * n`.

    `packed` holds the kept tokens, or is None before the first eviction. The slot tensors hold the later tokens. The
    numbers of tokens in `row_held` are means over heads.
    """

    heads_keep_equal_numbers = False

    def _clear(self) -> None:
        super()._clear()
        self.packed: PackedTokens | None = None

    @property
    def max_slots(self) -> int:
        return super().max_slots if self.packed is None else self.num_spare_slots

    def _check_call(self, call: AttentionCall) -> None:
        super()._check_call(call)
        if call.logit_arguments["sink_logits"] is not None:
            raise NotImplementedError(
                "Heads with learned attention sinks cannot hold different numbers of tokens. Use a cache whose heads "
                "keep equal numbers, such as SnapKVCache."
            )

    # Packing.

    def _slots_in_use(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)[:, :, : self.length] for name in self.slot_tensors}

    def _pack(self, slots: dict[str, torch.Tensor], is_kept: torch.Tensor) -> None:
        """Packs the kept slots. Afterwards no slot is in use."""
        slots["positions"] = slots["positions"].expand_as(is_kept)
        self.packed = PackedTokens.of(slots, is_kept)
        for name, tensor in slots.items():
            setattr(self, name, tensor.new_empty(*is_kept.shape[:2], 0, *tensor.shape[3:]))
        self.length = 0

    def _unpack(self) -> None:
        """Unpacks the packed tokens into slots in front of the used ones."""
        if self.packed is None:
            return
        packed, latest = self.packed.in_slots(), self._slots_in_use()
        for name in self.slot_tensors:
            setattr(self, name, torch.cat([packed[name], latest[name]], dim=2))
        self.length, self.packed = self.positions.shape[-1], None

    def release_empty_slots(self) -> None:
        if self.positions is not None and self.packed is None:
            slots = self._slots_in_use()
            self._pack(slots, slots["positions"] >= 0)

    def _store(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_step(key_states.shape[2]):
            self.release_empty_slots()
        else:
            self._unpack()
        return super()._store(key_states, value_states)

    def _with_recorded(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._unpack()
        return super()._with_recorded(key_states, value_states)

    # Several tokens.

    def _attend_and_sum(
        self, call: AttentionCall, tokens: Tokens, num_rows: int, row_weights: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """Attends with each KV head as a row of its own, since heads differ in their empty slots."""
        if self.positions is None:
            return super()._attend_and_sum(call, tokens, num_rows, row_weights)
        batch_size, kv_heads, num_keys = call.key.shape[:3]
        group = call.query.shape[1] // kv_heads
        positions = tokens.positions.flatten(0, 1)[:, None]
        is_token = positions >= 0
        tokens = replace(
            tokens,
            positions=positions,
            row_lengths=[length for length in tokens.row_lengths for _ in range(kv_heads)],
            row_present=is_token.sum(dim=-1).flatten().tolist(),
        )
        mask = causal_mask(
            call.module.config._attn_implementation,
            is_token if tokens.has_gaps else None,
            call.num_queries,
            num_keys,
            call.query.dtype,
            call.query.device,
        )
        per_head = replace(
            call,
            query=call.query.unflatten(1, (kv_heads, group)).flatten(0, 1),
            key=call.key.flatten(0, 1)[:, None],
            value=call.value.flatten(0, 1)[:, None],
            mask=mask,
            kwargs={name: value for name, value in call.kwargs.items() if name != "position_ids"},
        )
        if num_rows:
            if row_weights is not None:
                row_weights = row_weights.repeat_interleave(kv_heads, dim=0)
            (output, _), sums = attend_and_score(per_head, tokens, num_rows, row_weights)
            sums = sums.view(batch_size, kv_heads, num_keys)
        else:
            (output, _), sums = per_head.run(), None
        if output is not None:  # nobody needs that of tokens that were attended to before
            output = output.unflatten(0, (batch_size, kv_heads)).transpose(1, 2).flatten(2, 3)
        return (output, None), sums

    def with_slot_mask(self, call: AttentionCall, key_mask: torch.Tensor | None) -> AttentionCall:
        return call  # `_attend_and_sum` makes a mask for each head

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._attend_and_sum(call, tokens, 0, None)[0]

    def _keep_best(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, tokens: Tokens
    ) -> None:
        self.require_left_padding(tokens)
        self.row_held = [min(held, kept) for held, kept in zip(self.row_held, self.row_kept, strict=True)]
        priority = self._priority(key, value, attention, tokens.positions)
        is_kept = best_of_all_heads(priority, self.row_held, self.policy.floor_ratio)
        slots = {"keys": key, "values": value, "positions": tokens.positions}
        self._pack(slots if attention is None else slots | {"attention": attention}, is_kept)
        self.column_positions = None

    # One token.

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            return self._attend_dense_step(call)
        arguments = call.logit_arguments
        arguments.pop("sink_logits")
        packed = self.packed
        output, packed_sums, sums = decode_packed_attention(
            call.query,
            packed.tensors["keys"],
            packed.tensors["values"],
            packed.lengths,
            call.key,
            call.value,
            **arguments,
            starts=packed.starts,
        )
        if self.policy.window_size:
            self._add_query(self.attention[..., : self.length], sums.detach(), call)
            self._add_query(packed.tensors["attention"], packed_sums.detach(), call)
        self._evict_if_due()
        return output, None

    def _evict(self, is_due: list[bool]) -> None:
        self._unpack()
        tokens = Tokens(self.positions, self.row_lengths, self.row_held, self.num_seen)
        row_kept, self.row_kept = self.row_kept, self._row_left(is_due)
        self._keep_best(self.keys, self.values, self.attention, tokens)
        self.row_kept = row_kept

    # What `generate` and users ask.

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        if self.packed is not None:
            self.packed = self.packed.map_rows(function)

    def leave_inference_mode(self) -> None:
        super().leave_inference_mode()
        if self.packed is None or torch.is_inference_mode_enabled() or not self.packed.starts.is_inference():
            return
        tensors = {name: tensor.clone() for name, tensor in self.packed.tensors.items()}
        self.packed = PackedTokens(tensors, self.packed.head_lengths, self.packed.starts.clone())

    def _unpacked(self) -> "RaggedLayer":
        """A copy of the layer with all tokens in slots. It shares the other tensors."""
        layer = copy.copy(self)
        layer._unpack()
        return layer

    def held_positions(self) -> torch.Tensor:
        return super().held_positions() if self.packed is None else self._unpacked().held_positions()

    def held_scores(self) -> torch.Tensor | None:
        return super().held_scores() if self.packed is None else self._unpacked().held_scores()

    def held_tensors(self) -> dict[str, torch.Tensor]:
        packed = {} if self.packed is None else self.packed.tensors | {"starts": self.packed.starts}
        return super().held_tensors() | {f"{name} packed": tensor for name, tensor in packed.items()}

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return super().export_state() if self.packed is None else self._unpacked().export_state()


def flat(head_lengths: list[list[int]]) -> list[int]:
    """Numbers per row and head as one number per segment."""
    return [length for row in head_lengths for length in row]


def best_of_all_heads(priority: torch.Tensor, row_kept: list[int], floor_ratio: float) -> torch.Tensor:
    """
    Which tokens stay if heads share a budget.

    Args:
        priority (`torch.Tensor`): `(batch, kv_heads, tokens)`, as for `best_tokens`. Of equal scores of two heads, the
            one of the later head stays.
        row_kept (`list[int]`): How many tokens the heads of each row keep on average.
        floor_ratio (`float`): Each head keeps at least this share of that number.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, tokens)` bool. In each row `kv_heads * row_kept` are True, or all tokens if
            there are fewer.
    """
    kv_heads, num_tokens = priority.shape[1:]
    device = priority.device
    num_safe = [floor_of_product(floor_ratio, kept) for kept in row_kept]
    safe = best_tokens(priority, numbers_on(device, num_safe, torch.int64), max(num_safe))
    priority = priority.masked_fill(is_index(safe, num_tokens), float("inf"))
    totals = numbers_on(device, [kv_heads * kept for kept in row_kept], torch.int64)
    best = best_tokens(priority.flatten(1)[:, None], totals, kv_heads * max(row_kept))
    return is_index(best, kv_heads * num_tokens).view_as(priority)


def is_index(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`(batch, heads, num_tokens)` bool: whether a token is among the indices `(batch, heads, kept)`; -1 is none."""
    found = torch.zeros(*indices.shape[:2], num_tokens + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, indices.masked_fill(indices < 0, num_tokens), True)[..., :num_tokens]
