"""What an evaluation leaves behind: answers scored by hand, reports that no interruption changes, and pictures."""

import base64
import csv
import json
import math
import multiprocessing
import random
import struct
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from models import random_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation import score_plots
from pyramid_cache.lab.evaluation.answers import Answer, as_row, collect_answers
from pyramid_cache.lab.evaluation.cells import Cell, CellKey, CellStore
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.folder import ResultFolder
from pyramid_cache.lab.evaluation.html_page import page
from pyramid_cache.lab.evaluation.kept import MAX_COLUMNS, KeptPositions, measure_kept_positions
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.registry import BASELINE, CACHES, Workload, find_entry
from pyramid_cache.lab.weights import no_progress


def ignore(text: str) -> None:
    """Takes what would be announced."""


# Answers.


def successor_model() -> LlamaForCausalLM:
    """
    Says of 16 tokens always the one after the last: the logit of that is 2, those of the others are 0.

    Attention and MLP add nothing, so that the last layer gets the token as a one-hot vector of 16 numbers. Its norm
    makes the one a 4, and the head halves it.
    """
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
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


def hand_scored(folder: Path, names: Sequence[str], contexts: Sequence[Context]) -> None:
    """Evaluates the successor model, and writes the folder."""
    store = CellStore(folder, {})
    evaluation = Evaluation(successor_model(), {name: CACHES[name] for name in names}, [0.5], store=store)
    results = evaluation.run(contexts, no_progress)
    written = ResultFolder(folder, ignore)
    written.take(evaluation, contexts)
    written.write(record_of([as_row(result) for result in results]))


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a command would have made of rows."""
    return {
        "rows": rows,
        "settings": {"model": "successors", "dtype": "float32", "device": "cpu"},
        "command": "none",
        "machine": {"processor": "some"},
        "versions": {"torch": "some"},
    }


@pytest.fixture(scope="module")
def hand_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both protocols, a cache that evicts and a stream."""
    folder = tmp_path_factory.mktemp("answers")
    hand_scored(folder, ["knorm", "streaming"], [HAND_CONTEXT])
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


def test_answers_are_texts_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    def letters(ids: list[int]) -> str:
        return "".join('abcdefg",\n'[token_id] for token_id in ids)

    evaluation = Evaluation(successor_model(), {}, [0.5], ["context"], CellStore(tmp_path, {}))
    context = Context("letters", [1, 2, 3], [Question([3], [4, 7, 8, 9])])
    results = evaluation.run([context], no_progress)
    (answer,) = collect_answers(results, [context], evaluation.model, letters)
    assert answer.answer == 'e",\n'


# Cells.


CELL = Cell(CellKey("recall-64", 0, -1, "context", "knorm", 0.5), [1.0], [-0.5], 0.5)
LINE = (
    '{"key": {"task": "recall-64", "context": 0, "question": -1, "protocol": "context", "cache": "knorm", '
    '"budget": 0.5}, "token_accuracy": [1.0], "log_likelihood": [-0.5], "held_share": 0.5}\n'
)


def test_cells_of_a_context_that_has_changed_are_refused(tmp_path: Path) -> None:
    """More contexts of a task, and other tasks, are not another one."""
    contexts = [Context("task", [1, 2, index], [Question([3], [4])]) for index in range(3)]
    store = CellStore(tmp_path, {})
    store.add(CELL)
    store.require_contexts(contexts[:2])
    CellStore(tmp_path, {}).require_contexts(contexts)
    CellStore(tmp_path, {}).require_contexts([*contexts[:1], Context("other", [5], [Question([3], [4])])])
    changed = Context("task", [1, 2, 1], [Question([3], [5])])
    with pytest.raises(ValueError, match="results of task whose context 1 is another one now"):
        CellStore(tmp_path, {}).require_contexts([contexts[0], changed])
    CellStore().require_contexts([changed])  # where nothing is kept nothing can be mistaken


def test_cells_without_settings_are_refused_and_settings_without_cells_are_not(tmp_path: Path) -> None:
    CellStore(tmp_path, {"seed": 1})
    store = CellStore(tmp_path, {"seed": 2})  # the first run measured nothing
    store.add(CELL)
    with pytest.raises(ValueError, match="seed 2 instead of 3"):
        CellStore(tmp_path, {"seed": 3})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has results, but no settings\.json"):
        CellStore(tmp_path, {"seed": 2})
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        CellStore(file, {})


