"""
The parts of `bench --suite gpu` that measure: `python -m pyramid_cache.lab.bench.gpu_parts PART FILE [--rehearse]`.

A rehearsal runs the same code with small models and shapes on the CPU. Its figures mean nothing.
"""

import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyramid_cache.engine.quantization import PACKINGS, Quantizer
from pyramid_cache.lab.bench import bench_command as bench
from pyramid_cache.lab.bench.op_times import seconds_of, time_in_turns
from pyramid_cache.lab.terminal import write_json
from pyramid_cache.ops import attention_scores, decode_attention, reference
from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.quantized import decode_quantized_attention
from pyramid_cache.ops.shadow import gather_values


# The shape of Llama 3 8B.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16

# The largest error of scores, as a share of the norm of the specification's in float32.
ORACLE_LIMIT = 1e-3
# The same of outputs and sums of attention over codes, which are restored in bfloat16.
CODES_LIMIT = 1e-2
CHUNK_SIZE = 8  # tokens of a chunk of ShadowKV

# Options of `bench decode`: first what no cache should be slower than, and one cache, at every length and batch.
DECODE_RUNS = [
    f"--model llama-3.1-8b --caches {caches} --budgets 0.25 --lengths {length} --batch-sizes {batch_size} "
    "--ways compiled --rounds 1"
    for caches in ("static,snapkv", "static,h2o,streaming,tova")
    for length, batch_size in ((8192, 1), (8192, 32), (32768, 8), (128000, 1))
]
# By part the measurement, its options in each run, and what a rehearsal puts in their place.
RUNS = {
    "decode": (
        "decode",
        DECODE_RUNS,
        "--model tiny --device cpu --caches static --lengths 64 --batch-sizes 2 --new-tokens 4",
    ),
    "shadow": ("caches", bench.LONG_PROMPTS[1:], "--model tiny --device cpu --budgets 0.25 --lengths 300"),
    "pyramid": (
        "caches",
        [f"{bench.SUITES['paper'][0]} --caches pyramid --rounds 1"],
        "--model tiny --device cpu --lengths 64 --batch-sizes 2 --new-tokens 4",
    ),
}


class Scale(NamedTuple):
    """The sizes of the parts that measure no model, and the options of `bench ops`."""

    device: torch.device
    times: tuple[float, int]  # seconds and rounds at most
    oracle_cases: tuple[tuple[int, bool], ...]  # length, and whether rows have weights
    host_tokens: int
    gather_places: tuple[int, ...]  # chunks that are read at once: what a layer of ShadowKV reads per step, and more
    codes_slots: tuple[int, int, int]  # rows, slots of each, and how many of these are not quantised
    ops: str


GPU = Scale(
    torch.device("cuda"),
    (2.0, 50),
    ((8192, False), (8192, True), (32768, False)),
    131072,
    (256, 4096),
    (8, 32768, 128),
    "--device cuda",
)
REHEARSAL = Scale(
    torch.device("cpu"),
    (0.0, 5),
    ((96, False), (96, True)),
    256,
    (2, 5),
    (2, 64, 32),
    "--device cpu --lengths 64 --rounds 5",
)


def median_seconds(
    scale: Scale, first: Callable[[], object], second: Callable[[], object], in_graph: bool = False
) -> Iterator[float]:
    """The seconds of two functions that take turns; `in_graph` as in `seconds_of`."""
    measure = functools.partial(seconds_of, device=scale.device, in_graph=in_graph)
    return map(statistics.median, time_in_turns(first, second, measure, *scale.times))


def oracle_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """Compares the scores of the kernel with those of the specification in float32. Each row gives out 1."""
    scaling = HEAD_DIM**-0.5
    for length, is_weighted in scale.oracle_cases:
        query = torch.randn(1, HEADS, length, HEAD_DIM, dtype=DTYPE, device=scale.device)
        key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM, dtype=DTYPE, device=scale.device) for _ in range(2))
        weights = torch.rand(1, length, device=scale.device) if is_weighted else None
        given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
        if given is None:
            raise RuntimeError("torch's attention gives no log-sum-exps for bfloat16 on this device.")
        by_kernel = functools.partial(attention_scores, query, key, given[1], row_weights=weights, scaling=scaling)
        by_specification = functools.partial(
            reference.attention_scores, query.float(), key.float(), given[1], weights, None, scaling, None
        )
        specification_seconds, kernel_seconds = median_seconds(scale, by_specification, by_kernel)
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


