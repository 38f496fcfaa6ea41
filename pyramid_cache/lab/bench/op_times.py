"""
What attention with scores takes, as the caches run it, beside attention alone, as transformers' sdpa runs it.

Inputs are random. Those of decoding are a full layer of `H2OCache`: all slots are held, half of them by recent tokens.
`torch.utils.benchmark` measures on the CPU, `triton.testing` on CUDA devices. Functions that are compared take turns,
so that other work on the machine slows both down alike.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from pyramid_cache.lab.machine import free_memory
from pyramid_cache.ops import attention_scores, decode_attention, row_lse
from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.registration import check_heads


PREFILL_OPS = ("window_scores", "all_row_scores")
OPS = (*PREFILL_OPS, "decode_scores")
# What the ops may need beyond their inputs and outputs: chunks of logits, and workspaces of torch's own kernels.
WORKSPACE_BYTES = 1 << 28
# The inputs of the calls in a CUDA graph have this many times the size of the second-level cache.
FLUSHED_CACHE_SIZES = 4
# For each pair of functions. Long calls exceed it, as at least five rounds are run.
BUDGET_SECONDS = {"cpu": 4.0, "cuda": 1.0}
LEAST_ROUNDS = 5
# One turn of a function: its median call within this time, or a single call that takes longer.
CPU_TURN_SECONDS = 0.02
CUDA_TURN_MILLISECONDS = 10
# A copy of this many bytes is far larger than the caches of any processor.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
COPY_ROUNDS = 7
SIZES = ("batch_size", "heads", "kv_heads", "head_dim", "window")
Times = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Shape:
    """A prompt has `length` queries, of which `window_scores` uses the last `window`. A decode step has one query."""

    length: int
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def random(self, *sizes: int) -> torch.Tensor:
        """Normal values, `(batch_size, *sizes, head_dim)`."""
        return torch.randn(self.batch_size, *sizes, self.head_dim, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """Attention, and the same with scores, `(batch, kv_heads, keys)`, which may have to compute log-sum-exps again."""

    attention: functools.partial
    with_scores: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    recomputes_lse: bool = False


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
) -> tuple[list[float], list[float]]:
    """
    The seconds of two functions in each round, as `measure` gives them. Which goes first changes from round to round.
    No round begins after `budget_seconds`, except the first `LEAST_ROUNDS`.
    """
    first(), second()  # kernels are compiled before the clock starts
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for index in range(most_rounds):
        if index >= LEAST_ROUNDS and time.perf_counter() - start >= budget_seconds:
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


def bytes_moved(op: str, shape: Shape) -> int:
    """Bytes of queries, keys, values, log-sum-exps, scores and output."""
    rows = shape.length if op in PREFILL_OPS else 1
    per_head = shape.batch_size * shape.head_dim * shape.dtype.itemsize
    queries_and_output = 2 * shape.heads * rows * per_head
    keys_and_values = 2 * shape.kv_heads * shape.length * per_head
    log_sum_exps = shape.batch_size * shape.heads * rows * 4
    slots = shape.batch_size * shape.kv_heads * shape.length * 4
    return queries_and_output + keys_and_values + log_sum_exps + slots


def build_shapes(
    lengths: Iterable[int], dtypes: Iterable[str], device: torch.device, longest_prefill: float, **sizes: int
) -> list[tuple[str, Shape]]:
    """Every op at every length and dtype, without longer prompts than `longest_prefill`. Refuses what does not fit."""
    check_heads(sizes["heads"], sizes["kv_heads"])
    cases = []
    for length, dtype, op in itertools.product(lengths, dtypes, OPS):
        if op in PREFILL_OPS and length > longest_prefill:
            continue
        if sizes["window"] > length:
            raise ValueError(f"A window of {sizes['window']} rows is longer than {length} tokens. Lower --window.")
        shape = Shape(length, getattr(torch, dtype), device, **sizes)
        check_memory(op, shape, free_memory(device))
        cases.append((op, shape))
    return cases


def check_memory(op: str, shape: Shape, available: int | None) -> None:
    """Raises ValueError where the inputs and outputs of an op exceed the available bytes."""
    # Both attentions hold an output at once.
    needed = (num_copies(op, shape) + 1) * bytes_moved(op, shape) + WORKSPACE_BYTES
    if available is not None and needed > available:
        raise ValueError(
            f"{op} at length {shape.length} takes about {needed / 2**30:,.1f} GiB, but {shape.device} has "
            f"{available / 2**30:,.1f} GiB free. Lower --lengths or --batch-size."
        )


def num_copies(op: str, shape: Shape) -> int:
    """How many inputs the calls of a CUDA graph need, so that none is in the second-level cache; 1 without a graph."""
    if shape.device.type != "cuda" or op in PREFILL_OPS:
        return 1
    cache_bytes = torch.cuda.get_device_properties(shape.device).L2_cache_size
    return math.ceil(FLUSHED_CACHE_SIZES * cache_bytes / bytes_moved(op, shape)) + 1


def build_case(op: str, shape: Shape) -> Case:
    """New random inputs, and the two functions on them."""
    # Queries are laid out as the projections of models leave them, keys as caches hold them.
    query = shape.random(shape.length if op in PREFILL_OPS else 1, shape.heads).transpose(1, 2)
    key, value = (shape.random(shape.kv_heads, shape.length) for _ in range(2))
    attention = functools.partial(sdpa, query, key, value, is_causal=op in PREFILL_OPS)
    scaling = shape.head_dim**-0.5
    if op == "decode_scores":
        return Case(attention, lambda: decode_attention(query, key, value, scaling=scaling))
    scored = query[:, :, -shape.window :] if op == "window_scores" else query

    def read_with_scores() -> tuple[torch.Tensor, torch.Tensor]:
        given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
        output, lse = given or (attention(), row_lse(scored, key, scaling=scaling))
        return output, attention_scores(scored, key, lse[:, :, -scored.shape[2] :], scaling=scaling)

    recomputes_lse = attention_with_lse("sdpa", query, key, value, scaling=scaling) is None
    return Case(attention, read_with_scores, recomputes_lse=recomputes_lse)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """What transformers' sdpa comes to without a mask; `(batch, rows, heads, head_dim)` like its output."""
    output = scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