def test_cells_with_too_few_answers_are_named(tmp_path: Path) -> None:
    """Two questions, of which one has an answer of one token, which is not measured in view."""
    contexts = [Context("task", [1, 2], [Question([3], [4]), Question([5], [6, 7])])]

    def store_with(protocol: str, num_answers: int) -> CellStore:
        store = CellStore(tmp_path / f"{protocol}-{num_answers}", {})
        store.add(Cell(CellKey("task", 0, -1, protocol, "knorm", 0.5), [1.0] * num_answers, [-0.5] * num_answers, 0.5))
        return store

    store_with("context", 2).require_contexts(contexts)
    store_with("question", 1).require_contexts(contexts)
    with pytest.raises(
        ValueError, match=r"3 answers to the 2 questions of context 0 of task \(knorm, 0.5, context first"
    ):
        store_with("context", 3).require_contexts(contexts)


def test_a_broken_last_line_is_dropped_with_a_word(tmp_path: Path) -> None:
    store = CellStore(tmp_path, {})
    store.add(CELL)
    path = tmp_path / "cells.jsonl"
    assert path.read_text() == LINE
    broken = ('{"key": {"ta', "\x00\x00\x00", "nonsense\n", "\n", LINE[:-1], LINE.replace("[1.0]", "[]"))
    for rest in (*broken, LINE.replace("[1.0]", "[NaN]")):
        path.write_text(LINE + rest)
        said: list[str] = []
        again = CellStore(tmp_path, {}, announce=said.append)
        assert list(again.cells.values()) == [CELL]
        assert len(said) == 1 and f"Dropped the last line of {path}" in said[0]
        assert path.read_text() == LINE
        CellStore(tmp_path, {}, announce=said.append)
        assert len(said) == 1


def test_a_broken_line_elsewhere_is_refused_by_its_number(tmp_path: Path) -> None:
    """Also in the file of another process."""
    CellStore(tmp_path, {})
    wrong = [("[1.0]", "[1.0, 1.0]"), ("[1.0]", '["1.0"]'), ('"held_share": 0.5', '"held_share": "half"')]
    lines = [LINE.replace(*pair) for pair in [*wrong, ('"task"', '"tusk"')]]
    for line in ("nonsense\n", "[]\n", "\n", *lines):
        for name in ("cells.jsonl", "cells.1.jsonl"):
            path = tmp_path / name
            path.write_text(LINE + line + LINE)
            with pytest.raises(ValueError, match=rf"Line 2 of .*{path.name} is no result"):
                CellStore(tmp_path, {})
            assert path.read_text() == LINE + line + LINE
            path.unlink()


def test_other_settings_are_named(tmp_path: Path) -> None:
    settings = {"model": "a", "seed": 0, "versions.torch": "1"}
    CellStore(tmp_path, settings).add(CELL)
    CellStore(tmp_path, settings)
    with pytest.raises(ValueError, match="settings: seed 0 instead of 1, versions.torch '1' instead of '3'. Choose"):
        CellStore(tmp_path, {"model": "a", "seed": 1, "versions.torch": "3"})
    with pytest.raises(ValueError, match="settings: seed 0 instead of None, length None instead of 2. Choose"):
        CellStore(tmp_path, {"model": "a", "length": 2, "versions.torch": "1"})
    for text in ("", "[]", '{"settings": 3}', '{"model": "a"}'):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match="settings.json does not hold the settings of an evaluation"):
            CellStore(tmp_path, {"model": "a"})


# What is kept.


def test_positions_are_measured_once(tmp_path: Path) -> None:
    model = successor_model()
    caches = {name: CACHES[name] for name in ("streaming", "streaming-dense", "pyramid", "snapkv")}
    context = Context("some", random_tokens(1, 40, seed=1)[0].remainder(16).tolist(), [Question([1], [2, 3])])
    evaluation = Evaluation(model, caches, [0.5])
    kept = measure_kept_positions(evaluation, context, tmp_path, ignore)
    assert [(one.task, one.cache, one.budget, one.num_tokens) for one in kept] == [
        ("some", name, 0.5, 40) for name in caches
    ]
    # Streams have room for half of the context and two more tokens: 4 sinks, and the latest of the context.
    for one in kept[:2]:
        assert one.shares == [[1.0] * 4 + [0.0] * 18 + [1.0] * 18]
    for one in kept[2:]:
        assert 0 < sum(one.shares[0]) <= 20
    lines = (tmp_path / "positions.jsonl").read_text()
    (tmp_path / "positions.jsonl").write_text(lines[:-30])
    said: list[str] = []
    assert measure_kept_positions(evaluation, context, tmp_path, said.append) == kept
    assert len(said) == 1 and (tmp_path / "positions.jsonl").read_text() == lines
    evaluation.model = None  # nothing is left to read
    assert measure_kept_positions(evaluation, context, tmp_path, ignore) == kept


