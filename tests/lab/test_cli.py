"""The command line: what it reads, what it refuses, and how."""

import io
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pyramid_cache.lab.cli import build_parser, main
from pyramid_cache.lab.demo import demo_command
from pyramid_cache.lab.registry import BASELINE, CACHES, TRANSFORMERS, find_entry


# Commands with options, and what the line on stderr says. {model} is a folder with a model.
REFUSED = (
    ("demo --caches 'h2o:12 apples'", "12 apples"),
    ("demo --caches h2o:0", "keeps no token"),
    ("demo --later h2o:nan", "no share of the prompt"),
    ("demo --caches h2o", "'h2o' has no budget. Give one: h2o:0.25"),
    ("demo --caches h2o:0.5:0.25", "'h2o:0.5:0.25' has more than one budget: 0.5, 0.25"),
    ("demo --later dynamic:0.5", "'dynamic:0.5' takes no budget"),
    ("serve --budget 0.2,512", "'0.2,512' is 2 budgets: give one"),
    ("demo --model {model} --device cpu --caches streaming:3 --prompt-tokens 300", "budget=3"),
    ("demo --caches dynamic,lru", "'lru' is no cache. Choose from dynamic, static, "),
    ("demo --batch-size 0", "'0' is no whole number of at least 1"),
    ("demo --max-new-tokens 1", "'1' is no whole number of at least 2"),
    ("demo --device abacus", "'abacus' cannot be used"),
    ("demo --device meta", "'meta' cannot be used"),
    ("demo --prompt-file missing.txt", "is no file"),
    ("demo --prompt-file binary", "is no UTF-8 text"),
    ("demo --json missing/record.json", "must be a file in a folder that exists"),
    ("demo --out short.txt", "is no folder"),
    ("demo --model empty", "error: The model empty cannot be loaded: "),
    ("demo --model {model} --device cpu --prompt-tokens 9000", "9016 tokens exceed the 8192 positions"),
    ("demo --model {model} --device cpu --caches offloaded --prompt-tokens 300", "another device than the cpu"),
    ("profile --out missing/p.json", "must be a file in a folder that exists"),
    ("profile --out p.json --plot .", "--plot . cannot be written"),
    ("profile --out p.json --plot p.doc", "must end in one of"),
    ("profile --out p.json --text missing.txt", "is no file"),
    ("profile --out p.json --tokens 64", "must exceed the window of 64"),
    ("profile {model} --device cpu --out p.json --tokens 9000", "9000 tokens exceed the 8192 positions"),
    ("profile {model} --device cpu --out p.json --tokens 8000 --text short.txt", "Give fewer, or a longer --text"),
    ("", "the following arguments are required: COMMAND"),
    ("bench", "give `caches`, `decode`, `ops`, `host`, `serving` or --suite"),
    ("bench --suite cpu --json x caches", "give --suite or caches, not both"),
    ("bench --suite cpu --parts ops", "--parts, --seconds and --rehearse are for `bench --suite gpu`"),
    ("bench --rehearse --suite paper", "--parts, --seconds and --rehearse are for `bench --suite gpu`"),
    ("bench --suite gpu --parts ops,speed", "'speed' is none of decode, shadow, pyramid, tests, ops, "),
    ("bench --suite gpu", "needs a CUDA device"),
    ("bench ops --rounds 4", "'4' is no whole number of at least 5"),
    ("bench ops --device meta", "'meta' cannot be used"),
    ("bench ops --device cpu --heads 5 --kv-heads 3", "5 query heads cannot share 3 KV heads"),
    ("bench ops --device cpu --lengths 32", "A window of 64 rows is longer than 32 tokens"),
    ("bench ops --device cpu --lengths 99999999999", "Lower --lengths"),
    ("bench caches --lengths 64,x", "'x' is no whole number of at least 1"),
    ("bench caches --model tiny --device cpu --largest-batch", "--largest-batch fills the memory of a CUDA device"),
    ("bench caches --model tiny --device cpu --lengths 131072", "but the model was made for 131,072"),
    ("bench caches --model tiny --device cpu --lengths 500000", "exceeds the 131,072 tokens that there"),
    ("bench caches --model tiny --device cpu --caches offloaded", "choose another device than the cpu"),
    ("bench decode --ways eager,lazy", "'lazy' is none of eager, compiled"),
    ("bench decode --model tiny --device cpu --lengths 131072", "but the model was made for 131,072"),
    ("bench decode --model tiny --device cpu --lengths 300 --budgets 3 --caches streaming", "budget=3"),
    ("bench caches --plot picture.doc", "must end in one of"),
    ("bench caches --save-tokens missing/tokens.json", "a file in a folder that exists"),
    ("eval --caches static", "answers as the full cache does"),
    ("eval --budgets 512", "give fractions, 1.0 at most"),
    ("eval --caches snapkv:nbits=4", "'nbits=4' is no argument of `SnapKVCache`, which takes window_size=…"),
    ("eval --caches dynamic:offloading=true", "which takes none"),
    ("eval --plot picture.png", "give both of them"),
    ("eval --plot picture.png --records short.txt", "draws one task and one protocol"),
    ("eval --tasks recall-64 --protocols context --plot p.png --records short.txt", "short.txt is no record"),
    ("eval --protocols later", "context, question"),
    ("eval --tasks sorting", "There is no task 'sorting'"),
    ("eval --save-cases cases.json", "token ids of one model"),
    ("eval --json no/such/folder.json", "cannot be written"),
)
# What a command raises, and the exit status and the line that it becomes.
FAILURES = (
    (ValueError("a budget\nof two lines"), 2, "a budget of two lines"),
    (NotImplementedError("not with flex"), 2, "not with flex"),
    (ModuleNotFoundError(name="rich"), 1, "the package `rich` is missing; run: pip install 'pyramid_cache[demo]'"),
    (OSError("disk full"), 1, "disk full"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
    (RuntimeError("cannot allocate memory"), 1, "cannot allocate memory"),
    (KeyboardInterrupt(), 130, "interrupted"),
)


def test_what_cannot_be_is_refused_with_one_line_and_status_2(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command, message in REFUSED:
        try:
            status = main(shlex.split(command.format(model=model_folder)))
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        line = printed.err.splitlines()[-1]
        assert re.match(r"pyramid-cache( \w+)*: error: ", line) and message in line, (command, line)
        assert (status, printed.out) == (2, "") and "Traceback" not in printed.err, command


def test_failure_is_one_line_and_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, status, line in FAILURES:
        monkeypatch.setattr(demo_command, "run", Mock(side_effect=error))
        assert main(["demo"]) == status
        assert capsys.readouterr().err == f"pyramid-cache: error: {line}\n"
    # What no user can mend keeps its traceback.
    for error in (RuntimeError("shapes differ"), ModuleNotFoundError(name="torch"), KeyError()):
        monkeypatch.setattr(demo_command, "run", Mock(side_effect=error))
        with pytest.raises(type(error)):
            main(["demo"])


def test_options_of_the_demo() -> None:
    def parse(*arguments: str):
        return build_parser().parse_args(["demo", *arguments])

    found = parse("--caches", "h2o:0.4, dynamic,H2OCache:0.4").caches
    assert [each.name for each in found] == ["h2o:0.4", "dynamic"]
    for text, expected in {"0.4": 0.4, "1.0": 1.0, "1": 1, "1024": 1024, "256MiB": "256MiB", "5e-1": 0.5}.items():
        [contender] = parse("--caches", f"h2o:{text}").caches
        assert (contender.budget, type(contender.budget)) == (expected, type(expected))
    for name, entry in (TRANSFORMERS | CACHES).items():
        assert find_entry(name) is entry
        assert find_entry(entry.cache_class.__name__).cache_class is entry.cache_class
    assert find_entry("PyramidCache").from_model and not find_entry("StreamingLLMCache").settings
    assert find_entry("DynamicCache").name == BASELINE
    given = find_entry("SnapKVCache:quantize=kivi4:window_size=8")
    assert (given.row, given.settings) == ("snapkv", {"quantize": "kivi4", "window_size": 8}) and given.quantizes
    assert (given.name, given.label) == ("snapkv:quantize=kivi4:window_size=8", "SnapKVCache(kivi4, window_size=8)")
    assert find_entry("h2o-merge:quantize=int8").label == "H2OCache(merge, int8)" and not find_entry("h2o").quantizes
    assert not find_entry("kivi:nbits=2").has_budget


def test_a_terminal_without_unicode_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit):
        main(["demo", "--caches", "•"])
    stream.flush()
    assert b"'?' is no cache" in stream.buffer.getvalue()
