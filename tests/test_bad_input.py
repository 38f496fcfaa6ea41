"""Every impossible setting or use has its own clear error; nothing runs on with a wrong result."""

import math
from typing import Any

import pytest
import torch
from models import build_config, build_model, drive, left_pad, random_rows, random_tokens, tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pyramid_cache import H2OCache, PyramidCache, StreamingLLMCache


BUDGETED = [PyramidCache, H2OCache]

ALL: dict[str, Any] = {
    "pyramid_config": lambda model: PyramidCache(model.config, budget=0.5),
    "pyramid_model": lambda model: PyramidCache(model, budget=0.5),
    "h2o": lambda model: H2OCache(model.config, budget=0.5),
    "streaming_llm": lambda model: StreamingLLMCache(model.config, window_length=24),
}

ERRORS = (ValueError, NotImplementedError)


@pytest.mark.parametrize("cache_class", BUDGETED)
@pytest.mark.parametrize(
    "budget, match",
    [
        (0, "budget.*0"),
        (0.0, "budget.*0"),
        (-3, "budget.*-3"),
        (-0.4, "budget.*-0.4"),
        (math.nan, "budget.*nan"),
        (math.inf, "budget.*inf"),
        (1.5, "budget.*1.5"),
        ("12 apples", "budget.*12 apples"),
        ("MiB", "budget.*MiB"),
        ("-4MiB", "budget.*-4MiB"),
        ("0MiB", "budget.*0MiB"),
        ("", "budget"),
        (True, "budget.*True"),
        (None, "budget.*None"),
        ([0.4], "budget.*0.4"),
    ],
)
def test_impossible_budgets(cache_class: type[Cache], budget: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cache_class(build_config("llama"), budget=budget)


@pytest.mark.parametrize("window_length, num_sink_tokens", [(4, 4), (3, 4), (0, 4), (-5, 4), (0, 0)])
def test_window_that_does_not_exceed_its_sinks(window_length: int, num_sink_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"window_length.*{window_length}"):
        StreamingLLMCache(build_config("llama"), window_length=window_length, num_sink_tokens=num_sink_tokens)


@pytest.mark.parametrize("window_length", [True, 12.5, "12", math.nan])
def test_window_that_is_no_number_of_tokens(window_length: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="window_length"):
        StreamingLLMCache(build_config("llama"), window_length=window_length)


def test_negative_number_of_sinks() -> None:
    with pytest.raises(ValueError, match="num_sink_tokens.*-1"):
        StreamingLLMCache(build_config("llama"), window_length=12, num_sink_tokens=-1)


def test_unknown_prefill() -> None:
    with pytest.raises(ValueError, match="prefill.*sparse"):
        StreamingLLMCache(build_config("llama"), window_length=12, prefill="sparse")


@pytest.mark.parametrize("budget", [1, 4])
def test_pyramid_budget_below_sinks_and_window(budget: int) -> None:
    with pytest.raises(ValueError, match="budget"):
        cache = PyramidCache(build_config("llama"), budget=budget)
        drive(tiny_model("llama"), cache, random_rows((60,)), 0)


def test_bytes_that_hold_no_token() -> None:
    for cache_class in BUDGETED:
        with pytest.raises(ValueError, match="(?i)bytes"):
            drive(tiny_model("llama"), cache_class(build_config("llama"), budget="16B"), random_rows((60,)), 0)


@pytest.mark.parametrize("heavy_ratio", [-0.1, 1.1, math.nan])
def test_impossible_heavy_ratio(heavy_ratio: float) -> None:
    with pytest.raises(ValueError, match=f"heavy_ratio.*{heavy_ratio}"):
        H2OCache(build_config("llama"), heavy_ratio=heavy_ratio)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="(?s)preset.*llama-9-900b"):
        PyramidCache(build_config("llama"), preset="llama-9-900b")


