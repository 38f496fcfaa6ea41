"""The demo's prompt: a long real text with a fact planted in its middle, and a question about that fact at its end."""

import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


FACT = "\n\nThe secret pass number of the old gatekeeper is {number}. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret pass number of the old gatekeeper mentioned in the text?"


class PromptError(ValueError):
    """The text cannot make the prompts that were asked for; the message names both lengths."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts of the same length."""

    input_ids: torch.Tensor  # (batch, prompt_tokens)
    numbers: list[str]  # the number planted in each row, for which its question asks
    fact_spans: list[tuple[int, int]]  # where the tokens of each row's fact start and end

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def read_text(path: Path | None = None) -> str:
    """The text of a file, or the novel shipped with the package."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is no UTF-8 text: {error}") from error
    novel = resources.files("pyramid_cache.lab").joinpath("data/pride_and_prejudice.txt").read_text(encoding="utf-8")
    return novel[novel.index("It is a truth universally acknowledged") :]


def build_prompts(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt_tokens: int, batch_size: int = 1, seed: int = 0
) -> Prompts:
    """
    Cuts a text into a prompt per row, each of exactly `prompt_tokens` tokens with a number of its own in the middle.
    Rows are different stretches, which overlap where the text is short. The seed chooses numbers and, from 1 on, the
    start.
    """
    generator = random.Random(seed)
    before, after = frame(tokenizer)
    text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    numbers = [str(generator.randint(10_000, 99_999)) for _ in range(batch_size)]
    facts = [tokenizer(FACT.format(number=number), add_special_tokens=False)["input_ids"] for number in numbers]
    text_lengths = [prompt_tokens - len(before) - len(fact) - len(after) for fact in facts]
    longest, shortest = max(text_lengths), min(text_lengths)
    if shortest < 1:
        raise PromptError(
            f"A prompt of {prompt_tokens} tokens has no room for the fact and the question: it takes at least "
            f"{prompt_tokens - shortest + 1}."
        )
    if longest > len(text_ids):
        raise PromptError(
            f"The text has {len(text_ids)} tokens, too few for a prompt of {prompt_tokens}: with the fact and the "
            f"question it makes one of {prompt_tokens - longest + len(text_ids)} tokens."
        )
    num_starts = len(text_ids) - longest + 1
    first_start = generator.randrange(num_starts) if seed else 0
    # Rows of text end to end, and less than that if they would not all be different.
    stride = min(longest, num_starts // batch_size)
    rows, fact_spans = [], []
    for row, (fact, text_length) in enumerate(zip(facts, text_lengths, strict=True)):
        start = (first_start + row * stride) % num_starts
        stretch = text_ids[start : start + text_length]
        middle = end_of_sentence(tokenizer, stretch)
        rows.append(before + stretch[:middle] + fact + stretch[middle:] + after)
        fact_spans.append((len(before) + middle, len(before) + middle + len(fact)))
    return Prompts(torch.tensor(rows), numbers, fact_spans)


def frame(tokenizer: PreTrainedTokenizerBase, question: str = QUESTION) -> tuple[list[int], list[int]]:
    """The token ids before a text and after it: those of the chat template, and behind the text a question's."""
    marker = "\0text\0"
    start_ids = []
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": marker + question}]
        content = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        content = f"{marker}{question}\nAnswer:"
        start_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in content.split(marker))
    return start_ids + before, after


def end_of_sentence(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> int:
    """The index just after the sentence end nearest to the middle of some tokens, or the middle if there is none."""
    middle = len(token_ids) // 2
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    ends = [index + 1 for index, token in enumerate(tokens) if token.endswith(".")]
    return min(ends, key=lambda end: abs(end - middle), default=middle)
