"""What came of an evaluation: every answer for a CSV file, and means over the answers for tables."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.evaluation.cells import ALL_QUESTIONS, CellKey
from pyramid_cache.lab.evaluation.evaluator import Result, enumerate_by_task
from pyramid_cache.lab.evaluation.tasks import Context
from pyramid_cache.lab.registry import find_entry


CSV_DECIMALS = 6
CASE_DECIMALS = 4


@dataclass(frozen=True)
class Answer:
    """
    What one cache made of one question. The score is that of `Score`.

    Attributes:
        length (`int`): Tokens of the context.
        budget (`float`): 1.0 for the full cache.
        context, question (`int`): Which context of the task, and which question of the context.
        depths (`tuple[float, ...]`): See `Question`.
        answer (`str`): The right one: its text, or its token ids where there is no tokenizer.
        held_share (`float`): The bytes that the cache held as a share of the full one's.
        held_bytes (`int`): That share of what the full one takes for all that was read when it was measured.
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
    results: Sequence[Result],
    contexts: Sequence[Context],
    model: PreTrainedModel,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Answer]:
    """
    The answers that results of a model are means of, in the same order.

    Args:
        contexts (`Sequence[Context]`): All that the evaluation was given, in the same order.
        decode (`Callable`, *optional*): Makes texts of right answers.
    """
    by_place = {(context.task, index): context for index, context in enumerate_by_task(contexts)}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    layers: list[Any] = cache.layers
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    answers = []
    for result in results:
        for cell in result.cells:
            key = cell.key
            context = by_place[key.task, key.context]
            held_bytes = round(cell.held_share * token_bytes * num_read(key, context))
            for number, score in zip(key.question_numbers(context), cell.scores, strict=True):
                question = context.questions[number]
                text = " ".join(map(str, question.answer)) if decode is None else decode(question.answer)
                place = (key.task, len(context.ids), key.cache, key.budget, key.protocol, key.context, number)
                found = (score.is_exact, score.token_accuracy, score.log_likelihood, cell.held_share, held_bytes)
                answers.append(Answer(*place, tuple(question.depths), text, *found))
    return answers


def num_read(key: CellKey, context: Context) -> int:
    """How many tokens the cache had read when its bytes were counted: a stream reads questions behind the context."""
    if key.protocol == "context" or find_entry(key.cache).reading == "stream":
        return len(context.ids)
    return len(context.ids) + len(context.questions[0 if key.question == ALL_QUESTIONS else key.question].ids)


def csv_text(answers: Sequence[Answer]) -> str:
    """The answers as CSV with a header; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Answer))
    for answer in answers:
        depths = " ".join(str(round(depth, CSV_DECIMALS)) for depth in answer.depths)
        row = asdict(answer) | {"exact": int(answer.exact), "depths": depths}
        writer.writerow(round(value, CSV_DECIMALS) if isinstance(value, float) else value for value in row.values())
    return text.getvalue()


def as_row(result: Result) -> dict[str, Any]:
    """
    One cache on one task: means over the cases, and the scores of each case under "cases", in the order of contexts
    and their questions. A case is an exact match if its token accuracy is 1. `perplexity-L` has its "perplexity" too:
    the exponential of the negative mean log-likelihood per token. Conversations have the mean of each turn.
    """
    scores = result.scores
    row: dict[str, Any] = {
        "task": result.task,
        "protocol": result.protocol,
        "cache": result.cache,
        "label": find_entry(result.cache).label,
        "budget": result.budget,
        "num_cases": len(scores),
        "exact_match": statistics.mean(score.is_exact for score in scores),
        "token_accuracy": statistics.mean(score.token_accuracy for score in scores),
        "log_likelihood": statistics.mean(score.log_likelihood for score in scores),
        "held_share": statistics.mean(result.held_shares),
        "cases": {
            "token_accuracy": [round(score.token_accuracy, CASE_DECIMALS) for score in scores],
            "log_likelihood": [round(score.log_likelihood, CASE_DECIMALS) for score in scores],
        },
    }
    if result.num_turns > 1:
        turns = [scores[turn :: result.num_turns] for turn in range(result.num_turns)]
        row["exact_match_by_turn"] = [statistics.mean(score.is_exact for score in turn) for turn in turns]
        row["token_accuracy_by_turn"] = [statistics.mean(score.token_accuracy for score in turn) for turn in turns]
    elif result.task.startswith("perplexity-"):
        row["perplexity"] = math.exp(-row["log_likelihood"])
    return row
