"""`cache.compress()`: a context read first and asked later, or read with its question, by the same cache."""

import copy

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import build_model, random_tokens, tiny_model
from transformers import PreTrainedModel

from pyramid_cache import AdaKVCache, SnapKVCache
from pyramid_cache.engine.cache import CompressedCache


def held_sets(cache: CompressedCache) -> list[list[list[list[int]]]]:
    """For each layer, row and head, the positions held, in order."""
    return [
        [[sorted(token for token in head.tolist() if token >= 0) for head in row] for row in cache.positions(index)]
        for index in range(len(cache.layers))
    ]


def nbytes_of_a_prompt(model: PreTrainedModel, cache: CompressedCache) -> int:
    """The bytes of a cache that has read 40 tokens in each of two rows, and generated none."""
    model(random_tokens(2, 40), past_key_values=cache)
    return cache.nbytes


@torch.no_grad()
@every_cache
def test_after_a_prompt_there_is_nothing_left_to_do(case: CacheCase) -> None:
    model = tiny_model("llama")
    cache = case.build(model)
    model(random_tokens(2, 40), past_key_values=cache)
    held, num_bytes = held_sets(cache), cache.nbytes
    cache.compress()
    assert (held_sets(cache), cache.nbytes) == (held, num_bytes)


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [SnapKVCache, AdaKVCache])
def test_generated_tokens_are_evicted_down_to_the_budget(cache_class: type[SnapKVCache] | type[AdaKVCache]) -> None:
    model = tiny_model("llama")
    settings = {"budget": 12, "window_size": 8, "kernel_size": 1, "eviction_interval": 16}
    cache = cache_class(model.config, **settings)
    model(random_tokens(2, 40), past_key_values=cache)
    for token in random_tokens(10, 2):
        model(token[:, None], past_key_values=cache)
    assert cache.num_kept_tokens() == [22] * 3
    before = held_sets(cache)
    cache.compress()
    assert cache.num_kept_tokens() == [12] * 3
    # No slot is left that holds nothing.
    assert cache.nbytes == nbytes_of_a_prompt(model, cache_class(model.config, **settings))
    for layer, after in zip(before, held_sets(cache), strict=True):
        for rows, kept_rows in zip(layer, after, strict=True):
            for tokens, kept in zip(rows, kept_rows, strict=True):
                # Half of the budget is the latest tokens; the others are of those that were held.
                assert set(kept) < set(tokens) and kept[-6:] == list(range(44, 50))


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [SnapKVCache, AdaKVCache])
def test_slots_are_let_go_of_where_nothing_waits(cache_class: type[SnapKVCache] | type[AdaKVCache]) -> None:
    """The last token was the one at which as many as may wait have gone."""
    model = tiny_model("llama")
    settings = {"budget": 12, "window_size": 8, "kernel_size": 1, "eviction_interval": 16}
    cache = cache_class(model.config, **settings)
    model(random_tokens(2, 40), past_key_values=cache)
    for token in random_tokens(16, 2):
        model(token[:, None], past_key_values=cache)
    assert cache.num_kept_tokens() == [12] * 3
    held = held_sets(cache)
    cache.compress()
    assert held_sets(cache) == held
    assert cache.nbytes == nbytes_of_a_prompt(model, cache_class(model.config, **settings))
    model(random_tokens(2, 1), past_key_values=cache)
    assert cache.num_kept_tokens() == [13] * 3


@torch.no_grad()
def test_compressed_between_two_intervals_is_as_if_it_had_been_the_interval() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 48)
    caches = [SnapKVCache(model.config, 12, window_size=8, eviction_interval=interval) for interval in (8, 30)]
    for cache in caches:
        model(tokens[:, :40], past_key_values=cache)
        for column in range(40, 48):
            model(tokens[:, column : column + 1], past_key_values=cache)
    assert caches[0].num_kept_tokens() == [12] * 3 and caches[1].num_kept_tokens() == [20] * 3
    caches[1].compress()
    assert held_sets(caches[0]) == held_sets(caches[1])
    following = random_tokens(1, 1)
    logits = [model(following, past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@torch.no_grad()
@every_cache
def test_any_number_of_questions_on_copies(case: CacheCase) -> None:
    """The context is read once; each copy answers as a cache that read it for its question alone."""
    model = tiny_model("llama")
    context = random_tokens(1, 40)
    cache = case.build(model)
    model(context, past_key_values=cache)
    cache.compress()
    held = held_sets(cache)
    for seed in range(3):
        prompt = torch.cat([context, random_tokens(1, 5, seed=seed)], dim=1)
        alone = case.build(model)
        model(context, past_key_values=alone)
        answers = [
            model.generate(prompt, past_key_values=used, max_new_tokens=8, do_sample=False, eos_token_id=None)
            for used in (copy.deepcopy(cache), alone)
        ]
        assert torch.equal(*answers)
    assert held_sets(cache) == held


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CACHE_CASES if not case.from_model][:2], ids=lambda case: case.name)
def test_recorded_tokens_are_settled(case: CacheCase) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 40)
    cache, plain = case.build(model), case.build(model)
    cache.activate_past_recording()
    model(tokens, past_key_values=cache)
    assert cache.num_kept_tokens() == [40] * 3
    cache.compress()
    model(tokens, past_key_values=plain)
    assert cache.num_kept_tokens() == plain.num_kept_tokens() and held_sets(cache) == held_sets(plain)


@torch.no_grad()
def test_layers_of_other_kinds_are_left_alone() -> None:
    model = build_model("gemma3")
    cache = SnapKVCache(model.config, 12, window_size=8)
    model(random_tokens(1, 40), past_key_values=cache)
    for token in random_tokens(5, 1):
        model(token[None], past_key_values=cache)
    cache.compress()
    assert max(cache.num_kept_tokens()) == 12


def test_a_cache_whose_forward_broke_off() -> None:
    model = tiny_model("llama")
    cache = SnapKVCache(model.config, 12)
    states = torch.zeros(1, 2, 4, model.config.head_dim)
    cache.update(states, states, 0)
    with pytest.raises(RuntimeError, match="broke off"):
        cache.compress()


def test_an_empty_cache_has_nothing_to_compress() -> None:
    cache = SnapKVCache(tiny_model("llama").config, 12)
    cache.compress()
    assert cache.get_seq_length() == 0
