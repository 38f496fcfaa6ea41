"""
The parts of `bench --suite gpu` that measure on a CUDA device and nothing else: `python -m pyramid_cache.lab.bench.gpu PART FILE`.
"""

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.bench.caches_command import SUITES, measure_caches
from pyramid_cache.lab.bench.ops_command import complete_settings, measure
from pyramid_cache.lab.bench.timing import CudaTimer, measure_pairs, record_graph
from pyramid_cache.lab.terminal import write_json
from pyramid_cache.ops import attention_scores
from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.shadow import gather_values
from pyramid_cache.ops.transposed import transposed_flash_scores


# The shape of Llama 3 8B.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
DEVICE = "cuda"
BUDGET_SECONDS = 2.0
MOST_ROUNDS = 50

# Of scores against an independent computation, as a share of their norm. Products of bfloat16 are exact in float32, and so
# are the logits but for rounding; transposed flash is 6e-5 off on the CPU in bfloat16.
ORACLE_LIMIT = 1e-3
# Length, and whether rows have weights and heads stay apart.
ORACLE_CASES = ((8192, False), (8192, True), (32768, False))

# Tokens of the host, of a chunk, and places of the buffer: what a layer of ShadowKV reads per step, and far more.
HOST_TOKENS = 131072
CHUNK_SIZE = 8
GATHER_PLACES = (256, 4096)


# Of the published settings those of long prompts.
CACHE_RUNS = [run for run in SUITES["paper"] if run.get("largest_batch")]

