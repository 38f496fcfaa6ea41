"""The demo's texts: stretches of a novel in which numbers are planted, and the questions about them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyramid_cache.lab.evaluation.tasks.cases import Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.novel_tasks import (
    ANSWER_BEGINNING,
    NEEDLE,
    NEEDLE_QUESTION,
    PERSONS,
    choose_numbers,
    hide_numbers,
    number_each,
)


@dataclass(frozen=True)
class Prompts:
    """A batch of texts, each with a number planted in it and a question about that number at its end."""

    input_ids: torch.Tensor  # (batch, tokens)
    facts: list[str]  # what is planted in each row
    numbers: list[str]  # what each row asks for
    fact_spans: list[tuple[int, int]]  # where the tokens of each row's fact start and end

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class SharedText:
    """A text that is read once, and the questions that come later, with their answers."""

    input_ids: torch.Tensor  # (1, tokens)
    questions: list[torch.Tensor]  # (1, tokens) each
    numbers: list[str]


def build_prompts(haystack: Haystack, num_tokens: int, batch_size: int, generator: random.Random) -> Prompts:
    """
    Prompts of exactly `num_tokens` tokens, each of another stretch of the text.

    Raises:
        PromptError: The text is too short, or the prompts are.
    """
    rows, facts, numbers, spans = [], [], [], []
    for person in generator.sample(PERSONS * batch_size, batch_size):
        question = question_about(haystack, person)
        task = Task("needles", 1, num_tokens - len(question))
        ids, [(_, number, depth)] = hide_numbers(haystack, task, [person], choose_numbers(1, generator), generator)
        fact = NEEDLE.format(person, number)
        start = round(depth * task.num_tokens)
        rows.append(ids + question)
        facts.append(fact.strip())
        numbers.append(number)
        spans.append((start, start + len(haystack.encode(fact))))
    return Prompts(torch.tensor(rows), facts, numbers, spans)


def build_shared_text(haystack: Haystack, num_tokens: int, num_questions: int, generator: random.Random) -> SharedText:
    """
    A text of exactly `num_tokens` tokens with as many planted numbers as questions.

    Raises:
        PromptError: The text is too short, or `num_tokens` is too small.
    """
    ids, told = number_each(haystack, Task("needles", num_questions, num_tokens), generator)
    questions = [torch.tensor([question_about(haystack, person)]) for person, *_ in told]
    return SharedText(torch.tensor([ids]), questions, [number for _, number, _ in told])


def question_about(haystack: Haystack, person: str) -> list[int]:
    """The tokens of a question, and of the words that its answer begins with: a small model then says the number."""
    return haystack.question(NEEDLE_QUESTION.format(person), ANSWER_BEGINNING.format(person))


def num_right(answers: Sequence[str], numbers: Sequence[str]) -> int:
    """How many answers begin with their number."""
    return sum(answer.startswith(number) for answer, number in zip(answers, numbers, strict=True))
