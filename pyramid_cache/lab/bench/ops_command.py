"""`pyramid-cache bench ops`: its options, and its record."""

import argparse
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.bench.record import start_record
from pyramid_cache.lab.machine import describe_machine, load_average
from pyramid_cache.lab.terminal import (
    DTYPES,
    ProgressBar,
    check_output,
    device,
    positive_int,
    positive_ints,
    write_json,
)
from pyramid_cache.lab.weights import ProgressCallback


# What is measured where the options do not say: on the CPU the shape of the demo's model, on CUDA that of Llama 3 8B.
# Prompts longer than `longest_prefill` are measured only where --lengths asks for them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": [2048, 8192],
        "dtype": ["float32", "bfloat16"],
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "longest_prefill": None,
    },
    "cuda": {
        "lengths": [8192, 32768, 131072],
        "dtype": ["bfloat16"],
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "longest_prefill": 32768,
    },
}
LEAST_ROUNDS = 5


def add_ops_parser(measurements: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench ops` and its options."""
    ops = measurements.add_parser(
        "ops",
        help="attention with scores beside attention alone",
        description="Times attention alone, as transformers' sdpa runs it, and attention with scores, as the caches run "
        "it, and shows what the scores cost.",
    )
    ops.add_argument("--device", type=device, help="cpu or cuda (default: cuda if there is one, else cpu)")
    ops.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        help="one or more (default: float32 and bfloat16 on cpu, bfloat16 on cuda)",
    )
    ops.add_argument(
        "--lengths",
        type=positive_ints,
        metavar="N,N,...",
        help="tokens (default: 2048,8192 on cpu; 8192,32768,131072 on cuda, the last for decoding only)",
    )
    ops.add_argument("--heads", type=positive_int, metavar="N", help="query heads (default: 9 on cpu, 32 on cuda)")
    ops.add_argument("--kv-heads", type=positive_int, metavar="N", help="default: 3 on cpu, 8 on cuda")
    ops.add_argument("--head-dim", type=positive_int, metavar="N", help="default: 64 on cpu, 128 on cuda")
    ops.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="default: 1")
    ops.add_argument(
        "--window",
        type=positive_int,
        default=64,
        metavar="N",
        help="rows that window_scores scores with (default: 64)",
    )
    ops.add_argument(
        "--rounds",
        type=at_least_five,
        metavar="N",
        help="rounds at most; long calls get fewer, at least 5 (default: 200)",
    )
    # Suppressed, so that a file named before `ops` is not forgotten.
    ops.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="write the figures there as well"
    )
    ops.set_defaults(measurement="ops", measure=run_ops)


def at_least_five(text: str) -> int:
    """Reads `--rounds`: fewer give no median to rely on."""
    return positive_int(text, least=LEAST_ROUNDS)


def run_ops(options: argparse.Namespace) -> None:
    """Measures the ops and prints a table."""
    from rich.console import Console

    from pyramid_cache.lab.bench import bench_tables

    check_output("--json", options.json)
    settings = settings_of(options)
    with ProgressBar(Console(stderr=True)) as progress:
        record = measure(settings, progress, options.json)
    bench_tables.show_ops(record)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `bench ops`, as `measure` takes them."""
    target = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("lengths", "dtype", "heads", "kv_heads", "head_dim", "batch_size", "window", "rounds")
    return complete_settings(target, **{name: getattr(options, name) for name in names})


def complete_settings(target: torch.device, **given: Any) -> dict[str, Any]:
    """What is given, with the defaults of a device for all that is not given or None."""
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = {"device": target, "batch_size": 1, "window": 64, "rounds": 200}
    settings |= DEFAULTS.get(target.type, DEFAULTS["cpu"])
    if "lengths" in chosen:
        settings["longest_prefill"] = None
    return settings | chosen


def command_of(settings: dict[str, Any]) -> str:
    """The command that measures the same, with nothing left to defaults but how long prompts may be."""
    words = ["pyramid-cache", "bench", "ops"]
    for name, value in settings.items():
        if name == "longest_prefill" or (name == "lengths" and settings["longest_prefill"] is not None):
            continue
        text = (" " if name == "dtype" else ",").join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


def measure(settings: dict[str, Any], progress: ProgressCallback, path: Path | None = None) -> dict[str, Any]:
    """
    What `bench ops` writes.

    Args:
        settings (`dict`): From `complete_settings`.
        path (`Path`, *optional*): Where to write it, anew after each row.

    Returns:
        `dict`: "rows" of `pyramid_cache.lab.bench.op_rows.as_row`; "copy_bytes_per_second", read and written bytes; "command"
        with its defaults; "device", its name; "threads"; "machine"; "versions"; "ratios", what they are of.
    """
    from pyramid_cache.lab.bench.op_rows import build_shapes, measure_ops
    from pyramid_cache.lab.bench.timing import copy_bandwidth

    target = settings["device"]
    cases = build_shapes(
        settings["lengths"],
        [getattr(torch, name) for name in settings["dtype"]],
        target,
        **{
            name: settings[name]
            for name in ("batch_size", "heads", "kv_heads", "head_dim", "window", "longest_prefill")
        },
    )
    machine = describe_machine(target)
    progress("Copying", 0, None)
    record = start_record(command_of(settings), machine) | {
        "copy_bytes_per_second": copy_bandwidth(target),
        "ratios": "medians over rounds in which attention alone and attention with scores take turns",
        "rows": [],
    }

    def note(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        machine["load_average_after"] = load_average()
        if path is not None:
            write_json(record, path)

    measure_ops(cases, record["copy_bytes_per_second"], settings["rounds"], progress, note)
    return record
