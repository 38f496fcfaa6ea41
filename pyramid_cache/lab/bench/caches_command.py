"""`pyramid-cache bench caches`: its options, the settings of its suites, and its record."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.bench.record import start_record
from pyramid_cache.lab.machine import describe_machine, load_average
from pyramid_cache.lab.terminal import (
    DTYPES,
    ProgressBar,
    check_output,
    check_picture,
    device,
    positive_int,
    positive_ints,
    write_json,
)
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback


# What `bench caches` measures where the options do not say, and what the suites are.
CACHE_DEFAULTS: dict[str, Any] = {
    "model": None,
    "caches": ["dynamic", "pyramid:0.4", "h2o:0.25", "streaming:0.25", "snapkv:0.25", "massive:0.25", "shadow:0.25"],
    "lengths": [2048],
    "batch_sizes": [1],
    "new_tokens": 16,
    "rounds": 2,
    "prefill_rows": "batch",
    "largest_batch": False,
    "stages": False,
    "seed": 0,
}
# Every cache of the library, at a quarter of the prompt.
ALL_CACHES = (
    "dynamic static h2o snapkv pyramidkv adakv tova keydiff knorm expected-attention rkv massive pyramid-config pyramid "
    "streaming-dense shadow"
).split()
SUITES: dict[str, list[dict[str, Any]]] = {
    "cpu": [{"caches": ALL_CACHES, "lengths": [1024, 4096], "batch_sizes": [1, 4], "prefill_rows": "one"}],
    # Table 4 of PyramidInfer, and the lengths of section 5.2 of ShadowKV with its sparse budgets, 1/60 of the prompt.
    "paper": [
        {
            "model": "llama-2-13b",
            "caches": ["dynamic", "pyramid:0.4", "h2o:0.4"],
            "lengths": [512],
            "batch_sizes": [32],
            "new_tokens": 256,
        },
        *(
            {
                "model": "llama-3.1-8b",
                "caches": ["dynamic", f"shadow:{budget}"],
                "lengths": [length],
                "batch_sizes": [1],
                "new_tokens": 24,
                "rounds": 1,
                "prefill_rows": "one",
                "largest_batch": True,
                "stages": True,
            }
            for length, budget in ((60 * 1024, 1024), (122 * 1024, 2048))
        ),
    ],
}


def add_caches_parser(measurements: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench caches` and its options; they are None where the defaults are asked for."""
    defaults = CACHE_DEFAULTS
    caches = measurements.add_parser(
        "caches",
        help="prefill, decode steps and bytes of caches in a model",
        description="Reads the same prompt with each cache and goes on by plain `generate`; shows what that takes beside "
        "DynamicCache in the same run. In each round all caches take their turn.",
    )
    caches.add_argument(
        "--model",
        help="folder or hub id of a causal language model, or a shape with random weights: llama-3.1-8b, llama-2-13b, tiny "
        "(default: the demo's model)",
    )
    caches.add_argument(
        "--caches",
        type=contenders,
        metavar="NAMES",
        help="comma-separated list of names, each with a budget behind a colon if it is one of this library (tokens, or a "
        f"fraction of the prompt; of shadow what a step attends to): {', '.join(defaults['caches'])} (default: these; dynamic "
        "is always measured)",
    )
    caches.add_argument("--lengths", type=positive_ints, metavar="N,N,...", help="tokens of prompts (default: 2048)")
    caches.add_argument("--batch-sizes", type=positive_ints, metavar="N,N,...", help="rows (default: 1)")
    caches.add_argument(
        "--new-tokens", type=positive_int, metavar="N", help="decode steps that are timed (default: 16)"
    )
    caches.add_argument("--rounds", type=positive_int, metavar="N", help="default: 2")
    caches.add_argument(
        "--prefill-rows",
        choices=("batch", "one"),
        help="batch: the prompt is read with all rows; one: with one row, which is copied then (default: batch)",
    )
    caches.add_argument(
        "--largest-batch", action="store_const", const=True, help="decode the largest batch that fits as well, on CUDA"
    )
    caches.add_argument(
        "--stages", action="store_const", const=True, help="profile a few steps: the share of each op in their time"
    )
    caches.add_argument("--device", type=device, help="cpu or cuda (default: cuda if there is one, else cpu)")
    caches.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, bfloat16 on cuda)")
    caches.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )
    caches.add_argument("--seed", type=int, help="of random weights and tokens (default: 0)")
    caches.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="write the figures there as well"
    )
    caches.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw prefill, decode and bytes by length and batch into a PNG"
    )
    caches.add_argument(
        "--save-tokens",
        type=Path,
        metavar="FILE",
        help="write the tokens of the longest prompt there, for other programs, and measure nothing",
    )
    caches.set_defaults(measurement="caches", measure=run_caches)


