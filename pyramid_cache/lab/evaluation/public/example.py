"""One question of a public set, as text, and how it becomes tokens."""

from dataclasses import dataclass, field

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


@dataclass(frozen=True)
class Example:
    """
    A question of a public set.

    Attributes:
        context (`str`): What is compressed.
        question (`str`): What is asked behind it.
        beginning (`str`): How the answer begins, which the model is given.
        answer (`str`): What would be right, whose log-likelihood is measured.
        references (`list[str]`): What a generated answer is compared with.
        metric (`str`): In `METRICS`.
        max_new_tokens (`int`): How long an answer may be.
        choices (`list[str]`): What an answer may be, if the metric asks.
        is_chat (`bool`): Whether the chat template frames it. Without, the model goes on with the text, which is how sets of
            examples and of code are asked.
    """

    context: str
    question: str
    answer: str
    references: list[str]
    metric: str
    max_new_tokens: int
    beginning: str = ""
    choices: list[str] = field(default_factory=list)
    is_chat: bool = True


def as_context(task: str, example: Example, haystack: Haystack) -> Context:
    """The tokens of a question of a public set."""
    bos_id = haystack.tokenizer.bos_token_id
    before = haystack.before if example.is_chat else [] if bos_id is None else [bos_id]
    if example.is_chat:
        ids = haystack.question(example.question, example.beginning)
    else:
        ids = haystack.encode(example.question + example.beginning)
    # Tokens of words begin with the space before them.
    space = " " if example.beginning and not example.beginning[-1].isspace() else ""
    question = Question(
        ids,
        haystack.encode(space + example.answer),
        metric=example.metric,
        references=example.references,
        choices=example.choices,
        max_new_tokens=example.max_new_tokens,
    )
    return Context(task, before + haystack.encode(example.context), [question])
