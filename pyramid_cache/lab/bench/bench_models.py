"""The models that `bench caches` measures with: real ones, and published shapes with random weights."""

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback, fetch_default_model


SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPES = {
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40),
    # Small enough for a test on any machine.
    "tiny": (512, 64, 128, 2, 4, 2),
}
LONGEST = {"llama-2-13b": 4096}
LLAMA_3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def shape_config(name: str) -> LlamaConfig:
    """The config of one of `SHAPES`."""
    sizes: dict[str, Any] = dict(zip(SIZES.split(), SHAPES[name], strict=True))
    if name == "llama-3.1-8b":
        sizes |= {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA_3_ROPE}
    return LlamaConfig(max_position_embeddings=LONGEST.get(name, 131072), **sizes)


def build_model(
    name: str | None, device: torch.device, dtype: str, seed: int, progress: ProgressCallback
) -> tuple[PreTrainedModel, torch.Tensor]:
    """
    A model, and tokens for it to read.

    Args:
        name (`str`, *optional*): A shape of `SHAPES`, or a folder or hub id; by default the demo's model.
        seed (`int`): Seed of random weights and tokens.

    Returns:
        The model and tokens, `(tokens,)`: 131,072 random ones for a shape, those of the novel for a real model.
    """
    torch.manual_seed(seed)
    if name in SHAPES:
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                model = LlamaForCausalLM(shape_config(name)).eval()
        finally:
            torch.set_default_dtype(default)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return model, torch.randint(model.config.vocab_size, (131072,))
    loaded = load_model(name or fetch_default_model(progress), name or MODEL_NAME, device, dtype)
    ids = loaded.tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return loaded.model, torch.tensor(ids)
