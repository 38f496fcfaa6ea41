"""PyramidCache: the budget it keeps, the tokens it chooses, and the pruned forward, against written-out references."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import (
    FAMILIES,
    Trace,
    build_model,
    drive,
    generate,
    random_rows,
    random_tokens,
    tiny_model,
    uniform_attention_model,
)
from reference import PyramidPolicy, run_policy, run_pruned_llama
from transformers import PreTrainedModel

from pyramid_cache import PyramidCache
from pyramid_cache.engine.budget import cosine_decay, pyramid_schedule


def recent_window(length: int, budget: float, recent_ratio: float = 0.2) -> int:
    """Tokens of the recent window: R + 1 for R = `recent_ratio` of the prompt, and at most half of the budget."""
    return min(int(recent_ratio * length) + 1, (int(budget * length) + 1) // 2)


def kept_of_prompt(trace: Trace, row: int, budget: float) -> list[int]:
    """How many tokens each layer held of a row after its prompt; their mean must be the budget, a share of it."""
    kept = [len(trace.held(0, layer, row, 0)) for layer in range(len(trace.positions[0]))]
    wanted = budget * trace.lengths[row]
    assert abs(sum(kept) / len(kept) - wanted) <= max(0.5, 0.01 * wanted)
    return kept


def compare_with_reference(
    model: PreTrainedModel,
    trace: Trace,
    rows: list[torch.Tensor],
    budget: float,
    recent_ratio: float = 0.2,
    **settings: Any,
) -> None:
    """Each row of a run with the cache against the reference alone: what is held after each step, and the logits."""
    for index, row in enumerate(rows):
        window = recent_window(len(row), budget, recent_ratio)
        policy = PyramidPolicy(len(row), kept_of_prompt(trace, index, budget), window, **settings)
        logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        for layer, history in enumerate(policy.held):
            for step, wanted in enumerate(history):
                for head in range(trace.positions[step][layer].shape[1]):
                    held = trace.held(step, layer, index, head)
                    assert held == wanted, f"row {index}, layer {layer}, head {head}, step {step}"
        torch.testing.assert_close(trace.logits[index], logits[len(row) - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(53,), (53, 53, 53), (41, 53, 62)], ids=["one", "three", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_held_positions_and_logits(family: str, lengths: tuple[int, ...]) -> None:
    model, rows = tiny_model(family), random_rows(lengths, seed=3)
    trace = drive(model, PyramidCache(model.config, budget=0.45), rows, random_tokens(len(rows), 12, seed=4))
    compare_with_reference(model, trace, rows, budget=0.45)


@pytest.mark.parametrize("length", [66, 67, 71])
@pytest.mark.parametrize("budget", [0.2, 0.3, 0.5, 0.8])
def test_the_recent_window_follows_the_budget(budget: float, length: int) -> None:
    """By default the window is 0.2 of the prompt, and at most half of the budget."""
    model, rows = tiny_model("llama"), random_rows((length,), seed=5)
    trace = drive(model, PyramidCache(model.config, budget=budget), rows, random_tokens(1, 5, seed=6))
    compare_with_reference(model, trace, rows, budget)


def test_settings() -> None:
    model, rows = tiny_model("llama"), random_rows((71, 60), seed=5)
    cache = PyramidCache(model.config, budget=0.4, recent_ratio=0.1, num_sink_tokens=2, distance_weight=3.0)
    trace = drive(model, cache, rows, random_tokens(2, 5, seed=6))
    compare_with_reference(model, trace, rows, budget=0.4, recent_ratio=0.1, num_sink_tokens=2, distance_weight=3.0)


@pytest.mark.parametrize("lengths", [(45,), (45, 33, 52)], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama_multi_query", "qwen3", "glm4"])
def test_generated_tokens_are_thinned_in_zones_of_sixteen(family: str, lengths: tuple[int, ...]) -> None:
    """Rows of different length have windows of different length, so each compresses at its own steps."""
    model, rows = tiny_model(family), random_rows(lengths, seed=7)
    trace = drive(model, PyramidCache(model.config, budget=0.45), rows, random_tokens(len(rows), 62, seed=8))
    compare_with_reference(model, trace, rows, budget=0.45)
    layers = len(trace.positions[0])
    for index, length in enumerate(lengths):
        last = [trace.held(62, layer, index, 0) for layer in range(layers)]
        # At least two zones went, and the deeper layer kept less of them.
        assert all(
            len(held) < kept + 62 - 3 for held, kept in zip(last, kept_of_prompt(trace, index, 0.45), strict=True)
        )
        generated = [len([position for position in held if position >= length]) for held in last]
        assert generated == sorted(generated, reverse=True) and generated[0] > generated[-1]
        for layer in range(layers):
            prompt = [position for position in last[layer] if position < length]
            assert prompt == trace.held(0, layer, index, 0), "the prompt's tokens were touched again"


def test_equal_scores_by_hand() -> None:
    """Even attention: all tokens score alike, and of equals the older goes first. Sinks and the newest remain."""
    model = uniform_attention_model()
    trace = drive(model, PyramidCache(model.config, budget=0.5), random_rows((60, 44)), 0)
    for row, length in enumerate((60, 44)):
        for layer, number in enumerate(kept_of_prompt(trace, row, 0.5)):
            assert number < length
            assert trace.held(0, layer, row, 1) == [0, 1, 2, 3, *range(length - (number - 4), length)]


def test_equal_scores_by_hand_with_pruned_hidden_states() -> None:
    model = uniform_attention_model()
    trace = drive(model, PyramidCache(model, budget=0.5), random_rows((60,)), 0)
    for layer, number in enumerate(kept_of_prompt(trace, 0, 0.5)):
        assert trace.held(0, layer, 0, 0) == [0, 1, 2, 3, *range(60 - (number - 4), 60)]


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 32, 126])
@pytest.mark.parametrize("takes_model", [False, True], ids=["config", "model"])
def test_mean_over_layers_meets_the_budget(depth: int, takes_model: bool) -> None:
    model = build_model("llama", num_hidden_layers=depth, hidden_size=16, intermediate_size=16, head_dim=4)
    for length, budget in ((97, 0.4), (61, 0.55)):
        cache = PyramidCache(model if takes_model else model.config, budget=budget)
        drive(model, cache, random_rows((length,)), 0)
        kept = cache.num_kept_tokens()
        assert len(kept) == depth
        assert kept == sorted(kept, reverse=True)
        assert kept[0] <= length
        # Never above the budget, and below it by less than one token over all layers together.
        assert sum(kept) == math.floor(Fraction(str(budget)) * length * depth + Fraction(1, 2))
        assert depth == 1 or kept[0] > kept[-1]


@pytest.mark.parametrize("depth", range(1, 127))
def test_schedule_meets_any_total_exactly(depth: int) -> None:
    shape = tuple(cosine_decay(depth, 0.3))
    for length, budget, minimum in ((97, 0.4, 24), (1000, 0.25, 130), (4096, 0.9, 5), (333, 0.123, 7)):
        total = round(budget * length * depth)
        kept = pyramid_schedule(length, total, shape, minimum)
        assert len(kept) == depth and sum(kept) == total
        assert list(kept) == sorted(kept, reverse=True)
        assert minimum <= kept[-1] and kept[0] <= length


def test_schedule_by_hand() -> None:
    """Half a cosine over three layers is 1, (1 + d) / 2, d: of 60 tokens 30, 20, 10 for d = 1/3."""
    shape = tuple(cosine_decay(3, 1 / 3))
    assert pyramid_schedule(100, 60, shape, 5) == (30, 20, 10)
    assert pyramid_schedule(100, 60, shape, 12) == (29, 19, 12)
    assert pyramid_schedule(25, 60, shape, 5) == (25, 23, 12)
    assert pyramid_schedule(100, 300, shape, 5) == (100, 100, 100)


@pytest.mark.parametrize("budget", [30, 30.0 / 75])
def test_tokens_and_fraction_are_the_same_budget(budget: float) -> None:
    model = tiny_model("llama")
    cache = PyramidCache(model.config, budget=budget)
    drive(model, cache, random_rows((75,)), 0)
    assert abs(sum(cache.num_kept_tokens()) / 3 - 30) <= 0.5


@pytest.mark.parametrize("budget", [0.45, 0.7])
@pytest.mark.parametrize("family", ["llama", "llama_multi_head", "llama_multi_query"])
def test_pruned_hidden_states(family: str, budget: float) -> None:
    """Given a model, each layer runs on what the one before kept: positions and logits of the written-out forward."""
    model, rows = tiny_model(family), random_rows((59,), seed=9)
    trace = drive(model, PyramidCache(model, budget=budget), rows, random_tokens(1, 6, seed=10))
    tokens = torch.cat([rows[0], trace.tokens[0]])
    numbers = kept_of_prompt(trace, 0, budget)
    logits, kept = run_pruned_llama(model, tokens, 59, numbers, recent_window(59, budget))
    for layer, wanted in enumerate(kept):
        for head in range(model.config.num_key_value_heads):
            for step in range(7):
                assert trace.held(step, layer, 0, head) == [*wanted, *range(59, 59 + step)]
    torch.testing.assert_close(trace.logits[0], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(59, 59, 59), (43, 59, 66)], ids=["three", "padded"])
def test_pruned_hidden_states_in_a_batch(lengths: tuple[int, ...]) -> None:
    model, rows = tiny_model("llama"), random_rows(lengths, seed=11)
    trace = drive(model, PyramidCache(model, budget=0.5), rows, random_tokens(3, 5, seed=12))
    for index, row in enumerate(rows):
        tokens = torch.cat([row, trace.tokens[index]])
        numbers = kept_of_prompt(trace, index, 0.5)
        logits, kept = run_pruned_llama(model, tokens, len(row), numbers, recent_window(len(row), 0.5))
        for layer, wanted in enumerate(kept):
            assert trace.held(5, layer, index, 1) == [*wanted, *range(len(row), len(row) + 5)]
        torch.testing.assert_close(trace.logits[index], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"first_pruned_layer": 1}, {"prune_own_layer": False}], ids=str)
def test_settings_of_pruned_hidden_states(settings: dict[str, Any]) -> None:
    """Both let the first layer keep everything, and the others pay for it."""
    model, rows = build_model("llama", num_hidden_layers=4), random_rows((59,), seed=13)
    trace = drive(model, PyramidCache(model, budget=0.6, **settings), rows, random_tokens(1, 5, seed=14))
    numbers = kept_of_prompt(trace, 0, 0.6)
    assert numbers[0] == 59 > numbers[1]
    tokens = torch.cat([rows[0], trace.tokens[0]])
    own_layer = settings.get("prune_own_layer", True)
    window = recent_window(59, 0.6)
    logits, kept = run_pruned_llama(model, tokens, 59, numbers, window, prune_own_layer=own_layer)
    for layer, wanted in enumerate(kept):
        assert trace.held(5, layer, 0, 0) == [*wanted, *range(59, 64)]
    torch.testing.assert_close(trace.logits[0], logits, atol=1e-4, rtol=0)


# What the authors' loop gives for a prompt of 400 tokens: the context shrinks every so many layers, until it would be no
# longer than 64, and the recent window of 81 is never touched.
@pytest.mark.parametrize(
    "preset, decay_ratio, interval",
    [
        ("llama-2-7b", 0.9, 1),
        ("llama-2-13b", 0.8, 2),
        ("llama-2-70b", 0.9, 3),
        ("llama-3-8b", 0.9, 1),
        ("llama-3-70b", 0.9, 3),
    ],
)
def test_presets_follow_the_authors_loop(preset: str, decay_ratio: float, interval: int) -> None:
    depth = 32
    model = build_model("llama", num_hidden_layers=depth, hidden_size=16, intermediate_size=16, head_dim=4)
    cache = PyramidCache(model, preset=preset)
    drive(model, cache, random_rows((400,)), 0)
    context, wanted = 400 - 81, []
    for layer in range(depth):
        wanted.append(context + 81)
        ratio = (1 - decay_ratio) * (math.cos(math.pi * layer / depth) + 1) / 2 + decay_ratio
        if layer % interval == 0 and int(context * ratio) > 64:
            context = int(context * ratio)
    assert cache.num_kept_tokens() == wanted
    assert wanted[-1] < 0.7 * 400


def test_preset_runs_the_authors_forward() -> None:
    """With a preset a layer holds all that it was given and prunes for the next ones, as the authors' code does."""
    model, rows = build_model("llama", num_hidden_layers=6), random_rows((130,), seed=15)
    trace = drive(model, PyramidCache(model, preset="llama-2-13b"), rows, random_tokens(1, 4, seed=16))
    numbers = [len(trace.held(0, layer, 0, 0)) for layer in range(6)]
    assert numbers[0] == 130 > numbers[-1]
    tokens = torch.cat([rows[0], trace.tokens[0]])
    logits, kept = run_pruned_llama(model, tokens, 130, numbers, int(0.2 * 130) + 1, prune_own_layer=False)
    for layer, wanted in enumerate(kept):
        assert trace.held(4, layer, 0, 0) == [*wanted, *range(130, 134)]
    torch.testing.assert_close(trace.logits[0], logits, atol=1e-4, rtol=0)


