"""A row in a left-padded batch gives what it gives alone: logits, and the positions held."""

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache, parametrize_cases
from models import drive, left_pad, random_rows, tiny_model
from modes import Run
from transformers import Cache

from pyramid_cache import ExpectedAttentionCache, H2OCache, PyramidCache, SnapKVCache, StreamingLLMCache, TOVACache


LENGTHS = (43, 57, 50)


@pytest.mark.parametrize("cache_class", [H2OCache, SnapKVCache, StreamingLLMCache, TOVACache])
def test_some_rows_held_whole_beside_others(cache_class: type[Cache]) -> None:
    """Rows exceed the budget at different steps."""
    run = Run(tiny_model("llama"), lambda model: cache_class(model.config, budget=52))
    run.generate(run.new_cache(), random_rows(LENGTHS, seed=21), max_new_tokens=24)
    run.verify()


@pytest.mark.parametrize("cache_class", [PyramidCache, StreamingLLMCache, ExpectedAttentionCache])
def test_rows_of_which_all_tokens_must_stay(cache_class: type[Cache]) -> None:
    """They have empty slots beside longer rows, and lose their oldest token."""
    run = Run(tiny_model("llama"), lambda model: cache_class(model.config, budget=0.6, eviction_interval=1))
    run.generate(run.new_cache(), random_rows((2, 3, 40), seed=21), max_new_tokens=12)
    run.verify()


@parametrize_cases(case for case in CACHE_CASES if not case.has_own_reference and "streaming" not in case.short_name)
def test_a_budget_in_bytes_is_filled_and_kept(case: CacheCase) -> None:
    """With one token more in each layer of each row it would be exceeded."""
    model, budget = tiny_model("llama"), 60_000
    settings = {**case.tight, "budget": f"{budget}B"}
    cache = case.cache_class(model if case.from_model else model.config, **settings)
    # PyramidCache says that rows of different length, whose layers fall otherwise, may take some more.
    shortest = 60 if case.cache_class is PyramidCache else 55
    drive(model, cache, random_rows((60, 60, shortest)), 6 if case.is_bounded else 0)
    held, of_a_token = 0, 0.0
    for layer in cache.compressed_layers:
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in layer.state.tensors("slot").values())
        held, of_a_token = held + num_bytes, of_a_token + num_bytes / layer.keys.shape[2]
    assert held <= budget < held + of_a_token


@every_cache
def test_a_second_padded_turn(case: CacheCase) -> None:
    """
    The padding of the second turn lies between a row's tokens. The row of five tokens has lost nothing yet when it
    comes, the other ones have.
    """
    run = Run(tiny_model("llama"), case.build)
    cache = run.new_cache()
    said, mask = left_pad(random_rows((43, 5, 50), seed=26))
    said = run.generate(cache, input_ids=said, attention_mask=mask, max_new_tokens=2)
    more, more_mask = left_pad(random_rows((9, 4, 13), seed=27))
    mask = torch.cat([mask, mask.new_ones(3, said.shape[1] - mask.shape[1]), more_mask], dim=1)
    run.generate(cache, input_ids=torch.cat([said, more], dim=1), attention_mask=mask, max_new_tokens=8)
    run.verify()
