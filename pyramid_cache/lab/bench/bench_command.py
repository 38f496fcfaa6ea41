"""`pyramid-cache bench`: its options, its suites, and the records that it writes."""

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from pyramid_cache.lab import terminal
from pyramid_cache.lab.bench import gpu_suite, host_costs, serving_loads
from pyramid_cache.lab.bench.cache_times import Bench, contenders_of
from pyramid_cache.lab.bench.decode_times import WAYS, DecodeBench
from pyramid_cache.lab.bench.op_times import LEAST_ROUNDS, SIZES, build_shapes, copy_bandwidth, measure_op
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.machine import describe_run, load_average
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.registry import CACHES, TRANSFORMERS
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback, fetch_default_model


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
        "pyramid-config,pyramid,streaming,shadow --lengths 1024,4096 --batch-sizes 1,4 --prefill-rows one"
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
# Published shapes, which get random weights and so many random tokens.
NUM_TOKENS = 131072
SHAPES = {
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40),
    "smollm2-4-layers": (49152, 576, 1536, 4, 9, 3),  # four layers of SmolLM2-135M
    "tiny": (512, 64, 128, 2, 4, 2),  # for a test on any machine
    "deep-tiny": (128, 64, 64, 32, 4, 2),  # its steps take what the host takes to launch 32 layers
}
# What measures caches in a model, and the options that records name.
KINDS: dict[str, tuple[type[Bench] | type[DecodeBench], str]] = {
    "caches": (
        Bench,
        "model caches budgets lengths batch_sizes new_tokens rounds prefill_rows largest_batch stages seed",
    ),
    "decode": (
        DecodeBench,
        "model caches budgets lengths batch_sizes new_tokens rounds ways compile_mode seed threads",
    ),
}
# Longer prompts are measured only where --lengths asks for them.
LONGEST_PREFILL = 32768


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time and memory of the caches and of the attention ops",
        description="`bench caches` measures prefill, decode steps and bytes of caches in a model. `bench decode` "
        "times decode steps, compiled and not. `bench ops` times "
        "attention with scores beside attention alone. `bench host` counts what decode steps ask of the host. "
        "`bench serving` serves many requests with the same blocks, compressed and not. "
        "`bench --suite cpu` measures every cache in a real model, in "
        "about ten minutes on two cores. `--suite paper` measures published settings on a device with enough memory. "
        "`--suite gpu` runs everything that needs a GPU in nine minutes: `bench decode` in an 8B model, a long prompt "
        "of ShadowKVCache, PyramidInfer's setting, the tests marked `cuda`, `bench ops`, a check of scores by another "
        "computation, and reads from the host.",
    )
    parser.add_argument("--suite", choices=("cpu", "gpu", "paper"), help="run settings that are made for a purpose")
    parts = f"run these parts of `--suite gpu`: {', '.join(gpu_suite.PART_LIMITS)} (default: those that FILE lacks)"
    parser.add_argument("--parts", type=terminal.list_of(str), metavar="PART,PART,...", help=parts)
    seconds = f"most seconds of `--suite gpu` (default: {gpu_suite.ALL_SECONDS}). What does not fit is left for later"
    parser.add_argument("--seconds", type=terminal.positive_int, metavar="N", help=seconds)
    rehearse = "run the parts of `--suite gpu` on the CPU, with small models and shapes; the figures mean nothing"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    figures = "write the figures to FILE, also after each part. `--suite gpu` goes on with what FILE has"
    parser.add_argument("--json", type=Path, metavar="FILE", help=figures)
    parser.set_defaults(run=run, measurement=None)
    measurements = parser.add_subparsers(title="measurements", metavar="caches|decode|ops|host|serving")
    for name, add_options, text, description in (
        (
            "caches",
            add_caches_options,
            "prefill, decode steps and bytes of caches in a model",
            "Reads the same prompt with each cache, continues it by plain `generate`, and compares time and bytes "
            "with DynamicCache in the same run. In each round all caches take their turn.",
        ),
        (
            "decode",
            add_decode_options,
            "decode steps, compiled and not",
            "Times steps of plain `generate` with each cache, beside DynamicCache, compiled StaticCache, and copies "
            "of the bytes that a step reads. Compilation is timed apart. In each round all caches take their turn.",
        ),
        (
            "ops",
            add_ops_options,
            "attention with scores beside attention alone",
            "Times attention alone, as transformers' sdpa runs it, and attention with scores, as the caches run it, "
            "and shows what the scores cost.",
        ),
        (
            "host",
            add_host_options,
            "Python calls, torch ops and waits of a decode step, counted",
            "Counts what uncompiled decode steps of a small model on the CPU ask of the host with each cache, beside "
            "DynamicCache. Counts differ between versions of torch, transformers and Python, but not with load.",
        ),
        (
            "serving",
            add_serving_options,
            "requests of continuous batching, compressed and not",
            "Serves the same requests by transformers' continuous batching with the same number of blocks: as they "
            "are, and compressed by each cache. Shows how many hold blocks at a time, and tokens per second.",
        ),
    ):
        measurement = measurements.add_parser(name, help=text, description=description)
        add_options(measurement)
        # Suppressed, so that a file named before the measurement is not forgotten.
        into: dict[str, Any] = {"type": Path, "metavar": "FILE", "default": argparse.SUPPRESS}
        measurement.add_argument("--json", help="write the figures to FILE as well", **into)
        measurement.set_defaults(measurement=name)


