"""A row in a left-padded batch gives what it gives alone: logits, and the positions held."""

import pytest
import torch
from caches import CacheCase, every_cache
from models import left_pad, random_rows, tiny_model
from modes import Run
from transformers import Cache

from pyramid_cache import H2OCache, SnapKVCache, StreamingLLMCache, TOVACache


LENGTHS = (43, 57, 50)


@pytest.mark.parametrize("cache_class", [H2OCache, SnapKVCache, StreamingLLMCache, TOVACache])
def test_some_rows_held_whole_beside_others(cache_class: type[Cache]) -> None:
    """Rows exceed the budget at different steps."""
    run = Run(tiny_model("llama"), lambda model: cache_class(model.config, budget=52))
    run.generate(run.new_cache(), random_rows(LENGTHS, seed=21), max_new_tokens=24)
    run.verify()


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
