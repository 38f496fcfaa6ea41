"""`pyramid-cache bench`: what it compares, its arithmetic against numbers worked out by hand, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyramid_cache.lab.bench import bench_tables, gpu, op_rows, suite, timing
from pyramid_cache.lab.bench.op_cases import OPS, Shape, build_case, bytes_moved
from pyramid_cache.lab.bench.timing import PairedTimes, measure_pairs
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.terminal import write_json


CPU = torch.device("cpu")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})


def small_shape(length: int = 40, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(length, dtype, CPU, batch_size=2, heads=4, kv_heads=2, head_dim=16, window=5)


class Clock:
    """Time passes only where functions say so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[str] = []

    def function(self, name: str, *durations: float) -> Callable[[], None]:
        """Takes the durations in turn, and the last from then on."""
        left = list(durations)

        def run() -> None:
            self.calls.append(name)
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return run

    def time_call(self, run: Callable[[], None]) -> float:
        start = self.seconds
        run()
        return self.seconds - start


class TestTiming:
    @pytest.mark.parametrize(
        "seconds, budget, most, rounds",
        [
            (1.0, 0.0, 200, 5),  # five rounds, however long they take
            (1.0, 13.0, 200, 7),  # two seconds per round: the seventh begins after 12
            (0.25, 3.0, 200, 6),
            (0.001, 100.0, 9, 9),
        ],
    )
    def test_rounds_go_on_until_the_budget_is_used_up(
        self, seconds: float, budget: float, most: int, rounds: int
    ) -> None:
        clock = Clock()
        first, second = clock.function("first", seconds), clock.function("second", seconds)
        times = measure_pairs(
            clock.time_call, first, second, budget_seconds=budget, most_rounds=most, now=lambda: clock.seconds
        )
        assert (len(times.first), len(times.second)) == (rounds, rounds)

    def test_functions_take_turns_and_the_first_calls_do_not_count(self) -> None:
        clock = Clock()
        first = clock.function("a", 50.0, 50.0, 1.0, 3.0, 2.0)
        second = clock.function("b", 70.0, 70.0, 4.0, 9.0, 6.0)
        times = measure_pairs(
            clock.time_call,
            first,
            second,
            budget_seconds=0,
            most_rounds=5,
            warm_up_rounds=2,
            now=lambda: clock.seconds,
        )
        assert "".join(clock.calls) == "abab" + "ab" + "ba" + "ab" + "ba" + "ab"
        assert times == PairedTimes((1.0, 3.0, 2.0, 2.0, 2.0), (4.0, 9.0, 6.0, 6.0, 6.0))
        assert times.medians == (2.0, 6.0)
        assert times.minima == (1.0, 4.0)
        assert times.ratio == 3.0
        assert times.spread == 1.0  # (3 - 1) / 2 of the first; (9 - 4) / 6 of the second is less


