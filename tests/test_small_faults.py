"""What no other test of the quick tier notices of the faults in `mutations.py`, by subject."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_model, drive, generate, left_pad, random_rows, random_tokens, tiny_model
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import (
    AdaKVCache,
    H2OCache,
    KeyDiffCache,
    MassiveActivationCache,
    PyramidCache,
    ScissorhandsCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.engine.budget import bytes_to_tokens
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.scoring import sum_of_probabilities


SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
POLICY_SETTINGS = {"window_size": 4, "kernel_size": 3, "eviction_interval": 3}
CACHES = (
    (H2OCache, {}),
    (TOVACache, {}),
    (KeyDiffCache, {"eviction_interval": 3}),
    (SnapKVCache, POLICY_SETTINGS),
    (StreamingLLMCache, {}),
    (PyramidCache, {}),
    (AdaKVCache, POLICY_SETTINGS),
    (ScissorhandsCache, {"window_size": 4, "eviction_interval": 3}),
)


# Padding.


@pytest.mark.parametrize("lengths", [(6, 9), (4, 20)], ids=["an answer", "the prompt of one row"])
def test_padding_is_no_token_whatever_is_the_first_to_exceed_the_budget(lengths: tuple[int, int]) -> None:
    model, rows, answer = tiny_model("llama"), random_rows(lengths, seed=31), random_tokens(2, 9, seed=32)
    for cache_class, settings in CACHES:
        together = drive(model, cache_class(model.config, 12, **settings), rows, answer)
        for index, row in enumerate(rows):
            alone = drive(model, cache_class(model.config, 12, **settings), [row], answer[index : index + 1])
            torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
            for place in itertools.product(range(10), range(3)):
                assert together.held(*place, index, 1) == alone.held(*place, 0, 1)


@torch.no_grad()
def read_turns(model: PreTrainedModel, cache: CompressedCache, *turns: list[torch.Tensor]) -> torch.Tensor:
    """Reads turns that are padded each on its own, and returns the logits of the last tokens."""
    mask = torch.zeros(len(turns[0]), 0, dtype=torch.long)
    for rows in turns:
        input_ids, new_mask = left_pad(rows)
        mask = torch.cat([mask, new_mask], dim=1)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = model(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
    return output.logits[:, -1]


@pytest.mark.parametrize("budget, lengths", [(12, ((6, 9), (9, 5))), (0.5, ((16, 16), (9, 2)))])
def test_padding_between_tokens(budget: float, lengths: tuple[tuple[int, int], ...]) -> None:
    """The padding of a second turn lies behind tokens of the first, all of them or those that stayed."""
    model, first, second = tiny_model("llama"), *(random_rows(each, seed=33) for each in lengths)
    for cache_class, settings in CACHES:
        together = cache_class(model.config, budget, **settings)
        logits = read_turns(model, together, first, second)
        for index in range(2):
            alone = cache_class(model.config, budget, **settings)
            expected = read_turns(model, alone, [first[index]], [second[index]])
            torch.testing.assert_close(logits[index], expected[0], atol=1e-4, rtol=0)
            for layer in range(3):
                for held, wanted in zip(together.positions(layer)[index], alone.positions(layer)[0], strict=True):
                    assert sorted(held[held >= 0].tolist()) == sorted(wanted[wanted >= 0].tolist())


# Scores.


def test_a_turn_as_long_as_the_window_leaves_nothing_of_earlier_queries() -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, 17, seed=35)
    at_once, in_turns = (SnapKVCache(model.config, budget=64, **POLICY_SETTINGS) for _ in range(2))
    read_turns(model, at_once, list(prompt))
    read_turns(model, in_turns, list(prompt[:, :13]), list(prompt[:, 13:]))
    for layer, expected in zip(in_turns.compressed_layers, at_once.compressed_layers, strict=True):
        torch.testing.assert_close(layer.held_scores(), expected.held_scores(), atol=1e-6, rtol=1e-5)


def test_probabilities_in_half_precision_are_summed_in_float32() -> None:
    probabilities = torch.rand(1, 4, 300, 5).bfloat16()
    scores = sum_of_probabilities(probabilities, 2, None)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), probabilities.double().view(1, 2, 2, 300, 5).sum(dim=(2, 3)))


# Budgets and angles.


def test_tokens_and_spare_slots_fit_a_budget_in_bytes() -> None:
    for num_bytes in (9_999, 10_000, 12_345):
        num_tokens = bytes_to_tokens(num_bytes, num_layers=2, batch_size=5, bytes_per_token=100, num_spare_slots=3)
        assert 1000 * (num_tokens + 3) <= num_bytes < 1000 * (num_tokens + 3 + 1)


def test_half_precision_is_rotated_in_float32_and_rounded_once() -> None:
    rotary = RotaryFrequencies(torch.tensor([1.0, 0.3, 0.1, 0.03]))
    states = torch.randn(1, 2, 50, 8).bfloat16()
    angles = rotary.angles(torch.arange(50))
    exact = rotary.rotate(states.double(), angles)
    error = (rotary.rotate(states, angles).double() - exact).abs()
    assert (error <= 0.501 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()


# Rows.


def test_rows_whose_heads_hold_different_numbers_change_places() -> None:
    model = tiny_model("llama")
    cache = AdaKVCache(model.config, budget=12, window_size=4)
    read_turns(model, cache, random_rows((20, 33), seed=36))
    before = [cache.positions(layer) for layer in range(3)]
    cache.batch_select_indices(torch.tensor([1, 0]))
    for layer, expected in enumerate(before):
        assert torch.equal(cache.positions(layer), expected.flip(0)) and not torch.equal(expected, expected.flip(0))


# The shadow.


def test_slots_are_full_before_there_is_a_shadow_and_copies_share_no_values() -> None:
    """Slots for an outlier chunk, two sparse chunks and a tail of 6 tokens, of which one is that of the next step."""
    model, tokens = tiny_model("llama"), random_tokens(1, 13, seed=37)
    settings = {"chunk_size": 2, "num_outlier_chunks": 1, "num_local_tokens": 2, "offload_interval": 2, "rank": 6}
    for length in (11, 12, 13):
        cache = ShadowKVCache(model.config, budget=4, **settings)
        read_turns(model, cache, list(tokens[:, :length]))
        twin = copy.deepcopy(cache)
        for layer, copied in zip(cache.compressed_layers, twin.compressed_layers, strict=True):
            assert (layer.shadow.values is None) == (length == 11)
            assert length == 11 or layer.shadow.values.tensor.data_ptr() != copied.shadow.values.tensor.data_ptr()


# Memory, reset and crop.


def test_a_view_of_a_fused_projection_is_copied() -> None:
    """Phi-3 makes queries, keys and values in one product, whose memory must not stay."""
    model = build_model("phi3")
    cache = H2OCache(model.config, budget=64)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
    for layer in cache.compressed_layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_reset_forgets_everything() -> None:
    """What may be taken back, what massive tokens are compared with, and what layers of transformers hold."""
    for name, overrides, cache_class, records in (
        ("llama", {}, H2OCache, True),
        ("llama", {}, MassiveActivationCache, False),
        ("qwen2", SLIDING, H2OCache, False),
    ):
        model, prompt = build_model(name, **overrides), list(random_tokens(1, 20))
        cache, new = (cache_class(model.config, budget=8) for _ in range(2))
        if records:
            cache.activate_past_recording()
        read_turns(model, cache, list(random_tokens(2, 25, seed=1)))
        cache.reset()
        assert cache.nbytes == 0 or name == "qwen2"  # whose sliding layers count in a tensor
        assert [layer.get_seq_length() for layer in cache.layers] == [0] * len(cache.layers)
        assert torch.equal(*(read_turns(model, each, prompt) for each in (cache, new)))
        for layer, expected in zip(cache.compressed_layers, new.compressed_layers, strict=True):
            assert torch.equal(layer.held_positions(), expected.held_positions())
            if cache_class is MassiveActivationCache:
                assert torch.equal(layer.state.template_norm, expected.state.template_norm)


def test_a_sliding_window_that_is_just_full_has_dropped_a_token() -> None:
    model = build_model("qwen2", **SLIDING)
    cache = H2OCache(model.config, budget=1.0)
    read_turns(model, cache, list(random_tokens(1, 8)))
    with pytest.raises(NotImplementedError, match="sliding window"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [8] * len(cache.layers)


# What transformers does with a cache.


def longrope_model(name: str) -> PreTrainedModel:
    """A model whose positions are scaled in another way beyond 48 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [3.0] * 8}
    rope |= {"original_max_position_embeddings": 48, "short_mscale": 1.0, "long_mscale": 1.0}
    settings = {"hidden_size": 64, "max_position_embeddings": 256, "original_max_position_embeddings": 48}
    return build_model(name, rope_parameters=rope, sliding_window=None, **settings)


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_a_model_that_leaves_its_cache_is_noticed(name: str) -> None:
    """The cache is as it was, and what the error says works."""
    model = longrope_model(name)
    for length, new_tokens, num_seen in ((60, 4, 0), (40, 12, 48)):
        prompt, cache = random_tokens(1, length), SnapKVCache(model.config, budget=64, window_size=4)
        with pytest.raises(ValueError, match=r"did not use the .*48 tokens.*model\(prompt\[:, :-1\]"):
            generate(model, cache, list(prompt), new_tokens)
        assert cache.get_seq_length() == num_seen
    for prompt, first in ((random_tokens(1, 60), 59), (random_tokens(1, 40), 0)):
        outputs = []
        for cache in (SnapKVCache(model.config, budget=99), DynamicCache(config=model.config)):
            with torch.no_grad():
                if first:
                    model(prompt[:, :first], past_key_values=cache)
            outputs.append(generate(model, cache, list(prompt), 8))
            assert cache.get_seq_length() == prompt.shape[1] + 7
        assert torch.equal(*(torch.stack(output.logits) for output in outputs))


