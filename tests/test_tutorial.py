"""docs/write-a-policy.md: its code runs, and prints what it says."""

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


TUTORIAL = Path(__file__).parents[1] / "docs" / "write-a-policy.md"
NUMBER = r"-?\d+\.\d+"
# Shares of right answers may differ where torch rounds otherwise; 8 contexts have 1,792 questions.
TOLERANCE = 0.02


def same_output(printed: str, shown: str) -> bool:
    """Whether two texts are the same but for fractions that are close to each other."""
    numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (printed, shown)]
    return re.sub(NUMBER, "?", printed) == re.sub(NUMBER, "?", shown) and numbers[0] == pytest.approx(
        numbers[1], abs=TOLERANCE
    )


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    tutorial = ModuleType("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", tutorial)
    blocks = re.findall(r"```(python|text)\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    printed = ""
    for kind, text in blocks:
        if kind == "text":
            assert same_output(printed, text), f"printed:\n{printed}\nshown:\n{text}"
            printed = ""
            continue
        assert not printed, f"the tutorial does not show that its code prints:\n{printed}"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(text, str(TUTORIAL), "exec"), tutorial.__dict__)
        printed = output.getvalue()
    assert not printed
