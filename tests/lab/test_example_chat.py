"""examples/chat.py: what it answers, and that its memory does not grow. The options that scripts share."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from models import tiny_model
from running_examples import ASSISTANT, BYTES_PER_TOKEN, END, SYSTEM, USER, default_model, import_example, run_example

from pyramid_cache import StreamingLLMCache


chat = import_example("chat")
script_options = import_example("script_options")

TURNS = (
    "Hello! My name is Ada, and my cat is called Turing.",
    "Name three colours.",
    "Tell me about the sea.",
    "What is a language model?",
    "Name three rivers.",
    "What is the name of my cat?",
)


def chat_of(tmp_path: Path, *arguments: str) -> list[tuple[str, int, int, int]]:
    """Of each turn the answer, tokens seen and kept, and bytes."""
    script = tmp_path / "turns.txt"
    script.write_text("\n\n".join(TURNS), encoding="utf-8")
    printed = run_example("chat.py", "--script", script, "--max-new-tokens", 12, *arguments, cwd=tmp_path).stdout
    pattern = r"^you: [^\n]*\n(.*?)\n\[([\d,]+) tokens seen, ([\d,]+) kept, ([\d,]+) bytes\]$"
    found = re.findall(pattern, printed, re.DOTALL | re.MULTILINE)
    assert len(found) == len(TURNS)
    return [(answer, *(int(number.replace(",", "")) for number in numbers)) for answer, *numbers in found]


@pytest.mark.slow
def test_answers_are_those_of_new_caches_that_read_the_whole_conversation(tmp_path: Path) -> None:
    """StreamingLLMCache gives the same answer however the tokens before it came."""
    model, tokenizer = default_model()
    end = tokenizer.convert_tokens_to_ids(END)
    ids, text, settings = [], SYSTEM, {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    printed = chat_of(tmp_path, "--cache", "StreamingLLMCache", "--budget", "48")
    for turn, (answer, seen, kept, num_bytes) in zip(TURNS, printed, strict=True):
        ids += tokenizer(f"{text}{USER}{turn}{END}\n{ASSISTANT}", add_special_tokens=False)["input_ids"]
        cache = StreamingLLMCache(model.config, budget=48)
        output = model.generate(torch.tensor([ids]), past_key_values=cache, **settings)[0].tolist()
        assert answer.strip() == tokenizer.decode(output[len(ids) :], skip_special_tokens=True).strip()
        # What ended the answer has not been read yet; an answer that was cut off is ended by the template.
        assert (seen, kept) == (len(output) - 1, 48)
        assert 1 <= num_bytes / (48 * BYTES_PER_TOKEN) < 1.1  # positions beside keys and values
        ids, text = output, "\n" if output[-1] == end else f"{END}\n"


class FakeTokenizer:
    """A tokenizer of characters with a template that is easy to read."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        said = "".join(f"[{message['role'][0]}:{message['content']}]" for message in messages)
        return f"SYSTEM{said}[a:"

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": text}


def test_a_later_turn_begins_where_the_answer_ended() -> None:
    tokenizer = FakeTokenizer()
    assert chat.turn_ids(tokenizer, "Hi", is_first=True) == "SYSTEM[u:Hi][a:"
    assert chat.turn_ids(tokenizer, "Hi", is_first=False) == "][u:Hi][a:"
    # Templates that cannot serve are refused.
    tokenizer.apply_chat_template = lambda messages, **kwargs: messages[-1]["content"]
    with pytest.raises(ValueError, match="changes earlier answers"):
        chat.turn_ids(tokenizer, "Hi", is_first=False)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.turn_ids(tokenizer, "Hi", is_first=True)


def test_caches_are_built_as_options_say() -> None:
    model = tiny_model("llama")
    parser = argparse.ArgumentParser(exit_on_error=False)
    script_options.add_cache_options(parser, "SnapKVCache", "0.5")

    def new_cache(text: str):
        return script_options.new_cache(parser.parse_args(text.split()), model)

    for name in script_options.CACHE_NAMES:
        assert type(new_cache(f"--cache {name}" + " --budget 24" * (name != "DynamicCache"))).__name__ == name
    assert new_cache("").settings["budget"] == 0.5
    settings = new_cache("--cache massive --budget 9 --setting eviction_interval=5").settings
    assert (settings["budget"], settings["eviction_interval"]) == (9, 5)
    for text, problem in (
        ("--cache dynamic --budget 9", "DynamicCache keeps everything"),
        ("--setting rank=4", "SnapKVCache cannot be built from .*unexpected keyword argument 'rank'"),
        ("--cache StreamingLLMCache", "StreamingLLMCache cannot be built .*'budget'"),
        ("--cache PolicyCache", "'PolicyCache' is none of DynamicCache, AdaKVCache"),
        ("--cache static", "'static' is none of"),
        ("--setting window_size", "is not of the form NAME=VALUE"),
        ("--setting =3", "is not of the form NAME=VALUE"),
    ):
        with pytest.raises((ValueError, argparse.ArgumentError), match=problem):
            new_cache(text)
    texts = ("window_size=32", "rank=0.9", "prefill=dense", "follow_attention=True", "a=b=c")
    assert [script_options.setting(text)[1] for text in texts] == [32, 0.9, "dense", True, "b=c"]