@pytest.mark.parametrize("cache_class", [PyramidCache, H2OCache, lambda config: StreamingLLMCache(config, 12)])
def test_encoder_only_config(cache_class: Any) -> None:
    with pytest.raises(ValueError, match="(?i)bert"):
        cache_class(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32))


@pytest.mark.parametrize("cache_class", [PyramidCache, H2OCache, lambda config: StreamingLLMCache(config, 12)])
def test_something_that_is_no_config(cache_class: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="config"):
        cache_class("llama")


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, batch_size: int = 1) -> None:
    """Feed a prompt of 40 tokens."""
    model(random_tokens(batch_size, 40), past_key_values=cache)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("cache", ALL)
def test_a_model_of_another_depth(cache: str, depth: int) -> None:
    """The cache is built for three layers."""
    other = build_model("llama", num_hidden_layers=depth)
    made = ALL[cache](tiny_model("llama"))
    with pytest.raises(ValueError, match="(?i)layer|model"):
        prefill(other, made)
        with torch.no_grad():
            other(random_tokens(1, 1), past_key_values=made)


def test_pyramid_of_one_model_used_with_its_twin() -> None:
    """Hidden states are pruned by hooks on the model that was given; another one has none."""
    cache = PyramidCache(build_model("llama", seed=1), budget=0.5)
    with pytest.raises(ValueError, match="(?i)model"):
        prefill(build_model("llama", seed=2), cache)


@pytest.mark.parametrize("cache", ALL)
def test_a_cache_in_use_handed_to_another_model(cache: str) -> None:
    first, second = build_model("llama", seed=1), build_model("llama", seed=2)
    made = ALL[cache](first)
    prefill(first, made)
    with pytest.raises(ValueError, match="(?i)model"), torch.no_grad():
        second(random_tokens(1, 1), past_key_values=made)


@pytest.mark.parametrize("cache", ALL)
def test_a_cache_in_use_handed_to_another_shape_of_model(cache: str) -> None:
    first, second = build_model("llama"), build_model("llama", num_key_value_heads=1)
    made = ALL[cache](first)
    prefill(first, made)
    with pytest.raises(ValueError, match="(?i)model|heads"), torch.no_grad():
        second(random_tokens(1, 1), past_key_values=made)


@pytest.mark.parametrize("new_batch_size", [1, 3])
@pytest.mark.parametrize("cache", ALL)
def test_a_cache_in_use_handed_another_batch_size(cache: str, new_batch_size: int) -> None:
    model = build_model("llama")
    made = ALL[cache](model)
    prefill(model, made, batch_size=2)
    with pytest.raises(ValueError, match="(?i)batch"), torch.no_grad():
        model(random_tokens(new_batch_size, 1), past_key_values=made)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask_length", [1, 39])
