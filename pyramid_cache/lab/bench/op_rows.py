"""One row per op, length and dtype: what attention with scores takes beside attention alone."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from pyramid_cache.lab.bench.op_cases import (
    DECODE_OPS,
    OPS,
    PREFILL_OPS,
    Case,
    Shape,
    build_case,
    bytes_moved,
    check_memory,
)
from pyramid_cache.lab.bench.targets import targets_of
from pyramid_cache.lab.bench.timing import (
    FLUSHED_CACHE_SIZES,
    CudaTimer,
    PairedTimes,
    measure_pairs,
    record_graph,
    time_on_cpu,
)
from pyramid_cache.lab.weights import ProgressCallback
from pyramid_cache.ops.registration import check_heads


# Of each pair of functions that is timed. Long calls exceed it: at least five rounds are run.
BUDGET_SECONDS = 4.0
WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}


def build_shapes(
    lengths: Iterable[int],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    *,
    batch_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    longest_prefill: int | None = None,
) -> list[tuple[str, Shape]]:
    """
    What is to be measured: every op at every length and dtype.

    Args:
        longest_prefill (`int`, *optional*): Prompts are no longer than this, whatever the lengths.

    Raises:
        ValueError: For heads and windows that do not fit, for lengths that the memory cannot hold, and for devices other
            than a CPU and CUDA ones.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"The ops have kernels for cpu and cuda, not for {device.type}. Choose one of them by --device."
        )
    check_heads(heads, kv_heads)
    cases = []
    for length, dtype, op in itertools.product(lengths, dtypes, OPS):
        if op in PREFILL_OPS and longest_prefill is not None and length > longest_prefill:
            continue
        if window > length:
            raise ValueError(f"A window of {window} rows is longer than {length} tokens. Lower --window.")
        shape = Shape(length, dtype, device, batch_size, heads, kv_heads, head_dim, window)
        check_memory(op, shape, num_copies(op, shape), free_memory(device))
        cases.append((op, shape))
    return cases


def num_copies(op: str, shape: Shape) -> int:
    """How many sets of inputs are needed so that a graph that takes them in turn finds none in the cache."""
    if shape.device.type != "cuda" or op not in DECODE_OPS:
        return 1
    cache_bytes = torch.cuda.get_device_properties(shape.device).L2_cache_size
    return math.ceil(FLUSHED_CACHE_SIZES * cache_bytes / bytes_moved(op, shape)) + 1


def free_memory(device: torch.device) -> int | None:
    """The bytes that can be allocated on a device, where the system says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None


@torch.no_grad()
def measure_ops(
    cases: list[tuple[str, Shape]],
    bandwidth: float,
    most_rounds: int,
    progress: ProgressCallback,
    on_row: Callable[[dict[str, Any]], None],
) -> None:
    """
    Measures what `build_shapes` gives, a row at a time.

    Args:
        bandwidth (`float`): From `copy_bandwidth`.
        most_rounds (`int`): Of each pair of functions.
        on_row (`Callable`): Gets each row when it is there.
    """
    for index, (op, shape) in enumerate(cases):
        progress(f"{op}, {shape.length:,} tokens, {name_of(shape.dtype)}", index, len(cases))
        on_row(measure_op(op, shape, bandwidth, most_rounds))


def measure_op(op: str, shape: Shape, bandwidth: float, most_rounds: int) -> dict[str, Any]:
    """One row; figures of CUDA graphs are None where none are recorded."""
    cases = [build_case(op, shape) for _ in range(num_copies(op, shape))]
    time_call = CudaTimer(shape.device) if shape.device.type == "cuda" else time_on_cpu
    case = cases[0]
    settings = {"budget_seconds": BUDGET_SECONDS, "most_rounds": most_rounds}
    times = measure_pairs(
        time_call, case.attention, case.with_scores, warm_up_rounds=WARM_UP_ROUNDS[shape.device.type], **settings
    )
    graph_times = measure_graphs(cases, time_call, settings) if len(cases) > 1 else None
    return as_row(op, shape, times, graph_times, bandwidth) | {
        "attention_kernel": attention_kernel(case),
        "recomputes_lse": case.recomputes_lse,
    }


def measure_graphs(cases: list[Case], time_call: CudaTimer, settings: dict[str, Any]) -> PairedTimes:
    """Seconds per call where the calls are replayed from a CUDA graph, each on other data than the last."""
    replay_attention, num_calls = record_graph([case.attention for case in cases])
    replay_with_scores, _ = record_graph([case.with_scores for case in cases])
    times = measure_pairs(time_call, replay_attention, replay_with_scores, **settings)
    return PairedTimes(*(tuple(seconds / num_calls for seconds in part) for part in (times.first, times.second)))


def as_row(
    op: str, shape: Shape, times: PairedTimes, graph_times: PairedTimes | None, bandwidth: float
) -> dict[str, Any]:
    """
    The figures of one op at one shape.

    Returns:
        `dict`: Seconds are medians over the rounds, in which attention alone and attention with scores take turns, and
        ratios and overheads are of these medians; the shortest times stand beside them.
    """
    attention, with_scores = times.medians
    num_bytes = bytes_moved(op, shape)
    row = {
        "op": op,
        "length": shape.length,
        "dtype": name_of(shape.dtype),
        "batch_size": shape.batch_size,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "window": shape.window,
        "rounds": len(times.first),
        "attention_seconds": attention,
        "with_scores_seconds": with_scores,
        "ratio_to_attention": times.ratio,
        "overhead_percent": 100 * (times.ratio - 1),
        "attention_seconds_minimum": times.minima[0],
        "with_scores_seconds_minimum": times.minima[1],
        "spread": times.spread,
        "bytes": num_bytes,
        "bandwidth_fraction": num_bytes / with_scores / bandwidth,
        "graph_rounds": None,
        "attention_graph_seconds": None,
        "graph_seconds": None,
        "graph_ratio_to_attention": None,
        "graph_bandwidth_fraction": None,
    }
    if graph_times is not None:
        graph_attention, graph_with_scores = graph_times.medians
        row |= {
            "graph_rounds": len(graph_times.first),
            "attention_graph_seconds": graph_attention,
            "graph_seconds": graph_with_scores,
            "graph_ratio_to_attention": graph_times.ratio,
            "graph_bandwidth_fraction": num_bytes / graph_with_scores / bandwidth,
        }
    return row | {"targets": targets_of(shape.device.type, row)}


def attention_kernel(case: Case) -> str | None:
    """Which of its kernels torch takes for attention alone, where it says so."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return None
    return SDPBackend(choose(*case.attention.args, **case.attention.keywords, enable_gqa=True)).name


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
