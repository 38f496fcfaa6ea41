"""ExpectedAttentionCache against Expected Attention written as loops in float64, and on numbers so few that they can be
worked out by hand."""

import contextlib
import math

import numpy as np
import pytest
import torch
from models import Trace, build_model, drive, random_rows, random_tokens, tiny_model
from reference import attend_one, best, run_policy, without_rotation
from transformers import PreTrainedModel

from pyramid_cache import ExpectedAttentionCache
from pyramid_cache.caches import expected_attention
from pyramid_cache.caches.expected_attention import ExpectedAttentionPolicy
from pyramid_cache.engine.policy import PromptView, ScoringView


class Rotary:
    """Rotary embedding in float64, pair by pair.

    Args:
        num_pairs: Of dimensions that turn, the first of a head.
        is_interleaved: Whether neighbours are a pair, instead of the first and the second half.
        base: Of the frequencies.
    """

    def __init__(self, num_pairs: int, is_interleaved: bool = False, base: float = 1e4) -> None:
        self.frequencies = [base ** (-pair / num_pairs) for pair in range(num_pairs)]
        if is_interleaved:
            self.pairs = [(2 * pair, 2 * pair + 1) for pair in range(num_pairs)]
        else:
            self.pairs = [(pair, pair + num_pairs) for pair in range(num_pairs)]

    def matrix(self, head_dim: int, position: int) -> np.ndarray:
        """What turns a vector `(head_dim,)` to a position."""
        matrix = np.eye(head_dim)
        for (first, second), frequency in zip(self.pairs, self.frequencies, strict=True):
            cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
            matrix[first, first], matrix[first, second] = cosine, -sine
            matrix[second, first], matrix[second, second] = sine, cosine
        return matrix

    def turn(self, states: torch.Tensor) -> torch.Tensor:
        """States `(heads, length, head_dim)` at positions 0, 1, ..."""
        turned = states.double().numpy().copy()
        for position in range(states.shape[1]):
            turned[:, position] = turned[:, position] @ self.matrix(states.shape[2], position).T
        return torch.from_numpy(turned).float()


