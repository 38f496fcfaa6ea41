"""Contexts as data sets: what the columns hold, and that what is saved comes back."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from test_evaluation_tasks import build, novel, tokenizer  # noqa: F401
from text_tokenizers import byte_tokenizer

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.tasks import build_contexts, parse_task
from pyramid_cache.lab.evaluation.tasks.dataset import as_contexts, as_dataset, build_dataset, load_data, save_data


NAMES = ("needles-multivalue-3-2000", "turns-2-2000", "perplexity-500", "variables-2000")


def test_columns_hold_what_contexts_do_and_come_back(novel: str, tmp_path: Path) -> None:  # noqa: F811
    decode = byte_tokenizer().decode
    for name in NAMES:
        contexts = build(name, 2, 5)
        dataset = build_dataset(name, tokenizer(), seed=5, samples=2)
        assert as_contexts(dataset) == contexts
        for index, (row, context) in enumerate(zip(dataset, contexts, strict=True)):
            assert (row["task"], row["seed"], row["index"]) == (name, 5, index)
            assert row["text"] == decode(context.ids) and row["input_ids"] == context.ids
            for number, question in enumerate(context.questions):
                assert row["question_texts"][number] == decode(question.ids)
                assert row["answer_texts"][number] == decode(question.answer)
                assert (row["depths"][number], row["values"][number]) == (question.depths, question.values)
        save_data(contexts, tmp_path, tokenizer(), seed=5)
    for name in NAMES:
        for samples in (2, 1):
            assert load_data(tmp_path, name, tokenizer(), 5, samples) == build(name, samples, 5)
    pairs = build_dataset("recall-64", samples=2)  # of the recall model, which has no text
    assert pairs["text"] == ["", ""] and as_contexts(pairs) == build_contexts(parse_task("recall-64"), samples=2)


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
    with pytest.raises(ValueError, match="need a tokenizer"):
        build_dataset("variables-2000")
    with pytest.raises(ValueError, match="It has none"):
        load_data(tmp_path / "nowhere", "variables-2000", tokenizer())
    with pytest.raises(ValueError, match="has no columns task: "):
        as_contexts(as_dataset(build("variables-2000", 1)).remove_columns("task"))


class ShiftedTokenizer:
    """Has another text for each token."""

    def decode(self, ids: list[int]) -> str:
        return byte_tokenizer().decode([(token + 1) % 256 for token in ids])


def test_the_command_saves_data_and_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cases, figures = tmp_path / "data", tmp_path / "cases.json", tmp_path / "figures.json"
    chosen = ["eval", "--tasks", "recall", "--lengths", "64,66", "--samples", "2", "--seed", "3"]
    assert main([*chosen, "--save-data", str(data)]) == main([*chosen, "--save-cases", str(cases)]) == 0
    assert sorted(path.name for path in data.iterdir()) == ["recall-64", "recall-66"]
    contexts = [build_contexts(parse_task(name), None, 3, 2) for name in ("recall-64", "recall-66")]
    assert json.loads(cases.read_text()) == {"model": "recall model", "contexts": list(map(asdict, sum(contexts, [])))}
    measured = [*chosen, "--caches", "knorm", "--budgets", "0.5", "--json", str(figures)]
    records = []
    for more in ([], ["--data", str(data)]):
        assert main([*measured, *more]) == 0
        records.append(json.loads(figures.read_text()))
    assert records[0]["rows"] == records[1]["rows"] and f"--data {data}" in records[1]["command"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    for more, status, message in (
        (["--seed", "4", "--data", str(data)], 1, "pip install 'pyramid_cache[eval]'"),
        (["--data", str(data), "--save-data", str(data)], 2, "give one of the two"),
    ):
        assert main([*chosen, *more]) == status
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_cannot_be_measured_is_refused_before_anything_is(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contexts that are too long for the model, though those of the recall model come first."""
    limit = json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    command = f"eval --model {model_folder} --samples 1 --tasks recall-64,perplexity-{limit} --out {tmp_path}"
    assert main(command.split()) == 2
    assert f"exceed the {limit} positions" in capsys.readouterr().err
    assert not list(tmp_path.glob("cells*.jsonl"))
