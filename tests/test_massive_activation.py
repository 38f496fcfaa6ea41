"""Massive tokens and MassiveActivationCache, against loops and hand-computed numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from massive_models import MASSIVE_TOKEN, massive_model
from models import drive, left_pad, tiny_model
from reference import HeldTokens, ReferenceScore, ScoredPolicy, compare_with_policies
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pyramid_cache import MassiveActivationCache, PolicyCache
from pyramid_cache.caches.massive_activation.cache import MassiveActivationPolicy
from pyramid_cache.caches.massive_activation.detection import massive_in_keys_and_values
from pyramid_cache.engine.policy import ScoringView
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.profile.activations import measure_text
from pyramid_cache.lab.weights import fetch_default_model


# The detector.


def slow_massive(
    key: torch.Tensor, value: torch.Tensor, is_token: torch.Tensor, inv_freq: list[float]
) -> list[list[tuple[int, float, float]]]:
    """The detector on keys and values, one row at a time: (position, value ratio, cosine) of each of its tokens."""
    rows, half = [], len(inv_freq)
    for row in range(key.shape[0]):
        keys, values = (states[row, :, is_token[row]].double().numpy() for states in (key, value))
        norms = np.linalg.norm(values, axis=-1)  # (kv_heads, tokens)
        medians = np.sort(norms, axis=1)[:, [(norms.shape[1] - 1) // 2]]
        ratios = (norms / medians).mean(axis=0)
        turns = np.exp(-1j * np.outer(range(len(ratios)), inv_freq))
        turned = (keys[..., :half] + 1j * keys[..., half : 2 * half]) * turns
        keys = np.concatenate([turned.real, turned.imag, keys[..., 2 * half :]], axis=-1)
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        template = 0 if ratios[0] < 0.5 else ratios.argmin()
        cosines = (keys * keys[:, [template]]).sum(axis=-1).mean(axis=0)
        found = zip(range(len(ratios)), ratios.tolist(), cosines.tolist(), strict=True)
        found = [token for token in found if token[1] < 0.5 and token[2] > 0.9]
        rows.append(sorted(found, key=lambda token: token[1])[:8])
    return rows


@pytest.mark.parametrize("num_sinks, frequencies", [(0, [1.0, 0.3, 0.01]), (3, []), (11, [1.0, 0.3, 0.01])])
def test_massive_in_keys_and_values(num_sinks: int, frequencies: list[float]) -> None:
    """
    Planted: short values with equal keys (found) or other keys, and equal keys with long values. Where three are
    found, one is the first of the row: it leads, though the values of the others are shorter.
    """
    torch.manual_seed(num_sinks)
    batch_size, kv_heads, num_columns, head_dim = 3, 2, 47, 8
    key, value = torch.randn(2, batch_size, kv_heads, num_columns, head_dim).unbind()
    is_token = torch.ones(batch_size, num_columns, dtype=torch.bool)
    is_token[1, :9] = is_token[2, :5] = is_token[2, 20:23] = False
    positions = (is_token.cumsum(dim=1) - 1).masked_fill(~is_token, -1).int()[:, None]
    rotary = RotaryFrequencies(torch.tensor(frequencies)) if frequencies else None
    sinks = (12, 17, 24, 25, 30, 31, 33, 36, 38, 40, 46)[:num_sinks]
    for row in range(batch_size):
        direction = torch.randn(kv_heads, head_dim) * 3
        first = int(is_token[row].int().argmax())
        for rank, column in enumerate((*sinks[1:], first) if num_sinks == 3 else sinks):
            key[row, :, column] = direction + 0.1 * torch.randn(kv_heads, head_dim)
            value[row, :, column] *= 0.05 + 0.005 * rank
        key[row, :, 44] = direction
        value[row, :, 14] *= 0.2
    # Padding looks like the perfect sink.
    value[~is_token[:, None].expand(-1, kv_heads, -1)] = 1e-3
    if frequencies:
        key = rotary.rotate(key, rotary.model_angles(positions.clamp(min=0), num_columns))
    expected = slow_massive(key, value, is_token, frequencies)
    assert not num_sinks or [len(row) for row in expected] == [min(num_sinks, 8)] * 3
    found, _ = massive_in_keys_and_values(key, value, positions, rotary, num_columns)
    for numbers, tokens in zip(torch.stack([*found], dim=-1), expected, strict=True):
        wanted = [number for token in tokens for number in token]
        assert numbers[: len(tokens)].flatten().tolist() == pytest.approx(wanted, abs=1e-5)
        assert (numbers[len(tokens) :, 0] == -1).all()


# The cache.


@dataclass
class MassiveScore(ReferenceScore):
    """Massive and recent tokens stay. Others are worth their and the passage's attention times value norm."""

    massive: set[int]
    window_size: int = 64
    kernel_size: int = 5

    def scores(self, held: HeldTokens) -> list[float]:
        is_recent = held.is_recent(self.window_size)
        passages = held.passages(is_recent, self.kernel_size)
        scores = []
        for index, position in enumerate(held.positions):
            own = 0.0 if is_recent[index] else held.attention[index]
            worth = (own + sum(passages[index]) / self.kernel_size) * np.abs(held.values[index]).sum()
            scores.append(math.inf if is_recent[index] or position in self.massive else worth)
        return scores


