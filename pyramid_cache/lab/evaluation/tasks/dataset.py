"""Contexts as `datasets.Dataset`: built, saved to a folder, and read back."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyramid_cache.lab.evaluation.extras import import_package
from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.names import Task, build_contexts, parse_task


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# Columns with an entry for each question, and the attribute of a question that the entry is.
QUESTION_COLUMNS = {
    "question_ids": "ids",
    "answer_ids": "answer",
    "values": "values",
    "depths": "depths",
    "metrics": "metric",
    "references": "references",
    "choices": "choices",
    "max_new_tokens": "max_new_tokens",
}


def build_dataset(
    task: Task | str, tokenizer: "PreTrainedTokenizerBase | None" = None, seed: int = 0, samples: int | None = None
) -> "Dataset":
    """
    The contexts of a generated task, one a row.

    Columns: `task` (str), `seed` and `index` (int), by which the context can be made again; `text` (str) and `input_ids` (list of
    int), the context; `is_conversation` (bool), whether each question follows the one before; and, with an entry for each
    question: `question_texts` and `answer_texts` (str), `question_ids` and `answer_ids` (lists of int), `values` (lists of the first
    token of a value in its answer and the one behind its last), `depths` (lists of the share of the context before each value),
    and, where an answer is generated, `metrics`, `references`, `choices` and `max_new_tokens`: see `Question`. Texts are empty where
    there is no tokenizer.

    Args:
        task (`Task` or `str`): Or its name, such as "variables-4096".
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the model. `recall-L` has none.
        seed (`int`): Chooses the contexts.
        samples (`int`, *optional*): How many; by default as many as the task has.

    Raises:
        ValueError: There is no such task, its length cannot be, or it needs a tokenizer.
        ModuleNotFoundError: The extra `eval` is not installed.
    """
    task = parse_task(task) if isinstance(task, str) else task
    haystack = None if tokenizer is None else Haystack(tokenizer)
    return as_dataset(build_contexts(task, haystack, seed, samples), tokenizer, seed)


def as_dataset(
    contexts: Sequence[Context], tokenizer: "PreTrainedTokenizerBase | None" = None, seed: int = 0
) -> "Dataset":
    """Contexts as the rows of a dataset; see `build_dataset` for its columns."""
    datasets = import_package("datasets")
    rows = []
    for index, context in enumerate(contexts):
        questions = context.questions
        row: dict[str, Any] = {
            "task": context.task,
            "seed": seed,
            "index": index,
            "text": text_of(context.ids, tokenizer),
            "input_ids": context.ids,
            "is_conversation": context.is_conversation,
            "question_texts": [text_of(question.ids, tokenizer) for question in questions],
            "answer_texts": [text_of(question.answer, tokenizer) for question in questions],
        }
        row |= {name: [getattr(question, field) for question in questions] for name, field in QUESTION_COLUMNS.items()}
        rows.append(row)
    return datasets.Dataset.from_list(rows, features=features())


def features() -> Any:
    """The types of the columns: lists that are empty in every row have one as well."""
    datasets = import_package("datasets")
    number, share, text = (datasets.Value(name) for name in ("int64", "float64", "string"))
    lists = datasets.List
    return datasets.Features(
        {
            "task": text,
            "seed": number,
            "index": number,
            "text": text,
            "input_ids": lists(number),
            "is_conversation": datasets.Value("bool"),
            "question_texts": lists(text),
            "answer_texts": lists(text),
            "question_ids": lists(lists(number)),
            "answer_ids": lists(lists(number)),
            "values": lists(lists(lists(number))),
            "depths": lists(lists(share)),
            "metrics": lists(text),
            "references": lists(lists(text)),
            "choices": lists(lists(text)),
            "max_new_tokens": lists(number),
        }
    )


def as_contexts(dataset: "Dataset") -> list[Context]:
    """
    The contexts that a dataset of `build_dataset` holds.

    Raises:
        ValueError: A column is missing.
    """
    missing = [name for name in features() if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no columns {', '.join(missing)}: it is none of contexts. Make one with build_dataset, or with "
            "`pyramid-cache eval --save-data`."
        )
    contexts = []
    for row in dataset:
        columns = [row[name] for name in QUESTION_COLUMNS]
        questions = [
            Question(**dict(zip(QUESTION_COLUMNS.values(), entries, strict=True)))
            for entries in zip(*columns, strict=True)
        ]
        contexts.append(Context(row["task"], row["input_ids"], questions, row["is_conversation"]))
    return contexts


def save_data(
    contexts: Sequence[Context], folder: Path, tokenizer: "PreTrainedTokenizerBase | None" = None, seed: int = 0
) -> None:
    """Writes the contexts of a task as a dataset to a folder of its own in `folder`."""
    as_dataset(contexts, tokenizer, seed).save_to_disk(str(folder_of(folder, contexts[0].task)))


def load_data(
    folder: Path,
    task: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seed: int = 0,
    samples: int | None = None,
) -> list[Context]:
    """
    Reads contexts of a task that `save_data` wrote.

    Args:
        folder (`Path`): Given to `save_data`.
        task (`str`): Its name.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the model that is to read the contexts.
        seed (`int`): That they were made from.
        samples (`int`, *optional*): How many, from the first on; by default all.

    Raises:
        ValueError: The folder has no such task, or has it of another tokenizer, of another seed or with fewer contexts.
    """
    place = folder_of(folder, task)
    if not place.is_dir():
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        has = f"It has {', '.join(found)}" if found else "It has none"
        raise ValueError(f"{folder} has no contexts of the task {task!r}. {has}. Make them with --save-data.")
    dataset = import_package("datasets").load_from_disk(str(place))
    contexts = as_contexts(dataset)
    if samples is not None and samples > len(contexts):
        raise ValueError(f"{place} has {len(contexts)} contexts, not {samples}. Ask for as many at most.")
    if any(other != seed for other in dataset["seed"]):
        raise ValueError(
            f"{place} was made from seed {dataset[0]['seed']}, not {seed}. Give --seed {dataset[0]['seed']}."
        )
    for text, context in zip(dataset["text"], contexts, strict=True):
        if text != text_of(context.ids, tokenizer):
            raise ValueError(
                f"{place} was made with another tokenizer: its token ids are another text to this model. Make it anew with "
                "--save-data and the same --model."
            )
    return contexts[:samples]


def text_of(ids: list[int], tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """What tokens say; nothing where there is no tokenizer."""
    return "" if tokenizer is None else tokenizer.decode(ids)


def folder_of(folder: Path, task: str) -> Path:
    """Where a task is within a folder: some names have characters that paths cannot have."""
    return folder / re.sub(r"[^\w.-]", "_", task)
