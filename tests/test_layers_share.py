"""Layers whose tokens compete for one budget: which layer and head keeps what, and that nothing else changes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models import left_pad, random_rows, random_tokens, tiny_model
from test_masked_dense import compare_with_masked_dense
from transformers import DynamicCache

from pyramid_cache import (
    H2OCache,
    Policy,
    PolicyCache,
    PyramidKVCache,
    ScissorhandsCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.caches.keydiff import KeyDiffPolicy
from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.policy import ScoringView


@dataclass(frozen=True)
class LargestValues(Policy):
    """The values of later layers are multiplied by `slope` for each layer, so that these layers keep more."""

    slope: float = 1.5
    ranking = "model"

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.value.norm(dim=-1) * self.slope**view.layer_idx


Scores = list[list[list[float]]]  # by layer, KV head and token


def scores_of(row: torch.Tensor, slope: float) -> Scores:
    model, dense = tiny_model("llama"), DynamicCache()
    with torch.no_grad():
        model(row[None], past_key_values=dense)
    return [(layer.values[0].norm(dim=-1) * slope**index).tolist() for index, layer in enumerate(dense.layers)]


def slow_shares(scores: Scores, budget: int) -> list[int]:
    """A token of each head is its own, and the others go to the best of all."""
    num_layers, kv_heads = len(scores), len(scores[0])
    every = [(score, index) for index, heads in enumerate(scores) for tokens in heads for score in tokens]
    best = [index for _, index in sorted(every, reverse=True)[: num_layers * (budget - 1) * kv_heads]]
    return [min(best.count(index) // kv_heads + 1, len(scores[0][0])) for index in range(num_layers)]


def slow_online_shares(scores: Scores, budget: int) -> list[int]:
    """Each layer in turn keeps what is among the best so far, by the share of later tokens that is left."""
    num_layers, kv_heads, num_tokens = len(scores), len(scores[0]), len(scores[0][0])
    left, shares, seen = num_layers * budget, [], []
    for index, heads in enumerate(scores):
        own = [score for tokens in heads for score in tokens]
        seen += own
        later = num_layers - index - 1
        wanted = left
        if later:
            threshold = sorted(seen, reverse=True)[int(len(seen) * left / ((later + 1) * num_tokens)) - 1]
            wanted = max(sum(score >= threshold for score in own) // kv_heads, 1)
        shares.append(min(wanted, left - later, num_tokens))
        left -= shares[-1]
    return shares


def slow_positions(scores: list[list[float]], share: int) -> list[list[int]]:
    """The best tokens of all heads of a layer, by head."""
    every = [(score, head, place) for head, tokens in enumerate(scores) for place, score in enumerate(tokens)]
    best = sorted(every, reverse=True)[: share * len(scores)]
    return [sorted(place for _, head, place in best if head == own) for own in range(len(scores))]


@pytest.mark.parametrize(("ranking", "slow"), [("model", slow_shares), ("model-online", slow_online_shares)])
def test_what_each_layer_and_head_keeps(ranking: str, slow: Callable[[Scores, int], list[int]]) -> None:
    """Against rankings written as loops, for rows of different length."""
    model, rows = tiny_model("llama"), random_rows((23, 40), seed=3)
    for slope in (1.5, 0.7):
        cache = PolicyCache(model.config, 16, LargestValues(slope), ranking=ranking)
        input_ids, attention_mask = left_pad(rows)
        with torch.no_grad():
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache)
        for row, tokens in enumerate(rows):
            scores = scores_of(tokens, slope)
            shares = slow(scores, 16)
            assert sum(shares) <= 16 * len(shares) and len(set(shares)) > 1
            for index, share in enumerate(shares):
                held = [[place for place in head if place >= 0] for head in cache.positions(index)[row].tolist()]
                assert [sorted(head) for head in held] == slow_positions(scores[index], share)
                assert cache.layers[index].num_held_per_row[row] == share


@pytest.mark.parametrize("ranking", ["layer", "model", "model-online"])
def test_what_they_hold_is_attended_to_and_nothing_else(ranking: str) -> None:
    model = tiny_model("llama")
    for policy in (LargestValues(), SnapKVPolicy(4, 3), KeyDiffPolicy()):
        for lengths, calls in (((23, 41, 32), [1] * 34), ((41, 41), [1, 9, 1, 13, 1])):
            compare_with_masked_dense(model, PolicyCache(model.config, 12, policy, ranking=ranking), lengths, calls)


@pytest.mark.parametrize("ranking", ["model", "model-online"])
def test_a_budget_that_holds_everything_evicts_nothing(ranking: str) -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 30)
    caches = DynamicCache(config=model.config), PolicyCache(model.config, 64, LargestValues(), ranking=ranking)
    answers = [
        model.generate(tokens, past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=None)
        for cache in caches
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("ranking", ["model", "model-online"])
def test_later_turns_share_anew_and_steps_keep_to_their_layer(ranking: str) -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, LargestValues(), eviction_interval=4, ranking=ranking)
    for num_new in (40, 1, 1, 17, *[1] * 20):
        with torch.no_grad():
            model(random_tokens(1, num_new), past_key_values=cache)
        row_kept = [layer.state.row_kept[0] for layer in cache.layers]
        assert sum(row_kept) <= 12 * len(row_kept) and len(set(row_kept)) > 1
        assert all(held <= kept + 3 for held, kept in zip(cache.num_kept_tokens(), row_kept, strict=True))
    cache.compress()
    assert cache.num_kept_tokens() == row_kept


def test_bytes_are_those_of_the_budget() -> None:
    """Of a prompt, within 3 %: what layers lose by rounding is a few tokens."""
    model, tokens = tiny_model("llama"), random_tokens(1, 800)
    held = {}
    for ranking in ("head", "layer", "model", "model-online"):
        cache = PolicyCache(model.config, 0.25, LargestValues(1.2), ranking=ranking)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        held[ranking] = cache.memory()["cpu"]["keys"]
    assert all(0.97 * held["head"] <= num_bytes <= held["head"] for num_bytes in held.values()), held


@pytest.mark.parametrize("ranking", ["model", "model-online"])
def test_tokens_are_not_taken_back(ranking: str) -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, LargestValues(), ranking=ranking)
    with pytest.raises(NotImplementedError, match='Use `ranking="layer"`'):
        model.generate(random_tokens(1, 9), past_key_values=cache, prompt_lookup_num_tokens=2, max_new_tokens=3)
    assert cache.get_seq_length() == 0


def test_rankings_that_cannot_be_are_refused() -> None:
    config = tiny_model("llama").config
    with pytest.raises(ValueError, match="`ranking='heads'` is unknown"):
        PolicyCache(config, 12, LargestValues(), ranking="heads")
    for cache in (TOVACache, StreamingLLMCache):
        with pytest.raises(ValueError, match="all heads keep the same tokens"):
            PolicyCache(config, 12, cache(config, 12).policy, ranking="layer")
    assert H2OCache(config, 12).policy.ranking == "head"


def test_a_copy_goes_on_as_the_cache_does() -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, LargestValues())
    with torch.no_grad():
        model(random_tokens(1, 40), past_key_values=cache)
        twin = copy.deepcopy(cache)
        for each in (cache, twin):
            model(random_tokens(1, 9, seed=5), past_key_values=each)
    assert all(torch.equal(cache.positions(index), twin.positions(index)) for index in range(len(cache.layers)))


@torch.no_grad()
def test_short_and_empty_rows_keep_their_own_budget_online() -> None:
    """A row that fits is not cut to its prompt, and one without tokens is none: rows as they are alone."""
    model, rows = tiny_model("llama"), random_rows((40, 8), seed=5)
    ids, mask = left_pad(rows)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for extra in ({}, {"prefill_chunk_size": 16}):
        cache, alone = (
            SnapKVCache(model.config, 16, window_size=4, ranking="model-online", eviction_interval=1) for _ in range(2)
        )
        model.generate(ids, attention_mask=mask, past_key_values=cache, **settings, **extra)
        model.generate(rows[1][None], past_key_values=alone, **settings)
        assert [layer.num_held_per_row[1] for layer in cache.layers] == [16] * len(cache.layers)
        for index in range(len(cache.layers)):
            found, wanted = cache.positions(index)[1], alone.positions(index)[0]
            assert all(
                set(one.tolist()) - {-1} == set(other.tolist()) for one, other in zip(found, wanted, strict=True)
            )


@torch.no_grad()
def test_layers_of_which_some_lose_nothing_share_online() -> None:
    """Early layers of a pyramid hold the whole prompt; what one prompt left is not there for the next."""
    model = tiny_model("llama")
    cache = PyramidKVCache(model.config, 0.9, window_size=4, ranking="model-online")
    for turn in range(2):
        model(random_tokens(1, 41, seed=turn), past_key_values=cache)
        assert sum(cache.num_kept_tokens()) <= 0.9 * 41 * (turn + 1) * len(cache.layers)
        assert not cache.shared.scores


@torch.no_grad()
def test_equal_scores_do_not_depend_on_padding() -> None:
    model, rows = tiny_model("llama"), random_rows((40, 23), seed=4)
    ids, mask = left_pad(rows)
    settings = {"window_size": 8, "num_recent": 3, "ranking": "model"}
    cache, alone = (ScissorhandsCache(model.config, 12, **settings) for _ in range(2))
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    model(rows[1][None], past_key_values=alone)
    assert [layer.state.row_kept[1] for layer in cache.layers] == [layer.state.row_kept[0] for layer in alone.layers]
