"""What the subcommands share: their options and how they are read, progress bars, and where results go."""

import argparse
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyramid_cache.engine.files import replacing
from pyramid_cache.lab.registry import BudgetLike, find_entry, read_budget, read_contender


if TYPE_CHECKING:
    from rich.console import Console


REPORT_WIDTH = 150
DTYPES = ("float32", "bfloat16", "float16")


def positive_int(text: str, least: int = 1) -> int:
    """Reads a whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of values between commas, each once. What `read` refuses with ValueError is refused in its words."""

    def read_list(text: str) -> list[Any]:
        try:
            values = [read(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return list({repr(value): value for value in values}.values())

    return read_list


positive_ints = list_of(positive_int)
cache_names = list_of(lambda text: find_entry(text).name)
budgets = list_of(read_budget)
contenders = list_of(read_contender)


def one_budget(text: str) -> BudgetLike:
    """Reads the budget of a command that takes one."""
    found = budgets(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is {len(found)} budgets: give one, or use `pyramid-cache eval`")
    return found[0]


def device(text: str) -> torch.device:
    """Reads `--device`, which must be there."""
    try:
        found = torch.device(text)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where and how a model runs."""
    add = parser.add_argument
    add("--device", type=device, help="where the model runs (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="type of the weights and the cache (default: float32 on cpu, else bfloat16)")
    add("--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)")


def default_device() -> torch.device:
    """Where a model runs without `--device`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> str:
    """The type of weights and caches without `--dtype`."""
    return "float32" if device.type == "cpu" else "bfloat16"


def check_input(option: str, path: Path | None) -> None:
    """Raises ValueError if an option names a file that is not there."""
    if path is not None and not path.is_file():
        raise ValueError(f"{option} {path} is no file.")


def check_output(option: str, path: Path | None) -> None:
    """Raises ValueError, before minutes of work, if an option names a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{option} {path} cannot be written: it must be a file in a folder that exists.")


def check_picture(option: str, path: Path | None) -> None:
    """Raises ValueError, before minutes of work, if an option names a picture that cannot be drawn."""
    check_output(option, path)
    if path is not None:
        from matplotlib.figure import Figure

        kinds = Figure().canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".") not in kinds:
            raise ValueError(f"{option} {path}: the name must end in one of {', '.join(sorted(kinds))}.")


def command_text(command: Sequence[str], options: Mapping[str, Any]) -> str:
    """A command with options; those that are None or False are left out. Lists have commas, tuples are words."""
    words = ["pyramid-cache", *command]
    for name, value in options.items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else [value] * (value is not True)
            texts = [",".join(map(str, each)) if isinstance(each, list) else str(each) for each in values]
            words += [f"--{name.replace('_', '-')}", *texts]
    return shlex.join(words)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Writes a record in one step: whoever reads the file meanwhile finds the old one or the new one."""
    text = json.dumps(record, indent=2) + "\n"
    # Lists of numbers in one line each.
    text = re.sub(r"\[\n\s+([\s\d.,eE+-]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    if path.exists() and not path.is_file():  # a pipe or a terminal, such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    with replacing(str(path.resolve())) as temporary_path:
        Path(temporary_path).write_text(text, encoding="utf-8")


def say(messages: "Console", text: str) -> None:
    """Prints a message as it is."""
    messages.print(text, highlight=False, markup=False, soft_wrap=True)


def say_written(messages: "Console", *paths: Path | None) -> None:
    """Says which files were written."""
    for path in filter(None, paths):
        say(messages, f"Wrote {path}")


def message_console(quiet: bool = False) -> "Console":
    """Where bars and messages go: stderr, so that stdout has the report and nothing else."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


def report_console() -> "Console":
    """Where tables go: stdout, wide enough for them where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=REPORT_WIDTH)


def print_table(
    console: "Console", columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], folds: Sequence[str] = ()
) -> None:
    """
    Prints a table, or nothing where there are no rows. Of each column there are the title and the form of its cells,
    which `fill` fills from a row: with `:<` or `:^` in it the column is aligned so, else on the right. Columns without
    a cell are left out. Those of `folds` may have cells of several lines.
    """
    from rich.table import Table

    cells = {title: [fill(form, row) for row in rows] for title, form in columns.items()}
    cells = {title: texts for title, texts in cells.items() if any(text is not None for text in texts)}
    table = Table(header_style="bold")
    for title in cells:
        justify: Any = "left" if ":<" in columns[title] else "center" if ":^" in columns[title] else "right"
        is_folded = title in folds
        overflow: Any = "fold" if is_folded else "ellipsis"
        table.add_column(title.strip(), justify=justify, no_wrap=not is_folded, overflow=overflow)
    for line in zip(*cells.values(), strict=True):
        table.add_row(*line)
    if rows:
        console.print(table)


def fill(form: str, row: Mapping[str, Any]) -> str | None:
    """A cell in rich's markup: a form with the values of a row, also in milliseconds and MiB. None if one is None."""
    from rich.markup import escape

    known = {name: escape(value) if isinstance(value, str) else value for name, value in row.items()}
    for name, value in row.items():
        if isinstance(value, (int, float)):
            known |= {f"{name}_ms": value * 1e3, f"{name}_mib": value / 2**20}
    try:
        return form.format_map(known)
    except (KeyError, TypeError):
        return None


class ProgressBar:
    """A `ProgressCallback` that draws a bar while entered; where stderr is no terminal, a line per description."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.console, self.description = console, ""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Twice a second is enough to look at, and takes no time from a measurement.
        settings: dict[str, Any] = {"console": console, "transient": True, "refresh_per_second": 2}
        self.bar = Progress(*columns, **settings, disable=not console.is_terminal)
        self.task_id = self.bar.add_task("", total=None)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, description: str, completed: int, total: int | None) -> None:
        # Drawn from the first news on: until then the bars of the hub and of transformers have the terminal.
        self.bar.start()
        if description == self.description:
            self.bar.update(self.task_id, completed=completed, total=total)
            return
        self.description = description
        self.bar.reset(self.task_id, description=description, completed=completed, total=total)
        if not self.console.is_terminal:
            say(self.console, description)
