"""
Numbers in one byte each, with a scale for each column. The scale goes into the other factor of a product.
"""

import torch

from pyramid_cache.ops.transfer import numbers_on


QUANTIZE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def largest_number(dtype: torch.dtype) -> float:
    """The largest number of a dtype of one byte."""
    return torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max


def scale_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit for numbers whose largest are given: divided by it, they fill the range of a dtype of one byte."""
    return torch.where(largest > 0, largest / largest_number(dtype), 1)


def stored(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in the dtype that stores them."""
    if dtype == torch.int8:
        numbers = numbers.round()
    if dtype.itemsize == 1:
        limit = largest_number(dtype)
        numbers = numbers.clamp(-limit, limit)  # rounding may have left them above
    return numbers.to(dtype)


def widened(held: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Makes room for larger numbers.

    Args:
        held (`torch.Tensor`): `(..., tokens, width)` in a dtype of one byte.
        new (`torch.Tensor`): `(..., more tokens, width)`, in the same unit.

    Returns:
        `tuple`: The held numbers in new units, and the factors of these units, `(..., 1, width)` float32. The factors
        are powers of two, so that other tensors can be multiplied by them without rounding. 1 where the new numbers
        fit.
    """
    # A number that exceeds the range by less than a hundredth is cut off: a unit twice as coarse would cost more.
    excess = new.abs().amax(dim=-2, keepdim=True) / (1.01 * largest_number(held.dtype))
    ratio = excess.clamp(min=1).log2().ceil().exp2()
    return stored(held.float() / ratio, held.dtype), ratio


def add_scaled(
    held: torch.Tensor, scales: torch.Tensor, new: torch.Tensor, rescales: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    New numbers over the scale of each column, which grows if they exceed it.

    Args:
        held (`torch.Tensor`): `(batch, kv_heads, tokens, width)` in a dtype of one byte.
        scales (`torch.Tensor`): `(batch, kv_heads, 1, width)` float32, the factors of the held numbers.
        new (`torch.Tensor`): `(batch, kv_heads, more tokens, width)` float32, zero where there is no token.
        rescales (`list[bool]`): Whether each row gets new scales.

    Returns:
        `tuple`: The held numbers, their scales, and the new numbers divided by these scales.
    """
    if any(rescales):
        is_rescaled = numbers_on(held.device, rescales, torch.bool).view(-1, 1, 1, 1)
        numbers = held.float() * scales
        largest = torch.cat([numbers, new], dim=2).abs().amax(dim=2, keepdim=True)
        scales = torch.where(is_rescaled, scale_of(largest, held.dtype), scales)
        held = torch.where(is_rescaled, stored(numbers / scales, held.dtype), held)
    held, ratio = widened(held, new / scales)
    scales = scales * ratio
    return held, scales, new / scales