class ExpectedAttention:
    """The method for one row, run `without_rotation`: statistics anew from all queries of the turns so far.

    Attributes:
        held: `held[layer][head][step]`, the positions held after the prompt (step 0) and after each later step.
    """

    def __init__(
        self,
        rotary: Rotary,
        prompt_length: int,
        pieces: list[int],
        budget: int,
        eviction_interval: int,
        *,
        future: int = 512,
        sinks: int = 4,
        use_covariance: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        self.rotary = rotary
        self.pieces = [prompt_length, *pieces]
        self.budget = budget
        self.eviction_interval = eviction_interval
        self.future = future
        self.sinks = sinks
        self.use_covariance = use_covariance
        self.epsilon = epsilon
        self.held: dict[int, list[list[list[int]]]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `reference.Policy`."""
        kv_heads, length, head_dim = key.shape
        group = query.shape[0] // kv_heads
        turned_query, turned_key = self.rotary.turn(query), self.rotary.turn(key)
        output = torch.empty_like(query)
        self.held[layer] = []
        for head in range(kv_heads):
            members = list(range(head * group, (head + 1) * group))
            held: list[int] = []
            history: list[list[int]] = []
            observed: list[int] = []
            start = 0
            for step, piece in enumerate(self.pieces):
                for position in range(start, start + piece):
                    held.append(position)
                    output[members, position], _ = attend_one(
                        turned_query[members, position], turned_key[head, held], value[head, held], scaling
                    )
                end = start + piece
                is_turn = step == 0 or piece > 1
                if is_turn:
                    observed += [position for position in range(start, end) if position >= self.sinks]
                if len(held) > self.budget + (0 if is_turn else self.eviction_interval - 1):
                    scores = self.scores(
                        query[members][:, observed].double().numpy() * scaling,
                        turned_key[head].double().numpy(),
                        value[head].double().numpy(),
                        held,
                        end,
                    )
                    held = best(scores, self.budget)
                history.append(list(held))
                start = end
            self.held[layer].append(history)
        return output

    def scores(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, held: list[int], length: int
    ) -> dict[int, float]:
        """What each token that a head holds is worth.

        Args:
            queries: That were observed, before they are turned, with the scaling in them, `(group, observed, head_dim)`.
            keys: Of all positions, turned, `(length, head_dim)`.
            values: Of all positions.
            held: Positions.
            length: Tokens that the row has seen.
        """
        group, observed, head_dim = queries.shape
        turn = np.zeros((head_dim, head_dim))
        for position in range(length, length + self.future):
            turn += self.rotary.matrix(head_dim, position) / self.future
        judged = [position for position in held if position >= self.sinks]
        expected = dict.fromkeys(judged, 0.0)
        for member in range(group):
            mean = np.zeros(head_dim)
            for query in queries[member]:
                mean += query / observed
            covariance = np.zeros((head_dim, head_dim))
            for query in queries[member]:
                covariance += np.outer(query - mean, query - mean) / observed
            mean, covariance = turn @ mean, turn @ covariance @ turn.T
            exponentials = {}
            for position in judged:
                logit = float(mean @ keys[position])
                if self.use_covariance:
                    logit += float(keys[position] @ covariance @ keys[position]) / 2
                exponentials[position] = math.exp(logit)
            for position in judged:
                expected[position] += exponentials[position] / sum(exponentials.values()) / group
        scores = {position: math.inf for position in held if position < self.sinks}
        for position in judged:
            scores[position] = (expected[position] + self.epsilon) * math.sqrt(values[position] @ values[position])
        return scores


def compare_with_reference(
    model: PreTrainedModel, trace: Trace, rows: list[torch.Tensor], rotary: Rotary, budgets: list[int], **settings: int
) -> None:
    """Each row of a run with the cache against the reference alone: what is held after each step, and the logits."""
    ends = [sum(trace.pieces[:step]) for step in range(len(trace.pieces) + 1)]
    for index, row in enumerate(rows):
        policy = ExpectedAttention(rotary, len(row), trace.pieces, budgets[index], **settings)
        with without_rotation(model) if rotary.frequencies else contextlib.nullcontext():
            logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        for layer, heads in policy.held.items():
            for head, history in enumerate(heads):
                for step, wanted in enumerate(history):
                    held = trace.held(step, layer, index, head)
                    assert held == wanted, f"row {index}, layer {layer}, head {head}, step {step}"
        wanted_logits = logits[[len(row) - 1 + end for end in ends]]
        torch.testing.assert_close(trace.logits[index], wanted_logits, atol=1e-4, rtol=0)


ROTARIES = {
    "llama": Rotary(8),
    # The first half of a head turns, neighbours with each other.
    "glm4": Rotary(4, is_interleaved=True),
    "gpt2": Rotary(0),
}


@pytest.mark.parametrize("family", ROTARIES)
def test_held_positions_and_logits(family: str) -> None:
    """Padded rows with answers during which some evict several times, whatever the layout of RoPE."""
    lengths = (23, 37, 30)
    model, rows = tiny_model(family), random_rows(lengths, seed=3)
    cache = ExpectedAttentionCache(model.config, budget=0.3, eviction_interval=5)
    trace = drive(model, cache, rows, random_tokens(len(rows), 12, seed=4))
    budgets = [int(0.3 * length) for length in lengths]
    compare_with_reference(model, trace, rows, ROTARIES[family], budgets, eviction_interval=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_future_positions": 1},
        {"num_future_positions": 9, "num_sink_tokens": 0, "epsilon": 0.05},
        {"num_sink_tokens": 2, "use_covariance": False},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings(settings: dict) -> None:
    model, rows = tiny_model("llama"), random_rows((19, 33), seed=5)
    cache = ExpectedAttentionCache(model.config, budget=9, eviction_interval=3, **settings)
    trace = drive(model, cache, rows, random_tokens(2, 10, seed=6))
    names = {"num_future_positions": "future", "num_sink_tokens": "sinks"}
    wanted = {names.get(name, name): value for name, value in settings.items()}
    compare_with_reference(model, trace, rows, ROTARIES["llama"], [9, 9], eviction_interval=3, **wanted)


def test_later_turns_add_to_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all turns' queries had been seen at once; those of generated tokens do not count."""
    monkeypatch.setattr(expected_attention, "QUERIES_PER_CHUNK", 4)
    model, rows = tiny_model("llama"), random_rows((3, 21, 14), seed=8)
    cache = ExpectedAttentionCache(model.config, budget=10, eviction_interval=4)
    pieces = [1, 1, 9, 1, 1, 1, 1, 1, 6, 1]
    trace = drive(model, cache, rows, random_tokens(3, sum(pieces), seed=9), pieces=pieces)
    compare_with_reference(model, trace, rows, ROTARIES["llama"], [10] * 3, eviction_interval=4)


def view_of(state: dict[str, torch.Tensor], key: list, value: list, length: int) -> ScoringView:
    """One layer with one KV head, which holds the first tokens of one row."""
    positions = torch.arange(len(key), dtype=torch.int32)[None, None]
    numbers = [torch.tensor([[[number]]], dtype=torch.int32) for number in (length, 2)]
    tensors = [torch.tensor(states, dtype=torch.float32)[None, None] for states in (key, value)]
    return ScoringView(*tensors, positions, *numbers, None, state, 0)


def test_scores_by_hand() -> None:
    """The means of exponentials are 2, 3 and 2 · 3 = 6 of 11; the norms of the values 5, 1 and 1 / 2."""
    policy = ExpectedAttentionPolicy(num_sink_tokens=0)
    state = {
        "query_count": torch.tensor([[7.0]]),
        "query_mean": torch.tensor([[[math.log(2), 0.0]]]),
        "query_covariance": torch.tensor([[[0.0, 0.0, 2 * math.log(3)]]]),
        "rotation": torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]),
    }
    view = view_of(state, [[1, 0], [0, 1], [1, 1]], [[3, 4], [1, 0], [0, 0.5]], length=3)
    torch.testing.assert_close(policy.score(view), torch.tensor([[[10 / 11, 3 / 11, 3 / 11]]]))
    # The first token stays and the others share all attention between them.
    scores = ExpectedAttentionPolicy(num_sink_tokens=1, epsilon=0.5).score(view)
    torch.testing.assert_close(scores, torch.tensor([[[math.inf, 3 / 9 + 0.5, (6 / 9 + 0.5) / 2]]]))


