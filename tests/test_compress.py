"""`cache.compress()`: a context read first and asked later, or read with its question, by the same cache."""

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_model, random_tokens, tiny_model
from modes import held_positions

from pyramid_cache import AdaKVCache, SnapKVCache
from pyramid_cache.engine.cache import CompressedCache


def held_heads(cache: CompressedCache) -> list[list[int]]:
    """The positions that each head of each row and layer holds, in order."""
    return [head for layer in range(len(cache.layers)) for row in held_positions(cache, layer) for head in row]


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [SnapKVCache, AdaKVCache])
def test_generated_tokens_are_evicted_down_to_the_budget(cache_class: type[CompressedCache]) -> None:
    """With the 16th token as many as may wait have gone already; their slots have not."""
    model = tiny_model("llama")
    for num_generated in (10, 16):
        cache = cache_class(model.config, 12, window_size=8, kernel_size=1, eviction_interval=16)
        model(random_tokens(2, 40), past_key_values=cache)
        num_bytes = cache.nbytes
        for token in random_tokens(num_generated, 2):
            model(token[:, None], past_key_values=cache)
        assert cache.num_kept_tokens() == [12 + num_generated % 16] * 3
        before = held_heads(cache)
        cache.compress()
        assert cache.num_kept_tokens() == [12] * 3 and cache.nbytes == num_bytes
        for held, left in zip(before, held_heads(cache), strict=True):
            # Half of the budget is the latest tokens; the others are of those that were held.
            assert set(left) <= set(held) and (num_generated == 16 or left[-6:] == list(range(44, 50)))
    assert held_heads(cache) == before
    model(random_tokens(2, 1), past_key_values=cache)
    assert cache.num_kept_tokens() == [13] * 3


@torch.no_grad()
@every_cache
def test_after_a_prompt_there_is_nothing_left_to_do(case: CacheCase) -> None:
    model = tiny_model("llama")
    cache = case.build(model)
    model(random_tokens(1, 40), past_key_values=cache)
    before = held_heads(cache), cache.nbytes
    cache.compress()
    assert (held_heads(cache), cache.nbytes) == before


@torch.no_grad()
def test_layers_of_other_kinds_are_left_alone() -> None:
    model = build_model("gemma3")
    cache = SnapKVCache(model.config, 12, window_size=8)
    model(random_tokens(1, 40), past_key_values=cache)
    for token in random_tokens(5, 1):
        model(token[None], past_key_values=cache)
    cache.compress()
    assert max(cache.num_kept_tokens()) == 12


def test_a_cache_whose_forward_broke_off_and_an_empty_one() -> None:
    model = tiny_model("llama")
    cache = SnapKVCache(model.config, 12)
    states = torch.zeros(1, 2, 4, model.config.head_dim)
    cache.update(states, states, 0)
    with pytest.raises(RuntimeError, match="broke off"):
        cache.compress()
    empty = SnapKVCache(model.config, 12)
    empty.compress()
    assert empty.get_seq_length() == 0
