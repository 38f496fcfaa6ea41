"""A cache over many turns: what is fed, what is held, and caches that are copied, reset, or change their rows on the way."""

import copy
from collections.abc import Callable
from functools import cache as remember

import pytest
import torch
from caches import CacheCase, every_cache
from models import drive, left_pad, random_rows, random_tokens, tiny_model
from modes import Run, held_positions
from transformers import Cache, DynamicCache


QUESTION, ANSWER, NUM_TURNS = 6, 3, 10

every_style = pytest.mark.parametrize("style", ["full history", "new tokens"])


def talk(run: Run, cache: Cache, style: str, after_turn: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Ten turns with two rows, padded at the first one, answered greedily.

    Args:
        style: Whether each turn hands `generate` all tokens so far, or those that the cache has not seen. The mask is
            over all of them either way.

    Returns:
        Everything that was said, `(2, tokens)`.
    """
    said, mask = left_pad(random_rows((30, 17), seed=50))
    for turn in range(NUM_TURNS):
        if turn:
            said = torch.cat([said, random_tokens(2, QUESTION, seed=60 + turn)], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, said.shape[1] - mask.shape[1])], dim=1)
        given = said if style == "full history" else said[:, cache.get_seq_length() :]
        answer = run.generate(cache, input_ids=given, attention_mask=mask, max_new_tokens=ANSWER)
        said = torch.cat([said, answer[:, -ANSWER:]], dim=1)
        after_turn()
    return said


@remember
def with_dynamic_cache(style: str) -> Run:
    """What `DynamicCache` answers."""
    run = Run(tiny_model("llama"), lambda model: DynamicCache(config=model.config))
    talk(run, run.new_cache(), style)
    return run


@every_style
@every_cache
def test_ten_turns_with_a_large_budget_are_those_of_dynamic_cache(case: CacheCase, style: str) -> None:
    run, wanted = Run(tiny_model("llama"), lambda model: case.build(model, "large")), with_dynamic_cache(style)
    talk(run, run.new_cache(), style)
    assert all(torch.equal(*pair) for pair in zip(run.sequences, wanted.sequences, strict=True))
    assert len(run.numbers) == 2 * ANSWER * NUM_TURNS
    assert all(torch.equal(*pair) for pair in zip(run.numbers, wanted.numbers, strict=True))


@every_style
@every_cache
def test_ten_turns_with_a_tight_budget_feed_the_new_tokens_and_answer_as_each_row_alone(
    case: CacheCase, style: str
) -> None:
    run = Run(tiny_model("llama"), case.build)
    cache = run.new_cache()

    def check_budget() -> None:
        if case.is_bounded:
            assert case.is_full(cache.num_kept_tokens())

    said = talk(run, cache, style, check_budget)
    history = run.history_of(cache)
    # The last token of an answer has not been fed: it comes with the next question.
    assert history.num_fed == [30, *[1] * (ANSWER - 1), *[QUESTION + 1, *[1] * (ANSWER - 1)] * (NUM_TURNS - 1)]
    assert torch.equal(torch.cat([piece.tokens for piece in history.pieces], dim=1), said[:, :-1])
    run.verify()


@every_cache
def test_a_row_that_is_within_its_budget_beside_one_that_is_not(case: CacheCase) -> None:
    """Two turns: the short row has lost nothing yet when the second one comes, the long row has."""
    model = tiny_model("llama")
    rows, questions = random_rows((40, 5), seed=51), random_tokens(2, 20, seed=52)
    together_cache = case.build(model)
    together = drive(model, together_cache, rows, questions, pieces=[20])
    for index, row in enumerate(rows):
        cache = case.build(model)
        alone = drive(model, cache, [row], questions[index : index + 1], pieces=[20])
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
        for layer in range(3):
            assert held_positions(together_cache, layer)[index] == held_positions(cache, layer)[0]


# Copies and resets.


@every_cache
def test_a_copied_prefix_goes_on_in_two_directions_as_two_new_caches(case: CacheCase) -> None:
    model, rows, fed = tiny_model("llama"), random_rows((40, 29), seed=53), random_tokens(2, 12, seed=53)
    prefix = case.build(model)
    drive(model, prefix, rows, fed)
    held, num_bytes = [held_positions(prefix, layer) for layer in range(3)], prefix.nbytes
    for seed in range(2):
        continuation = random_tokens(2, 14, seed=54 + seed)
        fresh = case.build(model)
        drive(model, fresh, rows, fed)
        answers = [go_on(cache, rows, 12, continuation) for cache in (copy.deepcopy(prefix), fresh)]
        assert torch.equal(*answers)
        # The prefix itself is what it was.
        assert [held_positions(prefix, layer) for layer in range(3)] == held and prefix.nbytes == num_bytes
    assert torch.equal(go_on(prefix, rows, 12, continuation), answers[0])


def go_on(cache: Cache, rows: list[torch.Tensor], num_more: int, tokens: torch.Tensor) -> torch.Tensor:
    """Feeds tokens one at a time to a cache that has seen prompts and `num_more` tokens after; returns all logits."""
    mask = left_pad(rows)[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), num_more)], dim=1)
    return feed(cache, mask, tokens)


@torch.no_grad()
def feed(cache: Cache, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Feeds tokens `(batch, tokens)` one at a time to a cache that has seen what `mask` shows; `(batch, tokens, vocab)`."""
    logits = []
    for column in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = tiny_model("llama")(
            input_ids=tokens[:, column : column + 1],
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


@every_cache
def test_a_cache_that_was_reset_is_a_new_one(case: CacheCase) -> None:
    model = tiny_model("llama")
    used, new = case.build(model), case.build(model)
    drive(model, used, random_rows((50, 20, 31), seed=55), 26)
    used.reset()
    assert used.get_seq_length() == 0 and used.num_kept_tokens() == [0, 0, 0]
    assert not any(roles["keys"] or roles["values"] for roles in used.memory().values())
    rows, continuation = random_rows((40, 29), seed=56), random_tokens(2, 26, seed=57)
    traces = [drive(model, cache, rows, continuation) for cache in (used, new)]
    assert torch.equal(traces[0].logits, traces[1].logits)
    for layer in range(3):
        assert torch.equal(used.positions(layer), new.positions(layer))


# Rows that are repeated, chosen and reordered.

# What is called on the cache, and the rows that result.
ROW_OPERATIONS: dict[str, tuple[Callable[[Cache], None], list[int]]] = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1])), [1, 2, 1]),
}


