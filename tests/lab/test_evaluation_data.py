"""Contexts as data sets: what the columns hold, and that what is saved comes back."""

import json
import sys
from pathlib import Path

import pytest
from test_evaluation_tasks import build, novel, tokenizer  # noqa: F401
from text_tokenizers import byte_tokenizer

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.tasks import build_contexts, parse_task
from pyramid_cache.lab.evaluation.tasks.dataset import as_contexts, as_dataset, build_dataset, load_data, save_data


NAMES = ("needles-multivalue-3-2000", "turns-2-2000", "perplexity-500", "variables-2000")


def test_columns_hold_what_contexts_do(novel: str) -> None:  # noqa: F811
    decode = byte_tokenizer().decode
    for name in NAMES:
        contexts = build(name, 2, 5)
        dataset = build_dataset(name, tokenizer(), seed=5, samples=2)
        assert as_contexts(dataset) == contexts
        for index, (row, context) in enumerate(zip(dataset, contexts, strict=True)):
            assert (row["task"], row["seed"], row["index"]) == (name, 5, index)
            assert row["text"] == decode(context.ids) and row["input_ids"] == context.ids
            questions = context.questions
            assert row["question_texts"] == [decode(question.ids) for question in questions]
            assert row["answer_texts"] == [decode(question.answer) for question in questions]
            assert row["depths"] == [question.depths for question in questions]
            assert row["values"] == [question.values for question in questions]


def test_pairs_of_the_recall_model_have_no_text() -> None:
    dataset = build_dataset("recall-64", samples=2)
    assert dataset["text"] == ["", ""] and as_contexts(dataset) == build_contexts(parse_task("recall-64"), samples=2)


def test_saved_contexts_come_back(novel: str, tmp_path: Path) -> None:  # noqa: F811
    for name in NAMES:
        save_data(build(name, 2), tmp_path, tokenizer())
    for name in NAMES:
        assert load_data(tmp_path, name, tokenizer()) == build(name, 2)
        assert load_data(tmp_path, name, tokenizer(), samples=1) == build(name, 1)


def test_data_of_something_else_is_refused(novel: str, tmp_path: Path) -> None:  # noqa: F811
    save_data(build("variables-2000", 2, 1), tmp_path, tokenizer(), seed=1)
    for arguments, message in (
        (("variables-1000", tokenizer(), 1), "no contexts of the task 'variables-1000'. It has variables-2000"),
        (("variables-2000", tokenizer(), 1, 3), "has 2 contexts, not 3"),
        (("variables-2000", tokenizer(), 2), "from seed 1, not 2"),
        (("variables-2000", ShiftedTokenizer(), 1), "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path, *arguments)
    with pytest.raises(ValueError, match="It has none"):
        load_data(tmp_path / "nowhere", "variables-2000", tokenizer())
    with pytest.raises(ValueError, match="has no columns task: "):
        as_contexts(as_dataset(build("variables-2000", 1)).remove_columns("task"))


class ShiftedTokenizer:
    """Has another text for each token."""

    def decode(self, ids: list[int]) -> str:
        return byte_tokenizer().decode([(token + 1) % 256 for token in ids])


def test_the_command_saves_data_and_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, made, read = tmp_path / "data", tmp_path / "made.json", tmp_path / "read.json"
    chosen = ["eval", "--tasks", "recall", "--lengths", "64,66", "--samples", "2", "--seed", "3"]
    assert main([*chosen, "--save-data", str(data)]) == 0
    assert sorted(path.name for path in data.iterdir()) == ["recall-64", "recall-66"]
    measured = [*chosen, "--caches", "knorm", "--budgets", "0.5"]
    assert main([*measured, "--json", str(made)]) == 0
    assert main([*measured, "--data", str(data), "--json", str(read)]) == 0
    assert json.loads(read.read_text())["rows"] == json.loads(made.read_text())["rows"]
    assert f"--data {data}" in json.loads(read.read_text())["command"]
    assert main([*measured[:-5], "4", "--data", str(data)]) == 2
    assert "Give --seed 3" in capsys.readouterr().err.replace("\n", " ")
    cases = tmp_path / "cases.json"
    assert main([*chosen, "--save-cases", str(cases)]) == 0
    assert [len(context["ids"]) for context in json.loads(cases.read_text())["contexts"]] == [64, 64, 66, 66]
    assert main([*chosen, "--data", str(data), "--save-data", str(data)]) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["eval", "--tasks", "recall-64", "--save-data", str(tmp_path)]) == 1
    assert "pip install 'pyramid_cache[eval]'" in capsys.readouterr().err


def test_tasks_that_need_a_tokenizer_say_so() -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        build_dataset("variables-2000")


def test_what_cannot_be_measured_is_refused_before_anything_is(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contexts that are too long for the model, and contexts that have changed. The recall model comes first."""
    command = f"eval --model {model_folder} --caches knorm --budgets 0.5 --samples 1 --protocols context --out"
    long, changed = tmp_path / "long", tmp_path / "changed"
    limit = json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    assert main([*command.split(), str(long), "--tasks", f"recall-64,perplexity-{limit}"]) == 2
    assert f"exceed the {limit} positions" in capsys.readouterr().err
    assert not list(long.glob("cells*.jsonl"))
    assert main([*command.split(), str(changed), "--tasks", "perplexity-256"]) == 0
    cells = (changed / "cells.jsonl").read_text()
    settings = json.loads((changed / "settings.json").read_text())
    settings["contexts"]["perplexity-256"] = ["0" * 16]
    (changed / "settings.json").write_text(json.dumps(settings))
    assert main([*command.split(), str(changed), "--tasks", "recall-64,perplexity-256"]) == 2
    assert "results of perplexity-256 whose context 0 is another one now" in capsys.readouterr().err
    assert (changed / "cells.jsonl").read_text() == cells