def test_long_prompt() -> None:
    """Longer than any block that scores may be computed in, and not a multiple of one."""
    model, rows = build_model("llama", num_hidden_layers=2), random_rows((1113, 641), seed=17)
    trace = drive(model, PyramidCache(model.config, budget=0.3), rows, random_tokens(2, 3, seed=18))
    compare_with_reference(model, trace, rows, budget=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_deeper_layers_compute_fewer_tokens(family: str) -> None:
    """Given a model, what reaches each layer's MLP is what the layer before kept; a decode step is one token."""
    model = tiny_model(family)
    seen: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        for layer in model.model.layers
    ]
    try:
        cache = PyramidCache(model, budget=0.5)
        trace = drive(model, cache, random_rows((80,)), 1)
    finally:
        for handle in handles:
            handle.remove()
    layers = model.config.num_hidden_layers
    kept = kept_of_prompt(trace, 0, 0.5)
    assert kept[-1] < kept[0]
    assert seen[layers:] == [1] * layers
    assert seen[0] in (80, kept[0])
    for layer in range(1, layers):
        assert seen[layer] in (kept[layer - 1], kept[layer]), (seen, kept)


def test_other_caches_run_whole_on_a_model_that_was_pruned() -> None:
    """What prunes hidden states is inert for every other forward of the model, during the cache's life and after."""
    model, tokens = build_model("llama"), random_tokens(1, 60)
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        cache = PyramidCache(model, budget=0.5)
        model(tokens, past_key_values=cache)
        assert torch.equal(model(tokens, use_cache=False).logits, before)
        assert torch.equal(model(tokens, use_cache=True).logits, before)
        config_cache = PyramidCache(model.config, budget=0.5)
        assert torch.allclose(model(tokens, past_key_values=config_cache).logits, before, atol=1e-4)
        del cache
        assert torch.equal(model(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("takes_model", [False, True], ids=["config", "model"])
@pytest.mark.parametrize("lengths", [(61,), (43, 61, 57)], ids=["one", "padded"])
def test_eager_attention_gives_the_tokens_of_sdpa(lengths: tuple[int, ...], takes_model: bool) -> None:
    rows = random_rows(lengths, seed=9)
    sdpa, eager = build_model("llama"), build_model("llama", attention="eager")
    outputs = []
    for model in (sdpa, eager):
        cache = PyramidCache(model if takes_model else model.config, budget=0.45)
        outputs.append(generate(model, cache, rows, 40))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(torch.stack(outputs[1].logits), torch.stack(outputs[0].logits), atol=1e-4, rtol=0)


def test_counts() -> None:
    model = tiny_model("llama")
    cache = PyramidCache(model.config, budget=0.5)
    trace = drive(model, cache, random_rows((60,)), random_tokens(1, 7))
    assert cache.num_kept_tokens() == [number + 7 for number in kept_of_prompt(trace, 0, 0.5)]
    assert cache.get_seq_length() == 67
