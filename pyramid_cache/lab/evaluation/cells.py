"""
What has been measured so far, kept in a folder: an evaluation that is stopped loses nothing and repeats nothing.

A cell is what one cache made of one context, or of one question if that was compressed with it. It is written as soon as it
is there, one line of JSON each. Processes that share the work write files of their own and read those of all.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyramid_cache.lab.evaluation.lines import append_line, read_lines
from pyramid_cache.lab.evaluation.tasks.cases import Context
from pyramid_cache.lab.terminal import write_json


SETTINGS_FILE = "settings.json"
# A question of its own, or all questions of the context.
ALL_QUESTIONS = -1


@dataclass(frozen=True, order=True)
class CellKey:
    """
    Which cache on which questions.

    Attributes:
        context (`int`): Which context of the task.
        question (`int`): Which question of the context, or `ALL_QUESTIONS`.
        budget (`float`): 1.0 for the full cache.
    """

    task: str
    context: int
    question: int
    protocol: str
    cache: str
    budget: float


@dataclass(frozen=True)
class Cell:
    """
    What came of it.

    Attributes:
        token_accuracy, log_likelihood (`list[float]`): One per question; see `Score`.
        held_share (`float`): The bytes that the cache held of those of the full one.
    """

    key: CellKey
    token_accuracy: list[float]
    log_likelihood: list[float]
    held_share: float


class CellStore:
    """
    The cells of an evaluation, in memory, and in a folder as well if there is one: in `cells.jsonl`, those of further
    processes in `cells.1.jsonl` and so on.

    Args:
        folder (`Path`, *optional*): Made if it is not there. Cells of an earlier run in it are taken over.
        settings (`dict`): What all cells depend on.
        process (`int`): Which of the processes that write to the folder this is.
        announce (`Callable`, *optional*): Told of a broken last line, which is dropped.

    Raises:
        ValueError: The folder has cells of other settings, or lines in the middle of a file that are no cells.
    """

    def __init__(
        self,
        folder: Path | None = None,
        settings: dict[str, Any] | None = None,
        process: int = 0,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.cells: dict[CellKey, Cell] = {}
        self.process = process
        self.path = None if folder is None else folder / (f"cells.{process}.jsonl" if process else "cells.jsonl")
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file. Name a folder for the results.")
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, settings or {}, process)
        for path in [*sorted(folder.glob("cells.*.jsonl")), *folder.glob("cells.jsonl")]:
            for cell in read_lines(path, parse_cell, path == self.path, announce):
                self.cells[cell.key] = cell

    def require_contexts(self, contexts: Sequence[Context]) -> None:
        """
        Notes in the folder what the contexts are, so that cells of other ones under the same names are not taken for theirs: a
        file of a public set may have changed.

        Raises:
            ValueError: There are cells of a context that was another one.
        """
        if self.path is None:
            return
        folder = self.path.parent
        record = read_settings(folder)
        noted: dict[str, list[str]] = record.setdefault("contexts", {})
        found: dict[str, list[str]] = {}
        for context in contexts:
            found.setdefault(context.task, []).append(digest_of(context))
        for task, digests in found.items():
            earlier = noted.get(task, [])
            for index, (one, other) in enumerate(zip(earlier, digests, strict=False)):
                if one != other:
                    raise ValueError(
                        f"{folder} has results of {task} whose context {index} is another one now: its source has changed. Choose "
                        "another folder, or delete this one."
                    )
            noted[task] = digests if len(digests) > len(earlier) else earlier
        self._require_answers(contexts)
        if self.process == 0:
            write_json(record, folder / SETTINGS_FILE)

    def _require_answers(self, contexts: Sequence[Context]) -> None:
        """Raises for cells that have not as many answers as there are questions."""
        by_task: dict[str, list[Context]] = {}
        for context in contexts:
            by_task.setdefault(context.task, []).append(context)
        for key, cell in self.cells.items():
            if key.context >= len(by_task.get(key.task, ())):
                continue
            questions = by_task[key.task][key.context].questions
            # With the question in view, answers of one token are not measured.
            counts = {len(questions), sum(len(question.answer) > 1 for question in questions)}
            num_answers = len(cell.token_accuracy)
            if num_answers not in (counts if key.question == ALL_QUESTIONS else {1}):
                raise ValueError(
                    f"A line of the cells in {self.path.parent} has {num_answers} answers to the {len(questions)} questions of context "
                    f"{key.context} of {key.task} ({key.cache}, {key.budget}, {key.protocol} first). Delete the line: what it was of is "
                    "measured again."
                )

    def __contains__(self, key: CellKey) -> bool:
        return key in self.cells

    def add(self, cell: Cell) -> None:
        """Takes a cell, and has it written when this returns."""
        self.cells[cell.key] = cell
        if self.path is not None:
            append_line(self.path, asdict(cell))


def digest_of(context: Context) -> str:
    """Of all that answers depend on."""
    return hashlib.sha256(json.dumps(asdict(context), sort_keys=True).encode()).hexdigest()[:16]


def parse_cell(fields: dict[str, Any]) -> Cell:
    """
    Reads a cell from JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It is none.
    """
    cell = Cell(**{**fields, "key": CellKey(**fields["key"])})
    if not cell.token_accuracy or len(cell.token_accuracy) != len(cell.log_likelihood):
        raise ValueError(
            f"{len(cell.token_accuracy)} token accuracies and {len(cell.log_likelihood)} log-likelihoods, one each per question"
        )
    # Of what is summed up later, a text would be found only then.
    if not math.isfinite(sum(cell.token_accuracy) + sum(cell.log_likelihood) + cell.held_share):
        raise ValueError("not all of its numbers are finite")
    return cell


def check_settings(folder: Path, settings: dict[str, Any], process: int = 0) -> None:
    """Raises if cells in the folder are of other settings; notes these if there are none."""
    path = folder / SETTINGS_FILE
    has_cells = any(cells.stat().st_size for cells in folder.glob("cells*.jsonl"))
    if path.exists():
        read_settings(folder)  # raises for a file of something else
    elif has_cells:
        raise ValueError(
            f"{folder} has results, but no {SETTINGS_FILE} that says what they are of. Choose another folder, or delete this one."
        )
    if not has_cells:
        # Those of a run that came to nothing are of no cell.
        if process == 0 or not path.exists():
            write_json({"settings": settings}, path)
        return
    noted = flat(read_settings(folder)["settings"])
    found = flat(settings)
    differing = [name for name in {**noted, **found} if noted.get(name) != found.get(name)]
    if differing:
        text = ", ".join(f"{name} {noted.get(name)!r} instead of {found.get(name)!r}" for name in differing)
        raise ValueError(f"{folder} has results of other settings: {text}. Choose another folder, or delete this one.")


def read_settings(folder: Path) -> dict[str, Any]:
    """
    Reads the file of settings.

    Returns:
        `dict`: Under "settings" what all cells depend on, under "contexts" digests of the contexts of each task; of a finished
            run, its command, machine and versions under "run".
    """
    path = folder / SETTINGS_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["settings"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of an evaluation. Choose another folder, or delete this one."
        ) from error
    return record


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by names with dots, such as `versions.torch`, as they read back from JSON."""
    result: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        result |= (
            {f"{name}.{inner}": part for inner, part in flat(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return result
