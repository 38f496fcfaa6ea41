"""Rotary angles measured from tiny random models, compared with what those models really do."""

import copy
import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from models import ROPE_VARIANTS, build_config, build_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.rope import RotaryFrequencies, rotary_frequencies


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 1.5 * index for index in range(8)],
    "original_max_position_embeddings": 32,
}


TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 64}
# What is special in the configs of models that models.py does not have.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "llama4": ("llama4", {"no_rope_layers": [1, 0, 1]}),
    "cohere2": ("cohere2", TWO_KINDS),
    "olmo3": ("olmo3", TWO_KINDS),
    "falcon_rope": ("falcon", {"alibi": False}),
}
# How the model's file says that it rotates heads: layout, dimensions, and the layers in which it does not.
FAMILIES: dict[str, tuple[str, int, tuple[int, ...]]] = {
    **dict.fromkeys(("llama", *(f"llama_{name}" for name in ROPE_VARIANTS), "longrope"), ("half", 16, ())),
    **dict.fromkeys(("phi3", "phi3_longrope", "qwen3", "gemma", "gemma3", "falcon_rope"), ("half", 16, ())),
    **dict.fromkeys(("olmo2", "olmo3", "granite", "nanochat"), ("half", 16, ())),
    **dict.fromkeys(("phi", "stablelm", "gpt_neox"), ("half", 8, ())),
    "smollm3": ("half", 16, (1,)),
    "glm4": ("interleaved", 8, ()),
    "cohere": ("interleaved", 16, ()),
    "cohere2": ("interleaved", 16, (1, 2)),
    "helium": ("interleaved", 16, ()),
    "llama4": ("interleaved", 16, (1,)),
}


