"""`pyramid-cache bench ops` and `--suite gpu`: arithmetic against numbers worked out by hand, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramid_cache.lab.bench import bench_command, decode_times, gpu_parts, gpu_suite, op_times
from pyramid_cache.lab.bench.op_times import OPS, Shape, build_case, bytes_moved
from pyramid_cache.lab.cli import main


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_times, "COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(op_times, "CPU_TURN_SECONDS", 1e-4)


def small_shape(dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(40, dtype, CPU, batch_size=2, heads=4, kv_heads=2, head_dim=16, window=5)


def test_torch_takes_times_on_the_cpu_and_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    assert 0 < op_times.seconds_of(lambda: threads.append(torch.get_num_threads()), CPU) < 0.1
    assert set(threads) == {torch.get_num_threads()}
    assert op_times.copy_bandwidth(CPU) > 0
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda run, warmup, rep, return_mode: run())
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda run, rep, return_mode: 2 * run())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    device = torch.device("cuda", 0)
    assert op_times.seconds_of(lambda: 3.0, device) == 3e-3
    assert op_times.seconds_of(lambda: 3.0, device, in_graph=True) == 6e-3
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="triton, which is missing: pip install triton"):
        op_times.seconds_of(lambda: 3.0, device)


@pytest.mark.parametrize("op", OPS)
def test_both_ways_give_the_output_and_the_scores_are_the_probabilities(op: str) -> None:
    case = build_case(op, small_shape())
    query, key, _ = case.attention.args
    output, scores = case.with_scores()
    torch.testing.assert_close(output, case.attention())
    rows = query.shape[2]
    logits = query.double().view(2, 2, 2, rows, 16) @ key.double()[:, :, None].transpose(-1, -2) / 4
    if rows > 1:
        logits = logits.masked_fill(torch.ones(rows, 40, dtype=torch.bool).triu_(1), float("-inf"))
    expected = logits.softmax(dim=-1)[..., -5 if op == "window_scores" else -rows :, :].sum(dim=(2, 3))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


def test_bytes_moved() -> None:
    """At 9 of 3 heads of 64 and 64 tokens in float32."""
    shape = Shape(64, torch.float32, CPU, batch_size=1, heads=9, kv_heads=3, head_dim=64, window=64)
    query, key, lse, scores = 147_456, 49_152, 2_304, 768
    prefill = query + key + key + query + lse + scores
    decode = 2_304 + key + key + 2_304 + 36 + scores
    assert [bytes_moved(op, shape) for op in OPS] == [prefill, prefill, decode]


def test_figures_by_hand() -> None:
    shape = Shape(131072, torch.bfloat16, torch.device("cuda"), 1, heads=32, kv_heads=8, head_dim=128, window=64)
    times, graph_times = ([2e-3, 4e-3, 3e-3], [5e-3, 6e-3, 9e-3]), ([1e-3, 1e-3], [1.05e-3, 1.05e-3])
    row = op_times.as_row("decode_scores", shape, times, graph_times, bandwidth=1e12)
    num_bytes = 2 * 32 * 128 * 2 + 2 * 8 * 131072 * 128 * 2 + 32 * 4 + 8 * 131072 * 4
    wanted = {"attention_seconds": 3e-3, "with_scores_seconds": 6e-3, "ratio_to_attention": 2, "rounds": 3}
    wanted |= {"attention_seconds_minimum": 2e-3, "with_scores_seconds_minimum": 5e-3, "overhead_percent": 100}
    wanted |= {"spread": 2 / 3, "bytes": num_bytes, "bandwidth_fraction": num_bytes / 6e-3 / 1e12}
    wanted |= {"graph_rounds": 2, "graph_seconds": 1.05e-3, "attention_graph_seconds": 1e-3}
    wanted |= {"graph_ratio_to_attention": 1.05, "graph_bandwidth_fraction": num_bytes / 1.05e-3 / 1e12}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted) and num_bytes == 541_081_728
    without = op_times.as_row("decode_scores", shape, times, None, bandwidth=1e12)
    assert without == row | {name: None for name in row if "graph" in name}


def test_ops_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    arguments = f"bench --json {path} ops --device cpu --lengths 64,96 --rounds 5 --batch-size 2 --window 8"
    assert main([*arguments.split(), "--dtype", "float32", "bfloat16"]) == 0
    record = json.loads(path.read_text())
    assert {"device", "machine", "ratios"} <= set(record) and record["threads"] == torch.get_num_threads()
    assert {"torch", "triton", "transformers"} <= set(record["versions"])
    assert record["command"].startswith("pyramid-cache bench ops --device cpu --batch-size 2 --window 8 --rounds 5 ")
    assert "--lengths 64,96 --dtype float32 bfloat16 --heads 9 --kv-heads 3 --head-dim 64" in record["command"]
    wanted = [(op, length, dtype) for length in (64, 96) for dtype in ("float32", "bfloat16") for op in OPS]
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    for row, shape, line in zip(record["rows"], wanted, lines, strict=True):
        assert (row["op"], row["length"], row["dtype"]) == shape
        sizes = ("heads", "kv_heads", "head_dim", "batch_size", "window", "rounds", "graph_seconds", "recomputes_lse")
        assert [row[name] for name in sizes] == [9, 3, 64, 2, 8, 5, None, False]
        moved = row["bytes"] / row["with_scores_seconds"] / record["copy_bytes_per_second"]
        assert row["bandwidth_fraction"] == pytest.approx(moved)
        times = [f"{row[f'{name}_seconds'] * 1e3:,.3f}" for name in ("attention", "with_scores")]
        ratio = f"{row['with_scores_seconds'] / row['attention_seconds']:.2f}×"
        assert [cell.strip() for cell in line[:6]] == [row["op"], str(row["length"]), row["dtype"], *times, ratio]


TESTS = """
import os, signal, time
import pytest
pytestmark = pytest.mark.cuda
class TestSome:
    @pytest.mark.parametrize("text", ["a b", "c"])
    def test_passes(self, text): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("no fixture")
