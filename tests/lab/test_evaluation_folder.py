"""What an evaluation leaves behind: answers scored by hand, reports that no interruption changes, and pictures."""

import base64
import csv
import json
import math
import multiprocessing
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation import score_plots
from pyramid_cache.lab.evaluation.answers import MAX_COLUMNS, Answer, as_row, collect_answers, measure_kept_positions
from pyramid_cache.lab.evaluation.cells import Cell, CellKey, CellStore
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.folder import ResultFolder
from pyramid_cache.lab.evaluation.html_page import page
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.registry import BASELINE, CACHES, Workload, find_entry
from pyramid_cache.lab.weights import no_progress


def ignore(text: str) -> None:
    """Takes what would be announced."""


def successor_model() -> LlamaForCausalLM:
    """
    Says of 16 tokens always the one after the last: the logit of that is 2, those of the others are 0. Attention and
    MLP add nothing to a one-hot vector of 16 numbers. The last norm makes the one a 4, and the head halves it.
    """
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-12, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(16))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(0.5 * torch.eye(16).roll(1, dims=0))
    return model


HAND_CONTEXT = Context(
    "successors",
    [1, 2, 3, 9, 5, 6, 7, 8],
    [
        Question([3], [4, 5]),  # right, and nowhere in the context
        Question([8, 1], [2, 4]),  # after 2 the model says 3
        Question([5], [6], depths=[0.625]),  # right; the 6 behind the 5 is the sixth of eight tokens
        Question([9], [6, 7]),  # after 9 it says 10, but after 6 it says 7
        Question([5], [7, 9]),  # wrong
    ],
)
RIGHT, WRONG = 2 - math.log(math.exp(2) + 15), -math.log(math.exp(2) + 15)
# Depth, right answer, exact, token accuracy, log-likelihood per token.
HAND_SCORES = [
    ("", "4 5", 1, 1.0, RIGHT),
    ("", "2 4", 0, 0.5, (RIGHT + WRONG) / 2),
    ("0.625", "6", 1, 1.0, RIGHT),
    ("", "6 7", 0, 0.5, (RIGHT + WRONG) / 2),
    ("", "7 9", 0, 0.0, WRONG),
]


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a command would have made of rows."""
    record = {"rows": rows, "settings": {"model": "successors", "dtype": "float32", "device": "cpu"}}
    return record | {"command": "none", "machine": {"processor": "some"}, "versions": {"torch": "some"}}


@pytest.fixture(scope="module")
def hand_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The successor model in both protocols, with a cache that evicts and a stream."""
    folder = tmp_path_factory.mktemp("answers")
    caches = {name: CACHES[name] for name in ("knorm", "streaming")}
    evaluation = Evaluation(successor_model(), caches, [0.5], store=CellStore(folder, {}))
    results = evaluation.run([HAND_CONTEXT], no_progress)
    written = ResultFolder(folder, ignore)
    written.take(evaluation, [HAND_CONTEXT])
    written.write(record_of([as_row(result) for result in results]))
    # With a tokenizer answers are texts.
    answers = collect_answers(results, [HAND_CONTEXT], evaluation.model, lambda ids: "".join(map("{:x}".format, ids)))
    assert [answer.answer for answer in answers[:5]] == ["45", "24", "6", "67", "79"]
    return folder


def test_answers_are_those_scored_by_hand(hand_folder: Path) -> None:
    """Answers of one token are not measured with the question in view."""
    record = json.loads((hand_folder / "results.json").read_text())
    with (hand_folder / "answers.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    expected = [
        (cache, protocol, number)
        for protocol in ("context", "question")
        for cache in (BASELINE, "knorm", "streaming")
        for number in range(5)
        if protocol == "context" or number != 2
    ]
    assert [(row["cache"], row["protocol"], int(row["question"])) for row in found] == expected
    for row in found:
        depth, answer, exact, token_accuracy, log_likelihood = HAND_SCORES[int(row["question"])]
        assert (row["task"], row["length"], row["context"]) == ("successors", "8", "0")
        assert (row["depths"], row["answer"], row["exact"]) == (depth, answer, str(exact))
        assert float(row["token_accuracy"]) == token_accuracy
        assert float(row["log_likelihood"]) == pytest.approx(log_likelihood, abs=2e-6)
        assert row["budget"] == ("1.0" if row["cache"] == BASELINE else "0.5")
    exact = {(row["cache"], row["protocol"]): row["exact_match"] for row in record["rows"]}
    assert set(exact.values()) == {2 / 5, 1 / 4}  # two of five questions, and one of the four in view
    # Keys and values of one head of 8 numbers of 4 bytes: 64 bytes per token. The second question has two tokens.
    full = [int(row["held_bytes"]) for row in found if row["cache"] == BASELINE]
    assert full == [8 * 64] * 5 + [9 * 64, 10 * 64, 9 * 64, 9 * 64]
    # The other caches say themselves what they hold of the context.
    cache = CACHES["knorm"].build(successor_model(), 0.5, Workload(8))
    with torch.no_grad():
        successor_model()(torch.tensor([HAND_CONTEXT.ids]), **{CACHE_ARGUMENT: cache})
    held = {int(row["held_bytes"]) for row in found if (row["cache"], row["protocol"]) == ("knorm", "context")}
    assert held == {cache.nbytes} and 4 * 64 <= cache.nbytes < 8 * 64


