"""The scripts in examples/, the options that they share, and the code of README.md and of pages in docs/."""

import argparse
import itertools
import json
import re
from functools import cache as remember
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import build_model, random_tokens, tiny_model
from modes import tiny_tokenizer
from pages import DOCS, ROOT, import_example, run_example, run_page
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache import SnapKVCache, StreamingLLMCache
from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.weights import fetch_default_model


chat = import_example("chat")
retrieval = import_example("retrieval")
script_options = import_example("script_options")
serving = import_example("serve_batches")

# The chat template of the default model, as it was trained.
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
# 30 layers, 3 KV heads of 64 dimensions, keys and values, float32.
BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4
TURNS = (
    "Hello! My name is Ada, and my cat is called Turing.",
    "Name three colours.",
    "What is a language model?",
    "What is the name of my cat?",
)
QUESTIONS = ("Who has taken Netherfield Park?", "How many daughters are there?")
PROMPTS = (
    ("Name three colours.", 12),
    ("What is this about? " + "The sea is wide, and ships are far from home. " * 8, 9),
    ("What is the capital of France?", 16),
    ("Which number comes next? " + ", ".join(map(str, range(30))), 12),
)


@remember
def default_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    folder = fetch_default_model()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def generated(ids: list[int], cache: Any, max_new_tokens: int) -> tuple[list[int], str]:
    """All tokens after plain `generate` with the default model, and the new ones as text."""
    model, tokenizer = default_model()
    settings = {"do_sample": False, "eos_token_id": tokenizer.convert_tokens_to_ids(END)}
    output = model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=max_new_tokens, **settings)[0]
    return output.tolist(), tokenizer.decode(output[len(ids) :], skip_special_tokens=True).strip()


