"""Files of one JSON object per line that grow while they are measured: what is in them when a process is stopped is kept."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


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
    Reads what `append_line` wrote.

    A last line that is broken was being written when its process was stopped: it is dropped.

    Args:
        parse (`Callable`): Makes of a record what is wanted; raises ValueError, TypeError, KeyError or AttributeError for one
            that is none.
        is_own (`bool`): Whether this process goes on with the file. A broken last line is cut off from it then.
        announce (`Callable`): Told of a broken last line.

    Raises:
        ValueError: A line that is not the last one is broken.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    num_lines = len(lines) + bool(rest)
    start = 0
    for number, line in enumerate(lines, start=1):
        try:
            parsed = parse(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == num_lines:
                break
            raise ValueError(
                f"Line {number} of {path} is no result ({error}). Delete the line: what it was of is measured again."
            ) from error
        start += len(line) + 1
        yield parsed
    else:
        if not rest:
            return
    announce(f"Dropped the last line of {path}: it is not whole. What it was of is measured again.")
    if is_own:
        os.truncate(path, start)
