"""Caches under what users put around a model: pipelines, PEFT adapters, accelerate's offloading, several devices."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from caches import CACHE_CASES, CacheCase, every_cache
from models import build_model, generate, left_pad, random_rows, random_tokens, tiny_model
from modes import tiny_tokenizer, word
from peft import LoraConfig, PeftModel, get_peft_model
from places import FIRST, OFFLOADS, SECOND, PlacedConstants, PlacedDispatch, split_map, two_devices
from transformers import Cache, PreTrainedModel, pipeline

from pyramid_cache.caches.pyramid.prefill import PrunedPrefill
from pyramid_cache.engine.architectures import CACHE_ARGUMENT


ROWS = random_rows((40, 28), seed=31)
NEW_TOKENS = 6


def assert_same(output: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Tokens and logits of two runs of `generate`, by default bit for bit."""
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=tolerance, rtol=0)


# Pipelines.


@every_cache
def test_pipeline(case: CacheCase) -> None:
    """The cache goes through the pipeline's arguments for `generate`: one text, and a batch of two lengths."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.padding_side = "left"
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_tensors": True}
    for rows in (ROWS[:1], ROWS):
        wanted, cache = generate(model, case.build(model), rows, NEW_TOKENS).sequences, case.build(model)
        texts = [" ".join(word(token) for token in row.tolist()) for row in rows]
        answers = writer(texts, **{CACHE_ARGUMENT: cache}, batch_size=len(rows), **settings)
        assert [answer[0]["generated_token_ids"] for answer in answers] == wanted.tolist()
        assert cache.get_seq_length() == 40 + NEW_TOKENS - 1


# Adapters.


def build_adapted() -> PeftModel:
    """A tiny Llama with a LoRA adapter that changes what it says."""
    modules = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=modules, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(37)
        return get_peft_model(build_model("llama"), config).eval()


@every_cache
def test_adapter(case: CacheCase) -> None:
    """As the model inside, which PEFT has put the adapter into, and with which the adapted model takes turns."""
    adapted = build_adapted()
    inner = adapted.get_base_model()
    wanted = generate(inner, case.build(inner), ROWS, NEW_TOKENS)
    cache = case.build(adapted)
    assert_same(generate(adapted, cache, ROWS, NEW_TOKENS), wanted)
    if case.prunes_prefill:
        assert isinstance(cache.masks, PrunedPrefill)  # hidden states are pruned, not only keys and values
    plain = build_model("llama")
    without = generate(plain, case.build(plain), ROWS, NEW_TOKENS)
    assert not torch.equal(wanted.sequences, without.sequences)
    with adapted.disable_adapter():
        disabled = generate(adapted, case.build(adapted), ROWS, NEW_TOKENS)
    assert_same(disabled, without, tolerance=1e-4)
    # A cache of the adapted model on the model inside, whose layers are the same: one cache, one sequence.
    expected, cache = case.build(inner), case.build(adapted)
    with torch.no_grad():
        for step in range(6):
            tokens = random_tokens(1, 40 if step == 0 else 1, seed=step)
            output = (adapted if step % 2 else inner)(tokens, past_key_values=cache).logits[:, -1]
            assert torch.equal(output, inner(tokens, past_key_values=expected).logits[:, -1])
    # Merged for a while, and for good: a model of other weights, which the adapter beside them comes close to.
    merged = build_adapted().merge_and_unload()
    wanted = generate(merged, case.build(merged), ROWS, NEW_TOKENS)
    for change in (lambda: None, adapted.merge_adapter, adapted.unmerge_adapter):
        change()
        assert_same(
            generate(adapted, case.build(adapted), ROWS, NEW_TOKENS),
            wanted,
            tolerance=5e-3 if case.quantizes else 1e-3,
        )


# Weights that are elsewhere between forwards.


@every_cache
def test_offloaded_weights(case: CacheCase, tmp_path: Path) -> None:
    """Built before the weights went and after, a cache works as if they had stayed. Each cache has one way in turn."""
    plain, model = build_model("llama"), build_model("llama")
    wanted = generate(plain, case.build(plain), ROWS, NEW_TOKENS)
    before = case.build(model)
    model = [*OFFLOADS.values()][CACHE_CASES.index(case) % 3](model, str(tmp_path))
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    for cache in (before, case.build(model)):
        assert_same(generate(model, cache, ROWS, NEW_TOKENS), wanted)
        assert {str(tensor.device) for layer in cache.layers for tensor in layer.held_tensors().values()} == {"cpu"}


# Layers on several devices.


@pytest.mark.cuda
@pytest.mark.parametrize("num_beams", [1, 3])
@every_cache
def test_layers_on_the_gpu_and_the_cpu(case: CacheCase, num_beams: int) -> None:
    """
    Half of the weights on each: tokens as on the CPU alone. accelerate runs all layers on the GPU, those whose weights
    wait on the CPU too, so that every layer's cache is there.
    """
    plain, model = build_model("llama"), build_model("llama")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": num_beams}
    input_ids, mask = left_pad(ROWS)
    wanted = plain.generate(input_ids, attention_mask=mask, past_key_values=case.build(plain), **settings)
    model = dispatch_model(model, split_map(model, 0, "cpu"), main_device=0)
    cache = case.build(model)
    output = model.generate(input_ids.to(0), attention_mask=mask.to(0), past_key_values=cache, **settings)
    assert torch.equal(output.cpu(), wanted)
    check_devices(cache, ["cuda:0"] * model.config.num_hidden_layers)


@pytest.fixture
def split_model() -> Iterator[PreTrainedModel]:
    """A Llama of two layers, one on each of two devices."""
    with two_devices(build_model("llama", num_hidden_layers=2)) as model:
        yield model


def check_devices(cache: Cache, devices: list[str]) -> None:
    """Every tensor that a layer of the cache calls its own is on the device of the layer."""
    for layer, device in zip(cache.layers, devices, strict=True):
        for name, tensor in layer.state.tensors().items():
            assert str(tensor.device) == device, f"{name} of layer {layer.place.layer_idx}"


@every_cache
def test_layers_on_two_devices(case: CacheCase, split_model: PreTrainedModel) -> None:
    """Beams, then rows that are selected and repeated, then a turn of which some tokens are taken back."""
    plain, input_ids, results = build_model("llama", num_hidden_layers=2), random_tokens(2, 40), []
    _, mask = left_pad(ROWS)
    for model, device in ((plain, "cpu"), (split_model, FIRST)):
        cache = case.build(model)
        settings = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False, "num_beams": 3}
        output = model.generate(input_ids.to(device), attention_mask=mask.to(device), **settings)
        results.append([output.tolist()])
        cache.reset()
        with torch.no_grad():
            model(input_ids.to(device), past_key_values=cache)
            model(random_tokens(2, 1).to(device), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]).to(device))
            cache.batch_repeat_interleave(3)
            cache.reorder_cache(torch.tensor([2, 0, 1]).to(device))
            if case.records:
                cache.activate_past_recording()
                model(random_tokens(3, 5).to(device), past_key_values=cache)
                cache.crop(-2)
            results[-1].append(model(random_tokens(3, 1).to(device), past_key_values=cache).logits.cpu())
    check_devices(cache, [FIRST, SECOND])
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=0)


def test_devices_that_are_mixed_are_noticed() -> None:
    """The stand-in for two devices is as strict as they are."""
    with PlacedConstants(), PlacedDispatch():
        first, second = (torch.ones(3, device=device) for device in (FIRST, SECOND))
        with pytest.raises(RuntimeError, match="xla:0.*xla:1"):
            first + second
        with pytest.raises(RuntimeError, match="another device"):
            first[torch.tensor([0, 1], device=SECOND)]
        assert (first + second.to(FIRST) * 2).tolist() == [3.0, 3.0, 3.0]
        assert (first.to(SECOND) + torch.tensor(2.0)).device == torch.device(SECOND)


# Files.


@every_cache
def test_a_cache_in_use_is_not_pickled(case: CacheCase) -> None:
    """It knows its model by a weak reference, which a file cannot hold: the error names `save`."""
    model = tiny_model("llama")
    cache = case.build(model)
    generate(model, cache, ROWS, 3)
    for save in (pickle.dumps, lambda item: torch.save(item, io.BytesIO())):
        with pytest.raises(TypeError, match="pickled.*`cache.save"):
            save(cache)
