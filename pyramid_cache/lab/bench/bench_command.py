"""`pyramid-cache bench`: its options, its suites, and the records that it writes."""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.lab.bench import gpu_suite
from pyramid_cache.lab.bench.bench_models import SHAPES, build_model
from pyramid_cache.lab.bench.cache_times import Bench
from pyramid_cache.lab.bench.op_times import build_shapes, measure_op
from pyramid_cache.lab.bench.timing import LEAST_ROUNDS, copy_bandwidth
from pyramid_cache.lab.machine import describe_run, load_average
from pyramid_cache.lab.registry import CACHES, TRANSFORMERS
from pyramid_cache.lab.terminal import (
    DTYPES,
    ProgressBar,
    add_machine_options,
    budgets,
    cache_names,
    check_output,
    check_picture,
    device,
    positive_int,
    positive_ints,
    write_json,
)
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback


# Options of `bench caches`. Section 5.2 of ShadowKV: its lengths, and 1/60 of them as its sparse budget.
LONG_PROMPTS = [
    f"--model llama-3.1-8b --caches shadow --budgets {budget} --lengths {length} --new-tokens 24 --rounds 1 "
    "--prefill-rows one --largest-batch --stages"
    for length, budget in ((60 * 1024, 1024), (122 * 1024, 2048))
]
SUITES = {
    # Every cache of the library, and of transformers those that a CPU runs fast.
    "cpu": [
        "--caches dynamic,static,h2o,snapkv,pyramidkv,adakv,tova,keydiff,knorm,expected-attention,rkv,massive,"
        "pyramid-config,pyramid,streaming-dense,shadow --lengths 1024,4096 --batch-sizes 1,4 --prefill-rows one"
    ],
    # Table 4 of PyramidInfer comes first.
    "paper": [
        "--model llama-2-13b --caches pyramid,h2o --budgets 0.4 --lengths 512 --batch-sizes 32 --new-tokens 256",
        *LONG_PROMPTS,
    ],
}
# Of `bench ops`. On the CPU the shape of the demo's model, on CUDA that of Llama 3 8B.
OP_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"lengths": [2048, 8192], "dtype": ["float32", "bfloat16"], "heads": 9, "kv_heads": 3, "head_dim": 64},
    "cuda": {"lengths": [8192, 32768, 131072], "dtype": ["bfloat16"], "heads": 32, "kv_heads": 8, "head_dim": 128},
}
# Longer prompts are measured only where --lengths asks for them.
LONGEST_PREFILL = 32768


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time and memory of the caches and of the attention ops",
        description="`bench caches` measures prefill, decode steps and bytes of caches in a model. `bench ops` times "
        "attention with scores beside attention alone. `bench --suite cpu` measures every cache in a real model, in "
        "about ten minutes on two cores. `--suite paper` measures published settings on a device with enough memory. "
        "`--suite gpu` runs everything that needs a GPU in less than ten minutes: the tests marked `cuda`, `bench "
        "ops`, long prompts of ShadowKVCache, a check of scores by another computation, and reads from the host.",
    )
    parser.add_argument("--suite", choices=("cpu", "gpu", "paper"), help="run settings that are made for a purpose")
    parser.add_argument(
        "--parts",
        type=lambda text: [part.strip() for part in text.split(",")],
        metavar="PART,PART,...",
        help=f"run only these parts of `--suite gpu`: {', '.join(gpu_suite.PART_LIMITS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, also after each part")
    parser.set_defaults(run=run, measurement=None)
    measurements = parser.add_subparsers(title="measurements", metavar="caches|ops")
    caches = measurements.add_parser(
        "caches",
        help="prefill, decode steps and bytes of caches in a model",
        description="Reads the same prompt with each cache, continues it by plain `generate`, and compares time and "
        "bytes with DynamicCache in the same run. In each round all caches take their turn.",
    )
    add_caches_options(caches)
    caches.set_defaults(measurement="caches")
    ops = measurements.add_parser(
        "ops",
        help="attention with scores beside attention alone",
        description="Times attention alone, as transformers' sdpa runs it, and attention with scores, as the caches "
        "run it, and shows what the scores cost.",
    )
    add_ops_options(ops)
    ops.set_defaults(measurement="ops")
    for measurement in (caches, ops):
        # Suppressed, so that a file named before the measurement is not forgotten.
        measurement.add_argument(
            "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="write the figures to FILE as well"
        )


