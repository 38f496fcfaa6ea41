"""Tensors that grow by new tokens behind the held ones of each row."""

from collections.abc import Callable

import torch


# A tensor that grows while an answer is generated grows by this part of its size.
GROWTH = 16


def extended(
    target: torch.Tensor,
    new: torch.Tensor,
    starts: list[int],
    counts: list[int],
    zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Writes the first `counts` new tokens of each row behind its first `starts` tokens, into a larger tensor if there is
    no room for them. Copies to pinned memory of the host may still run when this returns.

    Args:
        target, new (`torch.Tensor`): `(batch, ..., tokens, width)`.
        starts, counts (`list[int]`): Of each row.
        zeros (`Callable`, *optional*): Makes the larger tensor from its shape.
    """
    held, needed = target.shape[-2], max(map(sum, zip(starts, counts, strict=True)))
    if needed > held:
        shape = (*target.shape[:-2], max(needed, held + held // GROWTH), target.shape[-1])
        larger = target.new_zeros(shape) if zeros is None else zeros(shape)
        larger[..., :held, :] = target
        target = larger
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        target[row, ..., start : start + count, :].copy_(new[row, ..., :count, :], non_blocking=True)
    return target
