"""H2OCache against the loop-written H2O, and on attention so simple that the kept tokens can be worked out by hand."""

import contextlib

import pytest
import torch
from models import (
    FAMILIES,
    Trace,
    build_model,
    drive,
    first_token_attention_model,
    generate,
    random_rows,
    random_tokens,
    tiny_model,
    uniform_attention_model,
)
from reference import H2OPolicy, run_policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pyramid_cache import H2OCache
from pyramid_cache.caches.h2o import H2OLayer


def compare_with_reference(
    model: PreTrainedModel, trace: Trace, rows: list[torch.Tensor], budgets: list[int], heavy_ratio: float
) -> None:
    """Each row of a run with the cache against the reference alone: what is held after each step, and the logits."""
    for index, row in enumerate(rows):
        policy = H2OPolicy(len(row), budgets[index], heavy_ratio)
        logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        for layer, heads in policy.held.items():
            for head, history in enumerate(heads):
                for step, wanted in enumerate(history):
                    held = trace.held(step, layer, index, head)
                    assert held == wanted, f"row {index}, layer {layer}, head {head}, step {step}"
        torch.testing.assert_close(trace.logits[index], logits[len(row) - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(37,), (37, 37, 37), (23, 37, 30)], ids=["one", "three", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_held_positions_and_logits(family: str, lengths: tuple[int, ...]) -> None:
    model, rows = tiny_model(family), random_rows(lengths, seed=3)
    trace = drive(model, H2OCache(model.config, budget=0.3), rows, random_tokens(len(rows), 25, seed=4))
    compare_with_reference(model, trace, rows, [int(0.3 * length) for length in lengths], heavy_ratio=0.5)


@pytest.mark.parametrize("heavy_ratio", [0.0, 0.25, 0.7, 0.9])
@pytest.mark.parametrize("budget", [5, 11, 12])
def test_heavy_ratio_and_odd_budgets(budget: int, heavy_ratio: float) -> None:
    model, rows = tiny_model("llama"), random_rows((19, 33), seed=5)
    cache = H2OCache(model.config, budget=budget, heavy_ratio=heavy_ratio)
    trace = drive(model, cache, rows, random_tokens(2, 20, seed=6))
    compare_with_reference(model, trace, rows, [budget, budget], heavy_ratio)


def test_nothing_is_evicted_before_the_budget_is_exceeded() -> None:
    """A prompt shorter than the budget: rows fill up, each at its own step, and only then lose a token a step."""
    model, rows = tiny_model("llama"), random_rows((3, 9, 14), seed=2)
    trace = drive(model, H2OCache(model.config, budget=12), rows, random_tokens(3, 16, seed=3))
    compare_with_reference(model, trace, rows, [12, 12, 12], heavy_ratio=0.5)
    assert trace.held(3, 0, 1, 0) == list(range(12))
    assert len(trace.held(4, 0, 1, 0)) == 12


def test_defaults() -> None:
    model, rows = tiny_model("llama"), random_rows((43,))
    trace = drive(model, H2OCache(model.config), rows, random_tokens(1, 5))
    compare_with_reference(model, trace, rows, [int(0.2 * 43)], heavy_ratio=0.5)


@pytest.mark.parametrize("length", [16, 17])
def test_one_prompt_token_over_the_budget(length: int) -> None:
    model, rows = tiny_model("qwen2"), random_rows((length,))
    trace = drive(model, H2OCache(model.config, budget=16), rows, random_tokens(1, 4))
    compare_with_reference(model, trace, rows, [16], heavy_ratio=0.5)


def test_long_prompt() -> None:
    """Longer than any block that scores may be computed in, and not a multiple of one."""
    model, rows = build_model("llama", num_hidden_layers=2), random_rows((1113, 641), seed=17)
    trace = drive(model, H2OCache(model.config, budget=100), rows, random_tokens(2, 5, seed=18))
    compare_with_reference(model, trace, rows, [100, 100], heavy_ratio=0.5)


def test_uniform_attention_by_hand() -> None:
    """Even attention: key j of n gathers 1/(j+1) + ... + 1/n, so the oldest are the heavy hitters for ever."""
    model = uniform_attention_model()
    trace = drive(model, H2OCache(model.config, budget=8, heavy_ratio=0.5), random_rows((20,)), random_tokens(1, 6))
    for step in range(7):
        for layer in range(3):
            for head in range(2):
                newest = 19 + step
                assert trace.held(step, layer, 0, head) == [0, 1, 2, 3, *range(newest - 3, newest + 1)]


@pytest.mark.parametrize("lengths", [(20,), (20, 12)], ids=["one", "padded"])
def test_equal_scores_by_hand(lengths: tuple[int, ...]) -> None:
    """All attention goes to the first token and every other score is exactly 0: of equals the older goes first."""
    model = first_token_attention_model(first_token=1)
    rows = random_rows(lengths)
    for row in rows:
        row[0] = 1
    trace = drive(model, H2OCache(model.config, budget=8, heavy_ratio=0.5), rows, random_tokens(len(rows), 6))
    for index, length in enumerate(lengths):
        for step in range(7):
            newest = length - 1 + step
            for layer in range(3):
                assert trace.held(step, layer, index, 0) == [0, *range(newest - 6, newest + 1)]


def test_heads_choose_for_themselves() -> None:
    model = tiny_model("llama")
    trace = drive(model, H2OCache(model.config, budget=10), random_rows((50,)), 0)
    kept = [tuple(trace.held(0, layer, 0, head)) for layer in range(3) for head in range(2)]
    assert len(set(kept)) == len(kept)


def test_counts() -> None:
    model = tiny_model("llama")
    cache = H2OCache(model.config, budget=10)
    drive(model, cache, random_rows((50,)), random_tokens(1, 7))
    assert cache.num_kept_tokens() == [10, 10, 10]
    assert cache.get_seq_length() == 57


@pytest.mark.parametrize("lengths", [(41,), (23, 41, 30)], ids=["one", "padded"])
def test_eager_attention_gives_the_tokens_of_sdpa(lengths: tuple[int, ...]) -> None:
    rows = random_rows(lengths, seed=9)
    sdpa, eager = build_model("llama"), build_model("llama", attention="eager")
    wanted = generate(sdpa, H2OCache(sdpa.config, budget=0.3), rows, 30)
    output = generate(eager, H2OCache(eager.config, budget=0.3), rows, 30)
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=1e-4, rtol=0)


def test_several_query_tokens_at_once_are_scored_like_one_prompt() -> None:
    """A second turn of several tokens within the budget: scores run on, as the reference's do."""
    model, tokens = tiny_model("llama"), random_tokens(30)
    cache = H2OCache(model.config, budget=20)
    with torch.no_grad():
        model(tokens[None, :9], past_key_values=cache)
        model(tokens[None, 9:16], past_key_values=cache)
    continuation = drive_on(model, cache, tokens[16:])
    policy = H2OPolicy(16, 20, 0.5)
    logits = run_policy(model, tokens, policy)
    torch.testing.assert_close(continuation, logits[16:], atol=1e-4, rtol=0)
    for layer in range(3):
        for head in range(2):
            positions = cache.positions(layer)[0, head]
            assert sorted(positions[positions >= 0].tolist()) == policy.held[layer][head][-1]


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


@torch.no_grad()
def drive_on(model: PreTrainedModel, cache: H2OCache, tokens: torch.Tensor) -> torch.Tensor:
    """Feed more tokens to a cache in use, one at a time; logits `(length, vocabulary)`."""
    steps = [model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in tokens]
    return torch.stack(steps)