def add_caches_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `measure_caches` reads, and where its results go."""
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", help=f"folder or hub id, or a shape with random weights: {shapes} (default: {MODEL_NAME})")
    names = ", ".join(TRANSFORMERS | CACHES)
    add(
        "--caches",
        type=cache_names,
        default="pyramid,h2o,streaming,snapkv,massive,shadow",
        metavar="NAME,NAME,...",
        help=f"short names or class names; dynamic is always measured: {names} (default: %(default)s)",
    )
    add(
        "--budgets",
        type=budgets,
        default="0.25",
        metavar="B,B,...",
        help="fractions of the prompt (0.25), tokens per layer (512) or bytes (256MiB). Each cache of this library is "
        "measured with each of them (default: %(default)s)",
    )
    numbers: dict[str, Any] = {"metavar": "N,N,...", "type": positive_ints}
    add("--lengths", default="2048", help="tokens of the prompts (default: %(default)s)", **numbers)
    add("--batch-sizes", default="1", help="rows (default: %(default)s)", **numbers)
    number: dict[str, Any] = {"metavar": "N", "type": positive_int}
    add("--new-tokens", default=16, help="decode steps that are timed (default: %(default)s)", **number)
    add("--rounds", default=2, help="rounds, in which all caches take their turn (default: %(default)s)", **number)
    rows = "batch: read the prompt with all rows; one: read it with one row and copy that row (default: %(default)s)"
    add("--prefill-rows", choices=("batch", "one"), default="batch", help=rows)
    add("--largest-batch", action="store_true", help="also decode the largest batch that fits, on CUDA")
    add("--stages", action="store_true", help="profile a few steps and show the share of each op in their time")
    add("--seed", type=int, default=0, help="seed of random weights and tokens (default: %(default)s)")
    add_machine_options(parser)
    add("--plot", type=Path, metavar="FILE", help="draw prefill, decode and bytes by length and batch into a PNG")
    tokens = "write the tokens of the longest prompt to FILE, for other programs, and measure nothing"
    add("--save-tokens", type=Path, metavar="FILE", help=tokens)


def add_ops_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `measure_ops` reads."""
    add = parser.add_argument
    number: dict[str, Any] = {"metavar": "N", "type": positive_int}
    add("--device", type=device, help="cpu or cuda (default: cuda if there is one, else cpu)")
    add("--batch-size", default=1, help="rows (default: %(default)s)", **number)
    add("--window", default=64, help="rows that window_scores takes scores from (default: %(default)s)", **number)
    rounds = f"rounds at most; long calls get fewer, at least {LEAST_ROUNDS} (default: %(default)s)"
    enough = functools.partial(positive_int, least=LEAST_ROUNDS)
    add("--rounds", type=enough, default=200, metavar="N", help=rounds)
    lengths = "tokens (default: 2048,8192 on cpu; 8192,32768,131072 on cuda, the last for decoding only)"
    add("--lengths", type=positive_ints, metavar="N,N,...", help=lengths)
    dtypes = "one or more (default: float32 and bfloat16 on cpu, bfloat16 on cuda)"
    add("--dtype", choices=DTYPES, nargs="+", help=dtypes)
    add("--heads", help="query heads (default: 9 on cpu, 32 on cuda)", **number)
    add("--kv-heads", help="KV heads (default: 3 on cpu, 8 on cuda)", **number)
    add("--head-dim", help="dimensions of a head (default: 64 on cpu, 128 on cuda)", **number)


def run(options: argparse.Namespace) -> int:
    """Runs a measurement or a suite and prints the results; returns 1 if a part of a suite failed."""
    suite, parts, measurement = options.suite, options.parts, options.measurement
    if measurement is not None and suite is not None:
        raise ValueError(f"`bench --suite {suite}` has its own settings: give --suite or {measurement}, not both.")
    if measurement is None and suite is None:
        raise ValueError("Nothing to measure: give `caches`, `ops` or --suite. See `pyramid-cache bench --help`.")
    if parts is not None and suite != "gpu":
        raise ValueError("--parts are parts of `bench --suite gpu`: give both, or leave --parts out.")
    check_output("--json", options.json)
    if suite == "gpu":
        record = gpu_suite.run(options.json, parts)
        return int(any(part["failures"] for part in record["parts"].values()))
    if suite is not None:
        runs = [parse(add_caches_options, text) for text in SUITES[suite]]
    elif measurement == "caches":
        check_picture("--plot", options.plot)
        check_output("--save-tokens", options.save_tokens)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        runs = [options]
    from rich.console import Console

    from pyramid_cache.lab.bench import bench_report

    with ProgressBar(Console(stderr=True)) as progress:
        if measurement == "ops":
            records = [measure_ops(options, progress, options.json)]
        elif measurement == "caches" and options.save_tokens is not None:
            _, tokens = build_model(options.model, torch.device("cpu"), "float32", options.seed, progress)
            options.save_tokens.write_text(json.dumps(tokens[: max(options.lengths)].tolist()), encoding="utf-8")
            return 0
        else:
            records = measure_caches(runs, progress, options.json)
    for record in records:
        bench_report.show(record)
    if measurement == "caches" and options.plot is not None:
        bench_report.draw(record, options.plot)
    return 0


