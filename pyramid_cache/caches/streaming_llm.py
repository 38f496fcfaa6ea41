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

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.budget import parse_budget, read_count
from pyramid_cache.engine.policy import LayerView, Policy, ScoringView, setting
from pyramid_cache.engine.policy_cache import PolicyCache
from pyramid_cache.engine.rotation import RotaryFrequencies
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
    `sink_keys` `(batch, kv_heads, num_sink_tokens, head_dim)` are the sinks as they arrived. The slots `sink_slots`
    `(batch, 1, num_sink_tokens)` int64 hold them moved by `shift` `(batch, 1, 1, 1)` int32 or more. Keys are rotated
    by their position minus `base`, if that is not 0.
    """

    sink_keys: torch.Tensor | None = row()
    sink_slots: torch.Tensor | None = row()
    shift: torch.Tensor | None = row()
    base: int = number(0)


@dataclass(frozen=True)
class StreamingLLMPolicy(Policy):
    """The first tokens and the latest ones stay. See `StreamingLLMCache` for the field."""

    num_sink_tokens: int = setting(4, read_count, 0)

    heads_share_tokens = True
    repositions = needs_rotary = True
    state_class = SinkState

    @property
    def num_extra_slots(self) -> int:
        return (self.num_sink_tokens + 1) // 2  # keys without values

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
        return state.base > 0 or rotary.long_inv_freq is not None

    def reposition_held(self, view: LayerView) -> None:
        """Moves the sinks to just before the window."""
        state, rotary = view.state, view.rotary
        if rotary is None:
            return
        self._remember_sinks(view, rotary)
        self._move_base(view, rotary)
        shift = [evicted - state.base for evicted in self.num_evicted(view)]
        index = state.sink_slots[..., None].expand_as(state.sink_keys)
        view.key.scatter_(2, index, rotary.turn(state.sink_keys, *rotary.turn_by(shift, view.key)))

    def _remember_sinks(self, view: LayerView, rotary: RotaryFrequencies) -> None:
        """Notes where the sinks are, and how they came. Once all rows have evicted, they stay where they are."""
        state, num_evicted = view.state, self.num_evicted(view)
        if state.sink_slots is not None and state.free_slots is not None and all(num_evicted):
            return
        ranks = torch.arange(self.num_sink_tokens, device=view.positions.device)
        state.sink_slots = (view.positions == ranks[:, None]).int().argmax(dim=-1)[:, None]
        # Those of a row that has evicted nothing so far are as they came.
        came = gather_tokens(view.key, state.sink_slots)
        if state.base:
            came = rotary.rotate(came, rotary.angles(torch.full_like(view.length, state.base)))
        state.sink_keys = came if state.shift is None else torch.where(state.shift > 0, state.sink_keys, came)
        state.shift = numbers_on(came.device, num_evicted, torch.int32).view(-1, 1, 1, 1)

    @staticmethod
    def num_evicted(view: LayerView) -> list[int]:
        """How many tokens of each row are gone."""
        return [seen - held for seen, held in zip(view.state.row_lengths, view.state.row_held, strict=True)]

    def reposition_new(
        self, view: LayerView, states: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Turns states from the angles of the model to exact angles from `base`, once keys have these."""
        rotary = view.rotary
        if rotary is None or not self.has_exact_angles(view.state, rotary):
            return states
        angles = rotary.angles(positions - view.state.base) - rotary.model_angles(positions, longest)
        return rotary.rotate(states, angles)

    def _move_base(self, view: LayerView, rotary: RotaryFrequencies) -> None:
        """Rebases the angles before float32 rounding grows."""
        base = max(view.state.row_lengths) // REBASE_INTERVAL * REBASE_INTERVAL
        if base == view.state.base:
            return
        if self.has_exact_angles(view.state, rotary):
            angles = rotary.angles(torch.full_like(view.length, view.state.base - base))
        else:
            angles = rotary.angles(view.positions - base) - rotary.model_angles(view.positions, 0)
        view.key.copy_(rotary.rotate(view.key, angles))
        view.state.base = base


class StreamingLLMCache(PolicyCache):
    """
    Keeps the first tokens and the most recent ones (StreamingLLM, https://arxiv.org/abs/2309.17453).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval +
    num_sink_tokens / 2) * 2 * head_dim * itemsize` bytes. The cache forgets what lies between the sinks and the
    window, and cannot recall it. With `prefill_chunk_size` of `generate`, a prompt never takes more than the budget
    and one chunk. See `PolicyCache` for the other arguments and errors.

    Args:
        num_sink_tokens (`int`, defaults to 4): Tokens kept from the start, as a part of the budget.
        eviction_interval (`int`, defaults to 1): How many generated tokens wait for an eviction; 1 as in the paper.

    Raises:
        ValueError: For a budget without room beside the sinks.

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
    ) -> None:
        policy = StreamingLLMPolicy(num_sink_tokens)
        parsed = parse_budget(budget)
        if parsed.kind == "tokens" and parsed.amount <= policy.num_sink_tokens:
            raise ValueError(
                f"`budget={budget}` includes the {num_sink_tokens} sink tokens and must exceed them: give at least "
                f"{num_sink_tokens + 1}, or lower `num_sink_tokens`."
            )
        super().__init__(config, budget, policy, eviction_interval=eviction_interval)
