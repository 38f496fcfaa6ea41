"""The command line: what it reads, what it refuses, and how."""

import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from pyramid_cache.lab.cli import build_parser, main
from pyramid_cache.lab.demo import demo_command
from pyramid_cache.lab.registry import BASELINE, CACHES, TRANSFORMERS, find_entry


def status_of(arguments: list[str]) -> int:
    """The exit status of a command, whoever refuses it."""
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code


# By command: its options, and what the line on stderr says. {model} is a folder with a model.
REFUSED = {
    "demo": [
        ("--budgets '12 apples'", "12 apples"),
        ("--budgets 0", "keeps no token"),
        ("--budgets -0.5", "-0.5"),
        ("--budgets 1.5", "no share of the prompt"),
        ("--budget nan", "no share of the prompt"),
        ("--budgets 0.2,512", "'0.2,512' is 2 budgets: give one"),
        ("--caches dynamic,lru", "'lru' is no cache. Choose from dynamic, static, "),
        ("--caches ,", "'' is no cache"),
        ("--batch-size 0", "'0' is no whole number of at least 1"),
        ("--max-new-tokens 1", "'1' is no whole number of at least 2"),
        ("--repeats two", "'two' is no whole number"),
        ("--device abacus", "'abacus' cannot be used"),
        ("--device meta", "'meta' cannot be used"),
        ("--dtype int3", "invalid choice: 'int3'"),
        ("--seed x", "invalid int value"),
        ("--no-such-option", "unrecognized arguments"),
        ("--prompt-file missing.txt", "is no file"),
        ("--json missing/record.json", "must be a file in a folder that exists"),
        ("--out short.txt", "is no folder"),
        ("--prompt-file binary", "is no UTF-8 text"),
        ("--model empty", "error: The model empty cannot be loaded: "),
        ("--model {model} --device cpu --prompt-tokens 9000", "9032 tokens exceed the 8192 positions"),
        ("--model {model} --device cpu --caches offloaded --prompt-tokens 300", "choose another device than the cpu"),
    ],
    "profile": [
        ("--out missing/p.json", "must be a file in a folder that exists"),
        ("--out p.json --plot .", "--plot . cannot be written"),
        ("--out p.json --plot p.doc", "must end in one of"),
        ("--out p.json --text missing.txt", "is no file"),
        ("--out p.json --tokens 64", "must exceed the window of 64"),
        ("{model} --device cpu --out p.json --tokens 9000", "9000 tokens exceed the 8192 positions"),
        ("{model} --device cpu --out p.json --tokens 8000 --text short.txt", "Give fewer, or a longer --text"),
    ],
    "": [("", "the following arguments are required: COMMAND")],
}


@pytest.mark.parametrize(
    "command, options, message", [(command, *row) for command, rows in REFUSED.items() for row in rows]
)
def test_what_cannot_be_is_refused_with_one_line_and_status_2(
    command: str,
    options: str,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    capsys.readouterr()
    assert status_of(shlex.split(f"{command} {options.format(model=model_folder)}")) == 2
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert re.match(r"pyramid-cache( \w+)?: error: ", line) and message in line
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("a budget\nof two lines"), 2, "a budget of two lines"),
        (NotImplementedError("not with flex"), 2, "not with flex"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"),
            1,
            "the package `rich` is missing; run: pip install 'pyramid_cache[demo]'",
        ),
        (OSError("disk full"), 1, "disk full"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
        (RuntimeError("cannot allocate memory"), 1, "cannot allocate memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        # What no user can mend keeps its traceback.
        (RuntimeError("shapes differ"), None, ""),
        (ModuleNotFoundError("torch", name="torch"), None, ""),
        (KeyError(), None, ""),
    ],
)
def test_failure_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int | None,
    line: str,
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(demo_command, "run", fail)
    if status is None:
        with pytest.raises(type(error)):
            main(["demo"])
        return
    assert main(["demo"]) == status
    assert capsys.readouterr().err == f"pyramid-cache: error: {line}\n"


def test_options_of_the_demo() -> None:
    def parse(*arguments: str):
        return build_parser().parse_args(["demo", *arguments])

    options = parse()
    assert options.caches == ["dynamic", "pyramid", "pyramid-config", "h2o", "streaming", "shadow"]
    assert (options.budgets, options.batch_size, options.repeats, options.seed) == (0.4, 1, 1, 0)
    assert options.prompt_tokens >= 3000
    assert parse("--caches", "h2o, dynamic,H2OCache").caches == ["h2o", "dynamic"]
    assert parse("--device", "cpu").device == torch.device("cpu")
    written = {"0.4": 0.4, "1.0": 1.0, "1": 1, "1024": 1024, "256MiB": "256MiB", "5e-1": 0.5}
    for text, expected in written.items():
        for option in ("--budgets", "--budget"):
            budget = parse(option, text).budgets
            assert (budget, type(budget)) == (expected, type(expected))


def test_every_cache_has_two_names() -> None:
    for name, entry in (TRANSFORMERS | CACHES).items():
        assert find_entry(name) is entry
        class_name = entry.cache_class.__name__
        assert find_entry(class_name).cache_class is entry.cache_class
    assert find_entry("PyramidCache").from_model
    assert not find_entry("StreamingLLMCache").settings
    assert find_entry("DynamicCache").name == BASELINE


def test_runs_as_a_module_on_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", ["cli.py", "demo", "--caches", "•"])
    monkeypatch.delitem(sys.modules, "pyramid_cache.lab.cli")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("pyramid_cache.lab.cli", run_name="__main__")
    assert caught.value.code == 2
    stream.flush()
    assert b"'?' is no cache" in stream.buffer.getvalue()
