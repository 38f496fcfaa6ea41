"""What tasks hide things in: a novel in tokens, with the frame of the model's chat template around it."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pyramid_cache.lab.demo.planted_number import PromptError, end_of_sentence, frame, read_text
from pyramid_cache.lab.evaluation.tasks.cases import Question


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# How far from where it belongs a needle may move to stand between two sentences.
MAX_SHIFT = 48
# Stands for text that comes later, which chat templates then neither trim nor change.
MARKER = "\0text\0"


class Haystack:
    """
    Makes contexts and questions with a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its chat template, if it has one, frames context and question.

    Attributes:
        before (`list[int]`): The tokens that every context begins with.
        novel (`list[int]`): The tokens of the whole novel.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.before, _ = frame(tokenizer)

    @cached_property
    def novel(self) -> list[int]:
        return self.tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def hide(
        self,
        task: str,
        num_tokens: int,
        needles: Sequence[list[int]],
        generator: random.Random,
        instruction: str = "",
    ) -> tuple[list[int], list[float]]:
        """
        A stretch of the novel with needles in it.

        Args:
            task (`str`): For the message of an error.
            num_tokens (`int`): Of the whole context.
            needles (`Sequence[list[int]]`): Their tokens. They keep their order.
            generator (`random.Random`): Chooses the stretch and the places.
            instruction (`str`): Comes before the text.

        Returns:
            `tuple[list[int], list[float]]`: The context, and the share of it that comes before each needle.

        Raises:
            PromptError: The context is too short for the needles, or longer than the novel.
        """
        before = self.before + self.encode(instruction) if instruction else self.before
        num_text = num_tokens - len(before) - sum(map(len, needles))
        if not len(needles) <= num_text <= len(self.novel):
            raise PromptError(
                f"The task {task!r} cannot be: {len(needles)} hidden texts and the frame take {num_tokens - num_text} tokens, and "
                f"the novel has {len(self.novel)}. Choose another length."
            )
        start = generator.randrange(len(self.novel) - num_text + 1)
        text = self.novel[start : start + num_text]
        cuts = self.scatter(text, len(needles), generator)
        ids, depths, stop = list(before), [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            ids += text[stop:cut]
            depths.append(len(ids) / num_tokens)
            ids += needle
            stop = cut
        return ids + text[stop:], depths

    def scatter(self, text: list[int], num_needles: int, generator: random.Random) -> list[int]:
        """A random place for each needle in its own share of a text, between two sentences if there are two near."""
        cuts, stop = [], 0
        for index in range(num_needles):
            place = int((index + generator.random()) / num_needles * len(text))
            reach = min(MAX_SHIFT, place, len(text) - place)
            cut = place - reach + end_of_sentence(self.tokenizer, text[place - reach : place + reach])
            stop = max(cut, stop)
            cuts.append(stop)
        return cuts

    def question(self, text: str, beginning: str) -> list[int]:
        """A question behind a context, and the beginning of its answer."""
        if not self.tokenizer.chat_template:
            return self.encode(f"\n\n{text}\nAnswer: {beginning}")
        messages = [{"role": "user", "content": f"{MARKER}\n\n{text}"}]
        framed = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(framed.split(MARKER)[1] + beginning)

    def later_question(self, text: str, beginning: str) -> list[int]:
        """A question behind the answer to another, the end of that answer, and the beginning of its own."""
        if not self.tokenizer.chat_template:
            return self.encode(f".\n\n{text}\nAnswer: {beginning}")
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": f"{MARKER}."},
            {"role": "user", "content": text},
        ]
        framed = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(framed.split(MARKER)[1] + beginning)

    def listing(
        self, ids: list[int], values: Sequence[str], depths: Sequence[float], separator: str = ", "
    ) -> Question:
        """
        A question whose answer is several values.

        Args:
            ids (`list[int]`): The question, with the beginning of its answer.
            values (`Sequence[str]`): In the order in which they are asked for.
            depths (`Sequence[float]`): Of each value.
            separator (`str`): Between two values.
        """
        answer: list[int] = []
        spans = []
        for index, value in enumerate(values):
            answer += self.encode(separator) if index else []
            tokens = self.encode(value)
            spans.append([len(answer), len(answer) + len(tokens)])
            answer += tokens
        return Question(ids, answer, spans, list(depths))
