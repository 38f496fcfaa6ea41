"""`pyramid-cache profile`: its options, and its steps from loading the model to writing the profile."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.engine.profile import FORMAT, VERSION
from pyramid_cache.lab import weights
from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.machine import describe_machine, describe_versions, load_average
from pyramid_cache.lab.profile import activations
from pyramid_cache.lab.terminal import (
    DTYPES,
    ProgressBar,
    check_output,
    check_picture,
    device,
    positive_int,
    write_json,
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model's massive activations and how widely each layer looks",
        description="A model reads stretches of a text. Shows which tokens and dimensions have massive activations and in which "
        "layers, whether keys and values alone tell them, and what the last queries of each layer attend to. The file is what "
        "`MassiveActivationCache(config, profile=FILE)` sets its layers' budgets by.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"folder or hub id of a causal language model (default: {weights.MODEL_NAME})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the profile goes, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as well: a PNG, or what the name says")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to read (default: a novel)")
    parser.add_argument(
        "--tokens", type=positive_int, default=1024, metavar="N", help="length of each stretch (default: 1024)"
    )
    parser.add_argument(
        "--num-texts", type=positive_int, default=8, metavar="K", help="how many stretches (default: 8)"
    )
    parser.add_argument(
        "--window",
        type=positive_int,
        default=64,
        metavar="N",
        help="queries at the end of a stretch that are watched, and tokens that are local to them (default: 64)",
    )
    parser.add_argument("--device", type=device, help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: float32 on cpu, else bfloat16)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures a profile, writes it and prints it."""
    from rich.console import Console

    from pyramid_cache.lab.profile import profile_tables

    check_outputs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    messages = Console(stderr=True)
    text = read_text(options.text)
    is_default = options.model in (None, weights.MODEL_NAME)
    name = weights.MODEL_NAME if is_default else options.model
    messages.print(f"Loading {name}", highlight=False, markup=False, soft_wrap=True)
    with ProgressBar(messages) as progress:
        folder = weights.fetch_default_model(progress) if is_default else options.model
    loaded = load_model(
        folder,
        name=name,
        device=options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=options.dtype,
    )
    check_positions(loaded, options.tokens)
    machine = describe_machine(loaded.model.device)
    texts = activations.cut_texts(loaded.tokenizer, text, options.tokens, options.num_texts)
    with ProgressBar(messages) as progress:
        findings = activations.measure_texts(loaded.model, loaded.tokenizer, texts, options.window, progress)
    record = as_record(findings, loaded, options, machine)
    write_json(record, options.out)
    if options.plot is not None:
        from pyramid_cache.lab.profile import profile_picture

        profile_picture.draw(record, options.plot)
    profile_tables.show(record)
    for path in filter(None, (options.out, options.plot)):
        messages.print(f"Wrote {path}", highlight=False, soft_wrap=True)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises before minutes of work where their results could not be written, or there is nothing to watch."""
    check_output("--out", options.out)
    check_picture("--plot", options.plot)
    if options.text is not None and not options.text.is_file():
        raise ValueError(f"--text {options.text} is no file.")
    if options.tokens <= options.window:
        raise ValueError(
            f"--tokens {options.tokens} must exceed the window of {options.window} tokens: raise it, or lower --window."
        )


def check_positions(loaded: LoadedModel, num_tokens: int) -> None:
    """Raises if the model was not made for sequences of that length."""
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise ValueError(f"--tokens {num_tokens} exceeds the {limit} positions of {loaded.name}.")


def as_record(
    findings: list[activations.TextFindings], loaded: LoadedModel, options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """What `--out` gets; `read_profile` reads the part that caches use."""
    words = ["pyramid-cache", "profile", loaded.name, "--out", str(options.out)]
    words += ["--text", str(options.text)] if options.text is not None else []
    words += ["--tokens", str(options.tokens), "--num-texts", str(options.num_texts), "--window", str(options.window)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture_of(loaded.model.config),
        "settings": {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "text": None if options.text is None else options.text.name,
            "num_tokens": options.tokens,
            "num_texts": options.num_texts,
            "window": options.window,
            "command": shlex.join(words),
        },
        "massive": activations.summarize_massive(findings),
        "layers": activations.summarize_layers(findings),
        "outputs": activations.summarize_outputs(findings),
        "machine": machine | {"load_average_after": load_average()},
        "versions": describe_versions("pyramid_cache", "torch", "transformers"),
    }
