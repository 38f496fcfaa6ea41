"""
StreamingLLM of Xiao et al., 2023 (https://arxiv.org/abs/2309.17453).

The first tokens of a text are attention sinks: queries that need no token attend to them. A model that keeps them and
a rolling window of recent tokens can generate without end. Positions count within the cache (paper, Section 3.2): the
sinks directly precede the window, however many tokens between them were evicted.

Departure from the authors' code: they store keys without RoPE and rotate all of them at every step. RoPE depends on
differences of positions only. So queries and window stay as the model rotated them, and only the sinks move, forward
by the number of evicted tokens (the *sink shift*). The scores are the same.
"""

import weakref
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace
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
from pyramid_cache.ops.cpu import is_plain_on_cpu, split_attention
from pyramid_cache.ops.transfer import numbers_on


# Angles are counted from a base that moves on by this many tokens. The float32 angles of a model are off by up to
# position * 6e-8 radians, so that they are never off by more than 1e-3 here.
REBASE_INTERVAL = 1 << 14
# Elements of the logits of one block of a streamed prompt: 16 MiB in float32.
BLOCK_ELEMENTS = 1 << 22


class SharedRotations(SharedFrequencies):
    """
    What the layers of a cache have in common: the frequencies of the model, and the turn that moves the sinks at the
    step that is running, which would otherwise be computed anew in each layer.
    """

    def forget(self) -> None:
        super().forget()
        self._key: tuple | None = None
        self._turn: tuple[torch.Tensor, ...] = ()

    def turn_by(
        self, rotary: RotaryFrequencies, distances: list[int], states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        Cosine and sine that move `states` `(batch, kv_heads, tokens, head_dim)` by `distances`, one per row or for
        all.
        """
        key = (id(rotary), tuple(distances), states.dtype, states.device)
        if key != self._key:
            angles = rotary.angles(numbers_on(states.device, distances, torch.int64).view(-1, 1, 1))
            self._key, self._turn = key, rotary.cosine_and_sine(angles, states.dtype)
        return self._turn

    def held_tensors(self) -> list[torch.Tensor]:
        return [*super().held_tensors(), *self._turn]


class StreamingLLMLayer(CompressedLayer):
    """
    One layer of `StreamingLLMCache`: slot `p` holds token `p` as long as there is room, then the window is a ring
    behind the sinks. `sink_keys` `(batch, kv_heads, num_sink_tokens, head_dim)` are the sinks as they arrived; the
    first slots hold them moved. Keys are rotated by their position minus `base`.
    """

    sink_keys: torch.Tensor | None

    row_tensors = ("next_position", "column_positions", "sink_keys")
    state_numbers = (*CompressedLayer.state_numbers, "base")
    extra_tensors = FREQUENCY_TENSORS

    def __init__(
        self,
        place: LayerPlace,
        masks: MaskReader,
        window_length: int,
        num_sink_tokens: int,
        prefill: str,
        rotations: SharedRotations,
    ) -> None:
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.prefill = prefill
        self.rotations = rotations
        super().__init__(place, None, masks)

    def _clear(self) -> None:
        super()._clear()
        self.rotary: RotaryFrequencies | None = None
        self.base = 0

    @property
    def window(self) -> int:
        """The tokens that are kept beside the sinks."""
        return self.window_length - self.num_sink_tokens

    @property
    def has_exact_angles(self) -> bool:
        """Whether stored keys are rotated by exact angles from `base` instead of the model's own."""
        return self.base > 0 or (self.rotary is not None and self.rotary.long_inv_freq is not None)

    def num_tokens_to_keep(self, row_length: int) -> int:
        return self.window_length

    def held_tensors(self) -> dict[str, torch.Tensor]:
        shared = {f"rotation_{index}": tensor for index, tensor in enumerate(self.rotations.held_tensors())}
        return super().held_tensors() | shared

    def _check_module(self, module: torch.nn.Module) -> None:
        is_new = self._module is None
        super()._check_module(module)
        if is_new:
            rotary = self.rotations.frequencies_of(module, self.device)
            if any(self.row_lengths) and rotary is not self.rotary:
                raise ValueError(
                    "The cache was loaded from a file that a model with other rotary frequencies has filled. If this "
                    "model was cast with `model.to`, load the cache with the model instead of its config."
                )
            self.rotary = rotary
            longest = None if self.rotary is None else self.rotary.original_max_position_embeddings
            if longest is not None and self.window_length > longest:
                raise ValueError(
                    f"`budget={self.window_length}` exceeds the {longest} positions up to which this model's longrope "
                    f"scaling is fixed. Choose `budget` of at most {longest}."
                )

    def _check_positions(self, call: AttentionCall, tokens: Tokens) -> None:
        """The model must rotate a row's tokens one after another, from where it likes unless angles must be known."""
        position_ids = call.kwargs.get("position_ids")
        if position_ids is None or self.rotary is None or position_ids.dim() != 2:
            return
        ranks = tokens.positions[:, 0, -call.num_queries :]
        offsets = position_ids - ranks
        last = offsets.gather(1, ranks.argmax(dim=-1, keepdim=True))  # behind it there may be padding
        expected = torch.zeros_like(last) if self.has_exact_angles else last
        if not ((offsets == expected) | (ranks < 0)).all():
            raise ValueError(
                "`position_ids` do not number the tokens of each row in turn, as StreamingLLMCache needs it (with "
                "longrope scaling from 0, padding not counted). Leave them to `generate`, or pass "
                "`attention_mask.cumsum(-1) - 1`."
            )

    # A prompt, or several tokens of a later turn.

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._check_positions(call, tokens)
        is_first = self.positions is None
        if is_first and not self.must_evict:
            return call.run()
        is_streamed = self.prefill == "streaming" or self.num_seen > call.num_queries
        output = None if is_streamed else call.run()
        # Tokens that were taken up late had been attended to before.
        longest = max(tokens.row_lengths) if self.replayed is None else self.replayed.longest
        query, key, new_positions = self._with_exact_angles(call, tokens, [(call.num_queries, longest)])
        key, value, tokens = in_order(key, call.value, tokens)
        if self.base == 0:  # later on all rows have their sinks
            self._remember_sinks(key, tokens)
        if is_streamed and self.replayed is None:
            parts = (query, key, value, self.sink_keys)
            output = self._attend_stream(*parts, tokens, new_positions, **call.logit_arguments), None
        self.keep(key, value, tokens, self._ring_indices(tokens))
        return output

    def attend_recorded(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._check_positions(call, tokens)
        is_dense = self.prefill == "dense" and self.get_seq_length() == 0
        if self.positions is None and (is_dense or max(tokens.row_present) <= self.window_length):
            return call.run()
        chunks = [(chunk.num_columns, chunk.longest) for chunk in self.recorded]
        chunks.append((call.num_queries, max(tokens.row_lengths)))
        query, key, new_positions = self._with_exact_angles(call, tokens, chunks)
        key, value, tokens = in_order(key, call.value, tokens)
        sink_keys = self.sink_keys if self.base else gather_tokens(key, self._sink_columns(tokens))
        parts = (query, key, value, sink_keys)
        return self._attend_stream(*parts, tokens, new_positions, **call.logit_arguments), None

    def _with_exact_angles(
        self, call: AttentionCall, tokens: Tokens, chunks: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Queries, keys and the positions of the queries `(batch, 1, num_queries)`, turned to exact angles where stored
        keys have them.

        Args:
            chunks (`list[tuple[int, int]]`): For the last columns of the keys, which are as the model rotated them:
                how many one forward pass brought, and the longest row by then. The queries belong to the last chunk.
        """
        num_new, longest = chunks[-1]
        new_positions = tokens.positions[..., -num_new:]
        if not self.has_exact_angles:
            return call.query, call.key, new_positions
        stop = call.num_keys - sum(num_columns for num_columns, _ in chunks)
        keys = [call.key[:, :, :stop]]
        for num_columns, longest_then in chunks:
            columns = slice(stop, stop + num_columns)
            keys.append(self._to_exact_angles(call.key[:, :, columns], tokens.positions[..., columns], longest_then))
            stop += num_columns
        return self._to_exact_angles(call.query, new_positions, longest), torch.cat(keys, dim=2), new_positions

    def _attend_stream(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink_key: torch.Tensor,
        tokens: Tokens,
        new_positions: torch.Tensor,
        **logit_arguments,
    ) -> torch.Tensor:
        """
        Attention in which each query sees the sinks and the window that it would have seen had the tokens come one by
        one.

        Args:
            query (`torch.Tensor`): `(batch, heads, num_new, head_dim)`.
            key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`, in order of position, empty ones
                first.
            sink_key (`torch.Tensor`): `(batch, kv_heads, num_sink_tokens, head_dim)`, the sinks as they arrived.
            tokens (`Tokens`): In these columns.
            new_positions (`torch.Tensor`): `(batch, 1, num_new)`, of the queries.

        Returns:
            `torch.Tensor`: `(batch, num_new, heads, value_dim)`.
        """
        batch_size, heads, num_new, _ = query.shape
        num_columns, num_sinks = key.shape[2], self.num_sink_tokens
        order = new_positions.argsort(dim=-1, stable=True)
        query, query_positions = gather_tokens(query, order), new_positions.gather(-1, order)
        sink_query = query
        if self.rotary is not None:
            # Moving the sinks forward for one query is turning that query back.
            shift = (query_positions + 1 - self.window_length).clamp(min=0)
            sink_query = self.rotary.rotate(query, self.rotary.angles(self.base - shift))
        sink_value = gather_tokens(value, self._sink_columns(tokens))
        sink_positions = torch.arange(num_sinks, device=key.device)
        key_positions = tokens.positions
        rows_per_block = max(min(BLOCK_ELEMENTS // (batch_size * heads * (self.window_length + 256)), 256), 1)
        output = query.new_empty(batch_size, num_new, heads, value.shape[-1])
        for start in range(0, num_new, rows_per_block):
            stop = min(start + rows_per_block, num_new)
            last = num_columns - num_new + stop
            first = max(last - (stop - start) - self.window + 1, 0)
            queries = query_positions[:, :, start:stop, None]
            columns = key_positions[:, :, None, first:last]
            in_window = (columns <= queries) & (columns > queries - self.window) & (columns >= num_sinks)
            parts = [
                (query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], in_window),
                (sink_query[:, :, start:stop], sink_key, sink_value, sink_positions <= queries),
            ]
            output[:, start:stop] = split_attention(parts if num_sinks else parts[:1], **logit_arguments)
        index = order.argsort(dim=-1)[:, 0, :, None, None].expand_as(output)
        return output.gather(1, index)

    # One token.

    def _before_append(self) -> None:
        """A layer that is full turns into a ring before it takes the next token."""
        if max(self.row_held) == self.window_length:
            key, value = self.keys[:, :, : self.length], self.values[:, :, : self.length]
            key, value, tokens = in_order(key, value, self.column_tokens)
            self._remember_sinks(key, tokens)
            self.keep(key, value, tokens, self._ring_indices(tokens))

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        position, num_sinks = self.next_position, self.num_sink_tokens
        self._move_base()
        if self.has_exact_angles:
            longest = max(self.row_lengths) + 1 if self.replayed is None else self.replayed.longest
            key_states = self._to_exact_angles(key_states, position, longest)
        # Numbers of the host that change at every step must not be part of a compiled graph.
        if not torch.compiler.is_compiling() and are_alike(self.row_lengths):
            length = self.row_lengths[0]
            first = length if length < num_sinks else num_sinks + (length - num_sinks) % self.window
            slot = slice(first, first + 1)
            self.keys[:, :, slot], self.values[:, :, slot], self.positions[:, :, slot] = (
                key_states,
                value_states,
                position,
            )
        else:
            in_ring = num_sinks + (position - num_sinks) % self.window
            slots = torch.where(position < num_sinks, position, in_ring)
            self._overwrite(slots.long(), key_states, value_states)
        if min(self.row_lengths) < num_sinks:
            is_sink = torch.arange(num_sinks, device=self.device)[None, None, :, None] == position[..., None]
            self.sink_keys = torch.where(is_sink, key_states, self.sink_keys)
        self._shift_sinks()
        self.row_held = [min(held, self.window_length - 1) for held in self.row_held]

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            return call.run()
        if self.replayed is not None:
            return None, None
        if self.has_exact_angles:
            query = self._to_exact_angles(call.query, self.next_position - 1, max(self.row_lengths))
            call = replace(call, query=query)
        parts = (call.query, call.key, call.value)
        if is_plain_on_cpu(*parts, **call.logit_arguments):
            # For one query, two matrix products take 0.6 of the time of the CPU's attention kernel.
            return decode_attention(*parts, mask=self.slot_mask(), **call.logit_arguments)[0], None
        return self.with_slot_mask(call, self.slot_mask()).run()

    # Where the tokens are.

    def _sink_columns(self, tokens: Tokens) -> torch.Tensor:
        """
        `(batch, 1, num_sink_tokens)`: the sorted columns of the first tokens; -1 for one that a row does not have.
        """
        sinks = torch.arange(self.num_sink_tokens, device=self.device)
        columns = tokens.positions.shape[-1] - self.per_row(tokens.row_present) + sinks
        return columns.masked_fill(sinks >= self.per_row(tokens.row_present), -1).long()

    def _ring_indices(self, tokens: Tokens) -> torch.Tensor:
        """`(batch, 1, window_length)`: the sorted column of the token that belongs in each slot, -1 for none."""
        num_sinks, length = self.num_sink_tokens, self.per_row(tokens.row_lengths)
        slots = torch.arange(num_sinks, self.window_length, device=self.device)
        position = length - 1 - (length - 1 - slots) % self.window  # the latest one that falls into the slot
        columns = tokens.positions.shape[-1] - length + position
        ring = columns.masked_fill(position < num_sinks, -1).long()
        return torch.cat([self._sink_columns(tokens), ring], dim=-1)

    def _sorted_slots(self) -> dict[str, torch.Tensor]:
        # The sinks are where they were when they came: `_attend_stream` moves them for each query on its own.
        keys = torch.cat([self.sink_keys, self.keys[:, :, self.num_sink_tokens : self.length]], dim=2)
        order = self.positions[..., : self.length].argsort(dim=-1)
        return super()._sorted_slots() | {"keys": gather_tokens(keys, order)}

    # Angles.

    def _to_exact_angles(self, states: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """
        States that the model rotated, rotated exactly by their `(batch, 1, tokens)` positions minus `base`; `longest`
        is the length of the longest row in the forward pass that they are of.
        """
        angles = self.rotary.angles(positions - self.base) - self.rotary.model_angles(positions, longest)
        return self.rotary.rotate(states, angles)

    def _remember_sinks(self, key: torch.Tensor, tokens: Tokens) -> None:
        """Takes the sinks out of sorted keys."""
        self.sink_keys = gather_tokens(key, self._sink_columns(tokens))

    def _shift_sinks(self) -> None:
        """Moves the sinks to just before the window of the token that is being stored."""
        if self.rotary is not None and self.num_sink_tokens:
            if torch.compiler.is_compiling():  # numbers that change at every step must not be part of the graph
                evicted = (self.next_position + 1 - self.window_length).clamp(min=0) - self.base
                turn: tuple[torch.Tensor, ...] = self.rotary.cosine_and_sine(
                    self.rotary.angles(evicted), self.sink_keys.dtype
                )
            else:
                row_lengths = self.row_lengths[:1] if are_alike(self.row_lengths) else self.row_lengths
                distances = [max(length + 1 - self.window_length, 0) - self.base for length in row_lengths]
                turn = self.rotations.turn_by(self.rotary, distances, self.sink_keys)
            self.keys[:, :, : self.num_sink_tokens] = self.rotary.turn(self.sink_keys, *turn)

    def _move_base(self) -> None:
        """Rebases the angles before float32 rounding grows."""
        base = max(self.row_lengths) // REBASE_INTERVAL * REBASE_INTERVAL
        if self.rotary is None or base == self.base:
            return
        if self.has_exact_angles:
            angles = self.rotary.angles(torch.full_like(self.next_position, self.base - base))
        else:
            angles = self.rotary.angles(self.positions - base) - self.rotary.model_angles(self.positions, 0)
        self.keys = self.rotary.rotate(self.keys, angles)
        self.base = base

    # Files.

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The frequencies too: the sinks are moved before the attention module, which tells them, is seen again."""
        numbers, tensors = super().export_state()
        numbers["rotary"], frequencies = export_frequencies(self.rotary)
        return numbers, tensors | frequencies

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().import_state(numbers, tensors)
        rotary = import_frequencies(numbers["rotary"], tensors)
        self.rotary = None if rotary is None else self.rotations.shared(rotary)


class StreamingLLMCache(CompressedCache):
    """
    Keeps the first tokens and the most recent ones (StreamingLLM, https://arxiv.org/abs/2309.17453).

    A layer holds `budget` tokens however much is generated: `batch * kv_heads * (budget + num_sink_tokens / 2) * 2 *
    head_dim * itemsize` bytes. The cache forgets what lies between the sinks and the window, and cannot recall it.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself. Give the model
            if it was cast with `model.to(torch.bfloat16)` after loading, which rounds its rotary frequencies too.
        budget (`int`): Tokens that attention sees at a decode step, the sinks and the new token included.
        num_sink_tokens (`int`, defaults to 4): Tokens kept from the start.
        prefill (`str`, defaults to `"streaming"`): `"streaming"`: each prompt token sees the sinks and the window
            before it, as in a stream (the paper's method). `"dense"`: the prompt is read with full attention, then
            cut. Late tokens then carry what they saw of early ones. Later turns stream either way.

    Raises:
        ValueError: For a budget without room beside the sinks, an unknown `prefill`, or a model that cannot be
            compressed.
        NotImplementedError: For a model whose rotary embedding depends on the length (dynamic NTK) or has several
            axes. It is raised at the first forward pass where the config does not tell.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import StreamingLLMCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = StreamingLLMCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> sorted(cache.positions(0)[0, 0].tolist())
    [0, 1, 2, 3, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: int,
        num_sink_tokens: int = 4,
        *,
        prefill: Literal["streaming", "dense"] = "streaming",
    ) -> None:
        config, model = config_and_model(config)
        window_length, num_sink_tokens = check_window(budget, num_sink_tokens, prefill)
        check_decoder_config(config)
        refuse_unsupported_rope(config)
        get_model = None if model is None else weakref.ref(model)

        rotations = SharedRotations(config, get_model)

        def build_layer(place: LayerPlace, masks: MaskReader) -> StreamingLLMLayer:
            return StreamingLLMLayer(place, masks, window_length, num_sink_tokens, prefill, rotations)

        self.rotations = rotations
        settings = {"budget": window_length, "num_sink_tokens": num_sink_tokens, "prefill": prefill}
        super().__init__(config, build_layer, settings)

    def reset(self) -> None:
        self.rotations.forget()
        super().reset()


def are_alike(numbers: list[int]) -> bool:
    """Whether all rows have the same number."""
    return all(number == numbers[0] for number in numbers)


def in_order(key: torch.Tensor, value: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    """Keys, values and tokens with the columns of each row in order of position, those without a token first."""
    if tokens.is_ascending:
        return key, value, tokens
    order = tokens.positions.argsort(dim=-1, stable=True)
    positions = tokens.positions.gather(-1, order)
    return (
        gather_tokens(key, order),
        gather_tokens(value, order),
        replace(tokens, positions=positions, is_ascending=True),
    )


def check_window(budget: int, num_sink_tokens: int, prefill: str) -> tuple[int, int]:
    """Both numbers as Python's. Raises unless the arguments of `StreamingLLMCache` leave room for a window."""
    window_length = read_count("budget", budget, least=1)
    num_sink_tokens = read_count("num_sink_tokens", num_sink_tokens, least=0)
    if window_length <= num_sink_tokens:
        raise ValueError(
            f"`budget={window_length}` includes the {num_sink_tokens} sink tokens and must exceed them: give at least "
            f"{num_sink_tokens + 1}, or lower `num_sink_tokens`."
        )
    if not isinstance(prefill, str) or prefill not in ("streaming", "dense"):
        raise ValueError(f"`prefill={prefill!r}` must be 'streaming' or 'dense'.")
    return window_length, num_sink_tokens
