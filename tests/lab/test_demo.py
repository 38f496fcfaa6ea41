"""The demo's parts, each against numbers worked out by hand, and the whole command on a tiny model."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from text_tokenizers import byte_tokenizer
from transformers import DynamicCache

from pyramid_cache import SnapKVCache
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.demo import answers, demo_command, demo_report, planted_numbers
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.novel import PromptError, frame, read_text
from pyramid_cache.lab.registry import Workload, find_entry, read_contender, tokens_of_budget
from pyramid_cache.lab.timed_generation import generate


TEXT = "It was a dull day. Nobody came to see them, and nobody wrote. " * 60


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, "tiny", torch.device("cpu"))


def run_demo(folder: Path, model_folder: Path, *arguments: str) -> dict:
    """Runs the command on a CPU, and returns its record."""
    where = ["--device", "cpu", "--json", str(folder / "record.json"), "--out", str(folder / "pictures")]
    assert main(["demo", "--model", str(model_folder), *where, *arguments]) == 0
    return json.loads((folder / "record.json").read_text())


def test_prompts_are_stretches_with_a_number_and_a_question_about_it() -> None:
    tokenizer = byte_tokenizer()
    haystack = Haystack(tokenizer, "".join(f"{index:04d}. " for index in range(1000)))
    prompts = planted_numbers.build_prompts(haystack, 433, 3, random.Random(0))
    assert prompts.input_ids.shape == (3, 433) and prompts.num_tokens == 433
    assert len(set(prompts.numbers)) == len({tokenizer.decode(row[:30]) for row in prompts.input_ids}) == 3
    for row, fact, number, (start, stop) in zip(
        prompts.input_ids, prompts.facts, prompts.numbers, prompts.fact_spans, strict=True
    ):
        person = re.fullmatch(rf"The secret pass number of the (.*) is {number}\. Remember it\.", fact)[1]
        assert tokenizer.decode(row[start:stop]) == f"\n\n{fact}\n\n"
        written = tokenizer.decode(row)
        assert written.count(number) == 1
        question = f"What is the secret pass number of the {person} mentioned in the text?"
        assert written.endswith(f"\n\n{question}\nAnswer: The secret pass number of the {person} is ")

    shared = planted_numbers.build_shared_text(haystack, 400, 3, random.Random(0))
    text = tokenizer.decode(shared.input_ids[0])
    assert shared.input_ids.shape == (1, 400) and all(text.count(number) == 1 for number in shared.numbers)
    for question, number in zip(shared.questions, shared.numbers, strict=True):
        person = re.search("of the (.*) mentioned", tokenizer.decode(question[0]))[1]
        assert f"number of the {person} is {number}." in text
    with pytest.raises(PromptError, match="the text has 6000"):
        planted_numbers.build_prompts(haystack, 9000, 1, random.Random(0))
    assert planted_numbers.num_right(["123. And", "a 456", "78"], ["123", "456", "789"]) == 1


def test_chat_template_or_start_token_frames_the_text() -> None:
    tokenizer = byte_tokenizer(bos_token="<start>")
    assert frame(tokenizer)[0] == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{% for message in messages %}[user]{{ message['content'] }}{% endfor %}[model]"
    before, after = frame(tokenizer, " Why?")
    assert (tokenizer.decode(before), tokenizer.decode(after)) == ("[user]", " Why?[model]")
    assert read_text().startswith("It is a truth universally acknowledged") and len(read_text()) > 600_000


def test_end_token_does_not_end_the_run_but_cuts_the_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    input_ids, ticks = loaded.tokenizer(TEXT[:300], return_tensors="pt").input_ids[:, :200], []
    sequences, stopwatch = generate(loaded.model, input_ids, DynamicCache(), 6, ticks.append)
    tokens = sequences[0, input_ids.shape[1] :].tolist()
    assert ticks == list(range(1, 7)) and len(tokens) == 6 and len(stopwatch.stamps) == 7
    assert stopwatch.prefill_seconds == stopwatch.stamps[1] - stopwatch.stamps[0] > 0
    assert len(stopwatch.seconds_of_steps) == 5 and min(stopwatch.seconds_of_steps) > 0
    assert sum(stopwatch.seconds_of_steps) == pytest.approx(stopwatch.stamps[6] - stopwatch.stamps[1])

    third = tokens[2]
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
    ended = load_model(tmp_path, "tiny", torch.device("cpu"))
    assert ended.end_token_ids == {loaded.tokenizer.eos_token_id, third}
    sequences, _ = generate(ended.model, input_ids, DynamicCache(), 6)
    assert sequences[0, input_ids.shape[1] :].tolist() == tokens
    assert ended.answer(tokens) == loaded.tokenizer.decode(tokens[: tokens.index(third)]).strip()


def test_budget_in_tokens(loaded: LoadedModel) -> None:
    # Keys and values of 4 layers × 2 rows × 2 KV heads × 16 dimensions × 4 bytes are 2,048 bytes a token.
    for budget, expected in ((0.29, 29), (1.0, 100), (17, 17), ("20480B", 10), ("20479B", 9)):
        assert tokens_of_budget(budget, loaded.model, Workload(100, batch_size=2)) == expected
    with pytest.raises(ValueError, match="budget=4"):
        find_entry("streaming").build(loaded.model, 4, Workload(100))


def run_of(name: str, held: int, given: list[str], seconds: tuple[float, float]) -> answers.PromptRun:
    return answers.PromptRun(read_contender(name), *seconds, held, torch.zeros(1, 9), given)


def test_rows_and_the_conclusion_are_worked_out() -> None:
    numbers = ["111", "222", "333"]
    prompts = planted_numbers.Prompts(torch.zeros(3, 50), [""] * 3, numbers, [(1, 2)] * 3)
    shared = planted_numbers.SharedText(torch.zeros(1, 50), [torch.zeros(1, 3)] * 2, ["33", "44"])
    full = run_of("dynamic", 1000, ["111.", "222 is", "333"], (2.0, 4.0))
    small = run_of("h2o:0.25", 250, ["111", "it is 222", "333"], (3.0, 2.0))
    smallest = run_of("knorm:0.1", 100, ["", "no", "333"], (1.0, 1.0))
    first, row, lost = (demo_report.prompt_row(run, full, prompts) for run in (full, small, smallest))
    assert (row["cache"], row["label"], row["share_of_full"]) == ("h2o:0.25", "H2OCache, 0.25", 0.25)
    assert (row["prefill_seconds"], row["prefill_ratio"]) == (3.0, 1.5)
    # A token in each of 3 rows, in 2 seconds against 4.
    assert (row["decode_tokens_per_second"], row["decode_ratio"]) == (1.5, 2.0)
    assert [each["num_right"] for each in (first, row, lost)] == [3, 2, 1]
    assert demo_report.shown_row(row) | {"right_of": "2 of 3", "color": "green", "answer": "111"} == (
        demo_report.shown_row(row)
    )
    later = [answers.TextRun(read_contender("dynamic"), 1.0, 0.5, 400, ["33", "44"])]
    later.append(answers.TextRun(read_contender("kvzip:0.5"), 5.0, 0.25, 200, ["33", "44."]))
    texts = [demo_report.text_row(run, later[0], shared) for run in later]
    assert (texts[1]["reading_seconds"], texts[1]["answer_seconds"], texts[1]["share_of_full"]) == (5.0, 0.25, 0.5)
    said = demo_report.conclusion({"rows": [first, lost, row], "later": texts})
    assert "H2OCache, 0.25 answers 2 of 3 from 25% of the bytes, and writes 2.0 times" in said
    assert said.endswith("KVzipCache, 0.5 answers 2 of 2 from 50%.")
    none = first | {"num_right": 0}
    assert demo_report.conclusion({"rows": [none, row], "later": texts}).startswith("The full cache answers none")
    assert demo_report.conclusion({"rows": [first, lost], "later": texts[:1]}).startswith("At these budgets no cache")


def test_a_text_is_read_once_and_each_question_gets_a_cache_as_it_was(loaded: LoadedModel) -> None:
    generator = random.Random(0)
    shared = planted_numbers.build_shared_text(Haystack(loaded.tokenizer, TEXT), 500, 3, generator)
    [run] = answers.answer_questions(loaded, shared, [read_contender("snapkv:0.5")], 5, lambda *_: None)
    for question, answer in zip(shared.questions, run.answers, strict=True):
        cache = SnapKVCache(loaded.model.config, budget=0.5)
        with torch.no_grad():
            loaded.model(shared.input_ids, past_key_values=cache)
        held = cache.nbytes
        prompt = torch.cat([shared.input_ids, question], dim=1)
        tokens = loaded.model.generate(prompt, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
        assert (run.held_bytes, answer) == (held, loaded.answer(tokens[0, prompt.shape[1] :].tolist()))


def test_demo_compares_caches(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = "--prompt-tokens 600 --max-new-tokens 5 --batch-size 2 --caches static,pyramid:0.4,streaming:0.4"
    record = run_demo(tmp_path, model_folder, *options.split(), "--prompt-file", str(text), "--later", "snapkv:300")
    rows = {row["cache"]: row for row in record["rows"]}
    assert list(rows) == ["dynamic", "static", "pyramid:0.4", "streaming:0.4"]
    assert [row["cache"] for row in record["later"]] == ["dynamic", "snapkv:300"]
    bytes_per_token = 4 * 2 * (2 * 2 * 16) * 4
    assert rows["dynamic"]["held_bytes"] == 604 * bytes_per_token
    assert 1 <= rows["streaming:0.4"]["held_bytes"] / (240 * bytes_per_token) < 1.04  # positions; more keys of sinks
    for name, row in rows.items():
        assert row["share_of_full"] == row["held_bytes"] / rows["dynamic"]["held_bytes"]
        assert len(row["answers"]) == row["num_answers"] == 2
        assert (row["prefill_ratio"] == row["decode_ratio"] == 1.0) == (name == "dynamic")
    # A text of 600 tokens in one row; 300 of them stay, and positions.
    assert 1 <= record["later"][1]["held_bytes"] / (300 * bytes_per_token / 2) < 1.08
    settings = record["settings"]
    assert (settings["prompt_tokens"], settings["text_tokens"]) == (600, 600)
    assert (len(settings["numbers"]), len(settings["later_numbers"])) == (2, 3)
    assert {"processor", "cores", "load_average_before", "load_average_after"} <= set(record["machine"])
    assert set(record["versions"]) == {"pyramid_cache", "python", "torch", "transformers"}
    assert (tmp_path / "pictures" / demo_command.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in (*(row["label"] for row in rows.values()), "0 of 2", "0 of 3", settings["numbers"][0]):
        assert part in printed


@pytest.mark.slow
def test_default_model_answers_with_the_full_cache(tmp_path: Path) -> None:
    """The default prompts are ones that the default model answers, or the comparison would show nothing."""
    record = run_demo(tmp_path, Path("SmolLM2-135M-Instruct"), "--caches", "dynamic", "--later", "dynamic")
    [row], [later] = record["rows"], record["later"]
    assert record["settings"]["prompt_tokens"] == demo_command.PROMPT_TOKENS
    assert (row["num_right"], later["num_right"]) == (4, 3)