PADDED, EVEN = (40, 5, 29), (33, 33, 33)


@every_cache
@pytest.mark.parametrize(
    "operation, lengths",
    [*((operation, PADDED) for operation in ROW_OPERATIONS), ("select", EVEN), ("reorder", EVEN)],
)
def test_operations_on_rows_commute_with_decoding(operation: str, lengths: tuple[int, ...], case: CacheCase) -> None:
    model, rows, tokens = tiny_model("llama"), random_rows(lengths, seed=58), random_tokens(3, 25, seed=59)
    operate, indices = ROW_OPERATIONS[operation]
    mask = left_pad(rows)[1]
    early, late = case.build(model), case.build(model)
    for cache in (early, late):
        drive(model, cache, rows, 0)
    operate(early)
    wanted = feed(early, mask[indices], tokens[indices])
    assert_same(wanted, feed(late, mask, tokens)[indices])
    operate(late)
    for layer in range(3):
        assert held_positions(early, layer) == held_positions(late, layer)
    more = random_tokens(len(indices), 4, seed=60)
    mask = torch.cat([mask, mask.new_ones(3, 25)], dim=1)[indices]
    assert_same(feed(early, mask, more), feed(late, mask, more))
    for layer in range(3):
        assert held_positions(early, layer) == held_positions(late, layer)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums, which depends on the number of rows."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
