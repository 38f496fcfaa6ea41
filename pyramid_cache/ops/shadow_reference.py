"""
The ops of `pyramid_cache.ops.shadow` in plain PyTorch, for the CPU and for devices without Triton kernels.

Of a chunk that need not be loaded nothing is read, as in a kernel: what to load is found with `nonzero`, which on CUDA
waits for the device. Arithmetic is done in float32, and rounded once to what is written.
"""

import torch

from pyramid_cache.ops.reference import grouped_logits


def select_chunks(
    query: torch.Tensor, landmarks: torch.Tensor, mask: torch.Tensor, num_chunks: int, scaling: float
) -> torch.Tensor:
    is_hidden, missing = ~mask, num_chunks - landmarks.shape[2]
    logits = grouped_logits(query, landmarks.to(query.dtype), scaling, None)
    probabilities = torch.softmax(logits.masked_fill(is_hidden[:, :, None, None], float("-inf")), dim=-1)
    # (batch, kv_heads, chunks); what may be taken has 0 or more.
    scores = probabilities.squeeze(3).amax(dim=2).masked_fill(is_hidden, -1.0)
    selected = scores.topk(num_chunks if missing < 0 else landmarks.shape[2], dim=-1).indices
    selected = selected.masked_fill(is_hidden.gather(-1, selected), -1)
    return selected if missing <= 0 else torch.nn.functional.pad(selected, (0, missing), value=-1)


def plan_chunks(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    # (batch, kv_heads, places, wanted)
    is_same = (held[..., :, None] == wanted[..., None, :]) & (wanted >= 0)[..., None, :]
    stays = is_same.any(dim=-1)
    is_missing = (wanted >= 0) & ~is_same.any(dim=-2)
    # The n-th missing chunk goes to the n-th free place. One more column takes what goes nowhere.
    num_places = held.shape[-1]
    rank = torch.where(is_missing, is_missing.cumsum(dim=-1) - 1, num_places)
    missing = wanted.new_full((*wanted.shape[:-1], num_places + 1), -1).scatter(-1, rank, wanted)
    missing[..., num_places] = -1
    incoming = missing.gather(-1, torch.where(stays, num_places, (~stays).cumsum(dim=-1) - 1))
    held.copy_(torch.where(stays, held, incoming))
    return incoming


def reconstruct_keys(
    buffer: torch.Tensor,
    low_rank: torch.Tensor,
    basis: torch.Tensor,
    incoming: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    interleaved: bool,
    chunk_size: int,
) -> None:
    batch, kv_heads = incoming.shape[:2]
    (rows, heads, slots), tokens = loaded(incoming, chunk_size, low_rank.shape[1])
    # In order of rows and heads, each of which has a basis of its own.
    counts = torch.bincount(rows * kv_heads + heads, minlength=batch * kv_heads).tolist()
    factors = low_rank[rows, tokens].float().split_with_sizes(counts)
    bases = basis.flatten(0, 1).float().unbind(0)
    keys = torch.cat([part @ base for part, base in zip(factors, bases, strict=True) if part.shape[0]] or [factors[0]])
    if not keys.shape[0]:
        return
    if inverse_frequencies.numel():
        angles = tokens[:, None].float() * inverse_frequencies
        keys = rotate(keys, angles.cos(), angles.sin(), interleaved)
    buffer[rows, heads, slots] = keys.to(buffer.dtype)


def gather_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    (rows, heads, slots), tokens = loaded(incoming, chunk_size, values.shape[2])
    source = rows, heads, tokens
    if values.device != buffer.device:
        source = rows.to(values.device), heads.to(values.device), tokens.to(values.device)
    buffer[rows, heads, slots] = values[source].to(buffer.device)


def loaded(
    incoming: torch.Tensor, chunk_size: int, num_tokens: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The slots that incoming chunks are loaded into, as rows, heads and slots, and the tokens that go there."""
    offsets = torch.arange(chunk_size, device=incoming.device)
    # (batch, kv_heads, places * chunk_size), below 0 where there is no chunk.
    tokens = torch.add(offsets, incoming[..., None], alpha=chunk_size).flatten(2)
    rows, heads, slots = ((tokens >= 0) & (tokens < num_tokens)).nonzero(as_tuple=True)
    return (rows, heads, slots), tokens[rows, heads, slots]


def rotate(keys: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """
    Rotates the first dimensions of keys `(tokens, head_dim)` by cosines and sines `(tokens, rotary_dim / 2)`.

    `interleaved` pairs dimension `2 i` with `2 i + 1`, otherwise `i` goes with `i + rotary_dim / 2`.
    """
    rotary_dim = 2 * cosine.shape[-1]
    rotated, rest = keys[:, :rotary_dim], keys[:, rotary_dim:]
    if interleaved:
        first, second = rotated[:, 0::2], rotated[:, 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    first, second = first * cosine - second * sine, second * cosine + first * sine
    if interleaved:
        return torch.cat([torch.stack([first, second], dim=-1).flatten(1), rest], dim=-1)
    return torch.cat([first, second, rest], dim=-1)
