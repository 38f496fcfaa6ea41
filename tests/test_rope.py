"""Rotary angles that are found while tiny random models run, compared with what those models do to keys."""

import copy
import itertools
import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import ROPE_VARIANTS, build_config, build_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen2VLConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pyramid_cache import ExpectedAttentionCache, MassiveActivationCache, ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine import rope
from pyramid_cache.engine.rope import SharedFrequencies
from pyramid_cache.engine.rotation import RotaryFrequencies


CPU = torch.device("cpu")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 1.5 * index for index in range(8)],
    "original_max_position_embeddings": 32,
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 64}
LINEAR = {"layer_types": ["full_attention", "linear_attention", "full_attention"], "mlp_only_layers": [0, 1, 2]}
LINEAR |= {"num_hidden_layers": 3}
HYBRID = {"layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 96, "head_dim": 16}
HYBRID |= {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
# What is special in the configs of models that models.py does not have.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "llama4": ("llama4", {"no_rope_layers": [1, 0, 1]}),
    "falcon_rope": ("falcon", {"alibi": False}),
    **{name: (name, TWO_KINDS) for name in ("cohere2", "exaone4", "olmo3")},
    "bamba": ("bamba", {"mamba_d_head": 32}),
    "qwen3_next": ("qwen3_next", LINEAR),
    "hybrid_rope": ("granitemoehybrid", {**HYBRID, "position_embedding_type": "rope"}),
    "hybrid_none": ("granitemoehybrid", {**HYBRID, "position_embedding_type": None}),
    "hybrid_nope": ("granitemoehybrid", {**HYBRID, "position_embedding_type": "nope"}),
    # Positions of three axes, which are equal for text.
    "qwen3_5_text": ("qwen3_5_text", {"layer_types": ["full_attention"] * 3, "rope_parameters": MROPE}),
    "granite_swa": ("granite_swa", {"layer_types": ["full_attention"] * 3, "layer_rope_theta": [1e4, 1e6, 0]}),
}
ALL = (0, 1, 2)
# How the model's file says that it rotates heads: layout, dimensions, and the layers in which it does not.
FAMILIES: dict[str, tuple[str, int, tuple[int, ...]]] = {
    **dict.fromkeys(("llama", *(f"llama_{name}" for name in ROPE_VARIANTS), "longrope"), ("half", 16, ())),
    **dict.fromkeys(("phi3", "phi3_longrope", "qwen3", "gemma", "gemma3", "falcon_rope"), ("half", 16, ())),
    **dict.fromkeys(
        ("olmo2", "olmo3", "granite", "nanochat", "moshi", "gpt_oss", "phimoe", "hybrid_rope"), ("half", 16, ())
    ),
    **dict.fromkeys(("phi", "stablelm", "gpt_neox", "bamba"), ("half", 8, ())),
    "qwen3_next": ("half", 4, ()),
    "qwen3_5_text": ("half", 8, ()),
    "glm4": ("interleaved", 8, ()),
    **dict.fromkeys(("cohere", "helium"), ("interleaved", 16, ())),
    "cohere2": ("interleaved", 16, (1, 2)),
    "llama4": ("interleaved", 16, (1,)),
    "exaone4": ("half", 16, (1, 2)),
    "smollm3": ("half", 16, (1,)),
    "granite_swa": ("half", 16, (2,)),
    **dict.fromkeys(("hybrid_none", "hybrid_nope", "jamba"), ("half", 16, ALL)),
}


def model_of(name: str, **overrides: Any) -> PreTrainedModel:
    model_type, settings = SETTINGS.get(name, (name, {}))
    if name == "granite_swa" and name not in CONFIG_MAPPING:
        pytest.skip("younger than this transformers")
    return build_model(model_type, attention="eager", **{"hidden_size": 64} | settings | overrides)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every decoder layer that has one, in order."""
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and getattr(module, "layer_idx", None) is not None
    ]


def rotary_module(model: PreTrainedModel) -> nn.Module:
    """The only rotary module of a model."""
    (found,) = [module for module in model.modules() if "Rotary" in type(module).__name__]
    return found


def equal(one: RotaryFrequencies, other: RotaryFrequencies) -> bool:
    shared = SharedFrequencies()
    return shared.shared(one) is shared.shared(other)


Found = dict[int, RotaryFrequencies | None]


@torch.no_grad()
def found_in(model: PreTrainedModel, num_tokens: int = 9) -> Found:
    """What is found in each layer that attends, by index, in a forward pass."""
    found: Found = {}

    def note(module: nn.Module, args: tuple) -> None:
        found[module.layer_idx] = SharedFrequencies().frequencies_of(module, CPU)

    hooks = [module.register_forward_pre_hook(note) for module in attention_modules(model)]
    try:
        model(torch.arange(3, 3 + num_tokens)[None], past_key_values=DynamicCache(config=model.config))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def keys_of_one_token(model: PreTrainedModel, position: int) -> list[torch.Tensor]:
    """
    The keys that each layer stores for a sequence of one token at `position`. It attends to itself alone, so its
    hidden states are the same at every position: two positions differ by the rotation of the keys alone.
    """
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
    return [getattr(layer, "keys", None) for layer in cache.layers]


def written_out_rotation(states: torch.Tensor, position: float, inv_freq: torch.Tensor, layout: str) -> torch.Tensor:
    """Rotate `(..., head_dim)` in float64, pair by pair."""
    result = states.double().clone()
    number_of_pairs = len(inv_freq)
    for pair in range(number_of_pairs):
        angle = position * float(inv_freq[pair])
        first = pair if layout == "half" else 2 * pair
        second = pair + number_of_pairs if layout == "half" else 2 * pair + 1
        x, y = states[..., first].double(), states[..., second].double()
        result[..., first] = x * math.cos(angle) - y * math.sin(angle)
        result[..., second] = y * math.cos(angle) + x * math.sin(angle)
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_keys_move_to_where_the_model_would_have_put_them(name: str) -> None:
    """Whatever the first forward pass reads, a single token included; and the angles are the model's bit by bit."""
    layout, rotary_dim, unrotated_layers = FAMILIES[name]
    model = model_of(name)
    found = found_in(model)
    assert len(found) == len(attention_modules(model)) > 0
    # Within the shorter of longrope's two ranges.
    start, shift = 3, 26
    before, after = keys_of_one_token(model, start), keys_of_one_token(model, start + shift)
    alone = found_in(model, num_tokens=1) if name != "granite_swa" else found
    for layer_idx, frequencies in found.items():
        if layer_idx in unrotated_layers:
            assert frequencies is None and alone[layer_idx] is None
            torch.testing.assert_close(before[layer_idx], after[layer_idx], rtol=0, atol=1e-6)
            continue
        assert (frequencies.layout, frequencies.rotary_dim) == (layout, rotary_dim)
        assert frequencies.inv_freq.dtype == torch.float32
        assert equal(frequencies, alone[layer_idx])
        angles = frequencies.angles(torch.tensor(start + shift)) - frequencies.angles(torch.tensor(start))
        moved = frequencies.rotate(before[layer_idx], angles)
        scale = after[layer_idx].abs().max().item()
        assert (before[layer_idx] - after[layer_idx]).abs().max().item() > 0.1 * scale
        torch.testing.assert_close(moved, after[layer_idx], rtol=0, atol=2e-6 * scale)
        if name not in ("granite_swa", "gpt_oss", "moshi", "qwen3_5_text"):  # several modules, half of the width
            kinds = [model.config.layer_types[layer_idx]] if name in ("gemma3", "olmo3") else []
            compare_angles(name, frequencies, rotary_module(model), kinds)


def compare_angles(name: str, frequencies: RotaryFrequencies, rotary: nn.Module, kinds: list[str]) -> None:
    """The angles of a layer against what the rotary module gives for it, called with `kinds` beside the positions."""
    for numbers in ([0, 1, 5, 31], [0, 1, 5, 32], [0, 90, 4097, 999_983]):
        positions = torch.tensor([numbers])
        output = rotary(torch.zeros(1), positions, *kinds)
        angles = frequencies.model_angles(positions, longest=numbers[-1] + 1).float()
        if isinstance(output, torch.Tensor):
            assert torch.equal(torch.polar(torch.ones_like(angles), angles), output)
            continue
        scaling = output[0][0, 0, 0]  # position 0: the cosine of zero times the factor
        interleaved = name in ("cohere", "cohere2")
        emb = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
        sign = -1 if name == "nanochat" else 1  # turns the other way
        assert torch.equal(emb.cos() * scaling, output[0])
        assert torch.equal(sign * emb.sin() * scaling, output[1])


@pytest.mark.parametrize("name", ["longrope", "phi3_longrope"])
def test_longrope_switches_with_the_longest_position_of_the_forward(name: str) -> None:
    model = model_of(name)
    frequencies = found_in(model)[0]
    assert frequencies.original_max_position_embeddings == 32
    position = torch.tensor([[7]])
    plain = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    for longest, factors in ((32, "short_factor"), (33, "long_factor")):
        angles = frequencies.model_angles(position, longest)
        torch.testing.assert_close(
            angles[0, 0], 7 * plain / torch.tensor(LONGROPE[factors]).double(), rtol=1e-6, atol=0
        )
        assert torch.equal(frequencies.model_angles(position, torch.tensor(longest)), angles)
        assert torch.allclose(frequencies.angles(position), angles) == (longest == 32)

    # Keys stored on either side of the switch meet in the frame of the short factors.
    in_prefill, after_switch = keys_of_one_token(model, 20)[0], keys_of_one_token(model, 50)[0]
    target = frequencies.angles(torch.tensor(4))
    from_prefill = frequencies.rotate(in_prefill, target - frequencies.model_angles(torch.tensor(20), 21))
    from_switch = frequencies.rotate(after_switch, target - frequencies.model_angles(torch.tensor(50), 51))
    torch.testing.assert_close(from_prefill, from_switch, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "longrope", "smollm3"])
