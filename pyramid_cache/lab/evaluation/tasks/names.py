"""The generated tasks by name, and their contexts from a seed. The i-th context of a task is the same however many are made."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyramid_cache.lab.evaluation.recall import MAX_TOKENS
from pyramid_cache.lab.evaluation.tasks.cases import Context
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.key_values import key_value
from pyramid_cache.lab.evaluation.tasks.needles import (
    MAX_KEYS,
    MAX_NEEDLES,
    multi_key,
    multi_query,
    multi_value,
    single,
    turns,
)
from pyramid_cache.lab.evaluation.tasks.passkey import passkey
from pyramid_cache.lab.evaluation.tasks.perplexity import perplexity
from pyramid_cache.lab.evaluation.tasks.recalled_pairs import recalled_pairs
from pyramid_cache.lab.evaluation.tasks.variables import variables
from pyramid_cache.lab.evaluation.tasks.words import common_words, frequent_words


# A task has this many questions, from at most so many contexts, unless it is told how many contexts to have.
NUM_QUESTIONS = 80
MAX_CONTEXTS = 20
NUM_RECALL_CONTEXTS = 4

# Called with where texts come from, the name of the task, its N, its L and a generator of random numbers.
ContextBuilder = Callable[[Haystack, str, int, int, random.Random], Context]

RECALL = "recall"
DEFAULT_TASKS = ("needles-8-1024", "needles-1-4096", "recall-448")


@dataclass(frozen=True)
class TaskKind:
    """
    What tasks of one kind have in common.

    Attributes:
        meaning (`str`): For the list of tasks.
        build (`Callable`, *optional*): Makes a context; None for the recall model's.
        counts (`tuple[int, int]`, *optional*): The least and the greatest N of `kind-N-L`; None if names have no N.
        default_count (`int`): The N of a name without numbers.
        has_question_each (`bool`): Whether a context has N questions, and not one.
    """

    meaning: str
    build: ContextBuilder | None
    counts: tuple[int, int] | None = None
    default_count: int = 0
    has_question_each: bool = False


TASK_KINDS: dict[str, TaskKind] = {
    "needles": TaskKind("N numbers in L tokens of a novel, each asked for", single, (1, MAX_NEEDLES), 1, True),
    "needles-multikey": TaskKind("one of N numbers asked for", multi_key, (1, MAX_KEYS), 4),
    "needles-multivalue": TaskKind("N numbers of one key, all asked for at once", multi_value, (2, MAX_NEEDLES), 4),
    "needles-multiquery": TaskKind("N numbers of N keys, all asked for at once", multi_query, (2, MAX_NEEDLES), 4),
    "turns": TaskKind("as needles, asked for one after another in a conversation", turns, (1, MAX_NEEDLES), 4, True),
    "passkey": TaskKind("64 digits in L tokens of a novel", passkey),
    "variables": TaskKind("a chain of assignments in a novel, and who has the value", variables),
    "common-words": TaskKind("the ten most common words of a list", common_words),
    "frequent-words": TaskKind("the three most frequent words of a coded text", frequent_words),
    "key-value": TaskKind("a value of a JSON object of random pairs", key_value),
    "perplexity": TaskKind("the next 128 tokens of a novel", perplexity),
    RECALL: TaskKind("key-value pairs, for a small model that has learned to recall them", None),
}
TASK_FORMS = ", ".join(f"{kind}-{'N-' if row.counts else ''}L ({row.meaning})" for kind, row in TASK_KINDS.items())


@dataclass(frozen=True)
class Task:
    """
    A task by its parts.

    Attributes:
        kind (`str`): In `TASK_KINDS`.
        count (`int`): The N of its name; 0 if it has none.
        num_tokens (`int`): No context is longer.
    """

    kind: str
    count: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.count}-{self.num_tokens}" if self.count else f"{self.kind}-{self.num_tokens}"

    @property
    def is_for_recall_model(self) -> bool:
        """Whether its tokens are those of the recall model, and of no tokenizer."""
        return self.kind == RECALL

    @property
    def num_contexts(self) -> int:
        """How many contexts the whole task has."""
        if self.is_for_recall_model:
            return NUM_RECALL_CONTEXTS
        num_questions = self.count if TASK_KINDS[self.kind].has_question_each else 1
        return min(math.ceil(NUM_QUESTIONS / num_questions), MAX_CONTEXTS)


def parse_task(name: str) -> Task:
    """
    Reads the name of a task, with its length.

    Raises:
        ValueError: There is no such task.
    """
    return parse_tasks([name])[0]


def parse_tasks(names: Sequence[str], lengths: Sequence[int] = ()) -> list[Task]:
    """
    Reads names of tasks. Those without a length, such as `variables` and `needles-8`, are of each of some lengths; `needles` alone
    is `needles-1`.

    Args:
        names (`Sequence[str]`): See `TASK_FORMS`.
        lengths (`Sequence[int]`): In tokens.

    Raises:
        ValueError: There is no such task, a name has no length and there are no others, or all have one and there are others.
    """
    tasks: list[Task] = []
    num_without = 0
    for name in names:
        kind, count, length = parts_of(name)
        num_without += length is None
        if length is None and not lengths:
            raise ValueError(f"The task {name!r} has no length. Name it {name}-1024, for example, or give --lengths.")
        tasks += [checked(name, Task(kind, count, num)) for num in (lengths if length is None else [length])]
    if lengths and not num_without:
        raise ValueError(
            f"None of the tasks {', '.join(names) or 'of --tasks'} is named without a length: --lengths "
            f"{','.join(map(str, lengths))} has no effect. Leave it out, or name tasks without one."
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


def checked(name: str, task: Task) -> Task:
    """A task that can be."""
    counts = TASK_KINDS[task.kind].counts
    if counts and not counts[0] <= task.count <= counts[1]:
        reason = f": at most {MAX_NEEDLES} differ in their first digit" if counts[1] == MAX_NEEDLES else ""
        raise ValueError(
            f"The task {name!r} hides {task.count} numbers, but its N is from {counts[0]} to {counts[1]}{reason}."
        )
    if task.is_for_recall_model and (task.num_tokens % 2 or task.num_tokens > MAX_TOKENS - 2):
        raise ValueError(
            f"The task {task.name!r} cannot be: keys and values take an even number of tokens, and the model has positions for "
            f"{MAX_TOKENS - 2} before a question."
        )
    return task


def build_contexts(
    task: Task, haystack: Haystack | None = None, seed: int = 0, samples: int | None = None
) -> list[Context]:
    """
    Makes the contexts of a task.

    Args:
        task (`Task`): Which kind, and how long.
        haystack (`Haystack`, *optional*): Where texts and their tokens come from. Tasks for the recall model need none.
        seed (`int`): Chooses the contexts.
        samples (`int`, *optional*): How many to make; by default as many as the task has.

    Raises:
        PromptError: The length cannot be.
        ValueError: The task needs a tokenizer.
    """
    build = TASK_KINDS[task.kind].build
    if build is not None and haystack is None:
        raise ValueError(f"The contexts of {task.name!r} need a tokenizer: give Haystack(tokenizer).")
    contexts = []
    for index in range(samples or task.num_contexts):
        generator = random.Random(f"{task.name} {seed} {index}")
        if build is None:
            contexts.append(recalled_pairs(task.name, task.num_tokens, generator))
        else:
            contexts.append(build(haystack, task.name, task.count, task.num_tokens, generator))
    return contexts