class TestCases:
    @pytest.mark.parametrize("op", OPS)
    def test_both_ways_give_the_output_and_the_scores_are_the_probabilities(self, op: str) -> None:
        shape = small_shape()
        case = build_case(op, shape)
        query, key, value = case.attention.args
        output, scores = case.with_scores()
        if op == "decode_scores_and_evict":
            before = scores.clone()
            output, scores = case.with_scores()
            # Scores grow by the probabilities, but those of the slot that is written to begin anew at 0.
            is_written = scores == before
            assert (is_written.sum(dim=-1) == 1).all()
            scores = torch.where(is_written, scores, scores - before)
        # After the call: a new token that is written in place is attended to as well.
        torch.testing.assert_close(output, case.attention())
        rows = query.shape[2]
        grouped = query.double().view(2, 2, 2, rows, 16)
        logits = grouped @ key.double()[:, :, None].transpose(-1, -2) / 4
        if rows > 1:
            logits = logits.masked_fill(torch.ones(rows, 40, dtype=torch.bool).triu_(1), float("-inf"))
        probabilities = logits.softmax(dim=-1)
        expected = probabilities[..., -5 if op == "window_scores" else -rows :, :].sum(dim=(2, 3))
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
        # Output, `(batch, rows, heads, head_dim)`, against the same probabilities.
        weighted = probabilities @ value.double()[:, :, None]
        torch.testing.assert_close(output.double(), weighted.flatten(1, 2).transpose(1, 2), rtol=1e-4, atol=1e-5)

    def test_bytes(self) -> None:
        """At 9 of 3 heads of 64 and 64 tokens in float32; see the sizes."""
        shape = Shape(64, torch.float32, CPU, batch_size=1, heads=9, kv_heads=3, head_dim=64, window=64)
        query, key, lse, scores = 147_456, 49_152, 2_304, 768
        prefill = query + key + key + query + lse + scores
        decode = 2_304 + key + key + 2_304 + 36 + scores
        assert [bytes_moved(op, shape) for op in OPS] == [prefill, prefill, decode, decode + 2 * scores]

    def test_half_the_bytes_of_halves_but_for_what_stays_float32(self) -> None:
        whole, half = (
            bytes_moved("all_row_scores", small_shape(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
        )
        float32_bytes = 2 * 4 * 40 * 4 + 2 * 2 * 40 * 4
        assert half - float32_bytes == (whole - float32_bytes) / 2


def example_row(with_graph: bool = False) -> dict:
    """A row of decoding at the shape that targets are set for, out of times that are easily divided."""
    shape = Shape(131072, torch.bfloat16, torch.device("cuda"), 1, heads=32, kv_heads=8, head_dim=128, window=64)
    times = PairedTimes((2e-3, 4e-3, 3e-3), (5e-3, 6e-3, 9e-3))
    graph_times = PairedTimes((1e-3, 1e-3), (1.05e-3, 1.05e-3)) if with_graph else None
    return op_rows.as_row("decode_scores", shape, times, graph_times, bandwidth=1e12)


class TestRows:
    def test_figures_by_hand(self) -> None:
        row = example_row(with_graph=True)
        num_bytes = 2 * 32 * 128 * 2 + 2 * 8 * 131072 * 128 * 2 + 32 * 4 + 8 * 131072 * 4
        assert row["bytes"] == num_bytes == 541_081_728
        assert (row["attention_seconds"], row["with_scores_seconds"], row["rounds"]) == (3e-3, 6e-3, 3)
        assert (row["attention_seconds_minimum"], row["with_scores_seconds_minimum"]) == (2e-3, 5e-3)
        assert (row["ratio_to_attention"], row["overhead_percent"]) == (2.0, 100.0)
        assert row["spread"] == pytest.approx(2 / 3)  # 2 of 3 ms; 4 of 6 ms is as much
        assert row["bandwidth_fraction"] == pytest.approx(541_081_728 / 6e-3 / 1e12)
        assert row["graph_ratio_to_attention"] == pytest.approx(1.05)
        assert row["graph_bandwidth_fraction"] == pytest.approx(541_081_728 / 1.05e-3 / 1e12)

    def test_targets_are_asked_of_their_shape_only(self) -> None:
        targets = {target["figure"]: target for target in example_row(with_graph=True)["targets"]}
        assert targets["graph_ratio_to_attention"]["is_met"]
        assert not targets["graph_bandwidth_fraction"]["is_met"]  # 0.515 of the copies, not 0.7
        assert example_row(with_graph=False)["targets"] == []
        other = example_row(with_graph=True) | {"heads": 16}
        assert op_rows.targets_of("cuda", other) == []
        assert op_rows.targets_of("cpu", example_row(with_graph=True)) == []

    def test_table_shows_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        bench_tables.report_console().print(
            bench_tables.ops_table([example_row(True), example_row(True) | {"graph_seconds": None}])
        )
        printed = capsys.readouterr().out
        for cell in (
            "131,072",
            "3.000",
            "6.000",
            "2.00×",
            "+100.0 %",
            "67%",
            "516.0",
            "9.0%",
            "1.050",
            "1.05×",
            "51.5%",
        ):
            assert cell in printed

    def test_targets_stand_beside_what_was_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        bench_tables.report_console().print(bench_tables.targets_table([example_row(), example_row(True)]))
        lines = [line for line in capsys.readouterr().out.splitlines() if "decode_scores" in line]
        assert [line.split("│")[5].strip() for line in lines] == ["0.515", "1.05"]
        assert ["missed" in line for line in lines] == [True, False]
        assert bench_tables.targets_table([example_row()]) is None


def test_ops_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    arguments = ["bench", "--json", str(path), "ops", "--device", "cpu", "--lengths", "64,96", "--rounds", "5"]
    assert main([*arguments, "--dtype", "float32", "bfloat16", "--batch-size", "2", "--window", "8"]) == 0
    record = json.loads(path.read_text())
    assert {"command", "device", "threads", "versions", "machine", "copy_bytes_per_second", "rows"} <= set(record)
    assert {"torch", "triton", "transformers"} <= set(record["versions"])
    assert record["threads"] == torch.get_num_threads()
    assert "--lengths 64,96 --dtype float32 bfloat16 --heads 9 --kv-heads 3 --head-dim 64" in record["command"]
    rows = record["rows"]
    wanted = [(op, length, dtype) for length in (64, 96) for dtype in ("float32", "bfloat16") for op in OPS]
    assert [(row["op"], row["length"], row["dtype"]) for row in rows] == wanted
    assert all(set(row) == set(rows[0]) for row in rows)
    for row in rows:
        assert (row["heads"], row["kv_heads"], row["head_dim"]) == (9, 3, 64)
        assert (row["batch_size"], row["window"], row["rounds"]) == (2, 8, 5)
        ratio = row["with_scores_seconds"] / row["attention_seconds"]
        assert row["ratio_to_attention"] == pytest.approx(ratio)
        assert row["overhead_percent"] == pytest.approx(100 * (ratio - 1))
        moved = row["bytes"] / row["with_scores_seconds"]
        assert row["bandwidth_fraction"] == pytest.approx(moved / record["copy_bytes_per_second"])
        assert row["attention_seconds_minimum"] <= row["attention_seconds"]
        assert row["graph_seconds"] is None
        assert not row["recomputes_lse"]
    printed = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    for row, line in zip(rows, lines, strict=True):
        op, length, dtype, attention, with_scores, ratio, *_ = (cell.strip() for cell in line)
        assert (op, length, dtype) == (row["op"], str(row["length"]), row["dtype"])
        assert float(attention) == pytest.approx(row["attention_seconds"] * 1e3, abs=5e-4)
        assert float(with_scores) == pytest.approx(row["with_scores_seconds"] * 1e3, abs=5e-4)
        assert float(ratio.rstrip("×")) == pytest.approx(row["ratio_to_attention"], abs=5e-3)


# What is refused.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--lengths", "0"], "'0' is no whole number of at least 1"),
        (["--lengths", "64,x"], "'x' is no whole number"),
        (["--lengths", ""], "'' is no whole number"),
        (["--rounds", "4"], "'4' is no whole number of at least 5"),
        (["--heads", "-9"], "'-9' is no whole number"),
        (["--device", "meta"], "'meta' cannot be used"),
        pytest.param(["--device", "cuda"], "'cuda' cannot be used", marks=needs_no_cuda),
    ],
)
def test_bad_option_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "ops", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench"], "give `caches`, `ops` or --suite"),
        (["bench", "--suite", "gpu", "ops"], "not both"),
        (["bench", "--parts", "ops"], "give `caches`, `ops` or --suite"),
        (["bench", "--parts", "ops", "ops"], "--parts are of `bench --suite gpu`"),
        (
            ["bench", "ops", "--device", "cpu", "--heads", "5", "--kv-heads", "3"],
            "5 query heads cannot share 3 KV heads",
        ),
        (["bench", "ops", "--device", "cpu", "--lengths", "32"], "A window of 64 rows is longer than 32 tokens"),
        (["bench", "ops", "--device", "cpu", "--lengths", "99999999999"], "Lower --lengths"),
        (["bench", "ops", "--device", "cpu", "--json", "missing/record.json"], "a file in a folder that exists"),
        pytest.param(["bench", "--suite", "gpu"], "needs a CUDA device", marks=needs_no_cuda),
    ],
)
def test_what_cannot_be_measured_is_refused_on_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyramid-cache: error: ")
    assert message in line


