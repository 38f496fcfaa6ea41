"""What tests ask of the pages in docs/ (their code, tables and links), and the scripts in examples/ as they run."""

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
NUMBER = r"-?\d+\.\d+"
# Shares of right answers may differ where torch rounds otherwise; 8 contexts have 1,792 questions.
TOLERANCE = 0.02


def same_output(printed: str, shown: str) -> bool:
    """Whether two texts are the same but for fractions that are close to each other."""
    numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (printed, shown)]
    return re.sub(NUMBER, "?", printed) == re.sub(NUMBER, "?", shown) and numbers[0] == pytest.approx(
        numbers[1], abs=TOLERANCE
    )


def run_page(page: Path, known: dict[str, Any] | None = None, shows_output: bool = True) -> dict[str, Any]:
    """
    Runs the Python blocks of a page, one after the other, in one module.

    Args:
        known: Names that the page takes for granted.
        shows_output: Whether all that is printed must stand in a text block behind what printed it.

    Returns:
        The names that the page has defined, and those it was given.
    """
    module = ModuleType("page")
    module.__dict__.update(known or {})
    blocks = re.findall(r"```(python|text)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    printed = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "page", module)  # where dataclasses of the page look for their module
        for kind, text in blocks:
            if kind == "text":
                assert not shows_output or same_output(printed, text), f"printed:\n{printed}\nshown:\n{text}"
                printed = ""
                continue
            assert not (shows_output and printed), f"{page.name} does not show that its code prints:\n{printed}"
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, str(page), "exec"), module.__dict__)
            printed = output.getvalue()
    assert not (shows_output and printed), f"{page.name} does not show that its code prints:\n{printed}"
    return module.__dict__


def table_rows(text: str) -> list[list[str]]:
    """The cells of the first table in a text, its title row first."""
    lines = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert lines is not None, f"there is no table in:\n{text}"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[0].splitlines()]
    rows = [[cell.strip("| ") for cell in row] for row in rows]
    return [rows[0], *rows[2:]]


def section_of(text: str, title: str) -> str:
    """What stands under a heading of the second level, up to the next."""
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, f"there is no section {title!r}"
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def outside_of_code(text: str) -> str:
    """A page without its blocks of code and code in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def links_of(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", outside_of_code(text))


def anchors_of(text: str) -> set[str]:
    """The anchors of a page, as mkdocs and GitHub make them of headings, and those of what the API names."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    slugs = {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def rewrite(pages: Iterable[Path], rewritten: Callable[[str], str]) -> None:
    """Lists pages that are not what the records have or, with `--write`, writes them."""
    parser = argparse.ArgumentParser(description="Lists pages that differ from what is recorded.")
    parser.add_argument("--write", action="store_true", help="write the pages as well")
    write = parser.parse_args().write
    for page in pages:
        if (text := rewritten(page.read_text())) != page.read_text():
            print(page)
            if write:
                page.write_text(text)


def import_example(name: str) -> ModuleType:
    """A script as a module; those that it imports from its own folder are found as when it runs."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def run_example(name: str, *arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script, which must end with the status."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env=environment, timeout=600)
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished
