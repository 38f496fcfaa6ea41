"""Prompts with images and text: each cache gives what it would without the tokens that it evicts, or refuses by name.

The oracle is the model's own uncached eager attention, one row at a time, in which masks hide what was evicted.
Methods that move or merge tokens are compared with the same cache on the text decoder, given embeddings of images.
"""

import pytest
import torch
from caches import CACHE_CASES, CacheCase, pair_with_caches
from reference import masks_of
from test_architectures import TOLERANCE, run_masked
from test_compatibility import vision_verdict
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from vision_models import (
    VISION_FAMILIES,
    VisionRow,
    build_vision_model,
    drive_vision,
    prompt_of,
    vision_inputs,
    vision_model,
    whole_row,
)

from pyramid_cache import ExpectedAttentionCache, MassiveActivationCache, ShadowKVCache, SnapKVCache, StreamingLLMCache
from pyramid_cache.caches.pyramid.prefill import PrunedPrefill


PROMPTS = [VisionRow((9, 20), seed=1), VisionRow((6, 5, 13), seed=2)]
NEXT_TOKENS = [[VisionRow((1,), seed) for seed in (10 + step, 20 + step)] for step in range(3)]
NEXT_IMAGES = [VisionRow((3, 9), seed) for seed in (3, 5)]
TURNS = [*NEXT_TOKENS[:1], NEXT_IMAGES, *NEXT_TOKENS[1:]]
# What evicts tokens and leaves all others as they are, where they are.
MASKED_CASES = [
    case
    for case in CACHE_CASES
    if case.evicts and not case.compacts and case.cache_class is not StreamingLLMCache and not case.reads_again
]
MOVED_CASES = [case for case in CACHE_CASES if case not in MASKED_CASES and not case.reads_again]


@pair_with_caches("name", VISION_FAMILIES, MASKED_CASES)
def test_every_logit_equals_the_masked_run(name: str, case: CacheCase) -> None:
    """Of a padded batch, its next tokens, a turn with another image, and tokens behind that."""
    if vision_verdict(name, case) != "yes":
        return
    model = vision_model(name)
    cache = case.build(model)
    trace = drive_vision(name, model, cache, PROMPTS, TURNS)
    ends = torch.tensor([0, *trace.pieces]).cumsum(0) - 1
    for index, prompt in enumerate(PROMPTS):
        length = trace.lengths[index]
        masks = masks_of(trace, index, 2)
        if isinstance(cache.masks, PrunedPrefill):  # a layer is given what the one below has kept
            for depth, mask in enumerate(masks[1:]):
                kept = trace.held(0, depth, index, 0)
                mask[:, :length, [column for column in range(length) if column not in kept]] = False
        everything = sum(int(torch.ones_like(mask).tril().sum()) for mask in masks)
        assert sum(int(mask.sum()) for mask in masks) < 0.9 * everything, "nothing to test"
        layers = zip(cache.compressed_layers, masks, strict=True)
        by_index = {layer.place.layer_idx: mask[None] for layer, mask in layers}
        history = [prompt, *(turn[index] for turn in TURNS)]
        logits, _ = run_masked(model, by_index, **whole_row(name, model, history))
        torch.testing.assert_close(trace.logits[index], logits[0, length + ends], atol=TOLERANCE, rtol=0)


@pair_with_caches("name", VISION_FAMILIES)
def test_a_large_budget_is_dynamic_cache(name: str, case: CacheCase) -> None:
    """In `generate` on a padded batch, bit for bit, with a cache from the config, the text config or the model."""
    if vision_verdict(name, case) != "yes":
        return
    model, outputs = vision_model(name), []
    caches = [DynamicCache(config=model.config), case.build(model, "large")]
    if not case.from_model:
        caches += [case.build_from(source, "large") for source in (model.config.get_text_config(), model)]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for cache in caches:
        output = model.generate(**prompt_of(name, PROMPTS), past_key_values=cache, **settings)
        outputs.append((output.sequences, torch.stack(output.logits)))
    for output in outputs[1:]:
        assert all(map(torch.equal, output, outputs[0]))
    tight = model.generate(**prompt_of(name, PROMPTS), past_key_values=case.build(model), **settings)
    # The first logits are exact, unless hidden states are pruned or tokens quantised.
    is_exact = torch.equal(tight.logits[0], outputs[0][1][0])
    assert is_exact or case.prunes_prefill or case.quantizes or case.compacts


def text_decoder_of(model: PreTrainedModel) -> tuple[PreTrainedModel, torch.nn.Module]:
    """A language model with the decoder of a model that reads images, and this decoder."""
    decoder = model.get_decoder()
    text_model = LlamaForCausalLM(model.config.get_text_config())
    text_model.model, text_model.lm_head = decoder, model.lm_head
    return text_model.eval(), decoder


@pair_with_caches("name", ["llava", "smolvlm"], MOVED_CASES)
def test_moved_tokens_are_those_of_the_text_decoder(name: str, case: CacheCase) -> None:
    model, given = build_vision_model(name), []
    text_model, decoder = text_decoder_of(model)
    hook = decoder.register_forward_pre_hook(lambda module, args, named: given.append(named), with_kwargs=True)
    cache = case.build(model)
    trace = drive_vision(name, model, cache, PROMPTS, TURNS)
    hook.remove()
    other = case.build(text_model)
    for step, named in enumerate(given):
        named = {key: named[key] for key in ("inputs_embeds", "attention_mask", "position_ids")}
        with torch.no_grad():
            logits = text_model(**named, past_key_values=other).logits[:, -1]
        assert torch.equal(logits, trace.logits[:, step])
    assert all(torch.equal(cache.positions(index), other.positions(index)) for index in range(3))
    assert max(cache.num_kept_tokens()) < 30 or not case.evicts


# Refusals.


@pytest.mark.parametrize(
    "cache_class", [StreamingLLMCache, ExpectedAttentionCache, MassiveActivationCache, ShadowKVCache]
)
def test_an_image_behind_text_is_noticed(cache_class: type) -> None:
    """With the text config of a model with mrope, text is served; an image in any turn is refused."""
    for name in ("qwen2_vl", "qwen2_5_vl"):
        model = vision_model(name)
        text, image = [VisionRow((40,), 1)], [VisionRow((4, 7), 2)]
        cache = cache_class(model.config.get_text_config(), budget=12)
        for prompts, turns in ((image, []), (text, [image])):
            with pytest.raises(NotImplementedError, match=r"several axes \(mrope\).*image.*leaves keys at"):
                drive_vision(name, model, cache, prompts, turns)
            if turns:  # the cache is as before the turn
                assert cache.get_seq_length() == 40
                drive_vision(name, model, cache_class(model.config.get_text_config(), budget=12), text, [text])


def test_images_in_both_directions_are_refused() -> None:
    """In the first prompt, or in a later one, which leaves the cache as it was."""
    name, rows = "gemma3", [VisionRow((9, 20), seed=1)]
    model = build_vision_model(name)
    for prompts, turns in ((rows, []), ([VisionRow((30,))], [rows])):
        cache = SnapKVCache(model.config, budget=12, window_size=4)
        with pytest.raises(NotImplementedError, match=r"images.*both directions \(.*Gemma 3\).*Use DynamicCache"):
            drive_vision(name, model, cache, prompts, turns)
    with torch.no_grad():
        model(**vision_inputs(name, [[VisionRow((30,))]]), past_key_values=SnapKVCache(model.config, budget=12))
