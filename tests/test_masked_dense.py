"""Below the full budget every logit is that of an uncached run whose masks hide exactly what the cache evicted."""

from collections.abc import Callable

import pytest
import torch
from models import FAMILIES, drive, random_rows, random_tokens, tiny_model
from reference import MaskPolicy, masks_of, run_policy
from transformers import Cache, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, SnapKVCache, TOVACache


TOLERANCE = 1e-4

CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "h2o": lambda model: H2OCache(model.config, budget=0.3),
    "h2o_tokens": lambda model: H2OCache(model.config, budget=9, heavy_ratio=0.7),
    "pyramid": lambda model: PyramidCache(model.config, budget=0.4),
    "snapkv": lambda model: SnapKVCache(model.config, budget=0.4, window_size=6, eviction_interval=5),
    "tova": lambda model: TOVACache(model.config, budget=13),
}


def compare_with_masked_dense(
    model: PreTrainedModel, cache: Cache, lengths: tuple[int, ...], pieces: list[int], with_mask: bool = True
) -> None:
    """Drive a cache over random tokens and compare every row with its masked, uncached, unpadded run."""
    rows = random_rows(lengths, seed=7)
    continuation = random_tokens(len(rows), sum(pieces), seed=8)
    trace = drive(model, cache, rows, continuation, with_mask=with_mask, pieces=pieces)
    ends = torch.tensor([0, *pieces]).cumsum(0) - 1
    kv_heads = model.config.num_key_value_heads
    for index, row in enumerate(rows):
        masks = masks_of(trace, index, kv_heads)
        visible = sum(int(mask.sum()) for mask in masks)
        everything = len(masks) * kv_heads * mask_size(len(row) + sum(pieces))
        assert visible < 0.9 * everything, f"nothing to test: {visible} of {everything} keys seen"
        tokens = torch.cat([row, continuation[index]])
        wanted = run_policy(model, tokens, MaskPolicy(masks))[len(row) + ends]
        torch.testing.assert_close(trace.logits[index], wanted, atol=TOLERANCE, rtol=0)


def mask_size(length: int) -> int:
    """Entries of a causal mask."""
    return length * (length + 1) // 2


@pytest.mark.parametrize("lengths", [(41,), (41, 41, 41), (23, 41, 32)], ids=["one", "three", "padded"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_equals_the_masked_run(family: str, cache: str, lengths: tuple[int, ...]) -> None:
    model = tiny_model(family)
    compare_with_masked_dense(model, CACHES[cache](model), lengths, pieces=[1] * 34)


@pytest.mark.parametrize("cache", CACHES)
def test_without_an_attention_mask(cache: str) -> None:
    model = tiny_model("llama")
    compare_with_masked_dense(model, CACHES[cache](model), (41, 41), [1] * 34, with_mask=False)


@pytest.mark.parametrize("lengths", [(41,), (23, 41, 32)], ids=["one", "padded"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "phi3", "glm4"])
def test_later_turns_of_several_tokens(family: str, cache: str, lengths: tuple[int, ...]) -> None:
    """A cache that has evicted takes several tokens at once: each sees what was held, and its own turn up to itself."""
    model = tiny_model(family)
    compare_with_masked_dense(model, CACHES[cache](model), lengths, pieces=[1, 1, 1, 9, 1, 1, 13, 2, 1, 1])


def test_prompt_logits_of_h2o_are_dense() -> None:
    """H2O evicts after the prompt has attended, so the prompt's own logits are the model's."""
    model = tiny_model("llama")
    tokens = random_tokens(1, 41)
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        output = model(tokens, past_key_values=H2OCache(model.config, budget=0.2)).logits
    torch.testing.assert_close(output, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_run_with_nothing_masked_is_the_model(family: str) -> None:
    model = tiny_model(family)
    tokens = random_tokens(50)
    with torch.no_grad():
        wanted = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(run_policy(model, tokens, MaskPolicy()), wanted, atol=TOLERANCE, rtol=0)


def test_the_masked_run_notices_one_hidden_key() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(30)
    masks = [torch.ones(2, 30, 30, dtype=torch.bool).tril() for _ in range(3)]
    masks[1][1, 29, 12] = False
    difference = run_policy(model, tokens, MaskPolicy(masks)) - run_policy(model, tokens, MaskPolicy())
    assert difference[:29].abs().max() == 0
    assert difference[29].abs().max() > 10 * TOLERANCE
