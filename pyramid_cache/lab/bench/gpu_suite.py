"""
`pyramid-cache bench --suite gpu`: everything that needs a GPU, in nine minutes, the most valuable first.

Each part is a process of its own, which is stopped at its limit and cannot spoil the next. Started again with the same
file, the suite goes on: parts that passed are kept. Others run, those first that have not run yet. A part that is
named runs again in any case.
"""

import collections
import contextlib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import pyramid_cache
from pyramid_cache.lab.machine import describe_run, load_average
from pyramid_cache.lab.terminal import command_text, write_json


# The parts in their order, and their seconds. A part may also take what those before it have left.
PART_LIMITS = {"decode": 210, "shadow": 95, "pyramid": 50, "tests": 60, "ops": 40, "oracle": 25, "gather": 20}
PART_LIMITS["codes"] = 20
# How long an interrupted part may take to end: pytest writes the results of the tests that have run.
END_SECONDS = 20
# How long all may take. What does not get the least seconds any more is left for another start.
ALL_SECONDS, LEAST_SECONDS = 540, 10
TAIL_LINES = 60
# The processor compiles kernels, which takes most of the time of the tests. Each process takes a GiB of the device.
TEST_PROCESSES = min(os.cpu_count() or 1, 12)
OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def run(
    path: Path | None, chosen: list[str] | None = None, seconds: int | None = None, is_rehearsal: bool = False
) -> dict[str, Any]:
    """
    Runs parts of the suite, by default all that the file has not passed yet, and prints the results. The record is
    written after every part. A rehearsal has small models and shapes, runs on the CPU, and takes its time.
    """
    unknown = [name for name in chosen or [] if name not in PART_LIMITS]
    if unknown:
        raise ValueError(f"--parts: {unknown[0]!r} is none of {', '.join(PART_LIMITS)}.")
    if not is_rehearsal and not torch.cuda.is_available():
        problem = f"`--suite gpu` needs a CUDA device, and torch {torch.__version__} finds none here"
        raise ValueError(f"{problem}. `--rehearse` runs its parts on the CPU, with small models.")
    wanted = [name for name in PART_LIMITS if chosen is None or name in chosen]
    command = command_text(["bench"], {"suite": "gpu", "parts": chosen and wanted, "rehearse": is_rehearsal})
    device = torch.device("cpu") if is_rehearsal else torch.device("cuda", torch.cuda.current_device())
    record = describe_run(command, device)
    record |= {"driver": driver_version(), "cuda": torch.version.cuda, "is_rehearsal": is_rehearsal}
    record |= {"chosen_parts": wanted, "is_complete": False}
    parts = record["parts"] = earlier_parts(path, record)
    names = [name for name in wanted if chosen is not None or name not in parts or parts[name]["failures"]]
    names.sort(key=parts.__contains__)
    root = Path(pyramid_cache.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        end = start = time.perf_counter()
        for name in names:
            end += PART_LIMITS[name]
            limit_seconds = min(end, start + (seconds or ALL_SECONDS) - END_SECONDS) - time.perf_counter()
            if is_rehearsal:
                limit_seconds = math.inf
            elif limit_seconds < LEAST_SECONDS:
                continue
            result_path = Path(folder) / name
            if name == "decode" and parts.get(name, {}).get("failures"):  # it goes on behind its last row
                write_json(parts[name]["result"], result_path)
            parts[name] = run_part(name, root, result_path, limit_seconds, is_rehearsal)
            record["is_complete"] = all(each in parts for each in wanted)
            record["machine"]["load_average_after"] = load_average()
            if path is not None:
                write_json(record, path)
    try:
        from pyramid_cache.lab.bench import bench_report

        bench_report.show_suite(record)
    except ModuleNotFoundError as error:  # a GPU machine may lack the packages that draw tables
        print(f"No tables: the package `{error.name}` is missing. The figures are in the file of --json.")
    return record


def earlier_parts(path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """
    The parts that a file has of an earlier run. Raises ValueError if it is no record of the suite, or of another
    device or other versions, because one table would then be of two.
    """
    if path is None or not path.is_file():
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        parts = earlier["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} is no record of this suite to go on with: name another file.") from error
    for name in ("device", "versions", "is_rehearsal"):
        if earlier.get(name) != record[name]:
            change = f"{name} was {earlier.get(name)} and is {record[name]}"
            raise ValueError(f"--json {path} is of a run to go on with, but {change}: name another file.")
    return parts


def run_part(
    name: str, root: Path, result_path: Path, limit_seconds: float, is_rehearsal: bool = False
) -> dict[str, Any]:
    """
    Runs one part in a process of its own, which writes `result_path`: JSON, or the XML of `pytest --junitxml`. Returns
    its "wall_seconds", "result" and "failures", one line each, and where there are any the "output_tail".
    """
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    failures: list[str] = []
    lines: list[str] = []
    result: dict[str, Any] = {"outcomes": {}} if name == "tests" else {}
    try:
        status, lines = run_process(command_of(name, root, result_path, is_rehearsal), root, limit_seconds)
        if status is None:
            failures.append(f"stopped after {limit_seconds:.0f} s")
        elif status != 0:
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            failures.append(f"exit status {status}: {last.strip()}")
    except OSError as error:
        failures.append(str(error))
    try:
        if name == "tests":
            outcomes = result["outcomes"] = read_outcomes(result_path)
            failures += [f"{test}: {outcome}" for test, outcome in outcomes.items() if outcome in ("failed", "error")]
        else:
            result = json.loads(result_path.read_text(encoding="utf-8"))
    except (OSError, ElementTree.ParseError):
        failures.append("no results were written")
    print(f"{name}: {'; '.join(failures) or 'passed'}", flush=True)
    part = {"wall_seconds": time.perf_counter() - start, "failures": failures, "result": result}
    return part | ({"output_tail": lines} if failures else {})


def command_of(name: str, root: Path, result_path: Path, is_rehearsal: bool) -> list[str]:
    """The command of a part. Raises FileNotFoundError where there are no tests to run. A rehearsal runs none."""
    if name != "tests":
        command = [sys.executable, "-m", "pyramid_cache.lab.bench.gpu_parts", name, str(result_path)]
        return command + ["--rehearse"] * is_rehearsal
    # Tests of kernels first. The files without tests for CUDA may import packages that a GPU machine lacks.
    kernels, caches = (sorted((root / "tests").glob(pattern)) for pattern in ("ops/test_*.py", "test_*.py"))
    files = [path for path in kernels + caches if re.search(r"mark\.cuda|kernel_device", path.read_text())]
    if not files:
        raise FileNotFoundError(f"{root / 'tests'} holds no tests marked cuda: run this from the repository.")
    options = f"-m cuda -n{TEST_PROCESSES} --dist=load -v --tb=short --no-header --color=no".split()
    options += ["--continue-on-collection-errors", f"--junitxml={result_path}", "-o", "junit_family=xunit1"]
    options += ["--collect-only"] * is_rehearsal
    return [sys.executable, "-m", "pytest", *options, *(str(path.relative_to(root)) for path in files)]


def run_process(command: list[str], folder: Path, limit_seconds: float) -> tuple[int | None, list[str]]:
    """Runs a command and prints its output; returns its status, None if it was stopped, and its last lines."""
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    output |= {"errors": "replace", "env": os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}}
    # Background jobs of a shell ignore the interrupt that ends a part at its limit, and so would the part.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=folder, preexec_fn=heed, **output)
    last_lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)

    def pass_on() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            last_lines.append(line.rstrip("\n"))

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    status = None
    try:
        status = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    finally:
        process.kill()  # does nothing to a process that has ended
    # Not for ever: processes that the command has started may live on and hold its output open.
    reader.join(5)
    return status, list(last_lines)


def read_outcomes(path: Path) -> dict[str, str]:
    """The outcomes in a file of `pytest --junitxml` (passed, failed, error, skipped) by test, or by broken file."""
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        file, group, name = (case.get(key, "") for key in ("file", "classname", "name"))
        if not file:
            continue  # a test that was interrupted
        classes = group.removeprefix(file.removesuffix(".py").replace("/", ".")).replace(".", "::")
        test = f"{file}{classes}::{name}" if group else file
        found = [OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES]
        # The call and the teardown of a test have entries of their own if the teardown fails.
        if outcomes.get(test, "passed") == "passed":
            outcomes[test] = found[0] if found else "passed"
    return outcomes


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where its tool does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, text=True, timeout=30).splitlines()[0].strip()
    return None
