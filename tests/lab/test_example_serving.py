"""examples/serve_batches.py: answers do not depend on the batch, and batches keep within their limit."""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model
from running_examples import ASSISTANT, END, SYSTEM, USER, default_model, import_example, run_example

from pyramid_cache import SnapKVCache


serving = import_example("serve_batches")


class FakeTokenizer:
    """A tokenizer whose tokens are the lengths of words."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


PROMPTS = (
    ("Name three colours.", 12),
    ("What is this about? " + "The sea is wide, and ships are far from home. " * 8, 9),
    ("What is the capital of France?", 16),
    ("Which number comes next? " + ", ".join(map(str, range(30))), 12),
)


def answer_alone(prompt: str, max_new_tokens: int) -> str:
    """The answer to one request without batches, with the template written out."""
    model, tokenizer = default_model()
    ids = tokenizer(f"{SYSTEM}{USER}{prompt}{END}\n{ASSISTANT}")["input_ids"]
    cache = SnapKVCache(model.config, budget=48, eviction_interval=8)
    output = model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_answers_are_those_of_each_request_alone(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    lines = [json.dumps({"id": prompt, "prompt": prompt, "max_new_tokens": new}) for prompt, new in PROMPTS]
    requests.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    settings = ("--memory", "8MiB", "--budget", 48, "--setting", "eviction_interval=8", "--cache", "SnapKVCache")
    finished = run_example("serve_batches.py", "--requests", requests, "--out", out, *settings, cwd=tmp_path)
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert answers == [{"id": prompt, "answer": answer_alone(prompt, new)} for prompt, new in PROMPTS]
    sizes = [int(size) for size in re.findall(r"^batch of (\d+):", finished.stderr, re.MULTILINE)]
    assert sum(sizes) == 4 and max(sizes) > 1 and len(sizes) > 1
    held = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes of 8,388,608", finished.stderr)]
    assert len(held) == len(sizes) and 6_000_000 < max(held) <= 8_388_608


def request(num_prompt: int, num_new: int, name: Any = None) -> Any:
    return serving.Request(name, list(range(num_prompt)), num_new)


def test_requests_are_grouped_by_what_they_take() -> None:
    # Tokens as bytes: ten of them, four for each request at most.
    room = serving.Room(limit=10, budget=4, num_layers=1, bytes_per_token=1, num_spare_slots=0)
    requests = [request(11, 1), request(1, 1), request(8, 1), request(2, 1)]
    assert serving.batches_of(requests, room, 64) == [[1, 3], [2, 0]]
    assert serving.batches_of(requests, room, 1) == [[1], [3], [2], [0]]
    # Two rows of one prompt token each, of which one goes on for three tokens: both take four.
    small = serving.Room(limit=7, budget=4, num_layers=1, bytes_per_token=1, num_spare_slots=0)
    assert serving.batches_of([request(1, 1), request(1, 3)], small, 64) == [[0], [1]]
    # Two layers of three bytes a token, and a spare slot: (2 + 1) * 6 for each.
    layers = serving.Room(limit=36, budget=9, num_layers=2, bytes_per_token=3, num_spare_slots=1)
    assert serving.batches_of([request(1, 1)] * 3, layers, 64) == [[0, 1], [2]]
    assert serving.batches_of([], room, 64) == []
    # A request that never fits is refused.
    room = serving.Room(limit=5, budget=8, num_layers=1, bytes_per_token=1, num_spare_slots=1)
    with pytest.raises(ValueError, match="5 bytes cannot hold request 'long' alone, which takes 6. Raise --memory"):
        serving.batches_of([request(1, 1), request(4, 1, "long")], room, 64)


@pytest.mark.parametrize("use_all, name", zip(itertools.cycle((False, True)), serving.BOUNDED_CACHES, strict=False))
def test_batches_keep_within_the_limit(name: str, use_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    settings = {} if name == "H2OCache" else {"eviction_interval": 8}
    one = serving.Room.of(model, name, 1, 32, settings)
    limit = 3 * ((32 + one.num_spare_slots) * one.num_layers * one.bytes_per_token + one.bytes_per_row)
    requests = [
        serving.Request(index, random_tokens(length, seed=index).tolist(), 7 + index)
        for index, length in enumerate((40, 9, 61, 33, 57, 12, 80))
    ]
    held = []

    def generate_only(model: Any, tokenizer: Any, cache: Any, members: list[Any]) -> list[str]:
        ids, mask = serving.left_padded(members, 0)
        new = max(member.max_new_tokens for member in members)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
        held.append(cache.nbytes)
        return [str(member.identifier) for member in members]

    monkeypatch.setattr(serving, "answers_of", generate_only)
    options = argparse.Namespace(cache=name, use_all=use_all, setting=list(settings.items()), max_batch_size=64)
    room = serving.Room.of(model, name, limit, 32, settings)
    answers = list(serving.in_order(serving.serve(model, None, requests, room, options)))
    assert answers == [(index, str(index)) for index in range(7)]
    assert len(held) == 3
    assert 0.5 * limit < max(held) <= limit


def test_requests_are_read_and_answers_come_in_their_order() -> None:
    tokenizer = FakeTokenizer()
    lines = ['{"prompt": "one three"}', "", '{"prompt": "four", "id": "x", "max_new_tokens": 2}']
    expected = [serving.Request(1, [3, 5], 9), serving.Request("x", [4], 2)]
    assert serving.read_requests(lines, tokenizer, 9) == expected
    for line, message in (
        ("{", "Line 2 is no JSON"),
        ('"text"', 'Line 2 is no object with a text as "prompt"'),
        ('{"prompt": ""}', 'Line 2 is no object with a text as "prompt"'),
        ('{"prompt": "a", "tokens": 2}', r"Line 2 has \['tokens'\]"),
        ('{"prompt": "a", "max_new_tokens": 0}', "Line 2: .* is 0, but must be a positive integer"),
        ('{"prompt": "a", "max_new_tokens": true}', "Line 2: .* is True"),
    ):
        with pytest.raises(ValueError, match=message):
            serving.read_requests(['{"prompt": "a"}', line], tokenizer, 9)

    # Each answer is given as soon as those before it have come.
    given = []
    answers = ((given.append(index), (index, str(index)))[1] for index in (1, 3, 0, 2))
    taken = [(*pair, len(given)) for pair in serving.in_order(answers)]
    assert taken == [(0, "0", 3), (1, "1", 3), (2, "2", 4), (3, "3", 4)]
