"""Ada-KV: which tokens stay when heads compete, that nothing else of them is stored, and that logits are right."""

from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, build_model, drive, random_rows, random_tokens, tiny_model
from reference import ScoredPolicy, SnapKVScore, attention_implementation, compare_with_policies
from test_masked_dense import compare_with_masked_dense
from test_memory import held_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedConfig

from pyramid_cache import AdaKVCache, Policy, PolicyCache
from pyramid_cache.engine.budget import Budget
from pyramid_cache.engine.policy import ScoringView
from pyramid_cache.engine.ragged_step import RaggedStep


SETTINGS = {"window_size": 8, "kernel_size": 3, "eviction_interval": 5}


@dataclass(frozen=True)
class LopsidedPolicy(Policy):
    """Even heads are worth less than odd ones, which hold many times their number of tokens then."""

    window_size: int = 8
    ranking = "layer"
    floor_ratio = 0.2

    def num_queries(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        """Other windows for rows of other lengths."""
        return min(prompt_length // 6, self.window_size)

    def score(self, view: ScoringView) -> torch.Tensor:
        worth = torch.ones(view.key.shape[1])
        worth[::2] = 0.1
        return (view.attention * worth[:, None]).masked_fill(view.is_recent(2), float("inf"))


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


# Steps of fixed shapes.


class NoReading(TorchDispatchMode):
    """Raises where the host would wait for a device to read a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return function(*args, **(kwargs or {}))


@pytest.fixture
def unread_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps may not read tensors."""
    for name in ("update", "attend"):
        method = getattr(RaggedStep, name)

        def run(*arguments, method=method):
            with NoReading():
                return method(*arguments)

        monkeypatch.setattr(RaggedStep, name, run)


def held_by_head(cache: PolicyCache, layer_idx: int = 0) -> list[list[list[int]]]:
    """For each row and head, the positions of the tokens that it holds."""
    positions = cache.positions(layer_idx).tolist()
    return [[sorted(position for position in head if position >= 0) for head in row] for row in positions]


@torch.no_grad()
@pytest.mark.parametrize("budget", [9, 0.3, 70])
def test_fixed_steps_are_other_steps(budget: float, unread_steps: None) -> None:
    """Of padded rows, in the same tensors all the time; with 70 tokens, before anything is evicted, too."""
    model, later = tiny_model("llama"), random_tokens(2, 120, seed=4)
    prompt = torch.cat([random_tokens(2, 60, seed=3), later], dim=1)
    mask = torch.ones_like(prompt)
    mask[0, :17] = 0
    caches = LopsidedCache(model.config, budget), LopsidedCache(model.config, budget)

    def read(start: int, stop: int) -> None:
        """Reads columns with both caches, which must agree."""
        logits = [
            model(
                prompt[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop],
                past_key_values=cache,
            ).logits
            for cache in caches
        ]
        torch.testing.assert_close(*(each[mask[:, start:stop] == 1] for each in logits), atol=1e-5, rtol=1e-5)

    read(0, 60)
    for num_steps in (4, 90):  # at first nothing is evicted from a prompt with a budget of 70
        caches[1].step()
        steps = list(caches[1]._graph.by_layer.values())
        addresses = [tensor.data_ptr() for step in steps for tensor in step.tensors().values()]
        assert {"keys", "keys packed", "starts packed"} <= steps[0].tensors().keys()
        start = caches[0].get_seq_length()
        for column in range(start, start + num_steps):
            read(column, column + 1)
            caches[1].step()
            assert held_by_head(caches[0]) == held_by_head(caches[1])
        assert steps == list(caches[1]._graph.by_layer.values()) != []
        assert addresses == [tensor.data_ptr() for step in steps for tensor in step.tensors().values()]
        caches[1].release()
        numbers = [each.compressed_layers[0].state.numbers() for each in caches]
        assert numbers[0] == numbers[1]
        for each in caches * 2:  # there and back
            each.reorder_cache(torch.tensor([1, 0]))
        start += num_steps
        read(start, start + 3)
        assert held_by_head(caches[0]) == held_by_head(caches[1])
    different_counts(caches[1])


# What cannot be.


@torch.no_grad()
def test_learned_sinks_are_refused() -> None:
    model = build_model("gpt_oss", attention="eager")
    with pytest.raises(NotImplementedError, match="learned attention sinks .* SnapKVCache"):
        model(random_tokens(1, 20), past_key_values=AdaKVCache(model.config, budget=9, **SETTINGS))
