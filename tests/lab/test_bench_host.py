"""`pyramid-cache bench host`: what a cache does more than DynamicCache, where that is known, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PretrainedConfig

from pyramid_cache.lab.bench import bench_command, host_costs
from pyramid_cache.lab.bench.bench_command import build_model, parse
from pyramid_cache.lab.bench.cache_times import contenders_of
from pyramid_cache.lab.bench.host_costs import COUNTS, measure_cache, num_later
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.registry import CACHES, CacheEntry, Contender


NUM_STEPS, PROMPT_LENGTH = 4, 100
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_costs, "WARM_UP_STEPS", 4)


class Costly(DynamicCache):
    """DynamicCache with three more calls of Python functions in each layer: `update`, `work` and what `work` calls."""

    do: Callable[[torch.Tensor], Any]

    def __init__(self, config: PretrainedConfig, budget: float) -> None:
        super().__init__(config=config)

    def update(self, key: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.work(key)
        return Cache.update(self, key, *rest, **named)

    def work(self, key: torch.Tensor) -> None:
        Costly.do(key)


def rows_of(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Rows of caches that are counted one after the other, of which the first is the baseline."""
    model, tokens = build_model("tiny", CPU, "float32", 0, lambda *progress: None)
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        baseline = rows[0] if rows else None
        rows.append(
            measure_cache(model, contender, tokens[: PROMPT_LENGTH + num_later(NUM_STEPS)], NUM_STEPS, baseline)
        )
    return rows


@pytest.mark.parametrize(
    "do, expected",
    [
        (lambda key: key.add(1).mul(2), (5, 2, 0, 0)),
        (lambda key: key.unsqueeze(0), (4, 0, 1, 0)),
        (lambda key: key.sum().item(), (5, 2, 0, 1)),
        (lambda key: key.tolist(), (4, 0, 0, 1)),
        (lambda key: key.nonzero(), (4, 1, 0, 1)),
        (lambda key: key[key.sum(dim=(1, 2, 3)).mul(0).long()], (6, 4, 0, 0)),
        # Operators are no calls.
        (lambda key: key[key > 0], (3, 2, 0, 1)),
        (lambda key: key + key, (3, 1, 0, 0)),
    ],
)
def test_what_a_cache_does_more_is_counted(
    do: Callable[[torch.Tensor], Any], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costly, "do", do, raising=False)
    costly = Contender(CacheEntry("costly", "Costly", Costly), 0.25)
    baseline, row = rows_of([*contenders_of([], []), costly])
    # Calls of the model, per layer: more than of its linear layers, norms, rotation and attention alone.
    assert baseline["calls"] > 100 and baseline["ops"] > 20 and baseline["views"] > 10 and baseline["waits"] == 0
    assert [baseline[f"more_{name}"] for name in COUNTS] == [None] * 4
    assert [row[f"more_{name}"] for name in COUNTS] == pytest.approx(expected)
    assert [row[name] - baseline[name] for name in COUNTS] == pytest.approx(expected)


def test_counts_do_not_depend_on_the_caches_before() -> None:
    dynamic, knorm, pyramid, shadow = contenders_of(["knorm", "pyramid", "shadow"], [0.25])
    order = [dynamic, knorm, shadow, pyramid, shadow, knorm, dynamic]
    rows = [{name: row[name] for name in ("cache", *COUNTS)} for row in rows_of(order)]
    assert rows == [rows[0], rows[1], rows[2], rows[3], rows[2], rows[1], rows[0]]
    assert len({row["calls"] for row in rows}) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    arguments = f"bench --json {path} host --caches AdaKVCache,static --layers 2 --prompt-length 200 --steps 32"
    assert main(arguments.split()) == 0
    record = json.loads(path.read_text())
    command = "host --caches adakv,static --budgets 0.25 --layers 2 --prompt-length 200 --steps 32 --seed 0"
    assert record["command"] == f"pyramid-cache bench {command}"
    assert {"device", "machine", "versions", "threads"} <= set(record)
    rows = {row["cache"]: row for row in record["rows"]}
    assert list(rows) == ["dynamic", "adakv:0.25", "static"]
    # A layer asks how many tokens its heads keep at an eviction, one in 32 steps; one of two layers, for position ids.
    assert rows["adakv:0.25"]["waits"] == 1 / 32 + 1 / 2
    assert rows["adakv:0.25"]["more_calls"] > 50 > abs(rows["static"]["more_calls"])
    printed = capsys.readouterr().out
    for row in record["rows"]:
        [line] = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith(f"│ {row['label']} ")]
        numbers = [f"{row[name]:,.{2 if name == 'waits' else 1}f}" for name in COUNTS]
        assert [cell.strip() for cell in line[1::2]] == numbers
        is_first = row["cache"] == "dynamic"
        more = ["" if is_first else f"{row[f'more_{name}']:+,.1f}" for name in ("calls", "ops", "views")]
        assert [cell.strip() for cell in line[2:7:2]] == more
    assert parse(bench_command.add_host_options, "").caches == list(CACHES)


def test_more_tokens_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "host", "--prompt-length", "131072"]) == 2
    assert "131,140 tokens; there are 131,072" in capsys.readouterr().err
