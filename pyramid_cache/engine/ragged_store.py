"""
A store of heads that keep different numbers of tokens, without padding.

The tokens that heads keep are packed: one head behind the other. The latest tokens, which all heads hold, are in slots
as in any layer. A step attends to both at once (`pyramid_cache.ops.decode_packed_attention`); only the latest are in
the keys and values that `update` returns. A forward pass of several tokens, and an eviction, unpack the tokens into
slots, some of which are empty. The next step packs them again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep
from pyramid_cache.engine.ragged_step import RaggedStep
from pyramid_cache.engine.selection import best_of_all_heads
from pyramid_cache.engine.state import LayerState
from pyramid_cache.engine.store import Compaction, SlotStore
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops import decode_packed_attention
from pyramid_cache.ops.packed import decode_by_segments, decode_packed_unchecked, segment_starts


@dataclass(frozen=True)
class PackedTokens:
    """
    The tokens of all rows and heads, one segment behind the other, each in order of position.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): By the names of slot tensors, each with the tokens in its first dimension.
            In steps of fixed shapes there is room behind them.
        head_lengths (`list[list[int]]`): For each row, how many tokens each KV head holds.
        starts (`torch.Tensor`): `(segments + 1,)` int64 on the device: where each segment begins, and where the last
            one ends.
        least_slots (`int`): How many slots `in_slots` gives at least. Ranks that share heads agree on it.
    """

    tensors: dict[str, torch.Tensor]
    head_lengths: list[list[int]]
    starts: torch.Tensor
    least_slots: int = 0

    @cached_property
    def longest(self) -> int:
        """How many tokens the longest segment has."""
        return max(flat(self.head_lengths), default=0)

    @cached_property
    def row_sizes(self) -> list[int]:
        """How many tokens all heads of each row hold."""
        return [sum(row) for row in self.head_lengths]

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by names whose first word is their role."""
        return {f"{name} packed": tensor for name, tensor in (self.tensors | {"starts": self.starts}).items()}

    @staticmethod
    def of(slots: dict[str, torch.Tensor], is_kept: torch.Tensor, least_slots: int = 0) -> "PackedTokens":
        """Packs the slots `(batch, kv_heads, slots, ...)` that `is_kept` `(batch, kv_heads, slots)` marks."""
        _, kv_heads, num_slots = is_kept.shape
        # The only wait for the device: how many tokens each head keeps is known there alone.
        head_lengths = is_kept.sum(dim=-1).tolist()
        index = torch.nonzero_static(is_kept.flatten(), size=sum(flat(head_lengths))).squeeze(1)
        places = (index // (kv_heads * num_slots), index // num_slots % kv_heads, index % num_slots)
        tensors = {name: tensor[places] for name, tensor in slots.items()}
        return PackedTokens(tensors, head_lengths, segment_starts(flat(head_lengths), is_kept.device), least_slots)

    def in_slots(self) -> dict[str, torch.Tensor]:
        """The tensors with as many slots as the longest segment has tokens. Shorter ones begin with empty slots."""
        lengths, ends = (
            each.view(len(self.head_lengths), -1, 1) for each in (self.starts.diff(), self.starts[1:])
        )  # (batch, kv_heads, 1)
        offsets = torch.arange(-max(self.longest, self.least_slots), 0, device=self.starts.device)
        is_empty = offsets < -lengths
        index = (ends + offsets).masked_fill(is_empty, 0)
        slots = {name: tensor[index] for name, tensor in self.tensors.items()}
        slots["positions"] = slots["positions"].masked_fill(is_empty, -1)
        if "attention" in slots:
            slots["attention"] = slots["attention"].masked_fill(is_empty, 0)
        return slots

    def attend(
        self,
        query: torch.Tensor,
        longest: int,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        sink_logits: None,
    ) -> tuple[torch.Tensor, ...]:
        """`decode_packed_attention` with the `logit_arguments` of a call. On a CPU compilers see what it computes."""
        kept = self.tensors["keys"], self.tensors["values"], self.starts, longest
        bias = self.tensors["bias"] if "bias" in self.tensors else None
        is_compiled = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not is_compiled:
            output, *sums = decode_packed_attention(
                query, *kept, key, value, scaling=scaling, softcap=softcap, mask=mask, packed_bias=bias
            )
            return output, *(each.detach() for each in sums)
        run = decode_by_segments if is_compiled and key.device.type == "cpu" else decode_packed_unchecked
        return run(query, *kept, key, value, scaling, softcap, mask, bias)

    def add_attention(
        self, latest: torch.Tensor, sums: list[torch.Tensor], window: int | torch.Tensor | None, mean: Callable
    ) -> None:
        """`SlotStore.add_attention` for packed tokens and the latest ones, whose attention is given."""
        windows = self._per_token(window) if isinstance(window, torch.Tensor) else window
        for attention, given, each in zip((self.tensors["attention"], latest), sums, (windows, window), strict=True):
            if each is not None:
                attention.mul_(1 - 1 / each)
            attention.add_(mean(given, each))

    def measured(self, sums: list[torch.Tensor], num_latest: int | torch.Tensor, measure: Callable) -> Any:
        """`SlotStore.measured` for packed tokens and the latest ones, of which each head holds so many."""
        num_visible = self.starts.diff().view(len(self.head_lengths), -1, 1) + num_latest
        return measure(sums[0], self._per_token(num_visible)), measure(sums[1], num_visible)

    def _per_token(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of the rows `(batch, 1, 1)`, or of all heads `(batch, kv_heads, 1)`, as one for each token."""
        places = torch.arange(len(self.tensors["positions"]), device=numbers.device)
        starts = self.starts[:: (len(self.starts) - 1) // numbers.numel()]
        return numbers.flatten()[torch.searchsorted(starts[1:-1], places, right=True)]

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PackedTokens":
        """The result of a function that selects, repeats or moves the rows of tensors."""
        indices = function(torch.arange(len(self.head_lengths), device=self.starts.device))
        device = indices.device
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        rows = indices.tolist()
        if rows == list(range(len(self.head_lengths))):
            return replace(self, tensors=tensors, starts=self.starts.to(device))
        for name, tensor in tensors.items():
            parts = tensor.split(self.row_sizes)
            tensors[name] = torch.cat([parts[row] for row in rows]) if rows else tensor[:0]
        head_lengths = [self.head_lengths[row] for row in rows]
        return PackedTokens(tensors, head_lengths, segment_starts(flat(head_lengths), device), self.least_slots)


class CompetingHeads(SlotStore):
    """
    Heads that share the budget of their layer (Ada-KV, https://arxiv.org/abs/2407.11550, Algorithm 1). With a budget
    of `n` tokens, a layer keeps of each row the best `kv_heads * n` tokens of all heads together. Each head keeps at
    least its own best `floor_ratio * n`. The numbers of tokens in `state.row_held` are means over heads.
    """

    heads_keep_equal_numbers = False
    floor_ratio: float

    def check_call(self, call: AttentionCall) -> None:
        super().check_call(call)
        if call.logit_arguments["sink_logits"] is not None:
            raise NotImplementedError(
                "Heads with learned attention sinks cannot hold different numbers of tokens. Give the cache "
                '`ranking="head"`, or use one whose heads keep equal numbers, such as SnapKVCache.'
            )

    def attend_several(
        self, call: AttentionCall, tokens: Tokens, num_rows: int = 0, row_weights: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """Attends with each KV head as a row of its own, since heads differ in their empty slots."""
        if self.state.is_dense:
            return super().attend_several(call, tokens, num_rows, row_weights)
        batch_size, kv_heads, num_keys = call.key.shape[:3]
        positions = tokens.positions.flatten(0, 1)[:, None]
        is_token = positions >= 0
        tokens = replace(
            tokens,
            positions=positions,
            row_lengths=[length for length in tokens.row_lengths for _ in range(kv_heads)],
            row_present=is_token.sum(dim=-1).flatten().tolist(),
        )
        per_head = replace(
            call,
            query=call.query.unflatten(1, (kv_heads, -1)).flatten(0, 1),
            key=call.key.flatten(0, 1)[:, None],
            value=call.value.flatten(0, 1)[:, None],
            bias=None if call.bias is None else call.bias.flatten(0, 1)[:, None],
            kwargs={name: value for name, value in call.kwargs.items() if name != "position_ids"},
        )
        if row_weights is not None:
            row_weights = row_weights.repeat_interleave(kv_heads, dim=0)
        (output, _), sums = super().attend_several(per_head, tokens, num_rows, row_weights)
        if output is not None:  # nobody needs that of tokens that were attended to before
            output = output.unflatten(0, (batch_size, kv_heads)).transpose(1, 2).flatten(2, 3)
        return (output, None), None if sums is None else sums.view(batch_size, kv_heads, num_keys)


class RaggedStore(CompetingHeads):
    """
    `packed` holds the kept tokens, or is None before the first eviction. The slots hold the later tokens.
    """

    def __init__(self, state_class: type[LayerState], floor_ratio: float) -> None:
        self.floor_ratio = floor_ratio
        super().__init__(state_class)

    def reset(self) -> None:
        super().reset()
        self.packed: PackedTokens | None = None

    def build_step(self, layer: Any, num_slots: int, in_graph: bool) -> FixedStep:
        if layer.budget.is_unlimited:
            return super().build_step(layer, num_slots, in_graph)
        return RaggedStep(layer, in_graph)

    def _pack(self, slots: dict[str, torch.Tensor], is_kept: torch.Tensor, least_slots: int = 0) -> None:
        """Packs the kept slots. Afterwards no slot is in use."""
        slots = {name: tensor.expand(-1, is_kept.shape[1], *tensor.shape[2:]) for name, tensor in slots.items()}
        self.packed = PackedTokens.of(slots, is_kept, least_slots)
        for name, tensor in slots.items():
            setattr(self.state, name, tensor.new_empty(*is_kept.shape[:2], 0, *tensor.shape[3:]))
        self.state.length = 0

    def unpack(self) -> None:
        """Unpacks the packed tokens into slots in front of the used ones."""
        if self.packed is not None:
            packed = self.packed.in_slots()
            for name, tensor in self.slots().items():
                setattr(self.state, name, torch.cat([packed[name], tensor], dim=2))
            self.state.length, self.packed = self.state.positions.shape[-1], None

    def pack_all(self) -> None:
        """Packs all tokens that are in slots, unless some are packed."""
        state = self.state
        if self.packed is None:
            tokens = self.held_positions()
            columns = self.slots() | {"positions": tokens}
            least_slots = tokens.shape[-1] if state.num_ranks > 1 else 0
            self._pack(columns, (tokens >= 0).expand(-1, state.keys.shape[1], -1), least_slots)

    @property
    def capacity(self) -> int:
        return super().capacity if self.packed is None else self.interval

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.packed is None and not self.state.is_dense:  # a refused call has unpacked them
            self.pack_all()
        super().append(key, value)

    def keep(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: torch.Tensor | None,
        priority: torch.Tensor,
        tokens: Tokens,
        row_kept: list[int],
        compact: Compaction | None = None,
    ) -> None:
        state = self.state
        state.row_held = [min(held, kept) for held, kept in zip(state.row_held, row_kept, strict=True)]
        self._pack_best(self._columns(key, value, attention, tokens), priority, state.row_held, compact)
        state.column_positions = None

    def evict(self, priority: torch.Tensor, row_left: list[int], compact: Compaction | None = None) -> None:
        self.state.row_held = row_left
        self._pack_best(self.slots(), priority, row_left, compact)

    def _pack_best(
        self, slots: dict[str, torch.Tensor], priority: torch.Tensor, row_kept: list[int], compact: Compaction | None
    ) -> None:
        """Packs the slots that stay. Priorities are those of the heads of all ranks."""
        is_kept, least_slots = best_of_all_heads(priority, row_kept, self.floor_ratio), 0
        if self.ranks is not None:
            # As many slots on each rank: so their next priorities are gathered without asking for sizes.
            least_slots = int(is_kept.sum(dim=-1).max())
            is_kept = self.ranks.own(is_kept)
        self._pack(slots if compact is None else slots | compact(slots, is_kept), is_kept, least_slots)

    def attend_step(self, call: AttentionCall, scores: bool) -> tuple[tuple[torch.Tensor, torch.Tensor | None], Any]:
        latest = self.in_use("keys"), self.in_use("values")
        output, *sums = self.packed.attend(call.query, self.packed.longest, *latest, None, **call.logit_arguments)
        return (output, None), sums if scores else None

    def add_attention(self, sums: Any, window: int | torch.Tensor | None, mean: Callable) -> None:
        if self.packed is None:
            super().add_attention(sums, window, mean)
        else:
            self.packed.add_attention(self.in_use("attention"), sums, window, mean)

    def measured(self, sums: Any, measure: Callable) -> Any:
        if self.packed is None:
            return super().measured(sums, measure)
        return self.packed.measured(sums, self.state.length, measure)

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map_rows(function)
        if self.packed is not None:
            self.packed = self.packed.map_rows(function)

    def leave_inference_mode(self) -> None:
        super().leave_inference_mode()
        if self.packed is None or torch.is_inference_mode_enabled() or not self.packed.starts.is_inference():
            return
        tensors = {name: tensor.clone() for name, tensor in self.packed.tensors.items()}
        self.packed = replace(self.packed, tensors=tensors, starts=self.packed.starts.clone())

    def _unpacked(self) -> SlotStore:
        """A store with all tokens in slots. It shares the other tensors with this one."""
        twin = copy.copy(self)
        twin.state = copy.copy(self.state)
        twin.unpack()
        return twin

    def held_positions(self) -> torch.Tensor:
        return super().held_positions() if self.packed is None else self._unpacked().held_positions()

    def held_attention(self) -> torch.Tensor | None:
        return super().held_attention() if self.packed is None else self._unpacked().held_attention()

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return super().state_dict() if self.packed is None else self._unpacked().state_dict()

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(numbers, tensors)
        if not self.state.is_dense:
            self.pack_all()

    def held_tensors(self) -> dict[str, torch.Tensor]:
        return super().held_tensors() | ({} if self.packed is None else self.packed.held_tensors())


def flat(head_lengths: list[list[int]]) -> list[int]:
    """Numbers per row and head as one number per segment."""
    return [length for row in head_lengths for length in row]
