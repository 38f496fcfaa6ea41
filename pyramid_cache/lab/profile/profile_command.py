"""`pyramid-cache profile`: its options, and its steps from loading the model to writing the profile."""

import argparse
from pathlib import Path
from typing import Any

from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.lab import terminal
from pyramid_cache.lab.loaded_model import MODEL_HELP, LoadedModel, load_chosen_model, where
from pyramid_cache.lab.machine import describe_end, describe_machine
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.profile import activations


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model's massive activations and how widely each layer looks",
        description="A model reads stretches of a text. The tables show which tokens and dimensions have massive "
        "activations, in which layers, and whether keys and values alone reveal them. They also show what the last "
        "queries of each layer attend to.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--out", type=Path, required=True, metavar="FILE", help="where the profile goes, as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw it as well: a PNG, or what the name says")
    add("--text", type=Path, metavar="FILE", help="the text to read (default: a novel)")
    window = "watched queries at the end of a stretch, and tokens that are local to them (default: 64)"
    number: dict[str, Any] = {"type": terminal.positive_int, "metavar": "N"}
    add("--tokens", default=1024, help="length of each stretch (default: 1024)", **number)
    add("--num-texts", default=8, help="number of stretches (default: 8)", **number | {"metavar": "K"})
    add("--window", default=64, help=window, **number)
    terminal.add_machine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures a profile, writes it and prints it."""
    from pyramid_cache.lab.profile import profile_report

    terminal.check_output("--out", options.out)
    terminal.check_picture("--plot", options.plot)
    terminal.check_input("--text", options.text)
    if options.tokens <= options.window:
        raise ValueError(
            f"--tokens {options.tokens} must exceed the window of {options.window}: raise it, or lower --window."
        )
    text = read_text(options.text)
    messages = terminal.message_console()
    loaded = load_chosen_model(options, messages)
    loaded.require_positions(options.tokens, "--tokens")
    machine = describe_machine(loaded.model.device)
    texts = activations.cut_texts(loaded.tokenizer, text, options.tokens, options.num_texts)
    findings = []
    with terminal.ProgressBar(messages) as progress:
        for index, token_ids in enumerate(texts):
            progress(f"Reading {len(texts)} texts of {options.tokens:,} tokens", index, len(texts))
            findings.append(activations.measure_text(loaded.model, loaded.tokenizer, token_ids, options.window))
    record = as_record(findings, loaded, options, machine)
    terminal.write_json(record, options.out)
    if options.plot is not None:
        profile_report.draw(record, options.plot)
    profile_report.show(record)
    terminal.say_written(messages, options.out, options.plot)


def as_record(
    findings: list[activations.TextFindings], loaded: LoadedModel, options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """The profile for `--out`."""
    chosen = {name: getattr(options, name) for name in ("out", "text", "tokens", "num_texts", "window")}
    return {
        "format": "pyramid_cache profile",
        "version": 1,
        "architecture": architecture_of(loaded.model.config),
        "settings": {
            "model": loaded.name,
            **where(loaded.model),
            "text": None if options.text is None else options.text.name,
            "num_tokens": options.tokens,
            "num_texts": options.num_texts,
            "window": options.window,
            "command": terminal.command_text(["profile", loaded.name], chosen),
        },
        "massive": activations.summarize_massive(findings),
        "layers": activations.summarize_layers(findings),
        "outputs": activations.summarize_outputs(findings),
        **describe_end(machine),
    }
