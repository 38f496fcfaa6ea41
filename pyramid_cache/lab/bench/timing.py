"""
How times are taken, on the CPU and on CUDA devices.

Two functions that are compared take turns round by round, so that whatever else the machine does falls on both alike.
Ratios are of the medians over those rounds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


LEAST_ROUNDS = 5
# A copy of this many bytes is far larger than the caches of any processor it is timed on.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
COPY_ROUNDS = 7
# What is read between two calls, so that neither finds its data in the second-level cache, in sizes of that cache.
FLUSHED_CACHE_SIZES = 4
# Calls in one CUDA graph: its launch, about 10 us, is then little even beside kernels of as many microseconds.
CALLS_PER_GRAPH = 20


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of two functions that took turns, one of each per round."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def minima(self) -> tuple[float, float]:
        return min(self.first), min(self.second)

    @property
    def ratio(self) -> float:
        """The median of the second over the median of the first."""
        first, second = self.medians
        return second / first

    @property
    def spread(self) -> float:
        """The longest time less the shortest over the median, of whichever function varies more."""
        return max((max(times) - min(times)) / statistics.median(times) for times in (self.first, self.second))


def time_on_cpu(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class CudaTimer:
    """
    Seconds of one call by CUDA events, from data that is not in the second-level cache. The device is idle when the call
    begins: what launching takes is in it where the device waits for launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.zeros(FLUSHED_CACHE_SIZES * cache_bytes // 4, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], object]) -> float:
        # Read and not written: lines that were would be written back while the call runs.
        self.other_data.sum()
        torch.cuda.synchronize(self.device)
        self.start.record()
        run()
        self.end.record()
        torch.cuda.synchronize(self.device)
        return self.start.elapsed_time(self.end) / 1e3


def measure_pairs(
    time_call: Callable[[Callable[[], object]], float],
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    budget_seconds: float,
    most_rounds: int,
    warm_up_rounds: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """
    Times two functions in turn, after rounds that are not counted. Which goes first changes from round to round.

    Args:
        time_call (`Callable`): Runs a function and returns its seconds.
        budget_seconds (`float`): No round begins after this many, but at least `LEAST_ROUNDS` are run.
        most_rounds (`int`): No more are run, whatever time is left.
        now (`Callable`): The clock of the budget.
    """
    for _ in range(warm_up_rounds):
        first()
        second()
    times: dict[Callable, list[float]] = {first: [], second: []}
    start = now()
    for index in range(most_rounds):
        if index >= LEAST_ROUNDS and now() - start >= budget_seconds:
            break
        for run in (first, second) if index % 2 == 0 else (second, first):
            times[run].append(time_call(run))
    return PairedTimes(tuple(times[first]), tuple(times[second]))


def record_graph(runs: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """
    Records calls in a CUDA graph, whose replay launches them without Python in between.

    Args:
        runs: Functions that do the same on different data, so that together they read more than the second-level cache
            holds. They are recorded in turn.

    Returns:
        `tuple[Callable, int]`: what replays the graph, and how many calls are in it.
    """
    num_calls = max(CALLS_PER_GRAPH // len(runs), 1) * len(runs)
    # Kernels are compiled and workspaces allocated before the recording, on a stream of its own as torch asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_calls):
            runs[index % len(runs)]()
    return graph.replay, num_calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written ones counted, of the fastest of several large copies on a device."""
    time_call = CudaTimer(device) if device.type == "cuda" else time_on_cpu
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the operating system gives the memory when it is first written
    seconds = min(time_call(lambda: target.copy_(source)) for _ in range(COPY_ROUNDS))
    return 2 * source.numel() / seconds