def test_long_contexts_have_means_of_neighbours(tmp_path: Path) -> None:
    model = successor_model()
    context = Context("long", [1, 2] * MAX_COLUMNS, [Question([1], [2])])
    (kept,) = measure_kept_positions(
        Evaluation(model, {"streaming": CACHES["streaming"]}, [0.5]), context, tmp_path, ignore
    )
    # 513 - 256 tokens: 4 sinks, and 253 of the latest; the first of these shares a column with one that is gone.
    (shares,) = kept.shares
    assert len(shares) == MAX_COLUMNS and shares == [1.0] * 2 + [0.0] * 127 + [0.5] + [1.0] * 126


# Pictures.


def answer(cache: str, budget: float, length: int, depth: float, token_accuracy: float) -> Answer:
    return Answer(
        *(f"made-up-{length}", length, cache, budget, "context", 0, 0, (depth,), "1"),
        *(token_accuracy == 1, token_accuracy, -1.0, 0.5, 100),
    )


def test_depths_are_averaged_by_fifths(tmp_path: Path) -> None:
    answers = [
        answer(BASELINE, 1.0, 64, 0.0, 1.0),
        answer("h2o", 0.5, 64, 0.19, 1.0),
        answer("h2o", 0.5, 64, 0.0, 0.5),
        answer("h2o", 0.5, 64, 0.2, 0.25),
        answer("h2o", 0.5, 128, 0.99, 0.0),
        answer("h2o", 0.5, 128, 1.0, 1.0),
    ]
    lengths, means = score_plots.depth_means(answers)
    nan = math.nan
    assert lengths == [64, 128]
    for place, wanted in {
        (BASELINE, 1.0): [[1.0, nan], [nan, nan], [nan, nan], [nan, nan], [nan, nan]],
        ("h2o", 0.5): [[0.75, nan], [0.25, nan], [nan, nan], [nan, nan], [nan, 0.5]],
    }.items():
        torch.testing.assert_close(torch.tensor(means[place]), torch.tensor(wanted), equal_nan=True, rtol=0, atol=0)


def score_row(cache: str, budget: float, exact_match: float) -> dict[str, Any]:
    label = find_entry(cache).label
    scores = {"exact_match": exact_match, "token_accuracy": exact_match, "log_likelihood": exact_match - 2}
    row = {"task": "made-up-64", "protocol": "context", "cache": cache, "label": label, "budget": budget}
    return row | scores | {"held_share": budget + 0.01, "num_cases": 4}


def test_lines_go_through_the_scores_by_budget() -> None:
    rows = [score_row(BASELINE, 1.0, 0.9), score_row("h2o", 0.5, 0.7), score_row("h2o", 0.1, 0.2)]
    axis = Figure().subplots()
    score_plots.draw_lines(axis, rows, "held_share", "exact_match")
    full, line = axis.get_lines()
    assert list(full.get_ydata()) == [0.9, 0.9] and full.get_label() == "DynamicCache"
    assert line.get_xydata().tolist() == [[0.11, 0.2], [0.51, 0.7]] and line.get_label() == "H2OCache"


def test_no_two_caches_look_alike() -> None:
    styles = [tuple(score_plots.style_of(cache).values()) for cache in CACHES]
    assert len(set(styles)) == len(CACHES)
    # Neither without markers nor without dashes.
    assert len({(color, style) for color, style, _ in styles}) == len(CACHES)
    assert len({(color, marker) for color, _, marker in styles}) == len(CACHES)


