"""Which tasks the options of the command name, and the contexts of these."""

import argparse
from collections.abc import Sequence

from pyramid_cache.lab.evaluation.public.loading import PublicTask, load_contexts_of, parse_public_task
from pyramid_cache.lab.evaluation.tasks import Context, Haystack, Task, build_contexts, parse_tasks
from pyramid_cache.lab.evaluation.tasks.dataset import load_data, save_data


def find_tasks(options: argparse.Namespace) -> list[Task | PublicTask]:
    """
    The tasks of `--tasks` and `--lengths`, those of public sets last.

    Raises:
        ValueError: They cannot be, or `--data` and `--save-data` are both given.
    """
    if options.data is not None and options.save_data is not None:
        raise ValueError("--save-data writes cases that are made, and --data reads them: give one of the two.")
    public = {name: task for name in options.tasks if (task := parse_public_task(name)) is not None}
    generated = [name for name in options.tasks if name not in public]
    if not options.tasks:
        raise ValueError("--tasks names no task.")
    return [*(parse_tasks(generated, options.lengths) if generated or options.lengths else ()), *public.values()]


def find_contexts(
    chosen: Sequence[Task | PublicTask], options: argparse.Namespace, haystack: Haystack | None = None
) -> list[Context]:
    """
    The contexts of tasks: made, read from where a public set is, or read from `--data`. `--save-data` writes them.

    Args:
        chosen (`Sequence`): All for the recall model or all for another.
        options (`argparse.Namespace`): Of the command.
        haystack (`Haystack`, *optional*): Of the other model's tokenizer.
    """
    tokenizer = None if haystack is None else haystack.tokenizer
    contexts: list[Context] = []
    for task in chosen:
        if options.data is not None:
            found = load_data(options.data, task.name, tokenizer, options.seed, options.samples)
        elif isinstance(task, PublicTask):
            found = load_contexts_of(task, haystack, options.samples)
        else:
            found = build_contexts(task, haystack, options.seed, options.samples)
        if options.save_data is not None:
            save_data(found, options.save_data, tokenizer, options.seed)
        contexts += found
    return contexts
