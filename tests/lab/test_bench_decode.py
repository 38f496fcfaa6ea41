"""`pyramid-cache bench decode`: figures by hand, what is compiled, and rows that fail."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter
from transformers import DynamicCache, PretrainedConfig, StaticCache

from pyramid_cache.lab import registry
from pyramid_cache.lab.bench import decode_times, op_times
from pyramid_cache.lab.bench.bench_command import add_decode_options, build_model, parse
from pyramid_cache.lab.bench.decode_times import BlockClock, DecodeBench, Decoded, as_row, weight_bytes
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.registry import BASELINE
from pyramid_cache.lab.timed_generation import generate


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies, and graphs that are traced but not translated."""
    monkeypatch.setattr(op_times, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(op_times, "CPU_TURN_SECONDS", 1e-4)
    monkeypatch.setattr(decode_times, "BACKEND", "eager")


def tiny_bench(options: str) -> DecodeBench:
    model, tokens = build_model("tiny", torch.device("cpu"), "float32", 0, lambda *progress: None)
    return DecodeBench(model, tokens, parse(add_decode_options, options), lambda *progress: None)


def test_figures_by_hand() -> None:
    own = Decoded("h2o:0.25", "H2O", True, 1000, 8, [0.2, 0.1, 0.4], device_bytes=100)
    baseline = Decoded(BASELINE, "DynamicCache", False, 1000, 8, [0.4, 0.4, 0.4])
    static = Decoded("static", "StaticCache", True, 1000, 8, [0.1, 0.1, 0.1])
    row = as_row(own, baseline, static, num_bytes=1000, bandwidth=1e4)
    names = ("tokens_per_second", "step_ratio", "static_ratio", "floor_bytes", "floor_fraction")
    assert [row[name] for name in names] == pytest.approx([40, 0.5, 2, 1000, 0.5])
    assert row["step_ratio_range"] == pytest.approx([0.25, 1]) and row["static_ratio_range"] == pytest.approx([1, 4])
    # A step reads some of what lies on the host only. What failed is no baseline.
    own.host_bytes, baseline.failure = 1, "out of memory"
    row = as_row(own, baseline, None, num_bytes=1000, bandwidth=1e4)
    assert [row[name] for name in names] == pytest.approx([40, None, None, None, None])
    assert as_row(baseline, None, None, 1, 1)["tokens_per_second"] is None


def test_times_are_those_of_blocks_behind_the_untimed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second for each untimed step, two for each of the first 16 timed ones, four for the last three."""
    clock = BlockClock(torch.device("cpu"), 19)
    now = 0.0
    monkeypatch.setattr(clock, "note", lambda: clock.stamps.append(now))
    for step in range(40 + 19 + 1):
        now += 1 if step <= 40 else 2 if step <= 56 else 4
        if step == 50:
            monkeypatch.setitem(counters["stats"], "unique_graphs", counters["stats"]["unique_graphs"] + 1)
        assert clock(None, now) == now
    assert clock.warm_up_seconds == 40
    assert clock.step_seconds == pytest.approx((16 * 2 + 3 * 4) / 19)
    assert clock.block_seconds == [2, 4]
    assert [number - clock.num_graphs[0] for number in clock.num_graphs] == [0, 0, 1, 1]


def test_weights_that_a_step_reads() -> None:
    """An embedding table is looked up in; it is read whole where it is the output layer too."""
    model = tiny_bench("--lengths 8 --caches static").model
    weights = [weight.nbytes for weight in model.parameters()]
    assert weight_bytes(model) == sum(weights) - 512 * 64 * 4
    model.lm_head.weight = model.model.embed_tokens.weight
    assert weight_bytes(model) == sum(weights) - 512 * 64 * 4


def test_decode_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    arguments = "bench decode --model tiny --device cpu --lengths 300 --batch-sizes 2,1 --new-tokens 20 --rounds 2 "
    arguments += "--caches static,streaming,shadow --budgets 0.25 --threads 1"
    assert main([*arguments.split(), "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"].startswith("pyramid-cache bench decode --model tiny --caches static,streaming,shadow ")
    assert (record["compile_mode"], record["warm_up_steps"]) == ("default", 40)
    printed = capsys.readouterr().out
    for rows in (1, 2):
        found = {(row["cache"], row["is_compiled"]): row for row in record["rows"] if row["batch_size"] == rows}
        static = found["static", True]
        assert {(BASELINE, False), ("streaming:0.25", False), ("shadow:0.25", False)} <= set(found)
        for (name, is_compiled), row in found.items():
            assert (row["failure"], row["num_late_graphs"], row["skip_reasons"]) == (None, 0, [])
            # A cache of the second round is a new one, and has the graph of the first.
            assert row["num_graphs"] == is_compiled and (row["compile_seconds"] > 0) == is_compiled
            assert len(row["step_seconds"]) == 2 and len(row["block_seconds"]) == 4
            assert (row["floor_fraction"] is None) == name.startswith("shadow")
        # Two layers, keys and values of two heads of 16 numbers of 4 bytes; all steps of a run and two more.
        token = 2 * 2 * 2 * 16 * 4
        assert static["device_bytes"] == rows * (300 + 40 + 20 + 2) * token + 2 * 8
        assert found[BASELINE, False]["device_bytes"] == rows * (300 + 40 + 20 + 1) * token
        assert found["streaming:0.25", False]["device_bytes"] < 110 * rows * token
        assert static["floor_bytes"] == record["weight_bytes"] + static["device_bytes"]
    for text in ("compiled in mode default", "ShadowKVCache, 0.25", "to DynamicCache and to compiled StaticCache"):
        assert text in printed


def test_ways_and_rows_that_are_known() -> None:
    bench = tiny_bench("--lengths 90 --caches static,h2o --budgets 40 --new-tokens 2 --rounds 1 --ways eager")
    names = [(way.contender.name, way.is_compiled) for way in bench.ways[90, 1]]
    assert names == [(BASELINE, False), ("static", True), ("h2o:40", False)]
    rows = bench.run()
    rows[2]["failure"] = "OutOfMemoryError"
    other = dict(rows[0], length=91)
    bench = tiny_bench("--lengths 90 --caches static,h2o --budgets 40 --new-tokens 2 --rounds 1 --ways eager")
    bench.restore([*rows, other])
    later = bench.run()
    assert [row["step_seconds"] for row in later[:2]] == [row["step_seconds"] for row in rows[:2]]
    assert len(later) == 3 and later[2]["failure"] is None and later[2]["step_seconds"] != rows[2]["step_seconds"]


def test_a_copied_prompt_decodes_as_one_that_is_read() -> None:
    """StaticCache gets the keys and values that DynamicCache has read."""
    bench = tiny_bench("--lengths 90 --caches static --batch-sizes 2")
    sequences = []
    for way in bench.ways[90, 2]:
        with torch.no_grad():
            reading = bench._read(way.contender, 90, 2)
        assert isinstance(reading.cache, (DynamicCache, StaticCache)[way.is_compiled])
        sequences.append(generate(bench.model, reading.ids, reading.cache, 8)[0])
    assert sequences[0].shape == (2, 99) and torch.equal(*sequences)


def test_what_fails_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(DynamicCache):
        def __init__(self, config: PretrainedConfig, budget: float) -> None:
            super().__init__(config=config)

        def update(self, key: torch.Tensor, *rest: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
            log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to a test")
            if key.shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
            return super().update(key, *rest, **named)

    monkeypatch.setitem(registry.CACHES, "full", registry.CacheEntry("full", "Full", Full))
    arguments = "bench decode --model tiny --device cpu --caches full --lengths 60 --batch-sizes 1,2 --new-tokens 2"
    rows = tiny_bench(arguments.removeprefix("bench decode ")).run()
    failures = {(row["cache"], row["batch_size"]): row["failure"] for row in rows if not row["is_compiled"]}
    reason = "OutOfMemoryError: CUDA out of memory."
    assert failures == {(BASELINE, 1): None, (BASELINE, 2): None, ("full:0.25", 1): None, ("full:0.25", 2): reason}
    skipped = next(row for row in rows if (row["cache"], row["batch_size"]) == ("full:0.25", 1))
    assert skipped["num_skips"] > 0 and skipped["skip_reasons"] == ["skipping cudagraphs due to a test"]
    assert not any(row["num_skips"] for row in rows if row["cache"] == BASELINE)
    assert math.isfinite(skipped["step_ratio"])
    assert main([*arguments.split(), "--rounds", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Full, 0.25, eager, 60 tokens, 2 rows failed: {reason}" in printed
    assert "Full, 0.25, eager, 60 tokens, 1 rows: skipping cudagraphs due to a test" in printed
