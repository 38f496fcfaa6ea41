"""`pyramid-cache eval`: its options, and its steps from making the cases to writing the results."""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pyramid_cache.lab import terminal, weights
from pyramid_cache.lab.evaluation import recall, tasks
from pyramid_cache.lab.evaluation.cells import CellStore, Team
from pyramid_cache.lab.evaluation.evaluator import PROTOCOLS, Evaluation, Result, len_behind
from pyramid_cache.lab.evaluation.tasks import Context, Haystack
from pyramid_cache.lab.evaluation.tasks.dataset import load_data, save_data
from pyramid_cache.lab.loaded_model import load_chosen_model, where
from pyramid_cache.lab.machine import describe_end, describe_machine, describe_versions
from pyramid_cache.lab.registry import BASELINE, CACHES, find_entry


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
        description="Asks questions about long contexts with each cache and with the full one: numbers that are "
        "hidden in a novel and other tasks, with a language model, and values of keys, with a small model that has "
        "learned to recall them. Shows exact match, token accuracy and log-likelihood of the right answers.",
    )

    def add(name: str, text: str, **settings: Any) -> None:
        parser.add_argument(name, help=text, **settings)

    def add_list(name: str, read: Callable[[str], list[Any]], default: Sequence[Any], text: str) -> None:
        add(name, f"{text}, with commas between", type=read, default=list(default), metavar="LIST")

    add("--model", f"folder or hub id of a causal language model (default: {weights.MODEL_NAME})")
    names = (
        f"{', '.join(CACHES)} (default: all; the full cache is always measured), with arguments behind them, as in "
    )
    names += "snapkv:quantize=kivi4"
    add_list("--caches", terminal.cache_names, list(CACHES), f"caches, by the names of their classes or of {names}")
    shown = ", ".join(map(str, DEFAULT_BUDGETS))
    add_list("--budgets", terminal.budgets, DEFAULT_BUDGETS, f"fractions of the prompt (default: {shown})")
    forms = f"{tasks.TASK_FORMS}. Each of --lengths stands for a missing L, and N may be missing with it"
    shown = ", ".join(tasks.DEFAULT_TASKS)
    add_list("--tasks", terminal.list_of(str), tasks.DEFAULT_TASKS, f"tasks (default: {shown}): {forms}")
    lengths = "tokens of the contexts of tasks that are named without a length"
    add_list("--lengths", terminal.positive_ints, [], lengths)
    meaning = "context (it is compressed before the question is read) or question (both are read, then compressed)"
    add_list("--protocols", terminal.list_of(protocol), PROTOCOLS, f"protocols (default: both): {meaning}")
    samples = "contexts of each task (default: as many as make 80 questions, and 20 at most)"
    add("--samples", samples, type=terminal.positive_int, metavar="N")
    size = "contexts to read at a time, padded on the left; caches that are built for one length read one (default: 1)"
    add("--batch-size", size, type=terminal.positive_int, default=1, metavar="N")
    add("--seed", "chooses the cases (default: 0)", type=int, default=0)
    terminal.add_machine_options(parser)
    ranks = "processes that hold one model, each a part of its heads; models share the contexts, and --out gets "
    ranks += "answers without reports (default: 1)"
    add("--tensor-parallel", ranks, type=terminal.positive_int, default=1, metavar="N")
    out = "write each answer there at once, and answers.csv, pictures and reports at the end; the same command goes "
    out += "on from what is there, and `accelerate launch` or `torchrun` share the contexts between processes"
    for name, metavar, text in (
        ("--json", "FILE", "write the figures there as well, with every case"),
        ("--out", "FOLDER", out),
        ("--save-cases", "FILE", "write the cases as token ids, and measure nothing"),
        ("--save-data", "FOLDER", "write a data set for each task, and measure nothing"),
        ("--data", "FOLDER", "take the cases from what --save-data wrote there"),
    ):
        add(name, text, type=Path, metavar=metavar)
    picture = (
        "draw exact match against the bytes held of one task and protocol as a PNG, and measure nothing: it needs "
    )
    add("--plot", picture + "--records", type=Path, metavar="FILE")
    records = "what --json or --out wrote in runs on the same cases"
    add("--records", records, type=Path, nargs="+", default=[], metavar="FILE")
    parser.set_defaults(run=run)


