"""Numbers in one byte each, with a unit for each column. The unit goes into the other factor of a product."""

import torch

from pyramid_cache.ops.transfer import numbers_on


QUANTIZE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def largest_number(dtype: torch.dtype) -> float:
    """The largest number of a dtype of one byte."""
    return torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max


def unit_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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
    Makes room for numbers that are larger than those `(..., tokens, width)` that are held in a dtype of one byte. The
    new ones `(..., more tokens, width)` have the same unit. Returns the held ones in a new unit, and how many of the
    old it is, `(..., 1, width)` float32: a power of two, by which other tensors can be multiplied without rounding.
    """
    # A number that exceeds the range by less than a hundredth is cut off: a unit twice as coarse would cost more.
    excess = new.abs().amax(dim=-2, keepdim=True) / (1.01 * largest_number(held.dtype))
    ratio = excess.clamp(min=1).log2().ceil().exp2()
    return stored(held.float() / ratio, held.dtype), ratio


def add_scaled(
    held: torch.Tensor, units: torch.Tensor, new: torch.Tensor, remeasures: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The held numbers `(batch, kv_heads, tokens, width)` in one byte, their units `(batch, kv_heads, 1, width)` float32,
    and new numbers divided by these. Units grow where new numbers exceed them, and are chosen anew in rows that ask.
    """
    if any(remeasures):
        is_measured = numbers_on(held.device, remeasures, torch.bool).view(-1, 1, 1, 1)
        numbers = held.float() * units
        largest = torch.cat([numbers, new], dim=2).abs().amax(dim=2, keepdim=True)
        units = torch.where(is_measured, unit_of(largest, held.dtype), units)
        held = torch.where(is_measured, stored(numbers / units, held.dtype), held)
    held, ratio = widened(held, new / units)
    units = units * ratio
    return held, units, new / units
