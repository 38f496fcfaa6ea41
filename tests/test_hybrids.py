"""Hybrid models: full-attention layers are compressed, beside states, convolutions, windows and shared keys.

`tests/test_architectures.py` compares their tokens with those of `DynamicCache` and of masked runs. Here is what
`generate` and users do with the layers that are no longer alike.
"""

from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model, generate, random_rows, random_tokens
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from pyramid_cache import SnapKVCache


WITH_STATES = "qwen3_next qwen3_5 olmo_hybrid granitemoehybrid nemotron_h jamba falcon_h1 zamba2".split()
HYBRIDS = [*WITH_STATES, "lfm2", "gpt_oss", "gemma3n"]
TIGHT = {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3}
parametrize_hybrids = pytest.mark.parametrize("name", HYBRIDS)
TOLERANCE = 2e-4


@remember
def model_of(name: str) -> PreTrainedModel:
    """The shared model of an architecture, with the attention that all of them have."""
    return build_model(name, attention="eager")


def tight(model: PreTrainedModel) -> SnapKVCache:
    return SnapKVCache(model.config, **TIGHT)


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The last logits `(batch, vocabulary)`."""
    return model(tokens, past_key_values=cache).logits[:, -1]


def follow(model: PreTrainedModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits `(batch, tokens, vocabulary)` of tokens that are fed one by one."""
    return torch.stack([read(model, cache, column[:, None]) for column in tokens.T], dim=1)


@parametrize_hybrids
@pytest.mark.parametrize("budget", ["large", "tight"])
def test_beams(name: str, budget: str) -> None:
    """With room for everything the beams of `DynamicCache`; else every row ends as one that was read alone."""
    model, rows = model_of(name), random_rows((25, 37))
    cache = SnapKVCache(model.config, budget=4096) if budget == "large" else tight(model)
    output = generate(model, cache, rows, 10, num_beams=3, output_scores=True)
    if budget == "large":
        wanted = generate(model, DynamicCache(config=model.config), rows, 10, num_beams=3, output_scores=True)
        assert torch.equal(output.sequences, wanted.sequences)
        assert torch.equal(output.sequences_scores, wanted.sequences_scores)
        return
    for row, prompt in enumerate(rows):
        answer = output.sequences[row, -10:]
        alone = tight(model)
        logits = [read(model, alone, prompt[None]), *follow(model, alone, answer[None, :-1])[0][:, None]]
        scores = torch.cat(logits).log_softmax(dim=-1)[range(10), answer].sum() / 10
        torch.testing.assert_close(output.sequences_scores[row], scores, atol=TOLERANCE, rtol=0)


