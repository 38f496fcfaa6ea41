"""What values become behind the output projection of an attention layer: the norms of `v W_O`, head by head."""

from typing import Any

import torch
from torch import nn


# The names that transformers' models give to the output projection of an attention layer.
NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# Elements of projected values that are held at once: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


def projected_norms(module: nn.Module, value: torch.Tensor, order: int) -> torch.Tensor:
    """
    The norms of values behind the output projection.

    Args:
        module (`nn.Module`): The attention layer.
        value (`torch.Tensor`): `(batch, kv_heads, tokens, value_dim)`.
        order (`int`): 1 for the sum of absolute values, 2 for the Euclidean norm.

    Returns:
        `torch.Tensor`: `(batch, heads, tokens)` float32: for each query head, the norm of what it adds to the hidden
            state if all its attention goes to the token.

    Raises:
        ValueError: For another order.
        NotImplementedError: See `find_projection`.
    """
    if order not in (1, 2):
        raise ValueError(f"`order={order!r}`: the norms of values are of order 1 (sum of absolutes) or 2 (Euclidean).")
    batch_size, kv_heads, num_tokens, value_dim = value.shape
    projection = find_projection(module, kv_heads, value_dim)
    num_heads = input_width(projection) // value_dim
    norms = value.new_empty(batch_size, num_heads, num_tokens, dtype=torch.float32)
    for head in range(num_heads):
        weight = weight_of_head(projection, head, value_dim, value)
        given = value[:, head // (num_heads // kv_heads)].float()
        if order == 2:
            norms[:, head] = ((given @ (weight @ weight.mT)) * given).sum(dim=-1).clamp(min=0).sqrt()
            continue
        tokens_per_chunk = max(CHUNK_ELEMENTS // (batch_size * weight.shape[1]), 1)
        for start in range(0, num_tokens, tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            norms[:, head, chunk] = (given[:, chunk] @ weight).abs().sum(dim=-1)
    return norms


def find_projection(module: nn.Module, kv_heads: int, value_dim: int, query_heads: int | None = None) -> Any:
    """
    The output projection of an attention layer. Raises NotImplementedError if it has none under a known name, or one
    whose width does not fit so many KV heads of this width, or so many query heads if they are given.
    """
    projection = next((getattr(module, name) for name in NAMES if hasattr(module, name)), None)
    width = 0 if projection is None else input_width(projection)
    head_width = (kv_heads if query_heads is None else query_heads) * value_dim
    if not width or width % (kv_heads * value_dim) or (query_heads is not None and width != head_width):
        raise NotImplementedError(
            f"{type(module).__name__} has no output projection that is known ({', '.join(NAMES)}), whose width "
            f"({width}) fits that of its heads ({head_width}). If processes have parts of it and all heads (`tp_plan` "
            "of Phi-3 or OLMo 2), it does not. Use a cache that does not weigh values."
        )
    return projection


def input_width(projection: Any) -> int:
    """The width of what a linear layer takes; 0 if it does not say."""
    weight = getattr(projection, "weight", None)
    if hasattr(weight, "to_local"):  # of a `DTensor` each rank has a part
        return weight.to_local().shape[1]
    if hasattr(projection, "in_features"):
        return int(projection.in_features)
    return projection.weight.shape[0] if hasattr(projection, "nf") else 0  # GPT-2's Conv1D


def weight_of_head(projection: Any, head: int, value_dim: int, like: torch.Tensor) -> torch.Tensor:
    """
    The rows of `W_O` that a head is multiplied with, `(value_dim, hidden_size)` float32. Quantised layers, adapters,
    and layers whose weights are elsewhere until they run are asked what they make of unit vectors.
    """
    columns = slice(head * value_dim, (head + 1) * value_dim)
    weight: Any = getattr(projection, "weight", None)
    is_plain = type(weight) is nn.Parameter or hasattr(weight, "to_local")  # torchao's are quantised under nn.Linear
    if type(projection) is nn.Linear and is_plain and weight.device == like.device:
        return (weight.to_local() if hasattr(weight, "to_local") else weight)[:, columns].mT.float()
    units = like.new_zeros(value_dim + 1, input_width(projection))
    units[:value_dim, columns] = torch.eye(value_dim, dtype=like.dtype, device=like.device)
    # Not `projection(...)`: hooks, which may count or capture calls, must not see this.
    outputs = projection.forward(units).float()
    return outputs[:-1] - outputs[-1]
