"""A row in a left-padded batch gives what it gives alone: logits, and the positions held."""

import copy
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache, parametrize_cases
from models import build_model, drive, left_pad, random_rows, random_tokens, tiny_model
from modes import Run, held_positions
from transformers import Cache, DynamicCache

from pyramid_cache import (
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    KnormCache,
    MassiveActivationCache,
    PyramidCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)


LENGTHS = (43, 57, 50)


@pytest.mark.parametrize("cache_class", [H2OCache, SnapKVCache, StreamingLLMCache, TOVACache])
def test_some_rows_held_whole_beside_others(cache_class: type[Cache]) -> None:
    """Rows exceed the budget at different steps."""
    run = Run(tiny_model("llama"), lambda model: cache_class(model.config, budget=52))
    run.generate(run.new_cache(), random_rows(LENGTHS, seed=21), max_new_tokens=24)
    run.verify()


@pytest.mark.parametrize("cache_class", [ExpectedAttentionCache, KeyDiffCache, KnormCache, MassiveActivationCache])
def test_some_rows_held_whole_where_each_head_has_other_empty_slots(cache_class: type[Cache]) -> None:
    """As on a GPU, where a method that looks at no attention leaves it to the model's own function."""
    run = Run(build_model("llama").double(), lambda model: cache_class(model.config, budget=52))
    run.generate(run.new_cache(), random_rows(LENGTHS, seed=21), max_new_tokens=60)
    run.verify()


@pytest.mark.parametrize("cache_class", [PyramidCache, StreamingLLMCache, ExpectedAttentionCache])
def test_rows_of_which_all_tokens_must_stay(cache_class: type[Cache]) -> None:
    """They have empty slots beside longer rows, and lose their oldest token."""
    run = Run(tiny_model("llama"), lambda model: cache_class(model.config, budget=0.6, eviction_interval=1))
    run.generate(run.new_cache(), random_rows((2, 3, 40), seed=21), max_new_tokens=12)
    run.verify()


@parametrize_cases(case for case in CACHE_CASES if not case.has_own_reference and "streaming" not in case.short_name)
def test_a_budget_in_bytes_is_filled_and_kept(case: CacheCase) -> None:
    """With one token more in each layer of each row it would be exceeded."""
    model, budget = tiny_model("llama"), 60_000
    settings = {**case.tight, "budget": f"{budget}B"}
    cache = case.make(model, settings)
    # PyramidCache says that rows of different length, whose layers fall otherwise, may take some more.
    shortest = 60 if case.cache_class is PyramidCache else 55
    drive(model, cache, random_rows((60, 60, shortest)), 6 if case.is_bounded else 0)
    held, of_a_token = 0, 0.0
    for layer in cache.compressed_layers:
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in layer.state.tensors("slot").values())
        held, of_a_token = held + num_bytes, of_a_token + num_bytes / layer.keys.shape[2]
    assert held <= budget < held + of_a_token


@every_cache
def test_a_second_padded_turn(case: CacheCase) -> None:
    """
    The padding of the second turn lies between a row's tokens. The row of five tokens has lost nothing yet when it
    comes, the other ones have.
    """
    run = Run(tiny_model("llama"), case.build)
    cache = run.new_cache()
    said, mask = left_pad(random_rows((43, 5, 50), seed=26))
    said = run.generate(cache, input_ids=said, attention_mask=mask, max_new_tokens=2)
    more, more_mask = left_pad(random_rows((9, 4, 13), seed=27))
    mask = torch.cat([mask, mask.new_ones(3, said.shape[1] - mask.shape[1]), more_mask], dim=1)
    run.generate(cache, input_ids=torch.cat([said, more], dim=1), attention_mask=mask, max_new_tokens=8)
    run.verify()


# Answers of a batch that end apart: `generate` appends padding, a token to the cache until a mask hides it.

PROMPTS = torch.stack(random_rows((40, 40), seed=28))
QUESTION = random_tokens(2, 7, seed=29)


END = 2


