"""`pyramid-cache profile`: its options, and its steps from loading the model to writing the profile."""

import argparse
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.lab import terminal
from pyramid_cache.lab.loaded_model import MODEL_HELP, LoadedModel, load_chosen_model, where
from pyramid_cache.lab.machine import describe_end, describe_machine
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.profile import activations, sharing
from pyramid_cache.lab.profile.sharing import NUM_TEXTS, NUM_TOKENS


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model's massive activations and how widely each layer looks",
        description="A model reads stretches of a text. The tables show which tokens and dimensions have massive "
        "activations, in which layers, and whether keys and values alone reveal them. They also show what the last "
        "queries of each layer attend to. With --sharing, it is found instead which layers can use the keys and "
        "values of others, for KVSharerCache.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--out", type=Path, required=True, metavar="FILE", help="where the profile goes, as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw it as well: a PNG, or what the name says")
    add("--text", type=Path, metavar="FILE", help="the text to read (default: a novel)")
    window = "watched queries at the end of a stretch, and tokens that are local to them (default: 64)"
    number: dict[str, Any] = {"type": terminal.positive_int, "metavar": "N"}
    add("--tokens", help=f"length of each stretch (default: 1024; {NUM_TOKENS} with --sharing)", **number)
    texts = f"number of stretches (default: 8; {NUM_TEXTS} with --sharing)"
    add("--num-texts", help=texts, **number | {"metavar": "K"})
    add("--window", default=64, help=window, **number)
    add("--sharing", help="find N layers that can use the cache of another layer", **number)
    terminal.add_machine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures a profile, writes it and prints it."""
    from pyramid_cache.lab.profile import profile_report

    terminal.check_output("--out", options.out)
    terminal.check_picture("--plot", options.plot)
    terminal.check_input("--text", options.text)
    if options.sharing is not None and options.plot is not None:
        raise ValueError("--plot draws massive activations, which are not measured with --sharing. Leave it out.")
    options.tokens = options.tokens or (1024 if options.sharing is None else NUM_TOKENS)
    options.num_texts = options.num_texts or (8 if options.sharing is None else NUM_TEXTS)
    if options.sharing is None and options.tokens <= options.window:
        raise ValueError(
            f"--tokens {options.tokens} must exceed the window of {options.window}: raise it, or lower --window."
        )
    text = read_text(options.text)
    messages = terminal.message_console()
    loaded = load_chosen_model(options, messages)
    loaded.require_positions(options.tokens, "--tokens")
    machine = describe_machine(loaded.model.device)
    texts = activations.cut_texts(loaded.tokenizer, text, options.tokens, options.num_texts)
    if options.sharing is not None:
        write_sharing(texts, loaded, options, machine, messages)
        return
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


def write_sharing(
    texts: list[torch.Tensor],
    loaded: LoadedModel,
    options: argparse.Namespace,
    machine: dict[str, Any],
    messages: "terminal.Console",
) -> None:
    """Finds which layers can share, writes it and prints it. Raises ValueError if they are fewer than were asked."""
    from pyramid_cache.lab.profile import profile_report

    with terminal.ProgressBar(messages) as progress:
        found = sharing.find_sharing(loaded.model, torch.cat(texts), options.sharing, progress)
    if len(found) < options.sharing:
        raise ValueError(
            f"--sharing {options.sharing}: only {len(found)} layers can share with the last hidden states staying "
            f"above a cosine of {sharing.LEAST_SIMILARITY}. Ask for {len(found)}, or give another --text."
        )
    record = heading(loaded, options, ("out", "text", "tokens", "num_texts", "sharing"))
    record |= {"sharing": sharing.as_rows(found), **describe_end(machine)}
    terminal.write_json(record, options.out)
    profile_report.show_sharing(record)
    terminal.say_written(messages, options.out)


def as_record(
    findings: list[activations.TextFindings], loaded: LoadedModel, options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """The profile for `--out`."""
    record = heading(loaded, options, ("out", "text", "tokens", "num_texts", "window"))
    record["settings"]["window"] = options.window
    return record | {
        "massive": activations.summarize_massive(findings),
        "layers": activations.summarize_layers(findings),
        "outputs": activations.summarize_outputs(findings),
        **describe_end(machine),
    }


def heading(loaded: LoadedModel, options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """What a profile says of its model and of the command, whose options have these names."""
    chosen = {name: getattr(options, name) for name in names}
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
            "command": terminal.command_text(["profile", loaded.name], chosen),
        },
    }