def test_memory_that_is_needed_is_refused_to_the_byte() -> None:
    """One set of inputs with its output, another output, and room for the ops."""
    shape = small_shape()
    for op in OPS:
        op_rows.check_memory(op, shape, 1, available=None)
        op_rows.check_memory(op, shape, 1, available=(1 << 28) + 2 * bytes_moved(op, shape))
        with pytest.raises(ValueError, match="Lower --lengths or --batch-size"):
            op_rows.check_memory(op, shape, 1, available=(1 << 28) + 2 * bytes_moved(op, shape) - 1)


# The suite.

TESTS = """
import pytest
pytestmark = pytest.mark.cuda
@pytest.mark.parametrize("text", ["a b", "c"])
def test_passes(text): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_is_in_error(broken): pass
"""


def test_tests_are_told_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_unreadable.py").write_text("import no_such_package\nimport pytest\nmark = pytest.mark.cuda\n")
    (folder / "test_not_asked_for.py").write_text("import no_such_package\n")
    part = suite.run_part("tests", tmp_path, tmp_path / "none.json", 60)
    assert part["result"]["outcomes"] == {
        "tests/test_some.py::test_passes[a b]": "passed",
        "tests/test_some.py::test_passes[c]": "passed",
        "tests/test_some.py::test_fails": "failed",
        "tests/test_some.py::test_is_skipped": "skipped",
        "tests/test_some.py::test_is_in_error": "error",
        "tests/test_unreadable.py": "error",
    }
    assert part["failures"][0].startswith("exit status 1: ")
    assert sorted(part["failures"][1:]) == [
        "tests/test_some.py::test_fails: failed",
        "tests/test_some.py::test_is_in_error: error",
        "tests/test_unreadable.py: error",
    ]
    assert any("assert 1 == 2" in line for line in part["output_tail"])