def protocol(text: str) -> str:
    """Reads one of `--protocols`."""
    if text not in PROTOCOLS:
        raise ValueError(f"{text!r} is no protocol. Choose from {', '.join(PROTOCOLS)}.")
    return text


class Prepared(NamedTuple):
    """A model with the contexts of its tasks; `decode` makes texts of tokens, which the recall model has none of."""

    name: str
    model: "PreTrainedModel"
    contexts: list[Context]
    decode: Callable[[list[int]], str] | None = None


def run(options: argparse.Namespace) -> None:
    """Evaluates, and prints what came of it."""
    from pyramid_cache.lab.evaluation import score_tables
    from pyramid_cache.lab.evaluation.answers import as_row
    from pyramid_cache.lab.evaluation.folder import ResultFolder

    options.tasks = tasks.parse_tasks(options.tasks, options.lengths)
    check_options(options)
    if options.plot is not None:
        from pyramid_cache.lab.evaluation.frontier import write_picture

        write_picture(options.records, options.tasks[0].name, options.protocols[0], options.plot)
        return terminal.say_written(terminal.message_console(), options.plot)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    team = Team(options.device, options.tensor_parallel)
    options.device = team.device
    messages = terminal.message_console(quiet=team.rank > 0)
    machine = describe_machine(team.device)
    announce = functools.partial(terminal.say, messages)
    store = CellStore(options.out, settings_of_store(options, team), team.rank, announce)
    if not team.leads:
        store.path = None
    # Reports ask the model once more, which one of several ranks cannot.
    has_reports = options.out is not None and options.tensor_parallel == 1
    folder = ResultFolder(options.out, announce) if has_reports else None
    kinds = list(dict.fromkeys(task.is_for_recall_model for task in options.tasks))
    saved_to = options.save_cases or options.save_data
    if saved_to is not None and team.rank > 0:
        return
    # All of them before anything is measured: what is wrong with a task or its model comes to light at once.
    prepared = [prepare(is_recall, options, team.device, messages) for is_recall in kinds]
    if saved_to is not None:
        if options.save_cases is not None:
            contexts = [asdict(context) for context in prepared[0].contexts]
            terminal.write_json({"model": prepared[0].name, "contexts": contexts}, saved_to)
        terminal.say_written(messages, saved_to)
        return
    settings: dict[str, Any] = {}
    for own in prepared:
        store.require_contexts(own.contexts)
        settings |= {"model" if own.decode else "recall_model": own.name} | where(own.model)
        settings |= {"attn_implementation": own.model.config._attn_implementation, "baseline": BASELINE}
    caches = {name: find_entry(name) for name in options.caches}
    results: list[Result] = []
    for own in prepared:
        evaluation = Evaluation(
            own.model, caches, options.budgets, options.protocols, store, options.batch_size, own.decode is not None
        )
        with terminal.ProgressBar(messages) as progress:
            evaluation.measure(own.contexts, progress, team.process, team.num_processes)
        team.share(store)
        results += evaluation.results(own.contexts)
        if folder is not None and team.rank == 0:
            folder.take(evaluation, own.contexts, own.decode)
    team.leave()
    if team.rank > 0:
        return
    record = {
        "rows": [as_row(result) for result in results],
        "settings": settings | {"seed": options.seed, "samples": options.samples, "batch_size": options.batch_size},
        "command": command_of(options),
        **describe_end(machine | {"processes": team.size}),
    }
    written = [] if folder is None else folder.write(record)
    if options.json is not None:
        terminal.write_json(record, options.json)
    score_tables.show(record)
    terminal.say_written(messages, options.json, *written)


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError where options mean nothing, exclude each other, or name files that cannot be written."""
    terminal.check_output("--json", options.json)
    terminal.check_output("--save-cases", options.save_cases)
    terminal.check_output("--plot", options.plot)
    if bool(options.plot) != bool(options.records):
        raise ValueError("--plot draws what --records have: give both of them.")
    if options.plot is not None and (options.plot.suffix != ".png" or len(options.tasks) * len(options.protocols) > 1):
        raise ValueError("--plot draws one task and one protocol: --tasks NAME --protocols NAME --plot FILE.png.")
    known = [*CACHES, "quantized"]
    unknown = [name for name in options.caches if find_entry(name).row not in known]
    if unknown:
        raise ValueError(
            f"--caches {','.join(unknown)} answers as the full cache does. Choose from {', '.join(known)}."
        )
    if not all(isinstance(budget, float) for budget in options.budgets):
        raise ValueError(f"--budgets {','.join(map(str, options.budgets))}: give fractions, 1.0 at most.")
    options.budgets.sort(reverse=True)
    if options.save_data and options.data:
        raise ValueError("--save-data writes cases that are made, and --data reads them: give one of the two.")
    if options.save_data and options.save_cases:
        raise ValueError("--save-cases and --save-data write the same cases in two forms. Give one of them at a time.")
    names = ",".join(task.name for task in options.tasks if not task.is_for_recall_model)
    if options.save_cases is not None and names and any(task.is_for_recall_model for task in options.tasks):
        problem = "--save-cases writes token ids of one model"
        raise ValueError(f"{problem}. Leave out the tasks for the recall model: --tasks {names}.")


def prepare(is_recall: bool, options: argparse.Namespace, target: torch.device, messages: "Console") -> Prepared:
    """Loads the recall model or the other one, and makes its contexts."""
    if is_recall:
        model: Any = recall.load_recall_model(getattr(torch, options.dtype or terminal.default_dtype(target)))
        return Prepared(recall.NAME, model.to(target), find_contexts(options))
    loaded = load_chosen_model(options, messages)
    contexts = find_contexts(options, Haystack(loaded.tokenizer))
    # Beyond these positions the full cache's answers would mean nothing.
    longest = max(len(context.ids) + 1 + len_behind(context.threads) for context in contexts)
    loaded.require_positions(longest, "the length of a task in --tasks")
    decode: Any = functools.partial(loaded.tokenizer.decode, skip_special_tokens=True)
    return Prepared(loaded.name, loaded.model, contexts, decode)


def find_contexts(options: argparse.Namespace, haystack: Haystack | None = None) -> list[Context]:
    """Makes the contexts of the recall model or of a haystack, or reads them; `--save-data` writes them."""
    tokenizer = None if haystack is None else haystack.tokenizer
    contexts: list[Context] = []
    for task in (task for task in options.tasks if task.is_for_recall_model == (haystack is None)):
        if options.data is not None:
            found = load_data(options.data, task.name, tokenizer, options.seed, options.samples)
        else:
            found = tasks.build_contexts(task, haystack, options.seed, options.samples)
        if options.save_data is not None:
            save_data(found, options.save_data, tokenizer, options.seed)
        contexts += found
    return contexts


def settings_of_store(options: argparse.Namespace, team: Team) -> dict[str, Any]:
    """All that answers in the folder of `--out` depend on."""
    return {
        "model": options.model or weights.MODEL_NAME,
        "dtype": options.dtype or terminal.default_dtype(team.device),
        "device": team.device.type,
        "seed": options.seed,
        **({"tensor_parallel": options.tensor_parallel} if options.tensor_parallel > 1 else {}),
        **{f"versions.{name}": version for name, version in describe_versions().items()},
    }


def command_of(options: argparse.Namespace) -> str:
    """The command that measures the same, with nothing left to defaults but where to run."""
    values = vars(options) | {"tasks": [task.name for task in options.tasks]}
    values["tensor_parallel"] = options.tensor_parallel if options.tensor_parallel > 1 else None
    names = "model caches budgets tasks protocols data samples batch_size seed dtype threads tensor_parallel"
    return terminal.command_text(["eval"], {name: values[name] for name in names.split()})
