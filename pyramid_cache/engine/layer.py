"""
The cache of one decoder layer: its slots, their positions, and the meeting with attention.

A layer is *dense* until it evicts. It holds all tokens in order of arrival, padding included, and the model's own
attention function runs on them with the model's mask. So it is `DynamicCache` bit for bit. From the first eviction on
it holds *slots*: keys and values of the tokens it kept, the position of each (-1: empty), and the scores of its
method. Keys carry RoPE at their original positions, so that slots need no order.

While a layer records the past, it puts new tokens aside until `crop` has told which of them stay (see `recording`).

A method derives a layer. It decides how many tokens stay, and what happens in a prompt and in a decode step.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from pyramid_cache.engine.arguments import as_tokens_to_remove, check_states
from pyramid_cache.engine.attention import AttentionCall, is_asked_for
from pyramid_cache.engine.budget import Budget, bytes_to_tokens
from pyramid_cache.engine.fingerprint import WeightFingerprint
from pyramid_cache.engine.recording import RecordedChunk
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens, causal_mask
from pyramid_cache.ops.registration import needs_gradients
from pyramid_cache.ops.transfer import numbers_on


# A layer without room for one more token grows by this many slots, or by a 64th of its length if that is more.
MIN_GROWTH = 16


@dataclass(frozen=True)
class LayerPlace:
    """
    The place of a layer in its model.

    Attributes:
        layer_idx (`int`): Its index in the model.
        depth (`int`): Its rank among the layers that evict.
        num_layers (`int`): How many layers evict.
        model_depth (`int`): How many layers of all kinds the model has.
    """

    layer_idx: int
    depth: int
    num_layers: int
    model_depth: int


class CompressedLayer(CacheLayerMixin):
    """
    Base of all layers: storage, positions, masks, and the batch operations of beam search.

    Keys and values are `(batch, kv_heads, slots, head_dim)`, positions `(batch, kv_heads or 1, slots)` int32. The
    tensors named in `slot_tensors` have their slots in dimension 2, those in `row_tensors` only share the batch
    dimension.

    Args:
        place (`LayerPlace`): Which layer of the model this is.
        budget (`Budget`, *optional*): How many tokens this layer may keep. Without one the method has its own limit.
        masks (`MaskReader`): Shared by the layers of a cache.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    slot_tensors: tuple[str, ...] = ("keys", "values", "positions")
    row_tensors: tuple[str, ...] = ("next_position", "column_positions")
    row_counts: tuple[str, ...] = ("row_lengths", "row_held", "row_kept")
    # The rest of a saved layer: numbers, and the names of tensors that a method exports and imports on its own.
    state_numbers: tuple[str, ...] = ("num_seen", "columns_ascend")
    extra_tensors: tuple[str, ...] = ()
    # Slots that may be allocated beyond the tokens that are kept, for methods that write before they evict.
    num_spare_slots = 0
    # Whether all heads of a layer keep the same tokens.
    heads_share_positions = True
    # Whether all KV heads hold the same number of tokens.
    heads_keep_equal_numbers = True
    # Whether tokens that are not held are lost. ShadowKV brings them back when they are attended to.
    evicts = True

    def __init__(self, place: LayerPlace, budget: Budget | None, masks: MaskReader) -> None:
        super().__init__()
        self.place = place
        self.budget = budget
        self.masks = masks
        self._clear()

    def _clear(self) -> None:
        for name in (*self.slot_tensors, *self.row_tensors):
            setattr(self, name, None)
        self.is_initialized = False
        # The first tokens tell how many tokens a budget in bytes pays for.
        in_bytes = self.budget is not None and self.budget.kind == "bytes"
        self.token_budget = None if in_bytes else self.budget
        self.length = 0
        self.num_seen = 0
        # Per row, known without asking the device: tokens seen, tokens held, tokens that may be held.
        self.row_lengths: list[int] = []
        self.row_held: list[int] = []
        self.row_kept: list[int] = []
        self.columns_ascend = True
        # Tokens that `crop` may still take back, and whether the next ones begin a turn or go on with it.
        self._records_past = False
        self.recorded: list[RecordedChunk] = []
        self.turn_begins = False
        self._arriving: tuple[torch.Tensor, torch.Tensor] | None = None
        self._slots_in_order: dict[str, torch.Tensor] | None = None
        self.replayed: RecordedChunk | None = None
        # Set from outside when hidden states were pruned before this layer: the tokens that are about to arrive.
        self.incoming: Tokens | None = None
        self.num_pending = 0
        self._module: weakref.ref | None = None
        self._is_saved = False
        # The weights of the attention module that filled this layer, if it was loaded from a file.
        self.expected_weights: WeightFingerprint | None = None

    # What a method decides.

    @abstractmethod
    def num_tokens_to_keep(self, row_length: int) -> int:
        """How many tokens of a row stay after `row_length` of them have been seen."""

    @abstractmethod
    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of several queries (or of the very first one), and the eviction that follows. The keys of `call` are
        those that the layer held, and the new ones behind them; `tokens` has their positions. An eviction calls
        `keep`.
        """

    @abstractmethod
    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query over all held tokens, the new one included, and the eviction that follows."""

    # The meeting with the model: `update`, then `attend`.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch_size, kv_heads, _, head_dim = key_states.shape
        self.batch_size = batch_size
        self._key_shape, self._value_shape = (kv_heads, head_dim), (kv_heads, value_states.shape[-1])
        self._value_dtype = value_states.dtype  # under autocast another one than that of keys
        self.row_lengths = [0] * batch_size
        self.row_held = [0] * batch_size
        self.next_position = torch.zeros(batch_size, 1, 1, dtype=torch.int32, device=self.device)
        if self.budget is not None and self.budget.kind == "bytes":
            num_tokens = bytes_to_tokens(
                int(self.budget.amount), self.place.num_layers, batch_size, self.bytes_per_token, self.num_spare_slots
            )
            self.token_budget = Budget("tokens", num_tokens)
        self.is_initialized = True

    @property
    def bytes_per_token(self) -> int:
        """Keys, values and bookkeeping of one token of one row."""
        kv_heads = self._key_shape[0]
        bookkeeping = 4 * (len(self.slot_tensors) - 2) * (1 if self.heads_share_positions else kv_heads)
        return kv_heads * (self._key_shape[1] + self._value_shape[1]) * self.dtype.itemsize + bookkeeping

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the new tokens and returns the keys and values for attention. The key tensor carries the layer in its
        attribute `cache_layer`, by which the attention function finds `attend`.

        Raises:
            ValueError: The tensors do not fit those that the cache holds.
            RuntimeError: The attention function never got the keys of the last `update`.
        """
        self.require_attended()
        check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_states(key_states, value_states)
        self.leave_inference_mode()
        self.num_pending = key_states.shape[2]
        if self.record_past:
            keys, values = self._with_recorded(key_states, value_states)
        else:
            keys, values = self._store(key_states, value_states)
        keys = keys[:]  # an object of its own: the layer must not refer to itself through it
        keys.cache_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _store(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new tokens and returns all keys and values that they attend to."""
        num_new = key_states.shape[2]
        self._spare_autograd()
        if self.positions is None and self._is_step(num_new):
            self._before_append()
        if self.positions is None:
            self._append(key_states, value_states)
            keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        elif self._is_step(num_new):
            self._write(key_states, value_states)
            keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        else:
            self._slots_in_order = held = self._take_slots()
            keys = torch.cat([held["keys"], key_states], dim=2)
            values = torch.cat([held["values"], value_states], dim=2)
        self.num_seen = self.num_seen + num_new if self.incoming is None else self.incoming.num_seen
        return keys, values

    def _is_step(self, num_new: int) -> bool:
        """Whether new tokens are a decode step: one token in each row, and none is the first of its row."""
        return num_new == 1 and self.incoming is None and all(self.row_lengths)

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
        # Autograd saves keys that need no gradient, if queries need one, as with adapters on some projections.
        self._is_saved = needs_gradients(call.query, call.key, call.value)
        num_new = call.num_queries
        if num_new != self.num_pending:
            raise RuntimeError(
                f"Layer {self.place.layer_idx} was given {self.num_pending} tokens and asked for {num_new} queries: "
                "the model's attention calls `update` in a way that pyramid_cache does not know. Use DynamicCache "
                "for this model."
            )
        self._check_module(call.module)
        self._check_call(call)
        if self._is_step(num_new) and not self.record_past:
            self._check_step(call)
            output = self._attend_next(call)
        else:
            output = self._attend_several(call)
        if self.positions is not None and is_asked_for("attentions"):
            raise NotImplementedError(
                "`output_attentions=True`: attention weights over a cache that evicts have no columns for what was "
                "evicted. Use DynamicCache, or a budget that holds the whole sequence."
            )
        self.num_pending = 0
        self.incoming = None
        return output

    @torch.compiler.disable
    def _attend_several(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to a prompt, or to tokens that may be taken back. Compilers break the graph here, not in steps."""
        if self.record_past:
            return self._record(call)
        seen = self._read_tokens(call) if self.incoming is None else self.incoming.to(self.device)
        return self.attend_prompt(call, self._take_in(seen, call.num_queries))

    def _attend_next(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Counts the new token of each row and attends to it."""
        self.row_lengths = [length + 1 for length in self.row_lengths]
        self.row_held = [held + 1 for held in self.row_held]
        self.next_position += 1
        return self.attend_step(call)

    def require_attended(self) -> None:
        """Raises if the attention function never got the keys that `update` returned."""
        if self.num_pending:
            raise RuntimeError(
                f"The attention of layer {self.place.layer_idx} did not go through the attention interface of "
                "transformers, so the cache never saw its queries. Load the model with attn_implementation='sdpa', "
                "'eager' or 'flash_attention_2'; a model that supports none of them through the interface needs "
                "DynamicCache. After an interrupted forward pass, call `cache.reset()`."
            )

    def _check_states(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, kv_heads, _, head_dim = key_states.shape
        if batch_size != self.batch_size:
            repeats, rest = divmod(batch_size, self.batch_size)
            way_on = f"To go on from each row {repeats} times, call `cache.batch_repeat_interleave({repeats})` first. "
            raise ValueError(
                f"The cache holds {self.batch_size} rows, but the model was given {batch_size}. "
                f"{'' if rest else way_on}Use a new cache for another batch, or call `cache.reset()`."
            )
        value_dim = value_states.shape[-1]
        if (kv_heads, head_dim) != self._key_shape or (kv_heads, value_dim) != self._value_shape:
            raise ValueError(
                f"The cache holds {self._key_shape[0]} KV heads of width {self._key_shape[1]} (keys) and "
                f"{self._value_shape[1]} (values), but layer {self.place.layer_idx} of this model has {kv_heads} of "
                f"width {head_dim} and {value_dim}. Use a new cache for another model."
            )
        given = (key_states.dtype, value_states.dtype, key_states.device)
        if given != (self.dtype, self._value_dtype, self.device):
            raise ValueError(
                f"The cache holds {self.dtype} (keys) and {self._value_dtype} (values) on {self.device}, but was "
                f"given {given[0]} and {given[1]} on {given[2]}. Use a new cache, or call `cache.reset()`."
            )

    def _check_module(self, module: torch.nn.Module) -> None:
        owner = None if self._module is None else self._module()
        if owner is None:
            if not getattr(module, "is_causal", True):
                raise NotImplementedError(
                    f"{type(module).__name__} attends in both directions: it has no past that a KV cache could hold."
                )
            config = getattr(module, "config", None)
            depth = None if config is None else config.get_text_config(decoder=True).num_hidden_layers
            if depth is not None and depth != self.place.model_depth:
                raise ValueError(
                    f"The cache was built for {self.place.model_depth} layers, but the model has {depth}. Build the "
                    "cache from the config of the model that it is used with."
                )
            if self.expected_weights is not None:
                self.expected_weights.require_same(module)
            self._module = weakref.ref(module)
        elif owner is not module:
            raise ValueError(
                "The cache was filled by another model. Use a new cache for each model, or call `cache.reset()` "
                "before it changes hands."
            )

    def _check_call(self, call: AttentionCall) -> None:
        implementation = getattr(getattr(call.module, "config", None), "_attn_implementation", None) or "eager"
        if implementation not in ("eager", "sdpa") and "flash" not in implementation:
            raise NotImplementedError(
                f"attn_implementation={implementation!r} is not known to pyramid_cache, which must attend and make "
                "masks in its place. Load the model with 'sdpa', 'eager' or 'flash_attention_2'."
            )
        if call.kwargs.get("position_bias") is not None:
            raise NotImplementedError("Attention with a learned position bias is not supported. Use DynamicCache.")
        if call.kwargs.get("dropout") and self.positions is not None:
            raise NotImplementedError(
                "Attention dropout is not supported once tokens are evicted. Call `model.eval()`."
            )

    def _check_step(self, call: AttentionCall) -> None:
        if torch.compiler.is_compiling():  # which cannot read tensors
            return
        if call.mask is None and min(self.row_lengths) + 1 < self.num_seen:
            raise ValueError(
                f"There is no attention mask, or one that hides nothing, but of the {self.num_seen - 1} columns seen "
                f"so far only {self.row_lengths} are tokens. Pass a mask that covers the tokens in the cache and the "
                "new one, and hides padding."
            )
        if self.device.type != "cpu":  # reading tensors on an accelerator would wait for it at every token
            return
        self._check_position_ids(call, self.row_lengths)
        if call.mask is None:
            return
        shown = self.masks.count(call.mask, self.batch_size, self.num_seen)
        if shown != [length + 1 for length in self.row_lengths]:
            raise ValueError(
                f"The attention mask shows {shown} tokens per row, but {self.row_lengths} have been seen before "
                "this one. Pass a mask that covers the tokens in the cache and the new one, and hides padding only."
            )

    def _check_position_ids(self, call: AttentionCall, row_lengths: list[int], seen: Tokens | None = None) -> None:
        """
        Raises if the position ids of new tokens are lower than those of tokens seen before: the model was given a
        sequence from its start again. Higher ids are allowed, since the ids of some models count padding.

        Args:
            row_lengths (`list[int]`): How many tokens each row has seen before these.
            seen (`Tokens`, *optional*): All tokens seen, the new ones included. Without it, a mask was too short to be
                read: the new columns of a row then count as tokens if their position ids rise by one.
        """
        position_ids, num_new = call.kwargs.get("position_ids"), call.num_queries
        if self.place.depth or position_ids is None:  # one layer speaks for all
            return
        if position_ids.dim() != 2 or position_ids.shape[1] != num_new:
            return
        ends = torch.cat([position_ids[:, :1], position_ids[:, -1:]], dim=1).expand(self.batch_size, -1).tolist()
        if seen is None:
            lengths = [
                length + num_new if last - first == num_new - 1 else 0
                for (first, last), length in zip(ends, row_lengths, strict=True)
            ]
        else:
            lengths = seen.row_lengths
        if any(last < length - 1 for (_, last), length in zip(ends, lengths, strict=True)):
            raise ValueError(
                f"`position_ids` end at {[last for _, last in ends]}, but the cache has seen {row_lengths} tokens: it "
                "is fed a sequence from its start again. Give `generate` the whole history with new tokens at its "
                "end, and neither `use_cache=False` nor an assistant with a cache in use; or call `cache.reset()` "
                "for another sequence."
            )

    def _read_tokens(self, call: AttentionCall) -> Tokens:
        """The columns that all rows have seen, the new ones included, as the mask shows them."""
        num_new = call.num_queries
        num_seen = self.get_seq_length() + (num_new if self.record_past else 0)
        expected = self.num_seen_per_row
        if call.mask is None and any(expected):
            self._check_position_ids(call, expected)
        try:
            tokens = self.masks.read(call.mask, self.batch_size, num_new, num_seen, self.device)
        except ValueError:
            if any(expected):  # The mask is short because the sequence was restarted: report that instead.
                self._check_position_ids(call, expected)
            raise
        num_earlier = num_seen - num_new
        earlier = [num_earlier] * self.batch_size
        if tokens.has_gaps:
            earlier = (tokens.positions[:, 0, :num_earlier] >= 0).sum(dim=-1).tolist()
        if any(expected) and not tokens.ends_in_padding:
            self._check_position_ids(call, expected, tokens)
        if earlier != expected:
            raise ValueError(
                f"The attention mask shows {earlier} earlier tokens per row, but {expected} have been seen. "
                "Pass a mask that covers the tokens in the cache as it did when they were new."
            )
        return tokens

    def _take_in(self, seen: Tokens, num_new: int) -> Tokens:
        """The tokens in the columns of the keys that attention gets. Updates the counts of the rows."""
        if self.positions is None:
            tokens = seen
            self.column_positions = seen.positions if seen.has_gaps else None
            self.columns_ascend = seen.is_ascending
        else:
            tokens = self._behind_slots(seen, self._slots_in_order["positions"], num_new)
            self._slots_in_order = None
        self.row_lengths, self.row_held = list(tokens.row_lengths), list(tokens.row_present)
        self.next_position = self.per_row(self.row_lengths)
        self.row_kept = [self.num_tokens_to_keep(length) for length in self.row_lengths]
        return tokens

    def _behind_slots(self, seen: Tokens, slot_positions: torch.Tensor, num_new: int) -> Tokens:
        """
        The tokens in slots with these positions, and in `num_new` columns behind them: the last columns of `seen`.
        """
        new = seen.positions[..., -num_new:].expand(-1, slot_positions.shape[1], -1)
        num_new_tokens = [length - before for length, before in zip(seen.row_lengths, self.row_lengths, strict=True)]
        return replace(
            seen,
            positions=torch.cat([slot_positions, new], dim=-1),
            row_present=[held + count for held, count in zip(self.row_held, num_new_tokens, strict=True)],
            is_ascending=min(num_new_tokens) == num_new,
        )

    # Tokens that may be taken back.

    @property
    def record_past(self) -> bool:
        """
        Whether new tokens are put aside until `crop` is called; transformers' own layers have the same attribute.
        """
        return self._records_past

    @record_past.setter
    def record_past(self, is_on: bool) -> None:
        if not is_on:
            self._settle()
        self._records_past = is_on

    @property
    def is_recording_tokens(self) -> bool:
        """Whether recorded tokens wait for `crop`."""
        return bool(self.recorded)

    def activate_past_recording(self) -> None:
        """
        Nothing is evicted from now on until the next `crop`, which may take tokens back. Of the tokens that stay,
        those of the next forward pass are then treated as a prompt, and later ones as generated one by one.
        """
        if not self.record_past:
            self.turn_begins = True
        self._records_past = True

    @property
    def last_recorded(self) -> tuple[torch.nn.Module, RecordedChunk]:
        """The chunk that was recorded last, and the attention module that it came from."""
        return self._module(), self.recorded[-1]

    def put_aside(self, module: torch.nn.Module, chunk: RecordedChunk) -> None:
        """Records a chunk of another layer, as if it had come from the attention module of this one."""
        self.lazy_initialization(chunk.key, chunk.value)
        self._check_module(module)
        self.activate_past_recording()
        self.recorded.append(chunk)

    def _with_recorded(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for attention: the held, the recorded and the new tokens. The new ones wait for `attend`."""
        self._arriving = own_storage(key_states), own_storage(value_states)
        self._slots_in_order = None if self.positions is None else self._sorted_slots()
        parts = []
        if self._slots_in_order is not None:
            parts = [(self._slots_in_order["keys"], self._slots_in_order["values"])]
        elif self.keys is not None:
            parts = [(self.keys[:, :, : self.length], self.values[:, :, : self.length])]
        parts += [(chunk.key, chunk.value) for chunk in self.recorded]
        if not parts:
            return self._arriving
        keys, values = zip(*parts, self._arriving, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _record(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to new tokens and records them with their queries."""
        seen = self._read_tokens(call)
        if seen.ends_in_padding:
            raise NotImplementedError(
                "Some rows of the batch are padded on the right, and the cache records tokens that may be taken "
                "back. Pad on the left (tokenizer.padding_side = 'left')."
            )
        tokens = seen
        if self.positions is not None:
            slot_positions = self._slots_in_order["positions"]
            tokens = self._behind_slots(seen, slot_positions, call.num_keys - slot_positions.shape[-1])
        output = self.attend_recorded(call, tokens)
        (key, value), self._arriving, self._slots_in_order = self._arriving, None, None
        self.recorded.append(RecordedChunk.of(call, key, value, seen))
        return output

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention of tokens that may be taken back. The layer stays as it is. The keys of `call` are the held ones in
        order of position, then the recorded and the new ones; `tokens` has their positions.
        """
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        return call.run()

    def _settle(self) -> None:
        """Stores and scores the recorded tokens as if they came now, and evicts."""
        self._require_module_of_recorded()
        while self.recorded:
            chunk = self.recorded.pop(0)
            if not chunk.num_columns:
                continue
            is_turn = self.turn_begins and chunk.num_columns > 1
            is_prompt = is_turn or not all(self.row_lengths) or chunk.has_padding
            self.turn_begins = False
            for piece in [chunk] if is_prompt else chunk.steps():
                self.replayed = piece
                call = piece.call(self._module(), *self._store(piece.key, piece.value))
                if not is_prompt:
                    self._attend_next(call)
                    continue
                self.attend_prompt(call, self._take_in(piece.seen, piece.num_columns))
            self.replayed = None

    # Storage.

    @property
    def has_empty_slots(self) -> bool:
        """Whether some row holds fewer tokens than the layer has slots. The host knows without asking the device."""
        return min(self.row_held) < self.length

    @property
    def max_slots(self) -> int:
        """How many slots the layer needs once it evicts."""
        return max(self.row_kept) + self.num_spare_slots

    @property
    def must_evict(self) -> bool:
        """Whether some row holds more tokens than it may keep."""
        return any(held > kept for held, kept in zip(self.row_held, self.row_kept, strict=True))

    @property
    def column_tokens(self) -> Tokens:
        """The tokens in the columns of a dense layer."""
        if self.column_positions is None:
            return Tokens.without_padding(self.batch_size, self.length, self.device)
        # Columns that arrived one at a time are tokens.
        num_steps = self.length - self.column_positions.shape[-1]
        steps = self.next_position + torch.arange(-num_steps, 0, dtype=torch.int32, device=self.device)
        positions = torch.cat([self.column_positions, steps], dim=-1)
        return Tokens(
            positions,
            self.row_lengths,
            self.row_held,
            self.num_seen,
            ends_in_padding=False,
            is_ascending=self.columns_ascend,
        )

    def _before_append(self) -> None:
        """Lets a method evict before the new token of a decode step is stored."""

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Stores new tokens behind the others, in order of arrival."""
        num_new = key_states.shape[2]
        if self.keys is None:
            self.keys, self.values = own_storage(key_states), own_storage(value_states)
        else:
            self._reserve(self.length + num_new)
            self.keys[:, :, self.length : self.length + num_new] = key_states
            self.values[:, :, self.length : self.length + num_new] = value_states
        self.length += num_new

    def _reserve(self, num_slots: int) -> None:
        """
        Makes room for that many slots. A layer that grows by a token at a time gets some more, up to its budget.
        """
        if num_slots <= self.keys.shape[2]:
            return
        if num_slots == self.length + 1:
            growth = max(MIN_GROWTH, self.length // 64)
            limit = self.max_slots
            num_slots = self.length + growth if limit < num_slots else min(self.length + growth, limit)
        self._resize(num_slots)

    def _resize(self, num_slots: int) -> None:
        """Moves the used slots into tensors of `num_slots` slots."""
        for name in self.slot_tensors:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, grown(tensor, self.length, num_slots, fill=-1 if name == "positions" else 0))

    def leave_inference_mode(self) -> None:
        """Copies tensors that were made in inference mode: torch does not allow writes to them outside of it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.keys is not None and self.keys.is_inference():
            self._map_rows(torch.clone)

    def _spare_autograd(self) -> None:
        """Copies keys and values that autograd may have saved, before they are written to."""
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.requires_grad or self._is_saved) and torch.is_grad_enabled():
                setattr(self, name, tensor.clone())

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Stores one new token behind the used slots. Some methods write into a free slot instead."""
        self._append(key_states, value_states)
        self.positions[:, :, self.length - 1 : self.length] = self.next_position

    def _overwrite(self, slots: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """
        Stores one new token in the slots `(batch, kv_heads or 1, 1)`, in place.
        """
        index = slots[..., None].expand(-1, key_states.shape[1], -1, -1)
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        self.positions.scatter_(2, slots, self.next_position.expand_as(slots))

    def _sorted_slots(self) -> dict[str, torch.Tensor]:
        """Copies of the slots in order of their positions, empty ones first."""
        order = self.positions[..., : self.length].argsort(dim=-1)
        return {name: gather_tokens(getattr(self, name), order) for name in self.slot_tensors}

    def _take_slots(self) -> dict[str, torch.Tensor]:
        """Brings the slots into order of their positions, and returns them."""
        held = self._sorted_slots()
        for name, tensor in held.items():
            setattr(self, name, tensor)
        return held

    def keep(
        self, key: torch.Tensor, value: torch.Tensor, tokens: Tokens, indices: torch.Tensor, num_free: int = 0
    ) -> None:
        """
        Copies the chosen tokens into new tensors. The old ones are freed.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`.
            tokens (`Tokens`): In these columns.
            indices (`torch.Tensor`): `(batch, kv_heads or 1, kept)`, -1 for a slot that stays empty.
            num_free (`int`): How many empty slots follow them.
        """
        self.require_left_padding(tokens)
        num_kept = indices.shape[-1]
        num_slots = num_kept + num_free
        kept_positions = gather_tokens(tokens.positions.expand(-1, indices.shape[1], -1), indices)
        self.keys = gathered(key, indices, num_slots)
        self.values = gathered(value, indices, num_slots)
        self.positions = grown(kept_positions.masked_fill(indices < 0, -1), num_kept, num_slots, fill=-1)
        self.column_positions = None
        self.length = num_slots
        self.row_held = [min(held, kept) for held, kept in zip(self.row_held, self.row_kept, strict=True)]

    def require_left_padding(self, tokens: Tokens) -> None:
        """Raises if a row ends in padding: an eviction would take that padding for a gap."""
        if tokens.ends_in_padding:
            raise NotImplementedError(
                "Some rows of the batch are padded on the right, and the cache has to evict. Pad on the left "
                "(tokenizer.padding_side = 'left'), as `generate` asks for anyway."
            )

    def per_row(self, numbers: Sequence[int]) -> torch.Tensor:
        """Numbers known on the host as a `(batch, 1, 1)` int32 tensor on the layer's device."""
        return numbers_on(self.device, numbers, torch.int32).view(-1, 1, 1)

    # Attention over slots.

    def slot_mask(self) -> torch.Tensor | None:
        """`(batch, kv_heads or 1, slots)` bool, False for empty slots; None if there is none."""
        return self.positions[..., : self.length] >= 0 if self.has_empty_slots else None

    def with_slot_mask(self, call: AttentionCall, key_mask: torch.Tensor | None) -> AttentionCall:
        """The call with a mask over slots; `key_mask` is `(batch, kv_heads or 1, keys)`, the same for all heads."""
        key_mask = None if key_mask is None else key_mask[:, :1]
        mask = causal_mask(
            call.module.config._attn_implementation,
            key_mask,
            call.num_queries,
            call.num_keys,
            call.query.dtype,
            call.query.device,
        )
        return replace(call, mask=mask, lse=None)

    # What `generate` asks of any layer.

    def get_seq_length(self) -> int:
        """The number of columns seen, padding included. Position ids and the slicing of inputs go by it."""
        return self.num_seen + sum(chunk.num_columns for chunk in self.recorded)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and the offset of the mask: a column for each column seen. `attend` reads what it needs."""
        num_seen = self.get_seq_length()
        if query_length == 0:
            raise ValueError(
                f"There are no new tokens: the cache has seen {num_seen}, and `generate` takes its prompt for the "
                "whole history. Give `generate` the history with new tokens at its end, or new tokens and an "
                "attention mask over everything seen. For another prompt, use a new cache."
            )
        return num_seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: a cache may see any number of tokens."""
        return -1

    def reset(self) -> None:
        """Forgets everything and frees the tensors."""
        self._clear()

    def release_empty_slots(self) -> None:
        """Frees the slots of evicted tokens, in layers that keep some for new tokens."""

    def compress(self) -> None:
        """Evicts the tokens beyond the budget, if the method lets them wait."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take back tokens that were not recorded: only if none was evicted and none scored."""
        return self.positions is None and all(getattr(self, name) is None for name in self.slot_tensors[3:])

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes back the last `-tokens_to_remove` tokens; then, if the past was recorded, does the evictions that waited.

        Raises:
            ValueError: A positive number, or more than the layer has seen.
            NotImplementedError: Tokens that were not recorded have been evicted or scored since, which cannot be
                undone.
        """
        tokens_to_remove = as_tokens_to_remove(tokens_to_remove)
        self.require_croppable(tokens_to_remove)
        if not self.is_initialized:
            return
        self.leave_inference_mode()
        num_left = -tokens_to_remove
        while num_left and self.recorded:
            chunk = self.recorded.pop()
            num_taken = min(num_left, chunk.num_columns)
            if num_taken < chunk.num_columns:
                self.recorded.append(chunk.without_last(num_taken))
            num_left -= num_taken
        if num_left:
            self._crop_held(num_left)
        self._settle()

    def _require_module_of_recorded(self) -> None:
        """Raises if recorded tokens need the attention module for their eviction, and the model is gone."""
        if self.recorded and self._module() is None:
            raise RuntimeError(
                "The model that filled the cache is gone, so what it recorded cannot be evicted any more. Call "
                "`cache.reset()`."
            )

    def _ends_in_padding_without(self, num_columns: int) -> bool:
        """Whether the recorded tokens would end in padding without their last columns."""
        for chunk in reversed(self.recorded):
            if num_columns < chunk.num_columns:
                return num_columns > 0 and chunk.seen.without_last(num_columns).ends_in_padding
            num_columns -= chunk.num_columns
        return False

    def _crop_held(self, num_columns: int) -> None:
        positions = self.column_tokens.positions[..., : self.length - num_columns]
        self.length -= num_columns
        self.num_seen -= num_columns
        self.row_lengths = [self.length] * self.batch_size
        if self.column_positions is not None:
            self.column_positions = positions.contiguous()
            self.row_lengths = (positions[:, 0] >= 0).sum(dim=-1).tolist()
        self.row_held = list(self.row_lengths)
        self.next_position = self.per_row(self.row_lengths)

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raises unless `crop(tokens_to_remove)` is possible."""
        if not self.is_initialized:
            return
        self.require_attended()
        num_columns, num_seen = -tokens_to_remove, self.get_seq_length()
        if num_columns > num_seen:
            raise ValueError(f"`crop({tokens_to_remove})`: only {num_seen} tokens have been seen.")
        if num_columns > num_seen - self.num_seen and not self.is_croppable:
            raise NotImplementedError(
                f"`crop({tokens_to_remove})`: layer {self.place.layer_idx} has evicted or scored tokens since, and "
                "that cannot be undone. Call `cache.activate_past_recording()` before the tokens that may be taken "
                "back are seen."
            )
        if num_columns and self.recorded and self._ends_in_padding_without(num_columns):
            raise NotImplementedError(
                f"`crop({tokens_to_remove})` would take all tokens of a row and leave padding in front of them. Take "
                "back more or less."
            )
        if self.recorded and not any(self.row_lengths):
            chunk = self.recorded[0]
            num_after = sum(later.num_columns for later in self.recorded[1:])
            lengths = chunk.seen.without_last(min(max(num_columns - num_after, 0), chunk.num_columns)).row_lengths
            for length in lengths:
                self.num_tokens_to_keep(length)  # a budget without room for so long a prompt says so
        self._require_module_of_recorded()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices`, in that order."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices, device=self.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._map_rows(lambda tensor: tensor[indices])
        self.batch_size = indices.shape[0]
        # Where all rows have the same counts, the indices need not be read from the device.
        counts = [getattr(self, name) for name in self.row_counts]
        counts += [chunk.seen.row_lengths for chunk in self.recorded]
        are_alike = all(len(set(numbers)) <= 1 for numbers in counts)
        rows = [0] * self.batch_size if are_alike else indices.tolist()
        self._map_row_counts(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, copies side by side."""
        if not self.is_initialized:
            return
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        self._map_row_counts([row for row in range(self.batch_size) for _ in range(repeats)])
        self.batch_size *= repeats

    def _map_row_counts(self, rows: list[int]) -> None:
        for name in self.row_counts:
            counts = getattr(self, name)
            setattr(self, name, [counts[row] for row in rows] if counts else [])
        self.recorded = [chunk.map_rows(rows) for chunk in self.recorded]

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in (*self.slot_tensors, *self.row_tensors):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))
        self.recorded = [chunk.map_tensors(function) for chunk in self.recorded]

    def offload(self) -> None:
        """Moves the layer's tensors to the CPU."""
        self._map_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the layer's tensors back to its device."""
        if self.is_initialized:
            self._map_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    # Files.

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The state of the layer: numbers as JSON has them, and tensors without their unused slots."""
        if self.is_initialized and self.dtype != self._value_dtype:
            raise NotImplementedError(
                f"The cache was filled under autocast: keys are {self.dtype}, values {self._value_dtype}, and a file "
                "holds one dtype. Cast the model instead (`model.to(torch.bfloat16)`) to save its caches."
            )
        numbers = {name: getattr(self, name) for name in (*self.state_numbers, *self.row_counts)}
        is_paid_in_bytes = self.budget is not None and self.budget.kind == "bytes"
        numbers["num_budget_tokens"] = self.token_budget.amount if is_paid_in_bytes else None
        tensors = {name: getattr(self, name) for name in (*self.slot_tensors, *self.row_tensors)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return numbers, {
            name: tensor[:, :, : self.length] if name in self.slot_tensors else tensor
            for name, tensor in tensors.items()
        }

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `export_state` gave."""
        self._clear()
        keys, values = tensors["keys"], tensors["values"]
        # One row is enough to tell shapes, and a budget in bytes may not pay for rows that were repeated later.
        self.lazy_initialization(keys[:1], values[:1])
        self.batch_size, self.length = keys.shape[0], keys.shape[2]
        num_budget_tokens = numbers["num_budget_tokens"]
        if num_budget_tokens is not None:
            self.token_budget = Budget("tokens", num_budget_tokens)
        for name in (*self.state_numbers, *self.row_counts):
            setattr(self, name, numbers[name])
        for name in (*self.slot_tensors, *self.row_tensors):
            setattr(self, name, tensors.get(name))

    # What users ask.

    def held_positions(self) -> torch.Tensor:
        """
        `(batch, kv_heads, slots)` int64: the positions of the tokens in the slots, -1 for empty ones and padding.
        """
        positions = self.column_tokens.positions if self.positions is None else self.positions[..., : self.length]
        parts = [positions, *(chunk.seen.positions[..., -chunk.num_columns :] for chunk in self.recorded)]
        return torch.cat([part.expand(-1, self._key_shape[0], -1) for part in parts], dim=-1).long()

    @property
    def score_label(self) -> str | None:
        """The name and the unit of the scores that the layer holds; None if it holds none."""
        return None

    def held_scores(self) -> torch.Tensor | None:
        """
        `(batch, kv_heads, slots)` float32: the scores of the tokens of `held_positions`, NaN where there is no token
        and for tokens that the method does not score. None if nothing has been scored yet.
        """
        scores = self._slot_scores()
        if scores is None:
            return None
        positions = self.held_positions()
        result = torch.full(positions.shape, torch.nan, dtype=torch.float32, device=positions.device)
        result[..., : scores.shape[-1]] = scores
        return result.masked_fill(positions < 0, torch.nan)

    def _slot_scores(self) -> torch.Tensor | None:
        """`(batch, kv_heads or 1, slots)` float32: `held_scores` of the slots, without what is recorded."""
        return None

    @property
    def num_seen_per_row(self) -> list[int]:
        """How many tokens each row has seen: padding does not count, recorded tokens do."""
        return self.recorded[-1].seen.row_lengths if self.recorded else self.row_lengths

    @property
    def num_held_per_row(self) -> list[int]:
        """How many tokens of each row the layer holds; recorded tokens count."""
        if not self.recorded:
            return self.row_held
        seen = zip(self.row_held, self.row_lengths, self.recorded[-1].seen.row_lengths, strict=True)
        return [held + length - settled for held, settled, length in seen]

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the layer refers to, by a name whose first word is its role."""
        tensors = {name: getattr(self, name) for name in (*self.slot_tensors, *self.row_tensors)}
        for index, chunk in enumerate(self.recorded):
            tensors |= {f"{role} of chunk {index}": tensor for role, tensor in chunk.held_tensors().items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it fills its storage, else a copy: a view would keep all of a fused projection alive."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def grown(tensor: torch.Tensor, length: int, num_slots: int, fill: int) -> torch.Tensor:
    """A tensor with `num_slots` slots in dimension 2, the first `length` of them copied, the others holding `fill`."""
    if num_slots == length == tensor.shape[2]:
        return tensor
    result = tensor.new_empty(*tensor.shape[:2], num_slots, *tensor.shape[3:])
    result[:, :, :length] = tensor[:, :, :length]
    result[:, :, length:] = fill
    return result


def gathered(tensor: torch.Tensor, indices: torch.Tensor, num_slots: int) -> torch.Tensor:
    """`gather_tokens` into the front of a new tensor of `num_slots` slots, the rest being zero."""
    num_kept = indices.shape[-1]
    if num_slots == num_kept:
        return gather_tokens(tensor, indices)
    if tensor.requires_grad:
        return grown(gather_tokens(tensor, indices), num_kept, num_slots, fill=0)
    result = tensor.new_zeros(*tensor.shape[:2], num_slots, tensor.shape[3])
    index = indices.clamp(min=0)[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    torch.gather(tensor, 2, index, out=result[:, :, :num_kept])
    return result
