"""
Modes of `generate`: each gives what it gives with `DynamicCache` while nothing is evicted, and is right when
something is.
"""

from functools import cache as remember
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import random_tokens, tiny_model
from modes import Mode, Run, held_positions, parametrize_modes
from test_compatibility import PAGE, columns_of, table_in
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import H2OCache, PolicyCache, ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.weights import fetch_default_model


@remember
def with_dynamic_cache(mode: Mode) -> Run:
    """What `DynamicCache` gives."""
    return mode.run(lambda model: DynamicCache(config=model.config))


@parametrize_modes(period=4)
def test_large_budget_is_dynamic_cache_bit_for_bit(mode: Mode, case: CacheCase) -> None:
    def make_cache(model: PreTrainedModel) -> Cache:
        return case.build(model, "large")

    refusals = {"drops hidden states between layers": mode.name == "`output_hidden_states`" and case.prunes_prefill}
    refusals["take tokens back"] = not case.records and ("assisted" in mode.name or mode.name == "prompt lookup")
    refusals["embeddings"] = case.reads_again and mode.name == "`inputs_embeds`"
    match = next((reason for reason, holds in refusals.items() if holds), None)
    if mode.never_fits or match is not None:
        with pytest.raises((NotImplementedError, ValueError), match=match):
            mode.run(make_cache)
        return
    wanted, run = with_dynamic_cache(mode), mode.run(make_cache)
    for found, expected in ((run.sequences, wanted.sequences), (run.numbers, wanted.numbers)):
        assert len(found) == len(expected) and run.sequences
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# Prompts that are read in chunks.


def budget_of(case: CacheCase, seen: int) -> int:
    """The tokens that the three layers together may hold when that many have been seen."""
    budget = (case.tight["budget"] if case.evicts else 12) if case.has_budget else seen
    return round(budget * seen * 3) if isinstance(budget, float) else 3 * min(budget, seen)


@every_cache
def test_chunks_never_make_a_cache_hold_more_than_budget_and_chunk(
    case: CacheCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[int] = []  # for each call of a layer's `update`, how many keys it made attention see
    update = CompressedLayer.update

    def spy(layer: CompressedLayer, *args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(layer, *args, **kwargs)
        attended.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(CompressedLayer, "update", spy)
    model = tiny_model("llama")
    for chunk in (5, 16):
        attended.clear()
        cache = case.build(model)
        # H2O allocates one slot more than it holds.
        spare = 3 if isinstance(cache, H2OCache) else 0
        with torch.no_grad():
            for index, piece in enumerate(random_tokens(1, 80).split(chunk, dim=1)):
                model(piece, past_key_values=cache)
                assert sum(cache.num_kept_tokens()) <= budget_of(case, (index + 1) * chunk)
                # Heads that hold different numbers are padded for several tokens.
                if case.evicts and not case.heads_compete:  # each chunk is attended to with all before it
                    assert sum(attended[-3:]) <= budget_of(case, index * chunk) + spare + 3 * chunk


@pytest.mark.slow
def test_chunks_of_text_come_close_to_the_whole() -> None:
    """Figures of docs/compatibility.md: SmolLM2-135M-Instruct, a budget of two fifths of the prompt."""
    loaded = load_model(fetch_default_model(), "default", torch.device("cpu"))
    tokens = loaded.tokenizer(read_text()[20_000:32_000], return_tensors="pt").input_ids
    cases = {f"`{case.name}`": case for case in CACHE_CASES}
    figures = [*zip(*columns_of(table_in(PAGE.read_text(), "cache")).values(), strict=True)]
    assert {row[0] for row in figures} == set(cases)
    for name, least_cosine, least_share in figures:
        case = cases[name]
        if case.tier == "slow" and issubclass(case.cache_class, PolicyCache):
            continue  # it differs from a cache of the quick tier in its scores alone
        cosine, share = closeness(loaded.model, tokens, case, num_tokens=1024, chunk=128)
        assert cosine >= float(least_cosine) and share >= float(least_share.strip("%")) / 100, (case, cosine, share)


@torch.no_grad()
def closeness(
    model: PreTrainedModel, tokens: torch.Tensor, case: CacheCase, num_tokens: int, chunk: int
) -> tuple[float, float]:
    """Mean cosine of logits and share of the same positions, of a prompt in chunks and one that is read at once."""
    settings = {**case.large, "budget": 0.4}
    if case.cache_class is ShadowKVCache:
        settings = {"budget": 0.2, "num_outlier_chunks": 12}  # two fifths with the tail
    elif case.cache_class is StreamingLLMCache:
        settings["budget"] = round(0.4 * num_tokens)
    elif not case.has_budget:
        del settings["budget"]
    settings.pop("residual_length", None)  # its default
    answers, caches = [], []
    for size in (chunk, num_tokens):
        cache = case.make(model, settings)
        logits = [
            model(piece, past_key_values=cache, logits_to_keep=1).logits[0]
            for piece in tokens[:, :num_tokens].split(size, dim=1)
        ][-1:]
        held = [held_positions(cache, layer)[0] for layer in range(len(cache.layers))]
        logits += [
            model(token, past_key_values=cache).logits[0]
            for token in tokens[:, num_tokens : num_tokens + 32].split(1, dim=1)
        ]
        answers.append(torch.cat(logits))
        caches.append([set(head) for heads in held for head in heads])
    common = sum(len(cut & whole) for cut, whole in zip(*caches, strict=True))
    return float(torch.cosine_similarity(*answers).mean()), common / sum(len(whole) for whole in caches[1])
