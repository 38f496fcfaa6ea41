"""What every task gives: contexts of token ids, with questions and their answers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pyramid_cache.terminal import write_json


@dataclass(frozen=True)
class Question:
    """
    A question about a context.

    Attributes:
        ids (`list[int]`): Its tokens, which begin right behind the context.
        answer (`list[int]`): The tokens of the right answer.
        values (`list[list[int]]`): Where the tokens of each value begin and end in an answer of several: it is scored by the
            share of them that is found. Empty for an answer that is one value.
        depths (`list[float]`): For each value, the share of the context's tokens that come before the words that tell it.
            Empty where no single place tells it.
    """

    ids: list[int]
    answer: list[int]
    values: list[list[int]] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """
    What is read before the questions.

    Attributes:
        task (`str`): What it belongs to.
        ids (`list[int]`): Its tokens.
        questions (`list[Question]`): One or more.
        is_conversation (`bool`): Whether each question follows the question before and its right answer. Otherwise each
            follows the context on its own.
    """

    task: str
    ids: list[int]
    questions: list[Question]
    is_conversation: bool = False


def save_contexts(contexts: Sequence[Context], model: str, path: Path) -> None:
    """Writes cases so that other programs can be measured on them: `{"model": ..., "contexts": [...]}`."""
    write_json({"model": model, "contexts": [asdict(context) for context in contexts]}, path)


def load_contexts(path: Path) -> list[Context]:
    """Reads what `save_contexts` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [
        Context(**{**context, "questions": [Question(**question) for question in context["questions"]]})
        for context in record["contexts"]
    ]
