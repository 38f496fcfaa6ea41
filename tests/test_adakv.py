"""Ada-KV: which tokens stay when heads compete, that nothing else of them is stored, and that logits are right."""

from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, build_model, random_tokens, tiny_model
from reference import attention_implementation
from test_masked_dense import compare_with_masked_dense
from test_memory import held_bytes
from transformers import DynamicCache, PreTrainedConfig

from pyramid_cache import AdaKVCache, Policy, PolicyCache, SnapKVCache
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.policy import ScoringView
from pyramid_cache.engine.ragged import RaggedLayer, best_of_all_heads


SETTINGS = {"window_size": 8, "kernel_size": 3, "eviction_interval": 5}


def counts_of_heads(cache: PolicyCache, layer_idx: int) -> torch.Tensor:
    """`(batch, kv_heads)`: how many tokens each head holds."""
    return (cache.positions(layer_idx) >= 0).sum(dim=-1)


@dataclass(frozen=True)
class LopsidedPolicy(Policy):
    """Even heads are worth less than odd ones, which hold many times their number of tokens then."""

    window_size: int = 8

    def score(self, view: ScoringView) -> torch.Tensor:
        worth = torch.ones(view.key.shape[1])
        worth[::2] = 0.1
        return (view.attention * worth[:, None]).masked_fill(view.is_recent(2), float("inf"))


class LopsidedCache(PolicyCache):
    """A cache whose heads differ much, whatever the model."""

    layer_class = RaggedLayer

    def __init__(self, config: PreTrainedConfig, budget: float | int) -> None:
        super().__init__(config, budget, LopsidedPolicy(), eviction_interval=5)


def require_different_heads(cache: PolicyCache) -> None:
    counts = counts_of_heads(cache, 0)
    assert counts.shape[1] == 1 or (counts[:, 0] < 0.7 * counts[:, 1]).all(), "heads do not differ: nothing to test"


# The choice.


