"""A row in a left-padded batch gives what it gives alone: tokens, logits, and the positions held."""

from collections.abc import Callable

import pytest
import torch
from models import FAMILIES, Trace, drive, generate, left_pad, random_rows, random_tokens, tiny_model
from transformers import Cache, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, SnapKVCache, StreamingLLMCache, TOVACache


MakeCache = Callable[[PreTrainedModel], Cache]

LENGTHS = (43, 57, 50)

CACHES: dict[str, MakeCache] = {
    "pyramid_config": lambda model: PyramidCache(model.config, budget=0.45),
    "pyramid_config_tokens": lambda model: PyramidCache(model.config, budget=25),
    "pyramid_model": lambda model: PyramidCache(model, budget=0.45),
    "h2o": lambda model: H2OCache(model.config, budget=0.3),
    "h2o_tokens": lambda model: H2OCache(model.config, budget=13),
    "h2o_partly_filled": lambda model: H2OCache(model.config, budget=52),
    "snapkv": lambda model: SnapKVCache(model.config, budget=0.3, window_size=5, eviction_interval=7),
    "tova_partly_filled": lambda model: TOVACache(model.config, budget=52),
    "streaming_llm": lambda model: StreamingLLMCache(model.config, budget=14),
    "streaming_llm_dense": lambda model: StreamingLLMCache(model.config, budget=14, prefill="dense"),
    "streaming_llm_partly_filled": lambda model: StreamingLLMCache(model.config, budget=52),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_of_a_row_are_those_it_gives_alone(cache: str, family: str) -> None:
    model, rows = tiny_model(family), random_rows(LENGTHS, seed=21)
    shared = CACHES[cache](model)
    together = generate(model, shared, rows, 24).sequences[:, -24:]
    layers = model.config.num_hidden_layers
    assert sum(shared.num_kept_tokens()) < layers * shared.get_seq_length(), "nothing was evicted"
    for index, row in enumerate(rows):
        alone = generate(model, CACHES[cache](model), [row], 24).sequences[0, -24:]
        assert together[index].tolist() == alone.tolist(), f"row {index}"


@pytest.mark.parametrize("cache", CACHES)
def test_held_positions_and_logits_of_a_row_are_those_it_has_alone(cache: str) -> None:
    model, rows = tiny_model("llama"), random_rows(LENGTHS, seed=22)
    continuation = random_tokens(3, 20, seed=23)
    together = drive(model, CACHES[cache](model), rows, continuation)
    for index, row in enumerate(rows):
        alone = drive(model, CACHES[cache](model), [row], continuation[index : index + 1])
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
        for step in range(21):
            for layer in range(3):
                for head in range(2):
                    assert together.held(step, layer, index, head) == alone.held(step, layer, 0, head)


@pytest.mark.parametrize("cache", CACHES)
def test_positions_count_real_tokens_and_no_padding_is_kept(cache: str) -> None:
    """The shortest row is almost all padding: it holds each of its few tokens, at positions from 0."""
    model, rows = tiny_model("llama"), random_rows((5, 60), seed=24)
    trace = drive_short(model, CACHES[cache](model), rows)
    for step in range(4):
        for layer in range(3):
            positions = trace.positions[step][layer]
            assert positions.shape[:2] == (2, 2) and not positions.is_floating_point()
            assert int(positions.min()) >= -1
            for row, length in enumerate((5, 60)):
                held = trace.held(step, layer, row, 0)
                assert len(held) == len(set(held))
                assert max(held) == length + step - 1
            if not cache.endswith(("h2o", "snapkv", "pyramid_config", "pyramid_model")):
                assert trace.held(step, layer, 0, 1) == list(range(5 + step))


def drive_short(model: PreTrainedModel, cache: Cache, rows: list[torch.Tensor]) -> Trace:
    """Three tokens after the prompts."""
    return drive(model, cache, rows, random_tokens(len(rows), 3, seed=25))


@pytest.mark.parametrize("budget, expected", [(0.3, [12, 17, 15]), (9, [9, 9, 9])])
def test_each_row_has_its_own_budget(budget: float, expected: list[int]) -> None:
    model = tiny_model("llama")
    trace = drive_short(model, H2OCache(model.config, budget=budget), random_rows(LENGTHS))
    for step in range(4):
        for layer in range(3):
            for head in range(2):
                assert [len(trace.held(step, layer, row, head)) for row in range(3)] == expected


@pytest.mark.parametrize("cache", CACHES)
def test_a_second_padded_turn(cache: str) -> None:
    """Two turns of `generate`, each padded differently: the padding of the second lies between a row's tokens."""
    model = tiny_model("llama")
    first, second = random_rows(LENGTHS, seed=26), random_rows((9, 4, 13), seed=27)

    def answer(rows: list[int]) -> torch.Tensor:
        shared = CACHES[cache](model)
        input_ids, mask = left_pad([first[row] for row in rows])
        for turn in (None, second):
            if turn is not None:
                more_ids, more_mask = left_pad([turn[row] for row in rows])
                mask = torch.cat(
                    [mask, mask.new_ones(len(rows), input_ids.shape[1] - mask.shape[1]), more_mask], dim=1
                )
                input_ids = torch.cat([input_ids, more_ids], dim=1)
            input_ids = model.generate(
                input_ids, attention_mask=mask, past_key_values=shared, max_new_tokens=8, do_sample=False
            )
        return input_ids[:, -8:]

    together = answer([0, 1, 2])
    for row in range(3):
        assert together[row].tolist() == answer([row])[0].tolist(), f"row {row}"
