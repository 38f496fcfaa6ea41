"""`pyramid-cache bench`: its options, and what it runs."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.machine import describe_machine, describe_versions, load_average
from pyramid_cache.terminal import ProgressBar, check_output, device, positive_int, write_json
from pyramid_cache.weights import MODEL_NAME, ProgressCallback


DTYPES = ("float32", "bfloat16", "float16")
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
# Of the suite, in the order in which they run.
PARTS = ("tests", "ops", "caches", "blocks", "oracle", "gather")
VERSIONS = ("pyramid_cache", "torch", "transformers", "triton")
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
ALL_CACHES = [
    *(
        "dynamic",
        "static",
        "h2o",
        "snapkv",
        "pyramidkv",
        "adakv",
        "tova",
        "keydiff",
        "knorm",
        "expected-attention",
        "rkv",
    ),
    *("massive", "pyramid-config", "pyramid", "streaming-dense", "shadow"),
]
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
                "caches": ["dynamic", f"shadow:{sparse_budget}"],
                "lengths": [length],
                "batch_sizes": [1],
                "new_tokens": 24,
                "rounds": 1,
                "prefill_rows": "one",
                "largest_batch": True,
                "stages": True,
            }
            for length, sparse_budget in ((60 * 1024, 1024), (122 * 1024, 2048))
        ),
    ],
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what the caches, and the attention ops beneath, cost",
        description="`bench caches` measures prefill, decode steps and bytes of caches in a model beside DynamicCache. `bench "
        "ops` measures what attention with scores costs beside attention alone. `bench --suite cpu` is every cache with a real "
        "model, in about fifteen minutes on two cores; `--suite paper` published settings, on a device that has the memory; "
        "`--suite gpu` everything that needs a GPU, in one run of less than ten minutes: the tests marked `cuda`, `bench ops`, "
        "long prompts of ShadowKVCache, scores of long prompts against an independent computation, and reading "
        "values from the host.",
    )
    parser.add_argument("--suite", choices=("cpu", "gpu", "paper"), help="run settings that are made for a purpose")
    parser.add_argument(
        "--parts",
        type=parts,
        metavar="PART,PART,...",
        help=f"of `--suite gpu`, run these only: {', '.join(PARTS)} (default: all but blocks)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, also after each part")
    parser.set_defaults(run=run_suite)
    measurements = parser.add_subparsers(title="measurements", metavar="caches|ops")
    add_caches_parser(measurements)
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
        type=lengths,
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
    ops.set_defaults(run=run_ops)


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
    caches.add_argument("--lengths", type=lengths, metavar="N,N,...", help="tokens of prompts (default: 2048)")
    caches.add_argument("--batch-sizes", type=lengths, metavar="N,N,...", help="rows (default: 1)")
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
    caches.set_defaults(run=run_caches)


def contenders(text: str) -> list[str]:
    """Reads `--caches`."""
    from pyramid_cache.bench.contenders import parse_contender

    try:
        names = [parse_contender(part.strip()).name for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not names:
        raise argparse.ArgumentTypeError("there is no name of a cache in it")
    return list(dict.fromkeys(names))


def lengths(text: str) -> list[int]:
    """Reads `--lengths` and `--batch-sizes`, each number once."""
    return list(dict.fromkeys(positive_int(part.strip()) for part in text.split(",")))


def parts(text: str) -> list[str]:
    """Reads `--parts`."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(PARTS)}")
    return names


def at_least_five(text: str) -> int:
    """Reads `--rounds`: fewer give no median to rely on."""
    return positive_int(text, least=LEAST_ROUNDS)


def run_ops(options: argparse.Namespace) -> None:
    """Measures the ops and prints a table."""
    from rich.console import Console

    from pyramid_cache.bench import report

    if options.suite is not None:
        raise ValueError(f"`bench --suite {options.suite}` has settings of its own: give --suite or ops, not both.")
    if options.parts is not None:
        raise ValueError("--parts are of `bench --suite gpu`, not of `bench ops`.")
    check_output("--json", options.json)
    settings = settings_of(options)
    with ProgressBar(Console(stderr=True)) as progress:
        record = measure(settings, progress, options.json)
    report.show_ops(record)


def run_caches(options: argparse.Namespace) -> None:
    """Measures caches in a model and prints a table."""
    if options.suite is not None:
        raise ValueError(f"`bench --suite {options.suite}` has settings of its own: give --suite or caches, not both.")
    if options.parts is not None:
        raise ValueError("--parts are of `bench --suite gpu`, not of `bench caches`.")
    check_output("--plot", options.plot)
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

    from pyramid_cache.bench.models import build_model

    check_output("--save-tokens", path)
    options = CACHE_DEFAULTS | {name: value for name, value in chosen.items() if value is not None}
    with ProgressBar(Console(stderr=True)) as progress:
        _, tokens = build_model(options["model"], torch.device("cpu"), "float32", options["seed"], progress)
    path.write_text(json.dumps(tokens[: max(options["lengths"])].tolist()), encoding="utf-8")


def show_caches(runs: list[dict[str, Any]], json_path: Path | None, plot_path: Path | None) -> None:
    """Measures one or more settings of `bench caches`, and prints their tables."""
    from rich.console import Console

    from pyramid_cache.bench import report

    check_output("--json", json_path)
    with ProgressBar(Console(stderr=True)) as progress:
        records = measure_caches(runs, progress, json_path)
    for record in records:
        report.show_caches(record)
    if plot_path is not None:
        from pyramid_cache.bench.plot import draw

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
        `list[dict]`: One record per run: "rows" of `pyramid_cache.bench.generation.as_row`; "command", "device", "threads",
            "machine", "versions" and "model".
    """
    from pyramid_cache.bench.contenders import parse_contender
    from pyramid_cache.bench.generation import Bench, Settings
    from pyramid_cache.bench.models import build_model

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
        record = {
            "command": caches_command(options | {"device": target, "dtype": dtype}),
            "model": options["model"] or MODEL_NAME,
            "device": machine["accelerator"] or machine["processor"],
            "threads": torch.get_num_threads(),
            "machine": machine,
            "versions": describe_versions(*VERSIONS),
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


def run_suite(options: argparse.Namespace) -> int:
    """Runs a suite and prints what came of it; returns 1 if any part of it failed."""
    if options.suite is None:
        raise ValueError("Nothing to measure: give `caches`, `ops` or --suite. See `pyramid-cache bench --help`.")
    check_output("--json", options.json)
    if options.suite != "gpu":
        if options.parts is not None:
            raise ValueError(f"--parts are of `bench --suite gpu`, not of --suite {options.suite}.")
        show_caches(SUITES[options.suite], options.json, None)
        return 0
    from pyramid_cache.bench import suite

    record = suite.run(options.json, options.parts)
    return 1 if any(part["failures"] for part in record["parts"].values()) else 0


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
        `dict`: "rows" of `pyramid_cache.bench.measure.as_row`; "copy_bytes_per_second", read and written bytes; "command"
        with its defaults; "device", its name; "threads"; "machine"; "versions"; "ratios", what they are of.
    """
    from pyramid_cache.bench.measure import build_shapes, measure_ops
    from pyramid_cache.bench.timing import copy_bandwidth

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
    record = {
        "command": command_of(settings),
        "device": machine["accelerator"] or machine["processor"],
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": describe_versions(*VERSIONS),
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
