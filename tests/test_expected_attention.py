"""ExpectedAttentionCache against Expected Attention written as loops in float64."""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models import build_model, drive, random_rows, random_tokens, tiny_model
from reference import HoldingPolicy, Rotation, best, compare_with_policies, without_rotation

from pyramid_cache import ExpectedAttentionCache
from pyramid_cache.caches import expected_attention
from pyramid_cache.engine.state import LayerState


@dataclass
class ExpectedAttention(HoldingPolicy):
    """The method for one row, run `without_rotation`: statistics anew from all queries of the turns so far.

    Heads evict after whole turns, and after single tokens that exceed the budget by `eviction_interval`.
    """

    later: list[int]
    budget: int
    rotation: Callable[[torch.Tensor, list[int]], torch.Tensor]
    eviction_interval: int
    num_future_positions: int = 512
    num_sink_tokens: int = 4
    use_covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        pieces = [self.prompt_length, *self.later]
        ends = itertools.accumulate(pieces)
        self.pieces = dict(zip(ends, pieces, strict=True))  # by the number of tokens after them

    def turn(self, states: torch.Tensor) -> torch.Tensor:
        return self.rotation(states, list(range(states.shape[1])))

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        end = position + 1
        is_turn = end == self.prompt_length or self.pieces.get(end, 0) > 1
        num_spare = 0 if is_turn else self.eviction_interval - 1
        if end not in self.pieces or len(held[0]) <= self.budget + num_spare:
            return held
        turns = [(last - piece, last) for last, piece in self.pieces.items() if piece > 1 and last <= end]
        observed = [token for first, last in turns for token in range(max(first, self.num_sink_tokens), last)]
        queries, keys = self.query.unflatten(0, (len(held), -1)).double().numpy(), self.key.double().numpy()
        scaled = queries[:, :, observed] * self.scaling
        values = self.value.double().numpy()
        return [
            best(self.scores(scaled[head], keys[head], values[head], tokens, end), self.budget)
            for head, tokens in enumerate(held)
        ]

    def scores(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, held: list[int], length: int
    ) -> dict[int, float]:
        """
        What each token that a head holds is worth. Queries `(group, observed, head_dim)` are not turned, but times the
        scaling; keys and values `(length, head_dim)` are those of all positions, the keys turned.
        """
        group, observed, head_dim = queries.shape
        # What turns a vector to each of the positions to come: where it takes the axes.
        axes, future = torch.eye(head_dim)[:, None], self.num_future_positions
        turns = self.rotation(axes.expand(-1, future, -1), list(range(length, length + future)))
        turn = turns.double().mean(dim=1).T.numpy()
        judged = [position for position in held if position >= self.num_sink_tokens]
        expected = dict.fromkeys(judged, 0.0)
        for member in range(group):
            mean = sum(queries[member]) / observed
            deviations = (queries[member] - mean) * self.use_covariance
            mean, covariance = turn @ mean, turn @ deviations.T @ deviations @ turn.T / observed
            exponentials = {}
            for position in judged:
                key = keys[position]
                exponentials[position] = math.exp(float(mean @ key + key @ covariance @ key / 2))
            for position in judged:
                expected[position] += exponentials[position] / sum(exponentials.values()) / group
        worth = {
            position: (expected[position] + self.epsilon) * np.linalg.norm(values[position]) for position in judged
        }
        return {position: worth.get(position, math.inf) for position in held}


def check(
    family: str, lengths: tuple[int, ...], pieces: list[int], budget: float, eviction_interval: int, **settings: Any
) -> None:
    """Each row of a run with a new cache against the reference alone."""
    model, rows, has_rope = tiny_model(family), random_rows(lengths, seed=3), family != "gpt2"
    rotation = Rotation(model) if has_rope else lambda states, positions: states
    cache = ExpectedAttentionCache(model.config, budget=budget, eviction_interval=eviction_interval, **settings)
    trace = drive(model, cache, rows, random_tokens(len(rows), sum(pieces), seed=4), pieces=pieces)
    budgets = [budget if isinstance(budget, int) else int(budget * length) for length in lengths]
    policies = [
        ExpectedAttention(length, pieces, number, rotation, eviction_interval, **settings)
        for length, number in zip(lengths, budgets, strict=True)
    ]
    with without_rotation(model) if has_rope else contextlib.nullcontext():
        compare_with_policies(model, trace, rows, policies)


@pytest.mark.parametrize("family", ["llama", "glm4", "gpt2"])
def test_held_positions_and_logits(family: str) -> None:
    """Padded rows with answers during which some evict several times, whatever the layout of RoPE."""
    check(family, (23, 37, 30), [1] * 12, 0.3, 5)


def test_settings() -> None:
    for settings in (
        {"num_future_positions": 1},
        {"num_future_positions": 9, "num_sink_tokens": 0, "epsilon": 0.05},
        {"num_sink_tokens": 2, "use_covariance": False},
    ):
        check("llama", (19, 33), [1] * 10, 9, 3, **settings)


def test_later_turns_add_to_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all turns' queries had been seen at once; those of generated tokens do not count."""
    monkeypatch.setattr(expected_attention, "QUERIES_PER_CHUNK", 4)
    check("llama", (3, 21, 14), [1, 1, 9, 1, 1, 1, 1, 1, 6, 1], 10, 4)


def test_memory_is_what_the_formula_says() -> None:
    model, (heads, kv_heads, head_dim, batch) = build_model("llama"), (4, 2, 16, 2)
    for use_covariance, statistics in ((True, heads * head_dim * (head_dim + 3) // 2), (False, heads * head_dim)):
        cache = ExpectedAttentionCache(model.config, budget=12, eviction_interval=4, use_covariance=use_covariance)
        drive(model, cache, random_rows((33, 21)), random_tokens(2, 3))
        for layer in cache.compressed_layers:
            slots = sum(
                getattr(layer.state, name).untyped_storage().nbytes() for name in ("keys", "values", "positions")
            )
            assert slots == batch * kv_heads * (12 + 4) * (2 * head_dim * 4 + 4)
            beside = layer.state.names("row")[len(LayerState().names("row")) :]
            held = [
                getattr(layer.state, name).untyped_storage().nbytes()
                for name in beside
                if getattr(layer.state, name) is not None
            ]
            assert sum(held) == batch * 4 * (statistics + head_dim // 2 + 1)
