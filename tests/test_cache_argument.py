"""Caches under the name that transformers gives their argument from 5.24 on, and without it; all other tests use the old name."""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from caches import CacheCase, every_cache
from models import random_tokens, tiny_model
from modes import tiny_tokenizer, word
from test_encoder_decoder import decoder_prompts, encoder_inputs, model_of
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from pyramid_cache import H2OCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.demo.timed_answers import generate
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.profile.activations import measure_text
from pyramid_cache.lab.registry import CACHES
from pyramid_cache.lab.weights import no_progress


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


def test_the_name_is_that_of_models_and_of_what_they_return() -> None:
    for model_class in (LlamaForCausalLM, GPT2LMHeadModel):
        assert CACHE_ARGUMENT in inspect.signature(model_class.forward).parameters
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert model(PROMPT, **{CACHE_ARGUMENT: cache})[CACHE_ARGUMENT] is cache


def test_measurements_do_not_warn_of_what_their_users_never_wrote() -> None:
    """What an evaluation reads, asks and answers itself, what a profile reads, and what the demo generates."""
    model = tiny_model("llama")
    generate(model, PROMPT, DynamicCache(config=model.config), 2)
    measure_text(model, tiny_tokenizer(), PROMPT[:1], window_size=8)
    context = Context("made-up", PROMPT[0].tolist(), [Question(LATER[0].tolist(), LATER[1].tolist())])
    results = Evaluation(model, {name: CACHES[name] for name in ("snapkv", "streaming")}, [0.5]).run(
        [context], no_progress
    )
    assert {result.cache for result in results} == {"dynamic", "snapkv", "streaming"}


@named_cache
@every_cache
def test_generate(case: CacheCase) -> None:
    model = tiny_model("llama")
    cache, other = case.build(model), case.build(model)
    tokens = model.generate(PROMPT, cache=cache, **SETTINGS)
    with pytest.warns(FutureWarning, match="past_key_values"):
        wanted = model.generate(PROMPT, past_key_values=other, **SETTINGS)
    assert torch.equal(tokens, wanted)
    assert_same_state(cache, other)


@named_cache
@every_cache
def test_forward(case: CacheCase) -> None:
    model = tiny_model("llama")
    cache, other = case.build(model), case.build(model)
    for tokens in (PROMPT, LATER):
        with torch.no_grad():
            logits = model(tokens, cache=cache).logits[:, -1]
            with pytest.warns(FutureWarning, match="past_key_values"):
                wanted = model(tokens, past_key_values=other).logits[:, -1]
        assert torch.equal(logits, wanted)
    assert_same_state(cache, other)


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


@every_cache
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


@named_cache
@every_cache
def test_pipeline(case: CacheCase) -> None:
    model = tiny_model("llama")
    wanted = model.generate(PROMPT[:1], cache=case.build(model), **SETTINGS)
    writer = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    text = " ".join(word(token) for token in PROMPT[0].tolist())
    cache = case.build(model)
    (answer,) = writer(text, cache=cache, return_tensors=True, **SETTINGS)
    assert answer["generated_token_ids"] == wanted[0].tolist()
    assert cache.get_seq_length() == 51
