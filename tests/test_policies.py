"""Caches that keep what a score says, against the loop-written ones."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import FAMILIES, Trace, drive, random_rows, random_tokens, tiny_model
from reference import ScoredPolicy, compare_with_policies, score_of

from pyramid_cache import (
    KeyDiffCache,
    KnormCache,
    Policy,
    PolicyCache,
    PyramidKVCache,
    RKVCache,
    SnapKVCache,
    TOVACache,
)
from pyramid_cache.caches import rkv
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


def check(cache_class: type[PolicyCache], family: str, lengths: tuple[int, ...], later: int, **settings: Any) -> Trace:
    """Each row of a run with a new cache against the reference alone; returns the run."""
    model, rows = tiny_model(family), random_rows(lengths, seed=3)
    cache = cache_class(model.config, **settings)
    trace = drive(model, cache, rows, random_tokens(len(rows), later, seed=4))
    num_layers, score = model.config.num_hidden_layers, score_of(cache_class, settings)
    policies = []
    for row, length in enumerate(lengths):
        budget = settings.get("budget", 0.2)
        mean = Budget("tokens", budget if isinstance(budget, int) else math.floor(budget * length))
        kept = [cache.policy.num_tokens(length, mean, layer, num_layers) for layer in range(num_layers)]
        policies.append(ScoredPolicy(length, score, kept, cache.compressed_layers[0].eviction_interval, trace, row))
    compare_with_policies(model, trace, rows, policies)
    return trace


@every_class
def test_held_positions_and_logits(cache_class: type[PolicyCache]) -> None:
    """Padded rows whose answers have more tokens than may wait; prompts that grow up to a budget; the defaults."""
    settings = SETTINGS[cache_class]
    check(cache_class, "llama", (23, 37, 30), 14, budget=0.3, eviction_interval=5, **settings)
    trace = check(cache_class, "llama", (3, 9, 17), 16, budget=12, eviction_interval=4, **settings)
    assert trace.held(6, 0, 1, 0) == list(range(15))
    assert len(trace.held(7, 0, 1, 0)) == 12
    check(cache_class, "llama", (203,), 3)


def test_redundancy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of R-KV: with it alone and without it, whatever counts as alike, and in chunks of similarities."""
    for settings, similarities_per_chunk in (
        ({"window_size": 3, "kernel_size": 3}, 500),
        ({"importance_weight": 0.0, "similarity_threshold": 0.0}, 1),
        ({"importance_weight": 0.0, "similarity_threshold": 0.2}, 500),
        ({"importance_weight": 0.0, "similarity_threshold": 1.0}, 500),
        ({"importance_weight": 1.0, "kernel_size": 5}, rkv.SIMILARITIES_PER_CHUNK),
        ({}, rkv.SIMILARITIES_PER_CHUNK),
    ):
        monkeypatch.setattr(rkv, "SIMILARITIES_PER_CHUNK", similarities_per_chunk)
        check(RKVCache, "llama", (23, 37, 30), 14, budget=11, eviction_interval=4, **settings)


@pytest.mark.slow
@every_class
def test_other_families_and_intervals(cache_class: type[PolicyCache]) -> None:
    for interval in (1, 32):
        check(cache_class, "llama", (23, 37, 30), 34, budget=0.3, eviction_interval=interval, **SETTINGS[cache_class])
    for family in FAMILIES:
        check(cache_class, family, (41, 26), 20, budget=0.4, eviction_interval=3, **SETTINGS[cache_class])


# The schedule of PyramidKV.


def filled(total: int, line: list[Fraction], least: int, most: int) -> list[float]:
    """Shares of a total in proportion to a line, none below `least` or above `most`, by bisection."""
    low, high = 0.0, max(most / width for width in line)
    for _ in range(100):
        scale = (low + high) / 2
        levels = [min(max(scale * float(width), least), most) for width in line]
        low, high = (low, scale) if sum(levels) >= total else (scale, high)
    return levels


@pytest.mark.parametrize("beta", [1.0, 2.0, 20.0])
def test_layers_share_what_uniform_ones_would_keep(beta: float) -> None:
    """In proportion to the paper's line if the prompt is long enough; always as many in all, within the prompt."""
    sizes = itertools.product((1, 2, 3, 30), (5, 40, 77, 1024), (1, 2, 7, 39, 40, 76, 200, 600, 1000))
    for num_layers, prompt_length, mean in sizes:
        policy, budget = PyramidKVPolicy(window_size=8, beta=beta), Budget("tokens", mean)
        kept = [policy.num_tokens(prompt_length, budget, depth, num_layers) for depth in range(num_layers)]
        if mean >= prompt_length:
            assert kept == [mean] * num_layers
            continue
        assert sum(kept) == mean * num_layers and max(kept) <= prompt_length
        assert kept == sorted(kept, reverse=True)
        window = min(8, mean // 2)
        lowest = Fraction(mean - window) / Fraction(beta)
        highest = 2 * (mean - window) - lowest
        line = [highest - (highest - lowest) * depth / max(num_layers - 1, 1) for depth in range(num_layers)]
        least = max(min(8, mean - window), 1)
        wanted = filled((mean - window) * num_layers, line, least, prompt_length - window)
        for number, exact in zip(kept, wanted, strict=True):
            assert abs(number - window - exact) < 1, (prompt_length, mean, kept, wanted)


# What policies are made from.


def test_neighbours_are_those_in_the_sequence() -> None:
    """Slots are in any order and some are empty: pooling goes by positions, and beyond the ends there is nothing."""
    positions = torch.tensor([[[4, -1, 0, 9, 2, -1, 7]]], dtype=torch.int32)
    number = torch.tensor([[[4]]], dtype=torch.int32)
    view = ScoringView(None, None, positions, number, None, 0, lambda: None, 9, number, None)
    scores = torch.tensor([[[3.0, 99.0, 1.0, 5.0, -2.0, 99.0, 4.0]]])
    # In order: 1, -2, 3, 4, 5 at positions 0, 2, 4, 7, 9.
    averages = {0: -1 / 3, 2: 2 / 3, 4: 5 / 3, 7: 4.0, 9: 3.0}
    maxima = {0: 1.0, 2: 3.0, 4: 4.0, 7: 5.0, 9: 5.0}
    for kind, expected in (("average", averages), ("maximum", maxima)):
        pooled = view.pool(scores, 3, kind)
        for position, score in zip(positions.flatten().tolist(), pooled.flatten().tolist(), strict=True):
            assert position < 0 or score == pytest.approx(expected[position])


def test_scores_that_are_none_and_norms_of_another_order_are_refused() -> None:
    @dataclass(frozen=True)
    class NoWindow(Policy):
        def score(self, view: ScoringView) -> torch.Tensor:
            return view.attention

    @dataclass(frozen=True)
    class Cubes(Policy):
        def score(self, view: ScoringView) -> torch.Tensor:
            return view.projected_value_norms(3)

    model = tiny_model("llama")
    for policy, match in (
        (NoWindow(), "`NoWindow.score` returned None.*`view.attention` is None unless .*`window_size`"),
        (Cubes(), "`order=3`.*1 .*or 2"),
    ):
        with pytest.raises(ValueError, match=match):
            model(random_tokens(1, 20), past_key_values=PolicyCache(model.config, 12, policy))
