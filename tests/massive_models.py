"""Tiny models with massive activations where a test wants them, made as they arise in trained ones.

One dimension of the hidden state, 0, is written by the embeddings of certain tokens alone and passed on by all layers:
thousands of times larger than the others, it is all that the normalisation leaves of such a token. The first column of
the value projections is nearly zero, so that the token's values are short.
"""

import torch
from models import COMMON, VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM


MASSIVE_TOKEN = 7
MASSIVE_DIMENSION = 0


def massive_model(magnitude: float, num_layers: int = 4, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """
    A Llama in which `MASSIVE_TOKEN`, wherever it stands, has `magnitude` in `MASSIVE_DIMENSION` at the output of every
    layer. Other tokens have about 1 in all other dimensions.
    """
    torch.manual_seed(3)
    config = LlamaConfig(**COMMON | {"num_hidden_layers": num_layers, "vocab_size": vocab_size})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, MASSIVE_DIMENSION] = 0
        embeddings[MASSIVE_TOKEN, MASSIVE_DIMENSION] = magnitude
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:, MASSIVE_DIMENSION] *= 0.01
            # Nothing else writes to the dimension, nor do the massive token's own layers write much.
            layer.self_attn.o_proj.weight[MASSIVE_DIMENSION] = 0
            layer.mlp.down_proj.weight[MASSIVE_DIMENSION] = 0
            layer.mlp.gate_proj.weight[:, MASSIVE_DIMENSION] = 0
            layer.mlp.up_proj.weight[:, MASSIVE_DIMENSION] = 0
    return model
