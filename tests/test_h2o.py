"""
H2OCache on attention so simple that the kept tokens can be worked out by hand, and the ops of a step.
test_properties.py compares it with a loop-written H2O.
"""

import contextlib

import pytest
import torch
from models import build_model, drive, random_rows, random_tokens
from synthetic import SyntheticModel
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_cache import H2OCache
from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.selection import lowest_token


def test_equal_scores_by_hand() -> None:
    """Even attention makes the oldest heavy hitters. If one token gets all of it, of equals the older goes first."""
    model = SyntheticModel(1, 2, 2, 4)
    for magnitude, heavy in ((0.0, [0, 1, 2, 3]), (1e4, [0, 13, 14, 15])):
        cache = H2OCache(model.config, budget=8, heavy_ratio=0.5)
        key = torch.zeros(1, 2, 22, 4)
        key[:, :, 0] = magnitude
        for piece in key.split([20, 1, 1], dim=2):
            query = torch.ones(1, 4, piece.shape[2], 4)
            model.run_layer(cache, 0, query, piece, torch.ones_like(piece), None)
            newest = cache.get_seq_length() - 1
            first = 0 if magnitude == 0 else newest - 19
            wanted = [0, *(token + first for token in heavy[1:]), *range(newest - 3, newest + 1)]
            assert [sorted({*head} - {-1}) for head in cache.positions(0)[0].tolist()] == [wanted] * 2


@torch.no_grad()
def test_rows_that_may_hold_different_numbers_are_as_alone() -> None:
    """The one that holds fewer tokens always has empty slots."""
    model, rows, later = build_model("llama"), random_rows((23, 40)), random_tokens(2, 20, seed=3)

    def run(chosen: slice) -> torch.Tensor:
        return drive(model, H2OCache(model.config, budget=0.5), rows[chosen], later[chosen]).logits

    alone = torch.cat([run(slice(row, row + 1)) for row in range(2)])
    torch.testing.assert_close(run(slice(2)), alone, atol=1e-4, rtol=0)


class Dispatched(TorchDispatchMode):
    """Writes down the ops that run, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_decode_step_asks_for_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the projections of a full layer, whatever it holds: one softmax, and as many small ones."""
    counts = []
    for budget in (12, 28):
        model, dispatched = build_model("llama"), Dispatched()
        cache = H2OCache(model.config, budget=budget)
        with torch.no_grad(), monkeypatch.context() as patch:
            for tokens in (random_tokens(2, 30), *random_tokens(3, 2, 1)):
                model(tokens, past_key_values=cache)
            for name in ("update_known", "attend"):
                run = getattr(EvictingLayer, name)

                def watched(layer, *args, run=run, dispatched=dispatched, **kwargs):
                    # The first layer also looks at the position ids, for all of them.
                    with dispatched if layer.place.layer_idx == 1 else contextlib.nullcontext():
                        return run(layer, *args, **kwargs)

                patch.setattr(EvictingLayer, name, watched)
            model(random_tokens(2, 1), past_key_values=cache)
        assert dispatched.names.count("aten::_softmax") == 1
        counts.append(len(dispatched.names))
    assert counts[0] == counts[1] <= 20, dispatched.names


NAN, INFINITY = float("nan"), float("inf")
# Scores of five slots, their positions (-1: empty), and the slot whose token goes. From position 97 on tokens are
# recent.
VICTIMS = [
    ("of equals the oldest", [3, 2, 2, 5, 9], [4, 9, 7, 1, 2], 2),
    ("zeros of both signs are equal", [0.0, -0.0, 1, 1, 1], [8, 9, 1, 2, 3], 0),
    ("minus infinity", [INFINITY, 4, -INFINITY, 2, 1], [1, 2, 3, 4, 5], 2),
    ("plus infinity", [INFINITY] * 5, [5, 4, 3, 2, 1], 4),
    ("one is not a number", [3, 2, NAN, 5, 1], [4, 9, 7, 1, 2], 2),
    ("a recent one is not a number", [3, 2, NAN, 5, 1], [4, 9, 98, 1, 2], 4),
    ("an empty one is not a number", [3, 2, NAN, 5, 1], [4, 9, -1, 1, 2], 4),
    ("neither empty nor recent", [-3, 2, -9, 5, 1], [-1, 9, 99, 1, 2], 4),
]


@pytest.mark.parametrize("name, scores, held, victim", VICTIMS, ids=[name for name, *_ in VICTIMS])
def test_victims_by_hand(name: str, scores: list[float], held: list[int], victim: int) -> None:
    positions = torch.tensor([[held]])
    is_protected = (positions < 0) | (positions >= 97)
    priority = torch.tensor([[scores]], dtype=torch.float32).masked_fill(is_protected, INFINITY)
    slots = lowest_token(priority, positions)
    assert slots.item() == victim