CELL = Cell(CellKey("recall-64", 0, -1, "context", "knorm", 0.5), [1.0], [-0.5], 0.5)
LINE = (
    '{"key": {"task": "recall-64", "context": 0, "question": -1, "protocol": "context", "cache": "knorm", '
    '"budget": 0.5}, "token_accuracy": [1.0], "log_likelihood": [-0.5], "held_share": 0.5}\n'
)


def test_cells_of_other_contexts_are_refused(tmp_path: Path) -> None:
    """More contexts of a task are not another one. In view, answers of one token are not measured."""
    contexts = [Context("task", [1, 2, index], [Question([3], [4]), Question([5], [6, 7])]) for index in range(3)]
    store = CellStore(tmp_path, {})
    store.require_contexts(contexts[:2])
    for protocol, num_answers in (("context", 2), ("question", 1)):
        key = CellKey("task", 0, -1, protocol, "knorm", 0.5)
        store.add(Cell(key, [1.0] * num_answers, [-0.5] * num_answers, 0.5))
    CellStore(tmp_path, {}).require_contexts(contexts)
    CellStore(tmp_path, {}).require_contexts([*contexts[:1], Context("other", [5], [Question([3], [4])])])
    changed = Context("task", [1, 2, 1], [Question([3], [5])])
    with pytest.raises(ValueError, match="results of task whose context 1 is another one now"):
        CellStore(tmp_path, {}).require_contexts([contexts[0], changed])
    CellStore().require_contexts([changed])  # where nothing is kept nothing can be mistaken
    store.add(Cell(CellKey("task", 0, -1, "context", "knorm", 0.5), [1.0] * 3, [-0.5] * 3, 0.5))
    message = r"3 answers to the 2 questions of context 0 of task \(knorm, 0.5, context first"
    with pytest.raises(ValueError, match=message):
        CellStore(tmp_path, {}).require_contexts(contexts)


def test_broken_lines_are_dropped_at_the_end_and_refused_elsewhere(tmp_path: Path) -> None:
    """Also in the file of another process."""
    CellStore(tmp_path, {}).add(CELL)
    path = tmp_path / "cells.jsonl"
    assert path.read_text() == LINE
    wrong = [("[1.0]", "[1.0, 1.0]"), ("[1.0]", '["1.0"]'), ('"held_share": 0.5', '"held_share": "half"')]
    wrong += [('"task"', '"tusk"'), ("[1.0]", "[]"), ("[1.0]", "[NaN]")]
    lines = ["nonsense\n", "[]\n", "\n", *(LINE.replace(*pair) for pair in wrong)]
    for rest in ('{"key": {"ta', "\x00\x00\x00", LINE[:-1], *lines):
        path.write_text(LINE + rest)
        said: list[str] = []
        for _ in range(2):
            assert list(CellStore(tmp_path, {}, announce=said.append).cells.values()) == [CELL]
            assert len(said) == 1 and f"Dropped the last line of {path}" in said[0]
            assert path.read_text() == LINE
    for line in lines:
        for other in (path, tmp_path / "cells.1.jsonl"):
            other.write_text(LINE + line + LINE)
            with pytest.raises(ValueError, match=rf"Line 2 of .*{other.name} is no result"):
                CellStore(tmp_path, {})
            assert other.read_text() == LINE + line + LINE
            other.unlink()


