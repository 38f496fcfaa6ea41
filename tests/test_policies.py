"""Caches that keep what a score says: against the loop-written ones, and on numbers so few that they can be worked out by hand."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import FAMILIES, Trace, drive, random_rows, random_tokens, tiny_model
from reference import ScoredPolicy, run_policy, score_of
from synthetic import SyntheticModel
from transformers import PreTrainedModel

from pyramid_cache import KeyDiffCache, KnormCache, PolicyCache, PyramidKVCache, SnapKVCache, TOVACache
from pyramid_cache.caches.pyramidkv import PyramidKVPolicy
from pyramid_cache.engine.budget import Budget
from pyramid_cache.engine.policy import ScoringView


# Settings that leave a row of 40 tokens something to choose from.
SETTINGS: dict[type[PolicyCache], dict[str, Any]] = {
    SnapKVCache: {"window_size": 6, "kernel_size": 3},
    PyramidKVCache: {"window_size": 4, "kernel_size": 5, "beta": 3.0},
    TOVACache: {},
    KeyDiffCache: {},
    KnormCache: {},
}
every_class = pytest.mark.parametrize("cache_class", SETTINGS, ids=lambda cache_class: cache_class.__name__)


# Whole models.


def compare_with_reference(
    model: PreTrainedModel, cache: PolicyCache, trace: Trace, rows: list[torch.Tensor], settings: dict[str, Any]
) -> None:
    """Each row of a run with the cache against the reference alone: what is held after each step, and the logits."""
    num_layers = model.config.num_hidden_layers
    for index, row in enumerate(rows):
        budget = settings["budget"]
        mean = Budget("tokens", budget if isinstance(budget, int) else math.floor(budget * len(row)))
        kept = [cache.policy.num_tokens(len(row), mean, layer, num_layers) for layer in range(num_layers)]
        score = score_of(type(cache), settings)
        policy = ScoredPolicy(score, len(row), kept, cache.compressed_layers[0].num_spare_slots, trace, index)
        logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        for layer, heads in policy.held.items():
            for head, history in enumerate(heads):
                for step, wanted in enumerate(history):
                    held = trace.held(step, layer, index, head)
                    assert held == wanted, f"row {index}, layer {layer}, head {head}, step {step}"
        torch.testing.assert_close(trace.logits[index], logits[len(row) - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "cache_class, interval",
    [
        pytest.param(
            cache_class, interval, marks=() if interval == 5 or cache_class is SnapKVCache else pytest.mark.slow
        )
        for cache_class in SETTINGS
        for interval in (1, 5, 32)
    ],
)
def test_held_positions_and_logits(cache_class: type[PolicyCache], interval: int) -> None:
    """A padded batch through more generated tokens than may wait."""
    settings = {"budget": 0.3, "eviction_interval": interval, **SETTINGS[cache_class]}
    model, rows = tiny_model("llama"), random_rows((23, 37, 30), seed=3)
    cache = cache_class(model.config, **settings)
    trace = drive(model, cache, rows, random_tokens(3, 34, seed=4))
    compare_with_reference(model, cache, trace, rows, settings)


@every_class
def test_a_prompt_grows_up_to_its_budget(cache_class: type[PolicyCache]) -> None:
    """Rows fill up, each at its own step, then tokens come in until as many go."""
    settings = {"budget": 12, "eviction_interval": 4, **SETTINGS[cache_class]}
    model, rows = tiny_model("llama"), random_rows((3, 9, 17), seed=2)
    cache = cache_class(model.config, **settings)
    trace = drive(model, cache, rows, random_tokens(3, 16, seed=3))
    compare_with_reference(model, cache, trace, rows, settings)
    assert trace.held(6, 0, 1, 0) == list(range(15))
    assert len(trace.held(7, 0, 1, 0)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@every_class
def test_other_families(cache_class: type[PolicyCache], family: str) -> None:
    settings = {"budget": 0.4, "eviction_interval": 3, **SETTINGS[cache_class]}
    model, rows = tiny_model(family), random_rows((41, 26), seed=5)
    cache = cache_class(model.config, **settings)
    trace = drive(model, cache, rows, random_tokens(2, 20, seed=6))
    compare_with_reference(model, cache, trace, rows, settings)


@every_class
def test_defaults(cache_class: type[PolicyCache]) -> None:
    model, rows = tiny_model("llama"), random_rows((203,))
    cache = cache_class(model.config)
    trace = drive(model, cache, rows, random_tokens(1, 3))
    compare_with_reference(model, cache, trace, rows, {"budget": 0.2})


# By hand.


@dataclass(frozen=True)
class HandCase:
    """One layer whose retained tokens can be worked out on paper.

    Attributes:
        cache_class: The cache.
        settings: Arguments of its constructor.
        keys: One `(x, y)` for each token, in prompts of `num_prompt` tokens and then one at a time; or one list for each
            KV head.
        num_prompt: Tokens of the prompt.
        expected: The positions held after the prompt and after each later token; for each KV head.
        why: The arithmetic.
    """

    cache_class: type[PolicyCache]
    settings: dict[str, Any]
    keys: list[list[tuple[float, float]]]
    num_prompt: int
    expected: list[list[set[int]]]
    why: str


def on_a_line(*numbers: float) -> list[tuple[float, float]]:
    """Keys of one dimension."""
    return [(number, 0.0) for number in numbers]


def attended(*weights: float) -> list[tuple[float, float]]:
    """Keys to which a query of (1, 0) gives its attention in these proportions."""
    return [(math.log(weight) * math.sqrt(2), 0.0) for weight in weights]


HAND_CASES: dict[str, HandCase] = {
    "Knorm": HandCase(
        KnormCache,
        {"budget": 2, "eviction_interval": 2},
        [on_a_line(3, -1, 2, 0.5, -4)],
        3,
        [[{1, 2}], [{1, 2, 3}], [{1, 3}]],
        "of 3, 1, 2 the lower two; 0.5 comes in; with 4 there are two too many, and of 1, 2, 0.5, 4 the lower two stay",
    ),
    "KeyDiff": HandCase(
        KeyDiffCache,
        {"budget": 3, "eviction_interval": 1},
        [[(7.0, 0.0), (1.0, 0.0), (0.0, 2.0), (3.0, 0.0), (-1.0, 0.0), (0.0, -5.0)]],
        5,
        [[{2, 3, 4}], [{3, 4, 5}]],
        "the directions' mean is (0.4, 0.2): (-1, 0) and (0, 1) are the least like it, and of the equal ones the newest "
        "stays; then the mean of (0, 1), (1, 0), (-1, 0), (0, -1) is nothing, all are as unlike it, and the oldest goes",
    ),
    "TOVA": HandCase(
        TOVACache,
        {"budget": 3},
        [attended(0.5, 0.1, 0.2, 0.1, 0.1), attended(0.1, 0.1, 0.1, 0.6, 0.1)],
        5,
        [[{0, 3, 4}, {0, 3, 4}]],
        "the mean over heads is 0.3, 0.1, 0.15, 0.35, 0.1, and the last token stays",
    ),
    "TOVA while generating": HandCase(
        TOVACache,
        {"budget": 3, "eviction_interval": 1},
        [attended(5, 1, 2, 3, 1, 4), attended(5, 1, 2, 3, 1, 4)],
        4,
        [[{0, 2, 3}] * 2, [{0, 3, 4}] * 2, [{0, 3, 5}] * 2],
        "the newest token stays, whatever it gets; at the next it goes, for it has least",
    ),
    "SnapKV": HandCase(
        SnapKVCache,
        {"budget": 4, "window_size": 2, "kernel_size": 3},
        [attended(3, 30, 1, 1, 10, 15, 50, 50)],
        8,
        [[{0, 1, 6, 7}]],
        "beside the window, sums over neighbours are 33, 34, 32, 12, 26, 25: what is next to a peak stays with it",
    ),
    "SnapKV, tokens for themselves": HandCase(
        SnapKVCache,
        {"budget": 4, "window_size": 2, "kernel_size": 1},
        [attended(3, 30, 1, 1, 10, 15, 50, 50)],
        8,
        [[{1, 5, 6, 7}]],
        "30 and 15 beside the window",
    ),
    "SnapKV while generating": HandCase(
        SnapKVCache,
        {"budget": 4, "window_size": 2, "kernel_size": 1, "eviction_interval": 2},
        [attended(3, 30, 1, 1, 10, 15, 50, 5, 1, 40)],
        8,
        [[{1, 5, 6, 7}], [{1, 5, 6, 7, 8}], [{1, 6, 8, 9}]],
        "with two tokens more, the window is theirs, and of the others, 30, 15, 50, 5, the two that get most stay",
    ),
}


@pytest.mark.parametrize("name", HAND_CASES)
def test_by_hand(name: str) -> None:
    case = HAND_CASES[name]
    model = SyntheticModel(1, len(case.keys), 1, 2)
    cache = case.cache_class(model.config, **case.settings)
    keys = torch.tensor(case.keys)[None]  # (1, kv_heads, tokens, 2)
    pieces = keys.split([case.num_prompt] + [1] * (keys.shape[2] - case.num_prompt), dim=2)
    for piece, expected in zip(pieces, case.expected, strict=True):
        query = torch.tensor([1.0, 0.0]).expand_as(piece)
        model.run_layer(cache, 0, query, piece, torch.ones_like(piece), None)
        assert [set(head.tolist()) - {-1} for head in cache.positions(0)[0]] == expected, case.why


# The schedule of PyramidKV.


def filled(total: int, line: list[Fraction], least: int, most: int) -> list[Fraction]:
    """Water poured into glasses as wide as a line says, none holding less than `least` or more than `most`: exact levels."""
    for scale in sorted({bound / width for width in line for bound in (least, most)}):
        # Between two such scales the sum rises linearly: the next one that reaches the total bounds it.
        if sum(min(max(scale * width, least), most) for width in line) >= total:
            free = [width for width in line if least < scale * width and (scale - Fraction(1, 10**12)) * width < most]
            bound = sum(
                min(max((scale - Fraction(1, 10**12)) * width, least), most) for width in line if width not in free
            )
            level = (total - bound) / sum(free) if free else scale
            return [min(max(level * width, Fraction(least)), Fraction(most)) for width in line]
    return [Fraction(most)] * len(line)


@pytest.mark.parametrize("beta", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 30])
def test_layers_share_what_uniform_ones_would_keep(num_layers: int, beta: float) -> None:
    """In proportion to the paper's line where the prompt is long enough; always as many in all, and never more than there is."""
    for prompt_length in (5, 40, 77, 1024):
        for mean in (1, 2, 7, 39, 40, 76, 200, 600, 1000):
            policy = PyramidKVPolicy(window_size=8, beta=beta)
            budget = Budget("tokens", mean)
            kept = [policy.num_tokens(prompt_length, budget, depth, num_layers) for depth in range(num_layers)]
            if mean >= prompt_length:
                assert kept == [mean] * num_layers
                continue
            assert sum(kept) == mean * num_layers and max(kept) <= prompt_length
            assert kept == sorted(kept, reverse=True)
            window = min(8, mean // 2)
            lowest = Fraction(mean - window) / Fraction(beta)
            highest = 2 * (mean - window) - lowest
            steps = max(num_layers - 1, 1)
            line = [highest - (highest - lowest) * depth / steps for depth in range(num_layers)]
            least = max(min(8, mean - window), 1)
            wanted = filled((mean - window) * num_layers, line, least, prompt_length - window)
            for number, exact in zip(kept, wanted, strict=True):
                assert abs(number - window - exact) < 1, (prompt_length, mean, kept, wanted)


@pytest.mark.parametrize(
    "prompt_length, budget, window_size, beta, expected",
    [
        # Beside a window of 2 tokens 8 on average: from 14 to 8 / 4 = 2.
        (100, 10, 2, 4.0, (16, 10, 4)),
        # The first layer can take 10 of its 14 only; 8 : 2 of the rest would give the second more than there is, too.
        (12, 10, 2, 4.0, (12, 12, 6)),
        # No layer keeps less beside the window than in it: of 9 : 6 : 3, as beta has it, the last one takes 4.
        (100, 10, 4, 2.0, (12, 10, 8)),
        # The window is half of what is kept at most, and nothing is left to share out.
        (100, 10, 32, 2.0, (10, 10, 10)),
        (100, 10, 2, 1.0, (10, 10, 10)),
        (9, 10, 2, 4.0, (10, 10, 10)),
    ],
)
def test_a_pyramid_by_hand(
    prompt_length: int, budget: int, window_size: int, beta: float, expected: tuple[int, ...]
) -> None:
    policy = PyramidKVPolicy(window_size=window_size, beta=beta)
    kept = [policy.num_tokens(prompt_length, Budget("tokens", budget), depth, 3) for depth in range(3)]
    assert tuple(kept) == expected


# What policies are made from.


def test_neighbours_are_those_in_the_sequence() -> None:
    """Slots are in any order and some are empty: pooling goes by positions, and beyond the ends there is nothing."""
    positions = torch.tensor([[[4, -1, 0, 9, 2, -1, 7]]], dtype=torch.int32)
    number = torch.tensor([[[4]]], dtype=torch.int32)
    view = ScoringView(None, None, positions, number, number, None, {}, 0)
    scores = torch.tensor([[[3.0, 99.0, 1.0, 5.0, -2.0, 99.0, 4.0]]])
    # In order: 1, -2, 3, 4, 5 at positions 0, 2, 4, 7, 9.
    averages = {0: -1 / 3, 2: 2 / 3, 4: 5 / 3, 7: 4.0, 9: 3.0}
    maxima = {0: 1.0, 2: 3.0, 4: 4.0, 7: 5.0, 9: 5.0}
    for kind, expected in (("average", averages), ("maximum", maxima)):
        pooled = view.pool(scores, 3, kind)
        for position, score in zip(positions.flatten().tolist(), pooled.flatten().tolist(), strict=True):
            assert position < 0 or score == pytest.approx(expected[position])


def test_an_even_kernel_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"`kernel_size=6` must be odd.*Give 5 or 7"):
        SnapKVCache(tiny_model("llama").config, kernel_size=6)
