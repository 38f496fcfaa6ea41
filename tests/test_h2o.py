"""
H2OCache on attention so simple that the kept tokens can be worked out by hand, and the ops of a step.
test_properties.py compares it with a loop-written H2O.
"""

import contextlib

import pytest
import torch
from models import build_model, random_tokens
from synthetic import SyntheticModel
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_cache import H2OCache
from pyramid_cache.caches.h2o import H2OLayer


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


class Dispatched(TorchDispatchMode):
    """Writes down the ops that run, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_decode_step_is_attention_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the projections of a full layer: one op, and the count of what was seen."""
    model, dispatched = build_model("llama"), Dispatched()
    cache = H2OCache(model.config, budget=12)
    with torch.no_grad():
        for tokens in (random_tokens(2, 30), *random_tokens(3, 2, 1)):
            model(tokens, past_key_values=cache)
        for name in ("update", "attend"):
            run = getattr(H2OLayer, name)

            def watched(layer, *args, run=run, **kwargs):
                # The first layer also looks at the position ids, for all of them.
                with dispatched if layer.place.layer_idx == 1 else contextlib.nullcontext():
                    return run(layer, *args, **kwargs)

            monkeypatch.setattr(H2OLayer, name, watched)
        model(random_tokens(2, 1), past_key_values=cache)
    assert dispatched.names == ["aten::add_.Tensor", "pyramid_cache::decode_attention_and_evict"]
