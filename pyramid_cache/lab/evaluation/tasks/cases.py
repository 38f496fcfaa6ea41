"""A task, and what every task gives: contexts of token ids, with questions and their answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pyramid_cache.lab.terminal import write_json


RECALL = "recall"


@dataclass(frozen=True)
class Task:
    """
    A task by its parts: a kind of `TASK_KINDS`, the N of its name or 0, and how long its contexts are at most.
    """

    kind: str
    count: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.count}-{self.num_tokens}" if self.count else f"{self.kind}-{self.num_tokens}"

    @property
    def is_for_recall_model(self) -> bool:
        """Whether its tokens are those of the recall model. All others need a tokenizer."""
        return self.kind == RECALL


@dataclass(frozen=True)
class Question:
    """
    A question about a context.

    Attributes:
        ids (`list[int]`): Its tokens, which begin right behind the context.
        answer (`list[int]`): The tokens of the right answer.
        values (`list[list[int]]`): For an answer of several values, where the tokens of each begin and end. The score
            is the share of values that is found. Empty for an answer that is one value.
        depths (`list[float]`): For each value, the share of the context's tokens that come before the words that tell
            it. Empty where no single place tells it.
    """

    ids: list[int]
    answer: list[int]
    values: list[list[int]] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """
    What is read before the questions, which are one or more.

    Attributes:
        task (`str`): The name of its task.
        is_conversation (`bool`): Whether each question follows the question before and its right answer. Otherwise
            each follows the context on its own.
    """

    task: str
    ids: list[int]
    questions: list[Question]
    is_conversation: bool = False

    @property
    def threads(self) -> list[list[Question]]:
        """The questions that follow each other: all of a conversation, else each on its own."""
        return [self.questions] if self.is_conversation else [[question] for question in self.questions]

    @property
    def in_view(self) -> list[int]:
        """
        Which questions are read with the context: those about which a cache that has evicted then has anything to say.
        The first token of an answer follows from a full reading of the prompt.
        """
        numbers = range(len(self.questions))
        return [number for number in numbers if self.is_conversation or len(self.questions[number].answer) > 1]


def save_contexts(contexts: Sequence[Context], model: str, path: Path) -> None:
    """Writes cases so that other programs can be measured on them: `{"model": ..., "contexts": [...]}`."""
    write_json({"model": model, "contexts": [asdict(context) for context in contexts]}, path)
