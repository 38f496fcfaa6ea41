"""The demo's parts, each against numbers worked out by hand, and the whole command on a tiny model."""

import json
import re
from pathlib import Path

import pytest
import torch
from text_tokenizers import byte_tokenizer
from transformers import DynamicCache

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.demo import demo_command, demo_report, timed_answers
from pyramid_cache.lab.demo.planted_number import FACT, QUESTION, PromptError, Prompts, build_prompts, read_text
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.registry import Workload, find_entry, tokens_of_budget


TEXT = "It was a dull day. Nobody came to see them, and nobody wrote. " * 60


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, "tiny", torch.device("cpu"))


def run_demo(folder: Path, model_folder: Path, *arguments: str) -> dict:
    """Runs the command on a CPU, and returns its record."""
    where = ["--device", "cpu", "--json", str(folder / "record.json"), "--out", str(folder / "pictures")]
    assert main(["demo", "--model", str(model_folder), *where, *arguments]) == 0
    return json.loads((folder / "record.json").read_text())


def test_rows_are_stretches_with_a_fact_in_the_middle() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(f"{index:04d}. " for index in range(1000))
    prompts = build_prompts(tokenizer, text, 333, batch_size=3)
    assert prompts.input_ids.shape == (3, 333)
    assert len(set(prompts.numbers)) == 3
    assert len({tokenizer.decode(row[:30]) for row in prompts.input_ids}) == 3
    for row, number, (start, end) in zip(prompts.input_ids, prompts.numbers, prompts.fact_spans, strict=True):
        assert tokenizer.decode(row[start:end]) == FACT.format(number=number)
        written = tokenizer.decode(row)
        assert written.count(number) == 1
        assert written.endswith(f"{QUESTION}\nAnswer:")
        # Sentences have six letters, and the fact comes after the nearest end of one.
        middle = (333 - (end - start) - len(f"{QUESTION}\nAnswer:")) / 2
        assert written[start - 1] == "." and abs(start - middle) <= 3.5
    num_other = len(FACT.format(number=12345)) + len(f"{QUESTION}\nAnswer:")
    assert build_prompts(tokenizer, "x" * 21, num_other + 21).fact_spans[0][0] == 10  # no sentence ends

    first, again, other = (build_prompts(tokenizer, text, 300, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.numbers != other.numbers
    assert not torch.equal(first.input_ids[:, :20], other.input_ids[:, :20])


def test_chat_template_or_start_token_frames_the_prompt() -> None:
    tokenizer = byte_tokenizer(bos_token="<start>")
    assert build_prompts(tokenizer, TEXT, 300).input_ids[0, 0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{% for message in messages %}[user]{{ message['content'] }}{% endfor %}[model]"
    text = tokenizer.decode(build_prompts(tokenizer, TEXT, 300).input_ids[0])
    assert text.startswith("[user]It was") and text.endswith("in the text?[model]")
    assert read_text().startswith("It is a truth universally acknowledged") and len(read_text()) > 600_000


def test_lengths_that_cannot_be_name_those_that_can() -> None:
    tokenizer = byte_tokenizer()
    for text, length, message, beyond in ((TEXT, 50, "takes at least", -1), ("x" * 100, 1000, "has 100 tokens", 1)):
        with pytest.raises(PromptError, match=message) as caught:
            build_prompts(tokenizer, text, length)
        extreme = int(re.findall(r"\d+", str(caught.value))[-1])
        assert build_prompts(tokenizer, text, extreme).num_tokens == extreme
        with pytest.raises(PromptError, match=message):
            build_prompts(tokenizer, text, extreme + beyond)


def test_end_token_does_not_end_the_run_but_cuts_the_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    input_ids, ticks = build_prompts(loaded.tokenizer, TEXT, 200).input_ids, []
    sequences, stopwatch = timed_answers.generate(loaded.model, input_ids, DynamicCache(), 6, ticks.append)
    tokens = sequences[0, 200:].tolist()
    assert ticks == list(range(1, 7)) and len(tokens) == 6 and len(stopwatch.stamps) == 7
    assert stopwatch.prefill_seconds == stopwatch.stamps[1] - stopwatch.stamps[0] > 0
    assert stopwatch.decode_seconds == stopwatch.stamps[6] - stopwatch.stamps[1] > 0

    third = tokens[2]
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
    ended = load_model(tmp_path, "tiny", torch.device("cpu"))
    assert ended.end_token_ids == {loaded.tokenizer.eos_token_id, third}
    sequences, _ = timed_answers.generate(ended.model, input_ids, DynamicCache(), 6)
    assert sequences[0, 200:].tolist() == tokens
    assert ended.answer(tokens) == loaded.tokenizer.decode(tokens[: tokens.index(third)]).strip()


def test_budget_in_tokens(loaded: LoadedModel) -> None:
    # Keys and values of 4 layers × 2 rows × 2 KV heads × 16 dimensions × 4 bytes are 2,048 bytes a token.
    for budget, expected in ((0.29, 29), (1.0, 100), (17, 17), ("20480B", 10), ("20479B", 9)):
        assert tokens_of_budget(budget, loaded.model, Workload(100, batch_size=2)) == expected
    with pytest.raises(ValueError, match="budget=4"):
        find_entry("streaming").build(loaded.model, 4, Workload(100))


def test_row_is_worked_out_from_medians() -> None:
    prompts = Prompts(torch.zeros(2, 50), ["111", "222"], [(1, 2), (1, 2)])
    kept, times = ([10, 5], None), ([1.0, 4.0, 2.0], [5.0, 4.0, 1.0])
    baseline = timed_answers.Result(find_entry("dynamic"), *times, 1000, *kept, ["111", "222"])
    times = ([3.0, 3.0, 3.0], [2.0, 0.5, 8.0])
    faster = timed_answers.Result(find_entry("h2o"), *times, 250, *kept, ["it is 111", "333"])
    row = demo_report.as_row(faster, baseline, prompts, max_new_tokens=21)
    assert row["share_of_full"] == 0.25
    assert (row["prefill_seconds"], row["prefill_ratio"]) == (3.0, 1.5)
    # 20 tokens in each of 2 rows after the first token, in 2 seconds against 4.
    assert (row["decode_tokens_per_second"], row["decode_ratio"]) == (20.0, 2.0)
    assert row["decode_tokens_per_second_by_repeat"] == [20.0, 80.0, 5.0]
    assert (row["recalled"], row["recalled_share"], row["answer"]) == (False, 0.5, "it is 111")

    assert demo_report.bars([16, 12, 8, 4, 1, 0], full=16, height=2, max_columns=10) == ["█▄    ", "███▄▁ "]
    # Bars of many layers are means of neighbours.
    assert demo_report.bars([8, 8, 4, 4, 8, 0], full=8, height=1, max_columns=3) == ["█▄▄"]
    assert demo_report.shown_row(row | {"answer": "a\nb  " * 20})["answer"].endswith("a b …")
    rows = [{"prefill_seconds_by_repeat": [2.0, 3.0, 2.0], "decode_tokens_per_second_by_repeat": [10.0, 10.0, 11.0]}]
    for load, is_busy in ((None, False), (2.3, False), (4.0, True)):
        machine = {"torch_threads": 2, "cores": 2, "load_average_after": load}
        note = demo_report.footnote({"settings": {"repeats": 3}, "machine": machine, "rows": rows})
        assert "spread by at most 50%" in note and ("load 4.0 on 2 cores" in note) == is_busy


def test_demo_compares_caches(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, runs = timed_answers.generate, []

    def spy(model, input_ids, cache, *arguments):
        runs.append((type(cache).__name__, arguments[0]))
        return generate(model, input_ids, cache, *arguments)

    monkeypatch.setattr(timed_answers, "generate", spy)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = "--prompt-tokens 600 --max-new-tokens 5 --batch-size 2 --repeats 2 --budgets 0.4"
    arguments = [*options.split(), "--prompt-file", str(text), "--caches", "static,pyramid,streaming"]
    record = run_demo(tmp_path, model_folder, *arguments)
    # Caches take turns, and the baseline goes first.
    turns = ("DynamicCache", "StaticCache", "PyramidCache", "StreamingLLMCache")
    warm_up = [(name, timed_answers.WARM_UP_NEW_TOKENS) for name in turns]
    assert runs == warm_up + [(name, 5) for name in turns] * 2
    rows = {row["cache"]: row for row in record["rows"]}
    assert list(rows) == ["dynamic", "static", "pyramid", "streaming"]
    bytes_per_token = 4 * 2 * (2 * 2 * 16) * 4
    assert rows["dynamic"]["kept_tokens"] == [604] * 4
    assert rows["dynamic"]["held_bytes"] == 604 * bytes_per_token
    assert rows["streaming"]["kept_tokens"] == [240] * 4
    assert 1 <= rows["streaming"]["held_bytes"] / (240 * bytes_per_token) < 1.04  # positions, and more keys of sinks
    kept = rows["pyramid"]["kept_tokens"]
    # The four tokens that were decoded later wait in every layer.
    assert kept[0] > kept[-1] and sum(kept) == pytest.approx(4 * (240 + 4), abs=4)
    for name, row in rows.items():
        assert row["share_of_full"] == row["held_bytes"] / rows["dynamic"]["held_bytes"]
        assert len(row["answers"]) == len(row["prefill_seconds_by_repeat"]) == 2
        assert (row["prefill_ratio"] == row["decode_ratio"] == 1.0) == (name == "dynamic")
    settings = record["settings"]
    assert (settings["prompt_tokens"], settings["budget"], len(settings["numbers"])) == (600, 0.4, 2)
    assert {"processor", "cores", "load_average_before", "load_average_after"} <= set(record["machine"])
    assert set(record["versions"]) == {"pyramid_cache", "python", "torch", "transformers"}
    assert (tmp_path / "pictures" / demo_command.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in (*(row["label"] for row in rows.values()), "0 of 2", "tokens kept per layer", settings["numbers"][0]):
        assert part in printed


@pytest.mark.slow
def test_default_model_recalls_the_number_with_the_full_cache(tmp_path: Path) -> None:
    """The default prompt is one that the default model answers, or the comparison would show nothing."""
    record = run_demo(tmp_path, Path("SmolLM2-135M-Instruct"), "--caches", "dynamic")
    assert record["settings"]["prompt_tokens"] >= 3000
    assert record["rows"][0]["recalled"]