def test_held_tokens_and_logits_are_those_of_the_reference() -> None:
    """An answer has a massive token at position 34; a padded row has none, and keeps its first tokens."""
    model = massive_model(magnitude=1e4)
    rows, later = [torch.randint(8, 101, (length,)) for length in (30, 23)], torch.randint(8, 101, (2, 25))
    rows[0][6] = later[0, 4] = MASSIVE_TOKEN
    cache = MassiveActivationCache(model.config, budget=12, window_size=4, kernel_size=3, eviction_interval=3)
    trace = drive(model, cache, rows, later)
    scores = MassiveScore({6, 34}, 4, 3), MassiveScore({0, 1, 2, 3}, 4, 3)
    policies = [ScoredPolicy(len(rows[row]), scores[row], [12] * 4, 3, trace, row) for row in range(2)]
    compare_with_policies(model, trace, rows, policies)
    reasons = [{token.position: token.reason for token in row} for row in cache.massive_tokens()[0]]
    assert reasons == [dict.fromkeys((6, 34), "keys and values"), dict.fromkeys(range(4), "first tokens")]


def held(cache: MassiveActivationCache, layer_idx: int, row: int) -> list[set[int]]:
    """The positions that each head of a layer holds of a row."""
    return [{*head} - {-1} for head in cache.positions(layer_idx)[row].tolist()]


@torch.no_grad()
def read(model: PreTrainedModel, cache: MassiveActivationCache, *prompts: tuple[int, set[int]]) -> None:
    """Left-padded random rows, each with its length and the positions of the massive token."""
    rows = [torch.randint(8, 101, (length,)) for length, _ in prompts]
    for row, (_, places) in zip(rows, prompts, strict=True):
        row[sorted(places)] = MASSIVE_TOKEN
    ids, mask = left_pad(rows)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)


@torch.no_grad()
def test_generated_tokens_are_looked_at() -> None:
    """The massive token is generated at position 50, and outlives 40 more in a budget of 14."""
    model, answer = massive_model(magnitude=1e4), torch.arange(9, 49).repeat(2, 1)
    answer[0, 0] = MASSIVE_TOKEN
    cache = MassiveActivationCache(model.config, budget=14, window_size=4, eviction_interval=5)
    read(model, cache, (50, {3}), (50, {4}))
    for token in answer.split(1, dim=1):
        model(token, past_key_values=cache)
    cache.compress()
    assert cache.num_kept_tokens() == [14] * 4
    for layer_idx, rows in cache.massive_tokens().items():
        told = [{token.position for token in row} for row in rows]
        assert told[0] >= {3, 50} and 50 not in told[1]
        for row, massive in enumerate(({3, 50}, {4})):
            assert all(head >= massive for head in held(cache, layer_idx, row))


