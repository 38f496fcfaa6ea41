"""The demo's parts, each against numbers worked out by hand, and the whole command on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from text_tokenizers import byte_tokenizer
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

from pyramid_cache import StreamingLLMCache
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.demo import demo_command, demo_report, timed_answers
from pyramid_cache.lab.demo.planted_number import FACT, QUESTION, PromptError, Prompts, build_prompts, read_text
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.registry import BudgetLike, Workload, find_entry, tokens_of_budget


TEXT = "It was a dull day. Nobody came to see them, and nobody wrote. " * 60


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, "tiny", torch.device("cpu"))


class TestPrompt:
    @pytest.mark.parametrize("prompt_tokens", [200, 333])
    def test_rows_are_stretches_with_a_fact_in_the_middle(self, prompt_tokens: int) -> None:
        tokenizer = byte_tokenizer()
        text = "".join(f"{index:04d}. " for index in range(1000))
        prompts = build_prompts(tokenizer, text, prompt_tokens, batch_size=3)
        assert prompts.input_ids.shape == (3, prompt_tokens)
        assert len(set(prompts.numbers)) == 3
        assert len({tokenizer.decode(row[:30]) for row in prompts.input_ids}) == 3
        for row, number, (start, end) in zip(prompts.input_ids, prompts.numbers, prompts.fact_spans, strict=True):
            assert tokenizer.decode(row[start:end]) == FACT.format(number=number)
            written = tokenizer.decode(row)
            assert written.count(number) == 1
            assert written.endswith(f"{QUESTION}\nAnswer:")
            # Sentences have six letters, and the fact comes after the nearest end of one.
            middle = (prompt_tokens - (end - start) - len(f"{QUESTION}\nAnswer:")) / 2
            assert written[start - 1] == "." and abs(start - middle) <= 3.5

    @pytest.mark.parametrize(
        "text, start",
        [
            ("abcdef.hijklm.opqrst", 7),  # 20 tokens, of which the middle is 10; sentences end after 7 and after 14
            ("x" * 21, 10),  # no sentence ends
        ],
    )
    def test_fact_goes_to_the_end_of_the_sentence_nearest_to_the_middle(self, text: str, start: int) -> None:
        num_other = len(FACT.format(number=12345)) + len(f"{QUESTION}\nAnswer:")
        assert build_prompts(byte_tokenizer(), text, num_other + len(text)).fact_spans[0][0] == start

    def test_seed_chooses_numbers_and_place(self) -> None:
        first, again, other = (build_prompts(byte_tokenizer(), TEXT, 300, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.input_ids, again.input_ids)
        assert first.numbers != other.numbers
        assert not torch.equal(first.input_ids[:, :20], other.input_ids[:, :20])

    def test_chat_template_or_start_token_frames_the_prompt(self) -> None:
        tokenizer = byte_tokenizer(bos_token="<start>")
        assert build_prompts(tokenizer, TEXT, 300).input_ids[0, 0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{% for message in messages %}[user]{{ message['content'] }}{% endfor %}[model]"
        text = tokenizer.decode(build_prompts(tokenizer, TEXT, 300).input_ids[0])
        assert text.startswith("[user]It was") and text.endswith("in the text?[model]")

    def test_lengths_that_cannot_be_name_those_that_can(self) -> None:
        tokenizer = byte_tokenizer()
        with pytest.raises(PromptError, match="takes at least") as caught:
            build_prompts(tokenizer, TEXT, 50)
        least = int(str(caught.value).rstrip(".").split()[-1])
        assert build_prompts(tokenizer, TEXT, least).num_tokens == least
        with pytest.raises(PromptError):
            build_prompts(tokenizer, TEXT, least - 1)
        with pytest.raises(PromptError, match="The text has 100 tokens") as caught:
            build_prompts(tokenizer, "x" * 100, 1000)
        longest = int(str(caught.value).split()[-2])
        assert build_prompts(tokenizer, "x" * 100, longest).num_tokens == longest

    def test_shipped_novel_is_long_enough(self) -> None:
        text = read_text()
        assert text.startswith("It is a truth universally acknowledged")
        assert len(text) > 600_000


class TestMeasure:
    def test_every_run_decodes_as_many_tokens(self, loaded: LoadedModel) -> None:
        input_ids = build_prompts(loaded.tokenizer, TEXT, 200, batch_size=2).input_ids
        ticks = []
        sequences, stopwatch = timed_answers.generate(loaded.model, input_ids, DynamicCache(), 7, ticks.append)
        assert sequences.shape == (2, 207)
        assert ticks == list(range(1, 8))
        assert len(stopwatch.stamps) == 8
        assert stopwatch.prefill_seconds == stopwatch.stamps[1] - stopwatch.stamps[0] > 0
        assert stopwatch.decode_seconds == stopwatch.stamps[7] - stopwatch.stamps[1] > 0

    def test_end_token_does_not_end_the_run_but_cuts_the_answer(self, loaded: LoadedModel, tmp_path: Path) -> None:
        prompts = build_prompts(loaded.tokenizer, TEXT, 200)
        sequences, _ = timed_answers.generate(loaded.model, prompts.input_ids, DynamicCache(), 6)
        tokens = sequences[0, 200:].tolist()
        third = tokens[2]
        loaded.model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
        ended = load_model(tmp_path, "tiny", torch.device("cpu"))
        assert ended.end_token_ids == {loaded.tokenizer.eos_token_id, third}
        sequences, _ = timed_answers.generate(ended.model, prompts.input_ids, DynamicCache(), 6)
        assert sequences[0, 200:].tolist() == tokens
        assert ended.answer(tokens) == loaded.tokenizer.decode(tokens[: tokens.index(third)]).strip()

    def test_full_cache_is_counted_by_its_storages(self) -> None:
        cache = DynamicCache()
        everything = torch.zeros(2, 3, 100, 8)
        cache.update(everything[:, :, :10].clone(), everything[:, :, :10].clone(), 0)
        assert timed_answers.held_bytes(cache) == 2 * (2 * 3 * 10 * 8) * 4
        # A view keeps all of what it looks at alive, once however many look.
        cache.layers[0].keys, cache.layers[0].values = everything[:, :, :10], everything[:, :, 10:20]
        assert timed_answers.held_bytes(cache) == (2 * 3 * 100 * 8) * 4
        # Tensors that wrap others are counted by those.
        cache.layers[0].keys = TwoTensor(torch.zeros(3), torch.zeros(3))
        assert timed_answers.held_bytes(cache) == (3 + 3 + 2 * 3 * 100 * 8) * 4

    def test_layers_that_evict_are_counted_by_what_they_hold(self, loaded: LoadedModel) -> None:
        input_ids = build_prompts(loaded.tokenizer, TEXT, 200, batch_size=2).input_ids
        cache = StreamingLLMCache(loaded.model.config, budget=20, num_sink_tokens=4)
        timed_answers.generate(loaded.model, input_ids, cache, 6)
        assert timed_answers.kept_tokens(cache) == [20] * 4
        assert timed_answers.kept_positions(cache, 205).nonzero()[:, 1].tolist() == [*range(4), *range(189, 205)] * 4
        assert timed_answers.held_bytes(cache) == cache.nbytes > 0

    @pytest.mark.parametrize(
        "budget, expected",
        [
            (0.29, 29),
            (1.0, 100),
            (17, 17),
            # Keys and values of 4 layers × 2 rows × 2 KV heads × 16 dimensions × 4 bytes are 2,048 bytes a token.
            ("20480B", 10),
            ("20479B", 9),
        ],
    )
    def test_budget_in_tokens(self, loaded: LoadedModel, budget: BudgetLike, expected: int) -> None:
        assert tokens_of_budget(budget, loaded.model, Workload(100, batch_size=2)) == expected

    def test_caches_take_turns_and_the_baseline_goes_first(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = build_prompts(loaded.tokenizer, TEXT, 300)
        runs = []
        generate = timed_answers.generate

        def spy(model, input_ids, cache, *arguments):
            runs.append((type(cache).__name__, arguments[0]))
            return generate(model, input_ids, cache, *arguments)

        monkeypatch.setattr(timed_answers, "generate", spy)
        results = timed_answers.measure_caches(loaded, prompts, ["static", "h2o"], 0.5, 6, 2, lambda *_: None)
        turns = ("DynamicCache", "StaticCache", "H2OCache")
        warm_up = [(name, timed_answers.WARM_UP_NEW_TOKENS) for name in turns]
        assert runs == warm_up + [(name, 6) for name in turns] * 2
        assert [result.entry.name for result in results] == ["dynamic", "static", "h2o"]
        assert all(len(result.prefill_seconds) == len(result.decode_seconds) == 2 for result in results)


class TestReport:
    def test_row_is_worked_out_from_medians(self) -> None:
        prompts = Prompts(torch.zeros(2, 50), ["111", "222"], [(1, 2), (1, 2)])
        baseline = timed_answers.Result(
            find_entry("dynamic"), [1.0, 4.0, 2.0], [5.0, 4.0, 1.0], 1000, [10, 5], None, ["111", "222"]
        )
        faster = timed_answers.Result(
            find_entry("h2o"), [3.0, 3.0, 3.0], [2.0, 0.5, 8.0], 250, [10, 5], None, ["it is 111", "333"]
        )
        row = demo_report.as_row(faster, baseline, prompts, max_new_tokens=21)
        assert row["share_of_full"] == 0.25
        assert (row["prefill_seconds"], row["prefill_ratio"]) == (3.0, 1.5)
        # 20 tokens in each of 2 rows after the first token, in 2 seconds against 4.
        assert (row["decode_tokens_per_second"], row["decode_ratio"]) == (20.0, 2.0)
        assert row["decode_tokens_per_second_by_repeat"] == [20.0, 80.0, 5.0]
        assert (row["recalled"], row["recalled_share"], row["answer"]) == (False, 0.5, "it is 111")

    def test_bars_and_first_words(self) -> None:
        assert demo_report.bars([16, 12, 8, 4, 1, 0], full=16, height=2, max_columns=10) == ["█▄    ", "███▄▁ "]
        # Bars of many layers are means of neighbours.
        assert demo_report.bars([8, 8, 4, 4, 8, 0], full=8, height=1, max_columns=3) == ["█▄▄"]
        assert demo_report.first_words("a\nb  c") == "a b c"
        assert demo_report.first_words("word " * (demo_report.ANSWER_WORDS + 1)).endswith("word word …")

    @pytest.mark.parametrize("load, is_busy", [(None, False), (2.3, False), (4.0, True)])
    def test_footnote_gives_the_spread_and_warns_of_other_work(self, load: float | None, is_busy: bool) -> None:
        row = {"prefill_seconds_by_repeat": [2.0, 3.0, 2.0], "decode_tokens_per_second_by_repeat": [10.0, 10.0, 11.0]}
        machine = {"torch_threads": 2, "cores": 2, "load_average_after": load}
        note = demo_report.footnote({"settings": {"repeats": 3}, "machine": machine, "rows": [row]})
        assert "Medians of 3 rounds, which spread by at most 50%." in note
        assert ("load 4.0 on 2 cores" in note) == is_busy


def test_demo_compares_all_caches(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, record_file = tmp_path / "text.txt", tmp_path / "record.json"
    text.write_text(TEXT)
    arguments = ["demo", "--model", str(model_folder), "--prompt-file", str(text), "--prompt-tokens", "600"]
    arguments += [
        "--max-new-tokens",
        "5",
        "--batch-size",
        "2",
        "--repeats",
        "2",
        "--budgets",
        "0.4",
        "--device",
        "cpu",
    ]
    arguments += ["--json", str(record_file), "--out", str(tmp_path / "pictures")]
    assert main(arguments) == 0
    record = json.loads(record_file.read_text())
    rows = {row["cache"]: row for row in record["rows"]}
    assert tuple(rows) == demo_command.DEFAULT_CACHES
    full = rows["dynamic"]
    assert full["kept_tokens"] == [604] * 4
    assert full["held_bytes"] == 4 * 2 * (2 * 2 * 604 * 16) * 4
    for name, row in rows.items():
        assert len(row["kept_tokens"]) == 4
        assert row["prefill_seconds"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert len(row["answers"]) == len(record["settings"]["numbers"]) == 2
        assert len(row["prefill_seconds_by_repeat"]) == 2
        if name != "shadow":  # which keeps all, in two places, and has more slots than these
            assert row["share_of_full"] == (1.0 if name == "dynamic" else pytest.approx(0.4, abs=0.06))
        assert (row["prefill_ratio"] == row["decode_ratio"] == 1.0) == (name == "dynamic")
    assert rows["pyramid"]["kept_tokens"][0] > rows["pyramid"]["kept_tokens"][-1]
    assert rows["streaming"]["kept_tokens"] == [240] * 4
    assert (record["settings"]["prompt_tokens"], record["settings"]["budget"]) == (600, 0.4)
    assert {"processor", "cores", "load_average_before", "load_average_after"} <= set(record["machine"])
    assert set(record["versions"]) == {"pyramid_cache", "python", "torch", "transformers"}
    assert (tmp_path / "pictures" / demo_command.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    labels = [row["label"] for row in rows.values()]
    for part in (*labels, "recalled", "tokens kept per layer", record["settings"]["numbers"][0]):
        assert part in printed


def test_wide_budget_changes_no_answer(model_folder: Path, tmp_path: Path) -> None:
    """Every cache that may keep everything answers as the full cache does."""
    arguments = ["demo", "--model", str(model_folder), "--prompt-tokens", "400", "--budget", "2000"]
    arguments += ["--dtype", "float32", "--json", str(tmp_path / "record.json"), "--out", str(tmp_path)]
    assert main([*arguments, "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert len({row["answer"] for row in rows}) == 1
    assert all(row["kept_tokens"] == [431] * 4 for row in rows)


@pytest.mark.slow
def test_default_model_recalls_the_number_with_the_full_cache(tmp_path: Path) -> None:
    """The default prompt is one that the default model answers, or the comparison would show nothing."""
    arguments = ["demo", "--caches", "dynamic", "--json", str(tmp_path / "record.json"), "--out", str(tmp_path)]
    assert main([*arguments, "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"]["prompt_tokens"] >= 3000
    assert record["rows"][0]["recalled"]
