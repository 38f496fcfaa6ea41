"""
The ops of `pyramid_cache.ops.shadow` for the CPU: what `shadow_reference` does for each row and head in turn, with as
few calls of torch as that takes. A chunk that need not be loaded costs nothing.
"""

import torch

from pyramid_cache.ops.shadow_reference import rotate


def reconstruct_keys(
    buffer: torch.Tensor,
    low_rank: torch.Tensor,
    basis: torch.Tensor,
    incoming: torch.Tensor,
    positions: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    attention_scaling: float,
    interleaved: bool,
    chunk_size: int,
) -> None:
    """`pyramid_cache.ops.shadow.reconstruct_keys`."""
    batch, kv_heads = incoming.shape[:2]
    (rows, heads, slots), tokens = loaded(incoming, chunk_size, low_rank.shape[1])
    # In order of rows and heads, each of which has a basis of its own.
    counts = torch.bincount(rows * kv_heads + heads, minlength=batch * kv_heads).tolist()
    factors = low_rank[rows, tokens].float().split(counts)
    bases = basis.flatten(0, 1).float().unbind(0)
    keys = torch.cat([part @ base for part, base in zip(factors, bases, strict=True) if part.shape[0]] or [factors[0]])
    if not keys.shape[0]:
        return
    if inverse_frequencies.numel():
        angles = positions[rows, tokens, None].float() * inverse_frequencies
        keys = rotate(keys, angles.cos() * attention_scaling, angles.sin() * attention_scaling, interleaved)
    buffer[rows, heads, slots] = keys.to(buffer.dtype)


def gather_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    """`pyramid_cache.ops.shadow.gather_values`."""
    (rows, heads, slots), tokens = loaded(incoming, chunk_size, values.shape[2])
    buffer[rows, heads, slots] = values[rows, heads, tokens]


def loaded(
    incoming: torch.Tensor, chunk_size: int, num_tokens: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The slots that incoming chunks are loaded into, as rows, heads and slots, and the tokens that go there."""
    rows, heads, places = incoming.ge(0).nonzero(as_tuple=True)
    offsets = torch.arange(chunk_size, device="cpu")
    tokens = incoming[rows, heads, places][:, None] * chunk_size + offsets
    slots = places[:, None] * chunk_size + offsets
    exists = tokens < num_tokens
    rows, heads = (index[:, None].expand_as(tokens)[exists] for index in (rows, heads))
    return (rows, heads, slots[exists]), tokens[exists]