def test_is_in_error(broken): pass
def test_hangs():
    time.sleep(1)
    os.kill(os.getppid(), signal.SIGINT)  # as the suite does at the limit of a part
    time.sleep(600)
"""


def test_tests_that_ran_before_an_interrupt_are_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_unreadable.py").write_text("import no_such_package\nimport pytest\nmark = pytest.mark.cuda\n")
    (folder / "test_not_asked_for.py").write_text("import no_such_package\n")
    monkeypatch.setattr(gpu_suite, "TEST_PROCESSES", 1)
    part = gpu_suite.run_part("tests", tmp_path, tmp_path / "results.xml", 300)
    outcomes = part["result"]["outcomes"]
    assert outcomes == {
        "tests/test_some.py::TestSome::test_passes[a b]": "passed",
        "tests/test_some.py::TestSome::test_passes[c]": "passed",
        "tests/test_some.py::test_fails": "failed",
        "tests/test_some.py::test_is_skipped": "skipped",
        "tests/test_some.py::test_is_in_error": "error",
        "tests/test_unreadable.py": "error",
    }
    failed = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    assert part["failures"][0].startswith("exit status 2: ") and part["failures"][1:] == failed
    assert any("assert 1 == 2" in line for line in part["output_tail"])


def test_kernels_are_tested_first() -> None:
    command = gpu_suite.command_of("tests", Path(__file__).parents[2], Path("results.xml"), False)
    files = [word for word in command if word.endswith(".py")]
    kernels = [f"tests/ops/test_{name}kernels.py" for name in ("", "packed_", "shadow_")]
    assert {*kernels, "tests/ops/test_lse.py", "tests/test_cuda.py"} <= set(files)
    assert max(map(files.index, kernels)) < files.index("tests/test_cuda.py")


@pytest.fixture
def imaginary_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "Imaginary GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


# Writes its result, and prints how many parts the record had before it, and what its own file held.
PART = """
import pathlib, sys
result, text, record = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
print(record.read_text().count("wall_seconds") if record.exists() else 0, result.exists())
result.write_text(text)
"""


@pytest.mark.usefixtures("imaginary_gpu")
def test_a_suite_runs_its_parts_in_order_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(gpu_suite.PART_LIMITS.values()) + gpu_suite.END_SECONDS <= gpu_suite.ALL_SECONDS == 9 * 60
    path = tmp_path / "record.json"
    row = op_times.as_row("decode_scores", small_shape(), ([1.0], [1.5]), None, 1e9)
    case = '<testcase classname="tests.test_a" name="test_b" file="tests/test_a.py" />'
    ends = {"decode": "sys.exit('stopped')", "oracle": "sys.exit('no such kernel')"}

    def command_of(name: str, root: Path, result_path: Path, is_rehearsal: bool) -> list[str]:
        texts = {"tests": f"<testsuites>{case}</testsuites>", "ops": json.dumps({"rows": [row]})}
        text = texts.get(name, json.dumps({"runs": []} if name == "decode" else {"rows": []}))
        return [sys.executable, "-c", PART + ends.get(name, ""), str(result_path), text, str(path)]

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        return main(["bench", "--suite", "gpu", "--json", str(path), *options]), json.loads(path.read_text())

    monkeypatch.setattr(gpu_suite, "command_of", command_of)
    status, record = run("--parts", "decode, tests,ops")
    assert (status, record["is_complete"], record["device"]) == (1, True, "Imaginary GPU")
    assert record["chosen_parts"] == list(record["parts"]) == ["decode", "tests", "ops"]
    assert record["command"] == "pyramid-cache bench --suite gpu --parts decode,tests,ops"
    assert record["parts"]["decode"]["failures"] == ["exit status 1: stopped"]
    assert record["parts"]["tests"]["result"]["outcomes"] == {"tests/test_a.py::test_b": "passed"}
    printed = capsys.readouterr().out
    for text in ("== decode\n0 False\n", "== tests\n1 False\n", "== ops\n2 False\n"):
        assert text in printed
    for text in ("Imaginary GPU", "1 passed, 0 failed", "s: exit status 1: stopped", "1.50×"):
        assert text in printed

    # There is no time for anything.
    assert run("--seconds", "25") == (1, record)
    capsys.readouterr()
    # What passed is kept. Parts that have not run come first; the rows of decode are there to go on with.
    del ends["decode"]
    status, record = run()
    printed = capsys.readouterr().out
    names = ["shadow", "pyramid", "oracle", "gather", "codes", "decode"]
    texts = [f"== {name}\n{min(index + 3, 8)} {name == 'decode'}\n" for index, name in enumerate(names)]
    assert [line for line in printed.splitlines() if line.startswith("== ")] == [f"== {name}" for name in names]
    assert all(text in printed for text in texts)
    failures = {name: part["failures"] for name, part in record["parts"].items() if part["failures"]}
    assert (status, failures) == (1, {"oracle": ["exit status 1: no such kernel"]})
    assert record["is_complete"] and set(record["parts"]) == set(gpu_suite.PART_LIMITS)
    assert record["parts"]["oracle"]["output_tail"] == ["5 False", "no such kernel"]
    # A part that is named runs again.
    assert run("--parts", "ops")[0] == 1
    del ends["oracle"]
    assert run("--parts", "oracle")[0] == 0
    assert "== oracle\n8 False\n" in capsys.readouterr().out


@pytest.mark.usefixtures("imaginary_gpu")
def test_a_suite_does_not_go_on_with_another_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    for text, problem in (
        ("[]", "is no record"),
        ('{"parts": {}}', "device was None and is Imaginary GPU"),
        ('{"parts": {}, "device": "Imaginary GPU", "versions": {}}', "versions was {} and is"),
    ):
        path.write_text(text)
        assert main(["bench", "--suite", "gpu", "--json", str(path)]) == 2
        assert problem in capsys.readouterr().err and path.read_text() == text


@pytest.mark.slow
def test_a_suite_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert main(["bench", "--suite", "gpu", "--rehearse", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["is_complete"] and set(record["parts"]) == set(gpu_suite.PART_LIMITS)
    for name, part in record["parts"].items():
        assert not part["failures"]
        rows = [row for run in part["result"].get("runs", [part["result"]]) for row in run.get("rows", [])]
        assert (name == "tests") == (not rows)


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_parts_find_wrong_results(factor: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts on the CPU: one percent too much is found, and five percent of sums over codes."""
    scores, gather = gpu_parts.attention_scores, gpu_parts.gather_values
    by_codes = gpu_parts.decode_quantized_attention

    def gather_values(buffer: torch.Tensor, *rest: torch.Tensor, chunk_size: int) -> None:
        gather(buffer, *rest, chunk_size=chunk_size)
        buffer.mul_(factor)

    def decode_quantized_attention(*args, **named) -> tuple[torch.Tensor, torch.Tensor]:
        output, sums = by_codes(*args, **named)
        return output, sums * (1 + 5 * (factor - 1))

    monkeypatch.setattr(gpu_parts, "gather_values", gather_values)
    monkeypatch.setattr(gpu_parts, "decode_quantized_attention", decode_quantized_attention)
    monkeypatch.setattr(gpu_parts, "attention_scores", lambda *args, **named: scores(*args, **named) * factor)
    found = {}
    for name, count in (("oracle", 2), ("gather", 2), ("codes", 6)):
        path = tmp_path / name
        assert gpu_parts.main(name, path, is_rehearsal=True) == status
        found[name] = json.loads(path.read_text())["rows"]
        assert [row["is_right"] for row in found[name]] == [status == 0] * count
    assert [row["is_weighted"] for row in found["oracle"]] == [False, True]
    assert [row["bytes"] for row in found["gather"]] == [8 * 2 * 8 * 128 * 2, 8 * 5 * 8 * 128 * 2]


