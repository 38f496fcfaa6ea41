"""With a budget that holds the whole sequence every cache is `DynamicCache`, bit for bit."""

from collections.abc import Callable
from functools import cache as remember

import pytest
import torch
from models import FAMILIES, build_model, generate, random_rows, tiny_model
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, PyramidKVCache, SnapKVCache, StreamingLLMCache


MakeCache = Callable[[PreTrainedModel], Cache]

# Budgets that no sequence of these tests fills.
ROOMY_CACHES: dict[str, MakeCache] = {
    "pyramid_config": lambda model: PyramidCache(model.config, budget=1024),
    "pyramid_model": lambda model: PyramidCache(model, budget=1024),
    "h2o": lambda model: H2OCache(model.config, budget=1024),
    "snapkv": lambda model: SnapKVCache(model.config, budget=1024),
    "streaming_llm": lambda model: StreamingLLMCache(model.config, budget=1024),
    "streaming_llm_dense": lambda model: StreamingLLMCache(model.config, budget=1024, prefill="dense"),
}

# Batches by the lengths of their rows: odd lengths, one and three rows, left-padded and not.
BATCHES: dict[str, tuple[int, ...]] = {
    "1": (1,),
    "7": (7,),
    "33": (33,),
    "1x3": (1, 1, 1),
    "7x3": (7, 7, 7),
    "33x3": (33, 33, 33),
    "padded_7": (7, 1, 4),
    "padded_33": (20, 33, 7),
}


@remember
def expected(family: str, lengths: tuple[int, ...], new_tokens: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Sequences and logits of `DynamicCache`."""
    model = tiny_model(family)
    output = generate(model, DynamicCache(config=model.config), random_rows(lengths), new_tokens)
    return output.sequences, output.logits


def assert_bitwise_equal(cache: Cache, family: str, lengths: tuple[int, ...], new_tokens: int) -> None:
    """Generate with a cache and compare with `DynamicCache`, tokens and every logit."""
    sequences, logits = expected(family, lengths, new_tokens)
    output = generate(tiny_model(family), cache, random_rows(lengths), new_tokens)
    assert torch.equal(output.sequences, sequences)
    assert len(output.logits) == len(logits) == new_tokens
    for step, (actual, wanted) in enumerate(zip(output.logits, logits, strict=True)):
        assert torch.equal(actual, wanted), f"step {step} differs by {(actual - wanted).abs().max().item():.1e}"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cache", ROOMY_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_equal(family: str, cache: str, batch: str) -> None:
    assert_bitwise_equal(ROOMY_CACHES[cache](tiny_model(family)), family, BATCHES[batch], new_tokens=5)


@pytest.mark.parametrize("batch", ["33", "padded_33"])
@pytest.mark.parametrize("cache", ROOMY_CACHES)
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_logits_and_tokens_equal_over_200_tokens(family: str, cache: str, batch: str) -> None:
    assert_bitwise_equal(ROOMY_CACHES[cache](tiny_model(family)), family, BATCHES[batch], new_tokens=200)


@pytest.mark.parametrize("new_tokens", [1, 2, 13])
@pytest.mark.parametrize("cache", ROOMY_CACHES)
def test_any_number_of_new_tokens(cache: str, new_tokens: int) -> None:
    assert_bitwise_equal(ROOMY_CACHES[cache](tiny_model("llama")), "llama", (9, 21, 14), new_tokens)


@pytest.mark.parametrize("cache_class", [PyramidCache, H2OCache, PyramidKVCache])
def test_bytes_that_hold_everything(cache_class: type[Cache]) -> None:
    assert_bitwise_equal(cache_class(tiny_model("llama").config, budget="64MiB"), "llama", (33, 20, 7), new_tokens=40)


@pytest.mark.parametrize("lengths", [(33,), (33, 33, 33), (20, 33, 7)], ids=["1", "3", "padded"])
@pytest.mark.parametrize("cache_class", [PyramidCache, H2OCache, PyramidKVCache])
def test_whole_prompt_as_a_fraction(cache_class: type[Cache], lengths: tuple[int, ...]) -> None:
    """`budget=1.0` keeps the whole prompt; the second token is the last that only the prompt and itself have fed."""
    assert_bitwise_equal(cache_class(tiny_model("llama").config, budget=1.0), "llama", lengths, new_tokens=2)


@pytest.mark.parametrize("cache", ROOMY_CACHES)
@pytest.mark.parametrize("lengths", [(33,), (20, 33, 7)], ids=["one", "padded"])
def test_eager_attention_equals_dynamic_cache_under_eager(cache: str, lengths: tuple[int, ...]) -> None:
    model = build_model("llama", attention="eager")
    wanted = generate(model, DynamicCache(config=model.config), random_rows(lengths), 30)
    output = generate(model, ROOMY_CACHES[cache](model), random_rows(lengths), 30)
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=1e-4, rtol=0)


def test_the_models_give_varied_tokens() -> None:
    """Equality of tokens says little for a model that repeats one token."""
    for family in FAMILIES:
        sequences, _ = expected(family, (33,), 40)
        assert len(set(sequences[0, 33:].tolist())) >= 5, family
