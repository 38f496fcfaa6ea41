"""What every task gives: contexts of token ids, with questions and their answers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pyramid_cache.lab.terminal import write_json


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
        metric (`str`): What scores a generated answer, in `METRICS`. Empty for a question of which the right answer is read
            and no answer is generated.
        references (`list[str]`): The right answers that the metric compares with.
        choices (`list[str]`): What an answer may be, for metrics that have to know.
        max_new_tokens (`int`): How many tokens are generated at most.
    """

    ids: list[int]
    answer: list[int]
    values: list[list[int]] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    metric: str = ""
    references: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    max_new_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Of the question and the longest answer to it."""
        return len(self.ids) + max(len(self.answer), self.max_new_tokens)


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
