"""RKVCache against R-KV written as loops, and on keys so few that redundancy can be worked out by hand."""

import math

import pytest
import torch
from models import drive, random_rows, random_tokens, tiny_model
from reference import RKVScore, ScoredPolicy, compare_with_policies

from pyramid_cache import RKVCache
from pyramid_cache.caches import rkv
from pyramid_cache.caches.rkv import RKVPolicy
from pyramid_cache.engine.policy import ScoringView


@pytest.mark.parametrize(
    ("settings", "similarities_per_chunk"),
    [
        ({"window_size": 3, "kernel_size": 3}, 500),
        ({"importance_weight": 0.0, "similarity_threshold": 0.2}, 1),
        ({}, rkv.SIMILARITIES_PER_CHUNK),
    ],
    ids=["small", "redundancy", "defaults"],
)
def test_held_positions_and_logits(
    settings: dict, similarities_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each padded row, with an answer during which some evict several times, against the reference alone."""
    monkeypatch.setattr(rkv, "SIMILARITIES_PER_CHUNK", similarities_per_chunk)
    model, rows = tiny_model("llama"), random_rows((23, 37, 30), seed=3)
    cache = RKVCache(model.config, budget=11, eviction_interval=4, **settings)
    trace = drive(model, cache, rows, random_tokens(3, 14, seed=4))
    policies = [ScoredPolicy(RKVScore(**settings), len(row), [11] * 3, eviction_interval=4) for row in rows]
    compare_with_policies(model, trace, rows, policies)


def view_of(key: list[list[float]], positions: list[int], attention: list[float], num_kept: int) -> ScoringView:
    """One layer with one KV head, whose slots hold tokens of one row in any order."""
    tensors = [torch.tensor(states)[None, None] for states in (key, key)]
    numbers = [torch.tensor([[[number]]], dtype=torch.int32) for number in (max(positions) + 1, num_kept)]
    slots = torch.tensor(positions, dtype=torch.int32)[None, None]
    return ScoringView(*tensors, slots, *numbers, torch.tensor(attention)[None, None], {}, 0)


def test_redundancy_by_hand() -> None:
    """Three keys that point one way and two at right angles: of the three, the latest is blamed for nothing.

    Of the three, at positions 0, 2 and 3, all blame the others, but 0 and 2 do not blame 3, nor 3 the next latest, 2.
    So 0 is blamed twice, 2 once, and all else never; a cosine counts a fifth in a row of five. The last token stays
    anyway.
    """
    keys = [[5.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.5, 0.0, 0.0], [9.0, 9.0, 9.0], [0.0, 0.0, 1.0]]
    view = view_of(keys, [2, 0, 1, 3, -1, 4], [0.0] * 6, num_kept=1)
    shares = torch.tensor([math.exp(0.2), math.exp(0.4), 1, 1]) / (math.exp(0.2) + math.exp(0.4) + 3)
    # Right angles do not exceed a cosine of 0, as of 0.5.
    for threshold in (0.5, 0.0):
        scores = RKVPolicy(similarity_threshold=threshold, importance_weight=0.25).score(view)[0, 0]
        torch.testing.assert_close(scores[:4], -0.75 * shares)
        assert scores[5] == math.inf
    # Nothing exceeds 1: then nobody is spared.
    shares = torch.tensor([math.exp(0.4)] * 2 + [1, math.exp(0.4)]) / (3 * math.exp(0.4) + 2)
    strict = RKVPolicy(similarity_threshold=1.0, importance_weight=0.25).score(view)[0, 0]
    torch.testing.assert_close(strict[:4], -0.75 * shares)


def test_importance_by_hand() -> None:
    """Shares of what the candidates got, the larger of neighbours in the order of positions; the last token stays."""
    keys = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    view = view_of(keys, [3, 1, 0, 2], [0.5, 0.1, 0.3, 0.0], num_kept=2)
    scores = RKVPolicy(kernel_size=3, importance_weight=1.0).score(view)
    torch.testing.assert_close(scores, torch.tensor([[[math.inf, 0.75, 0.75, 0.25]]]))