def test_continuous_batching_does_not_ignore_a_cache() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="paged.*SnapKVCache"):
        generate(
            model, SnapKVCache(model.config, budget=12), list(random_tokens(1, 20)), 2, cache_implementation="paged"
        )


def test_a_cache_is_iterated_as_dynamic_cache_is() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 20)
    cache, expected = SnapKVCache(model.config, budget=64), DynamicCache(config=model.config)
    assert not cache.is_initialized
    for each in (cache, expected):
        read_turns(model, each, list(tokens), list(tokens[:, :1]))
    assert cache.is_initialized
    for held, wanted in zip(cache, expected, strict=True):
        assert torch.equal(held[0], wanted[0]) and torch.equal(held[1], wanted[1]) and held[2] is wanted[2] is None
    cache = SnapKVCache(model.config, budget=8, window_size=4)
    read_turns(model, cache, list(tokens))
    with pytest.raises(AttributeError, match="evicted tokens"):
        next(iter(cache))


@every_cache
def test_another_default_device_changes_nothing(case: CacheCase) -> None:
    """Tensors of the library are where its arguments are, or on the CPU by name."""
    model, positions = tiny_model("llama"), torch.arange(22)[None]
    tokens, outputs = random_tokens(1, 22), []
    for device in ("cpu", "meta"):
        cache = case.build(model)
        with torch.no_grad(), torch.device(device):
            for part in (slice(0, 20), slice(20, 21), slice(21, 22)):
                output = model(tokens[:, part], position_ids=positions[:, part], past_key_values=cache)
            cache.batch_select_indices([0])
        outputs.append(output.logits)
    assert torch.equal(*outputs)


