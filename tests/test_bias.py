"""A bias per slot: in every way of attending, with merged tokens, and in files, beams and byte counts."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model, drive, left_pad, random_rows, random_tokens, tiny_model, uniform_attention_model
from reference import run_policy
from test_compile import compile_config, fresh_graphs, generate
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import (
    AdaKVCache,
    H2OCache,
    LayerDefensiveKVCache,
    PyramidCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.compaction import Compactor, Merging, most_similar
from pyramid_cache.engine.policy import LayerView
from pyramid_cache.engine.policy_cache import PolicyCache


SETTINGS = {"window_size": 8, "kernel_size": 3}


class RandomBias(Compactor):
    """Gives each token that stays a random bias, and remembers what it gave: -inf for tokens that go."""

    def compact(self, view: LayerView, is_kept: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(view.layer_idx)
        given = torch.randn(view.key.shape[:3], generator=generator) * 2
        self.given = given.masked_fill(~is_kept, float("-inf"))
        return {"bias": given}


class BiasedPolicy:
    """Queries behind the prompt see its tokens with a bias `(kv_heads, prompt)` in each layer; loops over rows."""

    def __init__(self, biases: list[torch.Tensor]) -> None:
        self.biases = biases

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        bias, output = self.biases[layer_idx], torch.empty(*query.shape[:2], value.shape[-1])
        group, num_prompt = query.shape[0] // key.shape[0], bias.shape[1]
        for head in range(query.shape[0]):
            for row in range(query.shape[1]):
                logits = key[head // group, : row + 1] @ query[head, row] * scaling
                if row >= num_prompt:
                    logits[:num_prompt] += bias[head // group]
                output[head, row] = logits.softmax(dim=-1) @ value[head // group, : row + 1]
        return output


@pytest.mark.parametrize("ranking", ["head", "layer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_logit_has_the_bias(ranking: str, attention: str) -> None:
    """Steps, and a turn of several tokens, in a batch with padding, over slots of equal and of unequal heads."""
    model, rows = build_model("llama", attention=attention), random_rows((29, 40), seed=4)
    policy = SnapKVPolicy(**SETTINGS)
    cache = PolicyCache(model.config, 12, policy, ranking=ranking, compactor=RandomBias)
    later = random_tokens(2, 9, seed=5)
    trace = drive(model, cache, rows, later, pieces=[1, 1, 1, 6])
    for index, row in enumerate(rows):
        biases = [layer.compactor.given[index, :, -len(row) :] for layer in first_given(model, rows, ranking)]
        wanted = run_policy(build_model("llama"), torch.cat([row, later[index]]), BiasedPolicy(biases))
        ends = len(row) + torch.tensor([0, 1, 2, 3, 9]) - 1
        torch.testing.assert_close(trace.logits[index], wanted[ends], atol=1e-4, rtol=0)


def first_given(model: torch.nn.Module, rows: list[torch.Tensor], ranking: str) -> list:
    """The layers of a cache that has read the prompts and nothing else."""
    cache = PolicyCache(model.config, 12, SnapKVPolicy(**SETTINGS), ranking=ranking, compactor=RandomBias)
    drive(model, cache, rows, 0)
    return cache.layers


MERGING = {
    "snapkv": lambda model: SnapKVCache(model.config, 12, merge=True, eviction_interval=4, **SETTINGS),
    "adakv": lambda model: AdaKVCache(model.config, 12, merge=True, eviction_interval=4, **SETTINGS),
    "h2o": lambda model: H2OCache(model.config, 12, merge=True, eviction_interval=3),
    "tova": lambda model: TOVACache(model.config, 12, merge=True, eviction_interval=4),
    "layer-defensive": lambda model: LayerDefensiveKVCache(model.config, 12, merge=True, window_size=4),
}


@pytest.mark.parametrize("name", MERGING)
def test_merged_tokens_keep_their_mass(name: str) -> None:
    """
    Where all logits are equal, a slot with the mean of the values and the logarithm of their number is as good as the
    tokens themselves: nothing is lost, however few slots there are, in steps, turns, rows and copies of rows.
    """
    model, rows = uniform_attention_model(), random_rows((33, 40), seed=1)
    later, pieces = random_tokens(2, 31, seed=2), [1] * 11 + [9] + [1] * 5 + [6]
    wanted = drive(model, SnapKVCache(model.config, 1.0), rows, later, pieces=pieces)
    cache = MERGING[name](model)
    found = drive(model, cache, rows, later, pieces=pieces)
    assert sum(cache.num_kept_tokens()) < 0.8 * len(cache.layers) * 71
    torch.testing.assert_close(found.logits, wanted.logits, atol=2e-5, rtol=0)
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    prompt = left_pad(rows)[0][1:]
    beams = [model.generate(prompt, past_key_values=each, **settings) for each in (MERGING[name](model), None)]
    assert torch.equal(*beams)


def test_without_merging_mass_is_lost() -> None:
    """Otherwise the test above would notice nothing."""
    model, rows, later = uniform_attention_model(), random_rows((33, 40), seed=1), random_tokens(2, 8, seed=2)
    wanted = drive(model, SnapKVCache(model.config, 1.0), rows, later).logits[:, 1:]
    found = drive(model, SnapKVCache(model.config, 12, **SETTINGS), rows, later).logits[:, 1:]
    assert (found - wanted).abs().amax() > 0.01


def test_what_is_merged_into_what() -> None:
    """By hand: two heads, six tokens, of which three stay; one of these is protected, and takes none."""
    cache = SnapKVCache(tiny_model("llama").config, 3, merge=True, protect=1)
    angles = torch.tensor([[0.0, 0.1, 1.0, 1.2, 2.0, 2.1], [0.0, 2.1, 1.0, 0.2, 2.0, 1.4]])
    key = torch.stack([angles.cos(), angles.sin()], dim=-1)[None] * torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    value = torch.arange(12.0).view(1, 2, 6, 1)
    is_kept = torch.tensor([[True, False, True, False, True, False]]).expand(1, 2, -1)
    best = most_similar(key, ~is_kept, is_kept & (torch.arange(6) > 0))
    assert best.tolist() == [[[0, 2, 2, 2, 4, 4], [0, 4, 2, 2, 4, 2]]]
    layer = cache.layers[0]
    layer.lazy_initialization(key, value)
    layer.state.next_position.fill_(6)
    view = LayerView(**layer._view(key, value, torch.arange(6, dtype=torch.int32)[None, None], 6))
    found = Merging().compact(view, is_kept, torch.tensor([0, 0, math.log(2), 0, 0, 0]).expand(1, 2, -1))
    assert found["bias"][0, :, [0, 2, 4]].exp().round().tolist() == [[1, 4, 2], [1, 4, 2]]
    torch.testing.assert_close(found["values"][0, 0, [0, 2, 4], 0], torch.tensor([0, (1 + 2 * 2 + 3) / 4, 4.5]))
    torch.testing.assert_close(found["values"][0, 1, [0, 2, 4], 0], torch.tensor([6, (2 * 8 + 9 + 11) / 4, 8.5]))
    torch.testing.assert_close(found["keys"][0, 0, 2], (key[0, 0, 1] + 2 * key[0, 0, 2] + key[0, 0, 3]) / 4)
    torch.testing.assert_close(found["keys"][0, 0, 0], key[0, 0, 0])


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_the_bias_is_saved_counted_and_copied(name: str, tmp_path: Path) -> None:
    model, prompt, later = tiny_model("llama"), random_tokens(1, 40, seed=3), random_tokens(1, 7, seed=4)
    cache = MERGING[name](model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = type(cache).load(tmp_path / "cache.safetensors", model.config)
        twin = copy.deepcopy(cache)
        logits = [model(later, past_key_values=each).logits for each in (cache, loaded, twin)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    with torch.no_grad():
        plain = type(cache)(model.config, 12, eviction_interval=4, **SETTINGS)
        model(prompt, past_key_values=plain)
        fresh = MERGING[name](model)
        model(prompt, past_key_values=fresh)
    num_slots = sum((fresh.positions(index) >= 0).sum().item() for index in range(len(fresh.layers)))
    assert fresh.nbytes - plain.nbytes == 4 * num_slots


@pytest.mark.parametrize("lengths", [(9, 5), (40, 23)])
@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_compiled_steps_have_the_bias(name: str, lengths: tuple[int, int]) -> None:
    """Also where the first merging comes in the midst of a graph, which knows no other tensors than it began with."""
    model, prompt = build_model("llama", num_hidden_layers=2), left_pad(random_rows(lengths, seed=5))[0]
    with fresh_graphs():
        caches = [MERGING[name](model) for _ in range(2)]
        compiled = generate(model, caches[0], prompt, max_new_tokens=50, compile_config=compile_config())
        plain = generate(model, caches[1], prompt, max_new_tokens=50, disable_compile=True)
    assert torch.equal(compiled, plain)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        one.store.unpack(), other.store.unpack()
        states = [layer.store.in_order()["bias"] for layer in (one, other)]
        torch.testing.assert_close(*states, atol=1e-5, rtol=0)
        assert states[0].amax() > 1


def test_what_cannot_be_merged_is_refused() -> None:
    config = tiny_model("llama").config
    with pytest.raises(ValueError, match=r"`merge=True` gives a slot the mean of several keys, which \w+ cannot move"):
        StreamingLLMCache(config, 16, merge=True)
    with pytest.raises(ValueError, match=r"`eviction_interval=1`: tokens are merged when .*Give 2 or more"):
        SnapKVCache(config, 16, merge=True, eviction_interval=1)
    assert PyramidCache(config, budget=16, merge=True).layers[0].compactor is not None


def gradients(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    """Of a logit behind a prompt, by the embeddings of the prompt."""
    embeds = model.get_input_embeddings()(random_tokens(1, 40)).detach().requires_grad_()
    model(inputs_embeds=embeds, past_key_values=cache)
    model(random_tokens(1, 1), past_key_values=cache).logits[0, -1, 5].backward()
    return embeds.grad


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_gradients_pass_through_merged_tokens(name: str) -> None:
    """Those of the full cache, where nothing is lost."""
    model = uniform_attention_model()
    wanted = gradients(model, DynamicCache(config=model.config))
    torch.testing.assert_close(gradients(model, MERGING[name](model)), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bytes_pay_for_the_bias_of_each_head() -> None:
    """Also where heads share their tokens and have one position for each."""
    model = build_model("llama", num_attention_heads=16, num_key_value_heads=16, head_dim=8, hidden_size=128)
    cache, most = TOVACache(model.config, "256KiB", merge=True, eviction_interval=4), 0
    model(random_tokens(1, 400), past_key_values=cache)
    for step in range(12):
        model(random_tokens(1, 1, seed=step), past_key_values=cache)
        most = max(most, cache.nbytes)
    assert 0.95 * 2**18 < most <= 2**18


@torch.no_grad()
def test_a_file_with_another_bias_is_refused(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "cache.safetensors"
    cache = SnapKVCache(model.config, 12, merge=True, **SETTINGS)
    model(random_tokens(1, 40), past_key_values=cache)
    whole = cache.layers[0].state.bias
    for bias in (whole.double(), whole[:, :1].contiguous(), whole[..., None].contiguous()):
        cache.layers[0].state.bias = bias
        cache.save(path)
        with pytest.raises(ValueError, match="`bias`"):
            SnapKVCache.load(path, model.config)
