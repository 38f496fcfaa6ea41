"""Policies whose layers share a budget: which layer keeps how much, and that nothing else changes."""

from dataclasses import dataclass

import pytest
import torch
from models import left_pad, random_rows, random_tokens, tiny_model
from test_masked_dense import compare_with_masked_dense
from transformers import DynamicCache

from pyramid_cache import Policy, PolicyCache
from pyramid_cache.engine.policy import ScoringView


@dataclass(frozen=True)
class LargestValues(Policy):
    """The values of later layers are multiplied by `slope` for each layer, so that these layers keep more."""

    slope: float = 1.5
    layers_share_budget: bool = True

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.value.norm(dim=-1) * self.slope**view.layer_idx


def test_a_layer_keeps_as_many_as_are_among_the_best_of_all() -> None:
    """Against a ranking written as a loop: a token of each layer is its own, the others go to the best."""
    model, rows = tiny_model("llama"), random_rows((23, 40), seed=3)
    dense, cache = DynamicCache(config=model.config), PolicyCache(model.config, 16, LargestValues())
    input_ids, attention_mask = left_pad(rows)
    for each in (dense, cache):
        with torch.no_grad():
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=each)
    num_layers, kv_heads = len(dense.layers), dense.layers[0].values.shape[1]
    kept = []
    for row, tokens in enumerate(rows):
        scores = []
        for index, layer in enumerate(dense.layers):
            norms = layer.values[row, :, -len(tokens) :].norm(dim=-1) * 1.5**index
            scores += [(norm, index) for norm in norms.flatten().tolist()]
        best = [index for _, index in sorted(scores, reverse=True)[: num_layers * 15 * kv_heads]]
        kept.append([best.count(index) // kv_heads + 1 for index in range(num_layers)])
    assert [layer.num_held_per_row for layer in cache.layers] == [list(numbers) for numbers in zip(*kept, strict=True)]
    assert all(sum(numbers) <= 16 * num_layers and len(set(numbers)) > 1 for numbers in kept)


def test_what_they_hold_is_attended_to_and_nothing_else() -> None:
    model = tiny_model("llama")
    compare_with_masked_dense(model, PolicyCache(model.config, 12, LargestValues()), (23, 41, 32), [1] * 34)
    compare_with_masked_dense(model, PolicyCache(model.config, 12, LargestValues()), (41, 41), [1, 9, 1, 13, 1])


def test_a_budget_that_holds_everything_evicts_nothing() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 30)
    answers = [
        model.generate(tokens, past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=None)
        for cache in (DynamicCache(config=model.config), PolicyCache(model.config, 64, LargestValues()))
    ]
    assert torch.equal(*answers)


def test_later_turns_share_anew_and_steps_keep_to_their_layer() -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, LargestValues(), eviction_interval=4)
    for num_new in (40, 1, 1, 17, *[1] * 20):
        with torch.no_grad():
            model(random_tokens(1, num_new), past_key_values=cache)
        row_kept = [layer.state.row_kept[0] for layer in cache.layers]
        assert sum(row_kept) <= 12 * len(row_kept)
        assert all(held <= kept + 3 for held, kept in zip(cache.num_kept_tokens(), row_kept, strict=True))
    cache.compress()
    assert cache.num_kept_tokens() == row_kept


def test_tokens_are_not_taken_back() -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, LargestValues())
    with pytest.raises(NotImplementedError, match="layers_share_budget"):
        model.generate(random_tokens(1, 9), past_key_values=cache, prompt_lookup_num_tokens=2, max_new_tokens=3)
    assert cache.get_seq_length() == 0