@torch.no_grad()
def measure_op(op: str, shape: Shape, bandwidth: float, most_rounds: int) -> dict[str, Any]:
    """One row; see `as_row`. A decode step on CUDA is also timed in a CUDA graph, each call of it on other inputs."""
    cases = [build_case(op, shape) for _ in range(num_copies(op, shape))]
    measure = functools.partial(seconds_of, device=shape.device)
    limits = BUDGET_SECONDS[shape.device.type], most_rounds
    times = time_in_turns(cases[0].attention, cases[0].with_scores, measure, *limits)
    graph_times = None
    if len(cases) > 1:
        attention, with_scores = time_in_turns(
            lambda: [case.attention() for case in cases],
            lambda: [case.with_scores() for case in cases],
            functools.partial(measure, in_graph=True),
            *limits,
        )
        graph_times = [seconds / len(cases) for seconds in attention], [time / len(cases) for time in with_scores]
    row = as_row(op, shape, times, graph_times, bandwidth)
    call = cases[0].attention
    kernel = SDPBackend(torch._fused_sdp_choice(*call.args, **call.keywords, enable_gqa=True)).name
    return row | {"attention_kernel": kernel, "recomputes_lse": cases[0].recomputes_lse}


def as_row(op: str, shape: Shape, times: Times, graph_times: Times | None, bandwidth: float) -> dict[str, Any]:
    """The figures of one op at one shape. Times are seconds of attention alone and with scores, by round."""
    attention, with_scores = map(statistics.median, times)
    num_bytes = bytes_moved(op, shape)
    sizes = {name: getattr(shape, name) for name in SIZES}
    row = {"op": op, "length": shape.length, "dtype": shape.dtype_name, **sizes} | {
        "rounds": len(times[0]),
        "attention_seconds": attention,
        "with_scores_seconds": with_scores,
        "ratio_to_attention": with_scores / attention,
        "overhead_percent": 100 * (with_scores / attention - 1),
        "attention_seconds_minimum": min(times[0]),
        "with_scores_seconds_minimum": min(times[1]),
        # Of whichever function varies more.
        "spread": max((max(part) - min(part)) / statistics.median(part) for part in times),
        "bytes": num_bytes,
        "bandwidth_fraction": num_bytes / with_scores / bandwidth,
    }
    graph_figures: tuple[float | None, ...] = (None,) * 5
    if graph_times is not None:
        attention, with_scores = map(statistics.median, graph_times)
        ratio, fraction = with_scores / attention, num_bytes / with_scores / bandwidth
        graph_figures = (len(graph_times[0]), attention, with_scores, ratio, fraction)
    names = "graph_rounds attention_graph_seconds graph_seconds graph_ratio_to_attention graph_bandwidth_fraction"
    return row | dict(zip(names.split(), graph_figures, strict=True))