def add_caches_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Bench`, and where its results go."""
    add_workload_options(parser, caches="pyramid,h2o,streaming,snapkv,massive,shadow", new_tokens=16)
    add = parser.add_argument
    rows = "batch: read the prompt with all rows; one: read it with one row and copy that row (default: %(default)s)"
    add("--prefill-rows", choices=("batch", "one"), default="batch", help=rows)
    add("--largest-batch", action="store_true", help="also decode the largest batch that fits, on CUDA")
    add("--stages", action="store_true", help="profile a few steps and show the share of each op in their time")
    add("--plot", type=Path, metavar="FILE", help="draw prefill, decode and bytes by length and batch into a PNG")
    tokens = "write the tokens of the longest prompt to FILE, for other programs, and measure nothing"
    add("--save-tokens", type=Path, metavar="FILE", help=tokens)


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `DecodeBench`."""
    add_workload_options(parser, caches="static,snapkv,h2o,streaming,tova,keydiff", new_tokens=64)
    add = parser.add_argument
    ways = "how steps of this library's caches run: eager, compiled or both (default: %(default)s). Caches that "
    ways += "`generate` cannot compile run eager"
    add("--ways", type=terminal.list_of(way), default=",".join(WAYS), metavar="WAY,WAY", help=ways)
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    mode = "mode of torch.compile (default: reduce-overhead on CUDA, which makes CUDA graphs, else default)"
    add("--compile-mode", choices=modes, help=mode)


def way(text: str) -> str:
    """Reads one of `WAYS`."""
    if text not in WAYS:
        raise ValueError(f"{text!r} is none of {', '.join(WAYS)}")
    return text


def add_workload_options(parser: argparse.ArgumentParser, caches: str, new_tokens: int) -> None:
    """Adds what is measured in which model on which machine, with these caches and steps by default."""
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", help=f"folder or hub id, or a shape with random weights: {shapes} (default: {MODEL_NAME})")
    names = ", ".join(TRANSFORMERS | CACHES)
    known = f"short names or class names; dynamic is always measured: {names} (default: %(default)s)"
    add("--caches", type=terminal.cache_names, default=caches, metavar="NAME,NAME,...", help=known)
    amounts = "fractions of the prompt (0.25), tokens per layer (512) or bytes (256MiB). Each cache of this library "
    amounts += "is measured with each of them (default: %(default)s)"
    add("--budgets", type=terminal.budgets, default="0.25", metavar="B,B,...", help=amounts)
    numbers: dict[str, Any] = {"metavar": "N,N,...", "type": terminal.positive_ints}
    add("--lengths", default="2048", help="tokens of the prompts (default: %(default)s)", **numbers)
    add("--batch-sizes", default="1", help="rows (default: %(default)s)", **numbers)
    number: dict[str, Any] = {"metavar": "N", "type": terminal.positive_int}
    add("--new-tokens", default=new_tokens, help="decode steps that are timed (default: %(default)s)", **number)
    add("--rounds", default=2, help="rounds, in which all caches take their turn (default: %(default)s)", **number)
    add("--seed", type=int, default=0, help="seed of random weights and tokens (default: %(default)s)")
    terminal.add_machine_options(parser)


def add_ops_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `measure_ops` reads."""
    add = parser.add_argument
    number: dict[str, Any] = {"metavar": "N", "type": terminal.positive_int}
    add("--device", type=terminal.device, help="cpu or cuda (default: cuda if there is one, else cpu)")
    add("--batch-size", default=1, help="rows (default: %(default)s)", **number)
    add("--window", default=64, help="rows that window_scores takes scores from (default: %(default)s)", **number)
    rounds = f"rounds at most; long calls get fewer, at least {LEAST_ROUNDS} (default: %(default)s)"
    enough = functools.partial(terminal.positive_int, least=LEAST_ROUNDS)
    add("--rounds", type=enough, default=200, metavar="N", help=rounds)
    lengths = "tokens (default: 2048,8192 on cpu; 8192,32768,131072 on cuda, the last for decoding only)"
    add("--lengths", type=terminal.positive_ints, metavar="N,N,...", help=lengths)
    dtypes = "one or more (default: float32 and bfloat16 on cpu, bfloat16 on cuda)"
    add("--dtype", choices=terminal.DTYPES, nargs="+", help=dtypes)
    add("--heads", help="query heads (default: 9 on cpu, 32 on cuda)", **number)
    add("--kv-heads", help="KV heads (default: 3 on cpu, 8 on cuda)", **number)
    add("--head-dim", help="dimensions of a head (default: 64 on cpu, 128 on cuda)", **number)


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `measure_host` reads."""
    add = parser.add_argument
    caches = "short names or class names; dynamic is always counted (default: every cache of this library)"
    add("--caches", type=terminal.cache_names, default=",".join(CACHES), metavar="NAME,NAME,...", help=caches)
    amounts = "fractions of the prompt, tokens per layer or bytes, all less than the prompt (default: %(default)s)"
    add("--budgets", type=terminal.budgets, default="0.25", metavar="B,B,...", help=amounts)
    number: dict[str, Any] = {"metavar": "N", "type": terminal.positive_int}
    add("--layers", default=4, help="decoder layers of the model (default: %(default)s)", **number)
    add("--prompt-length", default=600, help="tokens of the prompt (default: %(default)s)", **number)
    steps = "steps that are counted: take a multiple of every eviction interval (default: %(default)s)"
    add("--steps", default=32, help=steps, **number)
    add("--seed", type=int, default=0, help="seed of weights and tokens (default: %(default)s)")


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `measure_serving` reads."""
    add = parser.add_argument
    add(
        "--model",
        help=f"folder or hub id, or a shape with random weights: {', '.join(SHAPES)} (default: {MODEL_NAME})",
    )
    caches = "short names or class names; requests as they are, dynamic, are always served (default: %(default)s)"
    add("--caches", type=terminal.cache_names, default="snapkv", metavar="NAME,NAME,...", help=caches)
    amounts = "fractions of the prompt or tokens per layer (default: %(default)s)"
    add("--budgets", type=terminal.budgets, default="0.25", metavar="B,B,...", help=amounts)
    number: dict[str, Any] = {"metavar": "N", "type": terminal.positive_int}
    add("--requests", default=64, help="requests, which come all at once (default: %(default)s)", **number)
    add("--prompt-tokens", default=2000, help="tokens of each prompt (default: %(default)s)", **number)
    add("--new-tokens", default=64, help="tokens of each answer (default: %(default)s)", **number)
    blocks = "blocks of the paged cache (default: those that a quarter of the requests takes as they are)"
    add("--blocks", help=blocks, **number)
    add("--page-size", default=16, help="tokens of a block (default: %(default)s)", **number)
    add("--max-batch-tokens", default=512, help="tokens of a forward pass (default: %(default)s)", **number)
    add("--seed", type=int, default=0, help="seed of random weights and tokens (default: %(default)s)")
    terminal.add_machine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs a measurement or a suite and prints the results; returns 1 if a part of a suite failed."""
    suite, parts, measurement = options.suite, options.parts, options.measurement
    if measurement is not None and suite is not None:
        raise ValueError(f"`bench --suite {suite}` has its own settings: give --suite or {measurement}, not both.")
    if measurement is None and suite is None:
        raise ValueError(
            "Nothing to measure: give `caches`, `decode`, `ops`, `host`, `serving` or --suite. See `bench --help`."
        )
    if suite != "gpu" and (parts or options.seconds or options.rehearse):
        raise ValueError("--parts, --seconds and --rehearse are for `bench --suite gpu`: give it, or leave them out.")
    terminal.check_output("--json", options.json)
    if suite == "gpu":
        record = gpu_suite.run(options.json, parts, options.seconds, options.rehearse)
        return int(not record["is_complete"] or any(part["failures"] for part in record["parts"].values()))
    if suite is not None:
        runs = [parse(add_caches_options, text) for text in SUITES[suite]]
    elif measurement == "caches":
        terminal.check_picture("--plot", options.plot)
        terminal.check_output("--save-tokens", options.save_tokens)
    if measurement in KINDS or measurement == "serving":
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        runs = [options]
    from pyramid_cache.lab.bench import bench_report

    with terminal.ProgressBar(terminal.message_console()) as progress:
        if measurement == "ops":
            records = [measure_ops(options, progress, options.json)]
        elif measurement == "host":
            records = [measure_host(options, progress, options.json)]
        elif measurement == "serving":
            records = [measure_serving(options, progress, options.json)]
        elif measurement == "caches" and options.save_tokens is not None:
            _, tokens = build_model(options.model, torch.device("cpu"), "float32", options.seed, progress)
            options.save_tokens.write_text(json.dumps(tokens[: max(options.lengths)].tolist()), encoding="utf-8")
            return 0
        else:
            records = measure_caches(runs, progress, options.json, measurement or "caches")
    for record in records:
        bench_report.show(record)
    if measurement == "caches" and options.plot is not None:
        bench_report.draw(record, options.plot)
    return 0


def shape_config(name: str, num_layers: int | None = None) -> LlamaConfig:
    """
    The config of one of `SHAPES`, with another number of layers where one is given. What costs no time, such as the
    kind of RoPE, is that of any Llama.
    """
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    sizes: dict[str, Any] = dict(zip(names.split(), SHAPES[name], strict=True))
    sizes["num_hidden_layers"] = num_layers or sizes["num_hidden_layers"]
    return LlamaConfig(max_position_embeddings=4096 if name == "llama-2-13b" else NUM_TOKENS, **sizes)


def build_model(
    name: str | None,
    device: torch.device,
    dtype: str,
    seed: int,
    progress: ProgressCallback,
    num_layers: int | None = None,
) -> tuple[PreTrainedModel, torch.Tensor]:
    """
    The model of a shape, folder or hub id, by default the demo's; and tokens, random or a novel, `(tokens,)`.
    `num_layers` is for shapes.
    """
    torch.manual_seed(seed)
    if name in SHAPES:
        with torch.device(device):
            config = shape_config(name, num_layers)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return model, torch.randint(model.config.vocab_size, (NUM_TOKENS,))
    loaded = load_model(name or fetch_default_model(progress), name or MODEL_NAME, device, dtype)
    ids = loaded.tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return loaded.model, torch.tensor(ids)


def parse(add_options: Callable[[argparse.ArgumentParser], None], text: str) -> argparse.Namespace:
    """The options of a measurement as they would be on the command line."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(text.split())


def measure_caches(
    runs: list[argparse.Namespace],
    progress: ProgressCallback,
    path: Path | None = None,
    kind: str = "caches",
    earlier: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """
    The records of `bench caches` or `bench decode`, one for each of these options; written after each cache. Rows of
    `bench decode` that earlier records or runs have are not measured again: all must be of the same model and steps.
    """
    records: list[dict[str, Any]] = []
    bench_class, names = KINDS[kind]
    loaded: dict[tuple[Any, ...], tuple[PreTrainedModel, torch.Tensor]] = {}
    for options in runs:
        target = options.device or terminal.default_device()
        dtype = options.dtype or terminal.default_dtype(target)
        if kind == "caches" and options.largest_batch and target.type != "cuda":
            raise ValueError(f"--largest-batch fills the memory of a CUDA device, which {target} is not.")
        settings = {name: getattr(options, name) for name in names.split()} | {"device": target, "dtype": dtype}
        record = describe_run(terminal.command_text(["bench", kind], settings), target)
        record["model"] = options.model or MODEL_NAME
        records.append(record)
        wanted = options.model, target, dtype, options.seed
        if wanted not in loaded:
            progress("Loading the model", 0, None)
            loaded.clear()  # before the next one fills the memory
            loaded[wanted] = build_model(*wanted, progress)
        record["attn_implementation"] = loaded[wanted][0].config._attn_implementation

        def note(rows: list[dict[str, Any]], record: dict[str, Any] = record) -> None:
            record["rows"] = rows
            write_record(record, path, records if len(runs) > 1 else None)

        bench = bench_class(*loaded[wanted], options, progress, note)
        record |= bench.facts
        if isinstance(bench, DecodeBench):
            bench.restore([row for known in (*earlier, *records) for row in known.get("rows", [])])
        bench.run()
        del bench  # which holds the model
    return records


def measure_ops(options: argparse.Namespace, progress: ProgressCallback, path: Path | None = None) -> dict[str, Any]:
    """The record of `bench ops`: "rows" of `op_times.as_row` and what `describe_run` has; written after each row."""
    target = options.device or terminal.default_device()
    if target.type not in OP_DEFAULTS:
        raise ValueError(f"The ops have kernels for cpu and cuda, not for {target.type}. Choose one by --device.")
    settings = {"device": target, "batch_size": options.batch_size, "window": options.window, "rounds": options.rounds}
    settings |= {name: getattr(options, name) or default for name, default in OP_DEFAULTS[target.type].items()}
    settings["dtype"] = tuple(settings["dtype"])  # several words of the command
    sizes = {name: settings[name] for name in SIZES}
    is_cut = target.type == "cuda" and options.lengths is None
    longest_prefill = LONGEST_PREFILL if is_cut else math.inf
    cases = build_shapes(settings["lengths"], settings["dtype"], target, longest_prefill, **sizes)
    if is_cut:
        del settings["lengths"]  # with its lengths the command would measure all prompts
    record = describe_run(terminal.command_text(["bench", "ops"], settings), target)
    progress("Copying", 0, None)
    bandwidth = copy_bandwidth(target)
    ratios = "medians over rounds in which attention alone and attention with scores take turns"
    record |= {"copy_bytes_per_second": bandwidth, "ratios": ratios, "rows": []}
    for index, (op, shape) in enumerate(cases):
        progress(f"{op}, {shape.length:,} tokens, {shape.dtype_name}", index, len(cases))
        record["rows"].append(measure_op(op, shape, bandwidth, options.rounds))
        write_record(record, path)
    return record


def measure_host(options: argparse.Namespace, progress: ProgressCallback, path: Path | None = None) -> dict[str, Any]:
    """The record of `bench host`: "rows" of `host_costs.measure_cache` and what `describe_run` has."""
    names, device = ("caches", "budgets", "layers", "prompt_length", "steps", "seed"), torch.device("cpu")
    settings = {name: getattr(options, name) for name in names}
    record = describe_run(terminal.command_text(["bench", "host"], settings), device)
    model, tokens = build_model("tiny", device, "float32", options.seed, progress, options.layers)
    num_tokens = options.prompt_length + host_costs.num_later(options.steps)
    if num_tokens > len(tokens):
        raise ValueError(f"The prompt and all steps are {num_tokens:,} tokens; there are {len(tokens):,} to read.")
    record |= {"counts": "per decoder layer and step, uncompiled", "rows": []}
    contenders = contenders_of(options.caches, options.budgets)
    for index, contender in enumerate(contenders):
        progress(f"{contender.label}: counting", index, len(contenders))
        baseline = record["rows"][0] if index else None
        row = host_costs.measure_cache(model, contender, tokens[:num_tokens], options.steps, baseline)
        record["rows"].append(row)
        write_record(record, path)
    return record


def measure_serving(
    options: argparse.Namespace, progress: ProgressCallback, path: Path | None = None
) -> dict[str, Any]:
    """The record of `bench serving`: "rows" of `serving_loads.serve` and what `describe_run` has."""
    target = options.device or terminal.default_device()
    dtype = options.dtype or terminal.default_dtype(target)
    names = "model caches budgets requests prompt_tokens new_tokens blocks page_size max_batch_tokens seed threads"
    least = -(-(options.prompt_tokens + options.new_tokens) // options.page_size)
    if options.blocks is None:  # the scheduler keeps 15 % of them free
        options.blocks = int(max(options.requests // 4, 1) * least / 0.85) + 1
    if options.blocks < least:
        raise ValueError(
            f"A request takes {least:,} blocks of {options.page_size} tokens: give --blocks {least} or more."
        )
    settings = {name: getattr(options, name) for name in names.split()} | {"device": target, "dtype": dtype}
    record = describe_run(terminal.command_text(["bench", "serving"], settings), target)
    record |= {"model": options.model or MODEL_NAME, "num_blocks": options.blocks, "page_size": options.page_size}
    record["rows"] = []
    progress("Loading the model", 0, None)
    model, tokens = build_model(options.model, target, dtype, options.seed, progress)
    prompts = serving_loads.requests_of(tokens, options.requests, options.prompt_tokens)
    contenders = contenders_of(options.caches, options.budgets)
    for contender in contenders:
        serving_loads.check(model, contender, options.prompt_tokens)
    for index, contender in enumerate(contenders):
        progress(f"{contender.label}: {options.requests} requests", index, len(contenders))
        row = serving_loads.serve(model, contender, prompts, options)
        baseline = record["rows"][0] if record["rows"] else row
        for name in ("tokens_per_second", "most_in_flight"):
            row[f"{name}_ratio"] = row[name] / baseline[name]
        record["rows"].append(row)
        write_record(record, path)
    return record


def write_record(record: dict[str, Any], path: Path | None, runs: list[dict[str, Any]] | None = None) -> None:
    """Notes in a record how busy the machine is, and writes it, or all runs where there are several."""
    record["machine"]["load_average_after"] = load_average()
    if path is not None:
        terminal.write_json({"runs": runs} if runs else record, path)
