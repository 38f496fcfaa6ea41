"""The text that models read: a novel, or a file, and what a chat template puts around it."""

from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """The text cannot make the prompts that were asked for; the message names both lengths."""


def read_text(path: Path | None = None) -> str:
    """The text of a file, or the novel shipped with the package."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is no UTF-8 text: {error}") from error
    novel = resources.files("pyramid_cache.lab").joinpath("data/pride_and_prejudice.txt").read_text(encoding="utf-8")
    return novel[novel.index("It is a truth universally acknowledged") :]


def frame(tokenizer: PreTrainedTokenizerBase, question: str = "") -> tuple[list[int], list[int]]:
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
