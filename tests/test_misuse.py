"""Models that are copied, saved, compiled, trained or run in mixed precision, with a cache as with `DynamicCache`."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_config, build_model, generate, left_pad, random_rows, random_tokens
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, StreamingLLMCache


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "pyramid_config": lambda model: PyramidCache(model.config, budget=0.4),
    "pyramid_model": lambda model: PyramidCache(model, budget=0.4),
    "h2o": lambda model: H2OCache(model.config, budget=12),
    "streaming_llm": lambda model: StreamingLLMCache(model.config, budget=12),
}


def test_a_hooked_model_can_be_copied_and_saved() -> None:
    """The copy is a model of its own."""
    model, tokens = build_model("llama"), random_tokens(1, 40)
    PyramidCache(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        wanted = model(tokens, past_key_values=PyramidCache(model)).logits[:, -1]
        copies = [torch.load(file, weights_only=False), copy.deepcopy(model)]
        del model
        for twin, attention in zip(copies, ("sdpa", "eager"), strict=True):
            twin.set_attn_implementation(attention)
            output = twin(tokens, past_key_values=PyramidCache(twin)).logits[:, -1]
            torch.testing.assert_close(output, wanted, atol=1e-4 if attention == "eager" else 0, rtol=0)


def test_layers_put_into_a_hooked_model_are_hooked_too() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 40)
    PyramidCache(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    with torch.no_grad():
        logits = model(tokens, past_key_values=PyramidCache(model)).logits
    assert logits[:, -1].isfinite().all() and logits[:, 5:-20].isnan().any()


@pytest.mark.parametrize("name", CACHES)
def test_half_precision(name: str) -> None:
    """Under autocast, and where unscaled logits exceed the largest float16."""
    model, rows = build_model("llama"), random_rows((40,))
    with torch.autocast("cpu", torch.bfloat16):
        output = generate(model, CACHES[name](model), rows, 5)
    assert torch.stack(output.logits).isfinite().all()
    model.half()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 40
    for cache in (DynamicCache(config=model.config), CACHES[name](model)):
        assert torch.stack(generate(model, cache, rows, 5).logits).isfinite().all()


@pytest.mark.parametrize("name", ["pyramid_config", "h2o"])
def test_gradients_reach_the_tokens_that_were_kept(name: str) -> None:
    """Of the prompt's keys and values, those that a later token attends to get their gradient."""
    model, tokens = build_model("llama"), random_tokens(1, 41)
    cache = CACHES[name](model)
    model(tokens[:, :40], past_key_values=cache, logits_to_keep=1)
    kept = cache.layers[0].keys
    kept.retain_grad()
    model(tokens[:, 40:].repeat(1, 2), past_key_values=cache).logits.sum().backward()
    assert kept.grad is not None and kept.grad.abs().max() > 0


@every_cache
def test_gradients_over_several_steps(case: CacheCase) -> None:
    """
    Where nothing is evicted they are those of `DynamicCache`. What is written must not be what autograd has saved,
    also where only queries have gradients.
    """
    model, tokens = build_model("llama"), random_tokens(2, 44)

    def gradient(cache: Cache) -> torch.Tensor:
        model.zero_grad()
        loss = model(tokens[:, :30], past_key_values=cache).logits[:, -1].sum()
        for step in range(30, 44):
            loss = loss + model(tokens[:, step : step + 1], past_key_values=cache).logits.sum()
        loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    for trained in ("", "layers.0.self_attn.q_proj"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        wanted = gradient(DynamicCache(config=model.config))
        torch.testing.assert_close(gradient(case.build(model, "large")), wanted, atol=1e-3, rtol=1e-4)
        # Those of dropped tokens are not numbers; values from the host have none, which is refused.
        if not case.from_model and case.evicts:
            assert gradient(case.build(model)).isfinite().all()


@pytest.mark.slow
def test_a_compiled_model_with_hooks() -> None:
    """The prompt too, whose hidden states are pruned."""
    model, tokens = build_model("llama", num_hidden_layers=2), random_tokens(1, 42)
    caches, logits = [PyramidCache(model, budget=0.4) for _ in range(2)], []
    with torch.no_grad():
        for run, cache in zip((torch.compile(model, backend="eager"), model), caches, strict=True):
            pieces = [tokens[:, :40], *tokens[:, 40:].split(1, dim=1)]
            logits.append(torch.cat([run(piece, past_key_values=cache).logits[:, -1] for piece in pieces]))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert torch.equal(caches[0].positions(0), caches[1].positions(0))


def test_chunked_prefill_of_a_padded_batch() -> None:
    """The first chunk of a row may be all padding. A stream does not care how it is cut."""
    model = build_model("llama")
    input_ids, mask = left_pad(random_rows((19, 60)))
    cut, whole = (
        model.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=StreamingLLMCache(model.config, budget=12),
            max_new_tokens=8,
            do_sample=False,
            prefill_chunk_size=chunk,
        )
        for chunk in (20, None)
    )
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("length", [20, 50, 400])
def test_short_prompts_with_dense_first_layers(length: int) -> None:
    """What the dense layer takes comes off the minimum of the others, which fits any prompt."""
    model = build_model("llama")
    for settings in ({"budget": 0.5, "prune_own_layer": False}, {"budget": 0.6, "first_pruned_layer": 1}):
        cache = PyramidCache(model, **settings)
        with torch.no_grad():
            logits = model(random_tokens(1, length), past_key_values=cache, logits_to_keep=1).logits
        kept = cache.num_kept_tokens()
        assert logits.isfinite().all() and kept[0] == length
        assert sum(kept) == round(3 * settings["budget"] * length)


def test_streaming_llm_takes_the_rotation_of_the_model_that_runs() -> None:
    """A config that differs in what the cache cannot see from outside does no harm."""
    other = build_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model, tokens = build_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        output, wanted = (
            model(tokens, past_key_values=StreamingLLMCache(config, budget=12)).logits
            for config in (other, model.config)
        )
    assert torch.equal(output, wanted)