def say(cache: Cache, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Twelve more tokens, of which the first row of `PROMPTS` ends with its fifth."""
    start = input_ids.shape[1]

    def end(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, [0, END]] = -torch.inf
        scores[(tokens[:, 0] == PROMPTS[0, 0]) & (tokens.shape[1] == start + 4), END] = torch.inf
        return scores

    return tiny_model("llama").generate(
        input_ids=input_ids,
        past_key_values=cache,
        max_new_tokens=12,
        logits_processor=[end],
        **{"eos_token_id": END} | settings,
    )


def converse(cache: Cache, rows: slice = slice(None), num_turns: int = 3) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """
    Turns of some rows of `PROMPTS`. Returns the answers without padding, by turn and row, and what `generate` would be
    given for one more turn.
    """
    tokens, answers = PROMPTS[rows], []
    mask = torch.ones_like(tokens)
    for _ in range(num_turns):
        said = say(cache, tokens, attention_mask=mask)
        answer = said[:, tokens.shape[1] :]
        answers.append([[token for token in row if token] for row in answer.tolist()])
        mask = torch.cat([mask, (answer != 0).long(), torch.ones_like(QUESTION[rows])], dim=1)
        tokens = torch.cat([said, QUESTION[rows]], dim=1)
    return answers, {"input_ids": tokens, "attention_mask": mask}


@every_cache
def test_answers_that_end_apart_in_a_large_budget(case: CacheCase) -> None:
    """As DynamicCache, from which `crop` takes back as much."""
    model = tiny_model("llama")
    caches = case.build(model, "large"), DynamicCache(config=model.config)
    (answers, turn), (wanted, _) = map(converse, caches)
    assert answers == wanted and [len(answer) for answer in wanted[2]] == [5, 12]
    for cache in caches:
        cache.crop(-20)
    shorter = {name: tensor[:, :-18] for name, tensor in turn.items()}
    again = [model.generate(**shorter, past_key_values=cache, max_new_tokens=5)[:, -5:].tolist() for cache in caches]
    assert again[0] == again[1]


@torch.no_grad()
def test_one_token_goes_on_behind_an_answer_that_has_ended() -> None:
    model = tiny_model("llama")
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, 37:40] = 0
    logits = []
    for cache in (SnapKVCache(model.config, budget=4096), DynamicCache(config=model.config)):
        model(PROMPTS, past_key_values=cache)
        positions = (mask.cumsum(dim=1) - 1)[:, -1:]
        output = model(QUESTION[:, :1], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits)
        if isinstance(cache, SnapKVCache):
            assert cache.positions(0)[0, 0].tolist() == [*range(37), -1, -1, -1, 37]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [12, 44, 54, 62, 66])
@parametrize_cases(case for case in CACHE_CASES if case.has_budget)
def test_answers_that_end_apart_in_a_budget_that_evicts(case: CacheCase, budget: int) -> None:
    """Each row says what it says alone, or a turn is refused and changes nothing; the error's advice helps then."""
    model = tiny_model("llama")

    def new_cache() -> Cache:
        return case.make(model, case.tight | {"budget": budget})

    cache = new_cache()
    try:
        answers, turn = converse(cache, num_turns=1)
        answers.append(say(cache, **turn, eos_token_id=None)[:, -12:].tolist())
    except ValueError as error:
        assert "`cache.reset()`" in str(error)
    else:
        assert budget > 12
        for row in range(2):
            alone = new_cache()
            wanted, turn = converse(alone, slice(row, row + 1), num_turns=1)
            wanted.append(say(alone, **turn, eos_token_id=None)[:, -12:].tolist())
            assert [turn[row] for turn in answers] == [turn[0] for turn in wanted]
            for layer in range(3):
                assert held_positions(cache, layer)[row] == held_positions(alone, layer)[0]
    if budget > 12:
        return
    cache.reset()
    turn = converse(cache, num_turns=1)[1]
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"earlier tokens per row.* `cache.reset\(\)`"):
        say(cache, **turn)
    shown = turn | {"attention_mask": torch.ones_like(turn["attention_mask"])}
    assert torch.equal(say(cache, **shown), say(twin, **shown))
    cache.reset()
    answers = say(cache, **turn)[:, -12:]
    for row, is_token in enumerate(turn["attention_mask"].bool()):
        alone = say(new_cache(), turn["input_ids"][row : row + 1, is_token])[0, is_token.sum() :].tolist()
        assert answers[row, : len(alone)].tolist() == alone


@torch.no_grad()
def test_what_a_mask_may_not_hide() -> None:
    """Tokens before others, what was padding, and anything while tokens are recorded."""
    model = tiny_model("llama")
    cache = SnapKVCache(model.config, budget=4096)
    before = torch.ones(2, 40, dtype=torch.long)
    before[1, :3] = 0
    positions = (before.cumsum(dim=1) - 1).clamp(min=0)
    model(PROMPTS, attention_mask=before, position_ids=positions, past_key_values=cache)
    mask = torch.cat([before, torch.ones_like(QUESTION)], dim=1)
    for hidden, shown in ((slice(20, 22), []), (slice(38, 40), [2]), (slice(0, 1), [])):
        wrong = mask.clone()
        wrong[:, hidden], wrong[1, shown] = 0, 1
        with pytest.raises(ValueError, match="as it did when they were new"):
            model(QUESTION, attention_mask=wrong, past_key_values=cache)
    later = mask.clone()
    later[0, 38:40] = 0
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="nothing is recorded"):
        model(QUESTION, attention_mask=later, past_key_values=cache)
    cache.crop(0)
    for layer in cache.layers:
        layer.record_past = False
    positions = (later.cumsum(dim=1) - 1).clamp(min=0)[:, -7:]
    logits = model(QUESTION, attention_mask=later, position_ids=positions, past_key_values=cache).logits
    everything = torch.cat([PROMPTS, QUESTION], dim=1)
    positions = (later.cumsum(dim=1) - 1).clamp(min=0)
    wanted = model(everything, attention_mask=later, position_ids=positions).logits[:, -7:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_padding_within_the_window_of_a_prompt() -> None:
    """The window's queries are the last tokens of a row, however much padding lies between them."""
    model, (tokens,) = tiny_model("llama"), random_rows((30,), seed=5)
    columns = torch.cat([tokens[:26], torch.zeros(8, dtype=torch.long), tokens[26:]])[None]
    mask = torch.ones(1, 38, dtype=torch.long)
    mask[:, 26:34] = 0
    held = []
    for ids, shown in ((columns, mask), (tokens[None], torch.ones(1, 30, dtype=torch.long))):
        cache = SnapKVCache(model.config, budget=14, window_size=6, kernel_size=1)
        with torch.no_grad():
            position_ids = (shown.cumsum(-1) - 1).clamp(min=0)
            model(ids, attention_mask=shown, position_ids=position_ids, past_key_values=cache)
        held.append([cache.positions(layer).sort().values for layer in range(3)])
    assert all(map(torch.equal, *held))
