"""Tensors that grow by new tokens behind the held ones of each row."""

from collections.abc import Callable

import torch


# A tensor that grows while an answer is generated grows by this part of its size.
GROWTH = 16


def extended(
    held: torch.Tensor,
    new: torch.Tensor,
    starts: list[int],
    counts: list[int],
    zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Writes the first `counts` of new tokens `(batch, ..., tokens, width)` of each row behind its first `starts` held
    ones, in place or, without room, in a larger tensor, which `zeros` makes. Copies to the host may still run then.
    """
    size, needed = held.shape[-2], max(map(sum, zip(starts, counts, strict=True)))
    if needed > size:
        shape = (*held.shape[:-2], max(needed, size + size // GROWTH), held.shape[-1])
        larger = held.new_zeros(shape) if zeros is None else zeros(shape)
        larger[..., :size, :] = held
        held = larger
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        held[row, ..., start : start + count, :].copy_(new[row, ..., :count, :], non_blocking=True)
    return held