def test_other_settings_are_named(tmp_path: Path) -> None:
    settings = {"model": "a", "seed": 0, "versions.torch": "1"}
    CellStore(tmp_path, {"seed": 2})
    CellStore(tmp_path, settings).add(CELL)  # the first run measured nothing
    CellStore(tmp_path, settings)
    for other, message in (
        ({"model": "a", "seed": 1, "versions.torch": "3"}, "seed 0 instead of 1, versions.torch '1' instead of '3'"),
        ({"model": "a", "length": 2, "versions.torch": "1"}, "seed 0 instead of None, length None instead of 2"),
    ):
        with pytest.raises(ValueError, match=f"settings: {message}. Choose"):
            CellStore(tmp_path, other)
    for text in ("", "[]", '{"settings": 3}', '{"model": "a"}'):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json does not hold the settings of an evaluation"):
            CellStore(tmp_path, {"model": "a"})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has results, but no settings\.json"):
        CellStore(tmp_path, settings)
    with pytest.raises(ValueError, match="is a file"):
        CellStore(tmp_path / "cells.jsonl", {})


def test_positions_are_measured_once(tmp_path: Path) -> None:
    caches = {name: CACHES[name] for name in ("streaming", "pyramid", "snapkv")}
    evaluation = Evaluation(successor_model(), caches, [0.5])
    ids = random_tokens(1, 2 * MAX_COLUMNS, seed=1)[0].remainder(16).tolist()
    long = Context("long", ids, [Question([1], [2])])
    kept = measure_kept_positions(evaluation, long, tmp_path, ignore)
    # 256 of 512 tokens, two in a column: 4 sinks, and 252 of the latest.
    assert kept[0].shares == [[1.0] * 2 + [0.0] * 128 + [1.0] * 126]
    context = Context("some", ids[:40], [Question([1], [2, 3])])
    kept = measure_kept_positions(evaluation, context, tmp_path, ignore)
    assert [(one.task, one.cache, one.budget, one.num_tokens) for one in kept] == [
        ("some", name, 0.5, 40) for name in caches
    ]
    assert kept[0].shares == [[1.0] * 4 + [0.0] * 20 + [1.0] * 16]  # sinks, and the latest
    for one in kept[1:]:
        assert 0 < sum(one.shares[0]) <= 20
    lines = (tmp_path / "positions.jsonl").read_text()
    (tmp_path / "positions.jsonl").write_text(lines[:-30])
    said: list[str] = []
    assert measure_kept_positions(evaluation, context, tmp_path, said.append) == kept
    assert len(said) == 1 and (tmp_path / "positions.jsonl").read_text() == lines
    evaluation.model = None  # nothing is left to read
    assert measure_kept_positions(evaluation, context, tmp_path, ignore) == kept


def answer(cache: str, budget: float, length: int, depth: float, token_accuracy: float) -> Answer:
    return Answer(
        *(f"made-up-{length}", length, cache, budget, "context", 0, 0, (depth,), "1"),
        *(token_accuracy == 1, token_accuracy, -1.0, 0.5, 100),
    )


def score_row(cache: str, budget: float, exact_match: float) -> dict[str, Any]:
    label = find_entry(cache).label
    scores = {"exact_match": exact_match, "token_accuracy": exact_match, "log_likelihood": exact_match - 2}
    row = {"task": "made-up-64", "protocol": "context", "cache": cache, "label": label, "budget": budget}
    return row | scores | {"held_share": budget + 0.01, "num_cases": 4}


