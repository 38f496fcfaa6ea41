"""Contexts as `datasets.Dataset`: built, saved to a folder, and read back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question, Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.names import build_contexts, parse_task


if TYPE_CHECKING:
    from datasets import Dataset


# Columns with an entry for each question, and the attribute of a question that the entry is.
QUESTION_COLUMNS = {"question_ids": "ids", "answer_ids": "answer", "values": "values", "depths": "depths"}


def build_dataset(
    task: Task | str, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0, samples: int | None = None
) -> "Dataset":
    """
    The contexts of a generated task, or of the task of a name such as "variables-4096", one a row.

    Columns: `task` (str), `seed` and `index` (int), by which the context can be made again; `text` (str) and
    `input_ids` (list of int), the context; `is_conversation` (bool), whether each question follows the one before;
    and, with an entry for each question: `question_texts` and `answer_texts` (str), `question_ids` and `answer_ids`
    (lists of int), `values` (lists of the first token of a value in its answer and the one behind its last) and
    `depths` (lists of the share of the context before each value). Texts are empty where there is no tokenizer.

    Raises ValueError for a task that cannot be, and ModuleNotFoundError if the extra `eval` is not installed.
    """
    task = parse_task(task) if isinstance(task, str) else task
    haystack = None if tokenizer is None else Haystack(tokenizer)
    return as_dataset(build_contexts(task, haystack, seed, samples), tokenizer, seed)


def as_dataset(
    contexts: Sequence[Context], tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> "Dataset":
    """Contexts as the rows of a dataset; see `build_dataset` for its columns."""
    from datasets import Dataset

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
    return Dataset.from_list(rows, features=features())


def features() -> Any:
    """The types of the columns: lists that are empty in every row have one as well."""
    from datasets import Features, List, Value

    number, text = Value("int64"), Value("string")
    columns = {"task": text, "seed": number, "index": number, "text": text, "input_ids": List(number)}
    columns |= {"is_conversation": Value("bool"), "question_texts": List(text), "answer_texts": List(text)}
    columns |= {"question_ids": List(List(number)), "answer_ids": List(List(number))}
    return Features(columns | {"values": List(List(List(number))), "depths": List(List(Value("float64")))})


def as_contexts(dataset: "Dataset") -> list[Context]:
    """The contexts that a dataset of `build_dataset` holds; a ValueError if a column is missing."""
    missing = [name for name in features() if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no columns {', '.join(missing)}: it is none of contexts. Make one with build_dataset, "
            "or with `pyramid-cache eval --save-data`."
        )
    contexts = []
    for row in dataset:
        columns = [row[name] for name in QUESTION_COLUMNS]
        questions = [Question(*entries) for entries in zip(*columns, strict=True)]
        contexts.append(Context(row["task"], row["input_ids"], questions, row["is_conversation"]))
    return contexts


def save_data(
    contexts: Sequence[Context], folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> None:
    """Writes the contexts of a task as a dataset to a folder of its own in `folder`."""
    as_dataset(contexts, tokenizer, seed).save_to_disk(str(folder / contexts[0].task))


def load_data(
    folder: Path, task: str, tokenizer: PreTrainedTokenizerBase | None, seed: int = 0, samples: int | None = None
) -> list[Context]:
    """Reads the first contexts of a task that `save_data` wrote, or all; a ValueError if there are no such ones."""
    from datasets import load_from_disk

    place = folder / task
    if not place.is_dir():
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        has = f"It has {', '.join(found)}" if found else "It has none"
        raise ValueError(f"{folder} has no contexts of the task {task!r}. {has}. Make them with --save-data.")
    dataset = load_from_disk(str(place))
    contexts = as_contexts(dataset)
    if samples is not None and samples > len(contexts):
        raise ValueError(f"{place} has {len(contexts)} contexts, not {samples}. Ask for as many at most.")
    if any(other != seed for other in dataset["seed"]):
        own = dataset[0]["seed"]
        raise ValueError(f"{place} was made from seed {own}, not {seed}. Give --seed {own}.")
    for text, context in zip(dataset["text"], contexts, strict=True):
        if text != text_of(context.ids, tokenizer):
            raise ValueError(
                f"{place} was made with another tokenizer: its token ids are another text to this model. Make it anew "
                "with --save-data and the same --model."
            )
    return contexts[:samples]


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What tokens say; nothing where there is no tokenizer."""
    return "" if tokenizer is None else str(tokenizer.decode(ids))