def test_best_of_all_heads_by_hand() -> None:
    inf = float("inf")
    priority = torch.tensor([[[9.0, 8.0, 7.0, 1.0, inf], [2.0, 3.0, 0.5, 0.1, inf]]])
    # Six of ten: both last tokens, 9, 8, 7, and then 3 of the other head.
    kept = best_of_all_heads(priority, [3], 0.0)
    assert kept.int().tolist() == [[[1, 1, 1, 0, 1], [0, 1, 0, 0, 1]]]
    # Three quarters of three are two that each head keeps; the same here, but with four tokens each it is three.
    assert best_of_all_heads(priority, [3], 0.75).int().tolist() == [[[1, 1, 1, 0, 1], [0, 1, 0, 0, 1]]]
    assert best_of_all_heads(priority, [4], 0.75).int().tolist() == [[[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]]
    # A floor of one gives each head the same.
    assert best_of_all_heads(priority, [2], 1.0).int().tolist() == [[[1, 0, 0, 0, 1], [0, 1, 0, 0, 1]]]


@pytest.mark.parametrize("floor_ratio", [0.0, 0.2, 0.5, 1.0])
def test_best_of_all_heads_against_a_loop(floor_ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        kv_heads, num_tokens = (int(torch.randint(1, most, (), generator=generator)) for most in (5, 30))
        kept = [int(torch.randint(1, num_tokens + 1, (), generator=generator)) for _ in range(2)]
        priority = torch.randn(2, kv_heads, num_tokens, generator=generator)
        priority[:, 0] += 2
        found = best_of_all_heads(priority, kept, floor_ratio)
        for row, number in enumerate(kept):
            chosen = set()
            for head in range(kv_heads):
                order = sorted(range(num_tokens), key=lambda token: -float(priority[row, head, token]))
                chosen |= {(head, token) for token in order[: int(floor_ratio * number + 1e-9)]}
            rest = [(head, token) for head in range(kv_heads) for token in range(num_tokens)]
            rest = sorted(set(rest) - chosen, key=lambda place: -float(priority[row][place]))
            chosen |= set(rest[: kv_heads * number - len(chosen)])
            assert {tuple(place) for place in found[row].nonzero().tolist()} == chosen


@torch.no_grad()
def test_the_prompt_keeps_what_heads_attend_to_most_together() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 50)
    cache = AdaKVCache(model.config, budget=14, **SETTINGS)
    model(tokens, past_key_values=cache)
    with attention_implementation(model, "eager"):
        attentions = model(tokens, output_attentions=True).attentions
    kv_heads = model.config.num_key_value_heads
    for layer_idx, probabilities in enumerate(attentions):
        worth = {}
        for head in range(kv_heads):
            of_head = probabilities[0].unflatten(0, (kv_heads, -1))[head, :, -8:].mean(dim=(0, 1))
            recent = range(50 - 7, 50)  # half of the budget, though the window has eight
            context = [0.0 if token in recent else float(of_head[token]) for token in range(50)]
            for token in range(50):
                around = [context[near] for near in (token - 1, token, token + 1) if 0 <= near < 50]
                worth[head, token] = float("inf") if token in recent else sum(around) / 3
        chosen = set()
        for head in range(kv_heads):
            best = sorted(range(50), key=lambda token, head=head: -worth[head, token])[:2]
            chosen |= {(head, token) for token in best}
        rest = sorted(set(worth) - chosen, key=lambda place: -worth[place])
        chosen |= set(rest[: kv_heads * 14 - len(chosen)])
        held = cache.positions(layer_idx)[0]
        found = {(head, token) for head in range(kv_heads) for token in held[head].tolist() if token >= 0}
        assert found == chosen


def test_a_floor_of_one_is_snapkv() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(2, 44)
    arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    caches = AdaKVCache(model.config, 12, floor_ratio=1.0, **SETTINGS), SnapKVCache(model.config, 12, **SETTINGS)
    answers = [model.generate(tokens, past_key_values=cache, **arguments) for cache in caches]
    assert torch.equal(*answers)
    for layer_idx in range(model.config.num_hidden_layers):
        assert torch.equal(*(cache.positions(layer_idx).sort(dim=-1).values for cache in caches))


# The logits.


@pytest.mark.parametrize("lengths", [(41,), (23, 41, 32)], ids=["one", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_equals_the_masked_run(family: str, lengths: tuple[int, ...]) -> None:
    model = tiny_model(family)
    cache = LopsidedCache(model.config, 0.3)
    compare_with_masked_dense(model, cache, lengths, pieces=[1] * 34)
    require_different_heads(cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turns_and_steps_between_them(attention: str) -> None:
    model = tiny_model("llama")
    with attention_implementation(model, attention):
        cache = LopsidedCache(model.config, 9)
        compare_with_masked_dense(model, cache, (23, 41, 32), pieces=[1, 1, 7, 1, 1, 1, 12, 3, *[1] * 9])
        require_different_heads(cache)


# The memory.


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_bytes_are_those_of_the_budget_although_heads_differ(budget: float) -> None:
    model = build_model("llama", head_dim=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    tokens = random_tokens(2, 2048)
    full, cache = DynamicCache(config=model.config), LopsidedCache(model.config, budget)
    for filled in (full, cache):
        model(tokens, past_key_values=filled, logits_to_keep=1)
    require_different_heads(cache)
    counts = counts_of_heads(cache, 0)
    assert (counts.sum(dim=-1) == 2 * int(budget * 2048)).all()
    share = held_bytes(cache) / held_bytes(full)
    assert budget * 0.999 <= share <= budget * 1.03
    assert cache.nbytes == held_bytes(cache)
    # With each head padded to the longest, keys and values alone would take more.
    padded = 2 * 2 * int(counts.max()) * 2 * 64 * 4
    assert sum(tensor.nbytes for tensor in cache.compressed_layers[0].packed.tensors.values()) < 0.8 * padded


@torch.no_grad()
def test_a_long_answer_takes_no_more() -> None:
    model = tiny_model("llama")
    cache = AdaKVCache(model.config, budget=12, **SETTINGS)
    model(random_tokens(1, 40), past_key_values=cache)
    most = 0
    for token in random_tokens(80, 1):
        model(token[None], past_key_values=cache)
        assert max(cache.num_kept_tokens()) < 12 + 5
        most = max(most, max(counts_of_heads(cache, 0).flatten().tolist()))
    assert most <= 2 * 12 + 5
    cache.compress()
    assert cache.num_kept_tokens() == [12] * model.config.num_hidden_layers


# What cannot be.


def test_learned_sinks_are_refused() -> None:
    model = build_model("llama")
    cache = AdaKVCache(model.config, budget=9, **SETTINGS)
    layer = cache.compressed_layers[0]
    states = torch.zeros(1, 4, 1, 8)
    call = AttentionCall(
        lambda: None, model.model.layers[0].self_attn, states, states, states, None, {"s_aux": torch.zeros(4)}
    )
    with pytest.raises(NotImplementedError, match="learned attention sinks .* SnapKVCache"):
        layer._check_call(call)


@pytest.mark.parametrize("floor_ratio", [-0.1, 1.1, "0.2", None, True])
def test_a_floor_must_be_a_share(floor_ratio: object) -> None:
    with pytest.raises(ValueError, match=f"`floor_ratio={floor_ratio!r}` must be between 0"):
        AdaKVCache(tiny_model("llama").config, budget=9, floor_ratio=floor_ratio)
