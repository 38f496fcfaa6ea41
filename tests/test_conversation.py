"""Caches that are used again."""

import torch
from caches import CacheCase, every_cache
from models import drive, random_rows, random_tokens, tiny_model


@every_cache
def test_a_cache_that_was_reset_is_a_new_one(case: CacheCase) -> None:
    model = tiny_model("llama")
    used, new = case.build(model), case.build(model)
    drive(model, used, random_rows((50, 20, 31), seed=55), 26)
    used.reset()
    rows, continuation = random_rows((40, 29), seed=56), random_tokens(2, 26, seed=57)
    traces = [drive(model, cache, rows, continuation) for cache in (used, new)]
    assert torch.equal(traces[0].logits, traces[1].logits)
    for layer in range(3):
        assert torch.equal(used.positions(layer), new.positions(layer))
