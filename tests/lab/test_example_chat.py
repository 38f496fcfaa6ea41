"""examples/chat.py: what it answers, and that its memory does not grow."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from models import random_tokens, tiny_model
from running_examples import default_model, import_example, run_example

from pyramid_cache import MassiveActivationCache, StreamingLLMCache


chat = import_example("chat")
caches_by_name = import_example("caches_by_name")

TURNS = (
    "Hello! My name is Ada, and my cat is called Turing.",
    "Name three colours.",
    "Tell me about the sea.",
    "What is a language model?",
    "Name three rivers.",
    "What is the name of my cat?",
)
# As SmolLM2 was trained.
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
# 30 layers, 3 KV heads of 64 dimensions, keys and values, float32.
BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4


def turns_of(output: str) -> list[tuple[str, int, int, int]]:
    """Of each turn the answer, tokens seen and kept, and bytes."""
    pattern = r"^you: [^\n]*\n(.*?)\n\[([\d,]+) tokens seen, ([\d,]+) kept, ([\d,]+) bytes\]$"
    found = re.findall(pattern, output, re.DOTALL | re.MULTILINE)
    return [(answer, *(int(number.replace(",", "")) for number in numbers)) for answer, *numbers in found]


def chat_of(tmp_path: Path, *arguments: str) -> list[tuple[str, int, int, int]]:
    script = tmp_path / "turns.txt"
    script.write_text("\n\n".join(TURNS), encoding="utf-8")
    finished = run_example("chat.py", "--script", script, "--max-new-tokens", 12, *arguments, cwd=tmp_path)
    turns = turns_of(finished.stdout)
    assert len(turns) == len(TURNS)
    return turns


@torch.no_grad()
def answers_token_by_token(cache: StreamingLLMCache) -> list[tuple[str, int]]:
    """The same conversation with the template written out and without `generate`: the answers, and the tokens seen."""
    model, tokenizer = default_model()
    turns, text, num_seen = [], SYSTEM, 0
    for turn in TURNS:
        ids = tokenizer(f"{text}{USER}{turn}{END}\n{ASSISTANT}", add_special_tokens=False)["input_ids"]
        answer: list[int] = []
        while ids:
            logits = model(torch.tensor([[ids.pop(0)]]), past_key_values=cache).logits[0, -1]
            num_seen += 1
            if not ids:
                answer.append(int(logits.argmax()))
                ends = tokenizer.convert_tokens_to_ids(END) == answer[-1]
                if not ends and len(answer) < 12:
                    ids = [answer[-1]]
        turns.append((tokenizer.decode(answer, skip_special_tokens=True), num_seen))
        # What ended the answer has not been read yet; an answer that was cut off is ended by the template.
        text = END + "\n"
        if not ends:
            model(torch.tensor([[answer[-1]]]), past_key_values=cache)
            num_seen += 1
    return turns


@pytest.mark.slow
def test_answers_are_those_of_the_conversation_read_token_by_token(tmp_path: Path) -> None:
    model, _ = default_model()
    expected = answers_token_by_token(StreamingLLMCache(model.config, budget=48))
    printed = chat_of(tmp_path, "--cache", "StreamingLLMCache", "--budget", "48")
    assert [(answer.strip(), seen) for answer, seen, _, _ in printed] == [(text.strip(), n) for text, n in expected]
    assert [kept for _, _, kept, _ in printed] == [48] * len(TURNS)


@pytest.mark.slow
def test_bytes_do_not_grow_with_turns(tmp_path: Path) -> None:
    full = chat_of(tmp_path, "--cache", "DynamicCache")
    assert all(kept == seen and num_bytes == seen * BYTES_PER_TOKEN for _, seen, kept, num_bytes in full)
    assert full[-1][3] > 2.2 * full[0][3]
    bounded = chat_of(
        tmp_path, "--budget", "40", "--setting", "eviction_interval=8", "--cache", "MassiveActivationCache"
    )
    # What a layer holds is bounded by budget and interval. Beside keys and values there are positions and attention.
    assert all(40 <= kept < 48 for _, _, kept, _ in bounded)
    limit = 48 * (BYTES_PER_TOKEN + 30 * 3 * 2 * 4)
    assert all(0.8 * limit < num_bytes < 1.05 * limit for *_, num_bytes in bounded)
    assert bounded[-1][1] > 4 * 48


class FakeTokenizer:
    """A tokenizer of characters with a template that is easy to read."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        said = "".join(f"[{message['role'][0]}:{message['content']}]" for message in messages)
        return f"SYSTEM{said}[a:"

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": text}


def test_a_later_turn_begins_where_the_answer_ended() -> None:
    assert chat.turn_ids(FakeTokenizer(), "Hi", is_first=True) == "SYSTEM[u:Hi][a:"
    assert chat.turn_ids(FakeTokenizer(), "Hi", is_first=False) == "][u:Hi][a:"


def test_templates_that_cannot_serve_are_refused() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.apply_chat_template = lambda messages, **kwargs: messages[-1]["content"]
    with pytest.raises(ValueError, match="changes earlier answers"):
        chat.turn_ids(tokenizer, "Hi", is_first=False)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.turn_ids(tokenizer, "Hi", is_first=True)


def test_caches_are_built_by_name() -> None:
    model, build_cache, num_bytes = tiny_model("llama"), caches_by_name.build_cache, caches_by_name.num_bytes
    assert [caches_by_name.read_number(text) for text in ("512", "0.4", "256MiB")] == [512, 0.4, "256MiB"]
    for name in caches_by_name.CACHE_NAMES:
        cache = build_cache(name, model, None if name == "DynamicCache" else 24)
        assert type(cache).__name__ == name
        with torch.no_grad():
            model(random_tokens(2, 20), past_key_values=cache)
        # 2 rows, 20 tokens, 3 layers, 2 KV heads of 16 dimensions, keys and values, float32.
        assert num_bytes(cache) >= 2 * 20 * 3 * 2 * 16 * 2 * 4
        assert name != "DynamicCache" or num_bytes(cache) == 2 * 20 * 3 * 2 * 16 * 2 * 4
    assert build_cache("MassiveActivationCache", model, 9, eviction_interval=5).settings["eviction_interval"] == 5
    assert isinstance(build_cache("MassiveActivationCache", model), MassiveActivationCache)
    with pytest.raises(ValueError, match="no cache 'PolicyCache'"):
        build_cache("PolicyCache", model, 9)
    for name, settings, problem in (
        ("DynamicCache", {"budget": 9}, "DynamicCache keeps everything"),
        (
            "SnapKVCache",
            {"rank": 4},
            "SnapKVCache cannot be built from {'rank': 4}: .*unexpected keyword argument 'rank'",
        ),
        ("StreamingLLMCache", {}, "StreamingLLMCache cannot be built .*'budget'"),
        ("H2OCache", {"budget": "many"}, "`budget='many'` is no number of bytes"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_cache(name, model, **settings)


def test_settings_are_read() -> None:
    setting = import_example("script_options").setting
    read = [
        setting(text) for text in ("window_size=32", "rank=0.9", "prefill=dense", "follow_attention=True", "a=b=c")
    ]
    assert read == [("window_size", 32), ("rank", 0.9), ("prefill", "dense"), ("follow_attention", True), ("a", "b=c")]
    for text in ("window_size", "=3", "window size=3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not of the form NAME=VALUE"):
            setting(text)
