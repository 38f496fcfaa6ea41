"""
The meeting of one decoder layer with its cache: `update` takes new tokens and returns what attention sees, `attend`
attends in the place of the model's attention function and lets the method evict.

Every check of a call comes before the call changes anything. A call that is refused leaves the layer as it was.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from pyramid_cache.engine import checks
from pyramid_cache.engine.arguments import as_tokens_to_remove, check_states
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.fixed import FixedStep
from pyramid_cache.engine.generation import modes_of
from pyramid_cache.engine.held import StoredLayer
from pyramid_cache.engine.pending import RecordedChunk
from pyramid_cache.engine.ranks import HeadRanks, ranks_of
from pyramid_cache.engine.rope import SharedFrequencies, check_one_axis
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.state import grown
from pyramid_cache.engine.store import own_storage
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops.registration import needs_gradients


class Arrival(NamedTuple):
    """
    New tokens between `update` and `attend`. The tensor of keys that `update` returns carries the layer to the
    attention function, in its attribute `cache_layer`.

    Attributes:
        num_new (`int`): How many there are in each row.
        slot_positions (`torch.Tensor`, *optional*): `(batch, kv_heads or 1, slots)`, of the tokens before them in the
            keys, if these were in slots and have been brought into order.
        put_aside (`tuple`, *optional*): The new keys and values, if `crop` may take them back.
        held (`dict`, *optional*): The slots in that order, for the store once the call is known to be right.
        free_slots (`torch.Tensor`, *optional*): `(batch, kv_heads or 1, 1)`, the slots that they took, if these were
            free ones among others.
        bias (`torch.Tensor`, *optional*): `(batch, kv_heads, slots)`, of the slots in that order.
    """

    num_new: int
    slot_positions: torch.Tensor | None = None
    put_aside: tuple[torch.Tensor, torch.Tensor] | None = None
    held: dict[str, torch.Tensor] | None = None
    free_slots: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def with_bias(self, call: AttentionCall) -> AttentionCall:
        """The call with the bias of the slots before the new tokens, which have none."""
        if self.bias is None:
            return call
        return replace(call, bias=grown(self.bias, self.bias.shape[2], call.num_keys, fill=0))


ONE_TOKEN = Arrival(1)


class OutsideOfGraph(NamedTuple):
    """The layer in the place of which compilers leave their graph."""

    layer: "CompressedLayer"

    @torch.compiler.disable
    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.layer.attend(call)


class CompressedLayer(StoredLayer):
    """What all layers of this package have in common."""

    # Whether the method must know how the model rotates keys.
    needs_rotary = False
    # How the model rotates keys. The cache gives it to its layers.
    frequencies: SharedFrequencies

    def _clear(self) -> None:
        super()._clear()
        self._module: weakref.ref | None = None
        self._rotary: tuple[RotaryFrequencies | None] | None = None
        # What the last step that was checked was given.
        self._known: tuple | None = None
        # How such steps are taken, and those of a graph.
        self._step: FixedStep | None = None

    # What a method decides.

    @abstractmethod
    def num_tokens_to_keep(self, row_length: int) -> int:
        """How many tokens of a row stay after `row_length` of them have been seen."""

    @abstractmethod
    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of several queries (or of the very first one), and the eviction that follows. The keys of `call` are
        those that the layer held, and the new ones behind them; `tokens` has their positions.
        """

    @abstractmethod
    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of one query over all held tokens, the new one included, and the eviction that follows. `longest` is
        the length of the longest row in the forward pass that the query is of.
        """

    def has_room(self, row_lengths: list[int]) -> bool:
        """Whether no layer of the cache evicts from rows of these lengths; all layers give the same answer."""
        return all(length <= self.num_tokens_to_keep(length) for length in row_lengths)

    def pack(self) -> None:  # noqa: B027
        """Brings the tokens into the form in which they are held between two forward passes."""

    def check_lengths(self, row_lengths: list[int]) -> None:
        """Raises if the budget has no room for prompts of these lengths."""
        for length in row_lengths:
            self.num_tokens_to_keep(length)

    # Steps of fixed shapes.

    # Whether the method has them.
    can_fix = False

    def may_fix(self, max_length: int | None = None) -> bool:
        """Whether the next step may have fixed shapes; see `CompressedCache.step`."""
        return False

    @property
    def takes_steps(self) -> bool:
        """Whether each row has seen a token, and no mask has hidden some, which steps of fixed shapes do not ask."""
        return all(self.state.row_lengths) and not self.state.has_traces

    def fix(self, max_length: int | None = None, in_graph: bool = False) -> FixedStep:
        """Gives the tensors the sizes that they will need, up to a length of the sequence, and returns the step."""
        raise NotImplementedError

    # The meeting with the model.

    @property
    def module(self) -> torch.nn.Module | None:
        """The attention module that fills the layer; None before the first one, and when the model is gone."""
        return None if self._module is None else self._module()

    @module.setter
    def module(self, module: torch.nn.Module) -> None:
        checks.check_module(self, module)
        self._module = weakref.ref(module)

    def knows(self, key: torch.Tensor, value: torch.Tensor, modes: tuple | None) -> bool:
        """Whether new keys and values are a step like the last one, which was checked. They need no checks then."""
        return (
            self._known is not None
            and type(key) is type(value) is torch.Tensor
            and self._known == (key.shape, value.shape, key.dtype, value.dtype, modes)
            and self.arrival is None
            and not self.pending.is_on
        )

    def take_step(self, step: FixedStep | None) -> None:
        """The layer takes steps in this way from now on, until it is given other tokens."""
        self._known, self._step = None, step

    def update_known(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` with keys and values that the layer `knows`."""
        if self._step is None:
            self._step = self.fix()
        keys, values = self._step.update(key, value)
        self.arrival = ONE_TOKEN
        keys.cache_layer = self  # type: ignore[attr-defined]
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the new tokens.

        Args:
            key_states, value_states (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The keys and values that attention sees, `(batch, kv_heads, keys,
            head_dim)`, the new ones last.

        Raises:
            ValueError: The tensors do not fit those that the cache holds.
            RuntimeError: The attention function never got the keys of the last `update`.
        """
        self._known = self._step = None
        checks.check_attended(self)
        check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        checks.check_fit(self, key_states, value_states)
        self.store.leave_inference_mode()
        take_in = self._put_aside if self.pending.is_on else self._store
        keys, values, self.arrival = take_in(key_states, value_states)
        keys.cache_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        """Stores new tokens; returns all keys and values that they attend to."""
        self._step = None
        num_new = key.shape[2]
        if self.state.is_dense or self._is_step(num_new):
            free_slots = self.state.free_slots
            self.store.append(key, value)
            return *self.store.attended(), Arrival(num_new, free_slots=free_slots)
        held = self.store.in_order()
        keys, values = torch.cat([held["keys"], key], dim=2), torch.cat([held["values"], value], dim=2)
        return keys, values, Arrival(num_new, held["positions"], held=held, bias=held.get("bias"))

    def _is_step(self, num_new: int) -> bool:
        """Whether new tokens are a decode step: one token in each row, and none is the first of its row."""
        return num_new == 1 and all(self.state.row_lengths)

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attends in the place of the model's attention function.

        Args:
            call (`AttentionCall`): The model's call. Its keys and values are those that `update` returned. Its mask
                has a column for each column seen.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: The output `(batch, num_queries, heads, head_dim)`, and the
            attention weights if the attention function returned them.
        """
        # Autograd may save the key. A way from it back to the layer would be a cycle that no collector can free.
        call.key.cache_layer = None  # type: ignore[attr-defined]
        arrival, self.arrival, step, seen = self.arrival, None, self._step, None
        is_step = step is not None or (self._is_step(arrival.num_new) and arrival.put_aside is None)
        try:
            if step is None:
                is_step = is_step and not checks.hides_tokens(self, call)
                self.check(call, arrival, is_step)
                seen = None if is_step else self._read(call, arrival)
                # Autograd saves keys that need no gradient, if queries need one, as with adapters on some projections.
                self.store.is_saved = needs_gradients(call.query, call.key, call.value)
            elif call.function is not step.function or call.module is not self._module():
                self.check(call, arrival, is_step=True)
                step.function = call.function
            elif self.place.depth == 0:  # what may differ from step to step is the same in all layers
                checks.check_attentions()
                checks.check_step(self, call)
        except (ValueError, NotImplementedError):
            self._refuse(arrival)
            self.pack()
            raise
        try:
            if step is not None:
                step.count()
                output = step.attend(call)
                step.settle()
                return output
            output = self._attend_next(call) if is_step else self._attend_several(call, arrival, seen)
            self.pack()
        except BaseException:  # the layer is half changed, as the next call of the model shall notice
            # Tokens that are not put aside have been counted.
            self.arrival = arrival._replace(num_new=0) if arrival.put_aside is None else arrival
            raise
        modes = modes_of(call.key.device.type)
        if is_step and self.may_fix() and not self.state.is_dense and modes[1:] == (False, False):
            shapes = (torch.Size((*each.shape[:2], 1, each.shape[3])) for each in (call.key, call.value))
            self._known = (*shapes, call.key.dtype, call.value.dtype, modes)
        return output

    def check(self, call: AttentionCall, arrival: Arrival, is_step: bool) -> None:
        """Raises unless the layer can attend; nothing has been counted so far."""
        if self.needs_rotary and call.num_queries > 1 and not self.place.depth:  # one layer speaks for all
            check_one_axis(call.module)
        if self.module is None:
            self.set_ranks(ranks_of(call.module, call.query.shape[1], call.key.shape[1]))
            self.module = call.module
            if self.needs_rotary:
                self.rotary_of(call.module)  # which tells it only while it runs
        checks.check_call(self, call, arrival.num_new)
        if not self.state.is_dense:
            checks.check_attentions()
        self.store.check_call(call)
        if is_step:
            checks.check_step(self, call)

    def set_ranks(self, ranks: HeadRanks | None) -> None:
        """Says which ranks share the heads of the layer."""
        checks.check_ranks(self, ranks)
        self.store.ranks = ranks
        if ranks is not None:
            self.state.rank, self.state.num_ranks = ranks.rank, ranks.size

    def rotary_of(self, module: torch.nn.Module) -> RotaryFrequencies | None:
        """How the attention module rotates keys. The first call finds out, in a few milliseconds."""
        if self._rotary is None:
            self._rotary = (self.frequencies.frequencies_of(module, self.device),)
        return self._rotary[0]

    def _refuse(self, arrival: Arrival) -> None:
        """Takes back the tokens of a call that is refused."""
        if self._step is not None:
            self._step.take_back()
            return
        if arrival.put_aside is not None or arrival.slot_positions is not None:
            return
        self.store.take_back(arrival.num_new, arrival.free_slots)
        if not any(self.state.row_lengths):
            self._clear()

    def _read(self, call: AttentionCall, arrival: Arrival) -> Tokens:
        """The columns seen, as the mask shows them."""
        seen, hides_some = checks.read_tokens(self, call)
        seen = seen.to(self.device)
        if arrival.put_aside is not None:
            checks.check_left_padding(seen, "records tokens that may be taken back")
        elif self.loses_tokens(seen):
            checks.check_left_padding(seen, "has to evict")
            checks.check_attentions()
        self.state.has_traces |= hides_some
        return seen

    def loses_tokens(self, seen: Tokens) -> bool:
        """Whether the layer evicts from, or rearranges, the tokens that it holds with these."""
        if not self.state.is_dense:
            return True
        return any(length > self.num_tokens_to_keep(length) for length in seen.row_lengths)

    @torch.compiler.disable
    def _attend_several(
        self, call: AttentionCall, arrival: Arrival, seen: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to a prompt, or to tokens that may be taken back. Compilers break the graph here, not in steps."""
        call = arrival.with_bias(call)
        if arrival.put_aside is None:
            return self.attend_prompt(call, self._take_in(seen, arrival))
        num_new = call.num_keys - (0 if arrival.slot_positions is None else arrival.slot_positions.shape[-1])
        tokens = seen if arrival.slot_positions is None else self._behind_slots(seen, arrival.slot_positions, num_new)
        output = self.attend_recorded(call, tokens)
        self.pending.chunks.append(RecordedChunk.of(call, *arrival.put_aside, seen))
        return output

    def _attend_next(self, call: AttentionCall, longest: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Counts the new token of each row and attends to it."""
        state = self.state
        state.num_seen += 1
        state.row_lengths = [length + 1 for length in state.row_lengths]
        state.row_held = [held + 1 for held in state.row_held]
        state.next_position += 1
        return self.attend_step(call, longest or max(state.row_lengths))

    def _take_in(self, seen: Tokens, arrival: Arrival) -> Tokens:
        """The tokens in the columns of the keys that attention gets. Updates the counts of the rows."""
        state, tokens = self.state, seen
        if arrival.slot_positions is not None:
            self.store.put_in_order(arrival.held)
            tokens = self._behind_slots(seen, arrival.slot_positions, arrival.num_new)
        else:
            state.column_positions = seen.positions if seen.has_gaps else None
            state.columns_ascend = int(seen.is_ascending)
        state.num_seen = seen.num_seen
        state.row_lengths, state.row_held = list(tokens.row_lengths), list(tokens.row_present)
        state.next_position = self.store.per_row(state.row_lengths)
        self._count_kept()
        return tokens

    def _count_kept(self) -> None:
        """How many tokens each row may hold now."""
        self.set_kept([self.num_tokens_to_keep(length) for length in self.state.row_lengths])

    def set_kept(self, row_kept: list[int]) -> None:
        """Each row may hold this many tokens."""
        self.state.row_kept, self.state.num_kept = row_kept, self.store.per_row(row_kept)

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        """
        The tokens in slots with these positions, and in `num_new` columns behind them: the last columns of `seen`.
        """
        new = seen.positions[..., -num_new:].expand(-1, slot_positions.shape[1], -1)
        rows = zip(seen.row_lengths, self.state.row_lengths, strict=True)
        num_new_tokens = [length - before for length, before in rows]
        return replace(
            seen,
            positions=torch.cat([slot_positions, new], dim=-1),
            row_present=[held + count for held, count in zip(self.state.row_held, num_new_tokens, strict=True)],
            is_ascending=min(num_new_tokens) == num_new,
        )

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: list[int] | None = None) -> None:
        self._step = None  # which holds on to the tensors as they were
        super()._map_rows(function, rows)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        shared = enumerate(self.frequencies.held_tensors())
        own = {} if self._step is None else self._step.own_tensors()
        return super().held_tensors() | own | {f"frequencies_{index}": tensor for index, tensor in shared}

    # Tokens that may be taken back.

    @property
    def record_past(self) -> bool:
        """
        Whether new tokens are put aside until `crop` is called; transformers' own layers have the same attribute.
        """
        return self.pending.is_on

    @record_past.setter
    def record_past(self, is_on: bool) -> None:
        if not is_on:
            self._settle()
        self.pending.is_on = is_on

    def activate_past_recording(self) -> None:
        """
        Nothing is evicted from now on until the next `crop`, which may take tokens back. Of the tokens that stay,
        those of the next forward pass are then treated as a prompt, and later ones as generated one by one.
        """
        self.pending.begins_turn |= not self.pending.is_on
        self.pending.is_on = True

    def _put_aside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        """Keys and values for attention: the held, the recorded and the new ones, which wait for `attend`."""
        new = own_storage(key), own_storage(value)
        parts, positions, bias = [], None, None
        if not self.state.is_dense:
            held = self.store.in_order()
            parts, positions, bias = [(held["keys"], held["values"])], held["positions"], held.get("bias")
        elif self.state.keys is not None:
            parts = [(self.store.in_use("keys"), self.store.in_use("values"))]
        parts += [*((chunk.key, chunk.value) for chunk in self.pending.chunks), new]
        keys, values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True)) if len(parts) > 1 else new
        return keys[:], values, Arrival(key.shape[2], positions, new, bias=bias)

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of tokens that may be taken back. The layer stays as it is. The keys of `call` are the held ones in
        order of position, then the recorded and the new ones; `tokens` has their positions.
        """
        return self.store.attend_several(call, tokens)[0]

    def _settle(self) -> None:
        """Stores and scores the recorded tokens as if they came now, and evicts."""
        checks.check_settleable(self)
        for piece, is_prompt in self.pending.settle(lambda: all(self.state.row_lengths)):
            *states, arrival = self._store(piece.key, piece.value)
            call = arrival.with_bias(piece.call(self.module, *states))
            if is_prompt:
                self.attend_prompt(call, self._take_in(replace(piece.seen, longest=piece.longest), arrival))
            else:
                self._attend_next(call, piece.longest)
            self.pack()

    # Evictions that wait, and tokens that are taken back.

    def compress(self) -> None:
        """Evicts the tokens beyond the budget, if the method lets them wait."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take back tokens that were not recorded: only if none was evicted."""
        return self.state.is_dense

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes back the last `-tokens_to_remove` tokens; then, if the past was recorded, does the evictions that waited.

        Raises:
            ValueError: A positive number, or more than the layer has seen.
            NotImplementedError: Tokens that were not recorded have been evicted since, which cannot be undone.
        """
        tokens_to_remove = as_tokens_to_remove(tokens_to_remove)
        self.require_croppable(tokens_to_remove)
        if not self.is_initialized:
            return
        self._step = None
        self.store.leave_inference_mode()
        if num_left := self.pending.take_back(-tokens_to_remove):
            self._crop_held(num_left)
        self._settle()

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raises unless `crop(tokens_to_remove)` is possible."""
        if self.is_initialized:
            checks.check_crop(self, tokens_to_remove)

    def _crop_held(self, num_columns: int) -> None:
        """Takes back the last columns of a dense layer."""
        state = self.state
        positions = self.store.column_tokens().positions[..., : state.length - num_columns]
        state.length -= num_columns
        state.num_seen -= num_columns
        state.row_lengths = [state.length] * self.batch_size
        if state.column_positions is not None:
            state.column_positions = positions.contiguous()
            state.row_lengths = (positions[:, 0] >= 0).sum(dim=-1).tolist()
        state.row_held = list(state.row_lengths)
        state.next_position = self.store.per_row(state.row_lengths)
