"""`pyramid-cache bench caches`: figures by hand, what is counted against what the ops are given, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from transformers import Cache, DynamicCache

from pyramid_cache import ShadowKVCache
from pyramid_cache.caches import shadow_kv
from pyramid_cache.lab.bench import bench_tables, generation, gpu
from pyramid_cache.lab.bench.contenders import BASELINE, TRANSFORMERS, Contender, Workload, parse_contender
from pyramid_cache.lab.bench.generation import (
    Bench,
    FetchCounter,
    Measured,
    Settings,
    as_row,
    split_bytes,
    stage_shares,
)
from pyramid_cache.lab.bench.shapes import SHAPES, build_model
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.demo.timed_answers import generate


def tiny_model() -> tuple[torch.nn.Module, torch.Tensor]:
    return build_model("tiny", torch.device("cpu"), "float32", 0, lambda *progress: None)


def example(cache: str, batch_size: int, **figures: object) -> Measured:
    return Measured(cache, cache, 1000, batch_size, **figures)


class TestRows:
    def test_figures_by_hand(self) -> None:
        baseline = example(
            *(BASELINE, 2),
            prefill_rows=2,
            prefill_seconds=[1.0, 3.0, 2.0],
            step_seconds=[0.1, 0.2, 0.4],
            device_bytes=800,
        )
        measured = example(
            *("h2o:0.25", 2),
            prefill_rows=2,
            prefill_seconds=[1.5, 3.0, 4.0],
            step_seconds=[0.1, 0.1, 0.1],
            device_bytes=200,
        )
        row = as_row(measured, baseline)
        assert (row["prefill_ratio"], row["prefill_ratio_range"]) == (1.5, [1.0, 2.0])  # medians 3 and 2
        assert (row["step_ratio"], row["step_ratio_range"]) == (0.5, [0.25, 1.0])
        assert (row["tokens_per_second"], row["tokens_ratio"], row["bytes_ratio"]) == (20.0, 2.0, 0.25)

    def test_largest_batches_are_compared_by_their_tokens(self) -> None:
        """Two rows at 0.1 s and eight at 0.2 s: 20 and 40 tokens per second; steps of different batches have no ratio."""
        figures = {"prefill_rows": 1, "prefill_seconds": [1.0], "is_largest_batch": True}
        baseline = example(BASELINE, 2, step_seconds=[0.1], device_bytes=800, **figures)
        row = as_row(example("shadow:64", 8, step_seconds=[0.2], device_bytes=400, **figures), baseline)
        assert (row["tokens_ratio"], row["step_ratio"], row["bytes_ratio"]) == (2.0, None, 0.125)

    def test_without_a_baseline_there_are_no_ratios(self) -> None:
        row = as_row(example("h2o:0.25", 4, prefill_seconds=[1.0], step_seconds=[0.5]), None)
        assert row["tokens_per_second"] == 8.0
        assert row["step_ratio"] is row["prefill_ratio"] is row["tokens_ratio"] is row["bytes_ratio"] is None

    def test_prompts_of_another_number_of_rows_have_no_ratio(self) -> None:
        baseline = example(BASELINE, 4, prefill_rows=1, prefill_seconds=[1.0], step_seconds=[1.0], device_bytes=4)
        measured = example("static", 4, prefill_rows=4, prefill_seconds=[4.0], step_seconds=[1.0], device_bytes=4)
        row = as_row(measured, baseline)
        assert (row["prefill_ratio"], row["step_ratio"]) == (None, 1.0)

    def test_table_shows_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        figures = {"prefill_rows": 2, "host_bytes": 4 << 20, "stages": {"select_chunks": 0.25, "other": 0.75}}
        baseline = example(
            BASELINE, 2, prefill_rows=2, prefill_seconds=[1.0], step_seconds=[0.1], device_bytes=8 << 20
        )
        measured = example(
            *("shadow:64", 2),
            prefill_seconds=[1.5],
            step_seconds=[0.05],
            device_bytes=2 << 20,
            fetched_bytes=3 << 20,
            **figures,
        )
        failed = as_row(example("static", 2, failure="out of memory"), baseline)
        bench_tables.print_caches(bench_tables.report_console(), [as_row(measured, baseline), failed])
        printed = capsys.readouterr().out
        for cell in (
            "1,000",
            "1.50×",
            "50.000",
            "0.50×",
            "40.0",
            "2.00×",
            "1.0",
            "0.25×",
            "2.0",
            "select_chunks 25%",
            "3.00",
        ):
            assert cell in printed
        assert "out of memory" in printed


class TestStages:
    def test_shares_by_hand(self) -> None:
        events = [
            cpu_event("pyramid_cache::select_chunks", self_time=1.0, total=4.0),
            cpu_event("aten::matmul", self_time=3.0, total=3.0),  # within it
            cpu_event("aten::linear", self_time=0.0, total=10.0),
            cpu_event("aten::addmm", self_time=10.0, total=10.0),  # within it
            cpu_event("aten::scaled_dot_product_attention", self_time=2.0, total=2.0),
            cpu_event("aten::add", self_time=4.0, total=4.0),
        ]
        assert stage_shares(events, "cpu") == pytest.approx(
            {"attention": 0.1, "linear layers": 0.5, "select_chunks": 0.2, "other": 0.2}
        )

    def test_on_cuda_time_is_that_of_kernels(self) -> None:
        events = [
            cuda_event("pyramid_cache::gather_values", DeviceType.CPU, self_time=0.0, total=3.0),
            cuda_event("gather_kernel", DeviceType.CUDA, self_time=3.0, total=3.0),
            cuda_event("add_kernel", DeviceType.CUDA, self_time=1.0, total=1.0),
            cuda_event("ProfilerStep", DeviceType.CUDA, self_time=9.0, total=9.0, is_user_annotation=True),
        ]
        assert stage_shares(events, "cuda") == {"gather_values": 0.75, "other": 0.25}

    def test_nothing_profiled_has_no_shares(self) -> None:
        assert stage_shares([], "cpu") == {}


def cpu_event(key: str, self_time: float, total: float) -> SimpleNamespace:
    return SimpleNamespace(key=key, device_type=DeviceType.CPU, self_cpu_time_total=self_time, cpu_time_total=total)


def cuda_event(
    key: str, device_type: DeviceType, self_time: float, total: float, is_user_annotation: bool = False
) -> SimpleNamespace:
    times = {"self_device_time_total": self_time, "device_time_total": total}
    return SimpleNamespace(key=key, device_type=device_type, is_user_annotation=is_user_annotation, **times)


def test_fetched_bytes_are_those_of_the_chunks_that_the_op_is_told_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model()
    cache = ShadowKVCache(model.config, 32, rank=16, chunk_size=4, num_outlier_chunks=1)
    ids = tokens[:300].expand(2, -1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    brought = []
    plan = shadow_kv.plan_chunks

    def noting(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        incoming = plan(held, wanted)
        brought.append(int((incoming >= 0).sum()))
        return incoming

    monkeypatch.setattr(shadow_kv, "plan_chunks", noting)
    counter = FetchCounter(cache)
    generate(model, torch.cat([ids, ids[:, :1]], dim=1), cache, 6, counter)
    assert len(brought) == 6 * 2  # steps and layers; no tail is full yet
    assert sum(brought[2:]) > 0
    # Of a chunk 4 tokens, of 16 numbers of 4 bytes; the first step is what the others are compared with.
    assert counter.bytes_per_step == sum(brought[2:]) * 4 * 16 * 4 / 5
    assert FetchCounter(DynamicCache()).bytes_per_step is None


class TestMeasuring:
    def test_all_caches_on_the_cpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path, picture = tmp_path / "record.json", tmp_path / "picture.png"
        arguments = [
            "bench",
            "caches",
            "--model",
            "tiny",
            "--lengths",
            "600",
            "--batch-sizes",
            "3,1",
            "--new-tokens",
            "4",
        ]
        names = "static,h2o:0.25,pyramid:0.4,shadow:32,streaming:100"
        arguments += ["--caches", names, "--device", "cpu", "--stages", "--json", str(path), "--plot", str(picture)]
        assert main([*arguments, "--prefill-rows", "one"]) == 0
        record = json.loads(path.read_text())
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert "--caches static,h2o:0.25,pyramid:0.4,shadow:32,streaming:100 --lengths 600" in record["command"]
        labels = ["DynamicCache", "StaticCache", "H2OCache, 0.25", "PyramidCache(model), 0.4", "ShadowKVCache, 32"]
        rows = {(row["label"], row["batch_size"]): row for row in record["rows"]}
        assert list(rows) == [(label, size) for label in (*labels, "StreamingLLMCache, 100") for size in (1, 3)]
        for (label, batch_size), row in rows.items():
            assert len(row["step_seconds"]) == len(row["prefill_seconds"]) == 2
            assert row["prefill_rows"] == (batch_size if label == "StaticCache" else 1)
            baseline = rows["DynamicCache", batch_size]
            assert row["bytes_ratio"] == pytest.approx(row["device_bytes"] / baseline["device_bytes"])
            assert sum(row["stages"].values()) == pytest.approx(1)
            assert (row["fetched_bytes"] is not None) == label.startswith("ShadowKV")
            assert row["is_largest_batch"] is False and row["decode_peak_bytes"] is None
        # Two layers and two heads of 16 numbers of 4 bytes, keys and values. A run is 2 + 4 steps and the first; behind that
        # of one row are 4 steps and the first of a profile, then the run of three rows.
        seen = {1: 600 + 7, 3: 600 + 7 + 5 + 7}
        for batch_size, num_tokens in seen.items():
            assert rows["DynamicCache", batch_size]["device_bytes"] == batch_size * num_tokens * 2 * 2 * 2 * 16 * 4
        assert 0.2 < rows["H2OCache, 0.25", 3]["bytes_ratio"] < 0.3
        assert rows["ShadowKVCache, 32", 3]["host_bytes"] > 0
        printed = capsys.readouterr().out
        for text in ("tiny", "ShadowKVCache, 32", "select_chunks", "ratios are to DynamicCache"):
            assert text in printed

    def test_quantized_cache_by_hand(self, tmp_path: Path) -> None:
        pytest.importorskip("optimum.quanto")
        path = tmp_path / "record.json"
        arguments = "bench caches --model tiny --caches quantized --lengths 600 --rounds 1 --new-tokens 4 --device cpu"
        assert main([*arguments.split(), "--json", str(path)]) == 0
        [full, quantized] = json.loads(path.read_text())["rows"]
        assert (quantized["label"], quantized["failure"], quantized["host_bytes"]) == (
            "QuantizedCache, 4 bits",
            None,
            0,
        )
        assert len(quantized["step_seconds"]) == 1
        # Of two layers, keys and values: the prompt's 600 tokens in half a byte a number, with a scale and a shift of 4 bytes for
        # 64 of them, and the 7 later ones as they are.
        numbers = 600 * 2 * 16
        assert quantized["device_bytes"] == 2 * 2 * (numbers // 2 + numbers // 64 * 8 + 7 * 2 * 16 * 4)
        assert quantized["bytes_ratio"] == quantized["device_bytes"] / full["device_bytes"]

    def test_rows_that_are_copied_decode_as_rows_that_are_read(self) -> None:
        model, tokens = tiny_model()
        sequences = []
        for prefill_rows in ("one", "batch"):
            settings = Settings([200], [2], new_tokens=3, rounds=1, prefill_rows=prefill_rows)
            bench = Bench(model, tokens, [parse_contender("h2o:40")], settings, lambda *progress: None)
            contender = bench.contenders[1]
            with torch.no_grad():
                cache, ids, _ = bench._read(contender, 200, 1 if prefill_rows == "one" else 2, 2)
                cache, ids = bench._with_rows(cache, ids, 2)
                sequences.append(bench._decode(cache, ids)[0])
        torch.testing.assert_close(sequences[0], sequences[1], rtol=0, atol=0)

    def test_what_does_not_fit_is_a_row_with_its_reason(self) -> None:
        model, tokens = tiny_model()

        class Full(DynamicCache):
            def update(self, key: torch.Tensor, *rest: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
                if key.shape[0] > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
                return super().update(key, *rest, **named)

        full = Contender("full", "Full", lambda model, workload: Full(config=model.config))
        settings = Settings([100], [1, 2], new_tokens=2, rounds=1)
        rows = Bench(model, tokens, [full], settings, lambda *progress: None).run()
        failures = {(row["cache"], row["batch_size"]): row["failure"] for row in rows}
        assert failures == {
            (BASELINE, 1): None,
            (BASELINE, 2): None,
            ("full", 1): None,
            ("full", 2): "CUDA out of memory.",
        }

    def test_largest_batch_by_hand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row takes 1 MB of the device and 2 of the host, in two layers of which one is doubled while rows are copied."""
        model, tokens = tiny_model()
        bench = Bench(model, tokens, [], Settings([100], [1]), lambda *progress: None)
        free = {"cpu": 100_000_000}
        cache = SimpleNamespace(layers=[None, None])
        monkeypatch.setattr(generation, "HEADROOM_BYTES", 500_000)
        monkeypatch.setattr(
            generation, "free_memory", lambda device: free[device.type] if device != bench.device else 10_000_000
        )
        monkeypatch.setattr(generation, "split_bytes", lambda cache: (2_000_000, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_000_000)
        bench.device = torch.device("meta")
        # (10 + 1 + 2 - 0.5) / 1.5 rows
        assert bench._largest_batch(cache, 2) == (8, "device")
        monkeypatch.setattr(generation, "split_bytes", lambda cache: (2_000_000, 4_000_000))
        assert bench._largest_batch(cache, 2) == (8, "device")
        free["cpu"] = 10_000_000  # 0.6 of it, and the 4 it holds; 3 for a row
        assert bench._largest_batch(cache, 2) == (3, "host")


class TestContenders:
    @pytest.mark.parametrize(
        "text", ["h2o:0.3", "streaming:77", "streaming-dense:0.5", "shadow:64", "shadow:0.25", "snapkv:99"]
    )
    def test_budgets_are_what_the_caches_get(self, text: str) -> None:
        model, tokens = tiny_model()
        contender = parse_contender(text)
        cache = contender.build(model, Workload(200, 1, 300))
        with torch.no_grad():
            model(tokens[:200][None], past_key_values=cache)
        kept = {"h2o:0.3": 60, "streaming:77": 77, "streaming-dense:0.5": 100, "snapkv:99": 99}
        if text in kept:
            assert cache.num_kept_tokens() == [kept[text]] * 2
        else:
            assert cache.compressed_layers[0].budget == (64 if text == "shadow:64" else 0.25)

    def test_bytes_are_split_by_where_they_lie(self) -> None:
        model, tokens = tiny_model()
        caches: list[Cache] = [
            DynamicCache(config=model.config),
            ShadowKVCache(model.config, 32, rank=16, num_outlier_chunks=1),
        ]
        with torch.no_grad():
            for cache in caches:
                model(tokens[:300][None], past_key_values=cache)
        assert split_bytes(caches[0]) == (300 * 2 * 2 * 2 * 16 * 4, 0)
        device, host = split_bytes(caches[1])
        assert host == sum(layer.host_values.untyped_storage().nbytes() for layer in caches[1].compressed_layers)
        assert device == caches[1].nbytes - host

    def test_published_shapes(self) -> None:
        """Bytes of a token of the full cache in bfloat16: 128 KiB of Llama 3.1 8B, 800 KiB of Llama 2 13B."""
        sizes = {}
        for name, build in SHAPES.items():
            config = build()
            sizes[name] = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 2
        assert sizes["llama-3.1-8b"] == 128 * 1024
        assert sizes["llama-2-13b"] == 800 * 1024

    def test_those_of_transformers_have_no_budget(self) -> None:
        assert parse_contender("static") is TRANSFORMERS["static"]
        with pytest.raises(ValueError, match="those of transformers have no budget"):
            parse_contender("static:0.5")


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["caches", "--caches", "h3o"], 2, "'h3o' is no cache"),
        (["caches", "--caches", "h2o:1.5"], 2, "a budget is a number of tokens or a fraction"),
        (["caches", "--caches", "h2o:x"], 2, "a budget is a number of tokens or a fraction"),
        (
            ["caches", "--model", "tiny", "--device", "cpu", "--largest-batch"],
            2,
            "--largest-batch fills the memory of a CUDA device",
        ),
        (
            ["caches", "--model", "tiny", "--device", "cpu", "--lengths", "131072"],
            2,
            "but the model was made for 131,072",
        ),
        (
            ["caches", "--model", "tiny", "--device", "cpu", "--lengths", "500000"],
            2,
            "exceeds the 131,072 tokens that there",
        ),
        (["caches", "--plot", "picture.doc"], 2, "must end in one of"),
        (["caches", "--model", "tiny", "--device", "cpu", "--caches", "offloaded"], 2, "another --device than cpu"),
        (["caches", "--model", "tiny", "--plot", "missing/picture.png"], 2, "a file in a folder that exists"),
        (["--suite", "cpu", "caches"], 2, "give --suite or caches, not both"),
        (["--suite", "cpu", "--parts", "ops"], 2, "--parts are of `bench --suite gpu`"),
        (["--parts", "ops", "caches"], 2, "--parts are of `bench --suite gpu`"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["bench", *arguments]) == status
    except SystemExit as caught:
        assert caught.code == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_tokens_are_written_for_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    assert main(["bench", "caches", "--model", "tiny", "--lengths", "30,50", "--save-tokens", str(path)]) == 0
    assert json.loads(path.read_text()) == tiny_model()[1][:50].tolist()


def test_numbers_that_come_twice_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    arguments = [
        "bench",
        "caches",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--lengths",
        "64,64",
        "--batch-sizes",
        "2,1,2",
    ]
    assert main([*arguments, "--caches", "dynamic", "--rounds", "1", "--new-tokens", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch_size"], len(row["step_seconds"])) for row in rows] == [(1, 1), (2, 1)]


def test_part_of_the_gpu_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite runs, with a model for the CPU."""
    for run in gpu.CACHE_RUNS:
        assert (run["model"], run["largest_batch"], run["stages"]) == ("llama-3.1-8b", True, True)
    assert [run["caches"][1] for run in gpu.CACHE_RUNS] == ["shadow:1024", "shadow:2048"]
    run = {"model": "tiny", "device": torch.device("cpu"), "caches": ["shadow:32"], "lengths": [300], "rounds": 1}
    monkeypatch.setattr(gpu, "CACHE_RUNS", [run, run | {"lengths": [320]}])
    assert gpu.main("caches", tmp_path / "rows.json") == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [[row["length"] for row in run["rows"]] for run in record["runs"]] == [[300, 300], [320, 320]]
