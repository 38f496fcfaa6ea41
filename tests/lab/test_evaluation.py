"""
The evaluation: its cases, one reading for many caches, scores against slow loops, and what is certain about results.
"""

import copy
import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from caches import CACHE_CASES, CacheCase, parametrize_cases
from models import build_model, random_tokens, tiny_model
from modes import tiny_tokenizer
from packaging import version
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.cells import Cell, CellStore
from pyramid_cache.lab.evaluation.evaluator import Evaluation, Result
from pyramid_cache.lab.evaluation.reading import Reader, replay
from pyramid_cache.lab.evaluation.recall import load_recall_model
from pyramid_cache.lab.evaluation.tasks import Context, Question, build_contexts, parse_task
from pyramid_cache.lab.profile.activations import measure_text
from pyramid_cache.lab.registry import BASELINE, CACHES, Workload, find_entry
from pyramid_cache.lab.timed_generation import generate
from pyramid_cache.lab.weights import no_progress


# Those that read a prompt with full attention.
DENSE_CASES = [case for case in CACHE_CASES if not case.from_model]


@parametrize_cases(DENSE_CASES)
@torch.no_grad()
def test_a_reading_gives_what_the_cache_would_have_read(case: CacheCase) -> None:
    """A context alone, and with a question behind it; the reading serves a second cache as well as a first."""
    model, tokens = tiny_model("llama"), random_tokens(1, 60, seed=3)
    reader = Reader(model, tokens[:, :33])
    for reading, length in ((reader.context, 33), (reader.with_question(tokens[:, 33:40]), 40)):
        assert reading.num_tokens == length
        own = case.build(model)
        first_logits = model(tokens[:, :length], past_key_values=own).logits[:, -1]
        torch.testing.assert_close(reading.logits, first_logits, atol=1e-4, rtol=0)
        wanted = model(tokens[:, length:], past_key_values=copy.deepcopy(own)).logits
        for _ in range(2):
            filled = case.build(model)
            replay(filled, reading)
            assert filled.get_seq_length() == length
            assert filled.num_kept_tokens() == own.num_kept_tokens()
            assert own.num_kept_tokens() < [length] * len(own.layers) or not case.has_budget
            for layer in range(len(own.layers)):
                held, wanted_held = (cache.positions(layer).sort(dim=-1).values for cache in (filled, own))
                assert torch.equal(held, wanted_held)
            logits = model(tokens[:, length:], past_key_values=filled).logits
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_models_whose_reading_cannot_be_shared_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="other kinds than full attention"):
        Reader(tiny_model("gemma3"), random_tokens(1, 10))
    with pytest.raises(NotImplementedError, match="'dynamic' scaling"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        Reader(build_model("llama", rope_parameters=rope), random_tokens(1, 10))


def said(model: PreTrainedModel, cache: Cache, prompt: list[int], num_tokens: int) -> list[int]:
    """What greedy decoding says behind a prompt of which the cache has read none or some."""
    output = model.generate(
        torch.tensor([prompt]), past_key_values=cache, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def slow_scores(
    model: PreTrainedModel, cache: Cache, prompt: list[int], thread: list[list[int]], by_step: bool
) -> list[tuple[bool, float]]:
    """
    Whether greedy decoding says each answer of a thread, which has questions and answers in turn, and the mean
    log-probability of its tokens: each token on a copy of the cache that reads all before it anew.
    """

    def read(asked: Cache, pieces: list[list[int]], logits: torch.Tensor | None) -> torch.Tensor:
        for piece in filter(None, pieces):
            logits = model(torch.tensor([piece]), past_key_values=asked).logits[0, -1].log_softmax(dim=-1)
        return logits

    logits, carried, found = read(cache, [prompt], None), [], []
    for question, answer in zip(thread[::2], thread[1::2], strict=True):
        new, is_said, total = carried + question, True, 0.0
        for index, token_id in enumerate(answer):
            before = [[token] for token in answer[:index]]
            pieces = [new, *before] if by_step else [new + answer[:index]]
            last = copy.deepcopy(cache)
            likely = read(last, pieces, logits)
            is_said, total = is_said and int(likely.argmax()) == token_id, total + likely[token_id].item()
        found.append((is_said, total / len(answer)))
        cache, carried = last, answer[-1:]
    return found


@pytest.mark.parametrize("name", [BASELINE, "snapkv", "pyramid", "shadow", "streaming"])
def test_scores_are_those_of_generate_and_of_a_slow_loop(name: str) -> None:
    """Questions on their own and turns, in both protocols: answers of the cache, of the full one, and wrong ones."""
    model, context = tiny_model("llama"), random_tokens(1, 48, seed=5)[0].tolist()
    caches = {} if name == BASELINE else {name: CACHES[name]}
    for is_conversation in (False, True):

        def build(num_tokens: int) -> Cache:
            if name == BASELINE:
                return DynamicCache(config=model.config)
            return CACHES[name].build(model, 0.5, Workload(num_tokens))

        history, questions = list(context), []
        for index, length in enumerate((6, 9, 5)):
            ids = random_tokens(1, length, seed=10 + index)[0].tolist()
            answer = said(model, DynamicCache(config=model.config) if index else build(54), history + ids, 4)
            answer[2] = (answer[2] + (index == 1)) % model.config.vocab_size
            questions.append(Question(ids, answer))
            history += ids + answer if is_conversation else []
        made, store = Context("made-up", context, questions, is_conversation), CellStore()
        results = Evaluation(model, caches, [0.5], store=store).run([made], no_progress)
        found = {result.protocol: result for result in results if result.cache == name}
        assert found["question"].scores[0].is_exact and not found["question"].scores[1].is_exact
        assert {result.num_turns for result in results} == {3 if is_conversation else 1}
        for protocol, result in found.items():
            wanted = []
            for thread in made.threads:
                pieces = [piece for question in thread for piece in (question.ids, question.answer)]
                prompt = context
                if protocol == "question":
                    prompt, pieces = context + pieces[0], [[], *pieces[1:]]
                wanted += slow_scores(model, build(len(prompt)), prompt, pieces, by_step=name == "shadow")
            assert [score.is_exact for score in result.scores] == [is_said for is_said, _ in wanted]
            likely = [score.log_likelihood for score in result.scores]
            assert likely == pytest.approx([figure for _, figure in wanted], abs=1e-4)
            is_alone = protocol == "question" and not is_conversation
            assert len(result.held_shares) == (3 if is_alone else 1)


def test_a_window_forgets_what_is_out_of_it_and_all_of_a_budget_nothing() -> None:
    """All that a window of 44 tokens can answer are questions about the last 22 pairs."""
    model, contexts = load_recall_model(), build_contexts(parse_task("recall-448"), samples=2)
    results = {}
    for names, budgets in (["streaming"], [0.5, 0.1]), (["h2o", "snapkv"], [1.0]):
        found = Evaluation(model, {name: CACHES[name] for name in names}, budgets).run(contexts, no_progress)
        results |= {(result.cache, result.budget): result for result in found}
        assert {result.protocol for result in found} == {"context"}  # answers of one token follow from a full reading
    right = {place: sum(score.is_exact for score in result.scores) for place, result in results.items()}
    full = results[BASELINE, 1.0]
    assert len(full.scores) == 128 and right[BASELINE, 1.0] > 0.95 * 128
    asked = []
    for context in contexts:
        values = dict(zip(context.ids[::2], context.ids[1::2], strict=True))
        assert all([values[question.ids[0]]] == question.answer for question in context.questions)
        asked += [context.ids.index(question.ids[0]) for question in context.questions]
    assert right["streaming", 0.1] < right["streaming", 0.5] < right[BASELINE, 1.0]
    scores = zip(asked, results["streaming", 0.1].scores, strict=True)
    forgotten = [score.is_exact for place, score in scores if 4 <= place < 404]
    assert len(forgotten) > 80 and sum(forgotten) / len(forgotten) < 0.1
    assert sum(results["streaming", 0.1].held_shares) / 2 < 0.12
    wanted = [score.log_likelihood for score in full.scores]
    for name in ("h2o", "snapkv"):
        assert [score.log_likelihood for score in results[name, 1.0].scores] == pytest.approx(wanted, abs=1e-4)


def record_of(arguments: list[str], path: Path) -> dict[str, Any]:
    num_threads = torch.get_num_threads()
    assert main([*arguments, "--json", str(path)]) == 0
    torch.set_num_threads(num_threads)
    return json.loads(path.read_text())


def rows_of(arguments: list[str], path: Path) -> list[dict[str, Any]]:
    return record_of(arguments, path)["rows"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With tasks by lengths, a cache by its class, and in batches."""
    path = tmp_path / "results.json"
    arguments = ["evaluate", "--tasks", "recall,recall-32", "--lengths", "64,66", "--caches", "SnapKVCache,streaming"]
    record = record_of([*arguments, "--budgets", "0.25,0.5", "--samples", "1", "--seed", "3"], path)
    printed = capsys.readouterr().out
    settings = [(BASELINE, 1.0), *((name, budget) for name in ("snapkv", "streaming") for budget in (0.5, 0.25))]
    assert [(row["task"], row["cache"], row["budget"]) for row in record["rows"]] == [
        (task, *setting) for task in ("recall-64", "recall-66", "recall-32") for setting in settings
    ]
    for row in record["rows"]:
        cases = row["cases"]
        assert row["num_cases"] == len(cases["token_accuracy"]) == len(cases["log_likelihood"])
        assert row["exact_match"] == pytest.approx(cases["token_accuracy"].count(1) / row["num_cases"])
        assert row["label"] in printed and f"{row['exact_match']:.2f}" in printed
    assert record["settings"]["recall_model"] == "recall model" and record["settings"]["seed"] == 3
    assert {"processor", "torch_threads", "load_average_after"} <= set(record["machine"])
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    # The command that is noted measures the same.
    assert record["command"].startswith("pyramid-cache eval --caches snapkv,streaming ")
    noted = record["command"].split()[1:]
    assert rows_of(noted, path) == record["rows"]
    batched = record_of([*noted, "--samples", "3", "--batch-size", "3"], path)
    assert "--batch-size 3" in batched["command"]
    for together, alone in zip(batched["rows"], rows_of([*noted, "--samples", "3"], path), strict=True):
        assert together["cases"]["token_accuracy"] == alone["cases"]["token_accuracy"]
        assert together["cases"]["log_likelihood"] == pytest.approx(alone["cases"]["log_likelihood"], abs=1e-3)


INTERRUPTED = 130
RESUMED = ["eval", "--tasks", "recall-64", "--caches", "knorm,streaming", "--budgets", "0.5", "--samples", "2"]


def test_a_stopped_evaluation_loses_nothing_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped behind each cell and in a line, it ends with the very figures of a run without a folder."""
    wanted = rows_of(RESUMED, tmp_path / "wanted.json")
    folder, cells = tmp_path / "answers", tmp_path / "answers" / "cells.jsonl"
    add, num_added = CellStore.add, 0

    def add_and_stop(store: CellStore, cell: Cell) -> None:
        nonlocal num_added
        add(store, cell)
        num_added += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(CellStore, "add", add_and_stop)
    for stop in range(1, 7):  # the full cache and two others on two contexts
        assert main([*RESUMED, "--out", str(folder)]) == INTERRUPTED
        assert num_added == stop == len(cells.read_text().splitlines())
    whole = cells.read_text()
    cells.write_text(whole[:-20])
    assert main([*RESUMED, "--out", str(folder)]) == INTERRUPTED
    assert f"Dropped the last line of {cells}" in capsys.readouterr().err.replace("\n", "")
    assert cells.read_text() == whole
    monkeypatch.setattr("pyramid_cache.lab.evaluation.evaluator.Reader", None)  # nothing is left to ask
    assert rows_of([*RESUMED, "--out", str(folder)], tmp_path / "found.json") == wanted
    monkeypatch.setattr(Reader, "__init__", None)  # nor to look at
    assert rows_of([*RESUMED, "--out", str(folder)], tmp_path / "found.json") == wanted
    assert json.loads((folder / "results.json").read_text())["rows"] == wanted
    # Results are those of what is asked for; what else the folder has waits until it is asked for again.
    few = rows_of([*RESUMED, "--caches", "knorm", "--out", str(folder)], tmp_path / "few.json")
    assert few == [row for row in wanted if row["cache"] != "streaming"]
    for other in (["--seed", "1"], ["--dtype", "bfloat16"]):
        assert main([*RESUMED, "--out", str(folder), *other]) == 2
        assert f"other settings: {other[0][2:]} " in capsys.readouterr().err.splitlines()[-1]
    exact, report = ([f"{row['exact_match']:.2f} / " for row in few], (folder / "report.md").read_text())
    assert f"DynamicCache: {exact[0]}" in report and f"| KnormCache | {exact[1]}" in report


def test_processes_share_an_evaluation(tmp_path: Path) -> None:
    """Two, in the environment that `torchrun` gives, with a thread each: what one leaves, byte for byte."""
    arguments = ["eval", "--tasks", "recall-64,recall-66", "--caches", "knorm,streaming", "--samples", "3"]
    arguments += ["--budgets", "0.5", "--device", "cpu", "--threads", "1"]
    wanted = rows_of([*arguments, "--out", str(tmp_path / "one")], tmp_path / "wanted.json")
    found, folder, logs = tmp_path / "found.json", tmp_path / "two", [tmp_path / "log.0", tmp_path / "log.1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "pyramid_cache.lab.cli", *arguments, "--out", str(folder), "--json", str(found)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=300) for process in processes]
    output = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], output
    assert output.count("Exact match") == 1  # one of them reports
    assert [len((folder / name).read_text().splitlines()) for name in ("cells.jsonl", "cells.1.jsonl")] == [9, 9]
    record = json.loads(found.read_text())
    assert record["machine"]["processes"] == 2
    assert record["rows"] == wanted
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".csv", ".html", ".md", ".png")]
    assert len(names) == 7  # answers, two reports, and four pictures
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def run_with_torchrun(num_processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += ["-m", "pyramid_cache.lab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.24"), reason="knows no copies of ranks")
def test_models_of_two_ranks_share_an_evaluation(model_folder: Path, tmp_path: Path) -> None:
    """Four processes are two models. Each has half of the contexts, and what it finds is what one process finds."""
    arguments = [
        "eval",
        "--model",
        str(model_folder),
        "--tasks",
        "passkey-300,recall-64",
        "--caches",
        "adakv,tova,knorm",
    ]
    arguments += ["--samples", "3", "--budgets", "0.25", "--device", "cpu", "--threads", "1"]
    wanted, found, folder = rows_of(arguments, tmp_path / "one.json"), tmp_path / "four.json", tmp_path / "four"
    shared = [*arguments, "--tensor-parallel", "2", "--out", str(folder), "--json", str(found)]
    for _ in range(2):  # the second time there is nothing left to measure
        run = run_with_torchrun(4, shared)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("Exact match") == 1
        for row, expected in zip(json.loads(found.read_text())["rows"], wanted, strict=True):
            for name, numbers in row.pop("cases").items():
                assert numbers == pytest.approx(expected["cases"][name], abs=2e-4)
            for name, numbers in row.items():
                # Each rank has the positions of tokens that heads share.
                tolerance = 0.02 if "held" in name else 2e-4
                assert numbers == pytest.approx(expected[name], abs=tolerance), (row, name)
    names = sorted(path.name for path in folder.glob("cells*"))
    assert names == ["cells.2.jsonl", "cells.jsonl"]  # of the first rank of each model
    assert sum(len((folder / name).read_text().splitlines()) for name in names) == 36
    run = run_with_torchrun(3, shared)
    assert run.returncode != 0 and "--tensor-parallel 2 does not divide the 3 processes" in run.stderr


def test_measurements_do_not_warn_of_what_their_users_never_wrote() -> None:
    """What an evaluation reads, asks and answers itself, what a profile reads, and what the demo generates."""
    model, prompt, later = tiny_model("llama"), random_tokens(2, 40, seed=70), random_tokens(2, 3, seed=71)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`past_key_values`", FutureWarning)
        generate(model, prompt, DynamicCache(config=model.config), 2)
        measure_text(model, tiny_tokenizer(), prompt[:1], window_size=8)
        context = Context("made-up", prompt[0].tolist(), [Question(later[0].tolist(), later[1].tolist())])
        caches = {name: CACHES[name] for name in ("snapkv", "streaming")}
        results = Evaluation(model, caches, [0.5]).run([context], no_progress)
    assert {result.cache for result in results} == {"dynamic", "snapkv", "streaming"}


LENGTHS = (43, 57, 50, 57)
# A cache of each kind of reading; all others are slow.
QUICK = ("snapkv", "pyramid", "streaming")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CACHES]


