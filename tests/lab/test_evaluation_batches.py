"""Contexts of several lengths, read in a batch with padding on the left, give what each gives alone."""

from functools import cache

import pytest
import torch
from models import random_tokens, tiny_model
from test_evaluation import said
from transformers import DynamicCache

from pyramid_cache.lab.evaluation.cells import CellStore
from pyramid_cache.lab.evaluation.evaluator import Evaluation, batches_of
from pyramid_cache.lab.evaluation.reading import pad_left, padding_arguments
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.registry import BASELINE, CACHES
from pyramid_cache.lab.weights import no_progress


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


@pytest.mark.parametrize("kind", ["questions", "turns"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_give_what_contexts_give_alone(name: str, kind: str) -> None:
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


@pytest.mark.parametrize("name", ["knorm", "streaming"])
def test_contexts_are_read_together(name: str) -> None:
    """Four are one batch of three and one of one; a cache that takes no batches reads each for itself."""
    contexts = contexts_of("questions")
    model, read = tiny_model("llama"), []
    handle = model.register_forward_pre_hook(lambda module, arguments: read.append(tuple(arguments[0].shape)))
    try:
        Evaluation(model, {name: CACHES[name]}, [0.4], ["context"], batch_size=3).run(contexts, no_progress)
    finally:
        handle.remove()
    prompts = [shape for shape in read if shape[1] >= min(LENGTHS)]
    wanted = [(3, 57), (1, 57)]
    if name == "streaming":  # its own readings, and three of the full cache, which its size is compared with
        wanted += [(1, length) for length in (*LENGTHS, *LENGTHS[:3])]
    assert sorted(prompts) == sorted(wanted)


def test_padding_by_hand() -> None:
    ids, padding = pad_left([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and padding.tolist() == [0, 2]
    assert pad_left([[5, 6], [7, 8]], torch.device("cpu"))[1] is None and padding_arguments(None, 3, 1) == {}
    arguments = padding_arguments(padding, 3, 2)
    assert arguments["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert arguments["position_ids"].tolist() == [[3, 4], [1, 2]]
    assert padding_arguments(padding, 0, 3)["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_batches_are_of_one_task() -> None:
    places = [(index, Context(task, [1], [])) for task, num in (("a", 5), ("b", 1)) for index in range(num)]
    found = [[(context.task, index) for index, context in batch] for batch in batches_of(places, 2)]
    assert found == [[("a", 0), ("a", 1)], [("a", 2), ("a", 3)], [("a", 4)], [("b", 0)]]


def test_what_is_known_of_a_batch_is_not_measured_again() -> None:
    contexts = contexts_of("questions")
    store = CellStore()
    evaluation = Evaluation(tiny_model("llama"), {"knorm": CACHES["knorm"]}, [0.5], store=store, batch_size=4)
    evaluation.run(contexts[:1], no_progress)
    first = dict(store.cells)
    evaluation.run(contexts, no_progress)
    assert all(store.cells[key] is cell for key, cell in first.items())
    whole = Evaluation(tiny_model("llama"), {"knorm": CACHES["knorm"]}, [0.5])
    whole.run(contexts, no_progress)
    assert set(store.cells) == set(whole.store.cells) > set(first)
