"""`pyramid-cache bench caches`: figures by hand, and what is counted against what the ops are given."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PretrainedConfig

from pyramid_cache import ShadowKVCache
from pyramid_cache.caches.shadow_kv import step
from pyramid_cache.lab import registry
from pyramid_cache.lab.bench.bench_command import add_caches_options, build_model, parse
from pyramid_cache.lab.bench.cache_times import Bench, FetchCounter, Measured, as_row, split_bytes
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.registry import BASELINE
from pyramid_cache.lab.timed_generation import generate


def tiny_model() -> tuple[torch.nn.Module, torch.Tensor]:
    return build_model("tiny", torch.device("cpu"), "float32", 0, lambda *progress: None)


def tiny_bench(options: str) -> Bench:
    return Bench(*tiny_model(), parse(add_caches_options, options), lambda *progress: None)


def measured(cache: str, batch_size: int, rows: int, prefill: list[float], step: list[float], size: int) -> Measured:
    figures = {"prefill_rows": rows, "prefill_seconds": prefill, "step_seconds": step, "device_bytes": size}
    return Measured(cache, cache, 1000, batch_size, **figures)


def test_figures_by_hand() -> None:
    baseline = measured(BASELINE, 2, 2, [1.0, 3.0, 2.0], [0.1, 0.2, 0.4], 800)
    row = as_row(measured("h2o:0.25", 2, 2, [1.5, 3.0, 4.0], [0.1, 0.1, 0.1], 200), baseline)
    assert (row["prefill_ratio_range"], row["step_ratio_range"]) == ([1.0, 2.0], [0.25, 1.0])
    names = ("prefill_ratio", "step_ratio", "tokens_ratio", "bytes_ratio", "tokens_per_second")
    for own, other, figures in (
        (("h2o:0.25", 2, 2, [1.5, 3.0, 4.0], [0.1, 0.1, 0.1], 200), baseline, (1.5, 0.5, 2, 0.25, 20)),
        # Largest batches: two rows at 0.2 s and eight at 0.2 s. Steps of different batches have no ratio.
        (("shadow:64", 8, 2, [1.0], [0.2], 400), baseline, (0.5, None, 4, 0.125, 40)),
        # Prompts of another number of rows have none either.
        (("static", 2, 4, [4.0], [0.2], 800), baseline, (None, 1, 1, 1, 10)),
        (("h2o:0.25", 4, 1, [1.0], [0.5], 4), None, (None, None, None, None, 8)),
    ):
        row = as_row(measured(*own), other)
        assert tuple(row[name] for name in names) == figures


def test_fetched_bytes_are_those_of_the_chunks_that_the_op_is_told_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model()
    cache = ShadowKVCache(model.config, 32, rank=16, chunk_size=4, num_outlier_chunks=1)
    ids = tokens[:300].expand(2, -1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    # Values lie on the host.
    device, host = split_bytes(cache)
    assert host == sum(layer.shadow.values.tensor.untyped_storage().nbytes() for layer in cache.compressed_layers) > 0
    assert device == cache.nbytes - host
    brought = []
    plan = step.plan_chunks_unchecked

    def noting(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        incoming = plan(held, wanted)
        brought.append(int((incoming >= 0).sum()))
        return incoming

    monkeypatch.setattr(step, "plan_chunks_unchecked", noting)
    counter = FetchCounter(cache)
    generate(model, torch.cat([ids, ids[:, :1]], dim=1), cache, 6, counter)
    assert len(brought) == 6 * 2  # steps and layers; no tail is full yet
    assert sum(brought[2:]) > 0
    # Of a chunk 4 tokens, of 16 numbers of 4 bytes; the first step is what the others are compared with.
    assert counter.bytes_per_step == sum(brought[2:]) * 4 * 16 * 4 / 5
    assert FetchCounter(DynamicCache()).bytes_per_step is None


def test_caches_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optimum.quanto")
    path, picture = tmp_path / "record.json", tmp_path / "picture.png"
    arguments = "bench caches --model tiny --device cpu --lengths 600,600 --batch-sizes 3,1,3 --new-tokens 4 --stages "
    arguments += "--caches static,H2OCache,quantized,shadow,streaming,static --budgets 0.25,100 --prefill-rows one"
    assert main([*arguments.split(), "--json", str(path), "--plot", str(picture)]) == 0
    record = json.loads(path.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    command = "--caches static,h2o,quantized,shadow,streaming --budgets 0.25,100 --lengths 600"
    assert record["command"].startswith(f"pyramid-cache bench caches --model tiny {command} ")
    names = ["dynamic", "static", "h2o:0.25", "h2o:100", "quantized", "shadow:0.25", "shadow:100"]
    rows = {(row["cache"], row["batch_size"]): row for row in record["rows"]}
    assert list(rows) == [(name, size) for name in (*names, "streaming:0.25", "streaming:100") for size in (1, 3)]
    for (name, batch_size), row in rows.items():
        assert row["failure"] is None
        assert len(row["step_seconds"]) == len(row["prefill_seconds"]) == 2
        assert row["prefill_rows"] == (batch_size if name in ("static", "quantized") else 1)
        assert row["bytes_ratio"] == pytest.approx(row["device_bytes"] / rows["dynamic", batch_size]["device_bytes"])
        assert sum(row["stages"].values()) == pytest.approx(1)
        assert (row["fetched_bytes"] is not None) == name.startswith("shadow")
        assert (row["host_bytes"] > 0) == name.startswith("shadow")
        assert row["is_largest_batch"] is False and row["decode_peak_bytes"] is None
    # Two layers, keys and values of two heads of 16 numbers of 4 bytes. A run is 2 + 4 steps and the first. Behind the
    # run of one row are 4 steps and the first of a profile, then the run of three rows.
    token = 2 * 2 * 2 * 16 * 4
    assert [rows["dynamic", size]["device_bytes"] for size in (1, 3)] == [607 * token, 3 * (607 + 5 + 7) * token]
    # Half a byte a number of the prompt, a scale and a shift of 4 bytes for 64 of them; later tokens as they are.
    assert rows["quantized", 1]["device_bytes"] == 600 * token // 8 + 600 * token // 4 // 64 * 8 + 7 * token
    assert 0.2 < rows["h2o:0.25", 3]["bytes_ratio"] < 0.3
    # The window of 150 or 100 tokens does not grow with what is generated.
    sizes = [rows[f"streaming:{budget}", 1]["bytes_ratio"] for budget in (0.25, 100)]
    assert sizes == pytest.approx([154 / 607, 104 / 607], rel=0.05)  # two more keys of each of four sinks
    printed = capsys.readouterr().out
    for text in ("tiny", "ShadowKVCache, 100", "select_chunks", "Ratios are to DynamicCache"):
        assert text in printed


def test_rows_that_are_copied_decode_as_rows_that_are_read() -> None:
    sequences = []
    for num_rows in (1, 2):
        bench = tiny_bench("--caches h2o --budgets 40 --lengths 200 --batch-sizes 2 --new-tokens 3")
        with torch.no_grad():
            reading = bench._read(bench.contenders[1], 200, 2, num_rows)
            reading.set_rows(2)
            bench._decode(reading, 3)
        sequences.append(reading.ids)
    assert sequences[0].shape == (2, 207)
    torch.testing.assert_close(sequences[0], sequences[1], rtol=0, atol=0)


def test_what_does_not_fit_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(DynamicCache):
        def __init__(self, config: PretrainedConfig, budget: float) -> None:
            super().__init__(config=config)

        def update(self, key: torch.Tensor, *rest: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
            if key.shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
            return super().update(key, *rest, **named)

    monkeypatch.setitem(registry.CACHES, "full", registry.CacheEntry("full", "Full", Full))
    rows = tiny_bench("--caches full --lengths 100 --batch-sizes 1,2 --new-tokens 2 --rounds 1").run()
    failures = {(row["cache"], row["batch_size"]): row["failure"] for row in rows}
    expected = dict.fromkeys([(BASELINE, 1), (BASELINE, 2), ("full:0.25", 1)])
    assert failures == expected | {("full:0.25", 2): "CUDA out of memory."}