def count(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.slow
def test_chat_answers_as_a_cache_that_is_given_each_turn(tmp_path: Path) -> None:
    model, tokenizer = default_model()
    cache = StreamingLLMCache(model.config, budget=48)
    (tmp_path / "turns.txt").write_text("\n\n".join(TURNS), encoding="utf-8")
    options = "--script turns.txt --max-new-tokens 12 --cache StreamingLLMCache --budget 48"
    printed = run_example("chat.py", *options.split(), cwd=tmp_path).stdout
    pattern = r"^you: [^\n]*\n(.*?)\n\[([\d,]+) tokens seen, ([\d,]+) kept, ([\d,]+) bytes\]$"
    found = re.findall(pattern, printed, re.DOTALL | re.MULTILINE)
    ids, text = [], SYSTEM
    for turn, (answer, *numbers) in zip(TURNS, found, strict=True):
        ids += tokenizer(f"{text}{USER}{turn}{END}\n{ASSISTANT}", add_special_tokens=False)["input_ids"]
        ids, expected = generated(ids, cache, 12)
        assert answer.strip() == expected
        seen, kept, num_bytes = map(count, numbers)
        assert (seen, kept) == (len(ids) - 1, 48)  # the last token has not been read yet
        assert 1 <= num_bytes / (48 * BYTES_PER_TOKEN) < 1.12  # 49 slots, 4 sinks twice more, positions
        # An answer that was cut off is ended by the template.
        text = "\n" if ids[-1] == tokenizer.convert_tokens_to_ids(END) else f"{END}\n"


def test_a_later_turn_begins_where_the_answer_ended() -> None:
    def template(messages: list[dict], **_: object) -> str:
        said = "".join(f"[{message['role'][0]}:{message['content']}]" for message in messages)
        return f"SYSTEM{said}[a:"

    tokenizer = Mock(chat_template="any", side_effect=lambda text, **_: {"input_ids": text})
    tokenizer.apply_chat_template = template
    assert chat.turn_ids(tokenizer, "Hi", is_first=True) == "SYSTEM[u:Hi][a:"
    assert chat.turn_ids(tokenizer, "Hi", is_first=False) == "][u:Hi][a:"
    # Templates that cannot serve are refused.
    tokenizer.apply_chat_template = lambda messages, **_: messages[-1]["content"]
    with pytest.raises(ValueError, match="changes earlier answers"):
        chat.turn_ids(tokenizer, "Hi", is_first=False)
    with pytest.raises(ValueError, match="no chat template"):
        chat.turn_ids(Mock(chat_template=None), "Hi", is_first=True)


def test_caches_are_built_as_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tiny_tokenizer().save_pretrained(tmp_path)  # for caches that read a context again, behind an instruction
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    profile = {"format": "pyramid_cache profile", "version": 1, "architecture": architecture_of(model.config)}
    (tmp_path / "sharing.json").write_text(json.dumps(profile | {"sharing": []}))
    parser = argparse.ArgumentParser(exit_on_error=False)
    script_options.add_cache_options(parser, "SnapKVCache", "0.5")

    def new_cache(text: str):
        return script_options.new_cache(parser.parse_args(text.split()), model)

    for name in script_options.CACHE_NAMES:
        budget = " --budget 24" * (name not in ("DynamicCache", "KIVICache", "MiniCache", "KVSharerCache"))
        sharing = f" --setting sharing={tmp_path / 'sharing.json'}" * (name == "KVSharerCache")
        assert type(new_cache(f"--cache {name}{budget}{sharing}")).__name__ == name
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
    texts = ("window_size=32", "rank=0.9", "quantize=int8", "use_covariance=True", "a=b=c")
    assert [script_options.setting(text)[1] for text in texts] == [32, 0.9, "int8", True, "b=c"]


@pytest.mark.slow
def test_what_is_loaded_answers_as_what_was_read_and_as_a_cache_that_was_never_saved(tmp_path: Path) -> None:
    model, tokenizer = default_model()
    options = "--tokens 200 --max-new-tokens 10 --cache SnapKVCache --budget 96 --prefix novel.safetensors".split()
    read = run_example("retrieval.py", *options, *QUESTIONS, cwd=tmp_path).stdout
    written = (tmp_path / "novel.safetensors").read_bytes()
    loaded = run_example("retrieval.py", *options, *QUESTIONS, cwd=tmp_path).stdout
    document = tokenizer(f"{SYSTEM}{USER}")["input_ids"] + tokenizer(read_text(), verbose=False)["input_ids"][:200]
    answers = []
    for question in QUESTIONS:
        cache = SnapKVCache(model.config, budget=96)
        with torch.no_grad():
            model(torch.tensor([document]), past_key_values=cache)
        ids = document + tokenizer(f"\n\n{question}{END}\n{ASSISTANT}")["input_ids"]
        answers.append(generated(ids, cache, 10)[1])
    for output in (read, loaded):
        found = re.findall(r"^answer: (.*?)\s*(?=^question: |\Z)", output, re.DOTALL | re.MULTILINE)
        assert found == answers
        assert f"224 tokens, 96 kept by the layer that keeps most; the file has {len(written):,} bytes" in output
    seconds = re.search(r"^read the document in (\d+\.\d+) s$", read, re.MULTILINE)
    again = re.search(r"^loaded .* in \d+\.\d+ s; reading the document took (\d+\.\d+) s$", loaded, re.MULTILINE)
    assert seconds[1] == again[1]
    # Positions and a header beside keys and values.
    assert 1 < len(written) / (96 * BYTES_PER_TOKEN) < 1.1
    other = run_example("retrieval.py", *options, "--tokens", 199, cwd=tmp_path, status=2)
    assert "of another document, or of more or less" in other.stderr
    assert (tmp_path / "novel.safetensors").read_bytes() == written


@pytest.mark.slow
def test_what_reads_again_is_loaded_with_the_model(tmp_path: Path) -> None:
    options = "--tokens 200 --max-new-tokens 10 --cache KVzipCache --budget 0.5 --setting quantize=int8".split()
    read, loaded = (
        run_example("retrieval.py", *options, "--prefix", "novel.safetensors", *QUESTIONS, cwd=tmp_path).stdout
        for _ in range(2)
    )
    assert read.startswith("read") and loaded.startswith("loaded")
    assert read.partition("question: ")[2] == loaded.partition("question: ")[2] != ""


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


@pytest.mark.slow
def test_answers_are_those_of_each_request_alone(tmp_path: Path) -> None:
    model, tokenizer = default_model()
    lines = [json.dumps({"id": prompt, "prompt": prompt, "max_new_tokens": new}) for prompt, new in PROMPTS]
    (tmp_path / "requests.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    options = "--requests requests.jsonl --memory 8MiB --budget 48 --setting eviction_interval=8 --cache SnapKVCache"
    finished = run_example("serve_batches.py", *options.split(), cwd=tmp_path)
    answers = [json.loads(line) for line in finished.stdout.splitlines()]
    for (prompt, new), answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(f"{SYSTEM}{USER}{prompt}{END}\n{ASSISTANT}")["input_ids"]
        _, expected = generated(ids, SnapKVCache(model.config, budget=48, eviction_interval=8), new)
        assert answer == {"id": prompt, "answer": expected}
    sizes = [int(size) for size in re.findall(r"^batch of (\d+):", finished.stderr, re.MULTILINE)]
    assert sum(sizes) == 4 and max(sizes) > 1 and len(sizes) > 1


@pytest.mark.parametrize("use_all, name", zip(itertools.cycle((False, True)), serving.BOUNDED_CACHES, strict=False))
def test_batches_keep_within_the_limit(name: str, use_all: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    tokenizer = Mock(pad_token_id=0, decode=lambda ids, **_: str(len(ids)))
    settings = {"eviction_interval": 8}
    one = serving.Room.of(model, name, 1, 32, settings)
    limit = 3 * ((32 + one.eviction_interval) * one.num_layers * one.bytes_per_token + one.bytes_per_row)
    requests = [
        serving.Request(index, random_tokens(length, seed=index).tolist(), 7 + index)
        for index, length in enumerate((40, 9, 61, 33, 57, 12, 80))
    ]
    options = argparse.Namespace(cache=name, use_all=use_all, setting=list(settings.items()), max_batch_size=64)
    room = serving.Room.of(model, name, limit, 32, settings)
    answers = list(serving.in_order(serving.serve(model, tokenizer, requests, room, options)))
    assert answers == [(index, str(7 + index)) for index in range(7)]
    held = [count(number) for number in re.findall(r"([\d,]+) bytes of", capsys.readouterr().err)]
    assert len(held) == 3
    assert 0.5 * limit < max(held) <= limit


def test_requests_are_read_and_answers_come_in_their_order() -> None:
    tokenizer = Mock(chat_template=None, side_effect=lambda text: {"input_ids": [len(word) for word in text.split()]})
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


# Pages whose code is run: here, or in test_show.py and test_custom_generate.py. Those of caches are in test_docs.py.
PAGES = {
    "compile.md",
    "custom-generate.md",
    "evaluation.md",
    "index.md",
    "merge.md",
    "ops.md",
    "plots.md",
    "protect.md",
    "quantized.md",
    "serving.md",
    "thin-keys.md",
    "write-a-policy.md",
}


@pytest.fixture(autouse=True)
def in_a_folder_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pages write goes to a folder that looks like the root of the repository."""
    (tmp_path / "pyramid_cache").symlink_to(ROOT / "pyramid_cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


def test_every_page_with_code_is_run() -> None:
    with_code = {path.name for path in DOCS.glob("*.md") if re.search(r"^```python$", path.read_text(), re.MULTILINE)}
    assert with_code == PAGES
    assert "received" in run_page(DOCS / "ops.md", shows_output=False)


@pytest.mark.slow
def test_the_page_of_compiled_steps_runs() -> None:
    model = build_model("llama", num_hidden_layers=2)
    inputs = {"input_ids": random_tokens(1, 700), "attention_mask": torch.ones(1, 700, dtype=torch.long)}
    names = run_page(DOCS / "compile.md", {"model": model, "inputs": inputs}, shows_output=False)
    assert names["output"].shape == (1, 732) and names["cache"].get_seq_length() == 800


def test_the_page_of_merged_tokens_runs() -> None:
    model = build_model("llama", num_hidden_layers=2)
    inputs = {"input_ids": random_tokens(1, 200), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    cache = run_page(DOCS / "merge.md", {"model": model, "inputs": inputs}, shows_output=False)["cache"]
    # As many tokens as were seen, but for those that waited.
    assert all(layer.state.bias.exp().sum(dim=-1).amin() > 200 for layer in cache.layers)


def test_the_page_of_quantised_slots_runs() -> None:
    model = build_model("llama", num_hidden_layers=2)
    inputs = {"input_ids": random_tokens(1, 800), "attention_mask": torch.ones(1, 800, dtype=torch.long)}
    cache = run_page(DOCS / "quantized.md", {"model": model, "inputs": inputs}, shows_output=False)["cache"]
    # A quarter of the prompt, of which the residual is in full precision.
    assert all(0 < layer.state.num_quantized < 200 for layer in cache.layers)


def test_the_page_of_thin_keys_runs() -> None:
    model = build_model("llama", num_hidden_layers=2)
    inputs = {"input_ids": random_tokens(1, 800), "attention_mask": torch.ones(1, 800, dtype=torch.long)}
    cache = run_page(DOCS / "thin-keys.md", {"model": model, "inputs": inputs}, shows_output=False)["cache"]
    # Heads of 16 channels keep 10 of them, in all tokens of a quarter of the prompt but the residual.
    assert all(layer.state.key_codes.shape[2:] == (layer.state.num_quantized, 10) for layer in cache.layers)
    assert all(0 < layer.state.num_quantized < 200 for layer in cache.layers)


def test_the_page_of_serving_runs() -> None:
    pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)
    texts = random_tokens(2, 60).tolist()
    known = {"model": build_model("llama"), "texts": texts, "tokenizer": lambda ids: SimpleNamespace(input_ids=ids)}
    answers = run_page(DOCS / "serving.md", known, shows_output=False)["answers"]
    assert [len(answer) for answer in answers] == [8, 8]


@pytest.mark.slow
def test_the_page_of_protected_tokens_runs() -> None:
    names = run_page(DOCS / "protect.md", shows_output=False)
    span = torch.arange(names["system"].shape[1])
    assert all(
        torch.isin(span, names["cache"].positions(layer)[0, head]).all() for layer in (0, 29) for head in (0, 2)
    )


@pytest.mark.slow
def test_the_tutorial_and_the_page_of_the_evaluation_run() -> None:
    run_page(DOCS / "write-a-policy.md")
    dataset = run_page(DOCS / "evaluation.md", shows_output=False)["dataset"]
    assert len(dataset) == 5
    assert all(0.5 * 1024 < len(row["input_ids"]) <= 1024 for row in dataset)


@pytest.mark.slow
def test_the_first_page_and_the_readme_run() -> None:
    names = run_page(DOCS / "index.md", shows_output=False)
    cache, inputs = names["cache"], names["inputs"]
    assert cache.get_seq_length() == inputs.input_ids.shape[1] + 31
    # All of a quarter of everything seen, since `compress`.
    assert max(cache.num_kept_tokens()) == cache.get_seq_length() // 4
    context = names["context"]
    assert context.get_seq_length() == inputs.input_ids.shape[1]  # the question was asked of a copy
    loaded = type(context).load("novel.safetensors", names["model"])
    assert loaded.num_kept_tokens() == context.num_kept_tokens()
    run_page(ROOT / "README.md", shows_output=False)


@pytest.mark.slow
def test_the_script_of_the_page_of_plots_runs(model_folder: Path, tmp_path: Path) -> None:
    run_example("plot_kept_tokens.py", "--model", model_folder, "--html", "text.html", cwd=tmp_path)
    for name in ("kept-tokens.png", "kept-scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "text.html").read_text(encoding="utf-8").startswith("<!doctype html>")