def test_no_more_than_eight_and_they_win_over_recent_tokens() -> None:
    model, places = massive_model(magnitude=1e4), {3, 4, 10, 11, 12, 20, 21, 22, 30, 31, 32}
    cache = MassiveActivationCache(model.config, budget=8)
    read(model, cache, (60, places))
    for layer_idx, (tokens,) in cache.massive_tokens().items():
        told = {token.position for token in tokens}
        assert len(told) == 8 and told <= places
        assert held(cache, layer_idx, 0) == [told, told]


@torch.no_grad()
def test_a_loaded_cache_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    model, file = massive_model(magnitude=1e4), tmp_path / "cache.safetensors"
    cache = MassiveActivationCache(model, budget=0.65, window_size=2)
    read(model, cache, (300, {7}))
    cache.save(file)
    loaded, turn = MassiveActivationCache.load(file, model), torch.arange(MASSIVE_TOKEN, 50)[None]
    assert torch.equal(*(model(turn, past_key_values=each).logits for each in (cache, loaded)))
    assert loaded.num_kept_tokens() == cache.num_kept_tokens() and loaded.massive_tokens() == cache.massive_tokens()


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"kernel_size": 4}, "3 or 5"),
        ({"window_size": 0}, "window_size"),
        ({"budget": 0}, "keeps no token"),
    ):
        with pytest.raises(ValueError, match=message):
            MassiveActivationCache(tiny_model("llama").config, **arguments)


# The real model.


@dataclass(frozen=True)
class ForcingPolicy(MassiveActivationPolicy):
    """Evicts tokens that would stay: the massive ones, or as many of those neither massive nor recent at random."""

    forced_out: str = ""

    def score(self, view: ScoringView) -> torch.Tensor:
        priority, is_massive = super().score(view), self.is_massive(view)
        lowest = torch.finfo(torch.float32).min
        if self.forced_out != "others":
            return priority.masked_fill(is_massive, lowest) if self.forced_out else priority
        threshold = priority.topk(int(view.num_kept), dim=-1).values[..., -1:]
        is_other = (priority >= threshold) & (priority < -lowest)
        num_massive = int(is_massive[0, 0].sum())
        generator = torch.Generator().manual_seed(view.layer_idx)
        order = torch.rand(priority.shape, generator=generator).masked_fill(~is_other, -1).argsort(descending=True)
        return priority.scatter(-1, order[..., :num_massive], lowest)


@pytest.mark.slow
@torch.no_grad()
def test_a_real_model_fails_without_massive_tokens() -> None:
    """
    SmolLM2's first token is massive in the outputs of layers 11 to 27, and looks so to the layers above. Of 511 tokens
    each layer keeps 32 on average. Perplexity explodes where massive tokens are forced out, and where as many others
    are, nothing happens. docs/massive-activations.md has the numbers (`-s` prints them).
    """
    model = AutoModelForCausalLM.from_pretrained(fetch_default_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(fetch_default_model())
    ids = torch.tensor([tokenizer(read_text(), verbose=False)["input_ids"]])
    texts = [ids[:, start : start + 640] for start in range(2000, 82_000, 20_000)]
    for text in texts[:2]:
        findings = measure_text(model, tokenizer, text, 64)
        exact = [output.positions for output in findings.outputs]
        assert exact == [set()] * 11 + [{0}] * 17 + [set()] * 2
        assert {dimension for output in findings.outputs for _, dimension, _ in output.entries} <= {247, 507}
        assert [findings.layers[index].found for index in range(12, 30)] == [{0}] * 18

    perplexity = {}
    for forced_out in ("", "massive", "others"):
        losses = []
        for text in texts:
            cache = PolicyCache(model.config, 32, ForcingPolicy(forced_out=forced_out))
            model(text[:, :-129], past_key_values=cache, logits_to_keep=1)
            logits = model(text[:, -129:], past_key_values=cache).logits[0, :-1].log_softmax(dim=-1)
            losses.append(-logits.gather(1, text[0, -128:, None]).mean().item())
        perplexity[forced_out] = math.exp(sum(losses) / len(losses))
    print(perplexity)
    assert perplexity["others"] < 1.05 * perplexity[""]
    assert perplexity["massive"] > 3 * perplexity[""]
