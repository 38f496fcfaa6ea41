"""What came of an evaluation: every answer, means over answers, and which positions each cache keeps of a context."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.evaluation.cells import ALL_QUESTIONS, CellKey, append_line, read_lines
from pyramid_cache.lab.evaluation.evaluator import Evaluation, Result, enumerate_by_task
from pyramid_cache.lab.evaluation.reading import Reader
from pyramid_cache.lab.evaluation.tasks import Context
from pyramid_cache.lab.registry import find_entry
from pyramid_cache.plot.held import kept_positions


CSV_DECIMALS = 6
CASE_DECIMALS = 4
SHARE_DECIMALS = 2
POSITIONS_FILE = "positions.jsonl"
# A picture has room for so many dots side by side.
MAX_COLUMNS = 256


@dataclass(frozen=True)
class Answer:
    """What one cache made of one question. The score is that of `Score`."""

    task: str
    length: int  # tokens of the context
    cache: str
    budget: float  # 1.0 for the full cache
    protocol: str
    context: int  # which one of the task
    question: int  # which one of the context
    depths: tuple[float, ...]  # see `Question`
    answer: str  # the right one: its text, or its token ids where there is no tokenizer
    exact: bool
    token_accuracy: float
    log_likelihood: float
    held_share: float  # the bytes that the cache held as a share of the full one's
    held_bytes: int  # that share of what the full one takes for all that was read when it was measured


def collect_answers(
    results: Sequence[Result],
    contexts: Sequence[Context],
    model: PreTrainedModel,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Answer]:
    """The answers that results are means of, in the same order. `decode` makes texts of right answers."""
    by_place = {(context.task, index): context for index, context in enumerate_by_task(contexts)}
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
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
    """How many tokens the cache had read when its bytes were counted."""
    if key.protocol == "context":
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
    and their questions. `perplexity-L` has the exponential of the negative mean log-likelihood per token, and
    conversations have the mean of each turn.
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


@dataclass(frozen=True)
class KeptPositions:
    """What a cache held of the first context of a task, of `num_tokens` tokens, when it had read it."""

    task: str
    cache: str
    budget: float
    num_tokens: int
    # Per layer the share of the KV heads that held each position, or of neighbours if there are over `MAX_COLUMNS`.
    shares: list[list[float]]

    def __post_init__(self) -> None:
        torch.tensor(self.shares, dtype=torch.float32)  # raises ValueError or TypeError for what was read and is none


def measure_kept_positions(
    evaluation: Evaluation, context: Context, folder: Path, announce: Callable[[str], None]
) -> list[KeptPositions]:
    """What each cache at each budget keeps of the first context of a task: written at once, and measured once."""
    path = folder / POSITIONS_FILE
    known = read_lines(path, lambda fields: KeptPositions(**fields), True, announce) if path.exists() else ()
    found = {(kept.task, kept.cache, kept.budget): kept for kept in known}
    caches = [name for name, entry in evaluation.caches.items() if issubclass(entry.cache_class, CompressedCache)]
    wanted = [(context.task, *setting) for setting in evaluation.settings(caches)]
    missing = [place for place in wanted if place not in found]
    if missing:
        num_tokens = len(context.ids)
        reading = Reader(evaluation.model, torch.tensor([context.ids], device=evaluation.model.device)).context
        for place in missing:
            cache, _ = evaluation.read(place[1:], [context.ids], reading)
            shares = kept_positions(cache, num_tokens)
            if num_tokens > MAX_COLUMNS:
                shares = torch.nn.functional.adaptive_avg_pool1d(shares, MAX_COLUMNS)
            rounded = [[round(share, SHARE_DECIMALS) for share in layer] for layer in shares.tolist()]
            found[place] = KeptPositions(*place, num_tokens, rounded)
            append_line(path, asdict(found[place]))
    return [found[place] for place in wanted]