def parse(add_options: Callable[[argparse.ArgumentParser], None], text: str) -> argparse.Namespace:
    """The options of a measurement as they would be on the command line."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(text.split())


def measure_caches(
    runs: list[argparse.Namespace], progress: ProgressCallback, path: Path | None = None
) -> list[dict[str, Any]]:
    """
    The records of `bench caches`, one for each of these options: "rows" of `cache_times.as_row`, "model",
    "attn_implementation" and what `describe_run` has. They are written to `path` after each cache.
    """
    records: list[dict[str, Any]] = []
    for options in runs:
        target = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = options.dtype or ("float32" if target.type == "cpu" else "bfloat16")
        if options.largest_batch and target.type != "cuda":
            raise ValueError(f"--largest-batch fills the memory of a CUDA device, which {target} is not.")
        names = "model caches budgets lengths batch_sizes new_tokens rounds prefill_rows largest_batch stages seed"
        settings = {name: getattr(options, name) for name in names.split()} | {"device": target, "dtype": dtype}
        record = describe_run(command_text("caches", settings), target) | {"model": options.model or MODEL_NAME}
        records.append(record)
        progress("Loading the model", 0, None)
        model, tokens = build_model(options.model, target, dtype, options.seed, progress)
        record["attn_implementation"] = model.config._attn_implementation

        def note(rows: list[dict[str, Any]], record: dict[str, Any] = record) -> None:
            record["rows"] = rows
            write_record(record, record if len(runs) == 1 else {"runs": records}, path)

        Bench(model, tokens, options, progress, note).run()
        del model
    return records


def measure_ops(options: argparse.Namespace, progress: ProgressCallback, path: Path | None = None) -> dict[str, Any]:
    """
    The record of `bench ops`: "rows" of `op_times.as_row`, "copy_bytes_per_second", "ratios" and what `describe_run`
    has. It is written to `path` after each row.
    """
    target = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if target.type not in OP_DEFAULTS:
        raise ValueError(f"The ops have kernels for cpu and cuda, not for {target.type}. Choose one by --device.")
    settings = {"device": target, "batch_size": options.batch_size, "window": options.window, "rounds": options.rounds}
    settings |= {name: getattr(options, name) or default for name, default in OP_DEFAULTS[target.type].items()}
    sizes = {name: settings[name] for name in ("batch_size", "heads", "kv_heads", "head_dim", "window")}
    is_cut = target.type == "cuda" and options.lengths is None
    longest_prefill = LONGEST_PREFILL if is_cut else math.inf
    cases = build_shapes(settings["lengths"], settings["dtype"], target, longest_prefill, **sizes)
    if is_cut:
        del settings["lengths"]  # with its lengths the command would measure all prompts
    record = describe_run(command_text("ops", settings), target)
    progress("Copying", 0, None)
    bandwidth = copy_bandwidth(target)
    record |= {
        "copy_bytes_per_second": bandwidth,
        "ratios": "medians over rounds in which attention alone and attention with scores take turns",
        "rows": [],
    }
    for index, (op, shape) in enumerate(cases):
        progress(f"{op}, {shape.length:,} tokens, {shape.dtype_name}", index, len(cases))
        record["rows"].append(measure_op(op, shape, bandwidth, options.rounds))
        write_record(record, record, path)
    return record


def write_record(record: dict[str, Any], written: dict[str, Any], path: Path | None) -> None:
    """Notes in a record how busy the machine is, and writes the record or what holds it."""
    record["machine"]["load_average_after"] = load_average()
    if path is not None:
        write_json(written, path)


def command_text(measurement: str, settings: dict[str, Any]) -> str:
    """The command that measures the same, with nothing left to defaults."""
    words = ["pyramid-cache", "bench", measurement]
    for name, value in settings.items():
        if value is not None and value is not False:
            texts = map(str, value) if isinstance(value, list) else [str(value)] * (value is not True)
            words.append(f"--{name.replace('_', '-')} {(' ' if name == 'dtype' else ',').join(texts)}".strip())
    return " ".join(words)
