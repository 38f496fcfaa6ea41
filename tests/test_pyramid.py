"""PyramidCache: the budget it keeps, the tokens it chooses, and the pruned forward, against written-out references."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import FAMILIES, Trace, build_model, drive, random_rows, random_tokens, tiny_model, uniform_attention_model
from reference import PrunedPolicy, ScoredPolicy, compare_with_policies, score_of
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from pyramid_cache import PyramidCache
from pyramid_cache.engine.budget import Budget, bounded_shares, cosine_decay, pyramid_schedule
from pyramid_cache.ops import reference


def kept_of_prompt(trace: Trace, row: int, budget: float) -> list[int]:
    """How many tokens each layer held of a row after its prompt; their mean must be the budget, a share of it."""
    kept = [len(trace.held(0, layer, row, 0)) for layer in range(len(trace.positions[0]))]
    wanted = budget * trace.lengths[row]
    assert abs(sum(kept) / len(kept) - wanted) <= max(0.5, 0.01 * wanted)
    return kept


def test_shares_in_proportion() -> None:
    # 60 to share: the last is held at 30, the first at 5; 25 remain for 2 and 3, in proportion 10 and 15.
    assert bounded_shares(60, (1, 20, 30, 90), 5, 30) == (5, 10, 15, 30)
    assert bounded_shares(10, (1.0, 1.0, 1.0), 1, 9) == (4, 3, 3)


# What gives prompts of 60 tokens something to choose from.
SETTINGS: dict[str, Any] = {
    **{"window_size": 64, "recent_ratio": 0.2, "distance_weight": 1.2, "kernel_size": 3},
    **{"decay_ratio": 0.3, "prefill_depth": 0.0, "eviction_interval": 5},
}


def check(
    model: PreTrainedModel,
    lengths: tuple[int, ...],
    num_later: int,
    budget: float = 0.45,
    is_pruned: bool = False,
    **settings: Any,
) -> Trace:
    """
    Each row of a run with a new cache against the reference alone; returns the run. The cache is given the model if it
    prunes hidden states. The budget is a share of the prompt; a preset has its own.
    """
    rows, settings = random_rows(lengths, seed=3), SETTINGS | settings
    given = settings if "preset" in settings else {"budget": budget, **settings}
    cache = PyramidCache(model if is_pruned else model.config, **given)
    trace = drive(model, cache, rows, random_tokens(len(rows), num_later, seed=4))
    policies, policy_class = [], PrunedPolicy if is_pruned else ScoredPolicy
    for row, length in enumerate(lengths):
        layers = range(model.config.num_hidden_layers)
        kept = [len(trace.held(0, layer, row, 0)) for layer in layers]
        assert "preset" in settings or kept == kept_of_prompt(trace, row, budget)
        score = score_of(PyramidCache, settings)
        policies.append(policy_class(length, score, kept, settings["eviction_interval"], trace, row))
    compare_with_policies(model, trace, rows, policies)
    return trace


@pytest.mark.parametrize("family", FAMILIES)
def test_held_positions_and_logits(family: str) -> None:
    """Padded rows of different length have windows of different length, and keep different numbers."""
    check(tiny_model(family), (45, 33), 22)


def test_settings_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is a share of the prompt, and at most half of the budget; long prompts are scored in tiles."""
    model = tiny_model("llama")
    for budget, length in ((0.2, 66), (0.3, 67), (0.5, 71), (0.8, 66)):
        check(model, (length,), 7, budget)
    check(model, (71, 60), 7, 0.4, recent_ratio=0.1, num_sink_tokens=2, distance_weight=3.0, kernel_size=1)
    check(model, (71, 60), 7, 0.4, window_size=5, kernel_size=7)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 2000)
    check(model, (213, 141), 3, 0.3)


@pytest.mark.parametrize("takes_model", [False, True], ids=["config", "model"])
def test_equal_scores_by_hand(takes_model: bool) -> None:
    """Even attention: all tokens score alike, and of equals the older goes first. Sinks and the newest remain."""
    model, lengths = uniform_attention_model(), (60,) if takes_model else (60, 44)
    cache = PyramidCache(model if takes_model else model.config, budget=0.5, kernel_size=1)
    trace = drive(model, cache, random_rows(lengths), 0)
    for row, length in enumerate(lengths):
        for layer, number in enumerate(kept_of_prompt(trace, row, 0.5)):
            assert number < length
            assert trace.held(0, layer, row, 1) == [0, 1, 2, 3, *range(length - (number - 4), length)]