def codes_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """
    Compares attention over codes with attention over restored slots in float32, and times it beside attention with
    scores over as many slots that are not quantised. Keys are grouped by token, or by channel over 32 tokens.
    """
    batch_size, num_slots, num_latest = scale.codes_slots
    num_quantized, scaling = num_slots - num_latest, HEAD_DIM**-0.5
    query = torch.randn(batch_size, HEADS, 1, HEAD_DIM, dtype=DTYPE, device=scale.device)
    shape = (batch_size, KV_HEADS, num_slots, HEAD_DIM)
    states = [torch.randn(shape, dtype=DTYPE, device=scale.device) for _ in range(2)]
    latest_keys, latest_values = (each[:, :, num_quantized:] for each in states)
    in_full = functools.partial(decode_attention, query, states[0], states[1], scaling=scaling)
    for format_name, channel_group in (*((name, 0) for name in PACKINGS), ("kivi4", 32), ("kivi2", 32)):
        quantizer = Quantizer(format_name, num_latest, channel_group)
        keys, values = (
            quantizer.coded(name, *quantizer.stored(name, each[:, :, :num_quantized]))
            for name, each in zip(("keys", "values"), states, strict=True)
        )
        arguments = query, keys, values, num_quantized, latest_keys, latest_values
        by_codes = functools.partial(decode_quantized_attention, *arguments, scaling=scaling)
        restored_keys, restored_values = (
            torch.cat([codes.restored(torch.float32), each.float()], dim=2)
            for codes, each in ((keys, latest_keys), (values, latest_values))
        )
        expected = reference.decode_attention(
            query.float(), restored_keys, restored_values, None, None, None, scaling, None
        )
        pairs = zip(by_codes(), expected, strict=True)
        errors = [float((found.double() - wanted).norm() / wanted.double().norm()) for found, wanted in pairs]
        full_seconds, codes_seconds = median_seconds(scale, in_full, by_codes, in_graph=True)
        yield {
            "format": format_name,
            "channel_group": channel_group,
            "slots": batch_size * num_slots,
            "output_error": errors[0],
            "sums_error": errors[1],
            "limit": CODES_LIMIT,
            "is_right": max(errors) <= CODES_LIMIT and not any(map(math.isnan, errors)),
            "codes_seconds": codes_seconds,
            "full_seconds": full_seconds,
            "ratio_to_full": codes_seconds / full_seconds,
        }


def gather_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """Bytes per second of chunks that a kernel reads from pinned memory, beside a plain copy of as many bytes."""
    shape = (1, KV_HEADS, scale.host_tokens, HEAD_DIM)
    values = torch.randn(shape, dtype=DTYPE, pin_memory=scale.device.type == "cuda")
    for places in scale.gather_places:
        buffer = torch.zeros(1, KV_HEADS, places * CHUNK_SIZE, HEAD_DIM, dtype=DTYPE, device=scale.device)
        incoming = torch.rand(1, KV_HEADS, scale.host_tokens // CHUNK_SIZE).argsort(dim=-1)[..., :places]
        slots = (incoming[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE)).flatten(2)
        expected = values.gather(2, slots[..., None].expand(-1, -1, -1, HEAD_DIM))
        source = values.flatten()[: buffer.numel()].view_as(buffer)  # as many bytes in one piece, pinned as well
        copy_seconds, gather_seconds = median_seconds(
            scale,
            functools.partial(torch.empty_like(buffer).copy_, source, non_blocking=True),
            functools.partial(gather_values, buffer, values, incoming.to(scale.device), chunk_size=CHUNK_SIZE),
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
def main(name: str, path: Path, is_rehearsal: bool = False) -> int:
    """
    Runs a part, and writes its rows so far after each; returns 1 where a row is not what it must be. Decode steps
    that the file has are not measured again.
    """

    def announce(description: str, *progress: int | None) -> None:
        print(description, flush=True)

    scale = REHEARSAL if is_rehearsal else GPU
    if name == "ops":
        bench.measure_ops(bench.parse(bench.add_ops_options, scale.ops), announce, path)
        return 0
    rows: list[dict[str, Any]] = []
    if name in RUNS:
        kind, texts, instead = RUNS[name]
        if is_rehearsal:
            texts = [f"{text.replace('--largest-batch', '')} {instead}" for text in texts]
        add_options = bench.add_decode_options if kind == "decode" else bench.add_caches_options
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        runs = [bench.parse(add_options, text) for text in texts]
        records = bench.measure_caches(runs, announce, path, kind, earlier.get("runs", [earlier]))
        rows = [row for record in records for row in record["rows"]]
        failures = [f"{row['label']}, {row['length']:,} tokens: {row['failure']}" for row in rows if row["failure"]]
    else:
        for row in {"oracle": oracle_rows, "gather": gather_rows, "codes": codes_rows}[name](scale):
            announce(str(row))
            rows.append(row)
            write_json({"rows": rows}, path)
        failures = [f"This is not right: {row}" for row in rows if not row["is_right"]]
    print(*dict.fromkeys(failures), sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["--rehearse"]))