def test_no_tests_are_a_failure(tmp_path: Path) -> None:
    assert "holds no tests marked cuda" in suite.run_part("tests", tmp_path, tmp_path / "none.json", 60)["failures"][0]


def test_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "while True: pass"]
    assert suite.run_process(command, tmp_path, 0.5, on_line=lambda line: None) is None


def test_parts_go_on_after_a_failure_and_all_is_written_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    row = op_rows.as_row("decode_scores", small_shape(), PairedTimes((1.0,), (1.5,)), None, 1e9) | {
        "recomputes_lse": False
    }
    # Each part notes what the file held when it began.
    write = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.write_text(sys.argv[2]); "
    note = "seen = pathlib.Path(sys.argv[3]); print(seen.read_text().count('wall_seconds') if seen.exists() else 0); "
    ends = {"tests": "print('[gw0] [ 50%] PASSED tests/test_a.py::test_b ')", "oracle": "sys.exit('no such kernel')"}

    def command_of(name: str, root: Path, result_path: Path) -> list[str]:
        code = write + note + ends.get(name, "")
        return [sys.executable, "-c", code, str(result_path), json.dumps({"rows": [row]}), str(path)]

    monkeypatch.setattr(suite, "command_of", command_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    assert main(["bench", "--suite", "gpu", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert record["is_complete"]
    assert record["command"] == "pyramid-cache bench --suite gpu"
    assert record["device"] == "Imaginary GPU"
    assert list(record["parts"]) == ["tests", "ops", "caches", "oracle", "gather"]
    failures = {name: part["failures"] for name, part in record["parts"].items() if part["failures"]}
    assert failures == {"oracle": ["exit status 1: no such kernel"]}
    assert record["parts"]["oracle"]["output_tail"] == ["3", "no such kernel"]
    assert record["parts"]["tests"]["result"]["outcomes"] == {"tests/test_a.py::test_b": "passed"}
    assert record["parts"]["ops"]["result"]["rows"] == [row]
    printed = capsys.readouterr().out
    for name, seen in zip(record["parts"], range(5), strict=True):
        assert f"== {name}\n{seen}\n" in printed
    for text in ("Imaginary GPU", "1 passed, 0 failed", "exit status 1: no such kernel", "1.50×"):
        assert text in printed


def test_chosen_parts_run_in_the_order_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    done = {"wall_seconds": 1.0, "failures": [], "result": {}}
    seen = []
    monkeypatch.setattr(suite, "run_part", lambda name, *rest: seen.append((name, rest[-1])) or done)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    assert main(["bench", "--suite", "gpu", "--parts", "gather, ops", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert seen == [(name, suite.PART_LIMITS[name]) for name in ("ops", "gather")]
    assert record["chosen_parts"] == list(record["parts"]) == ["ops", "gather"]
    assert record["is_complete"]
    assert record["command"] == "pyramid-cache bench --suite gpu --parts ops,gather"


def test_part_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--suite", "gpu", "--parts", "ops,speed"])
    assert caught.value.code == 2
    assert "'speed' is none of tests, ops, caches, blocks, oracle, gather" in capsys.readouterr().err


def test_limits_leave_room_in_ten_minutes() -> None:
    limits = [limit for name, limit in suite.PART_LIMITS.items() if name not in suite.ONLY_CHOSEN]
    assert sum(limits) <= 9 * 60


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_oracle_finds_wrong_scores(
    factor: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of the suite on the CPU: one percent too much is found."""
    scores = gpu.attention_scores
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "ORACLE_CASES", ((96, False), (96, True)))
    monkeypatch.setattr(gpu, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "CudaTimer", lambda device: timing.time_on_cpu)
    monkeypatch.setattr(gpu, "attention_scores", lambda *args, **settings: scores(*args, **settings) * factor)
    assert gpu.main("oracle", tmp_path / "rows.json") == status
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["is_right"] for row in rows] == [status == 0] * 2
    assert [row["is_weighted"] for row in rows] == [False, True]


def test_writing_follows_links_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json({"a": 1}, link)
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert sorted(tmp_path.iterdir()) == [link, target]


@pytest.mark.cuda
def test_ops_on_cuda(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    arguments = ["bench", "ops", "--device", "cuda", "--lengths", "256", "--rounds", "5", "--json", str(path)]
    assert main([*arguments, "--dtype", "bfloat16", "float16"]) == 0
    record = json.loads(path.read_text())
    assert record["device"] == torch.cuda.get_device_name()
    for row in record["rows"]:
        assert row["with_scores_seconds"] > 0
        assert (row["graph_seconds"] is not None) == row["op"].startswith("decode")
