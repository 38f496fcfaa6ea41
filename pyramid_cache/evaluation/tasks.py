"""
The cases: contexts of token ids, with questions and their answers, made from a seed.

- `needles-N-L`: N numbers hidden in L tokens of a novel, and a question about each;
- `recall-L`: L tokens of key-value pairs, and questions about up to 64 of the keys, for the recall model.

The i-th context of a task is the same however many are made.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyramid_cache.demo.prompt import PromptError, end_of_sentence, frame, read_text
from pyramid_cache.evaluation.recall import MAX_TOKENS, random_pairs
from pyramid_cache.terminal import write_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DEFAULT_TASKS = ("needles-8-1024", "needles-1-4096", "recall-448")
TASK_FORMS = "needles-N-L (N numbers in L tokens of a novel) and recall-L (L tokens of key-value pairs)"
# A task has this many questions, from at most so many contexts.
NUM_QUESTIONS = 80
MAX_CONTEXTS = 20
NUM_RECALL_CONTEXTS = 4
MAX_RECALL_QUESTIONS = 64

# SmolLM2-135M has trouble to tell one needle from another, and none to go on with a number that it has begun. Of some twenty
# wordings it answers this one best: the answer begins with the very words of the needle, no two persons share a word, no two
# numbers begin alike, and the digits of a number differ.
NEEDLE = "\n\nThe secret pass number of the {person} is {number}. Remember it.\n\n"
NEEDLE_QUESTION = "\n\nWhat is the secret pass number of the {person} mentioned in the text?"
# It ends in a space, so that the first token of the answer is a digit.
ANSWER_BEGINNING = "The secret pass number of the {person} is "
PERSONS = (
    *("old gatekeeper", "young gardener", "tall miller", "blind captain", "rich doctor", "poor teacher", "lame baker"),
    *("merry lawyer", "grey sailor", "bald painter", "sleepy farmer", "brave soldier", "quiet hunter", "lonely judge"),
    *("clever priest", "angry tailor"),
)
NUM_DIGITS = 5
MAX_NEEDLES = 9
# How far from where it belongs a needle may move to stand between two sentences.
MAX_SHIFT = 48


@dataclass(frozen=True)
class Question:
    """
    A question about a context.

    Attributes:
        ids (`list[int]`): Its tokens, which begin right behind the context.
        answer (`list[int]`): The tokens of the right answer.
    """

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Context:
    """
    What is read before the questions.

    Attributes:
        task (`str`): What it belongs to.
        ids (`list[int]`): Its tokens.
        questions (`list[Question]`): One or more, each of which follows the context on its own.
    """

    task: str
    ids: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Task:
    """
    A task by its parts.

    Attributes:
        kind (`str`): "needles" or "recall".
        num_needles (`int`): Numbers hidden in each context; 0 for recall.
        num_tokens (`int`): Length of each context.
    """

    kind: str
    num_needles: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"needles-{self.num_needles}-{self.num_tokens}" if self.num_needles else f"recall-{self.num_tokens}"

    @property
    def num_contexts(self) -> int:
        """How many contexts the whole task has."""
        if self.kind == "recall":
            return NUM_RECALL_CONTEXTS
        return min(math.ceil(NUM_QUESTIONS / self.num_needles), MAX_CONTEXTS)


def parse_task(name: str) -> Task:
    """
    Reads the name of a task.

    Raises:
        ValueError: There is no such task.
    """
    match = re.fullmatch(r"needles-([1-9]\d*)-([1-9]\d*)", name)
    if match is not None and int(match[1]) <= MAX_NEEDLES:
        return Task("needles", int(match[1]), int(match[2]))
    if match is not None:
        raise ValueError(
            f"The task {name!r} hides {match[1]} numbers, but at most {MAX_NEEDLES} differ in their first digit."
        )
    match = re.fullmatch(r"recall-([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"There is no task {name!r}. Tasks are {TASK_FORMS}.")
    num_tokens = int(match[1])
    if num_tokens % 2 or num_tokens > MAX_TOKENS - 2:
        raise ValueError(
            f"The task {name!r} cannot be: keys and values take an even number of tokens, and the model has positions for "
            f"{MAX_TOKENS - 2} before a question."
        )
    return Task("recall", 0, num_tokens)


def build_needle_contexts(
    tokenizer: "PreTrainedTokenizerBase", task: Task, seed: int = 0, limit: int | None = None
) -> list[Context]:
    """
    Stretches of the novel with numbers hidden in them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its chat template, if it has one, frames text and question.
        task (`Task`): What to hide in how many tokens.
        seed (`int`): Chooses the stretches, who has a number, the numbers and their places.
        limit (`int`, *optional*): How many contexts to make at most.

    Raises:
        PromptError: The context is too short for the numbers, or longer than the novel.
    """
    novel = tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    before, _ = frame(tokenizer)
    contexts = []
    for index in range(min(task.num_contexts, limit or task.num_contexts)):
        generator = random.Random(f"{task.name} {seed} {index}")
        persons = generator.sample(PERSONS, task.num_needles)
        first_digits = generator.sample("123456789", task.num_needles)
        numbers = [
            first + "".join(generator.sample("0123456789".replace(first, ""), NUM_DIGITS - 1))
            for first in first_digits
        ]
        needles = [
            tokenizer(NEEDLE.format(person=person, number=number), add_special_tokens=False)["input_ids"]
            for person, number in zip(persons, numbers, strict=True)
        ]
        num_text = task.num_tokens - len(before) - sum(map(len, needles))
        if not task.num_needles <= num_text <= len(novel):
            raise PromptError(
                f"The task {task.name!r} cannot be: {task.num_needles} numbers and the frame take "
                f"{task.num_tokens - num_text} tokens, and the novel has {len(novel)}."
            )
        start = generator.randrange(len(novel) - num_text + 1)
        text = scatter(tokenizer, novel[start : start + num_text], needles, generator)
        questions = [
            Question(question_ids(tokenizer, person), tokenizer(number, add_special_tokens=False)["input_ids"])
            for person, number in zip(persons, numbers, strict=True)
        ]
        contexts.append(Context(task.name, before + text, questions))
    return contexts


def scatter(
    tokenizer: "PreTrainedTokenizerBase", text: list[int], needles: list[list[int]], generator: random.Random
) -> list[int]:
    """Puts each needle at a random place of its own share of a text, between two sentences if there are two near."""
    parts, stop = [], 0
    for index, needle in enumerate(needles):
        place = int((index + generator.random()) / len(needles) * len(text))
        reach = min(MAX_SHIFT, place, len(text) - place)
        cut = place - reach + end_of_sentence(tokenizer, text[place - reach : place + reach])
        cut = max(cut, stop)
        parts += [text[stop:cut], needle]
        stop = cut
    return [token_id for part in (*parts, text[stop:]) for token_id in part]


def question_ids(tokenizer: "PreTrainedTokenizerBase", person: str) -> list[int]:
    """The question about someone's number, and the answer's beginning."""
    question = NEEDLE_QUESTION.format(person=person)
    ending = question + "\nAnswer: "
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        framed = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ending = framed[framed.index(question) :]
    return tokenizer(ending + ANSWER_BEGINNING.format(person=person), add_special_tokens=False)["input_ids"]


def build_recall_contexts(task: Task, seed: int = 0, limit: int | None = None) -> list[Context]:
    """
    Streams of pairs of a key and its value, no key twice. A question is one of the keys, its answer the value.

    Args:
        task (`Task`): The length of each stream.
        seed (`int`): Chooses the keys and their values.
        limit (`int`, *optional*): How many contexts to make at most.
    """
    contexts = []
    for index in range(min(task.num_contexts, limit or task.num_contexts)):
        generator = random.Random(f"{task.name} {seed} {index}")
        pairs = list(zip(*random_pairs(task.num_tokens // 2, generator), strict=True))
        ids = [token_id for pair in pairs for token_id in pair]
        asked = generator.sample(pairs, min(len(pairs), MAX_RECALL_QUESTIONS))
        contexts.append(Context(task.name, ids, [Question([key], [value]) for key, value in asked]))
    return contexts


def save_contexts(contexts: Sequence[Context], model: str, path: Path) -> None:
    """Writes cases so that other programs can be measured on them: `{"model": ..., "contexts": [...]}`."""
    write_json({"model": model, "contexts": [asdict(context) for context in contexts]}, path)


def load_contexts(path: Path) -> list[Context]:
    """Reads what `save_contexts` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [
        Context(context["task"], context["ids"], [Question(**question) for question in context["questions"]])
        for context in record["contexts"]
    ]
