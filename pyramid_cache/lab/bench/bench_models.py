"""The models that `bench caches` measures with: real ones, and published shapes with random weights."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback, fetch_default_model


NUM_TOKENS = 131072
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPES = {
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40),
    # Small enough for a test on any machine.
    "tiny": (512, 64, 128, 2, 4, 2),
}


def shape_config(name: str) -> LlamaConfig:
    """The config of one of `SHAPES`. What costs no time, such as the kind of RoPE, is that of any Llama."""
    sizes: dict[str, Any] = dict(zip(SIZES.split(), SHAPES[name], strict=True))
    return LlamaConfig(max_position_embeddings=4096 if name == "llama-2-13b" else NUM_TOKENS, **sizes)


def build_model(
    name: str | None, device: torch.device, dtype: str, seed: int, progress: ProgressCallback
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model of a shape, folder or hub id, by default the demo's; and tokens, random or a novel, `(tokens,)`."""
    torch.manual_seed(seed)
    if name in SHAPES:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape_config(name), dtype=getattr(torch, dtype)).eval()
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return model, torch.randint(model.config.vocab_size, (NUM_TOKENS,))
    loaded = load_model(name or fetch_default_model(progress), name or MODEL_NAME, device, dtype)
    ids = loaded.tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return loaded.model, torch.tensor(ids)
