"""
The specification of the ops of `pyramid_cache.ops.shadow`, in plain PyTorch on any device.

A chunk that need not be loaded costs nothing here, as it would not in a kernel: chunks to load are found with
`nonzero`, which on CUDA waits for the device. Arithmetic is done in float32, and rounded once to what is written.
"""

import torch

from pyramid_cache.ops.reference import CHUNK_ELEMENTS, grouped_logits, softmax_of_logits


def select_chunks(
    query: torch.Tensor, landmarks: torch.Tensor, mask: torch.Tensor | None, num_chunks: int, scaling: float
) -> torch.Tensor:
    """The specification of `pyramid_cache.ops.shadow.select_chunks`."""
    batch, heads, rows, _ = query.shape
    kv_heads, chunks = landmarks.shape[1], landmarks.shape[2]
    landmarks = landmarks.to(query.dtype)
    scores = torch.zeros(batch, kv_heads, heads // kv_heads, chunks, dtype=torch.float32, device=query.device)
    rows_at_once = max(CHUNK_ELEMENTS // max(batch * heads * chunks, 1), 1)
    for start in range(0, rows, rows_at_once):
        logits = grouped_logits(query[:, :, start : start + rows_at_once], landmarks, scaling, None)
        probabilities, _ = softmax_of_logits(logits, None if mask is None else mask[:, :, None, None])
        scores += probabilities.sum(dim=3)
    scores = scores.amax(dim=2)
    if mask is not None:
        # Scores of landmarks that exist are 0 or more.
        scores = scores.masked_fill(~mask, -1.0)
    selected = scores.topk(min(num_chunks, chunks), dim=-1).indices
    if mask is not None:
        selected = selected.masked_fill(~mask.expand(-1, kv_heads, -1).gather(-1, selected), -1)
    return torch.nn.functional.pad(selected, (0, num_chunks - selected.shape[-1]), value=-1)


def plan_chunks(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The specification of `pyramid_cache.ops.shadow.plan_chunks`."""
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
    positions: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    attention_scaling: float,
    interleaved: bool,
    chunk_size: int,
) -> None:
    """The specification of `pyramid_cache.ops.shadow.reconstruct_keys`."""
    for row in range(buffer.shape[0]):
        for head in range(buffer.shape[1]):
            tokens, slots = loaded_tokens(incoming[row, head], chunk_size, low_rank.shape[1])
            keys = low_rank[row, tokens].float() @ basis[row, head].float()
            angles = positions[row, tokens, None].float() * inverse_frequencies
            cosine, sine = angles.cos() * attention_scaling, angles.sin() * attention_scaling
            buffer[row, head, slots] = rotate(keys, cosine, sine, interleaved).to(buffer.dtype)


def loaded_tokens(incoming: torch.Tensor, chunk_size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens `(loaded,)` of the chunks that a head's places `(places,)` load, and the buffer's slots for them."""
    places = (incoming >= 0).nonzero()  # (chunks, 1)
    offsets = torch.arange(chunk_size, device=incoming.device)
    tokens = (incoming[places] * chunk_size + offsets).flatten()
    slots = (places * chunk_size + offsets).flatten()
    exists = tokens < num_tokens
    return tokens[exists], slots[exists]


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


def gather_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    """The specification of `pyramid_cache.ops.shadow.gather_values`."""
    for row in range(buffer.shape[0]):
        for head in range(buffer.shape[1]):
            tokens, slots = loaded_tokens(incoming[row, head], chunk_size, values.shape[2])
            buffer[row, head, slots] = values[row, head, tokens.to(values.device)].to(buffer.device)
