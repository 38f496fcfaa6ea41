"""`pyramid-cache eval`: its options, and its steps from making the cases to writing the results."""

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyramid_cache.lab import weights
from pyramid_cache.lab.evaluation import recall
from pyramid_cache.lab.evaluation.asking import Writing
from pyramid_cache.lab.evaluation.caches import BASELINE, CACHES
from pyramid_cache.lab.evaluation.cells import CellStore
from pyramid_cache.lab.evaluation.evaluator import PROTOCOLS, Evaluation, Result, len_behind
from pyramid_cache.lab.evaluation.figures import figures_of_task
from pyramid_cache.lab.evaluation.public.loading import PUBLIC_FORMS
from pyramid_cache.lab.evaluation.selection import find_contexts, find_tasks
from pyramid_cache.lab.evaluation.tasks import DEFAULT_TASKS, TASK_FORMS, Context, Haystack, save_contexts
from pyramid_cache.lab.evaluation.team import Team
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.machine import describe_machine, describe_versions, load_average
from pyramid_cache.lab.terminal import DTYPES, ProgressBar, check_output, device, positive_int, write_json


if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel


DEFAULT_BUDGETS = (0.5, 0.25, 0.1)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "eval",
        aliases=["evaluate"],
        help="ask questions about long contexts with each cache, and see what it has lost",
        description="Asks questions about long contexts with each cache and with the full one: numbers that are hidden in a "
        "novel and other tasks, with a language model, and values of keys, with a small model that has learned to recall them. "
        "Shows exact match, token accuracy and log-likelihood of the right answers.",
    )
    parser.add_argument("--model", help=f"folder or hub id of a causal language model (default: {weights.MODEL_NAME})")
    parser.add_argument(
        "--caches",
        type=cache_names,
        default=list(CACHES),
        metavar="NAMES",
        help=f"comma-separated list of {', '.join(CACHES)}; the full cache is always measured (default: all)",
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        default=list(DEFAULT_BUDGETS),
        metavar="NUMBERS",
        help=f"fractions of the prompt (default: {','.join(map(str, DEFAULT_BUDGETS))})",
    )
    parser.add_argument(
        "--tasks",
        type=split,
        default=list(DEFAULT_TASKS),
        metavar="NAMES",
        help=f"comma-separated list of {TASK_FORMS}, {PUBLIC_FORMS}; -L, or -N-L, is left out of a name to have it for each of --lengths; "
        f"default: {','.join(DEFAULT_TASKS)}",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=[],
        metavar="NUMBERS",
        help="comma-separated tokens of the contexts of tasks that are named without a length",
    )
    parser.add_argument(
        "--protocols",
        type=protocols,
        default=list(PROTOCOLS),
        metavar="NAMES",
        help="context (it is compressed before the question is read), question (both are read, then compressed), or both "
        "with a comma (default: both)",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        metavar="N",
        help="contexts of each task (default: as many as make 80 questions, and 20 at most)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=1,
        metavar="N",
        help="contexts of a task to read at a time, padded on the left; streaming, streaming-dense and shadow, which are built for "
        "one length, are asked about one after another (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the cases (default: 0)")
    parser.add_argument("--device", type=device, help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights and the cache (default: float32 on cpu, else bfloat16)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well, with every case")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write each answer there at once, and answers.csv, pictures and reports at the end; the same command goes on from what is there, and "
        "`accelerate launch` or `torchrun` share the contexts between processes",
    )
    parser.add_argument(
        "--save-cases",
        type=Path,
        metavar="FILE",
        help="write the cases there as token ids, for other programs, and measure nothing",
    )
    parser.add_argument(
        "--save-data",
        type=Path,
        metavar="FOLDER",
        help="write the cases there as data sets, one for each task, and measure nothing",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="take the cases from there, where --save-data wrote them"
    )
    parser.set_defaults(run=run)