def model_of(name: str, **overrides: Any) -> PreTrainedModel:
    name, settings = SETTINGS.get(name, (name, {}))
    return build_model(name, **{"hidden_size": 64} | settings | overrides)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every decoder layer, in order."""
    found = [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and getattr(module, "layer_idx", None) is not None
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def rotary_module(model: PreTrainedModel) -> nn.Module:
    """The only rotary module of a model."""
    (found,) = [module for module in model.modules() if "Rotary" in type(module).__name__]
    return found


@torch.no_grad()
def keys_of_one_token(model: PreTrainedModel, position: int) -> list[torch.Tensor]:
    """
    The keys that each layer stores for a sequence of one token at `position`. It attends to itself alone, so its
    hidden states are the same at every position: two positions differ by the rotation of the keys alone.
    """
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
    return [layer.keys for layer in cache.layers]


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
    """With the model and with its config alone; and the angles are those of the rotary module bit by bit."""
    layout, rotary_dim, unrotated_layers = FAMILIES[name]
    model = model_of(name)
    modules = attention_modules(model)
    assert [module.layer_idx for module in modules] == [0, 1, 2]
    # Within the shorter of longrope's two ranges.
    start, shift = 3, 26
    before, after = keys_of_one_token(model, start), keys_of_one_token(model, start + shift)
    for layer_idx, module in enumerate(modules):
        for given in (None, model):
            frequencies = rotary_frequencies(module, model.config, model=given)
            if layer_idx in unrotated_layers:
                assert frequencies is None
                torch.testing.assert_close(before[layer_idx], after[layer_idx], rtol=0, atol=1e-6)
                continue
            assert frequencies is not None
            assert (frequencies.layout, frequencies.rotary_dim) == (layout, rotary_dim)
            assert frequencies.inv_freq.dtype == torch.float32
            angles = frequencies.angles(torch.tensor(start + shift)) - frequencies.angles(torch.tensor(start))
            moved = frequencies.rotate(before[layer_idx], angles)
            scale = after[layer_idx].abs().max().item()
            assert (before[layer_idx] - after[layer_idx]).abs().max().item() > 0.1 * scale
            torch.testing.assert_close(moved, after[layer_idx], rtol=0, atol=2e-6 * scale)
        if frequencies is not None:
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
    frequencies = rotary_frequencies(attention_modules(model)[0], model.config)
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


@pytest.mark.parametrize("name", ["llama", "longrope"])
def test_buffers_that_were_cast_with_the_model(name: str) -> None:
    model = model_of(name)
    original = rotary_frequencies(attention_modules(model)[0], model.config).inv_freq
    model.to(torch.bfloat16)
    module = attention_modules(model)[0]
    frequencies = rotary_frequencies(module, model.config, model=model)
    assert torch.equal(frequencies.inv_freq, original.bfloat16().float())
    assert not torch.equal(frequencies.inv_freq, original)
    # The cast is invisible without the model.
    assert torch.equal(rotary_frequencies(module, model.config).inv_freq, original)
    for longest in (32, 33, 1000):
        positions = torch.tensor([[0, 3, longest - 1]])
        cosine, _ = rotary_module(model)(torch.zeros(1), positions)
        angles = frequencies.model_angles(positions, longest).float()
        assert torch.equal(torch.cat([angles, angles], dim=-1).cos() * cosine[0, 0, 0], cosine)


def test_half_precision_weights_leave_frequencies_in_float32() -> None:
    for name, dtype in (("llama", torch.bfloat16), ("glm4", torch.float16), ("smollm3", torch.bfloat16)):
        exact = model_of(name)
        model = AutoModelForCausalLM.from_config(exact.config, dtype=dtype).eval()
        for module, other in zip(attention_modules(model), attention_modules(exact), strict=True):
            expected = rotary_frequencies(other, exact.config)
            for given in (None, model):
                found = rotary_frequencies(module, model.config, model=given)
                assert (found is None) == (expected is None)
                if found is not None:
                    assert found.layout == expected.layout
                    assert torch.equal(found.inv_freq, expected.inv_freq)


def test_models_without_rope_give_none() -> None:
    hybrid = {"layer_types": ["attention"] * 3, "position_embedding_type": "nope", "num_local_experts": 0}
    hybrid |= {"hidden_size": 64, "shared_intermediate_size": 96}
    for name in ("gpt2", "opt", "bloom", "mpt", "falcon_alibi", "jamba", "granitemoehybrid"):
        model = build_model(name, attention="eager", **hybrid if name == "granitemoehybrid" else {})
        modules = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        assert modules
        for module, given in itertools.product(modules, (None, model)):
            assert rotary_frequencies(module, model.config, model=given) is None, name


# What is refused.


def check_refused(
    message: str, module: nn.Module, config: PreTrainedConfig, model: PreTrainedModel | None = None
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        rotary_frequencies(module, config, model=model)


def test_dynamic_ntk_is_refused() -> None:
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build_model("llama", rope_parameters=rope_parameters)
    check_refused("dynamic NTK.*'yarn'", attention_modules(model)[0], model.config)
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
    check_refused("depend on the length", attention_modules(model)[0], model.config, model)


def test_other_kinds_of_attention_are_refused() -> None:
    config = build_config("qwen2_5_vl_text")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    model_file = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    check_refused("several axes", model_file.Qwen2_5_VLAttention(config, layer_idx=0), config)

    # DeepSeek hands latents to the cache in the place of keys, and the rotated part in the place of values.
    model = build_model("deepseek_v3")
    check_refused("latent", attention_modules(model)[0], model.config)

    # RoFormer turns keys inside an attention class without a rotary module.
    model = build_model("roformer", attention="eager", is_decoder=True)
    module = next(module for module in model.modules() if type(module).__name__ == "RoFormerSelfAttention")
    check_refused("No rotary module", module, model.config)

    # HunYuan normalises keys after RoPE. With a weight per dimension a stored key cannot be turned any more.
    model = build_model("hunyuan_v1_dense")
    module = attention_modules(model)[0]
    check_refused("do not turn the keys", module, model.config)
    with torch.no_grad():
        module.key_layernorm.weight.fill_(1.5)
    assert rotary_frequencies(module, model.config).layout == "half"


def test_rotations_that_cannot_be_reproduced_are_refused() -> None:
    model = build_model("llama")
    module = attention_modules(model)[0]
    plain_class = type(module)

    class AttentionThatNeedsMore(plain_class):
        def forward(self, hidden_states, position_embeddings, segments, **kwargs):
            return super().forward(hidden_states + segments.sum(), position_embeddings, **kwargs)

    class AttentionWithSwappedPairs(plain_class):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None):
            order = [1, 0, *range(2, 8), 9, 8, *range(10, 16)]
            swapped = tuple(part[..., order] for part in position_embeddings)
            return super().forward(hidden_states, swapped, attention_mask, past_key_values)

    module.__class__ = AttentionThatNeedsMore
    check_refused("could not be probed", module, model.config, model)
    module.__class__ = AttentionWithSwappedPairs
    check_refused("do not turn the keys", module, model.config, model)
    module.__class__ = plain_class
    with pytest.raises(ValueError, match="no part of the given LlamaForCausalLM"):
        rotary_frequencies(module, model.config, model=build_model("llama"))
    nn.init.zeros_(module.k_proj.weight)
    check_refused("load the weights first", module, model.config)
    check_refused("meta device", module.to("meta"), model.config)


def test_probe_leaves_no_trace() -> None:
    model = model_of("longrope")
    rotary, module = rotary_module(model), attention_modules(model)[0]
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.register_forward_hook(lambda *_: calls.append(1))
    tensors = [dict(model.named_buffers()), dict(model.named_parameters())]
    before, attributes = copy.deepcopy(tensors), set(vars(rotary))
    random_state, config = torch.get_rng_state(), model.config.to_dict()
    rotary_frequencies(module, model.config, model=model)
    rotary_frequencies(module, model.config)
    assert not calls
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
