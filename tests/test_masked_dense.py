"""Below the full budget every logit is that of an uncached run whose masks hide exactly what the cache evicted."""

import torch
from caches import CACHE_CASES, CacheCase, pair_with_caches
from models import FAMILIES, Trace, drive, random_rows, random_tokens, tiny_model
from reference import MaskPolicy, masks_of, run_policy
from transformers import Cache, PreTrainedModel

from pyramid_cache import StreamingLLMCache


TOLERANCE = 1e-4
# A cache that has evicted takes several tokens at once: each sees what was held, and its own turn up to itself.
TURNS = [1, 1, 1, 9, 1, 1, 13, 2, 1, 1]
# Those that attend to a prompt as the model does, and to tokens at their own positions.
MASKED_CASES = [
    case
    for case in CACHE_CASES
    if case.evicts
    and not case.prunes_prefill
    and not case.compacts
    and not issubclass(case.cache_class, StreamingLLMCache)
]


def compare_with_masked_dense(
    model: PreTrainedModel, cache: Cache, lengths: tuple[int, ...], pieces: list[int], with_mask: bool = True
) -> None:
    """Drive a cache over random tokens and compare every row with its masked, uncached, unpadded run."""
    rows = random_rows(lengths, seed=7)
    continuation = random_tokens(len(rows), sum(pieces), seed=8)
    trace = drive(model, cache, rows, continuation, with_mask=with_mask, pieces=pieces)
    assert_is_masked_run(model, trace, rows)


def assert_is_masked_run(model: PreTrainedModel, trace: Trace, rows: list[torch.Tensor]) -> None:
    """Every logit of every row is that of an uncached run that hides what was not held."""
    ends = torch.tensor([0, *trace.pieces]).cumsum(0) - 1
    kv_heads = model.config.num_key_value_heads
    for index, row in enumerate(rows):
        masks = masks_of(trace, index, kv_heads)
        visible, length = sum(int(mask.sum()) for mask in masks), len(row) + sum(trace.pieces)
        everything = len(masks) * kv_heads * length * (length + 1) // 2
        assert visible < 0.9 * everything, f"nothing to test: {visible} of {everything} keys seen"
        tokens = torch.cat([row, trace.tokens[index]])
        wanted = run_policy(model, tokens, MaskPolicy(masks))[len(row) + ends]
        torch.testing.assert_close(trace.logits[index], wanted, atol=TOLERANCE, rtol=0)


@pair_with_caches("family", FAMILIES, MASKED_CASES)
def test_every_logit_equals_the_masked_run(family: str, case: CacheCase) -> None:
    model = tiny_model(family)
    compare_with_masked_dense(model, case.build(model), (23, 41, 32), [1] * 34)
    compare_with_masked_dense(model, case.build(model), (23, 41, 32), TURNS)
    compare_with_masked_dense(model, case.build(model), (41, 41), TURNS, with_mask=False)


def test_the_masked_run_is_the_model_and_notices_one_hidden_key() -> None:
    for family in FAMILIES:
        model, tokens = tiny_model(family), random_tokens(50)
        with torch.no_grad():
            wanted = model(tokens[None], use_cache=False).logits[0]
        torch.testing.assert_close(run_policy(model, tokens, MaskPolicy()), wanted, atol=TOLERANCE, rtol=0)
    model, tokens = tiny_model("llama"), random_tokens(30)
    masks = [torch.ones(2, 30, 30, dtype=torch.bool).tril() for _ in range(3)]
    masks[1][1, 29, 12] = False
    difference = run_policy(model, tokens, MaskPolicy(masks)) - run_policy(model, tokens, MaskPolicy())
    assert difference[:29].abs().max() == 0
    assert difference[29].abs().max() > 10 * TOLERANCE
