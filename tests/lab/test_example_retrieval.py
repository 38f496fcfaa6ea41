"""examples/retrieval.py: what is loaded answers as what was read, and as a cache that was never saved."""

import re
from pathlib import Path

import pytest
import torch
from running_examples import ASSISTANT, BYTES_PER_TOKEN, END, SYSTEM, USER, default_model, import_example, run_example

from pyramid_cache import SnapKVCache
from pyramid_cache.lab.demo.planted_number import read_text


retrieval = import_example("retrieval")

QUESTIONS = ("Who has taken Netherfield Park?", "How many daughters are there?")
SETTINGS = ("--tokens", 200, "--max-new-tokens", 10, "--cache", "SnapKVCache", "--budget", 96)


def answers_of(output: str) -> list[str]:
    return re.findall(r"^answer: (.*?)\s*(?=^question: |\Z)", output, re.DOTALL | re.MULTILINE)


def expected_answers() -> list[str]:
    """The whole history, written out as the model was trained, to a new cache for each question."""
    model, tokenizer = default_model()
    document = tokenizer(f"{SYSTEM}{USER}")["input_ids"] + tokenizer(read_text(), verbose=False)["input_ids"][:200]
    answers = []
    for question in QUESTIONS:
        cache = SnapKVCache(model.config, budget=96)
        with torch.no_grad():
            model(torch.tensor([document]), past_key_values=cache)
        prompt = document + tokenizer(f"\n\n{question}{END}\n{ASSISTANT}")["input_ids"]
        output = model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=10, do_sample=False)
        answers.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.slow
def test_a_prefix_is_read_once(tmp_path: Path) -> None:
    prefix = tmp_path / "novel.safetensors"
    read = run_example("retrieval.py", *SETTINGS, "--prefix", prefix, *QUESTIONS, cwd=tmp_path).stdout
    written = prefix.read_bytes()
    loaded = run_example("retrieval.py", *SETTINGS, "--prefix", prefix, *QUESTIONS, cwd=tmp_path).stdout
    assert answers_of(read) == answers_of(loaded) == expected_answers()
    seconds = re.search(r"^read the document in (\d+\.\d+) s$", read, re.MULTILINE)
    again = re.search(r"^loaded .* in \d+\.\d+ s; reading the document took (\d+\.\d+) s$", loaded, re.MULTILINE)
    assert seconds[1] == again[1]
    for output in (read, loaded):
        assert f"224 tokens, 96 kept by the layer that keeps most; the file has {len(written):,} bytes" in output
    # Positions and a header beside keys and values.
    assert 1 < len(written) / (96 * BYTES_PER_TOKEN) < 1.1
    other = run_example("retrieval.py", *SETTINGS, "--prefix", prefix, "--tokens", 199, cwd=tmp_path, status=2)
    assert "of another document, or of more or less" in other.stderr
    assert prefix.read_bytes() == written


def test_what_a_file_is_of_is_compared() -> None:
    record = {"document": "d", "cache": "TOVACache", "options": "{}", "file": "f", "seconds_to_read": 1.0}
    wanted = retrieval.PrefixRecord(**record)
    path = Path("p.safetensors")
    wanted.require_same(path, retrieval.PrefixRecord(**record | {"seconds_to_read": 2.0}))
    for change, message in (
        ({"document": "e"}, "of another document"),
        ({"cache": "H2OCache"}, "a H2OCache, not a TOVACache"),
        ({"options": '{"budget": 1}'}, 'with {"budget": 1}, not with {}'),
        ({"file": "g"}, "not the one that p.safetensors.json is about"),
    ):
        with pytest.raises(ValueError, match=message):
            wanted.require_same(path, retrieval.PrefixRecord(**record | change))
    digests = {retrieval.digest(ids) for ids in ([], [1], [1, 2], [12], [2, 1])}
    assert len(digests) == 5
