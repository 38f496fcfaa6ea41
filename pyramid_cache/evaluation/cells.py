"""
What has been measured so far, kept in a folder: an evaluation that is stopped loses nothing and repeats nothing.

A cell is what one cache made of one context, or of one question if that was compressed with it. It is written as soon as it
is there, one line of JSON each. Processes that share the work write files of their own and read those of all.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyramid_cache.terminal import write_json


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
    The cells of an evaluation, in memory, and in a folder as well if there is one.

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
        self.path = None if folder is None else folder / f"cells.{process}.jsonl"
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, settings or {})
        for path in sorted(folder.glob("cells.*.jsonl")):
            for cell in read_cells(path, path == self.path, announce):
                self.cells[cell.key] = cell

    def __contains__(self, key: CellKey) -> bool:
        return key in self.cells

    def add(self, cell: Cell) -> None:
        """Takes a cell, and has it written when this returns."""
        self.cells[cell.key] = cell
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
                file.flush()
                os.fsync(file.fileno())


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises if cells in the folder are of other settings; notes these if there are none."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        write_json(settings, path)
        return
    noted = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in {**noted, **settings} if noted.get(name) != settings.get(name)]
    if differing:
        found = ", ".join(f"{name} {noted.get(name)!r} instead of {settings.get(name)!r}" for name in differing)
        raise ValueError(
            f"{folder} has results of other settings: {found}. Choose another folder, or delete this one."
        )


def read_cells(path: Path, is_own: bool, announce: Callable[[str], None]) -> Iterator[Cell]:
    """
    Reads a file of cells. A last line that is broken was being written when its process was stopped: it is dropped, and cut off
    from a file that this process goes on with.
    """
    content = path.read_bytes()
    num_whole = content.rfind(b"\n") + 1
    if num_whole < len(content):
        announce(f"Dropped the last line of {path}: it is not whole. What it was of is measured again.")
        if is_own:
            os.truncate(path, num_whole)
    for number, line in enumerate(content[:num_whole].splitlines(), start=1):
        try:
            fields = json.loads(line)
            yield Cell(**{**fields, "key": CellKey(**fields["key"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Line {number} of {path} is no result ({error}). Delete the line: what it was of is measured again."
            ) from error
