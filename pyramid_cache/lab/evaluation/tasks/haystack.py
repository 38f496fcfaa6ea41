"""What tasks hide things in: a novel in tokens, with the frame of the model's chat template around it."""

import random
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from pyramid_cache.lab.evaluation.tasks.cases import Question, Task
from pyramid_cache.lab.novel import PromptError, end_of_sentence, frame, read_text


# How far from where it belongs a needle may move to stand between two sentences.
MAX_SHIFT = 48
# Stands for text that comes later, which chat templates then neither trim nor change.
MARKER = "\0text\0"


def different_words(letters: str, length: int, count: int, generator: random.Random) -> list[str]:
    """Made-up words that all differ."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(generator.choices(letters, k=length))] = None
    return list(words)


class Haystack:
    """
    Makes contexts and questions with a tokenizer, whose chat template, if it has one, frames them; of a text, by
    default a novel.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.before, _ = frame(tokenizer)  # the tokens that every context begins with

    @cached_property
    def novel(self) -> list[int]:
        return self.tokenizer(self.text or read_text(), add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def hide(
        self, task: Task, needles: Sequence[list[int]], generator: random.Random, instruction: str = ""
    ) -> tuple[list[int], list[float]]:
        """
        A context that is an instruction and a stretch of the novel with needles in it, and the share of it before each
        needle. A PromptError if it is too short for the needles or longer than the novel.
        """
        before = self.before + self.encode(instruction) if instruction else self.before
        num_text = task.num_tokens - len(before) - sum(map(len, needles))
        if not len(needles) <= num_text <= len(self.novel):
            raise PromptError(
                f"A prompt of {task.num_tokens} tokens cannot be: {len(needles)} hidden texts and the frame take "
                f"{task.num_tokens - num_text} of them, and the text has {len(self.novel)}. Choose another length, or "
                "a longer text."
            )
        start = generator.randrange(len(self.novel) - num_text + 1)
        text = self.novel[start : start + num_text]
        ids, depths, stop = list(before), [], 0
        for index, needle in enumerate(needles):
            # A random place in the needle's own share of the text, between two sentences if there are two near.
            place = int((index + generator.random()) / len(needles) * len(text))
            reach = min(MAX_SHIFT, place, len(text) - place)
            cut = place - reach + end_of_sentence(self.tokenizer, text[place - reach : place + reach])
            start, stop = stop, max(cut, stop)
            ids += text[start:stop]
            depths.append(len(ids) / task.num_tokens)
            ids += needle
        return ids + text[stop:], depths

    def question(self, text: str, beginning: str, is_later: bool = False) -> list[int]:
        """
        A question and the beginning of its answer. It stands behind the context, or, if it is a later one of a
        conversation, behind the answer to the question before, which it ends.
        """
        if not self.tokenizer.chat_template:
            return self.encode(f"{'.' if is_later else ''}\n\n{text}\nAnswer: {beginning}")
        messages = [{"role": "user", "content": f"{MARKER}\n\n{text}"}]
        if is_later:
            messages = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": f"{MARKER}."},
                {"role": "user", "content": text},
            ]
        framed = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return self.encode(framed.split(MARKER)[1] + beginning)

    def listing(
        self, ids: list[int], values: Sequence[str], depths: Sequence[float], separator: str = ", "
    ) -> Question:
        """A question, given with the beginning of its answer, that asks for several values in this order."""
        answer: list[int] = []
        spans = []
        for index, value in enumerate(values):
            answer += self.encode(separator) if index else []
            tokens = self.encode(value)
            spans.append([len(answer), len(answer) + len(tokens)])
            answer += tokens
        return Question(ids, answer, spans, list(depths))
