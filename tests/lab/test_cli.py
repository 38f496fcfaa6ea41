"""The command line: what it refuses, and how."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyramid_cache.lab.cli import build_parser, main
from pyramid_cache.lab.demo import demo_command


def parse(*arguments: str):
    return build_parser().parse_args(["demo", *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "12 apples"], "12 apples"),
        (["--budget", "0"], "keeps no token"),
        (["--budget", "-0.5"], "-0.5"),
        (["--budget", "1.5"], "no share of the prompt"),
        (["--budget", "nan"], "no share of the prompt"),
        (["--caches", "dynamic,lru"], "dynamic, pyramid, pyramid-config, h2o, streaming"),
        (["--caches", ","], "is no comma-separated list"),
        (["--batch-size", "0"], "'0' is no whole number of at least 1"),
        (["--max-new-tokens", "1"], "'1' is no whole number of at least 2"),
        (["--repeats", "two"], "'two' is no whole number"),
        (["--device", "abacus"], "'abacus' cannot be used"),
        (["--device", "meta"], "'meta' cannot be used"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--seed", "x"], "invalid int value"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_bad_option_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "text, expected", [("0.4", 0.4), ("1.0", 1.0), ("1", 1), ("1024", 1024), ("256MiB", "256MiB"), ("5e-1", 0.5)]
)
def test_budget_is_read_as_it_is_written(text: str, expected: float | int | str) -> None:
    budget = parse("--budget", text).budget
    assert (budget, type(budget)) == (expected, type(expected))


def test_defaults() -> None:
    options = parse()
    assert options.caches == ["dynamic", "pyramid", "pyramid-config", "h2o", "streaming", "shadow"]
    assert (options.budget, options.batch_size, options.repeats, options.seed) == (0.4, 1, 1, 0)
    assert demo_command.DEFAULT_PROMPT_TOKENS >= 3000
    assert parse("--caches", "h2o, dynamic,h2o").caches == ["h2o", "dynamic"]
    assert parse("--device", "cpu").device == torch.device("cpu")


def fails_on_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command that must fail with one line; returns its status and that line."""
    status = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pyramid-cache: error: ")
    return status, lines[0]


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--prompt-file", "missing.txt", "is no file"),
        ("--json", "missing/record.json", "must be a file in a folder that exists"),
        ("--out", "text.txt", "is no folder"),
        ("--prompt-file", "binary", "is no UTF-8 text"),
    ],
)
def test_bad_path_is_refused_before_any_work(
    tmp_path: Path, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    status, line = fails_on_one_line(["demo", option, str(tmp_path / value)], capsys)
    assert status == 2
    assert message in line


def test_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "no-model"
    folder.mkdir()
    assert main(["demo", "--model", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # what it is about to load, and the error
    assert lines[1].startswith(f"pyramid-cache: error: The model {folder} cannot be loaded: ")


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("a budget\nof two lines"), 2, "a budget of two lines"),
        (NotImplementedError("not with flex"), 2, "not with flex"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 1, "pip install 'pyramid_cache[demo]'"),
        (OSError("disk full"), 1, "disk full"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
        (RuntimeError("cannot allocate memory"), 1, "cannot allocate memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(demo_command, "run", fail)
    assert fails_on_one_line(["demo"], capsys) == (status, f"pyramid-cache: error: {expected_line(error, message)}")


def expected_line(error: BaseException, message: str) -> str:
    return f"the package `rich` is missing; run: {message}" if isinstance(error, ModuleNotFoundError) else message


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ModuleNotFoundError("torch", name="torch"), KeyError()]
)
def test_defect_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What no user can mend keeps its traceback."""

    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(demo_command, "run", fail)
    with pytest.raises(type(error)):
        main(["demo"])


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_runs_as_a_module_on_a_terminal_without_unicode() -> None:
    arguments = [sys.executable, "-m", "pyramid_cache.lab.cli", "demo", "--caches", "•"]
    finished = subprocess.run(arguments, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"})
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
