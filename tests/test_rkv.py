"""RKVCache against R-KV written as loops."""

import pytest
from models import drive, random_rows, random_tokens, tiny_model
from reference import RKVScore, ScoredPolicy, compare_with_policies

from pyramid_cache import RKVCache
from pyramid_cache.caches import rkv


@pytest.mark.parametrize(
    ("settings", "similarities_per_chunk"),
    [
        ({"window_size": 3, "kernel_size": 3}, 500),
        ({"importance_weight": 0.0, "similarity_threshold": 0.0}, 1),
        ({"importance_weight": 0.0, "similarity_threshold": 1.0}, 500),
        ({"importance_weight": 1.0, "kernel_size": 5}, 500),
        ({}, rkv.SIMILARITIES_PER_CHUNK),
    ],
    ids=["small", "redundancy", "nobody is spared", "importance", "defaults"],
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