def test_parts_that_measure_in_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite runs, with a small model on the CPU."""
    monkeypatch.setitem(op_times.BUDGET_SECONDS, "cpu", 0.0)
    monkeypatch.setattr(decode_times, "BACKEND", "eager")
    results = {}
    for name in ("decode", "shadow", "pyramid", "ops"):
        path = tmp_path / name
        assert gpu_parts.main(name, path, is_rehearsal=True) == 0
        results[name] = json.loads(path.read_text())
    runs = results["decode"]["runs"]
    assert len(runs) == len(gpu_parts.DECODE_RUNS) == 8
    # Decoded once, and known in the other runs.
    assert [[row["cache"] for row in run["rows"]] for run in runs] == [["dynamic", "static"]] * 8
    assert len({tuple(row["step_seconds"]) for run in runs for row in run["rows"]}) == 2
    assert [row["label"] for row in results["shadow"]["rows"]] == ["DynamicCache", "ShadowKVCache, 0.25"]
    assert results["shadow"]["rows"][1]["stages"]["select_chunks"] > 0
    assert [row["label"] for row in results["pyramid"]["rows"]] == ["DynamicCache", "PyramidCache(model), 0.4"]
    assert len(results["ops"]["rows"]) == 2 * len(OPS)


def test_settings_of_the_parts() -> None:
    """The lengths and batches of `bench decode`, ShadowKV's prompt with 1/60 of it, and table 4 of PyramidInfer."""
    found = {}
    for name, (kind, texts, _) in gpu_parts.RUNS.items():
        add_options = bench_command.add_decode_options if kind == "decode" else bench_command.add_caches_options
        runs = [bench_command.parse(add_options, text) for text in texts]
        found[name] = [
            (run.model, *run.lengths, *run.batch_sizes, *run.budgets, run.rounds, run.caches) for run in runs
        ]
    cells = ((8192, 1), (8192, 32), (32768, 8), (128000, 1))
    assert found == {
        "decode": [
            ("llama-3.1-8b", *cell, 0.25, 1, caches)
            for caches in (["static", "snapkv"], ["static", "h2o", "streaming", "tova"])
            for cell in cells
        ],
        "shadow": [("llama-3.1-8b", 124928, 1, 2048, 1, ["shadow"])],
        "pyramid": [("llama-2-13b", 512, 32, 0.4, 1, ["pyramid"])],
    }
