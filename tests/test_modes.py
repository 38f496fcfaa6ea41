"""
Modes of `generate`: each gives what it gives with `DynamicCache` while nothing is evicted, and is right when
something is.
"""

from functools import cache as remember
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import drive, random_tokens, tiny_model
from modes import Mode, Run, every_cell, held_positions, prompts, repeating_prompt
from test_compatibility import PAGE, columns_of, table_in
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import H2OCache, ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.weights import fetch_default_model


@remember
def with_dynamic_cache(mode: Mode) -> Run:
    """What `DynamicCache` gives."""
    return mode.run(lambda model: DynamicCache(config=model.config))


@every_cell
def test_large_budget_is_dynamic_cache_bit_for_bit(mode: Mode, case: CacheCase) -> None:
    def make_cache(model: PreTrainedModel) -> Cache:
        return case.build(model, "large")

    is_refused = mode.name == "`output_hidden_states`" and case.prunes_prefill
    if mode.never_fits or is_refused:
        match = "drops hidden states between layers" if is_refused else None
        with pytest.raises((NotImplementedError, ValueError), match=match):
            mode.run(make_cache)
        return
    wanted, run = with_dynamic_cache(mode), mode.run(make_cache)
    for found, expected in ((run.sequences, wanted.sequences), (run.numbers, wanted.numbers)):
        assert len(found) == len(expected) and run.sequences
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@every_cache
def test_beams_are_those_of_a_search_that_runs_every_hypothesis_from_the_start(case: CacheCase) -> None:
    model, row = tiny_model("llama"), prompts(40)[0]
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(row[None], past_key_values=case.build(model), **settings)
    assert tokens[:, 40:].tolist() == slow_beam_search(model, case, row, num_beams=3, new_tokens=6)


def slow_beam_search(
    model: PreTrainedModel, case: CacheCase, row: torch.Tensor, num_beams: int, new_tokens: int
) -> list[list[int]]:
    """The tokens of the best beams, best first; each hypothesis has a cache of its own, filled anew at every step."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(new_tokens):
        candidates = []
        for total, tokens in beams:
            fed = torch.tensor([tokens], dtype=torch.long)
            log_probabilities = drive(model, case.build(model), [row], fed).logits[0, -1].log_softmax(-1)
            for token in log_probabilities.topk(num_beams).indices.tolist():
                candidates.append((total + float(log_probabilities[token]), [*tokens, token]))
        beams = sorted(candidates, reverse=True)[:num_beams]
    return [tokens for _, tokens in beams]


# Prompts that are read in chunks.


def budget_of(case: CacheCase, seen: int) -> int:
    """The tokens that the three layers together may hold when that many have been seen."""
    budget = case.tight["budget"] if case.evicts else 12
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
                if case.evicts:  # each chunk is attended to with all before it
                    assert sum(attended[-3:]) <= budget_of(case, index * chunk) + spare + 3 * chunk


@pytest.mark.slow
def test_chunks_of_text_come_close_to_the_whole() -> None:
    """Figures of docs/compatibility.md: SmolLM2-135M-Instruct, a budget of two fifths of the prompt."""
    loaded = load_model(fetch_default_model(), "default", torch.device("cpu"))
    tokens = loaded.tokenizer(read_text()[20_000:32_000], return_tensors="pt").input_ids
    figures = zip(CACHE_CASES, *columns_of(table_in(PAGE.read_text(), "cache")).values(), strict=True)
    for case, _, least_cosine, least_share in figures:
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
    answers, caches = [], []
    for size in (chunk, num_tokens):
        cache = case.cache_class(model if case.from_model else model.config, **settings)
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


# Tokens that are taken back.


@every_cache
def test_assisted_decoding_keeps_the_budget_and_takes_its_first_tokens_for_a_prompt(
    case: CacheCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny_model("llama"), repeating_prompt()
    cache = case.build(model)
    crop = CompressedCache.crop
    after_crops: list[tuple[int, int, list[list[list[list[int]]]]]] = []

    def spy(cropped: CompressedCache, tokens_to_remove: int) -> None:
        crop(cropped, tokens_to_remove)
        held = [held_positions(cropped, layer) for layer in range(3)]
        after_crops.append((tokens_to_remove, cropped.get_seq_length(), held))

    monkeypatch.setattr(CompressedCache, "crop", spy)
    tokens = model.generate(
        prompt[None], past_key_values=cache, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3
    )
    assert any(removed < 0 for removed, _, _ in after_crops), "nothing was taken back"
    _, seen, held = after_crops[0]
    # Hidden states, which could not be taken back, are not pruned meanwhile.
    plain = case.build_from(model.config)
    with torch.no_grad():
        model(tokens[:, :seen], past_key_values=plain)
    assert held == [held_positions(plain, layer) for layer in range(3)]
    if case.is_bounded:
        for _, _, held in after_crops:
            assert case.is_full([sum(len(head) for head in layer[0]) // len(layer[0]) for layer in held])
            if cache.compressed_layers[0].heads_keep_equal_numbers:
                assert all(len(head) == len(layer[0][0]) for layer in held for head in layer[0])
