"""Public sets: their published columns from small files, each metric against scores by hand, and generated answers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model
from test_demo import model_folder  # noqa: F401
from test_evaluation import said, slow_log_likelihood
from test_evaluation_tasks import tokenizer
from text_tokenizers import byte_tokenizer
from transformers import DynamicCache

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.asking import Writing
from pyramid_cache.lab.evaluation.caches import BASELINE, CACHES
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.metrics import METRICS
from pyramid_cache.lab.evaluation.public.loading import PublicTask, load_contexts_of, parse_public_task
from pyramid_cache.lab.evaluation.tasks import Context, Haystack, Question
from pyramid_cache.lab.weights import no_progress


# Metrics. A row is the metric, the text, the right answers, what an answer may be, and the score.
SCORED: list[tuple[str, str, list[str], list[str], float]] = [
    ("all_found", "They are ALPHA and beta.", ["alpha", "Beta", "gamma", "delta"], [], 2 / 4),
    ("any_found", "It was in france, I think", ["Paris", "France"], [], 1.0),
    ("any_found", "It was in Spain", ["Paris", "France"], [], 0.0),
    # Words: "cat sat mat" and "cat on mat sat there": three in common, of three and of five.
    ("word_f1", "The cat sat: a mat!", ["no", "cat on the mat sat there"], [], 2 * 1 * 0.6 / 1.6),
    ("word_f1", "yes yes", ["yes"], [], 2 / 3),
    ("word_f1", "", ["yes"], [], 0.0),
    # The longest common subsequence of "a b c d" and "a c d e f" is "a c d": 3 of 4 and 3 of 5.
    ("rouge_l", "a b c d", ["x y", "a c d e f"], [], 2 * 0.75 * 0.6 / 1.35),
    ("rouge_l", " . ", ["a"], [], 0.0),
    ("classification", "It is about sport and food", ["sport"], ["sport", "food", "art"], 1 / 2),
    ("classification", "A manner of action", ["manner of action"], ["manner", "manner of action", "place"], 1.0),
    ("classification", "\n\nsport\nType: food", ["sport"], ["sport", "food"], 1.0),
    ("word_f1_of_first_line", "\nJane\nQuestion: Who?", ["jane"], [], 1.0),
    ("rouge_l_of_first_line", "a b c d\na a a", ["a c d e f"], [], 2 * 0.75 * 0.6 / 1.35),
    ("classification", "food", ["sport"], ["sport", "food"], 0.0),
    ("right_numbers", "Paragraph 12, or 3, or 12", ["Paragraph 12"], [], 2 / 3),
    ("right_numbers", "none of them", ["4"], [], 0.0),
    ("code_similarity", "# a comment\n```\nreturn x\nreturn y", ["return x"], [], 1.0),
    # "ab" of "abcd" and "abxy": 2 * 2 / 8.
    ("code_similarity", "abcd", ["abxy"], [], 0.5),
    ("chosen_letter", "**The correct answer is (B)**, not (A)", ["B"], [], 1.0),
    ("chosen_letter", "The correct answer is C.", ["C"], [], 1.0),
    ("chosen_letter", "B", ["B"], [], 0.0),
    ("final_number", "So 3 * 400.\n#### 1,200\nnot 7", ["1200"], [], 1.0),
    ("final_number", "#### -5", ["5"], [], 0.0),
    ("final_number", "The answer is 18", ["18"], [], 0.0),
    ("first_integer", "It is 71432, not 5", ["71432"], [], 1.0),
    ("first_integer", "5 or 71432", ["71432"], [], 0.0),
    ("word_found", '{"value": "ab-12"}.', ["ab-12"], [], 1.0),
    ("word_found", "ab-123", ["ab-12"], [], 0.0),
    ("name_found", "It is probably Jane.", ["JANE"], [], 1.0),
    ("name_found", "Janet", ["JANE"], [], 0.0),
    ("last_integer", "The value is: -7.", ["-7"], [], 1.0),
    ("last_integer", "7 is the value", ["7"], [], 0.0),
    ("last_integer", "", ["7"], [], 0.0),
    ("first_number", "about 2.50 or 3", ["2.5"], [], 1.0),
    ("first_number", "it is 3", ["2.5"], [], 0.0),
    ("leading_numbers", "[1, 4, 9, 8]", ["1", "4", "8", "8"], [], 2 / 4),
    ("leading_numbers", "1", ["1", "4"], [], 1 / 2),
    ("letter_of_choice", "B. Because", ["B", "a boat"], [], 1.0),
    ("letter_of_choice", "I think the answer is: A", ["A", "a boat"], [], 1.0),
    ("letter_of_choice", "the answer is a boat", ["A", "a boat"], [], 1.0),
    ("letter_of_choice", "surely C or B", ["B", "a boat"], [], 0.0),
    ("letter_of_choice", "", ["B", "a boat"], [], 0.0),
    ("broken_function", "C. parse", ["C", "parse"], [], 1.0),
    ("broken_function", "The answer is: parse", ["C", "parse"], [], 1.0),
    ("broken_function", "C", ["C", "parse"], [], 0.0),
    # 三 characters in common, of four and of three.
    ("character_f1", "他是国王。", ["是国王"], [], 2 * 3 / 7),
    # Sentences on lines of their own: "a b" and "c" both come, of "a b c d".
    ("rouge_lsum", "aa bb\ncc", ["aa bb cc dd"], [], 2 * 1 * 0.75 / 1.75),
]


@pytest.mark.parametrize("metric, text, references, choices, score", SCORED)
def test_scores_are_those_by_hand(
    metric: str, text: str, references: list[str], choices: list[str], score: float
) -> None:
    assert METRICS[metric](text, references, choices) == pytest.approx(score, abs=1e-6)


def test_every_metric_is_scored_by_hand() -> None:
    assert {row[0] for row in SCORED} == set(METRICS)


# Rows as they are published.


NIAH = "Some special magic numbers are hidden within the following text.\nOne of the special magic numbers for red-fox is: 12345.\n"
RULER_ROWS = [
    {
        "index": 0,
        "input": NIAH
        + "What are all the special magic numbers for red-fox mentioned in the provided text? The special magic "
        "numbers for red-fox mentioned in the provided text are",
        "outputs": ["12345"],
        "length": 99,
    },
    {
        "index": 1,
        "input": "VAR A = 1\n\nQuestion: Find all variables that are assigned the value 1 in the text above. Answer: According "
        "to the chain(s) of variable assignment in the text above, 1 variables are assigned the value 1, they are: ",
        "outputs": ["A"],
        "length": 99,
    },
    {
        "index": 2,
        "input": "Document 1:\nParis\n\nAnswer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nQuestion: Which city? Answer:",
        "outputs": ["Paris", "paris"],
        "length": 99,
    },
]
LONGBENCH_ROW = {
    "input": "Who {wrote} it?",
    "context": "Jane wrote it.",
    "answers": ["Jane", "Jane A."],
    "length": 3,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
LONGBENCH_V2_ROW = {
    **{"_id": "1", "domain": "x", "sub_domain": "y", "difficulty": "easy", "length": "short"},
    **{"question": "Which?", "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four"},
    **{"answer": "C", "context": "It is three."},
}
INFINITE_ROW = {
    "id": 1,
    "context": "A book.",
    "input": "Who?",
    "answer": ["Jane"],
    "options": ["Tom", "Jane", "Ann", "Sue"],
}
GSM8K_ROW = {"question": "What are 3 times 400?", "answer": "3 * 400 = <<3*400=1200>>1200.\n#### 1,200"}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    return path


def load(kind: str, path: Path, part: str = "", template: bool = True, samples: int | None = None) -> list[Context]:
    made = tokenizer() if template else tokenizer(None)
    return load_contexts_of(PublicTask(kind, str(path), part), Haystack(made), samples)


def texts(context: Context) -> tuple[str, str, str]:
    decode = byte_tokenizer().decode
    (question,) = context.questions
    return decode(context.ids), decode(question.ids), decode(question.answer)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of files goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_ruler(tmp_path: Path) -> None:
    path = write(tmp_path, "validation.jsonl", RULER_ROWS)
    niah, variables, answering = load("ruler", path)
    context, question, answer = texts(niah)
    assert context == "[user]" + NIAH.rstrip("\n")
    assert question == (
        "\n\nWhat are all the special magic numbers for red-fox mentioned in the provided text?[end][assistant]"
        "The special magic numbers for red-fox mentioned in the provided text are"
    )
    assert answer == " 12345"
    context, question, _ = texts(variables)
    assert question.startswith(
        "\n\nQuestion: Find all variables that are assigned the value 1 in the text above.[end][assistant]"
    )
    assert question.endswith("they are:")
    assert texts(answering)[1] == "\n\nQuestion: Which city?[end][assistant]Answer:"
    scoring = [
        (context.questions[0].metric, context.questions[0].max_new_tokens) for context in (niah, variables, answering)
    ]
    assert scoring == [("all_found", 128), ("all_found", 30), ("any_found", 32)]
    assert answering.questions[0].references == ["Paris", "paris"] and niah.task == f"ruler:{path}"
    assert len(load("ruler", path, samples=2)) == 2
    # Later versions have the beginning of the answer in a column of its own.
    question, beginning = RULER_ROWS[0]["input"].split("? ")
    row = {**RULER_ROWS[0], "input": question + "?", "answer_prefix": f" {beginning}"}
    (later,) = load("ruler", write(tmp_path, "later.jsonl", [row]))
    assert later.questions == niah.questions


def test_longbench(tmp_path: Path) -> None:
    classes = {
        **LONGBENCH_ROW,
        "dataset": "trec",
        "input": "Question: Who?\nType:",
        "answers": ["Person"],
        "all_classes": ["Person", "Place"],
    }
    code = {**LONGBENCH_ROW, "dataset": "lcc_e", "input": "", "context": "def f():\n", "answers": ["    return 1"]}
    path = write(tmp_path, "all.jsonl", [LONGBENCH_ROW, {**classes}, code])
    asked, classified, coded = load("longbench", path)
    context, question, answer = texts(asked)
    assert context.endswith("\n\nJane wrote it.") and context.startswith("[user]")
    assert question.endswith("Question: Who {wrote} it?\nAnswer:[end][assistant]") and answer == "Jane"
    assert asked.questions[0].references == ["Jane", "Jane A."] and asked.questions[0].metric == "word_f1"
    context, question, _ = texts(classified)
    assert not context.startswith("[user]") and question == "\nQuestion: Who?\nType:"
    assert classified.questions[0].choices == ["Person", "Place"]
    assert texts(coded) == ("Complete this code.\n\ndef f():\n", "\nThe next line of code:\n", "    return 1")
    for row, error, message in (
        ({**LONGBENCH_ROW, "dataset": "dureader"}, NotImplementedError, "Chinese segmenter"),
        ({**LONGBENCH_ROW, "dataset": "songs"}, ValueError, "no set 'songs'"),
        ({**LONGBENCH_ROW, "answers": []}, ValueError, "Row 0 of"),
    ):
        with pytest.raises(error, match=message):
            load("longbench", write(tmp_path, f"bad{row['dataset']}{len(row['answers'])}.jsonl", [row]))


def test_longbench_v2(tmp_path: Path) -> None:
    (context,) = load("longbench-v2", write(tmp_path, "data.json", [LONGBENCH_V2_ROW]))
    text, question, answer = texts(context)
    assert text.endswith("\n\nIt is three.")
    assert "Which?" in question and "(A) one\n(B) two\n(C) three\n(D) four" in question
    assert answer == "The correct answer is (C)"
    assert METRICS[context.questions[0].metric](answer, context.questions[0].references, []) == 1


def test_infinitebench(tmp_path: Path) -> None:
    path = write(tmp_path, "longbook_choice_eng.jsonl", [INFINITE_ROW])
    (chosen,) = load("infinitebench", path)
    text, question, answer = texts(chosen)
    assert text.endswith("A book.") and "Who?\nA. Tom\nB. Jane\nC. Ann\nD. Sue" in question and answer == "B"
    assert chosen.questions[0].references == ["B", "Jane"]
    (named,) = load("infinitebench", path, "longbook_qa_eng")
    assert texts(named)[2] == "Jane" and named.questions[0].metric == "word_f1"
    key = {"id": 1, "context": '{"k": "v"}', "input": 'Key: "k"\nThe value is: ', "answer": ["v"], "options": []}
    (retrieved,) = load("infinitebench", write(tmp_path, "kv_retrieval.jsonl", [key]))
    assert texts(retrieved)[2] == "v" and retrieved.questions[0].max_new_tokens == 50
    numbers = {**key, "answer": [1, 4, 9]}
    (worked_out,) = load("infinitebench", write(tmp_path, "math_calc.jsonl", [numbers]))
    assert worked_out.questions[0].references == ["1", "4", "9"] and texts(worked_out)[2] == "[1, 4, 9]"
    with pytest.raises(ValueError, match="no set 'other'"):
        load("infinitebench", write(tmp_path, "other.jsonl", [key]))


def test_gsm8k(tmp_path: Path) -> None:
    path = write(tmp_path, "test.parquet", [GSM8K_ROW])
    (context,) = load("gsm8k", path)
    text, question, answer = texts(context)
    assert text == "[user]What are 3 times 400?" and '"#### "' in question
    assert answer == "3 * 400 = 1200.\n#### 1,200" and context.questions[0].references == ["1200"]
    (plain,) = load("gsm8k", path, template=False)
    assert texts(plain)[1].endswith("\nAnswer: ")
    with pytest.raises(ValueError, match="Row 0 of .* no number behind"):
        load("gsm8k", write(tmp_path, "bad.jsonl", [{"question": "?", "answer": "7"}]))


def test_sources_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no columns outputs, which ruler has: it has input"):
        load("ruler", write(tmp_path, "half.jsonl", [{"input": "x"}]))
    with pytest.raises(ValueError, match="template 'base'"):
        load("ruler", write(tmp_path, "chat.jsonl", [{"input": "What?\n[/INST] The", "outputs": ["1"]}]))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match="has no rows"):
        load("gsm8k", empty)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load("gsm8k", broken)
    (tmp_path / "test.csv").write_text("a")
    with pytest.raises(ValueError, match="no file of .jsonl"):
        load("gsm8k", tmp_path / "test.csv")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="is no file, and as a set of the hub it cannot be read"):
        load("gsm8k", Path("nobody/nothing"))


def test_names_of_public_tasks(tmp_path: Path) -> None:
    assert parse_public_task("gsm8k:openai/gsm8k:main") == PublicTask("gsm8k", "openai/gsm8k", "main")
    assert parse_public_task("needles-8-1024") is None and parse_public_task("songs:x") is None
    path = write(tmp_path, "a:b.jsonl", [GSM8K_ROW])
    assert parse_public_task(f"gsm8k:{path}") == PublicTask("gsm8k", str(path))
    assert PublicTask("gsm8k", "openai/gsm8k", "main").name == "gsm8k:openai/gsm8k:main"
    with pytest.raises(ValueError, match="names no file"):
        parse_public_task("ruler:")


# Generated answers.


@pytest.mark.parametrize("name", [BASELINE, "snapkv", "shadow", "streaming"])
def test_generated_answers_are_those_of_generate(name: str) -> None:
    """Metrics get what greedy decoding with the cache says up to an end token, and right answers keep their likelihood."""
    model = tiny_model("llama")
    context = random_tokens(1, 48, seed=5)[0].tolist()
    asked = [random_tokens(1, length, seed=20 + index)[0].tolist() for index, length in enumerate((6, 6, 8))]

    def build(num_tokens: int):
        if name == BASELINE:
            return DynamicCache(config=model.config)
        return CACHES[name].build(model, 0.5, num_tokens, 8 + 9 - 1)

    def write_down(ids: list[int]) -> str:
        return "".join(f" {token}," for token in ids)

    after_context = build(48)
    with torch.no_grad():
        model(torch.tensor([context]), past_key_values=after_context)
    wanted, ends = [], set()
    for ids in asked:
        wanted.append(said(model, copy.deepcopy(after_context), context + ids, 9)[:9])
    ends.add(wanted[1][4])  # which cuts the second answer, and others that have it
    questions = [
        Question(ids, [1, 2, 3], metric="all_found", references=[f" {token}," for token in answer], max_new_tokens=9)
        for ids, answer in zip(asked, wanted, strict=True)
    ]
    results = Evaluation(
        model, {} if name == BASELINE else {name: CACHES[name]}, [0.5], writing=Writing(write_down, ends)
    ).run([Context("made-up", context, questions)], no_progress)
    found = {result.protocol: result.scores for result in results if result.cache == name}
    for index, (question, answer) in enumerate(zip(questions, wanted, strict=True)):
        length = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        text = write_down(answer[:length])
        share = sum(reference in text for reference in question.references) / len(answer)
        assert found["context"][index].token_accuracy == pytest.approx(share) and (index != 1 or share < 1)
        likely = slow_log_likelihood(model, after_context, question.ids, question.answer, by_step=name == "shadow")
        assert found["context"][index].log_likelihood == pytest.approx(likely, abs=1e-4)
    assert len(found["question"]) == 3
    if name == BASELINE:
        assert [score.token_accuracy for score in found["question"]] == pytest.approx(
            [score.token_accuracy for score in found["context"]]
        )


def test_generated_answers_need_a_writing() -> None:
    question = Question([1, 2], [3], metric="all_found", references=["x"], max_new_tokens=2)
    with pytest.raises(ValueError, match="give the evaluation a Writing"):
        Evaluation(tiny_model("llama"), {}, [0.5]).run([Context("made-up", [1, 2, 3], [question])], no_progress)


def test_the_command_measures_public_sets(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, results = write(tmp_path, "validation.jsonl", RULER_ROWS[2:] * 2), tmp_path / "results.json"
    task = f"ruler:{path}"
    arguments = ["eval", "--model", str(model_folder), "--tasks", task, "--caches", "knorm", "--budgets", "0.5"]
    assert main([*arguments, "--samples", "1", "--json", str(results)]) == 0
    rows = json.loads(results.read_text())["rows"]
    assert {(row["task"], row["protocol"], row["cache"]) for row in rows} == {
        (task, protocol, cache) for protocol in ("context", "question") for cache in (BASELINE, "knorm")
    }
    assert all(row["num_cases"] == 1 and row["token_accuracy"] in (0, 1) for row in rows)
    assert main([*arguments, "--lengths", "64"]) == 2
    assert "has no effect" in capsys.readouterr().err


def small_evaluation(model: Path, folder: Path) -> list[str]:
    """The command but for the names of its tasks."""
    command = (
        f"eval --model {model} --caches knorm --budgets 0.5 --samples 1 --protocols context --out {folder} --tasks"
    )
    return command.split()


def test_a_task_that_cannot_be_measured_is_refused_before_the_others_are(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model has 2,048 positions; the recall model's task comes first."""
    folder = tmp_path / "answers"
    assert main([*small_evaluation(model_folder, folder), "recall-64,perplexity-4096"]) == 2
    assert "exceed the 2048 positions" in capsys.readouterr().err
    assert not list(folder.glob("cells*.jsonl"))


def test_contexts_that_have_changed_are_refused_before_others_are_measured(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "answers"
    arguments = small_evaluation(model_folder, folder)
    assert main([*arguments, "perplexity-256"]) == 0
    cells = (folder / "cells.jsonl").read_text()
    settings = json.loads((folder / "settings.json").read_text())
    settings["contexts"]["perplexity-256"] = ["0" * 16]
    (folder / "settings.json").write_text(json.dumps(settings))
    assert main([*arguments, "recall-64,perplexity-256"]) == 2
    assert "results of perplexity-256 whose context 0 is another one now" in capsys.readouterr().err
    assert (folder / "cells.jsonl").read_text() == cells