# No block size is tried after this many seconds; most of them go to compiling.
SWEEP_SECONDS = 55
# Op, length and head_dim, the most important first.
SWEEPS = (("all_row_scores", 16384, 128), ("decode_scores", 131072, 128), ("all_row_scores", 16384, 64))
SCORE_BLOCKS = {"keys": (64, 128), "rows": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
DECODE_BLOCKS = {"slots": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
SWEEP_ROUNDS = 10
# Of what two block sizes give, which sum in another order.
SWEEP_LIMIT = 1e-4


def block_rows() -> Iterator[dict[str, Any]]:
    """Seconds of the Triton kernels with other block sizes than their table has, and how far their scores are from its."""
    from pyramid_cache.ops import triton_scores

    end = time.perf_counter() + SWEEP_SECONDS
    time_call = CudaTimer(torch.device(DEVICE))
    for op, length, head_dim in SWEEPS:
        scaling = head_dim**-0.5
        rows = 1 if op == "decode_scores" else length
        query = torch.randn(1, HEADS, rows, head_dim, dtype=DTYPE, device=DEVICE)
        key, value = (torch.randn(1, KV_HEADS, length, head_dim, dtype=DTYPE, device=DEVICE) for _ in range(2))
        if op == "decode_scores":
            table, grid, kind = triton_scores.DECODE_BLOCKS, DECODE_BLOCKS, triton_scores.DecodeBlocks
            score = functools.partial(triton_scores.decode_attention, query, key, value, None, None, scaling, None)
        else:
            table, grid, kind = triton_scores.score_blocks(key.device), SCORE_BLOCKS, triton_scores.ScoreBlocks
            given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
            if given is None:
                raise RuntimeError("torch's attention gives no log-sum-exps for bfloat16 on this device.")
            score = functools.partial(
                triton_scores.attention_scores, query, key, given[1], None, None, scaling, None, True
            )
        default = table[DTYPE.itemsize, head_dim]
        others = [kind(*sizes) for sizes in itertools.product(*grid.values())]
        expected = scores_of(score(blocks=default))
        for blocks in [default, *(other for other in others if other != default)]:
            if time.perf_counter() > end:
                return
            row = {
                "op": op,
                "length": length,
                "head_dim": head_dim,
                "is_default": blocks == default,
            } | blocks._asdict()
            yield row | time_blocks(
                functools.partial(score, blocks=blocks), expected, time_call, op == "decode_scores"
            )


def time_blocks(
    score: Callable[[], Any], expected: torch.Tensor, time_call: CudaTimer, is_short: bool
) -> dict[str, Any]:
    """Median seconds of a kernel, in a CUDA graph if it is short; "refused" says why a device does not take the blocks."""
    from triton.errors import TritonError

    try:
        difference = float((scores_of(score()) - expected).norm() / expected.norm())
    except TritonError as error:  # more shared memory than there is, or a compiler that gives up
        return {"seconds": None, "difference": None, "refused": str(error), "is_right": True}
    run, num_calls = record_graph([score]) if is_short else (score, 1)
    seconds = statistics.median(time_call(run) / num_calls for _ in range(SWEEP_ROUNDS))
    return {"seconds": seconds, "difference": difference, "refused": None, "is_right": difference <= SWEEP_LIMIT}


def scores_of(result: Any) -> torch.Tensor:
    """The scores among what a kernel returns: all of it, or of decoding the last."""
    return result[-1] if isinstance(result, tuple) else result


def oracle_rows() -> Iterator[dict[str, Any]]:
    """
    Scores of all rows by the kernel, against those of attention with queries and keys exchanged, and the sum of all scores
    against the rows that each give out 1.
    """
    scaling = HEAD_DIM**-0.5
    for length, is_weighted in ORACLE_CASES:
        query = torch.randn(1, HEADS, length, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(2))
        weights = torch.rand(1, length, device=DEVICE) if is_weighted else None
        given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
        if given is None:
            raise RuntimeError("torch's attention gives no log-sum-exps for bfloat16 on this device.")
        lse, group_sum = given[1], not is_weighted
        by_kernel = functools.partial(
            attention_scores, query, key, lse, scaling=scaling, row_weights=weights, group_sum=group_sum
        )
        by_attention = functools.partial(transposed_flash_scores, query, key, lse, weights, scaling, group_sum)
        times = measure_pairs(
            CudaTimer(torch.device(DEVICE)),
            by_attention,
            by_kernel,
            budget_seconds=BUDGET_SECONDS,
            most_rounds=MOST_ROUNDS,
        )
        scores, expected = by_kernel().double(), by_attention().double()
        given_out = HEADS * (length if weights is None else float(weights.double().sum()))
        error = float((scores - expected).norm() / expected.norm())
        sum_error = abs(float(scores.sum()) / given_out - 1)
        yield {
            "length": length,
            "is_weighted": is_weighted,
            "error": error,
            "sum_error": sum_error,
            "limit": ORACLE_LIMIT,
            "is_right": error <= ORACLE_LIMIT and sum_error <= ORACLE_LIMIT,  # NaN is not
            "kernel_seconds": times.medians[1],
            "transposed_flash_seconds": times.medians[0],
        }


def gather_rows() -> Iterator[dict[str, Any]]:
    """Bytes per second of chunks that a kernel reads from pinned memory, beside a plain copy of as many bytes."""
    values = torch.randn(1, KV_HEADS, HOST_TOKENS, HEAD_DIM, dtype=DTYPE).pin_memory()
    chunks = HOST_TOKENS // CHUNK_SIZE
    for places in GATHER_PLACES:
        tokens = places * CHUNK_SIZE
        buffer = torch.zeros(1, KV_HEADS, tokens, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        incoming = torch.rand(1, KV_HEADS, chunks).argsort(dim=-1)[..., :places]
        slots = (incoming[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE)).flatten(2)
        expected = values.gather(2, slots[..., None].expand(-1, -1, -1, HEAD_DIM))
        incoming = incoming.to(DEVICE)
        source = values.flatten()[: buffer.numel()].view_as(buffer)  # as many bytes in one piece, pinned as well
        target = torch.empty_like(buffer)
        times = measure_pairs(
            CudaTimer(torch.device(DEVICE)),
            functools.partial(target.copy_, source, non_blocking=True),
            functools.partial(gather_values, buffer, values, incoming, chunk_size=CHUNK_SIZE),
            budget_seconds=BUDGET_SECONDS,
            most_rounds=MOST_ROUNDS,
            warm_up_rounds=3,
        )
        num_bytes = buffer.numel() * buffer.element_size()
        copy_seconds, gather_seconds = times.medians
        yield {
            "bytes": num_bytes,
            "gather_seconds": gather_seconds,
            "copy_seconds": copy_seconds,
            "gather_bytes_per_second": num_bytes / gather_seconds,
            "copy_bytes_per_second": num_bytes / copy_seconds,
            "fraction_of_copy": copy_seconds / gather_seconds,
            "is_right": torch.equal(buffer.cpu(), expected),
        }


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "blocks": block_rows,
    "oracle": oracle_rows,
    "gather": gather_rows,
}


def announce(description: str, *progress: int | None) -> None:
    """Prints what is going on."""
    print(description, flush=True)


@torch.no_grad()
def main(name: str, path: Path) -> int:
    """Runs a part, and writes its rows so far after each; returns 1 where a row is not what it must be."""
    if name == "ops":
        measure(complete_settings(torch.device(DEVICE)), announce, path)
        return 0
    if name == "caches":
        rows = [row for record in measure_caches(CACHE_RUNS, announce, path) for row in record["rows"]]
        failures = [f"{row['label']}, {row['length']:,} tokens: {row['failure']}" for row in rows if row["failure"]]
        print(*failures, sep="\n")
        return 1 if failures else 0
    rows = []
    for row in PARTS[name]():
        print(row, flush=True)
        rows.append(row)
        write_json({"rows": rows}, path)
    wrong = sum(not row["is_right"] for row in rows)
    if wrong:
        print(f"{wrong} of {len(rows)} rows are not right.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
