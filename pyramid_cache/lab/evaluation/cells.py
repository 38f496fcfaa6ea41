"""
What has been measured so far, kept in a folder: an evaluation that is stopped loses nothing and repeats nothing.

A cell is what one cache made of one context, or of one question if that was compressed with it. Each is one line of
JSON, written at once. Processes that share the work write files of their own and read those of all.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.evaluation.asking import Score
from pyramid_cache.lab.evaluation.tasks.cases import Context
from pyramid_cache.lab.terminal import default_device, write_json


SETTINGS_FILE = "settings.json"
REMEDY = "Choose another folder, or delete this one."
# A question of its own, or all questions of the context.
ALL_QUESTIONS = -1
# How long a process that is done waits for the slowest one.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True, order=True)
class CellKey:
    """Which cache on which questions."""

    task: str
    context: int  # its number in the task
    question: int  # its number in the context, or `ALL_QUESTIONS`
    protocol: str
    cache: str
    budget: float  # 1.0 for the full cache

    def question_numbers(self, context: Context) -> list[int]:
        """Which questions of its context a cell answers."""
        if self.question != ALL_QUESTIONS:
            return [self.question]
        return list(range(len(context.questions))) if self.protocol == "context" else context.in_view


@dataclass(frozen=True)
class Cell:
    """What came of it: a `Score` per question, and the bytes that the cache held as a share of the full one's."""

    key: CellKey
    token_accuracy: list[float]
    log_likelihood: list[float]
    held_share: float

    @property
    def scores(self) -> list[Score]:
        return list(map(Score, self.token_accuracy, self.log_likelihood))


