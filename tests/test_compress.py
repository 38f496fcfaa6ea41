"""`cache.compress()`: a context read first and asked later, or read with its question, by the same cache."""

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_model, left_pad, random_rows, random_tokens, tiny_model
from modes import held_positions

from pyramid_cache import AdaKVCache, H2OCache, SnapKVCache, StreamingLLMCache
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
@pytest.mark.parametrize("cache_class", [H2OCache, StreamingLLMCache])
def test_a_row_whose_budget_has_grown_keeps_all_it_holds(cache_class: type[CompressedCache]) -> None:
    """A budget of 0.4 grows at other steps in other rows. With a slot for each token, no row makes room in another."""
    model, rows = tiny_model("llama"), random_rows((20, 23, 41), seed=4)

    def run(prompts: list[torch.Tensor], tokens: torch.Tensor) -> list[list[list[list[int]]]]:
        """Held positions by step, row and head."""
        cache, held = cache_class(model.config, 0.4, eviction_interval=1), []
        ids, mask = left_pad(prompts)
        for step in range(13):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            if step in (2, 4, 7):
                cache.compress()
            held.append(held_positions(cache, 1))
            ids = tokens[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return held

    tokens = random_tokens(3, 13, seed=5)
    together = run(rows, tokens)
    for index, row in enumerate(rows):
        alone = run([row], tokens[index : index + 1])
        assert [held[index] for held in together] == [held[0] for held in alone]


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
