"""Tensors that grow in one dimension, and writes of new tokens behind the held ones of each row."""

from collections.abc import Callable

import torch


# A tensor that grows while an answer is generated grows by this part of its size.
GROWTH = 16


def with_size(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The tensor with `size` places in a dimension, new ones zero."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])], dim=dim)


def with_room(
    tensor: torch.Tensor,
    dim: int,
    size: int,
    zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The tensor with at least `size` places in a dimension, and some more if it grows by little. New places are zero.
    `zeros` makes the new tensor.
    """
    held = tensor.shape[dim]
    if size <= held:
        return tensor
    if held:
        size = max(size, held + held // GROWTH)
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    result = tensor.new_zeros(shape) if zeros is None else zeros(shape)
    result.narrow(dim, 0, held).copy_(tensor)
    return result


def write_rows(target: torch.Tensor, new: torch.Tensor, starts: list[int], counts: list[int]) -> None:
    """
    Writes the first `counts` new tokens of each row behind its first `starts` tokens, in the dimension before the
    last. Copies to pinned memory of the host may still run when this returns.

    Args:
        target, new (`torch.Tensor`): `(batch, ..., tokens, width)`.
    """
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        target[row].narrow(-2, start, count).copy_(new[row].narrow(-2, 0, count), non_blocking=True)