@pytest.mark.parametrize("cache", ALL)
def test_a_mask_too_short_for_the_prompt(cache: str, mask_length: int, attention: str) -> None:
    model = build_model("llama", attention=attention)
    mask = torch.ones(1, mask_length, dtype=torch.long)
    with pytest.raises(ValueError, match="(?i)mask"), torch.no_grad():
        model(random_tokens(1, 40), attention_mask=mask, past_key_values=ALL[cache](model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask_length", [1, 24, 40])
@pytest.mark.parametrize("cache", ALL)
def test_a_mask_too_short_for_a_decode_step(cache: str, mask_length: int, attention: str) -> None:
    """The mask must cover all tokens seen and the new one, 41 here; not what the cache holds."""
    model = build_model("llama", attention=attention)
    made = ALL[cache](model)
    prefill(model, made)
    mask = torch.ones(1, mask_length, dtype=torch.long)
    with pytest.raises(ValueError, match="(?i)mask"), torch.no_grad():
        model(random_tokens(1, 1), attention_mask=mask, past_key_values=made)


@pytest.mark.parametrize("key_length", [39, 41])
@pytest.mark.parametrize("cache", ALL)
def test_a_prepared_mask_of_the_wrong_length(cache: str, key_length: int) -> None:
    """transformers hands a 4-D mask through as it is."""
    model = build_model("llama")
    mask = torch.ones(1, 1, 40, key_length, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="(?i)mask"), torch.no_grad():
        model(random_tokens(1, 40), attention_mask=mask, past_key_values=ALL[cache](model))


@pytest.mark.parametrize("cache", ALL)
def test_flex_attention_is_refused(cache: str) -> None:
    model = build_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ERRORS, match="(?s)flex_attention.*sdpa"):
        prefill(model, ALL[cache](model))


def test_attention_weights_of_evicted_tokens_are_refused() -> None:
    model, tokens = build_model("llama", attention="eager"), random_tokens(1, 40)
    caches = [PyramidCache(model), PyramidCache(model.config), H2OCache(model), StreamingLLMCache(model, 12)]
    for cache in caches:
        with torch.no_grad(), pytest.raises(NotImplementedError, match="output_attentions"):
            model(tokens, past_key_values=cache, output_attentions=True)
    whole = model(tokens, past_key_values=H2OCache(model, budget=1.0), output_attentions=True)
    assert all(weights.shape == (1, 4, 40, 40) for weights in whole.attentions)


def test_hidden_states_of_pruned_layers_are_refused() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        model(tokens, past_key_values=PyramidCache(model.config, budget=0.4), output_hidden_states=True)
        with pytest.raises(NotImplementedError, match="output_hidden_states"):
            model(tokens, past_key_values=PyramidCache(model, budget=0.4), output_hidden_states=True)


def test_positions_of_a_layer_that_is_not_there() -> None:
    model = build_model("llama")
    with pytest.raises(ValueError, match="no layer 99"):
        PyramidCache(model.config).positions(99)


def test_crop_is_all_or_nothing() -> None:
    """The first layer holds the whole prompt and could be cropped, the deeper ones have evicted."""
    model, tokens = build_model("llama"), random_tokens(1, 40)
    cache = PyramidCache(model.config, budget=0.9, min_context_length=0)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="crop"):
            cache.crop(-5)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [40, 40, 40]


def test_crop_of_a_padded_turn() -> None:
    """Only the tokens among the cropped columns count."""
    model, rows = build_model("llama"), random_rows((9, 4))
    input_ids, mask = left_pad(rows)
    cache = H2OCache(model, budget=1.0)
    more = random_tokens(2, 3)
    with torch.no_grad():
        model(more, past_key_values=cache)
        both = torch.cat([torch.ones_like(more), mask], dim=1)
        model(input_ids, attention_mask=both, past_key_values=cache)
        cache.crop(-9)
        assert cache.layers[0].row_lengths == [3, 3]
        wanted = DynamicCache(config=model.config)
        model(more, past_key_values=wanted)
        output, expected = (model(more[:, :1], past_key_values=each).logits for each in (cache, wanted))
    assert torch.equal(output, expected)


def test_unknown_attention_function_is_refused() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 10)
    AttentionInterface.register("own_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("own_attention", sdpa_mask)
    model.set_attn_implementation("own_attention")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="own_attention"):
        model(tokens, past_key_values=H2OCache(model))


def test_dropout_is_refused_once_tokens_are_evicted() -> None:
    model, tokens = build_model("llama", attention_dropout=0.5).train(), random_tokens(1, 40)
    cache = H2OCache(model, budget=12)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="dropout"):
            model(tokens[:, :1], past_key_values=cache)


def test_position_ids_with_gaps_are_refused_by_streaming_llm() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        shifted = model(tokens, position_ids=torch.arange(40)[None] + 7, past_key_values=StreamingLLMCache(model, 12))
        plain = model(tokens, past_key_values=StreamingLLMCache(model, 12))
        torch.testing.assert_close(shifted.logits, plain.logits, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="position_ids"):
            model(tokens, position_ids=2 * torch.arange(40)[None], past_key_values=StreamingLLMCache(model, 12))
