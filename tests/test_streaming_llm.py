"""StreamingLLMCache against a reference that rotates every key anew to its place in the cache, query by query."""

import pytest
import torch
from models import FAMILIES, build_model, drive, random_rows, random_tokens, tiny_model
from reference import Rotation, StreamingLLMPolicy, compare_with_policies, without_rotation
from transformers import PreTrainedModel

from pyramid_cache import StreamingLLMCache
from pyramid_cache.caches import streaming_llm


# One family of every kind of rotary embedding, besides the rest of the table.
ROTATIONS = [*FAMILIES, "llama_linear", "llama_llama3", "llama_yarn"]


def check(
    model: PreTrainedModel,
    lengths: tuple[int, ...],
    pieces: list[int],
    budget: int = 12,
    num_sink_tokens: int = 4,
    tolerance: float = 1e-4,
) -> StreamingLLMCache:
    """Each row of a run with a new cache against the reference alone; returns the cache."""
    rows = random_rows(lengths, seed=5)
    cache = StreamingLLMCache(model.config, budget=budget, num_sink_tokens=num_sink_tokens)
    trace = drive(model, cache, rows, random_tokens(len(rows), sum(pieces), seed=6), pieces=pieces)
    rotation = Rotation(model)
    policies = [StreamingLLMPolicy(rotation, [length, *pieces], budget, num_sink_tokens) for length in lengths]
    with without_rotation(model):
        compare_with_policies(model, trace, rows, policies, tolerance)
    return cache


@pytest.mark.parametrize("family", ROTATIONS)
def test_rows_are_those_of_the_reference(family: str) -> None:
    """One row is longer than the window, one fills it later, one starts inside it; all go three windows on."""
    check(tiny_model(family), (17, 29, 6), [1] * 36)


def test_settings_lengths_and_turns() -> None:
    """Numbers of sinks, prompts around them and around the window; later turns and chunks; many windows."""
    model = tiny_model("llama")
    check(model, (17, 29, 6), [1, 1, 9, 1, 13, 2, 1, 30, 1])
    check(model, (5,), [1] * 200, budget=8, num_sink_tokens=2, tolerance=5e-4)
    for num_sink_tokens in (0, 1, 3, 8):
        check(model, (21, 5), [1] * 15, budget=9, num_sink_tokens=num_sink_tokens)
    for lengths in ((1,), (3, 4), (5, 11), (12, 13)):
        cache = check(model, lengths, [1] * 15)
        assert cache.num_kept_tokens() == [12] * 3
        assert cache.get_seq_length() == max(lengths) + 15
    for budget, num_kept in ((0.5, 20), ("16KiB", 16)):
        cache = StreamingLLMCache(model.config, budget=budget)
        drive(model, cache, random_rows((40,)), 0)
        assert cache.num_kept_tokens() == [num_kept] * 3
    state = cache.compressed_layers[0].state
    assert (
        3
        * sum(tensor.nbytes for tensor in (*state.tensors("slot").values(), state.sink_keys, state.sink_quarter_turns))
        <= 16 * 1024
    )


@pytest.mark.parametrize("family", ["llama", "glm4", "llama_yarn"])
def test_moving_the_base_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles counted from a base that moves every seven tokens, through single tokens and a later turn."""
    monkeypatch.setattr(streaming_llm, "REBASE_INTERVAL", 7)
    for lengths in ((29,), (17, 29, 6)):
        cache = check(tiny_model(family), lengths, [1] * 20 + [9] + [1] * 15)
        assert cache.layers[0].state.base == 70


def longrope_model(long_factor: float) -> PreTrainedModel:
    """A Phi-3 that rotates otherwise beyond 32 tokens, if the factor is not 1.1."""
    factors = {"short_factor": [1.1] * 8, "long_factor": [long_factor] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    return build_model("phi3", rope_parameters=rope, max_position_embeddings=128, original_max_position_embeddings=32)


def test_longrope_keeps_the_short_frequencies() -> None:
    """
    Beyond the original length the model rotates by its long factors. What the cache holds never reaches that far, so
    it must be as if the model had only the short ones, also in a later turn.
    """
    rows, later = random_rows((23,), seed=21), random_tokens(1, 60, seed=22)
    logits = []
    for model in (longrope_model(1.1), longrope_model(3.0)):
        cache = StreamingLLMCache(model.config, budget=12)
        logits.append(drive(model, cache, rows, later, pieces=[1] * 20 + [20] + [1] * 20).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="budget=32"), torch.no_grad():
        model(rows[0][None], past_key_values=StreamingLLMCache(model.config, budget=32))
    cache, later_ids = StreamingLLMCache(model.config, budget=12), torch.arange(3, 26)[None]
    with pytest.raises(ValueError, match="from 0, padding not counted"), torch.no_grad():
        model(rows[0][None], position_ids=later_ids, past_key_values=cache)


@pytest.mark.slow
@torch.no_grad()
def test_positions_beyond_the_precision_of_the_model() -> None:
    """
    With one layer, logits depend on the sinks and the window alone. After 100,000 tokens they must be those of a
    prompt that consists of just these. The model's own angles are off by 6e-3 radians there.
    """
    model = build_model("llama", num_hidden_layers=1)
    tokens, later, length = random_tokens(100_000, seed=23), random_tokens(40, seed=24), 64
    cache = StreamingLLMCache(model.config, budget=length)
    for piece in tokens.split(5_000):
        model(piece[None], past_key_values=cache, logits_to_keep=1)
    for step in range(len(later)):
        logits = model(later[step].view(1, 1), past_key_values=cache).logits[0, -1]
        stream = torch.cat([tokens, later[: step + 1]])
        held = torch.cat([stream[:4], stream[4 - length - 1 :]])
        wanted = model(held[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
