"""Caches under the name that transformers gives their argument from 5.24 on. Most tests use the old name."""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from caches import PLAIN_CASES, CacheCase, parametrize_cases
from models import random_tokens, tiny_model
from test_encoder_decoder import decoder_prompts, encoder_inputs, model_of
from transformers import Cache, DynamicCache, EncoderDecoderCache, LlamaForCausalLM, PreTrainedModel

from pyramid_cache import H2OCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT


SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
PROMPT = random_tokens(2, 40, seed=70)
LATER = random_tokens(2, 3, seed=71)

named_cache = pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="this transformers knows the old name alone")


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """The old name is an error, but where a test expects the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`past_key_values`", FutureWarning)
        yield


def assert_same_state(cache: Cache, other: Cache) -> None:
    """Both have seen and hold the same."""
    assert cache.get_seq_length() == other.get_seq_length()
    for layer in range(len(cache.layers)):
        assert torch.equal(cache.positions(layer), other.positions(layer))


@named_cache
@parametrize_cases(PLAIN_CASES)
@torch.no_grad()
def test_both_names(case: CacheCase) -> None:
    """Of `generate`, and of the model."""
    model, caches = tiny_model("llama"), [case.build(tiny_model("llama")) for _ in range(2)]
    tokens = model.generate(PROMPT, cache=caches[0], **SETTINGS)
    output = model(LATER, cache=caches[0])
    assert output.cache is caches[0]
    with pytest.warns(FutureWarning, match="past_key_values"):
        assert torch.equal(model.generate(PROMPT, past_key_values=caches[1], **SETTINGS), tokens)
    with pytest.warns(FutureWarning, match="past_key_values"):
        assert torch.equal(model(LATER, past_key_values=caches[1]).logits, output.logits)
    assert_same_state(*caches)


@torch.no_grad()
def run_layers(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Hidden states behind the last layer, `(batch, tokens, hidden_size)`; layers get everything by position."""
    decoder = model.model
    hidden_states = decoder.embed_tokens(tokens)
    position_ids = torch.arange(tokens.shape[1])[None] + cache.get_seq_length()
    embeddings = decoder.rotary_emb(hidden_states, position_ids)
    # Later tokens see all that is held, and each other but not what follows them.
    mask = torch.ones(1, 1, tokens.shape[1], cache.get_seq_length() + tokens.shape[1], dtype=torch.bool)
    mask = mask.tril(cache.get_seq_length())
    for layer in decoder.layers:
        hidden_states = layer(hidden_states, mask, position_ids, cache, True, embeddings)
    return decoder.norm(hidden_states)


@parametrize_cases(PLAIN_CASES)
def test_layers_that_are_called_by_position(case: CacheCase) -> None:
    """With hooks too: those that prune hidden states, and those that look at them."""
    model = tiny_model("llama")
    cache, other = case.build(model), case.build(model)
    for tokens in (PROMPT, LATER):
        states = run_layers(model, tokens, cache)[:, -1]
        with torch.no_grad():
            wanted = model.model(tokens, **{CACHE_ARGUMENT: other}).last_hidden_state[:, -1]
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=0)
    assert_same_state(cache, other)


def test_the_name_is_that_of_models() -> None:
    assert CACHE_ARGUMENT in inspect.signature(LlamaForCausalLM.forward).parameters


@named_cache
def test_encoder_decoder() -> None:
    """Also where decoder layers hand the cache to their own attention and to that over the encoder."""
    model = model_of("bart")
    settings = {**encoder_inputs("bart"), "decoder_input_ids": decoder_prompts(), **SETTINGS}
    caches = [EncoderDecoderCache(H2OCache(model.config, budget=12), DynamicCache()) for _ in range(2)]
    tokens = model.generate(cache=caches[0], **settings)
    with pytest.warns(FutureWarning, match="past_key_values"):
        wanted = model.generate(past_key_values=caches[1], **settings)
    assert torch.equal(tokens, wanted)
    assert caches[0].self_attention_cache.num_kept_tokens() == [12, 12, 12]
    assert_same_state(*(cache.self_attention_cache for cache in caches))
    with pytest.raises(ValueError, match=r"`cache=EncoderDecoderCache\(cache, DynamicCache\(\)\)`"):
        model.generate(cache=H2OCache(model.config, budget=12), **settings)
