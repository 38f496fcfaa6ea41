"""
StreamingLLM of Xiao et al., 2023 (https://arxiv.org/abs/2309.17453).

The first tokens of a text are attention sinks: queries that need no token attend to them. A model that keeps them and
a rolling window of recent tokens can generate without end. Positions count within the cache (paper, Section 3.2): the
sinks directly precede the window, however many tokens between them were evicted.

Departure from the authors' code: they store keys without RoPE and rotate all of them at every step. RoPE depends on
differences of positions only. So queries and window stay as the model rotated them, and only the sinks move, forward
by the number of evicted tokens (the *sink shift*). The scores are the same. As in their code, the tokens of one
forward pass attend to each other and to what the cache held before, and then the window is cut.
"""

import reprlib
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import MAX_TOKENS, parse_budget, read_count
from pyramid_cache.engine.policy import LayerView, Policy, ScoringView, setting
from pyramid_cache.engine.policy_cache import CommonOptions, PolicyCache
from pyramid_cache.engine.protection import read_protect
from pyramid_cache.engine.rotation import RotaryFrequencies, turned
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.state import LayerState, number, row
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops.transfer import numbers_on


# Angles are counted from a base that moves on by this many tokens. The float32 angles of a model are off by up to
# position * 6e-8 radians, so that they are never off by more than 1e-3 here.
REBASE_INTERVAL = 1 << 14


@dataclass(eq=False)
class SinkState(LayerState):
    """
    `sink_keys` `(batch, kv_heads, num_sink_tokens, head_dim)` are the sinks as they arrived, and `sink_quarter_turns`
    those turned by a right angle, of which any turn can be made. The slots `sink_slots` `(batch, 1,
    num_sink_tokens)` int64 hold them moved by `shift` `(batch, 1, 1, 1)` int32 or more. Keys are rotated
    by their position minus `base`, once that is not 0; then `base_position` `(batch, 1, 1)` int32 holds it as well.
    """

    sink_keys: torch.Tensor | None = row()
    sink_quarter_turns: torch.Tensor | None = row()
    sink_slots: torch.Tensor | None = row()
    shift: torch.Tensor | None = row()
    base_position: torch.Tensor | None = row()
    base: int = number(0)
    is_placed: int = number(0)


@dataclass(frozen=True)
class StreamingLLMPolicy(Policy):
    """The first tokens and the latest ones stay. See `StreamingLLMCache` for the field."""

    num_sink_tokens: int = setting(4, read_count, 0)

    heads_share_tokens = scores_positions = True
    repositions = needs_rotary = True
    state_class = SinkState

    @property
    def num_extra_slots(self) -> int:
        return self.num_sink_tokens  # two keys of each, without values

    def first_to_go(self, view: ScoringView) -> torch.Tensor:
        is_sink = view.positions < self.num_sink_tokens
        return view.positions.masked_fill(is_sink, MAX_TOKENS).argmin(dim=-1, keepdim=True)

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.positions.float().masked_fill(view.positions < self.num_sink_tokens, float("inf"))

    def check_prompt(
        self,
        tokens: Tokens,
        position_ids: torch.Tensor | None,
        rotary: RotaryFrequencies | None,
        state: SinkState,
        num_kept: int,
    ) -> None:
        longest = None if rotary is None else rotary.original_max_position_embeddings
        if longest is not None and num_kept >= longest:
            raise ValueError(
                f"`budget={num_kept}` and a new token exceed the {longest} positions up to which this model's "
                f"longrope scaling is fixed. Choose `budget` of at most {longest - 1}."
            )
        if rotary is None or position_ids is None or position_ids.dim() != 2:
            return
        ranks = tokens.positions[:, 0]
        offsets = position_ids - ranks
        last = offsets.gather(1, ranks.argmax(dim=-1, keepdim=True))  # behind it there may be padding
        expected = torch.zeros_like(last) if self.has_exact_angles(state, rotary) else last
        if not ((offsets == expected) | (ranks < 0)).all():
            raise ValueError(
                "`position_ids` do not number the tokens of each row in turn, as StreamingLLMCache needs it (with "
                "longrope scaling from 0, padding not counted). Leave them to `generate`, or pass "
                "`attention_mask.cumsum(-1) - 1`."
            )

    @staticmethod
    def has_exact_angles(state: SinkState, rotary: RotaryFrequencies) -> bool:
        """Whether stored keys are rotated by exact angles from `base` instead of the model's own."""
        return state.base_position is not None or rotary.long_inv_freq is not None

    @staticmethod
    def from_base(state: SinkState, positions: torch.Tensor) -> torch.Tensor:
        """Positions `(batch, 1, any)` as they count from `base`."""
        return positions if state.base_position is None else positions - state.base_position

    def reposition_held(self, view: LayerView, slots_stay: bool) -> None:
        """Moves the sinks to just before the window."""
        rotary, state = view.rotary, view.state
        if rotary is None:
            return
        evicted = [seen - held for seen, held in zip(state.row_lengths, state.row_held, strict=True)]
        if not slots_stay or not state.is_placed:
            self._remember_sinks(view, rotary, evicted)
        self._move_base(view, rotary)
        shift = evicted if not state.base else [number - state.base for number in evicted]
        keys = turned(state.sink_keys, state.sink_quarter_turns, *rotary.turn_by(shift, view.key))
        view.key.scatter_(2, state.sink_slots[..., None].expand_as(keys), keys)

    def moved_in_graph(self, view: LayerView) -> tuple[torch.Tensor, torch.Tensor] | None:
        rotary, state = view.rotary, view.state
        if rotary is None:
            return None
        evicted = view.length - view.is_token.sum(dim=-1, keepdim=True)
        state.shift.copy_(evicted[..., None])
        angles = rotary.angles(self.from_base(state, evicted))
        turn = rotary.cosine_and_sine(angles, view.key)
        return state.sink_slots, turned(state.sink_keys, state.sink_quarter_turns, *turn)

    def may_fix(self, state: SinkState) -> bool:
        return min(state.row_kept) > self.num_sink_tokens  # else sinks go

    def moves_between_steps(self, state: SinkState) -> bool:
        if min(state.row_lengths) <= self.num_sink_tokens + 1:  # some sinks may have come just now
            return True
        return max(state.row_lengths) // REBASE_INTERVAL * REBASE_INTERVAL != state.base

    def _remember_sinks(self, view: LayerView, rotary: RotaryFrequencies, evicted: list[int]) -> None:
        """
        Notes where the sinks are, and how they came, when so many tokens of each row are gone. It is done once all
        rows have evicted, unless other slots are given out.
        """
        state = view.state
        state.is_placed = int(all(evicted))
        ranks = torch.arange(self.num_sink_tokens, device=view.positions.device)
        slots = (view.positions == ranks[:, None]).int().argmax(dim=-1)[:, None]
        # Those of a row that has evicted nothing so far are as they came.
        came = gather_tokens(view.key, slots)
        if state.base:
            came = rotary.rotate(came, rotary.angles(torch.full_like(view.length, state.base)))
        keys = came if state.shift is None else torch.where(state.shift > 0, state.sink_keys, came)
        shift = numbers_on(came.device, evicted, torch.int32).view(-1, 1, 1, 1)
        found = {"slots": slots, "keys": keys, "quarter_turns": rotary.quarter_turn(keys)}
        for name, tensor in {"shift": shift, **{f"sink_{name}": tensor for name, tensor in found.items()}}.items():
            state.put(name, tensor)

    def moves_new(self, view: LayerView) -> bool:
        """Whether keys have exact angles from `base`."""
        rotary = view.rotary
        return rotary is not None and self.has_exact_angles(view.state, rotary)

    def reposition_new(
        self, view: LayerView, states: torch.Tensor, positions: torch.Tensor, longest: int | torch.Tensor
    ) -> torch.Tensor:
        """Turns states from the angles of the model to exact angles from `base`."""
        rotary = view.rotary
        angles = rotary.angles(self.from_base(view.state, positions)) - rotary.model_angles(positions, longest)
        return rotary.rotate(states, angles)

    def _move_base(self, view: LayerView, rotary: RotaryFrequencies) -> None:
        """Rebases the angles before float32 rounding grows."""
        base = view.longest // REBASE_INTERVAL * REBASE_INTERVAL
        if base == view.state.base:
            return
        if self.has_exact_angles(view.state, rotary):
            angles = rotary.angles(torch.full_like(view.length, view.state.base - base))
        else:
            angles = rotary.angles(view.positions - base) - rotary.model_angles(view.positions, 0)
        view.key.copy_(rotary.rotate(view.key, angles))
        view.state.base = base
        view.state.put("base_position", torch.full_like(view.length, base))