@pytest.mark.parametrize("depth", [1, 2, 7, 126])
def test_mean_over_layers_meets_the_budget(depth: int) -> None:
    model = build_model("llama", num_hidden_layers=depth, hidden_size=16, intermediate_size=16, head_dim=4)
    for length, budget, source in ((97, 0.4, model), (61, 0.55, model.config), (75, 30, model.config)):
        cache = PyramidCache(source, budget=budget)
        drive(model, cache, random_rows((length,)), 0)
        kept = cache.num_kept_tokens()
        assert len(kept) == depth and kept[0] <= length and kept == sorted(kept, reverse=True)
        # The nearest that there is to the budget over all layers together.
        total = Fraction(str(budget)) * (1 if isinstance(budget, int) else length) * depth
        assert sum(kept) == math.floor(total + Fraction(1, 2))
        assert depth == 1 or kept[0] > kept[-1]


def test_decimal_shares_and_schedules_of_any_total() -> None:
    """0.29 of 100 is 29, though 0.29 * 100 is below it."""
    assert Budget("fraction", 0.29).num_tokens(100) == 29 > 0.29 * 100
    for depth in range(1, 127):
        shape = tuple(cosine_decay(depth, 0.3))
        for length, budget, minimum in ((97, 0.4, 24), (1000, 0.25, 130), (4096, 0.9, 5), (333, 0.123, 7)):
            total = round(budget * length * depth)
            kept = pyramid_schedule(length, total, shape, minimum)
            assert len(kept) == depth and sum(kept) == total
            assert list(kept) == sorted(kept, reverse=True)
            assert minimum <= kept[-1] and kept[0] <= length


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_hidden_states(family: str) -> None:
    """Given a model, each layer runs on what the one before kept."""
    check(tiny_model(family), (43, 59, 66), 6, is_pruned=True)


def test_settings_of_pruned_hidden_states() -> None:
    """The first layer may keep everything. A preset shrinks every second layer here."""
    model = build_model("llama", num_hidden_layers=6)
    trace = check(model, (59,), 6, 0.6, is_pruned=True, first_pruned_layer=1)
    assert len(trace.held(0, 0, 0, 0)) == 59 > len(trace.held(0, 1, 0, 0))
    check(model, (130,), 6, is_pruned=True, preset="llama-2-13b")


# What the authors' loop passes on of a prompt of 400 tokens: the context shrinks every so many layers, until it would
# be no longer than 64, and the recent window of 81 is never touched.
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
    depth, context, wanted = 32, 400 - 81, []
    model = build_model("llama", num_hidden_layers=depth, hidden_size=16, intermediate_size=16, head_dim=4)
    cache = PyramidCache(model, preset=preset)
    drive(model, cache, random_rows((400,)), 0)
    for layer in range(depth):
        ratio = (1 - decay_ratio) * (math.cos(math.pi * layer / depth) + 1) / 2 + decay_ratio
        if layer % interval == 0 and int(context * ratio) > 64:
            context = int(context * ratio)
        wanted.append(context + 81)
    assert cache.num_kept_tokens() == wanted and wanted[-1] < 0.7 * 400