def test_frequencies_are_those_the_model_multiplies_with(name: str, dtype: torch.dtype) -> None:
    """In float32 where a model is loaded at half precision, and rounded where it was cast later."""
    exact = model_of(name)
    cast = copy.deepcopy(exact).to(dtype)
    original, rounded = found_in(exact)[0], found_in(cast)[0]
    loaded = found_in(AutoModelForCausalLM.from_config(exact.config, dtype=dtype, attn_implementation="eager").eval())
    assert equal(loaded[0], original)
    assert [found is None for found in loaded.values()] == [found is None for found in found_in(exact).values()]
    assert torch.equal(rounded.inv_freq, original.inv_freq.to(dtype).float())
    assert not torch.equal(rounded.inv_freq, original.inv_freq)
    for longest in (32, 33, 1000):
        positions = torch.tensor([[0, 3, longest - 1]])
        output = rotary_module(cast)(torch.zeros(1), positions)
        angles = rounded.model_angles(positions, longest).float()
        assert torch.equal(angles.cos() * output[0][0, 0, 0], output[0][..., : angles.shape[-1]])


def test_models_without_rope_give_none() -> None:
    """Positions are added to what the first layer gets, or to logits."""
    for name in ("gpt2", "opt"):
        model = build_model(name, attention="eager")
        for num_tokens in (1, 9):
            found = found_in(model, num_tokens)
            assert len(found) == 3 and set(found.values()) == {None}