# Reasons.


@pytest.mark.parametrize("settings", [{"num_return_sequences": 4, "do_sample": True}, {"num_beams": 4}])
def test_a_document_that_was_read_once_goes_on_several_times(settings: dict[str, Any]) -> None:
    """The error names the call that makes the cache fit, and that call does."""
    model, document = tiny_model("llama"), random_tokens(1, 40)
    prompt = torch.cat([document, random_tokens(1, 6, seed=1)], dim=1)
    cache = SnapKVCache(model.config, budget=12, window_size=4)
    read_turns(model, cache, list(document))
    with pytest.raises(ValueError, match=r"holds 1 rows, .* given 4\. .*`cache.batch_repeat_interleave\(4\)` first"):
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, **settings)
    assert cache.get_seq_length() == 40
    cache.batch_repeat_interleave(4)
    assert model.generate(prompt, past_key_values=cache, max_new_tokens=3, **settings).shape[1] == 49


def test_a_model_with_fewer_layers_than_its_config_is_told_so() -> None:
    model, tokens = build_model("llama"), list(random_tokens(1, 20))
    model.model.layers = model.model.layers[:2]
    cache = SnapKVCache(model.config, budget=64)
    with pytest.raises(RuntimeError, match=r"2 layers, set `model.config.num_hidden_layers = 2`"):
        read_turns(model, cache, tokens, tokens)
    model.config.num_hidden_layers = 2
    read_turns(model, SnapKVCache(model.config, budget=64), tokens, tokens)


def test_layers_whose_settings_differ_have_a_cache_as_dynamic_cache() -> None:
    """The full-attention layers of Gemma 4 have wider heads than the others."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    sizes = {"num_kv_shared_layers": 0, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    model = build_model("gemma4_text", layer_types=kinds, vocab_size_per_layer_input=101, **sizes)
    rows = list(random_tokens(1, 20))
    caches = SnapKVCache(model.config, budget=64), DynamicCache(config=model.config)
    outputs = [generate(model, cache, rows, 4) for cache in caches]
    assert torch.equal(*(torch.stack(output.logits) for output in outputs))
    cache = SnapKVCache(model.config, budget=8, window_size=4)
    generate(model, cache, rows, 1)
    assert cache.num_kept_tokens() == [8, 8]


def test_errors_of_save_name_the_path_that_was_given(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = SnapKVCache(model.config, budget=64)
    read_turns(model, cache, list(random_tokens(1, 20)))
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "none" / "file", FileNotFoundError)):
        with pytest.raises(error) as raised:
            cache.save(path)
        assert raised.value.filename == str(path) and not list(tmp_path.iterdir())