def test_pictures_say_nothing_of_when_they_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [score_row(cache, budget, budget) for cache in CACHES for budget in (0.5, 0.1)]
    rows.insert(0, score_row(BASELINE, 1.0, 0.9))
    answers = [answer("h2o", 0.5, length, length / 200, 1.0) for length in (64, 128)]
    first = score_plots.draw_all(rows, answers, [])
    assert [plot.name for plot in first] == ["score-made-up-64-context", "depth-made-up-context"]
    # Settings of the user's matplotlib change nothing.
    monkeypatch.setitem(score_plots.matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(score_plots.matplotlib.rcParams, "font.size", 20)
    assert score_plots.draw_all(rows, answers, []) == first
    assert score_plots.matplotlib.rcParams["font.size"] == 20
    # No time and no texts.
    assert not [plot.name for plot in first for kind in (b"tIME", b"tEXt", b"iTXt", b"zTXt") if kind in plot.png]


@pytest.mark.filterwarnings("error")
def test_few_maps_have_room() -> None:
    """With places of answers and without any, and of a model of one layer."""
    for names, budgets in ((["h2o"], [0.5]), (list(CACHES)[:2], [0.5]), (["h2o"], [0.5, 0.2, 0.1])):
        places = [(name, budget) for name in names for budget in budgets]
        kept = [KeptPositions("made-up-64", *place, 64, [[1.0] * 64]) for place in places]
        answers = [answer(*place, 64, 0.5, 1.0) for place in places]
        pictures = {score_plots.draw_positions(kept, answers), score_plots.draw_positions(kept, [])}
        assert len(pictures | {score_plots.draw_depths(answers)}) == 3


# The page.


class Page(HTMLParser):
    """Parses strictly: elements are closed in order, and nothing is fetched."""

    VOID = {"meta", "img", "wbr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.num_tags: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert len(values) == len(attributes)
        self.num_tags[tag] = self.num_tags.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("link", "iframe", "base", "object", "embed")
        assert not any(name.startswith("on") or name == "style" for name in values)
        if tag == "img":
            assert values["alt"]
            kind, data = values["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(data, validate=True))
        else:
            assert "src" not in values
        if "id" in values:
            self.ids.append(values["id"])
        if "href" in values:
            assert values["href"].startswith("#")
            self.links.append(values["href"][1:])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self.open and self.open[-1] in ("td", "th", "button"):
            self.rows[-1][-1] += data
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data


def test_the_page_has_tables_and_pictures_in_it(hand_folder: Path) -> None:
    record = json.loads((hand_folder / "results.json").read_text())
    text = (hand_folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    parsed = Page(text)
    assert (
        parsed.num_tags["h1"] == parsed.num_tags["script"] == parsed.num_tags["style"] == parsed.num_tags["title"] == 1
    )
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert parsed.links == parsed.ids and len(set(parsed.ids)) == len(parsed.ids) == 5
    pictures = {path.name: path.read_bytes() for path in (hand_folder / "plots").iterdir()}
    assert sorted(pictures) == [
        "depth-successors-context.png",
        "positions-successors.png",
        "score-successors-context.png",
        "score-successors-question.png",
    ]
    assert sorted(parsed.images) == sorted(pictures.values())
    for row in record["rows"]:
        figures = [f"{row[name]:.2f}" for name in ("exact_match", "token_accuracy", "log_likelihood", "held_share")]
        assert [row["label"], f"{row['budget']:g}", *figures, str(row["num_cases"])] in parsed.rows
    assert ["torch", "some"] in parsed.rows and ["model", "successors"] in parsed.rows


def test_names_in_the_page_are_text() -> None:
    evil = '<script>alert("&")</script>\'"'
    row = score_row(BASELINE, 1.0, 0.5) | {"task": evil, "label": evil, "protocol": evil}
    settings = {"model": evil, "dtype": evil, "device": evil, evil: evil}
    record = {"rows": [row], "settings": settings, "command": evil, "machine": {"processor": evil}}
    record["versions"] = {evil: evil}
    text = page(record, [score_plots.Plot("a", evil, evil, b"")])
    assert Page(text).num_tags["script"] == 1 and "alert(" in text and 'alert("' not in text


def test_page_shows_what_a_task_is_measured_by() -> None:
    """Perplexities alone, and a column for turns."""
    common = score_row(BASELINE, 1.0, 0.38)
    rows = [
        common | {"task": "perplexity-64", "perplexity": 33.31},
        common | {"task": "turns-2-64", "token_accuracy_by_turn": [0.0, 0.25]},
    ]
    text = page(record_of(rows), [])
    first, second = text.split("<h2")[1:3]
    assert "33.31" in first and "0.38" not in first and "exact match" not in first
    assert "0.38" in second and "<td>0.00 0.25</td>" in second
    assert "the token accuracy of each turn is in a column of its own" in text
    assert "perplexity is shown instead" in text
    pictures = [score_plots.draw_scores([row, row | {"cache": "knorm", "budget": 0.5}]) for row in rows]
    heights = [struct.unpack(">I", png[20:24])[0] for png in pictures]
    assert heights[0] < heights[1]  # one panel above the other, and one alone


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """Pictures that a report has no results for, and what was half written; not what others have put there."""
    CellStore(tmp_path, {"model": "a"})
    (tmp_path / "plots").mkdir()
    own = ["score-old-context.png", "depth-old.png", "positions-old.png", "score-old.png.0123456789abcdef.tmp"]
    other = ["mine.png", "notes.tmp", "score-notes.txt"]
    for name in own + other:
        (tmp_path / "plots" / name).write_bytes(b"")
    (tmp_path / "report.md.0123456789abcdef.tmp").write_bytes(b"")
    ResultFolder(tmp_path, ignore).write(record_of([]))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(other)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        [*REPORTS, "results.json", "settings.json"]
    )
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["settings"] == {"model": "a"} and settings["run"]["command"] == "none"


# Killed.


REPORTS = ("answers.csv", "report.html", "report.md")
KILLED = ["eval", "--tasks", "recall-64,recall-66", "--caches", "knorm,streaming,shadow", "--budgets", "0.5,0.2"]
KILLED += ["--threads", "1"]


def reports_in(folder: Path) -> dict[str, bytes]:
    """What two runs of the same command must not differ in."""
    names = [*REPORTS, *(f"plots/{path.name}" for path in sorted((folder / "plots").iterdir()))]
    return {name: (folder / name).read_bytes() for name in names}


def wait_for(is_met: Any, process: Any) -> None:
    """Waits until something is the case, or the process is done."""
    stop = time.monotonic() + 120
    while not is_met() and process.is_alive():
        assert time.monotonic() < stop
        time.sleep(0.0005)


def moments(num_cells: int, generator: random.Random) -> Iterator[tuple[int, float]]:
    """Twenty moments to kill at: after how many cells, and how many seconds later."""
    counts = sorted(generator.sample(range(1, num_cells), 12))
    yield from ((count, generator.uniform(0, 0.01)) for count in counts)
    # All is measured: what is left is to look at what is kept of an example, and to draw and write reports.
    yield from ((num_cells, generator.uniform(0, 2.5)) for _ in range(8))


@pytest.mark.slow
def test_an_evaluation_that_is_killed_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """Killed at twenty moments and started again, it leaves behind what it leaves if it is not, byte for byte."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pyramid_cache.lab.cli", "pyramid_cache.lab.evaluation.folder", "transformers.models.llama"]
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder: Path) -> Any:
        process = context.Process(target=main, args=([*KILLED, "--out", str(folder)],))
        process.start()
        return process

    def num_lines() -> int:
        return (killed / "cells.jsonl").read_bytes().count(b"\n") if (killed / "cells.jsonl").exists() else 0

    uninterrupted = start(whole)
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    num_cells = len((whole / "cells.jsonl").read_text().splitlines())
    num_killed, seen = 0, b""
    for count, seconds in moments(num_cells, random.Random(7)):
        process = start(killed)
        wait_for(lambda: num_lines() >= count, process)  # noqa: B023
        process.join(seconds)
        num_killed += process.is_alive()
        process.kill()
        process.join()
        content = (killed / "cells.jsonl").read_bytes()
        assert content.startswith(seen)  # nothing is lost
        seen = content[: content.rfind(b"\n") + 1]
    assert num_killed >= 15
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    keys = [json.dumps(json.loads(line)["key"]) for line in (killed / "cells.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == num_cells  # nothing is repeated
    kept = (killed / "positions.jsonl").read_text()
    assert kept == (whole / "positions.jsonl").read_text() and len(kept.splitlines()) == 3 * 2
    assert reports_in(killed) == reports_in(whole)
    assert {path.name for path in killed.rglob("*")} == {path.name for path in whole.rglob("*")}
    records = [json.loads((folder / "results.json").read_text()) for folder in (killed, whole)]
    assert records[0]["rows"] == records[1]["rows"]
