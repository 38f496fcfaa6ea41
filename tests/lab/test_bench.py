"""`pyramid-cache bench ops` and `--suite gpu`: arithmetic against numbers worked out by hand, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pyramid_cache.lab.bench import bench_command, gpu_parts, gpu_suite, op_times
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


@pytest.mark.parametrize("chosen", ["tests,ops,caches,oracle,gather", "oracle, tests"])
def test_parts_run_in_order_and_all_is_written_after_each(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "Imaginary GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert sum(gpu_suite.PART_LIMITS.values()) <= 9 * 60
    path = tmp_path / "record.json"
    row = op_times.as_row("decode_scores", small_shape(), ([1.0], [1.5]), None, 1e9)
    case = '<testcase classname="tests.test_a" name="test_b" file="tests/test_a.py" />'
    # Each part notes what the file held when it began.
    code = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.write_text(sys.argv[2]); "
    code += "seen = pathlib.Path(sys.argv[3]); print(seen.read_text().count('wall_seconds') if seen.exists() else 0); "

    def command_of(name: str, root: Path, result_path: Path) -> list[str]:
        text = f"<testsuites>{case}</testsuites>" if name == "tests" else json.dumps({"rows": [row]})
        end = "sys.exit('no such kernel')" if name == "oracle" else ""
        return [sys.executable, "-c", code + end, str(result_path), text, str(path)]

    monkeypatch.setattr(gpu_suite, "command_of", command_of)
    assert main(["bench", "--suite", "gpu", "--parts", chosen, "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    names = [name for name in ("tests", "ops", "caches", "oracle", "gather") if name in chosen]
    assert record["chosen_parts"] == list(record["parts"]) == names
    assert (record["is_complete"], record["device"]) == (True, "Imaginary GPU")
    assert record["command"] == f"pyramid-cache bench --suite gpu --parts {','.join(names)}"
    failures = {name: part["failures"] for name, part in record["parts"].items() if part["failures"]}
    assert failures == {"oracle": ["exit status 1: no such kernel"]}
    assert record["parts"]["oracle"]["output_tail"] == [str(names.index("oracle")), "no such kernel"]
    assert record["parts"]["tests"]["result"]["outcomes"] == {"tests/test_a.py::test_b": "passed"}
    printed = capsys.readouterr().out
    texts = [f"== {name}\n{index}\n" for index, name in enumerate(names)]
    for text in (*texts, "Imaginary GPU", "1 passed, 0 failed", "s: exit status 1: no such kernel"):
        assert text in printed
    assert ("1.50×" in printed) == ("ops" in names)


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_parts_find_wrong_results(factor: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts on the CPU: one percent too much is found."""
    scores, gather = gpu_parts.attention_scores, gpu_parts.gather_values

    def gather_values(buffer: torch.Tensor, *rest: torch.Tensor, chunk_size: int) -> None:
        gather(buffer, *rest, chunk_size=chunk_size)
        buffer.mul_(factor)

    small = {"DEVICE": CPU, "ORACLE_CASES": ((96, False), (96, True)), "TIMES": (0.0, 5)}
    small |= {"HOST_TOKENS": 256, "GATHER_PLACES": (2, 5), "gather_values": gather_values}
    small["attention_scores"] = lambda *args, **named: scores(*args, **named) * factor
    for name, value in small.items():
        monkeypatch.setattr(gpu_parts, name, value)
    found = {}
    for name in ("oracle", "gather"):
        path = tmp_path / name
        assert gpu_parts.main(name, path) == status
        found[name] = json.loads(path.read_text())["rows"]
        assert [row["is_right"] for row in found[name]] == [status == 0] * 2
    assert [row["is_weighted"] for row in found["oracle"]] == [False, True]
    assert [row["bytes"] for row in found["gather"]] == [8 * 2 * 8 * 128 * 2, 8 * 5 * 8 * 128 * 2]


def test_parts_that_are_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite runs, with a small model on the CPU."""
    chosen = [bench_command.parse(bench_command.add_caches_options, text) for text in bench_command.LONG_PROMPTS]
    assert [(run.lengths, run.budgets, run.caches) for run in chosen] == [
        ([61440], [1024], ["shadow"]),
        ([124928], [2048], ["shadow"]),
    ]
    runs = [f"--model tiny --device cpu --caches shadow --budgets 32 --lengths {n} --rounds 1" for n in (300, 320)]
    monkeypatch.setattr(bench_command, "LONG_PROMPTS", runs)
    assert gpu_parts.main("caches", tmp_path / "rows.json") == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [[row["length"] for row in run["rows"]] for run in record["runs"]] == [[300, 300], [320, 320]]
    monkeypatch.setattr(gpu_parts, "DEVICE", CPU)
    monkeypatch.setitem(bench_command.OP_DEFAULTS["cpu"], "lengths", [64])
    monkeypatch.setitem(op_times.BUDGET_SECONDS, "cpu", 0.0)
    assert gpu_parts.main("ops", tmp_path / "ops.json") == 0
    assert len(json.loads((tmp_path / "ops.json").read_text())["rows"]) == 2 * len(OPS)