def test_the_future_by_hand() -> None:
    """A quarter turn for each position: after five tokens the mean points where it would after one."""
    state = {
        "query_count": torch.tensor([[7.0]]),
        "query_mean": torch.tensor([[[math.log(2), 0.0]]]),
        "rotation": torch.tensor([[[math.pi / 2, math.pi / 2], [-2.0, 1.0]]]),
    }
    for num_future_positions, exponentials in ((1, [1, 2, 0.5]), (2, [2**-0.5, 2**0.5, 2**-0.5]), (4, [1, 1, 1])):
        policy = ExpectedAttentionPolicy(num_future_positions, num_sink_tokens=0, use_covariance=False)
        scores = policy.score(view_of(state, [[1, 0], [0, 1], [0, -1]], [[1, 0]] * 3, length=5))
        wanted = torch.tensor(exponentials) / sum(exponentials)
        torch.testing.assert_close(scores, wanted[None, None])


def test_statistics_by_hand() -> None:
    """Queries 1 and 3, then 8: of two rows, of which the second has padding and a first token that does not count."""
    policy = ExpectedAttentionPolicy(num_sink_tokens=1)
    state: dict[str, torch.Tensor] = {}
    for queries, positions in (
        ([[9.0, 2.0, 6.0], [math.nan, math.nan, 4.0]], [[0, 1, 2], [-1, -1, 0]]),
        ([[16.0], [10.0]], [[3], [1]]),
    ):
        query = torch.tensor(queries)[:, None, :, None]
        longest = 1 + max(max(row) for row in positions)
        view = PromptView(query, torch.tensor(positions)[:, None], None, 0.5, state, lambda: None, longest)
        state = policy.observe(view)
    assert state["query_count"].tolist() == [[3], [1]]
    # (1 + 3 + 8) / 3, and (9 + 1 + 16) / 3 around it.
    torch.testing.assert_close(state["query_mean"].flatten(), torch.tensor([4.0, 5.0]))
    torch.testing.assert_close(state["query_covariance"].flatten(), torch.tensor([26 / 3, 0.0]))


@pytest.mark.parametrize("use_covariance", [True, False])
def test_memory_is_what_the_formula_says(use_covariance: bool) -> None:
    model = build_model("llama")
    cache = ExpectedAttentionCache(model.config, budget=12, eviction_interval=4, use_covariance=use_covariance)
    drive(model, cache, random_rows((33, 21)), random_tokens(2, 3))
    heads, kv_heads, head_dim, batch = 4, 2, 16, 2
    statistics = heads * head_dim * (head_dim + 3) // 2 if use_covariance else heads * head_dim
    for layer in cache.compressed_layers:
        names = ("keys", "values", "positions")
        slots = sum(getattr(layer, name).untyped_storage().nbytes() for name in names)
        assert slots == batch * kv_heads * (12 + 4) * (2 * head_dim * 4 + 4)
        held = [layer.state[name].untyped_storage().nbytes() for name in layer.policy.state_names]
        assert sum(held) == batch * 4 * (statistics + 2 * head_dim + 1)