# What is refused.


def check_refused(message: str, model: PreTrainedModel, num_tokens: int = 9) -> None:
    with pytest.raises(NotImplementedError, match=message):
        found_in(model, num_tokens)


def test_frequencies_that_follow_the_length_are_refused() -> None:
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    check_refused("depend on the length", build_model("llama", rope_parameters=rope_parameters))
    # Under another name.
    model = build_model("llama")
    rotary = rotary_module(model)
    plain_forward = type(rotary).forward

    class GrowingRotaryEmbedding(type(rotary)):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if position_ids.max() >= 128:
                self.inv_freq = self.original_inv_freq * 128 / (position_ids.max() + 1)
            return plain_forward(self, x, position_ids)

    rotary.__class__ = GrowingRotaryEmbedding
    check_refused("depend on the length", model)
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)


@pytest.mark.parametrize("cache", [StreamingLLMCache, ExpectedAttentionCache, MassiveActivationCache, ShadowKVCache])
def test_configs_that_tell_are_refused_at_once(cache: type) -> None:
    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    with_images, text = Qwen2VLConfig(text_config={"rope_parameters": mrope}), build_config("llama")
    text.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for config, message in ((with_images, "several axes.*get_text_config"), (text, "dynamic NTK.*'yarn'")):
        with pytest.raises(NotImplementedError, match=f"rotates keys by .*{message}.*leaves keys at"):
            cache(config, budget=8)


