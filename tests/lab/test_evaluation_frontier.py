"""One picture of several records: which rows count, which are on the frontier, and which records are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.frontier import frontier_of, read_rows
from pyramid_cache.lab.registry import BASELINE, find_entry


def row(cache: str, budget: float, exact_match: float, held_share: float, likelihoods: list[float]) -> dict[str, Any]:
    found = {"task": "made-up-64", "protocol": "context", "cache": cache, "budget": budget, "num_cases": 2}
    found |= {"label": cache if ":old" in cache else find_entry(cache).label}
    return found | {"exact_match": exact_match, "held_share": held_share, "cases": {"log_likelihood": likelihoods}}


def write(path: Path, *rows: dict[str, Any], **settings: Any) -> Path:
    path.write_text(
        json.dumps({"rows": rows, "settings": {"model": "small", "dtype": "float32", "seed": 0} | settings})
    )
    return path


def test_the_frontier_is_what_nothing_surpasses() -> None:
    places = [(0.1, 0.2), (0.1, 0.4), (0.2, 0.4), (0.3, 0.3), (0.4, 0.6), (0.5, 0.6), (0.05, 0.0)]
    rows = [row("knorm", 0.5, exact_match, held_share, []) for held_share, exact_match in places]
    assert frontier_of(rows) == [rows[1], rows[4]]


def test_records_of_the_same_cases_become_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, other = (row(BASELINE, 1.0, 0.9, 1.0, likelihoods) for likelihoods in ([-1.0, -2.0], [-1.004, -2.0]))
    old, gone = row("knorm", 0.5, 0.3, 0.5, []), row("knorm:old=1", 0.5, 1.0, 0.5, [])
    new, quantized = row("knorm", 0.5, 0.4, 0.5, []), row("snapkv:quantize=kivi4", 0.5, 0.8, 0.1, [])
    elsewhere = full | {"protocol": "question"}
    first = write(tmp_path / "first.json", elsewhere, full, old, gone)
    second = write(tmp_path / "second.json", other, new, quantized)
    rows = read_rows([first, second], "made-up-64", "context")
    assert rows == [other, new, quantized]
    wrong = {
        "is not of the same cases as": [
            write(tmp_path / "cases.json", row(BASELINE, 1.0, 0.9, 1.0, [-1.0, -2.5])),
            write(tmp_path / "count.json", row(BASELINE, 1.0, 0.9, 1.0, [-1.0])),
            write(tmp_path / "model.json", full, model="other"),
        ],
        "has no rows of made-up-64, context first": [write(tmp_path / "protocol.json", elsewhere)],
        "is no record": [tmp_path / "missing.json"],
    }
    for message, paths in wrong.items():
        for path in paths:
            with pytest.raises(ValueError, match=f"{path.name} {message}"):
                read_rows([first, path], "made-up-64", "context")
    renamed = [row_ | {"task": "needles-8-64"} for row_ in rows]
    record = write(tmp_path / "record.json", *renamed)
    command = f"eval --tasks needles-8-64 --protocols context --plot {tmp_path}/plot.png --records {record}"
    assert main(command.split()) == 0
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and "plot.png" in capsys.readouterr().err
    # A row that is surpassed is drawn too.
    assert main([*command.split()[:-1], str(write(tmp_path / "less.json", renamed[0], renamed[2]))]) == 0
    assert (tmp_path / "plot.png").read_bytes() != picture