def names_of(text: str, known: Sequence[str]) -> list[str]:
    """Reads a comma-separated list of known names."""
    names = split(text)
    if not names or any(name not in known for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of {', '.join(known)}")
    return names


def split(text: str) -> list[str]:
    """The parts between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def cache_names(text: str) -> list[str]:
    """Reads `--caches`."""
    return names_of(text, list(CACHES))


def protocols(text: str) -> list[str]:
    """Reads `--protocols`."""
    return names_of(text, PROTOCOLS)


def budgets(text: str) -> list[float]:
    """Reads `--budgets`."""
    try:
        fractions = [float(part) for part in split(text)]
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of fractions between 0 and 1")
    return sorted(fractions, reverse=True)


def lengths(text: str) -> list[int]:
    """Reads `--lengths`."""
    return [positive_int(part) for part in split(text)]


def run(options: argparse.Namespace) -> None:
    """Evaluates, and prints what came of it."""
    from rich.console import Console

    from pyramid_cache.lab.evaluation import score_tables
    from pyramid_cache.lab.evaluation.folder import ResultFolder

    check_output("--json", options.json)
    options.tasks = find_tasks(options)
    check_cases(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    team = Team(options.device)
    messages = Console(stderr=True, quiet=team.process > 0)
    machine = describe_machine(team.device)
    announce = functools.partial(messages.print, highlight=False, markup=False, soft_wrap=True)
    store = open_store(options, team, announce)
    folder = None if options.out is None else ResultFolder(options.out, announce)
    settings: dict[str, Any] = {}
    kinds = list(dict.fromkeys(task.is_for_recall_model for task in options.tasks))
    if options.save_data is not None and team.process > 0:
        kinds = []
    # All of them before anything is measured: what is wrong with a task or its model comes to light at once.
    prepared = [(is_recall, *prepare(is_recall, options, team.device, messages)) for is_recall in kinds]
    evaluations = []
    for is_recall, name, model, contexts, writing in prepared:
        if options.save_cases is not None:
            save_contexts(contexts, name, options.save_cases)
            messages.print(f"Wrote {options.save_cases}", highlight=False, soft_wrap=True)
            return
        if options.save_data is not None:
            continue
        store.require_contexts(contexts)
        settings |= {"recall_model" if is_recall else "model": name} | settings_of(model)
        caches = {name: CACHES[name] for name in options.caches}
        evaluation = Evaluation(model, caches, options.budgets, options.protocols, store, writing, options.batch_size)
        evaluations.append((evaluation, contexts, writing))
    results: list[Result] = []
    for evaluation, contexts, writing in evaluations:
        with ProgressBar(messages) as progress:
            evaluation.measure(contexts, progress, team.process, team.num_processes)
        team.share(store)
        results += evaluation.results(contexts)
        if folder is not None and team.process == 0:
            folder.take(evaluation, contexts, None if writing is None else writing.decode)
    team.leave()
    if team.process > 0:
        return
    if options.save_data is not None:
        messages.print(f"Wrote {options.save_data}", highlight=False, soft_wrap=True)
        return
    record = {
        "rows": [score_tables.as_row(result) | figures_of_task(result) for result in results],
        "settings": settings | {"seed": options.seed, "samples": options.samples, "batch_size": options.batch_size},
        "command": command_of(options),
        "machine": machine | {"processes": team.num_processes, "load_average_after": load_average()},
        "versions": describe_versions("pyramid_cache", "torch", "transformers"),
    }
    written = []
    if options.json is not None:
        write_json(record, options.json)
        written.append(options.json)
    if folder is not None:
        written += folder.write(record)
    score_tables.show(record)
    for path in written:
        messages.print(f"Wrote {path}", highlight=False, soft_wrap=True)


def open_store(options: argparse.Namespace, team: Team, announce: Callable[[str], None]) -> CellStore:
    """Where answers go: to the folder of `--out`, if it has none of another model, type, seed, or version."""
    settings = {
        "model": options.model or weights.MODEL_NAME,
        "dtype": options.dtype or default_dtype(team.device),
        "device": team.device.type,
        "seed": options.seed,
        "versions": describe_versions("pyramid_cache", "torch", "transformers"),
    }
    return CellStore(options.out, settings, team.process, announce)


def check_cases(options: argparse.Namespace) -> None:
    """Raises where `--save-cases` could not be written, or would hold token ids of two models."""
    if options.save_cases is None:
        return
    if options.save_data is not None:
        raise ValueError("--save-cases and --save-data write the same cases in two forms. Give one of them at a time.")
    check_output("--save-cases", options.save_cases)
    if len({task.is_for_recall_model for task in options.tasks}) > 1:
        names = ",".join(task.name for task in options.tasks if not task.is_for_recall_model)
        raise ValueError(
            f"--save-cases writes token ids of one model. Leave out the tasks for the recall model: --tasks {names}."
        )


def prepare(
    is_recall: bool, options: argparse.Namespace, target: torch.device, messages: "Console"
) -> tuple[str, "PreTrainedModel", list[Context], Writing | None]:
    """
    The name of a model, the model, the contexts of all tasks that are for it (those of the recall model or the others), and how its
    tokens become text.
    """
    chosen = [task for task in options.tasks if task.is_for_recall_model == is_recall]
    if is_recall:
        model = recall.load_recall_model(getattr(torch, options.dtype or default_dtype(target))).to(target)
        return recall.NAME, model, find_contexts(chosen, options), None
    name = options.model or weights.MODEL_NAME
    messages.print(f"Loading {name}", highlight=False, markup=False, soft_wrap=True)
    with ProgressBar(messages) as progress:
        folder = options.model or weights.fetch_default_model(progress)
    loaded = load_model(folder, name=name, device=target, dtype=options.dtype)
    contexts = find_contexts(chosen, options, Haystack(loaded.tokenizer))
    check_positions(loaded.model, name, contexts)
    decode = functools.partial(loaded.tokenizer.decode, skip_special_tokens=True)
    return name, loaded.model, contexts, Writing(decode, loaded.end_token_ids)


def default_dtype(target: torch.device) -> str:
    """That of `load_model`."""
    return "float32" if target.type == "cpu" else "bfloat16"


def check_positions(model: "PreTrainedModel", name: str, contexts: Sequence[Context]) -> None:
    """Raises if the model was not made for sequences of that length: the full cache's answer would mean nothing."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(context.ids) + 1 + len_behind(context) for context in contexts)
    if limit is not None and longest > limit:
        raise ValueError(
            f"Contexts with questions and answers of up to {longest} tokens exceed the {limit} positions of {name}. Choose "
            "shorter ones with --tasks."
        )


def settings_of(model: "PreTrainedModel") -> dict[str, Any]:
    """What figures depend on beside the options."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_implementation": model.config._attn_implementation,
        "baseline": BASELINE,
    }


def command_of(options: argparse.Namespace) -> str:
    """The command that measures the same, with nothing left to defaults but where to run."""
    words = ["pyramid-cache", "eval"]
    if options.model is not None:
        words += ["--model", options.model]
    words += ["--caches", ",".join(options.caches), "--budgets", ",".join(map(str, options.budgets))]
    words += ["--tasks", ",".join(task.name for task in options.tasks), "--protocols", ",".join(options.protocols)]
    if options.data is not None:
        words += ["--data", str(options.data)]
    for name in ("samples", "batch_size", "seed", "dtype", "threads"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