def contenders(text: str) -> list[str]:
    """Reads `--caches`."""
    from pyramid_cache.lab.bench.contenders import parse_contender

    try:
        names = [parse_contender(part.strip()).name for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not names:
        raise argparse.ArgumentTypeError("there is no name of a cache in it")
    return list(dict.fromkeys(names))


def run_caches(options: argparse.Namespace) -> None:
    """Measures caches in a model and prints a table."""
    check_picture("--plot", options.plot)
    chosen = {name: getattr(options, name) for name in (*CACHE_DEFAULTS, "device", "dtype")}
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.save_tokens is not None:
        save_tokens(chosen, options.save_tokens)
    else:
        show_caches([chosen], options.json, options.plot)


def save_tokens(chosen: dict[str, Any], path: Path) -> None:
    """Writes what `bench caches` would read with these options."""
    from rich.console import Console

    from pyramid_cache.lab.bench.shapes import build_model

    check_output("--save-tokens", path)
    options = CACHE_DEFAULTS | {name: value for name, value in chosen.items() if value is not None}
    with ProgressBar(Console(stderr=True)) as progress:
        _, tokens = build_model(options["model"], torch.device("cpu"), "float32", options["seed"], progress)
    path.write_text(json.dumps(tokens[: max(options["lengths"])].tolist()), encoding="utf-8")


def show_caches(runs: list[dict[str, Any]], json_path: Path | None, plot_path: Path | None) -> None:
    """Measures one or more settings of `bench caches`, and prints their tables."""
    from rich.console import Console

    from pyramid_cache.lab.bench import bench_tables

    check_output("--json", json_path)
    with ProgressBar(Console(stderr=True)) as progress:
        records = measure_caches(runs, progress, json_path)
    for record in records:
        bench_tables.show_caches(record)
    if plot_path is not None:
        from pyramid_cache.lab.bench.ratio_bars import draw

        draw(records[0], plot_path)


def measure_caches(
    runs: list[dict[str, Any]], progress: ProgressCallback, path: Path | None = None
) -> list[dict[str, Any]]:
    """
    What `bench caches` and its suites write.

    Args:
        runs (`list[dict]`): Options by name, of which those that are None or missing have defaults.
        path (`Path`, *optional*): Where to write it, anew after each cache.

    Returns:
        `list[dict]`: One record per run: "rows" of `pyramid_cache.lab.bench.generation.as_row`; "command", "device", "threads",
            "machine", "versions" and "model".
    """
    from pyramid_cache.lab.bench.contenders import parse_contender
    from pyramid_cache.lab.bench.generation import Bench, Settings
    from pyramid_cache.lab.bench.shapes import build_model

    records: list[dict[str, Any]] = []
    for given in runs:
        options = CACHE_DEFAULTS | {name: value for name, value in given.items() if value is not None}
        target = options.get("device") or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = options.get("dtype") or ("float32" if target.type == "cpu" else "bfloat16")
        if options["largest_batch"] and target.type != "cuda":
            raise ValueError(f"--largest-batch fills the memory of a CUDA device, which {target} is not.")
        machine = describe_machine(target)
        progress("Loading the model", 0, None)
        model, tokens = build_model(options["model"], target, dtype, options["seed"], progress)
        command = caches_command(options | {"device": target, "dtype": dtype})
        record = start_record(command, machine) | {
            "model": options["model"] or MODEL_NAME,
            "attn_implementation": model.config._attn_implementation,
            "rows": [],
        }
        records.append(record)

        def note(rows: list[dict[str, Any]], record: dict[str, Any] = record) -> None:
            record["rows"] = rows
            record["machine"]["load_average_after"] = load_average()
            if path is not None:
                write_json(record if len(runs) == 1 else {"runs": records}, path)

        settings = Settings(
            lengths=options["lengths"],
            batch_sizes=sorted(options["batch_sizes"]),
            new_tokens=options["new_tokens"],
            rounds=options["rounds"],
            prefill_rows=options["prefill_rows"],
            finds_largest_batch=options["largest_batch"],
            shows_stages=options["stages"],
        )
        chosen = [parse_contender(name) for name in options["caches"]]
        Bench(model, tokens, chosen, settings, progress, note).run()
        del model
    return records


def caches_command(options: dict[str, Any]) -> str:
    """The command that measures the same, with nothing left to defaults."""
    words = ["pyramid-cache", "bench", "caches"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)