class StreamingLLMCache(PolicyCache):
    """
    Keeps the first tokens and the most recent ones (StreamingLLM, https://arxiv.org/abs/2309.17453).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval +
    num_sink_tokens) * 2 * head_dim * itemsize` bytes. The cache forgets what lies between the sinks and the
    window, and cannot recall it. With `prefill_chunk_size` of `generate`, a prompt never takes more than the budget
    and one chunk. See `PolicyCache` for the other arguments and errors.

    Args:
        num_sink_tokens (`int`, defaults to 4): Tokens kept from the start, as a part of the budget. `protect=N` makes
            them at least N.
        eviction_interval (`int`, defaults to 1): How many generated tokens wait for an eviction; 1 as in the paper.

    Raises:
        ValueError: For a budget without room beside the sinks.
        NotImplementedError: For protected tokens that are not the first ones of each row.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import StreamingLLMCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = StreamingLLMCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> sorted(position for position in cache.positions(0)[0, 0].tolist() if position >= 0)
    [0, 1, 2, 3, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str,
        num_sink_tokens: int = 4,
        *,
        eviction_interval: int = 1,
        **options: Unpack[CommonOptions],
    ) -> None:
        spans = read_protect(options.get("protect"))
        num_protected = len(spans[0]) if spans else 0
        if any(len(span) != num_protected or span[num_protected - 1] >= num_protected for span in spans):
            raise NotImplementedError(
                f"`protect={reprlib.repr(options['protect'])}`: StreamingLLMCache keeps the first tokens of each row, "
                "as many in all rows, and no others. Give their number (`protect=N` or `num_sink_tokens=N`), or use "
                "another cache."
            )
        policy = StreamingLLMPolicy(num_sink_tokens)
        num_sinks, parsed = max(policy.num_sink_tokens, num_protected), parse_budget(budget)
        if parsed.kind == "tokens" and parsed.amount <= num_sinks:
            raise ValueError(
                f"`budget={budget}` includes the {num_sinks} sink tokens and must exceed them: give at least "
                f"{num_sinks + 1}, or lower `num_sink_tokens` or `protect`."
            )
        policy = replace(policy, num_sink_tokens=num_sinks)
        super().__init__(config, budget, policy, eviction_interval=eviction_interval, **options)
