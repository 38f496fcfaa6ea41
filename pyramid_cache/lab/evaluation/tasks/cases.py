"""A task, and what every task gives: contexts of token ids, with questions and their answers."""

from dataclasses import dataclass, field


RECALL = "recall"


@dataclass(frozen=True)
class Task:
    """A task by its parts."""

    kind: str  # of `TASK_KINDS`
    count: int  # the N of its name, or 0
    num_tokens: int  # how long its contexts are at most

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.count}-{self.num_tokens}" if self.count else f"{self.kind}-{self.num_tokens}"

    @property
    def is_for_recall_model(self) -> bool:
        """Whether its tokens are those of the recall model. All others need a tokenizer."""
        return self.kind == RECALL


@dataclass(frozen=True)
class Question:
    """A question about a context: its tokens, which begin right behind the context, and those of the right answer."""

    ids: list[int]
    answer: list[int]
    # For an answer of several values, where the tokens of each begin and end. The score is the share of those found.
    values: list[list[int]] = field(default_factory=list)
    # For each value, the share of the context before the words that tell it. Empty where no single place tells it.
    depths: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What is read before the questions, which are one or more."""

    task: str  # the name of its task
    ids: list[int]
    questions: list[Question]
    # Whether each question follows the question before and its right answer. Otherwise each follows the context.
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
