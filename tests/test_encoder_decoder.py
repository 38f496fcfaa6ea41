"""`EncoderDecoderCache(ours, DynamicCache())`: the decoder's own attention compressed, the encoder's keys kept."""

from functools import cache as remember
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, PLAIN_CASES, CacheCase, parametrize_cases, shadow_within_reach
from models import COMMON, HYBRID, drive, random_tokens
from reference import masks_of
from test_architectures import run_masked
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    set_seed,
)

from pyramid_cache import H2OCache, PyramidCache, ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine.cache import CompressedCache


PROMPT_LENGTH, NEW_TOKENS = 30, 8

TOKENS: dict[str, Any] = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
TOKENS |= {"vocab_size": 101, "decoder_start_token_id": 1, "forced_eos_token_id": None}
# More layers in the decoder than in the encoder: a cache that takes the wrong number does not fit.
LIKE_BART: dict[str, Any] = {
    **TOKENS,
    **{"d_model": 48, "init_std": 0.25, "max_position_embeddings": 128},
    **{"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    **{"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
}
SIZES = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads")
LIKE_LLAMA = {name: COMMON[name] for name in SIZES} | {"vocab_size": 101, "initializer_range": 0.25}
# model type: settings
MODELS: dict[str, dict[str, Any]] = {
    "bart": LIKE_BART,
    "marian": LIKE_BART,
    "whisper": {
        **LIKE_BART,
        **{"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 128},
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")),
    },
    "t5gemma": {
        **TOKENS,
        "encoder": {**LIKE_LLAMA, "num_hidden_layers": 1},
        "decoder": {
            **{**LIKE_LLAMA, **HYBRID},
            **{"num_hidden_layers": 3, "cross_attention_hidden_size": 48, "attn_logit_softcapping": None},
        },
    },
    "moonshine": {
        **TOKENS,
        **{"hidden_size": 48, "intermediate_size": 64, "initializer_range": 0.25},
        **{"encoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4},
        **{"decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 4, "decoder_num_key_value_heads": 4},
    },
}
MODES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True}]


@remember
def model_of(name: str) -> PreTrainedModel:
    """The shared model of a type."""
    torch.manual_seed(sum(name.encode()))
    auto_class = AutoModelForSpeechSeq2Seq if name in ("whisper", "moonshine") else AutoModelForSeq2SeqLM
    model = auto_class.from_config(AutoConfig.for_model(name, **MODELS[name]))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def encoder_inputs(name: str) -> dict[str, torch.Tensor]:
    """Two rows for the encoder, the first one padded where there is a mask."""
    generator = torch.Generator().manual_seed(0)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    if name == "moonshine":
        return {"input_values": torch.randn(2, 4000, generator=generator)}
    return {"input_ids": random_tokens(2, 9), "attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}


def decoder_prompts() -> torch.Tensor:
    """Two rows of `PROMPT_LENGTH` tokens, the first of them the one that `generate` would put there."""
    prompts = random_tokens(2, PROMPT_LENGTH, seed=3)
    prompts[:, 0] = TOKENS["decoder_start_token_id"]
    return prompts


def beside_encoder(cache: Cache) -> EncoderDecoderCache:
    """What transformers is given."""
    return EncoderDecoderCache(cache, DynamicCache())


def generate(name: str, cache: Cache | None, **settings: Any) -> torch.Tensor:
    """The tokens for a decoder prompt in two rows."""
    model = model_of(name)  # which is made with a seed of its own
    set_seed(0)
    return model.generate(
        **encoder_inputs(name),
        decoder_input_ids=decoder_prompts(),
        past_key_values=cache,
        **{"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False} | settings,
    )


def build(case: CacheCase, name: str, budget: str = "tight") -> CompressedCache:
    """A cache for the decoder; from the config, since there is no pruning of hidden states."""
    return case.build_from(model_of(name).config, budget)


def turns_of(case: CacheCase, names: list[str]) -> list[str]:
    """Every second model for a cache of the quick tier, all for others."""
    return names if case.tier == "slow" else names[CACHE_CASES.index(case) % 2 :: 2]


@parametrize_cases(PLAIN_CASES)
def test_modes_of_generate(case: CacheCase) -> None:
    """A large budget gives the tokens of two `DynamicCache`. A tight one evicts, and the cache can be used again."""
    for turn, name in enumerate(turns_of(case, list(MODELS))):
        for mode in MODES if case.tier == "slow" else [MODES[turn % 3]]:
            wanted = generate(name, beside_encoder(DynamicCache()), **mode)
            assert torch.equal(generate(name, beside_encoder(build(case, name, "large")), **mode), wanted), name
            assert torch.equal(generate(name, None, **mode), wanted), name
            ours = build(case, name)
            first = generate(name, beside_encoder(ours), **mode)
            assert ours.batch_size == first.shape[0] * mode.get("num_beams", 1)
            assert ours.get_seq_length() == PROMPT_LENGTH + NEW_TOKENS - 1
            assert max(ours.num_kept_tokens()) < PROMPT_LENGTH or not case.has_budget
            if len(ours.compressed_layers) == len(ours.layers):  # sliding layers of older transformers cannot be reset
                ours.reset()
                assert torch.equal(generate(name, beside_encoder(ours), **mode), first), name


@torch.no_grad()
def check_masked(name: str, cache: CompressedCache) -> None:
    """
    Every logit is that of an uncached decoder whose own attention hides what was evicted. A shadow within reach hides
    nothing.
    """
    model, outputs = model_of(name), encoder_inputs(name)
    prompts, continuation = decoder_prompts(), random_tokens(2, NEW_TOKENS, seed=4)
    encoded = model.get_encoder()(**outputs)
    outputs = {key: value for key, value in outputs.items() if key == "attention_mask"} | {"encoder_outputs": encoded}

    def decode(input_ids: torch.Tensor, **ignored: Any) -> Any:
        return model(decoder_input_ids=input_ids, **outputs, past_key_values=beside_encoder(cache), use_cache=True)

    trace = drive(decode, cache, list(prompts), continuation, with_mask=False)
    tokens, masks = torch.cat([prompts, continuation], dim=1), {}
    kv_heads = trace.positions[0][0].shape[1]
    if not isinstance(cache, ShadowKVCache):
        of_rows = [masks_of(trace, row, kv_heads) for row in range(2)]
        masks = {layer: torch.stack(pair) for layer, pair in enumerate(zip(*of_rows, strict=True))}
    assert not masks or not masks[2][:, :, -1].all()
    wanted, _ = run_masked(model, masks, **outputs, decoder_input_ids=tokens)
    torch.testing.assert_close(trace.logits, wanted[:, PROMPT_LENGTH - 1 :], atol=1e-4, rtol=0)


# Masks do not show what tokens have become that stand for others.
@parametrize_cases(case for case in PLAIN_CASES if not case.compacts)
def test_tight_budgets_are_the_masked_run(case: CacheCase) -> None:
    for name in turns_of(case, ["bart", "moonshine", "marian", "whisper"]):
        if not case.evicts:
            with shadow_within_reach(model_of(name).config) as cache:
                check_masked(name, cache)
            assert all(min(layer.state.row_shadow) > 0 for layer in cache.compressed_layers)
        elif case.cache_class is not StreamingLLMCache or name != "moonshine":  # masks do not show keys that move
            check_masked(name, build(case, name))


def test_an_assistant_is_refused_and_leaves_no_recording_on() -> None:
    """transformers crops no EncoderDecoderCache but that of two DynamicCaches, which it would notice too late."""
    model = model_of("bart")
    cache = EncoderDecoderCache(H2OCache(model.config, budget=6), DynamicCache())
    settings = {**encoder_inputs("bart"), "past_key_values": cache, "do_sample": False, "max_new_tokens": 30}
    with pytest.raises(NotImplementedError, match="EncoderDecoderCache"):
        model.generate(**settings, prompt_lookup_num_tokens=3)
    assert not cache.self_attention_cache.is_croppable
    model.generate(**settings)
    assert cache.self_attention_cache.num_kept_tokens() == [6, 6, 6]


@parametrize_cases(PLAIN_CASES)
def test_refusals(case: CacheCase) -> None:
    """A cache alone would take the encoder's keys for the decoder's: transformers wraps only caches that it makes."""
    for name in ("bart", "whisper"):
        with pytest.raises(ValueError, match=r"EncoderDecoderCache\(cache, DynamicCache\(\)\)"):
            generate(name, build(case, name))
    others = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "led", "prophetnet", "fsmt", "nllb-moe")
    for name in (*others, "bigbird_pegasus"):
        with pytest.raises(NotImplementedError, match=f"'{name}'.*DynamicCache"):
            case.build_from(AutoConfig.for_model(name))
    if case.from_model:  # hidden states beside an encoder are not pruned
        with pytest.raises(NotImplementedError, match="encoder-decoder.*`model.config`"):
            case.build(model_of("bart"))
        assert PyramidCache(model_of("bart"), budget=1.0).num_kept_tokens() == [0, 0, 0]
