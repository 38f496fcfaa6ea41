"""KVMerger: which tokens form sets, who is their pivot, what a merged slot holds, and that mass is kept."""

import math
from dataclasses import dataclass

import pytest
import torch
from models import build_model, drive, random_rows, random_tokens, tiny_model, uniform_attention_model
from test_compile import compile_config, fresh_graphs, generate
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import KVMergerCache, SnapKVCache


@dataclass
class SlowHead:
    """One head of a prompt: keys, values and attention `(tokens, ...)`; loops from the paper alone."""

    key: torch.Tensor
    value: torch.Tensor
    attention: list[float]

    def slots(self, budget: int, threshold: float, num_heavy: int, num_recent: int) -> dict[int, tuple]:
        """By position of the pivot: key, value, and how many tokens the slot stands for."""
        length = len(self.attention)
        recent = set(range(length - num_recent, length))
        others = sorted((index for index in range(length) if index not in recent), key=lambda i: -self.attention[i])
        single = recent | set(others[:num_heavy])
        sets: list[list[int]] = []
        for index in range(length):
            joins = bool(sets) and index not in single and index - 1 not in single
            if joins and torch.cosine_similarity(self.key[index], self.key[index - 1], dim=0) >= threshold:
                sets[-1].append(index)
            else:
                sets.append([index])
        pivots = {max(members, key=lambda i: (self.attention[i], i)): members for members in sets}
        total = {pivot: sum(self.attention[i] for i in members) for pivot, members in pivots.items()}
        ranked = sorted(pivots, key=lambda pivot: (pivot in recent, total[pivot]), reverse=True)
        rest = [index for index in range(length) if index not in pivots]
        kept = (ranked + sorted(rest, key=lambda i: -self.attention[i]))[:budget]
        found = {}
        for pivot in kept:
            members = [i for i in pivots.get(pivot, [pivot]) if i == pivot or i not in kept]
            squares = [((self.key[i] - self.key[pivot]) ** 2).sum().item() for i in members]
            width = sum(squares) / len(members)
            weights = [math.exp(-square / (2 * width)) if width else 1.0 for square in squares]
            mean = [
                sum(weight * states[i] for weight, i in zip(weights, members, strict=True)) / sum(weights)
                for states in (self.key, self.value)
            ]
            found[pivot] = (*mean, len(members))
        return found


@torch.no_grad()
def slow_heads(model: PreTrainedModel, prompt: torch.Tensor) -> list[list[SlowHead]]:
    dense = DynamicCache(config=model.config)
    output = model(prompt[None], past_key_values=dense, output_attentions=True)
    heads = []
    for layer, probabilities in zip(dense.layers, output.attentions, strict=True):
        kv_heads = layer.keys.shape[1]
        sums = probabilities[0].unflatten(0, (kv_heads, -1)).sum(dim=(1, 2))
        heads.append([SlowHead(layer.keys[0, h], layer.values[0, h], sums[h].tolist()) for h in range(kv_heads)])
    return heads


@torch.no_grad()
@pytest.mark.parametrize("budget", [12, 20])
def test_slots_are_those_of_the_paper(budget: int) -> None:
    """With a budget for some of the sets, and with one for all of them and some of their members."""
    model, prompt = build_model("llama", attention="eager"), random_tokens(40, seed=11)
    cache = KVMergerCache(model.config, budget, threshold=0.1, heavy_ratio=0.2, recent_ratio=0.25)
    model(prompt[None], past_key_values=cache)
    num_merged = 0
    for layer, heads in zip(cache.layers, slow_heads(model, prompt), strict=True):
        held = layer.store.slots()
        for index, head in enumerate(heads):
            wanted = head.slots(budget, 0.1, int(0.2 * budget), budget // 4)
            assert sorted(held["positions"][0, index].tolist()) == sorted(wanted)
            for slot, position in enumerate(held["positions"][0, index].tolist()):
                key, value, count = wanted[position]
                torch.testing.assert_close(held["keys"][0, index, slot], key, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(held["values"][0, index, slot], value, atol=1e-4, rtol=1e-4)
                assert held["bias"][0, index, slot].exp().item() == pytest.approx(count, rel=1e-4)
                num_merged += count - 1
    assert num_merged > 20


def test_mass_is_kept_where_all_neighbours_are_alike() -> None:
    """With a threshold that all pass, nothing is lost of a model that attends to all tokens alike."""
    model, rows, later = uniform_attention_model(), random_rows((40, 33), seed=1), random_tokens(2, 2, seed=2)
    cache = KVMergerCache(model.config, 24, threshold=-1.0, heavy_ratio=0.0, recent_ratio=0.1)
    drive(model, cache, rows, later)
    for layer in cache.layers:
        assert layer.state.bias.exp().sum(dim=-1).amin() > 24


def test_protected_tokens_stay_as_they_are() -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, 40, seed=3)
    cache = KVMergerCache(model.config, 12, threshold=-1.0, heavy_ratio=0.0, recent_ratio=0.1, protect=6)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(prompt, past_key_values=dense)
    for layer, whole in zip(cache.layers, dense.layers, strict=True):
        places = layer.state.positions.argsort(dim=-1)[..., :6]
        found = layer.keys.gather(2, places[..., None].expand(-1, -1, -1, layer.keys.shape[-1]))
        torch.testing.assert_close(found, whole.keys[:, :, :6])


def test_bad_settings() -> None:
    config = tiny_model("llama").config
    for name, value in (("threshold", 1.5), ("heavy_ratio", 1.0), ("recent_ratio", -0.1)):
        with pytest.raises(ValueError, match=f"`{name}={value}` must be a number in"):
            KVMergerCache(config, **{name: value})
    with pytest.raises(ValueError, match="`eviction_interval=1`: tokens are merged"):
        KVMergerCache(config, eviction_interval=1)
    with pytest.raises(ValueError, match="KVMergerCache has a way of its own"):
        KVMergerCache(config, merge=True)
    assert SnapKVCache(config, merge=True).layers[0].compactor is not None


def test_compiled_steps_of_heads_that_compete() -> None:
    """The first eviction comes in the midst of a graph."""
    model, prompt = build_model("llama", num_hidden_layers=2), random_tokens(1, 9)
    with fresh_graphs():
        compiled, plain = (KVMergerCache(model.config, 12, ranking="layer", eviction_interval=4) for _ in range(2))
        found = generate(model, compiled, prompt, max_new_tokens=30, compile_config=compile_config())
        assert torch.equal(found, generate(model, plain, prompt, max_new_tokens=30, disable_compile=True))