def test_features_that_a_model_adds_between_layers() -> None:
    """DeepStack adds features of an image to the tokens of a prompt that stand for it, behind some layers."""
    model, features = build_model("llama"), torch.randn(1, 43, 999, generator=torch.Generator().manual_seed(5))

    def add(layer: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 1:
            return output
        output = output.clone()
        output[:, 7:21] += features[:, 7:21, : output.shape[2]]
        return output

    with torch.no_grad():
        prompt = random_rows((43,), seed=3)[0][None]
        before = model(prompt).logits
        cache = PyramidCache(model, budget=0.45, **SETTINGS)
        for layer in model.model.layers[:2]:  # behind the hooks of the cache, as between two layers
            layer.register_forward_hook(add)
        assert (model(prompt).logits - before).abs().max() > 0.1
    del cache
    check(model, (43,), 6, is_pruned=True)


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
TINY_TEXT = {
    **{"vocab_size": 120, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": MROPE},
    **{"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
TINY_VISION = {
    **{"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 64},
    **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64},
    "deepstack_visual_indexes": [0, 1],
}


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe"])
@torch.no_grad()
def test_an_image_is_read_by_pruned_layers(model_type: str) -> None:
    """The first layers compute everything with `prefill_depth`; the tokens of the image may go in any layer."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    ids = {"image_token_id": 110, "video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
    config = AutoConfig.for_model(model_type, text_config=TINY_TEXT, vision_config=TINY_VISION, **ids)
    model = AutoModelForImageTextToText.from_config(config).eval()
    tokens = torch.cat([random_tokens(10), torch.tensor([112, *[110] * 16, 113]), random_tokens(14, seed=1)])[None]
    prompt = {
        **{"input_ids": tokens, "mm_token_type_ids": (tokens == 110).long(), "attention_mask": tokens.new_ones(1, 42)},
        **{"pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])},
    }
    wanted = model(**prompt).logits[:, -1]
    for depth, is_exact in ((0.0, False), (2 / 3, False), (1.0, True)):
        cache = PyramidCache(model, budget=0.4, prefill_depth=depth)
        logits = model(**prompt, past_key_values=cache).logits[:, -1]
        assert cache.num_kept_tokens()[-1] < 17 and logits.isfinite().all()
        assert torch.allclose(logits, wanted, atol=1e-5) == is_exact
        cache.reset()
        assert model.generate(**prompt, past_key_values=cache, max_new_tokens=3, pad_token_id=0).shape == (1, 45)


@torch.no_grad()
def test_what_only_later_layers_get_for_each_token_is_refused() -> None:
    """Before the layer runs, and the cache is as empty as it was."""
    model, prompt = build_model("llama"), random_tokens(1, 60)
    model.model.layers[2].register_forward_pre_hook(
        lambda layer, args, named: (args, named | {"shared": {"full": (torch.zeros(1, 60, 4),)}}), with_kwargs=True
    )
    cache = PyramidCache(model, budget=0.4, prefill_depth=0.0)
    with pytest.raises(NotImplementedError, match=r"`shared` of shape \(1, 60, 4\).*cache from `model.config`"):
        model(prompt, past_key_values=cache)
    cache.require_whole()
    assert cache.get_seq_length() == 0
    logits = model(prompt, past_key_values=PyramidCache(model.config, budget=0.4)).logits
    assert torch.allclose(logits, model(prompt).logits, atol=1e-4)


@pytest.mark.parametrize("prefill_depth", [0.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_deeper_layers_compute_fewer_tokens(family: str, prefill_depth: float) -> None:
    """Given a model, what reaches each layer's MLP is what the layer before kept; a decode step is one token."""
    model, seen = build_model(family), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    cache = PyramidCache(model, budget=0.5, **SETTINGS | {"prefill_depth": prefill_depth})
    trace = drive(model, cache, random_rows((80,)), 1)
    layers, kept = model.config.num_hidden_layers, kept_of_prompt(trace, 0, 0.5)
    num_whole = max(int(prefill_depth * layers), 1)
    assert kept[-1] < kept[0] and seen == [80] * num_whole + kept[num_whole - 1 : -1] + [1] * layers


@torch.no_grad()
def test_other_caches_run_whole_on_a_model_that_was_pruned() -> None:
    """What prunes hidden states is inert for every other forward of the model, during the cache's life and after."""
    model, tokens = build_model("llama"), random_tokens(1, 60)
    before = model(tokens, use_cache=False).logits
    cache = PyramidCache(model, budget=0.5, **SETTINGS)
    model(tokens, past_key_values=cache)
    for use_cache in (False, True):
        assert torch.equal(model(tokens, use_cache=use_cache).logits, before)
    config_cache = PyramidCache(model.config, budget=0.5)
    assert torch.allclose(model(tokens, past_key_values=config_cache).logits, before, atol=1e-4)
    del cache
    assert torch.equal(model(tokens, use_cache=False).logits, before)
