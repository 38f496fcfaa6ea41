"""Ada-KV: which tokens stay when heads compete, that nothing else of them is stored, and that logits are right."""

from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, build_model, drive, random_rows, random_tokens, tiny_model
from reference import ScoredPolicy, SnapKVScore, attention_implementation, compare_with_policies
from test_masked_dense import compare_with_masked_dense
from test_memory import held_bytes
from transformers import DynamicCache, PreTrainedConfig

from pyramid_cache import AdaKVCache, Policy, PolicyCache
from pyramid_cache.caches.adakv.ragged_store import RaggedStore
from pyramid_cache.engine.policy import ScoringView


SETTINGS = {"window_size": 8, "kernel_size": 3, "eviction_interval": 5}


@dataclass(frozen=True)
class LopsidedPolicy(Policy):
    """Even heads are worth less than odd ones, which hold many times their number of tokens then."""

    window_size: int = 8

    def score(self, view: ScoringView) -> torch.Tensor:
        worth = torch.ones(view.key.shape[1])
        worth[::2] = 0.1
        return (view.attention * worth[:, None]).masked_fill(view.is_recent(2), float("inf"))

    def build_store(self) -> RaggedStore:
        return RaggedStore(self.state_class, floor_ratio=0.2)


class LopsidedCache(PolicyCache):
    """A cache whose heads differ much, whatever the model."""

    def __init__(self, config: PreTrainedConfig, budget: float | int) -> None:
        super().__init__(config, budget, LopsidedPolicy(), eviction_interval=5)


def different_counts(cache: PolicyCache) -> torch.Tensor:
    """`(batch, kv_heads)`: how many tokens each head of the first layer holds, which must differ."""
    counts = (cache.positions(0) >= 0).sum(dim=-1)
    assert counts.shape[1] == 1 or (counts[:, 0] < 0.7 * counts[:, 1]).all(), "heads do not differ: nothing to test"
    return counts


# The choice.


@dataclass
class AdaKVPolicy(ScoredPolicy):
    """Heads compete for what all of them keep together, but for a share that each is sure of."""

    floor_ratio: float = 0.2

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        self.observe(position, given)
        number, num_spare = self.kept[self.layer], 0 if position < self.prompt_length else self.eviction_interval - 1
        if sum(len(tokens) for tokens in held) <= len(held) * (number + num_spare):
            return held
        worth = {}
        for head, tokens in enumerate(held):
            worth |= {(head, token): score for token, score in self.worth(position, head, tokens).items()}
        # The best few of each head, then the best of all.
        order, floor = sorted(worth, key=lambda place: -worth[place]), int(self.floor_ratio * number)
        kept = [place for head in range(len(held)) for place in [other for other in order if other[0] == head][:floor]]
        kept += [place for place in order if place not in kept][: len(held) * number - len(kept)]
        return [sorted(token for other, token in kept if other == head) for head in range(len(held))]


def test_heads_keep_what_they_attend_to_most_together() -> None:
    """Padded rows, with an answer during which some evict several times, against the reference alone."""
    model, rows, later = tiny_model("llama"), random_rows((50, 31), seed=3), random_tokens(2, 23, seed=4)
    for floor_ratio in ({}, {"floor_ratio": 0.0}, {"floor_ratio": 0.5}, {"floor_ratio": 1.0}):
        trace = drive(model, AdaKVCache(model.config, budget=0.3, **SETTINGS, **floor_ratio), rows, later)
        policies = [
            AdaKVPolicy(len(row), SnapKVScore(8, 3), [int(0.3 * len(row))] * 3, 5, **floor_ratio) for row in rows
        ]
        compare_with_policies(model, trace, rows, policies)


# The logits.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_equals_the_masked_run(family: str) -> None:
    """Padded rows, with later turns and steps between them."""
    model = tiny_model(family)
    cache = LopsidedCache(model.config, 0.3)
    compare_with_masked_dense(model, cache, (23, 41, 32), pieces=[1] * 12 + [7, 1, 1, 1, 12, 3, *[1] * 9])
    different_counts(cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_row_equals_the_masked_run(attention: str) -> None:
    model = tiny_model("llama")
    with attention_implementation(model, attention):
        cache = LopsidedCache(model.config, 9)
        compare_with_masked_dense(model, cache, (41,), pieces=[1, 1, 7, *[1] * 20])
        different_counts(cache)


# The memory.


@torch.no_grad()
def test_bytes_are_those_of_the_budget_although_heads_differ() -> None:
    model = build_model("llama", head_dim=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    tokens, full = random_tokens(2, 2048), DynamicCache(config=model.config)
    model(tokens, past_key_values=full, logits_to_keep=1)
    for budget in (0.5, 0.1):
        cache = LopsidedCache(model.config, budget)
        model(tokens, past_key_values=cache, logits_to_keep=1)
        counts = different_counts(cache)
        assert (counts.sum(dim=-1) == 2 * int(budget * 2048)).all()
        assert budget * 0.999 <= held_bytes(cache) / held_bytes(full) <= budget * 1.03
        assert cache.nbytes == held_bytes(cache)
        # With each head padded to the longest, keys and values alone would take more.
        padded = 2 * 2 * int(counts.max()) * 2 * 64 * 4
        assert sum(tensor.nbytes for tensor in cache.compressed_layers[0].store.packed.tensors.values()) < 0.8 * padded


# What cannot be.


@torch.no_grad()
def test_learned_sinks_are_refused() -> None:
    model = build_model("gpt_oss", attention="eager")
    with pytest.raises(NotImplementedError, match="learned attention sinks .* SnapKVCache"):
        model(random_tokens(1, 20), past_key_values=AdaKVCache(model.config, budget=9, **SETTINGS))