@cache
def contexts_of(kind: str) -> list[Context]:
    """Contexts whose questions have right answers, wrong ones, and several lengths."""
    model = tiny_model("llama")
    contexts = []
    for index, length in enumerate(LENGTHS):
        ids = random_tokens(1, length, seed=30 + index)[0].tolist()
        questions: list[Question] = []
        for number, num_asked in enumerate((6, 4 + index % 2, 6)):
            asked = random_tokens(1, num_asked, seed=100 + 10 * index + number)[0].tolist()
            before = sum((question.ids + question.answer for question in questions), []) if kind == "turns" else []
            answer = said(model, DynamicCache(config=model.config), ids + before + asked, 5 - number % 2)
            answer[2] = (answer[2] + (number == 1)) % model.config.vocab_size
            questions.append(Question(asked, answer, [[0, 2], [2, len(answer)]] if number == 2 else []))
        # The last one has fewer.
        contexts.append(Context("made-up", ids, questions[: 3 if index < 3 else 2], kind == "turns"))
    return contexts


def evaluate(contexts: list[Context], batch_size: int, names: list[str]) -> dict[tuple, list]:
    caches = {name: CACHES[name] for name in names}
    evaluation = Evaluation(tiny_model("llama"), caches, [0.4], batch_size=batch_size)
    results = evaluation.run(contexts, no_progress)
    return {(result.protocol, result.cache, result.budget): result for result in results}


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="earlier ones need a package, which builds a kernel first"
)
def test_a_cache_of_transformers_and_one_without_a_budget_answer_each_question_behind_the_context_alone() -> None:
    model, names = tiny_model("llama"), ("quantized:backend=fp8", "kivi:residual_length=8")
    caches = {name: find_entry(name) for name in names}
    (context, *_), protocols = contexts_of("questions"), ["context"]

    def answers(context: Context) -> dict[str, Result]:
        found = Evaluation(model, caches, [0.5, 0.4], protocols).run([context], no_progress)
        assert [(result.cache, result.budget) for result in found] == [(name, 1.0) for name in (BASELINE, *names)]
        return {result.cache: result for result in found}

    together = answers(context)
    for number, question in enumerate(context.questions):
        alone = answers(replace(context, questions=[question]))
        for name in names:
            assert together[name].scores[number].log_likelihood == pytest.approx(
                alone[name].scores[0].log_likelihood, abs=1e-3
            )
    # A byte for each number of four, and a scale for the keys and the values of a layer.
    assert 0.25 < together[names[0]].held_shares[0] < 0.26


@pytest.mark.parametrize("kind", ["questions", "turns"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_give_what_contexts_give_alone(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)  # for caches that read a context again, behind an instruction
    monkeypatch.setattr(tiny_model("llama").config, "_name_or_path", str(tmp_path))
    contexts = contexts_of(kind)
    alone, together = evaluate(contexts, 1, [name]), evaluate(contexts, 3, [name])
    assert set(alone) == set(together) and len(alone) == 4
    for setting, result in alone.items():
        pairs = list(zip(together[setting].scores, result.scores, strict=True))
        assert len(pairs) == 11 and all(found.token_accuracy == one.token_accuracy for found, one in pairs)
        assert [found.log_likelihood for found, _ in pairs] == pytest.approx(
            [one.log_likelihood for _, one in pairs], abs=1e-3
        )
        # Padding takes some room.
        assert together[setting].held_shares == pytest.approx(result.held_shares, abs=0.15)
    full = [score.is_exact for score in together["context", BASELINE, 1.0].scores]
    assert any(full) and not all(full)
