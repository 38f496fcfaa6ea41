"""
How long calls take: `torch.utils.benchmark` measures on the CPU, `triton.testing` on CUDA devices.

Two functions that are compared take turns, so that other work on the machine slows both down alike.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer


LEAST_ROUNDS = 5
# One turn of a function: its median call within this time, or a single call that takes longer.
CPU_TURN_SECONDS = 0.02
CUDA_TURN_MILLISECONDS = 10
# A copy of this many bytes is far larger than the caches of any processor.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
COPY_ROUNDS = 7


def seconds_of(run: Callable[[], object], device: torch.device, in_graph: bool = False) -> float:
    """
    The median seconds of a call in one turn. On CUDA the second-level cache is emptied before each call. With
    `in_graph` a CUDA graph launches the calls, and the function must read more than that cache holds.
    """
    if device.type == "cpu":
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=CPU_TURN_SECONDS).median
    try:
        from triton import testing
    except ImportError as error:
        raise ValueError("Times on CUDA devices are taken by triton, which is missing: pip install triton.") from error
    turn = CUDA_TURN_MILLISECONDS
    with torch.cuda.device(device):
        if in_graph:
            return testing.do_bench_cudagraph(run, rep=turn, return_mode="median") / 1e3
        return testing.do_bench(run, warmup=turn // 2, rep=turn, return_mode="median") / 1e3


def time_in_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    measure: Callable[[Callable[[], object]], float],
    budget_seconds: float,
    most_rounds: int,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """
    The seconds of two functions in each round, as `measure` gives them. Which goes first changes from round to round.
    No round begins after `budget_seconds` by the clock `now`, except the first `LEAST_ROUNDS`.
    """
    first(), second()  # kernels are compiled before the clock starts
    times: tuple[list[float], list[float]] = ([], [])
    start = now()
    for index in range(most_rounds):
        if index >= LEAST_ROUNDS and now() - start >= budget_seconds:
            break
        turns = list(zip((first, second), times, strict=True))
        for run, seconds in turns if index % 2 == 0 else turns[::-1]:
            seconds.append(measure(run))
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of several large copies, bytes that are read and bytes that are written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    return 2 * source.numel() / min(seconds_of(copy, device) for _ in range(COPY_ROUNDS))
