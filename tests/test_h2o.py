"""H2OCache against the loop-written H2O, and on attention so simple that the kept tokens can be worked out by hand."""

import contextlib

import pytest
import torch
from models import FAMILIES, build_model, drive, random_rows, random_tokens, tiny_model
from reference import H2OPolicy, compare_with_policies
from synthetic import SyntheticModel
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_cache import H2OCache
from pyramid_cache.caches.h2o import H2OLayer
from pyramid_cache.ops import cpu


@pytest.mark.parametrize("family", FAMILIES)
def test_held_positions_and_logits(family: str) -> None:
    """Padded rows, each with its share."""
    model, lengths = tiny_model(family), (23, 37, 30)
    rows = random_rows(lengths, seed=3)
    trace = drive(model, H2OCache(model.config, budget=0.3), rows, random_tokens(3, 25, seed=4))
    compare_with_policies(model, trace, rows, [H2OPolicy(length, int(0.3 * length)) for length in lengths])


def test_settings_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of heavy hitters, odd budgets, prompts around a budget, and prompts of more than one tile of scores."""
    model = tiny_model("llama")
    for budget, heavy_ratio, lengths in (
        (5, 0.9, (19, 33)),
        (11, 0.25, (33,)),
        (12, 0.0, (12, 33)),
        (12, 0.7, (13, 19)),
        (12, 0.5, (3, 9, 14)),
        (0.2, 0.5, (43, 161)),
    ):
        rows = random_rows(lengths, seed=5)
        monkeypatch.setattr(cpu, "TILE_ELEMENTS", 2000)
        cache = H2OCache(model.config, budget=budget, heavy_ratio=heavy_ratio)
        trace = drive(model, cache, rows, random_tokens(len(rows), 12, seed=6))
        budgets = [budget if isinstance(budget, int) else int(budget * length) for length in lengths]
        policies = [H2OPolicy(*sizes, heavy_ratio) for sizes in zip(lengths, budgets, strict=True)]
        compare_with_policies(model, trace, rows, policies)
        assert cache.num_kept_tokens() == [max(budgets)] * 3
        assert cache.get_seq_length() == max(lengths) + 12


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


def test_several_query_tokens_at_once_are_scored_like_one_prompt() -> None:
    """A second turn of several tokens within the budget: scores run on, as the reference's do."""
    model, tokens = tiny_model("llama"), random_tokens(30)
    trace = drive(model, H2OCache(model.config, budget=20), [tokens[:9]], tokens[None, 9:], pieces=[7, *[1] * 14])
    compare_with_policies(model, trace, [tokens[:9]], [H2OPolicy(9, 20)])


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
