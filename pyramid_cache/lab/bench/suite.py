"""
`pyramid-cache bench --suite gpu`: everything that needs a GPU, in one run.

Each part is a process of its own: one that hangs is stopped at its limit, and one that leaves the device in an error does
not take the next with it. What is known is written after every part.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyramid_cache
from pyramid_cache.lab.bench.bench_command import PARTS
from pyramid_cache.lab.bench.record import VERSIONS
from pyramid_cache.lab.machine import describe_machine, describe_versions, load_average
from pyramid_cache.lab.terminal import write_json


# Seconds, nine minutes together but for those that run only where they are asked for.
PART_LIMITS = dict(zip(PARTS, (235, 45, 200, 70, 35, 25), strict=True))
ONLY_CHOSEN = ("blocks",)
TAIL_LINES = 60
LAST_LINES_SECONDS = 5
# Kernels are compiled by the processor: most of the time of the tests, and shared out. Each process takes a GiB or so of the
# device.
TEST_PROCESSES = min(os.cpu_count() or 1, 12)
# As `pytest -v` prints them from several processes: one line per test, and in its summary one per file that could not be
# imported.
TEST_LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS) (\S+\.py::.*?) *$")
ERROR_LINE = re.compile(r"^(ERROR) (\S+\.py)(?= - |$)")


def run(path: Path | None, chosen: list[str] | None = None) -> dict[str, Any]:
    """
    Runs parts of the suite, in its order, and prints what came of them.

    Args:
        path (`Path`, *optional*): Where the record is written after every part.
        chosen (`list[str]`, *optional*): Names of parts; all but `ONLY_CHOSEN` by default.

    Returns:
        `dict`: "chosen_parts"; "parts", each with "wall_seconds", "failures" (empty where it passed) and "result";
        "is_complete", whether all that were chosen have run; and what they ran on.

    Raises:
        ValueError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"`--suite gpu` needs a CUDA device, and torch {torch.__version__} finds none here. `pyramid-cache bench ops` "
            "measures on the CPU."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    machine = describe_machine(device)
    names = [name for name in PART_LIMITS if (name not in ONLY_CHOSEN if chosen is None else name in chosen)]
    record = {
        "command": "pyramid-cache bench --suite gpu" + ("" if chosen is None else f" --parts {','.join(names)}"),
        "device": machine["accelerator"],
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "machine": machine,
        "versions": describe_versions(*VERSIONS),
        "chosen_parts": names,
        "is_complete": False,
        "parts": {},
    }
    root = Path(pyramid_cache.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            result_path = Path(folder) / f"{name}.json"
            record["parts"][name] = run_part(name, root, result_path, PART_LIMITS[name])
            record["is_complete"] = name == names[-1]
            machine["load_average_after"] = load_average()
            if path is not None:
                write_json(record, path)
    show(record)
    return record


def run_part(name: str, root: Path, result_path: Path, limit_seconds: float) -> dict[str, Any]:
    """
    Runs one part in a process of its own, its output passed on line by line.

    Args:
        root (`Path`): The folder that holds the package, and its tests.
        result_path (`Path`): Where the part writes its result, but for the tests, whose result is their output.

    Returns:
        `dict`: "wall_seconds"; "failures", one line each; "result"; and the end of the output where there are failures.
    """
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    lines: list[str] = []
    try:
        status = run_process(command_of(name, root, result_path), root, limit_seconds, lines.append)
        failures = []
        if status is None:
            failures.append(f"stopped after {limit_seconds} s")
        elif status != 0:
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            failures.append(f"exit status {status}: {last.strip()}")
    except OSError as error:
        failures = [str(error)]
    if name == "tests":
        result = {"outcomes": outcomes_of(lines)}
        failures += [
            f"{test}: {outcome}" for test, outcome in result["outcomes"].items() if outcome in ("failed", "error")
        ]
        if not result["outcomes"] and not failures:
            failures.append("no test ran")
    else:
        result = json.loads(result_path.read_text(encoding="utf-8")) if result_path.is_file() else {}
    part = {"wall_seconds": time.perf_counter() - start, "failures": failures, "result": result}
    if failures:
        part["output_tail"] = list(collections.deque(lines, TAIL_LINES))
    return part


def command_of(name: str, root: Path, result_path: Path) -> list[str]:
    """What runs a part. Raises FileNotFoundError where there are no tests to run."""
    if name == "tests":
        options = f"-m cuda -n{TEST_PROCESSES} --dist=load -v --tb=short --no-header --color=no --continue-on-collection-errors".split()
        return [sys.executable, "-m", "pytest", *options, *map(str, test_files(root))]
    return [sys.executable, "-m", "pyramid_cache.lab.bench.gpu", name, str(result_path)]


def test_files(root: Path) -> list[Path]:
    """The files with tests that need a GPU. The others may import packages that a GPU machine lacks."""
    files = [
        path.relative_to(root)
        for path in sorted((root / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text()
    ]
    if not files:
        raise FileNotFoundError(f"{root / 'tests'} holds no tests marked cuda: run this from the repository.")
    return files


def run_process(command: list[str], folder: Path, limit_seconds: float, on_line: Callable[[str], None]) -> int | None:
    """Runs a command in a folder; returns its exit status, or None where it was stopped at the limit."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )

    def pass_on() -> None:
        with process.stdout as lines:
            for line in lines:
                print(line, end="", flush=True)
                on_line(line.rstrip("\n"))

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        status = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        process.kill()  # also where this process is interrupted; nothing happens to one that has ended
    # Not for ever: what the process has started may live on and hold its output open.
    reader.join(LAST_LINES_SECONDS)
    return status


def outcomes_of(lines: list[str]) -> dict[str, str]:
    """Outcomes by test, out of the output of `pytest -v`; those of a run that was stopped as far as it came."""
    outcomes = {}
    for line in lines:
        if found := TEST_LINE.match(line):
            outcomes[found[2]] = found[1].lower()
        elif found := ERROR_LINE.match(line):
            outcomes[found[2]] = "error"
    return outcomes


def driver_version() -> str | None:
    """Of the NVIDIA driver, where its tool is there to say so."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def show(record: dict[str, Any]) -> None:
    """Prints the tables, or says why there are none."""
    try:
        from pyramid_cache.lab.bench import bench_tables
    except ModuleNotFoundError as error:  # a GPU machine need not have what draws tables
        print(f"No tables: the package `{error.name}` is missing. The figures are in the file of --json.")
        for name, part in record["parts"].items():
            print(f"{name}: {'; '.join(part['failures']) or 'passed'}, {part['wall_seconds']:.0f} s")
        return
    bench_tables.show_suite(record)
