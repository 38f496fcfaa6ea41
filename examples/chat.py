"""Chat with a model whose cache stays small, however long the conversation gets.

    python examples/chat.py
    python examples/chat.py --cache StreamingLLMCache --budget 512
    python examples/chat.py --script turns.txt --cache DynamicCache

Answers are printed as they are generated. A line after each answer has the tokens that the cache has seen, the tokens
that the fullest layer holds, and the bytes of the cache. /reset begins a new conversation; /exit or an end of input
ends.

`--setting protect=N` keeps the first N tokens, such as the system prompt of the chat template.

The cache gets each token once. `generate` is given the whole history as token ids, and processes only the tokens that
the cache has not seen. Later turns cannot use what was evicted. Only StreamingLLMCache goes on beyond the length that
a model was trained for, because it counts positions within its window.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from script_options import add_cache_options, add_model_options, load_model, new_cache, num_kept, run
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.terminal import positive_int
from pyramid_cache.lab.timed_generation import held_bytes


ANSWER = "\0answer\0"
PROMPT = "you: "


def turn_ids(tokenizer: PreTrainedTokenizerBase, text: str, is_first: bool) -> list[int]:
    """
    The token ids that the chat template puts between the last answer and the next: the end of the last answer, what
    the user says, and the head of the next answer. Earlier turns stay as they were generated.

    Args:
        text (`str`): What the user says.
        is_first (`bool`): Whether this is the first turn; the template may begin with a system prompt then.

    Raises:
        ValueError: The tokenizer has no chat template, or one that does not repeat answers as they are.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer of this model has no chat template. Name a model that is made for chats.")
    before = [] if is_first else [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    messages = [*before, {"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not is_first:
        _, found, rendered = rendered.partition(ANSWER)
        if not found:
            raise ValueError("The chat template of this model changes earlier answers. Name another model.")
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


class Conversation:
    """
    A conversation of any number of turns, all of it in one cache.

    Args:
        cache (`Cache`): A new one.
        max_new_tokens (`int`): No answer gets longer.

    Attributes:
        history (`list[int]`): All tokens so far, those that the cache has evicted too.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, max_new_tokens: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.max_new_tokens = max_new_tokens
        self.history: list[int] = []

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Answers what the user says, and shows the tokens to `streamer` as they come."""
        new_ids = turn_ids(self.tokenizer, text, is_first=not self.history)
        if self.history[-1:] == new_ids[:1]:  # the answer ended by itself, with the token that ends it in the template
            new_ids = new_ids[1:]
        self.history += new_ids
        input_ids = torch.tensor([self.history], device=self.model.device)
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            **{CACHE_ARGUMENT: self.cache},
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
        )
        answer_ids = output[0, len(self.history) :].tolist()
        self.history += answer_ids
        return self.tokenizer.decode(answer_ids, skip_special_tokens=True)


def user_turns(script: Path | None) -> Iterator[str]:
    """What the user says: the lines of a file, printed as they come, or what is typed. Empty lines are left out."""
    if script is not None:
        for line in filter(None, map(str.strip, script.read_text(encoding="utf-8").splitlines())):
            print(f"{PROMPT}{line}")
            yield line
        return
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def main() -> None:
    """Read turns and answer them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_cache_options(parser, "MassiveActivationCache", "512")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, metavar="N", help="of each answer (default: 128)"
    )
    parser.add_argument(
        "--script", type=Path, metavar="FILE", help="take what the user says from a file, a turn a line"
    )
    options = parser.parse_args()
    model, tokenizer = load_model(options)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation = Conversation(model, tokenizer, new_cache(options, model), options.max_new_tokens)
    for text in user_turns(options.script):
        if text == "/exit":
            break
        if text == "/reset":
            conversation = Conversation(model, tokenizer, new_cache(options, model), options.max_new_tokens)
            continue
        conversation.answer(text, streamer)
        cache = conversation.cache
        print(
            f"[{cache.get_seq_length():,} tokens seen, {num_kept(cache):,} kept, {held_bytes(cache):,} bytes]",
            flush=True,
        )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    run(main)
