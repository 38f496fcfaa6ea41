"""Every answer of an evaluation, with what was asked and where in the context its answer stands."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.evaluation.caches import BASELINE
from pyramid_cache.lab.evaluation.cells import ALL_QUESTIONS, Cell, CellKey
from pyramid_cache.lab.evaluation.evaluator import Evaluation, enumerate_by_task, num_bytes
from pyramid_cache.lab.evaluation.scores import Score
from pyramid_cache.lab.evaluation.tasks import Context


DECIMALS = 6


@dataclass(frozen=True)
class Answer:
    """
    What one cache made of one question.

    Attributes:
        length (`int`): Tokens of the context.
        budget (`float`): 1.0 for the full cache.
        context, question (`int`): Which context of the task, and which question of the context.
        depths (`tuple[float, ...]`): The share of the context that comes before what tells the answer, one for each value of
            an answer of several; empty where it is not known.
        answer (`str`): The right one: its text, or its token ids where there is no tokenizer.
        exact (`bool`): Whether all of it is what the model finds most likely.
        token_accuracy, log_likelihood (`float`): See `Score`.
        held_share (`float`): The bytes that the cache held of those of the full one.
        held_bytes (`int`): That share of what the full one takes for the context, and for the question if it was read with it.
    """

    task: str
    length: int
    cache: str
    budget: float
    protocol: str
    context: int
    question: int
    depths: tuple[float, ...]
    answer: str
    exact: bool
    token_accuracy: float
    log_likelihood: float
    held_share: float
    held_bytes: int


def collect_answers(
    evaluation: Evaluation, contexts: Sequence[Context], decode: Callable[[list[int]], str] | None = None
) -> list[Answer]:
    """
    What the store of an evaluation holds of all questions of some contexts, in an order that does not depend on who asked
    them when.

    Args:
        evaluation (`Evaluation`): Whose caches, budgets and protocols are wanted.
        contexts (`Sequence[Context]`): All that the evaluation was given, in the same order.
        decode (`Callable`, *optional*): Makes texts of right answers, which are numbers without.
    """
    settings = [(BASELINE, 1.0), *itertools.product(evaluation.caches, evaluation.budgets)]
    order = {place: rank for rank, place in enumerate(itertools.product(evaluation.protocols, settings))}
    cells: dict[tuple[str, int], list[Cell]] = {}
    for key, cell in evaluation.store.cells.items():
        if (key.protocol, (key.cache, key.budget)) in order:
            cells.setdefault((key.task, key.context), []).append(cell)
    streams = {name for name, cache in evaluation.caches.items() if cache.reading == "stream"}
    token_bytes = bytes_per_token(evaluation.model)
    answers = []
    for index, context in enumerate_by_task(contexts):
        depths = [tuple(question.depths) for question in context.questions]
        texts = [text_of(question.answer, decode) for question in context.questions]
        for cell in cells.get((context.task, index), []):
            is_stream = cell.key.cache in streams
            for number, score in scores_of(cell, context):
                held_bytes = round(cell.held_share * token_bytes * num_read(cell.key, context, is_stream))
                answers.append(answer_to(cell, context, number, score, depths[number], texts[number], held_bytes))
    tasks = list(dict.fromkeys(context.task for context in contexts))
    return sorted(
        answers,
        key=lambda answer: (
            tasks.index(answer.task),
            order[answer.protocol, (answer.cache, answer.budget)],
            answer.context,
            answer.question,
        ),
    )


def answer_to(
    cell: Cell, context: Context, number: int, score: Score, depths: tuple[float, ...], text: str, held_bytes: int
) -> Answer:
    """One of the answers of a cell."""
    key = cell.key
    return Answer(
        task=key.task,
        length=len(context.ids),
        cache=key.cache,
        budget=key.budget,
        protocol=key.protocol,
        context=key.context,
        question=number,
        depths=depths,
        answer=text,
        exact=score.is_exact,
        token_accuracy=score.token_accuracy,
        log_likelihood=score.log_likelihood,
        held_share=cell.held_share,
        held_bytes=held_bytes,
    )


def scores_of(cell: Cell, context: Context) -> Iterator[tuple[int, Score]]:
    """The scores of a cell, each with the number of its question."""
    numbers = range(len(context.questions)) if cell.key.question == ALL_QUESTIONS else [cell.key.question]
    if len(cell.token_accuracy) < len(numbers):
        # Answers of one token are not measured with the question in view.
        numbers = [number for number in numbers if len(context.questions[number].answer) > 1]
    scores = itertools.starmap(Score, zip(cell.token_accuracy, cell.log_likelihood, strict=True))
    return zip(numbers, scores, strict=True)


def num_read(key: CellKey, context: Context, is_stream: bool) -> int:
    """How many tokens the cache had read when its bytes were counted: a stream reads questions behind the context."""
    if key.protocol == "context" or is_stream:
        return len(context.ids)
    question = context.questions[0 if key.question == ALL_QUESTIONS else key.question]
    return len(context.ids) + len(question.ids)


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel) -> int:
    """What the full cache takes per token."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    return num_bytes(cache)


def text_of(ids: list[int], decode: Callable[[list[int]], str] | None) -> str:
    """Tokens as text, or as numbers where nothing makes text of them."""
    return " ".join(map(str, ids)) if decode is None else decode(ids)


def csv_text(answers: Sequence[Answer]) -> str:
    """The answers as CSV with a header; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Answer))
    for answer in answers:
        row = asdict(answer) | {
            "exact": int(answer.exact),
            "depths": " ".join(str(cell_text(depth)) for depth in answer.depths),
        }
        writer.writerow(map(cell_text, row.values()))
    return text.getvalue()


def cell_text(value: object) -> object:
    """A value as a CSV file has it."""
    return round(value, DECIMALS) if isinstance(value, float) else value
