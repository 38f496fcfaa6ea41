"""Caches that are reset, or change their rows on the way."""

from collections.abc import Callable

import torch
from caches import CacheCase, every_cache, pair_with_caches
from models import drive, left_pad, random_rows, random_tokens, tiny_model
from modes import assert_close, held_positions
from transformers import Cache


@torch.no_grad()
def feed(cache: Cache, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Feeds tokens `(batch, tokens)` one at a time to a cache that has seen what `mask` shows; `(batch, tokens, vocab)`.
    """
    logits = []
    for column in tokens.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(column)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        output = tiny_model("llama")(column, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


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


# What is called on the cache, and the rows that result.
ROW_OPERATIONS: dict[str, tuple[Callable[[Cache], None], list[int]]] = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1])), [1, 2, 1]),
}


@pair_with_caches("operation", [*ROW_OPERATIONS, "select even", "reorder even"])
def test_operations_on_rows_commute_with_decoding(operation: str, case: CacheCase) -> None:
    lengths = (33, 33, 33) if operation.endswith(" even") else (40, 5, 29)
    model, rows, tokens = tiny_model("llama"), random_rows(lengths, seed=58), random_tokens(3, 25, seed=59)
    operate, indices = ROW_OPERATIONS[operation.removesuffix(" even")]
    mask = left_pad(rows)[1]
    early, late = case.build(model), case.build(model)
    for cache in (early, late):
        drive(model, cache, rows, 0)
    operate(early)
    assert_close(feed(early, mask[indices], tokens[indices]), feed(late, mask, tokens)[indices])
    operate(late)
    more, mask = random_tokens(len(indices), 4, seed=60), torch.cat([mask, mask.new_ones(3, 25)], dim=1)[indices]
    for is_done in (False, True):
        if is_done:
            assert_close(feed(early, mask, more), feed(late, mask, more))
        for layer in range(3):
            assert held_positions(early, layer) == held_positions(late, layer)