class CellStore:
    """
    The cells of an evaluation, in memory and, if there is a folder, in `cells.jsonl`, or for other processes in
    `cells.1.jsonl` and so on. Cells of an earlier run are taken over. A broken last line is announced and dropped.
    Raises ValueError for cells of other settings, and for lines in the middle of a file that are no cells.
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
        if folder.is_file():
            raise ValueError(f"{folder} is a file. Name a folder for the results.")
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, settings or {}, process)
        for path in [*sorted(folder.glob("cells.*.jsonl")), *folder.glob("cells.jsonl")]:
            for cell in read_lines(path, parse_cell, path == self.path, announce):
                self.cells[cell.key] = cell

    def require_contexts(self, contexts: Sequence[Context]) -> None:
        """
        Notes in the folder what the contexts are: a data set may change. Raises ValueError if there are cells of a
        context that was another one, or with too few or too many answers.
        """
        if self.path is None:
            return
        folder = self.path.parent
        by_task: dict[str, list[Context]] = {}
        for context in contexts:
            by_task.setdefault(context.task, []).append(context)
        record = read_settings(folder)
        noted: dict[str, list[str]] = record.setdefault("contexts", {})
        for task, found in by_task.items():
            texts = (json.dumps(asdict(context), sort_keys=True) for context in found)
            digests, earlier = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts], noted.get(task, [])
            for index, (one, other) in enumerate(zip(earlier, digests, strict=False)):
                if one != other:
                    problem = f"{folder} has results of {task} whose context {index} is another one now"
                    raise ValueError(f"{problem}: its source has changed. {REMEDY}")
            noted[task] = max(earlier, digests, key=len)
        for key, cell in self.cells.items():
            for context in by_task.get(key.task, [])[key.context : key.context + 1]:
                if (num_answers := len(cell.token_accuracy)) != len(key.question_numbers(context)):
                    raise ValueError(
                        f"A line of the cells in {folder} has {num_answers} answers to the {len(context.questions)} "
                        f"questions of context {key.context} of {key.task} ({key.cache}, {key.budget}, {key.protocol} "
                        "first). Delete the line: that cell is measured again."
                    )
        if self.process == 0:
            write_json(record, folder / SETTINGS_FILE)

    def add(self, cell: Cell) -> None:
        """Takes a cell, and has it written when this returns."""
        self.cells[cell.key] = cell
        if self.path is not None:
            append_line(self.path, asdict(cell))


def parse_cell(fields: dict[str, Any]) -> Cell:
    """Reads a cell from JSON; raises ValueError, TypeError, KeyError or AttributeError if it is none."""
    cell = Cell(**{**fields, "key": CellKey(**fields["key"])})
    counts = len(cell.token_accuracy), len(cell.log_likelihood)
    if not counts[0] == counts[1] > 0:
        raise ValueError("{} token accuracies and {} log-likelihoods, one each per question".format(*counts))
    # A text among the numbers raises here, and not when they are summed up later.
    if not math.isfinite(sum(cell.token_accuracy) + sum(cell.log_likelihood) + cell.held_share):
        raise ValueError("not all of its numbers are finite")
    return cell


def check_settings(folder: Path, settings: dict[str, Any], process: int = 0) -> None:
    """Raises if cells in the folder are of other settings; notes these if there are none."""
    path = folder / SETTINGS_FILE
    has_cells = any(cells.stat().st_size for cells in folder.glob("cells*.jsonl"))
    if has_cells and not path.exists():
        raise ValueError(f"{folder} has results, but no {SETTINGS_FILE} that says what was measured. {REMEDY}")
    noted = read_settings(folder)["settings"] if path.exists() else {}
    if not has_cells:
        # No cell depends on the settings of a run that measured nothing.
        if process == 0 or not path.exists():
            write_json({"settings": settings}, path)
        return
    differing = [name for name in {**noted, **settings} if noted.get(name) != settings.get(name)]
    if differing:
        text = ", ".join(f"{name} {noted.get(name)!r} instead of {settings.get(name)!r}" for name in differing)
        raise ValueError(f"{folder} has results of other settings: {text}. {REMEDY}")


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads what all cells depend on ("settings"), digests of contexts by task ("contexts"), and a finished "run"."""
    path = folder / SETTINGS_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["settings"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the settings of an evaluation. {REMEDY}") from error
    return record


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds a record, which is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(
    path: Path, parse: Callable[[dict[str, Any]], Any], is_own: bool, announce: Callable[[str], None]
) -> Iterator[Any]:
    """
    Reads what `append_line` wrote. `parse` makes of a record what is wanted, or raises. A broken last line was being
    written when its process was stopped: it is announced and, in the process's own file, cut off.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    start, is_broken = 0, bool(rest)
    for number, line in enumerate(lines, start=1):
        try:
            parsed = parse(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and not rest:
                is_broken = True
                break
            raise ValueError(
                f"Line {number} of {path} is no result ({error}). Delete the line: its result is measured again."
            ) from error
        start += len(line) + 1
        yield parsed
    if is_broken:
        announce(f"Dropped the last line of {path}: it is not whole. Its result is measured again.")
        if is_own:
            os.truncate(path, start)


class Team:
    """
    The processes of one evaluation. Each `num_ranks` of them, with numbers in a row, hold one model.

    Attributes:
        rank (`int`): Which process this is, from 0 on.
        process, num_processes (`int`): Which model this is, and how many there are, which share the contexts.
        leads (`bool`): Whether this process is the one of its model that writes.
        device (`torch.device`): A GPU by default, or the CPU.
    """

    def __init__(self, device: torch.device | None = None, num_ranks: int = 1) -> None:
        self.rank, self.size = 0, 1
        self.device = device or default_device()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.device.type == "cpu", timeout=PATIENCE)
            self.rank, self.size = state.process_index, state.num_processes
            self.device = device or state.device
        if self.size % num_ranks:
            raise ValueError(
                f"--tensor-parallel {num_ranks} does not divide the {self.size} processes. Start as many, or a "
                f"multiple: `torchrun --nproc_per_node {num_ranks}`."
            )
        self.process, self.num_processes = self.rank // num_ranks, self.size // num_ranks
        self.leads = self.rank % num_ranks == 0

    def share(self, store: CellStore) -> None:
        """Waits for the others, and gives each the cells of all."""
        if self.size == 1:
            return
        from accelerate.utils import gather_object

        for cell in gather_object(list(store.cells.values())):
            store.cells[cell.key] = cell

    def leave(self) -> None:
        """Ends what connects the processes, which some backends do not survive at exit."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