def test_other_kinds_of_attention_are_refused() -> None:
    # DeepSeek hands latents to the cache in the place of keys, and the rotated part in the place of values.
    check_refused("latent", build_model("deepseek_v3", attention="eager"))
    # RoFormer is handed sines that no module of it made.
    model = build_model("roformer", attention="eager", is_decoder=True)
    for num_tokens in (1, 9):
        check_refused("no single module makes", model, num_tokens)
    # HunYuan normalises keys after RoPE. With a weight per dimension a stored key cannot be turned any more.
    model = build_model("hunyuan_v1_dense")
    check_refused("angles that could not be reproduced", model)
    with torch.no_grad():
        for module in attention_modules(model):
            module.key_layernorm.weight.fill_(1.5)
    assert found_in(model)[0].layout == "half"
    # One token at position 0 does not tell with which base it was turned.
    check_refused("Start with several tokens", model_of("granite_swa"), num_tokens=1)


def test_rounding_of_values_is_measured_by_values() -> None:
    """A projection may sum the entries of equal rows in other orders: rows then differ by some eps of the values."""
    model = build_model("llama")
    for module in attention_modules(model):
        module.k_proj.weight.data *= 0.01
        module.v_proj.register_forward_hook(
            lambda module, args, output: output * (1 + 1e-6 * torch.arange(output.shape[1])[:, None].remainder(2))
        )
    found = found_in(model)
    assert len(found) == 3 and all(each is not None for each in found.values())


def test_rotations_that_cannot_be_reproduced_are_refused() -> None:
    model = build_model("llama")
    module = attention_modules(model)[0]
    plain_class = type(module)

    class AttentionWithSwappedPairs(plain_class):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            order = [1, 0, *range(2, 8), 9, 8, *range(10, 16)]
            swapped = tuple(part[..., order] for part in position_embeddings)
            return super().forward(hidden_states, swapped, attention_mask, past_key_values, **kwargs)

    class AttentionThatTurnsMore(plain_class):
        def forward(self, hidden_states, position_embeddings, **kwargs):
            return super().forward(hidden_states, tuple(part * part for part in position_embeddings), **kwargs)

    for attention_class in (AttentionWithSwappedPairs, AttentionThatTurnsMore):
        module.__class__ = attention_class
        check_refused("could not be reproduced", model)
    module.__class__ = plain_class
    found = found_in(model)[0]
    again = SharedFrequencies().frequencies_of(module, CPU)  # it is not running: what was found last
    assert equal(again, found) and again is not found  # which may remember turns of its own
    with pytest.raises(NotImplementedError, match="found while it runs.*leaves keys at"):
        SharedFrequencies().frequencies_of(attention_modules(build_model("llama"))[0], CPU)
    nn.init.zeros_(module.k_proj.weight)
    check_refused("load the weights first", model)


