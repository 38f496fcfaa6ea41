"""Every mode of `generate` with every cache: as `DynamicCache` while nothing is evicted, and right when something is."""

from collections.abc import Iterator
from functools import cache as remember
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import drive, generate, left_pad, random_rows, random_tokens, tiny_model
from modes import CLOSENESS, MODES, Mode, Run, held_positions, mode_id, prompts, repeating_prompt, verdict
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import ShadowKVCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.weights import fetch_default_model


every_mode = pytest.mark.parametrize("mode", MODES, ids=mode_id)
CASES = {case.name: case for case in CACHE_CASES}


@remember
def with_dynamic_cache(mode: Mode) -> Run:
    """What `DynamicCache` gives."""
    return mode.run(lambda model: DynamicCache(config=model.config))


@every_cache
@every_mode
def test_large_budget_is_dynamic_cache_bit_for_bit(mode: Mode, case: CacheCase) -> None:
    if mode.never_fits:
        with pytest.raises((NotImplementedError, ValueError)):
            mode.run(lambda model: case.build(model, "large"))
        return
    if mode.name == "`output_hidden_states`" and case.prunes_prefill:
        with pytest.raises(NotImplementedError, match="drops hidden states between layers"):
            mode.run(lambda model: case.build(model, "large"))
        return
    wanted = with_dynamic_cache(mode)
    run = mode.run(lambda model: case.build(model, "large"))
    assert len(run.sequences) == len(wanted.sequences) > 0
    for actual, expected in zip(run.sequences, wanted.sequences, strict=True):
        assert torch.equal(actual, expected)
    assert len(run.numbers) == len(wanted.numbers) > 0
    for actual, expected in zip(run.numbers, wanted.numbers, strict=True):
        assert torch.equal(actual, expected)


@every_cache
@every_mode
def test_tight_budget_is_right_or_refused(mode: Mode, case: CacheCase) -> None:
    answer = verdict(mode, case)
    assert answer.startswith("refused: ") or (answer == "yes" and not mode.never_fits), answer


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


# Rows of very different lengths.


@every_cache
@pytest.mark.parametrize("longer", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_row_of_five_tokens_beside_a_long_one(case: CacheCase, longer: int) -> None:
    model, rows = tiny_model("llama"), random_rows((5, longer), seed=31)
    together_cache = case.build(model)
    together = generate(model, together_cache, rows, 20)
    for index, row in enumerate(rows):
        cache = case.build(model)
        alone = generate(model, cache, [row], 20)
        assert together.sequences[index, -20:].tolist() == alone.sequences[0, -20:].tolist()
        for layer in range(3):
            assert held_positions(together_cache, layer)[index] == held_positions(cache, layer)[0]
        for step in range(20):
            torch.testing.assert_close(together.logits[step][index], alone.logits[step][0], atol=2e-4, rtol=0)


# Prompts that are read in chunks.


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For each call of a layer's `update`, how many keys it made attention see."""
    lengths: list[int] = []
    update = CompressedLayer.update

    def spy(layer: CompressedLayer, *args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(layer, *args, **kwargs)
        lengths.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(CompressedLayer, "update", spy)
    yield lengths


def budget_of(case: CacheCase, seen: int) -> int:
    """The tokens that the three layers together may hold when that many have been seen."""
    budget = case.tight["budget"] if case.evicts else 12
    return round(budget * seen * 3) if isinstance(budget, float) else 3 * min(budget, seen)


@every_cache
@pytest.mark.parametrize("chunk", [5, 16])
def test_chunks_never_make_a_cache_hold_more_than_budget_and_chunk(
    case: CacheCase, chunk: int, attended: list[int]
) -> None:
    model = tiny_model("llama")
    cache = case.build(model)
    kept: list[tuple[int, int]] = []
    handle = model.register_forward_hook(
        lambda *ignored: kept.append((cache.get_seq_length(), sum(cache.num_kept_tokens())))
    )
    try:
        settings = {"max_new_tokens": 1, "prefill_chunk_size": chunk, "do_sample": False}
        model.generate(random_tokens(1, 80), past_key_values=cache, **settings)
    finally:
        handle.remove()
    assert [seen for seen, _ in kept] == list(range(chunk, 81, chunk))
    for seen, num_kept in kept:
        assert num_kept <= budget_of(case, seen)
    if not case.evicts:  # each chunk is attended to with all before it
        return
    # H2O allocates one slot more than it holds.
    spare = 3 if case.name.startswith("H2O") else 0
    for index, (seen, _) in enumerate(kept):
        assert sum(attended[3 * index : 3 * index + 3]) <= budget_of(case, seen - chunk) + spare + 3 * chunk


@pytest.mark.parametrize("lengths, chunk", [((60,), 1), *(((60, 41), size) for size in (3, 7, 12, 25, 59))], ids=str)
def test_a_stream_does_not_care_how_it_is_cut(lengths: tuple[int, ...], chunk: int) -> None:
    model, rows = tiny_model("llama"), random_rows(lengths, seed=32)
    cut, whole = (read_in_chunks(model, CASES["StreamingLLMCache(config)"], rows, size) for size in (chunk, 60))
    torch.testing.assert_close(cut[0], whole[0], atol=1e-4, rtol=0)
    for layer in range(3):
        assert held_positions(cut[1], layer) == held_positions(whole[1], layer)


@every_cache
def test_chunks_of_a_padded_batch_are_those_of_each_row_alone(case: CacheCase) -> None:
    """The rows begin in the same chunk, with different numbers of tokens in it."""
    run = Run(tiny_model("llama"), case.build)
    run.generate(run.new_cache(), random_rows((40, 35), seed=33), max_new_tokens=4, prefill_chunk_size=16)
    run.verify()


@pytest.mark.slow
@every_cache
def test_chunks_of_text_come_close_to_the_whole(case: CacheCase) -> None:
    """Figures of docs/compatibility.md: SmolLM2-135M-Instruct, a budget of two fifths of the prompt."""
    cosine, share = closeness(case, num_tokens=1024, chunk=128)
    least_cosine, least_share = CLOSENESS[case.name]
    assert cosine >= least_cosine and share >= least_share, (cosine, share)


@remember
def text_and_model() -> tuple[torch.Tensor, PreTrainedModel]:
    """Tokens of a novel `(1, tokens)` and the default model."""
    folder = fetch_default_model()
    loaded = load_model(folder, "default", torch.device("cpu"))
    text = read_text()[20_000:32_000]
    return loaded.tokenizer(text, return_tensors="pt").input_ids, loaded.model


@torch.no_grad()
def closeness(case: CacheCase, num_tokens: int, chunk: int) -> tuple[float, float]:
    """Mean cosine of logits and share of the same positions, of a prompt in chunks and one that is read at once."""
    tokens, model = text_and_model()
    settings = {"budget": 0.4}
    if case.cache_class is ShadowKVCache:
        settings = {"budget": 0.2, "num_outlier_chunks": 12}  # two fifths with the tail
    elif "budget" not in case.large:
        settings = {**case.tight, "budget": round(0.4 * num_tokens)}
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


def read_in_chunks(
    model: PreTrainedModel, case: CacheCase, rows: list[torch.Tensor], chunk: int
) -> tuple[torch.Tensor, Cache]:
    """The logits after prompts that are read in chunks, `(batch, vocabulary)`, and the cache."""
    cache = case.build(model)
    input_ids, attention_mask = left_pad(rows)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        prefill_chunk_size=chunk,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0], cache
