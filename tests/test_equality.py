"""With a budget that holds the whole sequence every cache is `DynamicCache`, bit for bit."""

import pytest
import torch
from caches import CacheCase, pair_with_caches
from models import FAMILIES, generate, random_rows, tiny_model
from transformers import Cache, DynamicCache

from pyramid_cache import H2OCache, PyramidCache, PyramidKVCache


# Batches by the lengths of their rows: odd lengths, one and three rows, left-padded and not.
BATCHES = ((1,), (7,), (33,), (1, 1, 1), (7, 7, 7), (33, 33, 33), (7, 1, 4), (20, 33, 7))


def assert_bitwise_equal(cache: Cache, family: str, lengths: tuple[int, ...], new_tokens: int) -> None:
    """Generate with a cache and compare with `DynamicCache`, tokens and every logit."""
    model, rows = tiny_model(family), random_rows(lengths)
    wanted = generate(model, DynamicCache(config=model.config), rows, new_tokens)
    output = generate(model, cache, rows, new_tokens)
    assert torch.equal(output.sequences, wanted.sequences)
    assert len(output.logits) == new_tokens
    # Equality of tokens says little for a model that repeats one token.
    assert new_tokens < 40 or len(set(output.sequences[0, -new_tokens:].tolist())) >= 5
    for step, (actual, expected) in enumerate(zip(output.logits, wanted.logits, strict=True)):
        assert torch.equal(actual, expected), f"step {step} differs by {(actual - expected).abs().max().item():.1e}"


@pair_with_caches("family", FAMILIES)
def test_logits_and_tokens(family: str, case: CacheCase) -> None:
    for lengths in BATCHES:
        new_tokens = 64 if lengths == (20, 33, 7) and family in ("llama", "glm4") else 5
        assert_bitwise_equal(case.build(tiny_model(family), "large"), family, lengths, new_tokens)


@pytest.mark.parametrize("cache_class", [PyramidCache, H2OCache, PyramidKVCache])
def test_budgets_that_are_no_number_of_tokens(cache_class: type[Cache]) -> None:
    """
    Bytes, and the whole prompt as a fraction: the second token is the last that only the prompt and itself have fed.
    """
    for budget, new_tokens in (("64MiB", 40), (1.0, 2)):
        cache = cache_class(tiny_model("llama").config, budget=budget)
        assert_bitwise_equal(cache, "llama", (20, 33, 7), new_tokens)
