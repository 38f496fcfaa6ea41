"""The parts of `bench --suite gpu` that measure: `python -m pyramid_cache.lab.bench.gpu_parts PART FILE`."""

import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.bench import bench_command as bench
from pyramid_cache.lab.bench.op_times import seconds_of, time_in_turns
from pyramid_cache.lab.terminal import write_json
from pyramid_cache.ops import attention_scores, reference
from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.shadow import gather_values


# The shape of Llama 3 8B.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
TIMES = (2.0, 50)  # seconds and rounds at most

# The largest error of scores, as a share of the norm of the specification's in float32.
ORACLE_LIMIT = 1e-3
# Length, and whether rows have weights and heads stay apart.
ORACLE_CASES = ((8192, False), (8192, True), (32768, False))

# What a layer of ShadowKV reads per step, and far more: tokens on the host, tokens of a chunk, chunks of the buffer.
HOST_TOKENS = 131072
CHUNK_SIZE = 8
GATHER_PLACES = (256, 4096)


def median_seconds(first: Callable[[], object], second: Callable[[], object]) -> Iterator[float]:
    """The seconds of two functions that take turns."""
    return map(statistics.median, time_in_turns(first, second, functools.partial(seconds_of, device=DEVICE), *TIMES))


def oracle_rows() -> Iterator[dict[str, Any]]:
    """Compares the scores of the kernel with those of the specification in float32. Each row gives out 1."""
    scaling = HEAD_DIM**-0.5
    for length, is_weighted in ORACLE_CASES:
        query = torch.randn(1, HEADS, length, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(2))
        weights = torch.rand(1, length, device=DEVICE) if is_weighted else None
        given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
        if given is None:
            raise RuntimeError("torch's attention gives no log-sum-exps for bfloat16 on this device.")
        by_kernel = functools.partial(attention_scores, query, key, given[1], row_weights=weights, scaling=scaling)
        by_specification = functools.partial(
            reference.attention_scores, query.float(), key.float(), given[1], weights, None, scaling, None
        )
        specification_seconds, kernel_seconds = median_seconds(by_specification, by_kernel)
        scores, expected = by_kernel().double(), by_specification().double()
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
            "kernel_seconds": kernel_seconds,
            "specification_seconds": specification_seconds,
        }


def gather_rows() -> Iterator[dict[str, Any]]:
    """Bytes per second of chunks that a kernel reads from pinned memory, beside a plain copy of as many bytes."""
    shape = (1, KV_HEADS, HOST_TOKENS, HEAD_DIM)
    values = torch.randn(shape, dtype=DTYPE, pin_memory=DEVICE.type == "cuda")
    for places in GATHER_PLACES:
        buffer = torch.zeros(1, KV_HEADS, places * CHUNK_SIZE, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        incoming = torch.rand(1, KV_HEADS, HOST_TOKENS // CHUNK_SIZE).argsort(dim=-1)[..., :places]
        slots = (incoming[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE)).flatten(2)
        expected = values.gather(2, slots[..., None].expand(-1, -1, -1, HEAD_DIM))
        source = values.flatten()[: buffer.numel()].view_as(buffer)  # as many bytes in one piece, pinned as well
        copy_seconds, gather_seconds = median_seconds(
            functools.partial(torch.empty_like(buffer).copy_, source, non_blocking=True),
            functools.partial(gather_values, buffer, values, incoming.to(DEVICE), chunk_size=CHUNK_SIZE),
        )
        num_bytes = buffer.numel() * buffer.element_size()
        yield {
            "bytes": num_bytes,
            "gather_seconds": gather_seconds,
            "copy_seconds": copy_seconds,
            "gather_bytes_per_second": num_bytes / gather_seconds,
            "copy_bytes_per_second": num_bytes / copy_seconds,
            "fraction_of_copy": copy_seconds / gather_seconds,
            "is_right": torch.equal(buffer.cpu(), expected),
        }


@torch.no_grad()
def main(name: str, path: Path) -> int:
    """Runs a part, and writes its rows so far after each; returns 1 where a row is not what it must be."""

    def announce(description: str, *progress: int | None) -> None:
        print(description, flush=True)

    if name == "ops":
        bench.measure_ops(bench.parse(bench.add_ops_options, f"--device {DEVICE}"), announce, path)
        return 0
    rows: list[dict[str, Any]] = []
    if name == "caches":
        runs = [bench.parse(bench.add_caches_options, text) for text in bench.LONG_PROMPTS]
        rows = [row for record in bench.measure_caches(runs, announce, path) for row in record["rows"]]
        failures = [f"{row['label']}, {row['length']:,} tokens: {row['failure']}" for row in rows if row["failure"]]
    else:
        for row in {"oracle": oracle_rows, "gather": gather_rows}[name]():
            announce(str(row))
            rows.append(row)
            write_json({"rows": rows}, path)
        failures = [f"This is not right: {row}" for row in rows if not row["is_right"]]
    print(*failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
