"""The models that `bench caches` measures with: real ones, and published shapes with random weights, which are as fast."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyramid_cache.lab.demo.planted_number import read_text
from pyramid_cache.lab.loaded_model import load_model
from pyramid_cache.lab.weights import MODEL_NAME, ProgressCallback, fetch_default_model


SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-2-13b": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
    ),
    # Small enough for a test on any machine.
    "tiny": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
    ),
}


def build_model(
    name: str | None, device: torch.device, dtype: str, seed: int, progress: ProgressCallback
) -> tuple[PreTrainedModel, torch.Tensor]:
    """
    A model, and tokens for it to read.

    Args:
        name (`str`, *optional*): A shape of `SHAPES`, or a folder or hub id; the demo's model if not given.
        dtype (`str`): Of its weights.
        seed (`int`): Of random weights and tokens.

    Returns:
        `tuple[PreTrainedModel, torch.Tensor]`: The model; and of a shape 131,072 random tokens, of a real model those of the
            novel, `(tokens,)`.

    Raises:
        OSError, ValueError: See `load_model`.
    """
    torch.manual_seed(seed)
    if name in SHAPES:
        config = SHAPES[name]()
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return model, torch.randint(config.vocab_size, (131072,))
    folder = name or fetch_default_model(progress)
    loaded = load_model(folder, name or MODEL_NAME, device, dtype)
    ids = loaded.tokenizer(read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return loaded.model, torch.tensor(ids)
