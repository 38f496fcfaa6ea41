"""The generated tasks by name, and their contexts from a seed, which do not depend on how many are made."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyramid_cache.lab.evaluation.recall import MAX_TOKENS
from pyramid_cache.lab.evaluation.tasks import list_tasks as lists
from pyramid_cache.lab.evaluation.tasks import novel_tasks as novel
from pyramid_cache.lab.evaluation.tasks.cases import RECALL, Context, Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.novel_tasks import MAX_KEYS, MAX_NEEDLES


# A task has this many questions, from at most so many contexts, unless it is told how many contexts to have.
NUM_QUESTIONS = 80
MAX_CONTEXTS = 20
NUM_RECALL_CONTEXTS = 4
DEFAULT_TASKS = ("needles-8-1024", "needles-1-4096", "recall-448")


@dataclass(frozen=True)
class TaskKind:
    """What tasks of one kind have in common."""

    meaning: str
    build: Callable[[Haystack, Task, random.Random], Context]
    counts: tuple[int, int] | None = None  # the least and the greatest N of `kind-N-L`; None if names have no N
    default_count: int = 0  # the N of a name without numbers
    has_question_each: bool = False  # a context has N questions, and not one


NEEDLES = (1, MAX_NEEDLES)
SEVERAL = (2, MAX_NEEDLES)
TASK_KINDS: dict[str, TaskKind] = {
    "needles": TaskKind("N numbers in L tokens of a novel, each asked for", novel.needles, NEEDLES, 1, True),
    "needles-multikey": TaskKind("one of N numbers asked for", novel.multi_key, (1, MAX_KEYS), 4),
    "needles-multivalue": TaskKind("N numbers of one key, all asked for at once", novel.multi_value, SEVERAL, 4),
    "needles-multiquery": TaskKind("N numbers of N keys, all asked for at once", novel.multi_query, SEVERAL, 4),
    "turns": TaskKind("as needles, asked for one after another in a conversation", novel.turns, NEEDLES, 4, True),
    "passkey": TaskKind("64 digits in L tokens of a novel", novel.passkey),
    "variables": TaskKind("a chain of assignments in a novel, and who has the value", novel.variables),
    "common-words": TaskKind("the ten most common words of a list", lists.common_words),
    "frequent-words": TaskKind("the three most frequent words of a coded text", lists.frequent_words),
    "key-value": TaskKind("a value of a JSON object of random pairs", lists.key_value),
    "perplexity": TaskKind("the next 128 tokens of a novel", novel.perplexity),
    RECALL: TaskKind("key-value pairs, for a small model that has learned to recall them", lists.recalled_pairs),
}
TASK_FORMS = ", ".join(f"{kind}-{'N-' if row.counts else ''}L ({row.meaning})" for kind, row in TASK_KINDS.items())


def num_contexts(task: Task) -> int:
    """How many contexts the whole task has."""
    if task.is_for_recall_model:
        return NUM_RECALL_CONTEXTS
    num_questions = task.count if TASK_KINDS[task.kind].has_question_each else 1
    return min(math.ceil(NUM_QUESTIONS / num_questions), MAX_CONTEXTS)


def parse_task(name: str) -> Task:
    """Reads the name of a task, with its length; raises ValueError if there is none."""
    return parse_tasks([name])[0]


def parse_tasks(names: Sequence[str], lengths: Sequence[int] = ()) -> list[Task]:
    """
    Reads names of tasks; see `TASK_FORMS`. Those without a length, such as `variables` and `needles-8`, get each of
    some lengths in tokens. Raises ValueError for tasks that cannot be, missing lengths, and lengths that none needs.
    """
    tasks: list[Task] = []
    found = [(name, *parts_of(name)) for name in names]
    for name, kind, count, length in found:
        if length is None and not lengths:
            raise ValueError(f"The task {name!r} has no length. Name it {name}-1024, for example, or give --lengths.")
        counts = TASK_KINDS[kind].counts
        if counts and not counts[0] <= count <= counts[1]:
            reason = f": at most {MAX_NEEDLES} differ in their first digit" if counts[1] == MAX_NEEDLES else ""
            raise ValueError(
                f"The task {name!r} hides {count} numbers, but its N is from {counts[0]} to {counts[1]}{reason}."
            )
        tasks += [Task(kind, count, num) for num in (lengths if length is None else [length])]
    if not tasks:
        raise ValueError("--tasks names no task.")
    for task in tasks:
        if task.is_for_recall_model and (task.num_tokens % 2 or task.num_tokens > MAX_TOKENS - 2):
            raise ValueError(
                f"The task {task.name!r} cannot be: keys and values take an even number of tokens, and the model has "
                f"positions for {MAX_TOKENS - 2} before a question."
            )
    if lengths and all(length is not None for *_, length in found):
        raise ValueError(
            f"None of the tasks {', '.join(names)} is named without a length: --lengths {','.join(map(str, lengths))} "
            "has no effect. Leave it out, or name tasks without one."
        )
    return list(dict.fromkeys(tasks))


def parts_of(name: str) -> tuple[str, int, int | None]:
    """The kind, the N and the L of a name."""
    match = re.fullmatch(r"([a-z]+(?:-[a-z]+)*)((?:-[1-9]\d*)*)", name)
    numbers = [int(number) for number in match[2].split("-")[1:]] if match else []
    row = TASK_KINDS.get(match[1]) if match else None
    if row is None or len(numbers) > (2 if row.counts else 1):
        raise ValueError(f"There is no task {name!r}. Tasks are {TASK_FORMS}.")
    if not row.counts:
        return match[1], 0, numbers[0] if numbers else None
    return match[1], numbers[0] if numbers else row.default_count, numbers[1] if len(numbers) > 1 else None


def build_contexts(
    task: Task, haystack: Haystack | None = None, seed: int = 0, samples: int | None = None
) -> list[Context]:
    """Makes so many contexts of a task from a seed, or all. A ValueError if it cannot be, or needs a haystack."""
    if haystack is None and not task.is_for_recall_model:
        raise ValueError(f"The contexts of {task.name!r} need a tokenizer: give Haystack(tokenizer).")
    build = TASK_KINDS[task.kind].build
    generators = (random.Random(f"{task.name} {seed} {index}") for index in range(samples or num_contexts(task)))
    return [build(haystack, task, generator) for generator in generators]