@parametrize_hybrids
def test_second_turn(name: str) -> None:
    """A tight cache goes on as one that was fed the same pieces; a large one as `DynamicCache`."""
    model, prompt, turn = model_of(name), random_rows((37,)), random_tokens(9, seed=5)
    results = []
    for cache in (DynamicCache(config=model.config), SnapKVCache(model.config, budget=4096), tight(model)):
        first = generate(model, cache, prompt, 6).sequences[0]
        history = torch.cat([first, turn])
        second = generate(model, cache, [history], 6)
        results.append((second.sequences, torch.stack(second.logits)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    again, seen = tight(model), results[2][0][0]
    logits = [read(model, again, seen[None, :37])[:, None], follow(model, again, seen[None, 37:42])]
    logits += [read(model, again, seen[None, 42:52])[:, None], follow(model, again, seen[None, 52:-1])]
    torch.testing.assert_close(results[2][1][:, 0], torch.cat(logits, dim=1)[0, 6:], atol=TOLERANCE, rtol=0)


@parametrize_hybrids
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, tokens = model_of(name), random_tokens(2, 30)
    cache = tight(model)
    read(model, cache, tokens)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SnapKVCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.nbytes <= cache.nbytes  # unused slots are not saved
    later = random_tokens(2, 7, seed=3)
    assert torch.equal(follow(model, loaded, later), follow(model, cache, later))


@parametrize_hybrids
def test_rows_are_selected_and_repeated(name: str) -> None:
    """In all kinds of layers: each row goes on as if it had been alone."""
    model, tokens, later = model_of(name), random_tokens(3, 30), random_tokens(4, 5, seed=2)
    cache = tight(model)
    read(model, cache, tokens)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
    logits = follow(model, cache, later)
    for row, source in enumerate((0, 2, 0, 2)):
        alone = tight(model)
        read(model, alone, tokens[source : source + 1])
        wanted = follow(model, alone, later[row : row + 1])
        torch.testing.assert_close(logits[row], wanted[0], atol=TOLERANCE, rtol=0)


@parametrize_hybrids
def test_reset_forgets_every_layer(name: str) -> None:
    model, cache = model_of(name), tight(model_of(name))
    read(model, cache, random_tokens(2, 20, seed=9))
    cache.reset()
    assert cache.nbytes == tight(model).nbytes
    tokens = random_tokens(1, 30)
    assert torch.equal(read(model, cache, tokens), read(model, tight(model), tokens))


@parametrize_hybrids
def test_a_refused_call_does_not_leave_states_behind(name: str) -> None:
    """What a layer with states has read cannot be taken back. The next call says so, or is right."""
    if name == "olmo_hybrid" and not hasattr(DynamicCache, "get_conv_state"):
        pytest.skip("before transformers 5.24 its layers do not say which of them asks")
    model, tokens = model_of(name), random_tokens(1, 30)
    for is_first in (True, False):
        cache, wanted = tight(model), tight(model)
        pieces = [tokens] if is_first else [tokens, tokens[:, :1]]
        for piece in pieces[:-1]:
            read(model, cache, piece)
        expected = [read(model, wanted, piece) for piece in pieces][-1]
        wrong = torch.ones(1, sum(piece.shape[1] for piece in pieces), dtype=torch.long)
        wrong[:, slice(-3, None) if is_first else 5] = 0  # padding on the right, or a hidden token
        with torch.no_grad(), pytest.raises((ValueError, NotImplementedError)):
            model(pieces[-1], attention_mask=wrong, past_key_values=cache)
        try:
            given = read(model, cache, pieces[-1])
        except RuntimeError as error:
            assert "broke off" in str(error) and "cache.reset()" in str(error)
            cache.reset()
            given = [read(model, cache, piece) for piece in pieces][-1]
        assert torch.equal(given, expected)


@parametrize_hybrids
def test_memory_counts_every_layer(name: str) -> None:
    """States and windows are counted, and what grows with the tokens is the layers that stay whole."""
    model, cache = model_of(name), tight(model_of(name))
    read(model, cache, random_tokens(1, 40))
    sizes = []
    for layer in cache.layers:
        with_states = isinstance(layer, LinearAttentionCacheLayerMixin)
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()] if with_states else []
        keys = [] if getattr(layer, "keys", None) is None else [layer.keys, layer.values]
        sizes.append(sum(each.nbytes for each in (*states, *keys) if each is not None))
    roles = cache.memory()["cpu"]
    assert sum(sizes) <= cache.nbytes == sum(roles.values())
    assert len(cache.num_kept_tokens()) == len(cache.compressed_layers)
    assert len(cache.summary().splitlines()) == len(cache.layers) + 2
    follow(model, cache, random_tokens(1, 30))
    before = cache.nbytes
    follow(model, cache, random_tokens(1, 30))
    whole = [layer for layer in cache.layers if type(layer).__name__ == "DynamicLayer"]
    assert bool(whole) == (name == "gemma3n")
    assert cache.nbytes - before == sum(2 * layer.keys[:, :, :30].nbytes for layer in whole)


@pytest.mark.parametrize("name", WITH_STATES)
def test_states_are_not_taken_back(name: str) -> None:
    model, cache = model_of(name), SnapKVCache(model_of(name).config, budget=4096)
    tokens = random_tokens(1, 20)
    read(model, cache, tokens)
    with pytest.raises(NotImplementedError, match=r"taken tokens up into a state.*cache.reset\(\)"):
        cache.crop(-3)
    cache.crop(0)
    wanted = DynamicCache(config=model.config)
    read(model, wanted, tokens)
    assert torch.equal(read(model, cache, tokens[:, :1]), read(model, wanted, tokens[:, :1]))


def test_convolutions_are_taken_back() -> None:
    """Prompt lookup with a model whose other layers are convolutions."""
    model, prompt = model_of("lfm2"), random_tokens(7, seed=3).repeat(6)
    for settings in ({"budget": 4096}, TIGHT):
        wanted = generate(model, SnapKVCache(model.config, **settings), [prompt], 12).sequences
        cache = SnapKVCache(model.config, **settings)
        output = generate(model, cache, [prompt], 12, prompt_lookup_num_tokens=3)
        if settings is not TIGHT:
            assert torch.equal(output.sequences, wanted)
        assert cache.get_seq_length() >= len(prompt) + 11


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_layers_whose_keys_are_shared_stay_whole(name: str) -> None:
    """Layer 2 of six is the last full-attention layer with keys of its own; layer 4 attends to them."""
    model = model_of(name)
    cache = tight(model)
    read(model, cache, random_tokens(1, 40))
    assert [layer.place.layer_idx for layer in cache.compressed_layers] == [0]
    assert cache.layers[2].keys.shape[2] == 40 and cache.num_kept_tokens() == [12]
    with pytest.raises(ValueError, match="Layer 2 is a DynamicLayer"):
        cache.positions(2)
