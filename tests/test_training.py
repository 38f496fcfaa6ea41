"""Caches inside a training loop, and weights that are quantised or adapted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model, random_tokens
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel

from pyramid_cache import CriticalKVCache, PyramidCache, SnapKVCache
from pyramid_cache.engine.projection import projected_norms


TIGHT = {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3}
TOKENS = random_tokens(2, 30)


def answer(model: PreTrainedModel) -> torch.Tensor:
    cache = SnapKVCache(model.config, **TIGHT)
    tokens = model.generate(TOKENS, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert max(cache.num_kept_tokens()) <= 14
    return tokens


def test_generate_between_training_steps() -> None:
    """New weights give new answers, and the train mode of a model without dropout the same ones."""
    model, answers = build_model("llama"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        answers.append(answer(model.eval()))
        assert torch.equal(answer(model.train()), answers[-1])
        model(answers[-1], labels=answers[-1], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(*answers)


def test_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"dropout.*model.eval\(\)"):
        answer(build_model("llama", attention_dropout=0.1).train())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str) -> None:
    """Either the cache is used, or the call says that it is not."""
    model = build_model(name)
    wanted = answer(model)
    model.gradient_checkpointing_enable()
    assert torch.equal(answer(model.eval()), wanted)
    if name == "gpt2" or not hasattr(DynamicCache, "get_conv_state"):  # and all models before transformers 5.24
        with pytest.raises((NotImplementedError, ValueError, RuntimeError), match=r"model.eval\(\)"):
            answer(model.train())
    else:
        assert torch.equal(answer(model.train()), wanted)


def test_projection_of_each_adapter() -> None:
    """The weights that a cache reads are those of the adapter that is set."""
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(build_model("llama"), settings, adapter_name="one")
    adapted.add_adapter("two", settings)
    output, values = adapted.get_base_model().model.layers[0].self_attn.o_proj, torch.randn(1, 2, 5, 16)
    for name in ("one", "two"):
        adapted.set_adapter(name)
        weight = output.base_layer.weight + output.get_delta_weight(name)
        wanted = torch.stack(
            [(values[0, head // 2] @ weight[:, head * 16 :][:, :16].T).norm(dim=-1) for head in range(4)]
        )
        torch.testing.assert_close(
            projected_norms(adapted.get_base_model().model.layers[0].self_attn, values, 2)[0], wanted
        )


def test_wrapped_models() -> None:
    model = build_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(answer(compiled), answer(model))
    assert PyramidCache(compiled, budget=0.4).masks is not None


def test_quanto_weights() -> None:
    """Of 8 bits: those of 4 let a compiler build their unpacking first."""
    quanto = pytest.importorskip("optimum.quanto")
    model = build_model("llama", hidden_size=128, head_dim=32)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    check_projection(model)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_weights(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = build_model("llama", hidden_size=128, head_dim=32)
    quantization.quantize_(model, getattr(quantization, name)())
    check_projection(model)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_bitsandbytes_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build_model("llama", hidden_size=128, head_dim=32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    check_projection(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu"))


def test_compressed_tensors_weights(tmp_path: Path) -> None:
    """A checkpoint of 4 bits in groups of 128, as GPTQ and AWQ leave them. The first forward pass unpacks it."""
    formats = pytest.importorskip("compressed_tensors")
    quantization = formats.quantization
    model = build_model("llama", hidden_size=128, intermediate_size=128, head_dim=32)
    scheme = quantization.preset_name_to_scheme("W4A16", ["Linear"])
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    )
    for layer in (each for each in model.modules() if hasattr(each, "weight_scale")):
        layer.weight_scale.data = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 7.5
    compressor = formats.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.o_proj.weight_packed.dtype == torch.int32
    answer(loaded)
    check_projection(loaded)


def check_projection(model: PreTrainedModel) -> None:
    """The norms behind the output projection are those of what the quantised layer gives."""
    attention, values = model.model.layers[0].self_attn, torch.randn(1, 2, 5, 32)
    inputs = torch.zeros(4, 5, 4, 32)
    for head in range(4):
        inputs[head, :, head] = values[0, head // 2]
    with torch.no_grad():
        wanted = attention.o_proj(inputs.flatten(2)).norm(dim=-1)
        norms = projected_norms(attention, values, 2)[0]
    torch.testing.assert_close(norms, wanted, rtol=2e-2, atol=1e-3)
    cache = CriticalKVCache(model.config, **TIGHT)
    model.generate(TOKENS, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert max(cache.num_kept_tokens()) <= 14