def check_page(text: str) -> list[list[str]]:
    """Elements are closed in order, and nothing is fetched. Returns the cells of all rows of tables."""
    outside = re.sub(r"(?<=<script>).*?(?=</script>)", "", text, flags=re.DOTALL)
    opened: list[str] = []
    for slash, tag in re.findall(r"<(/?)(\w+)", outside):
        if slash:
            assert opened.pop() == tag
        elif tag not in ("meta", "img", "wbr"):
            opened.append(tag)
    assert not opened and [outside.count(f"<{tag}>") for tag in ("h1", "script", "style", "title")] == [1] * 4
    forbidden = r'<(link|iframe|base|object|embed)\b|<[^>]*\s(on\w+|style)=|@import|url\(|src="(?!data:)|href="(?!#)'
    assert not re.search(forbidden, outside)
    rows = re.findall("<tr.*?</tr>", outside, re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[dh].*?</t[dh]>", row)] for row in rows]


def test_the_page_has_tables_and_pictures_in_it(hand_folder: Path) -> None:
    record = json.loads((hand_folder / "results.json").read_text())
    text = (hand_folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    shown = check_page(text)
    links, ids = re.findall('href="#([^"]+)"', text), re.findall(' id="([^"]+)"', text)
    assert links == ids and len(set(ids)) == 5
    pictures = {path.stem: path.read_bytes() for path in (hand_folder / "plots").iterdir()}
    names = ["depth-successors-context", "positions-successors"]
    assert sorted(pictures) == [*names, "score-successors-context", "score-successors-question"]
    images = map(base64.b64decode, re.findall('<img src="data:image/png;base64,([^"]+)" alt="[^"]+">', text))
    assert sorted(images) == sorted(pictures.values())
    for row in record["rows"]:
        figures = [f"{row[name]:.2f}" for name in ("exact_match", "token_accuracy", "log_likelihood", "held_share")]
        assert [row["label"], f"{row['budget']:g}", *figures, str(row["num_cases"])] in shown
    assert ["torch", "some"] in shown and ["model", "successors"] in shown


def test_the_page_escapes_names_and_shows_what_a_task_is_measured_by() -> None:
    """Perplexities alone, and a column for turns."""
    evil = '<script>alert("&")</script>\'"'
    common = score_row(BASELINE, 1.0, 0.38) | {"label": evil, "protocol": evil}
    rows = [common | {"task": "perplexity-64", "perplexity": 33.31}]
    rows.append(common | {"task": evil, "token_accuracy_by_turn": [0.0, 0.25]})
    record = {"rows": rows, "settings": {"model": evil, "dtype": evil, "device": evil, evil: evil}, "command": evil}
    record |= {"machine": {"processor": evil}, "versions": {evil: evil}}
    text = page(record, [score_plots.Plot("a", evil, evil, b"")])
    check_page(text)
    assert "alert(" in text and 'alert("' not in text
    first, second = text.split("<h2")[1:3]
    assert "33.31" in first and "0.38" not in first and "exact match" not in first
    assert "0.38" in second and "<td>0.00 0.25</td>" in second
    assert "the token accuracy of each turn is in a column of its own" in text
    assert "perplexity is shown instead" in text


@pytest.mark.slow
def test_an_evaluation_that_is_killed_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """Killed at six moments and started again, it leaves behind what it leaves if it is not, byte for byte."""
    command = "eval --tasks recall-64,recall-66 --caches knorm,streaming,shadow --budgets 0.5,0.2 --threads 1 --out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyramid_cache.lab.cli", "pyramid_cache.lab.evaluation.folder"])
    whole, killed, cells = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed" / "cells.jsonl"

    def start(folder: Path) -> Any:
        process = context.Process(target=main, args=([*command.split(), str(folder)],))
        process.start()
        return process

    def run(folder: Path) -> list[str]:
        process = start(folder)
        process.join()
        assert process.exitcode == 0
        return [json.dumps(json.loads(line)["key"]) for line in (folder / "cells.jsonl").read_text().splitlines()]

    num_cells, num_killed, seen = len(run(whole)), 0, b""
    generator = random.Random(7)
    # After how many cells, and how many seconds later.
    moments = [(count, generator.uniform(0, 0.01)) for count in sorted(generator.sample(range(1, num_cells), 4))]
    # All is measured: what is left is to look at what is kept of an example, and to draw and write reports.
    moments += [(num_cells, generator.uniform(0, 2.5)) for _ in range(2)]
    for count, seconds in moments:
        process, stop = start(killed), time.monotonic() + 120
        while (cells.read_bytes().count(b"\n") if cells.exists() else 0) < count and process.is_alive():
            assert time.monotonic() < stop
            time.sleep(0.0005)
        process.join(seconds)
        num_killed += process.is_alive()
        process.kill()
        process.join()
        content = cells.read_bytes()
        assert content.startswith(seen)  # nothing is lost
        seen = content[: content.rfind(b"\n") + 1]
    assert num_killed >= 4
    keys = run(killed)
    assert len(keys) == len(set(keys)) == num_cells  # nothing is repeated
    found, wanted = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (killed, whole)
    )
    rows, wanted_rows = (json.loads(files.pop(Path("results.json")))["rows"] for files in (found, wanted))
    differing = {path for path in wanted if found[path] != wanted[path]}
    assert found.keys() == wanted.keys() and differing <= {Path("cells.jsonl"), Path("settings.json")}
    assert rows == wanted_rows and wanted[Path("positions.jsonl")].count(b"\n") == 3 * 2
