"""Every architecture is served as by `DynamicCache` and by the policy, or refused by name when the cache is built.

The oracles run the model's own eager attention, uncached and one row at a time. They mask the keys that the cache had
evicted. For StreamingLLM, the attention module itself gives queries and keys at positions inside the cache.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remember
from typing import Any
from unittest.mock import patch

import pytest
import torch
from caches import CACHE_CASES, PLAIN_CASES, CacheCase, parametrize_cases, shadow_within_reach
from models import (
    ARCHITECTURES,
    FAMILIES,
    LATER_ARCHITECTURES,
    REFUSED_ARCHITECTURES,
    Trace,
    build_config,
    build_model,
    drive,
    generate,
    random_rows,
    random_tokens,
)
from reference import PyramidScore, ReferenceScore, attention_implementation, masks_of
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import LlamaAttention

from pyramid_cache import (
    ExpectedAttentionCache,
    H2OCache,
    MassiveActivationCache,
    PyramidCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
)
from pyramid_cache.caches.pyramid.prefill import PrunedPrefill
from pyramid_cache.caches.scissorhands import ScissorhandsPolicy
from pyramid_cache.engine import architectures
from pyramid_cache.engine.architectures import CACHE_ARGUMENT, reason_against
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.evicting import EvictingLayer


# Those that must know how keys are rotated.
MOVING = (StreamingLLMCache, ExpectedAttentionCache, MassiveActivationCache, ShadowKVCache)
ORACLE = "eager_with_a_policy"
TOLERANCE = 2e-4
# Model types that the oldest supported transformers does not have.
YOUNGER = {"dory", "dots3_note_text", "inkling2_loop_text", "inkling2_text", "sarvam_mla"}
LENGTHS = (25, 37)
SHARED = (-1, None)  # the index of an attention module that several layers of Zamba share
NUM_STEPS = 5

LATER = dict.fromkeys(LATER_ARCHITECTURES, hasattr(modeling_gptj, "eager_attention_forward"))
SERVED = [*FAMILIES, *ARCHITECTURES, *(name for name, is_served in LATER.items() if is_served)]
REFUSED = [*REFUSED_ARCHITECTURES, *(name for name, is_served in LATER.items() if not is_served)]


AttentionMaskInterface.register(ORACLE, eager_mask)


@contextmanager
def attention_by(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """Runs a model with `function` in place of its attention function; masks are made as for eager attention."""
    functions = patch.dict(AttentionInterface._global_mapping, {ORACLE: function})
    shared = {module: module.layer_idx for module in model.modules() if getattr(module, "layer_idx", 0) in SHARED}

    def tell_index(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        module.layer_idx = kwargs["layer_idx"]

    handles = [module.register_forward_pre_hook(tell_index, with_kwargs=True) for module in shared]
    try:
        with functions, attention_implementation(model, ORACLE), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, index in shared.items():
            module.layer_idx = index


def eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The eager attention of the model's own file: with its soft caps, its sinks, its scaling."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


@remember
def model_of(name: str, attention: str) -> PreTrainedModel:
    """The shared model of an architecture."""
    return build_model(name, seed=sum(name.encode()), attention=attention)


def attentions_of(name: str) -> list[str]:
    """Those that the architecture has."""
    try:
        model_of(name, "sdpa")
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)
        return ["eager"]
    return ["sdpa", "eager"]


def reason_to_refuse(case: CacheCase, model: PreTrainedModel) -> str | None:
    """The message, at the latest of the first prompt, where a served architecture cannot serve a cache."""
    if case.heads_compete and model.config.model_type == "gpt_oss":
        return "learned attention sinks"
    if issubclass(case.cache_class, MOVING) and model.config.model_type == "gptj":
        return "reproduced.*leaves keys at"  # a table of sines has turned them
    return None


def is_refused(case: CacheCase, model: PreTrainedModel) -> bool:
    """Whether a cache is refused, with its reason. Hidden states that cannot be pruned are refused at once."""
    reason = reason_to_refuse(case, model)
    if reason is not None:
        with torch.no_grad(), pytest.raises(NotImplementedError, match=reason):
            model(random_tokens(1, 20), past_key_values=case.build(model))
        return True
    try:
        case.build(model)
    except NotImplementedError as error:
        assert case.from_model and type(model).__name__ in str(error) and "`model.config`" in str(error)
        return True
    return False


# What a tight budget must give.


def run_masked(
    model: PreTrainedModel, masks: dict[int, torch.Tensor], **inputs: torch.Tensor
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """An uncached forward in which layers' own attention sees what `masks` `(batch, kv_heads, length, length)` show.

    Returns:
        Logits `(batch, length, vocabulary)` and the probabilities `(batch, heads, length, length)` of these layers.
    """
    probabilities = {}

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs
    ):
        visible = masks.get(getattr(module, "layer_idx", None))
        # An encoder beside the decoder, and the attention to it, have other lengths.
        if visible is None or visible.shape[2:] != (query.shape[2], key.shape[2]):
            return eager(module, query, key, value, mask, **kwargs)
        visible = visible.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        mask = torch.zeros(1).where(visible, torch.finfo(torch.float32).min)
        output, weights = eager(module, query, key, value, mask, **kwargs)
        probabilities[module.layer_idx] = weights
        return output, weights

    with attention_by(model, attend):
        logits = model(**inputs, use_cache=False).logits
    assert probabilities.keys() == masks.keys()
    return logits, probabilities


def check_masked(model: PreTrainedModel, cache: CompressedCache, trace: Trace, rows: list[torch.Tensor]) -> None:
    """Logits are those of a run without what was evicted, and what the policy sees is the attention of that run."""
    layers = [] if isinstance(cache, ShadowKVCache) else cache.compressed_layers  # a shadow within reach hides nothing
    kv_heads = trace.positions[0][0].shape[1]
    score = PyramidScore() if isinstance(cache, PyramidCache) else ReferenceScore()
    for row, prompt in enumerate(rows):
        masks = masks_of(trace, row, kv_heads)[: len(layers)]
        alive = [list(range(len(prompt)))] * len(masks)
        if isinstance(cache.masks, PrunedPrefill):
            alive = [alive[0], *(trace.held(0, depth, row, 0) for depth in range(len(layers) - 1))]
        for mask, columns in zip(masks, alive, strict=True):
            dropped = [column for column in range(len(prompt)) if column not in columns]
            mask[:, : len(prompt), dropped] = False
        by_index = {layer.place.layer_idx: mask[None] for layer, mask in zip(layers, masks, strict=True)}
        logits, probabilities = run_masked(model, by_index, input_ids=torch.cat([prompt, trace.tokens[row]])[None])
        torch.testing.assert_close(trace.logits[row], logits[0, len(prompt) - 1 :], atol=TOLERANCE, rtol=0)
        for layer in layers:
            weights = probabilities[layer.place.layer_idx][0]
            if layer.policy.window_size != 0:
                check_attention(layer, score, row, weights, len(prompt))


def check_attention(
    layer: EvictingLayer, score: ReferenceScore, row: int, weights: torch.Tensor, prompt_length: int
) -> None:
    """
    The policy is shown the mean of the window's last queries, of which each newer one takes over a share. Without a
    window it is the sum over all queries and the heads of a group.
    """
    positions = layer.held_positions()[row]
    given = weights.unflatten(0, (len(positions), -1))  # (kv_heads, group, queries, keys)
    if isinstance(layer.policy, ScissorhandsPolicy):  # which counts what is at least the mean of what a query sees
        mean = given.mean(dim=1, keepdim=True)
        given = (mean >= 1 / (mean > 0).sum(dim=-1, keepdim=True)).float()
    if layer.policy.window_size is None:
        shown = given.sum(dim=(1, 2))
    else:
        window, given = layer.state.row_windows[row], given.mean(dim=1)
        counts = torch.tensor([score.weight(age, window) for age in reversed(range(window))])
        shown = (given[:, prompt_length - window : prompt_length] * counts[:, None]).sum(dim=1) / window
        for query in range(prompt_length, given.shape[1]):
            shown = shown * (1 - 1 / window) + given[:, query] / window
    if layer.policy.heads_share_tokens:
        shown, positions = shown.mean(dim=0, keepdim=True), positions[:1]
    is_held = positions >= 0
    actual, wanted = layer.store.held_attention()[row], shown.gather(-1, positions.clamp(min=0))
    torch.testing.assert_close(actual[is_held], wanted[is_held], atol=TOLERANCE, rtol=0)


class _Recorded(Exception):
    """Ends a probe of an attention module when its queries and keys are there."""


def run_streaming(
    model: PreTrainedModel, tokens: torch.Tensor, prompt_length: int, cache: StreamingLLMCache
) -> torch.Tensor:
    """Logits `(length, vocabulary)` of StreamingLLM, which numbers the keys that a query sees from zero.

    Queries and keys at these numbers are not computed here. The attention module is asked for those of all tokens,
    with the position embeddings that the model makes for each number.
    """
    layers = {layer.place.layer_idx: layer for layer in cache.compressed_layers}
    length, sinks = len(tokens), cache.policy.num_sink_tokens
    window = layers[min(layers)].budget.amount - sinks + 1  # the query's token included
    modules = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in (*layers, *SHARED) and has_keys(module)
    ]
    calls: dict[int, tuple[tuple, dict[str, Any]]] = {}  # by module: what it was called with last
    recorded: list[torch.Tensor] = []

    def note_call(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[id(module)] = (args, kwargs)

    def visible(query: int) -> list[int]:
        if query < prompt_length:
            return list(range(query + 1))
        return [key for key in range(query + 1) if key < sinks or key > query - window]

    def record(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        recorded[:] = query, key
        raise _Recorded

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs
    ):
        if module.layer_idx not in layers:
            return eager(module, query, key, value, mask, **kwargs)
        args, named = calls[id(module)]
        hidden_states = args[0] if args else named["hidden_states"]
        named = {name: given for name, given in named.items() if name != "hidden_states"} | embeddings[id(module)]
        with pytest.raises(_Recorded), attention_by(model, record):
            module.forward(hidden_states.repeat(length, 1, 1), *args[1:], **named)
        queries, keys = recorded  # (length, heads, length, head_dim), by number and token
        outputs = []
        for token in range(length):
            seen = visible(token)
            numbers = torch.arange(len(seen))
            key = keys[numbers, :, seen].transpose(0, 1)[None]
            query = queries[len(seen) - 1 : len(seen), :, token : token + 1]
            outputs.append(eager(module, query, key, value[:, :, seen], None, **kwargs)[0])
        return torch.cat(outputs, dim=1), None

    handles = [module.register_forward_pre_hook(note_call, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            numbers = torch.arange(length)[:, None]
            model(tokens[:1].expand(length, 1), attention_mask=numbers**0, position_ids=numbers, use_cache=False)
        names = ("position_embeddings", "position_ids")
        embeddings = {key: {name: call[1][name] for name in names if name in call[1]} for key, call in calls.items()}
        with attention_by(model, attend):
            return model(tokens[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def has_keys(module: torch.nn.Module) -> bool:
    """Whether a module is an attention module, by its projections."""
    return any(hasattr(module, name) for name in ("k_proj", "qkv_proj", "c_attn", "query_key_value"))


def check_large_budget(model: PreTrainedModel, cache: CompressedCache) -> None:
    """Greedy decoding of a left-padded batch is that of `DynamicCache`, bit for bit."""
    caches, rows = (cache, DynamicCache(config=model.config)), random_rows(LENGTHS)
    output, wanted = (generate(model, each, rows, NUM_STEPS) for each in caches)
    assert torch.equal(output.sequences, wanted.sequences)
    assert torch.equal(torch.stack(output.logits), torch.stack(wanted.logits))


def check_tight_budget(model: PreTrainedModel, cache: CompressedCache) -> None:
    """What is evicted is what the method says, and nothing else is missing from the logits."""
    rows, continuation = random_rows(LENGTHS, seed=7), random_tokens(len(LENGTHS), NUM_STEPS, seed=8)
    if isinstance(cache, ShadowKVCache):
        with shadow_within_reach(model.config) as cache:
            check_masked(model, cache, drive(model, cache, rows, continuation), rows)
        assert all(min(layer.state.row_shadow) > 0 for layer in cache.compressed_layers)
        return
    trace = drive(model, cache, rows, continuation)
    assert max(cache.num_kept_tokens()) < max(LENGTHS)
    if not isinstance(cache, StreamingLLMCache):
        check_masked(model, cache, trace, rows)
        return
    for row, prompt in enumerate(rows):
        wanted = run_streaming(model, torch.cat([prompt, continuation[row]]), len(prompt), cache)[len(prompt) - 1 :]
        torch.testing.assert_close(trace.logits[row], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tier", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, tier: str) -> None:
    """Quickly with three caches in turn, and with all of the tier where attention or the cache's name are special."""
    turn, has_all = SERVED.index(name), tier == "slow" or name in ("gemma2", "gpt_oss", "gpt_neox")
    cases = [case for case in CACHE_CASES if case.tier == tier]
    attentions = attentions_of(name)
    for case in cases if has_all else cases[turn % 2 :: 2]:
        for attention in attentions if has_all else [attentions[turn // 2 % len(attentions)]]:
            model = model_of(name, attention)
            try:
                if not is_refused(case, model):
                    check_large_budget(model, case.build(model, "large"))
                    # transformers' sdpa leaves out the soft cap.
                    has_cap = attention != "eager" and getattr(model.config, "attn_logit_softcapping", None)
                    # No masked run is the oracle of tokens that others have joined.
                    if not has_cap and not case.compacts:
                        check_tight_budget(model, case.build(model))
            except BaseException as error:
                error.add_note(f"with {case.name} and {attention}")
                raise


UNLIKE_LAYERS = {
    "granite_swa": {"layer_types": ["full_attention"] * 3, "layer_rope_theta": [1e4, 1e6, 0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention"], "position_embedding_type": None}
    | {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
    | {"num_local_experts": 0, "shared_intermediate_size": 64, "head_dim": 12},
}


@pytest.mark.parametrize("name", UNLIKE_LAYERS)
@parametrize_cases(case for case in CACHE_CASES if case.cache_class in MOVING and not case.from_model)
def test_layers_that_rotate_apart(case: CacheCase, name: str) -> None:
    """Another base for each layer, or none, although the model has a rotary module: keys turn as the layer's do."""
    if name not in CONFIG_MAPPING:
        pytest.skip("younger than this transformers")
    model = build_model(name, attention="eager", **UNLIKE_LAYERS[name])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.data.fill_(-100)  # the model's own eager attention leaves them out of its weights
    check_tight_budget(model, case.build(model))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_the_oracles_are_the_model_when_all_is_seen(name: str) -> None:
    """And hiding keys from one query changes what follows, and nothing before."""
    model, tokens = model_of(name, "eager"), random_tokens(24)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        wanted = model(tokens[None], past_key_values=cache).logits
    masks = {0: torch.ones(1, cache.layers[0].keys.shape[1], 24, 24, dtype=torch.bool).tril()}
    torch.testing.assert_close(run_masked(model, masks, input_ids=tokens[None])[0], wanted, atol=1e-5, rtol=0)
    streaming = StreamingLLMCache(model.config, budget=24)
    torch.testing.assert_close(run_streaming(model, tokens, 24, streaming), wanted[0], atol=TOLERANCE, rtol=0)
    masks[0][0, 0, 20, 4:18] = False
    difference = (run_masked(model, masks, input_ids=tokens[None])[0] - wanted)[0].abs().amax(dim=-1)
    assert difference[:20].max() < 1e-5 and difference[20] > 10 * TOLERANCE


# Refusals.


@parametrize_cases(PLAIN_CASES)
def test_refused_by_name(case: CacheCase) -> None:
    for name in REFUSED:
        config = build_config(name)
        source = build_model(name, attention="eager") if case.from_model else config
        with pytest.raises((NotImplementedError, ValueError), match=f"(?s)'{config.model_type}'.*Use DynamicCache"):
            case.build_from(source)
    # Later layers attend to the keys of the only full-attention layer.
    for name in ("gemma3n", "gemma4"):
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        sparsity = {"activation_sparsity_pattern": [0.0] * 4} if name == "gemma3n" else {}
        config = build_config(name, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds, **sparsity)
        source = AutoModelForCausalLM.from_config(config) if case.from_model else config
        reason = f"'{config.model_type}'.*only full-attention layer.*DynamicCache"
        with pytest.raises(NotImplementedError, match=reason):
            case.build_from(source)


def test_reasons_are_those_of_the_models() -> None:
    """Each reason with a model that is known for it, and none against one that goes its way."""
    reasons = {
        "deepseek_v3": "latents",
        "falcon": "attention interface",
        "t5": "learned bias of positions",
        "jetmoe": "other keys than those that it stores",
        "dots3_note_text": "latents",  # whose ranks differ by layer
        "diffllama": "more than once",
        "minimax_m3_vl_text": "`block_indices`",
        "mamba": "no cache of keys and values",
        "doge": "hides keys",
        "dory": "repeats layers",
        "minimax": "of its own",
        "kimi_linear": "latents",
        "sarvam_mla": "latents",  # a config of its own, and DeepSeek's classes
    }
    for model_type, reason in reasons.items():
        if model_type in YOUNGER and model_type not in CONFIG_MAPPING:
            continue
        assert reason in reason_against(AutoConfig.for_model(model_type))
    gemma = AutoConfig.for_model("gemma", use_bidirectional_attention=True)  # the decoder of PaliGemma
    assert "both directions" in reason_against(gemma)
    gpt2 = AutoConfig.for_model("gpt2", reorder_and_upcast_attn=True)
    assert reason_against(gpt2) is None
    gpt2._attn_implementation = "eager"
    assert "reorder_and_upcast_attn" in reason_against(gpt2)


@pytest.mark.parametrize("name", ["falcon", "falcon_alibi", "bloom", "mpt", "jetmoe", "diffllama"])
def test_what_the_table_refuses_would_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the table, the first forward passes refuse these."""
    model, tokens = build_model(name, attention="eager"), random_tokens(1, 20)
    monkeypatch.setattr(architectures, "REASON_BY_TYPE", {})
    cache = SnapKVCache(model.config, budget=8, window_size=4)
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)


def test_the_table_names_model_types() -> None:
    assert {name for name in architectures.REASON_BY_TYPE if name not in CONFIG_MAPPING} <= YOUNGER


def test_models_from_elsewhere_are_left_to_the_first_forward() -> None:
    """A config of another package says nothing of its attention: what cannot be served raises when it attends."""

    class OtherConfig(LlamaConfig):
        model_type = "other"

    class OtherAttention(LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple:
            states = hidden_states.view(*hidden_states.shape[:2], 2, -1).transpose(1, 2)
            keys, values = kwargs[CACHE_ARGUMENT].update(states, states, self.layer_idx)
            return scaled_dot_product_attention(states, keys, values).transpose(1, 2).flatten(2), None

    model = build_model("llama")
    model.config.__class__ = OtherConfig
    assert reason_against(model.config) is None
    for layer in model.model.layers:
        layer.self_attn.__class__ = OtherAttention
    with pytest.raises(RuntimeError, match="layer 0 did not go through the attention interface"), torch.no_grad():
        model(random_tokens(1, 20), past_key_values=H2OCache(model.config, budget=8))