def test_each_layer_is_probed_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was found in one of two models is nothing to the other."""
    probe = Mock(wraps=rope._probe)
    monkeypatch.setattr(rope, "_probe", probe)

    def probes_of(model: PreTrainedModel, num_tokens: int = 9) -> tuple[int, RotaryFrequencies]:
        probe.reset_mock()
        found = found_in(model, num_tokens)
        return probe.call_count, found[1]

    model, other = model_of("llama"), model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    num_probes, exact = probes_of(model)
    assert num_probes == 3 and not equal(exact, probes_of(other)[1])
    num_probes, found = probes_of(model, 1)
    assert num_probes == 0 and equal(found, exact)
    with torch.no_grad():
        model(torch.arange(20)[None], past_key_values=MassiveActivationCache(model.config, budget=12))
    assert probe.call_count == 0
    rotary = rotary_module(model)

    def check(inv_freq: torch.Tensor) -> None:
        num_probes, found = probes_of(model)
        assert num_probes == 3 and torch.equal(found.inv_freq, inv_freq.float())
        assert probes_of(model)[0] == 0

    # The buffer is rounded, widened again, changed in place, and replaced; then the whole module is, and its model.
    model.to(torch.bfloat16)
    check(rounded := exact.inv_freq.bfloat16())
    model.float()
    check(rounded)
    rotary.inv_freq.mul_(0.5)
    check(rounded / 2)
    rotary.inv_freq.data.mul_(0.5)
    check(rounded / 4)
    rotary.inv_freq = exact.inv_freq.clone()
    check(exact.inv_freq)
    kept = model.model.rotary_emb
    model.model.rotary_emb = rotary_module(other)
    check(rotary_module(other).inv_freq)
    model.model.rotary_emb = kept
    check(exact.inv_freq)
    model.load_state_dict(model.state_dict())  # keys are those of other weights
    assert probes_of(model)[0] == 3
    # A layer that is called on its own has the frequencies of its config.
    alone = attention_modules(model_of("llama"))[0]
    config = alone.config
    for theta in (1e4, 10.0):
        config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        angles = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
        cache = MassiveActivationCache(config, budget=12)
        with torch.no_grad():
            alone(torch.ones(1, 9, 64), angles, None, past_key_values=cache)
        assert equal(cache.layers[0].rotary_of(alone), exact) == (theta == 1e4)
    with torch.inference_mode():  # whose tensors do not tell that they are changed
        rotary.inv_freq = exact.inv_freq.clone()
        probes_of(model)
        rotary.inv_freq.mul_(0.5)
        assert torch.equal(probes_of(model)[1].inv_freq, exact.inv_freq / 2)


def test_longrope_that_has_switched_is_found_alike() -> None:
    model = model_of("longrope")
    found = [found_in(model, num_tokens)[0] for num_tokens in (9, 40, 9, 40)]
    assert all(equal(each, found[0]) for each in found)


def test_probe_leaves_no_trace() -> None:
    model = model_of("longrope")
    rotary, module = rotary_module(model), attention_modules(model)[0]
    model(torch.arange(3, 43)[None])  # with the long frequencies, which the probe changes last
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.register_forward_hook(lambda *_: calls.append(1))
    tensors = [dict(model.named_buffers()), dict(model.named_parameters())]
    before, attributes = copy.deepcopy(tensors), set(vars(rotary))
    random_state, config = torch.get_rng_state(), model.config.to_dict()
    found_in(model, num_tokens=40)
    assert len(calls) == 2
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(rotary)) == attributes
    assert model.config.to_dict() == config
    for named, wanted in zip((model.named_buffers(), model.named_parameters()), before, strict=True):
        named = dict(named)
        assert named.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in named.items())


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotate_against_written_out_rotation(layout: str) -> None:
    """In every precision, of whole heads and of parts, at a position per row, head and token, as slots hold them."""
    generator = torch.Generator().manual_seed(3)
    inv_freq = torch.rand(5, generator=generator)
    frequencies = RotaryFrequencies(inv_freq, layout=layout)
    for dtype, tolerance, head_dim in (
        (torch.float64, 1e-12, 10),
        (torch.float32, 1e-6, 14),
        (torch.float16, 2e-3, 10),
        (torch.bfloat16, 2e-2, 14),
    ):
        states = torch.randn(3, 2, 5, head_dim, generator=generator).to(dtype)
        untouched, expected = states.clone(), torch.empty(3, 2, 5, head_dim, dtype=torch.float64)
        positions = torch.randint(-50, 5000, (3, 2, 5), generator=generator)
        rotated = frequencies.rotate(states, frequencies.angles(positions))
        assert rotated.dtype == dtype and rotated.shape == states.shape
        assert torch.equal(states, untouched)
        for place in itertools.product(range(3), range(2), range(5)):
            expected[place] = written_out_rotation(states[place], int(positions[place]), inv_freq.double(), layout)
        torch.testing.assert_close(rotated.double(), expected, rtol=tolerance, atol=tolerance)
