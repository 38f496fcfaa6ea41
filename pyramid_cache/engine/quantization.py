"""
Slots in fewer bits or channels: which tokens are quantised, and how their keys and values are stored.

The latest tokens of each row stay as they came. Older ones are quantised once, in blocks, and keep their codes
wherever they move. Which they are follows from their positions, so that rows of a batch are what they are alone.
Keys may lose channels first (`pyramid_cache.engine.thin_keys`). If they are not quantised, they and their values have
themselves as codes, and no scales.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from pyramid_cache.engine.budget import read_count, read_number
from pyramid_cache.engine.thin_keys import num_channels
from pyramid_cache.ops.quantized import Coded, Packing, Plain, quantize


PACKINGS = {"kivi4": Packing(4), "kivi2": Packing(2), "int8": Packing(8), "fp8": Packing(8, is_float=True)}
# Channels, or tokens, that share a scale in the formats of KIVI.
GROUP_SIZE = 32
# Tokens are quantised in blocks of as many.
BLOCK_LENGTH = 32
# How many of the latest tokens stay as they are, as the papers of KIVI and ThinK have it.
RESIDUAL_LENGTH = 128
THIN_RESIDUAL_LENGTH = 32


@dataclass(frozen=True)
class Quantizer:
    """
    How a layer quantises.

    Attributes:
        format (`str`, *optional*): One of `PACKINGS`. In those of KIVI, 32 channels of a token share a scale, or as
            many as divide both 32 and the width of a head; in the others all channels of a token. None if numbers
            stay as they are.
        residual_length (`int`): How many of the latest tokens of each row stay in full precision, and up to 31 more.
        channel_group (`int`): How many tokens share the scale of each channel of their keys. 0 if the channels of each
            key share scales, as those of a value do; single tokens may then go.
        thin_keys (`float`): Which share of their channels keys lose.
    """

    format: str | None
    residual_length: int
    channel_group: int = 0
    thin_keys: float = 0.0

    @property
    def packing(self) -> Packing:
        return PACKINGS[self.format]

    @property
    def option(self) -> str:
        """What a user gave."""
        if self.channel_group:  # a KIVICache
            return f"`nbits={self.packing.bits}`"
        return f"`thin_keys={self.thin_keys}`" if self.format is None else f"`quantize={self.format!r}`"

    def key_width(self, width: int) -> int:
        """How many channels keys of that width have once they are quantised."""
        return num_channels(width, self.thin_keys)

    @property
    def block_length(self) -> int:
        """How many tokens are quantised at once."""
        return self.channel_group or min(BLOCK_LENGTH, self.residual_length)

    @property
    def most_latest(self) -> int:
        """How many tokens of a row are in full precision at most."""
        return self.residual_length + self.block_length - 1

    def num_quantized(self, row_length: int) -> int:
        """How many of the first tokens of a row of that length are quantised."""
        return max(row_length - self.residual_length, 0) // self.block_length * self.block_length

    def group_of(self, width: int) -> int:
        """How many channels of a token share a scale. Raises ValueError if heads of that width cannot be packed."""
        if self.format not in ("kivi4", "kivi2"):
            return width
        group = math.gcd(GROUP_SIZE, width)
        if group < 4:
            thin = f" without the channels that `thin_keys={self.thin_keys}` drops" if self.thin_keys else ""
            way_out = "Use another cache with" if self.channel_group else "Give"
            raise ValueError(
                f"{self.option}: heads are {width} wide{thin}, which is no multiple of 4, and channels are grouped by "
                f'4 to 32. {way_out} `quantize="int8"`, whose groups are whole heads, or leave it out.'
            )
        return group

    def bytes_per_token(self, key_dim: int, value_dim: int, itemsize: int) -> int:
        """Codes and scales of one token of one head, whose numbers take `itemsize` bytes if they stay as they are."""
        widths = self.key_width(key_dim), value_dim
        if self.format is None:
            return sum(widths) * itemsize
        return sum(width * self.packing.bits // 8 + 4 * (width // self.group_of(width)) for width in widths)

    def stored(self, name: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and scales of "keys" or "values" `(batch, kv_heads, tokens, width)`."""
        if self.format is None:
            return numbers, None
        return quantize(numbers, self.packing, *self._grouping(name, numbers.shape[-1]))

    def coded(self, name: str, codes: torch.Tensor, scales: torch.Tensor | None) -> Coded | Plain:
        """What `stored` gave."""
        if scales is None:
            return Plain(codes)
        return Coded(codes, scales, self.packing, *self._grouping(name, codes.shape[-1] * 8 // self.packing.bits))

    def _grouping(self, name: str, width: int) -> tuple[int, int]:
        """The dimension and the size of groups."""
        return (2, self.channel_group) if name == "keys" and self.channel_group else (3, self.group_of(width))


def read_quantizer(quantize: Any, thin_keys: Any, residual_length: Any) -> Quantizer | None:
    """The arguments of caches. Raises ValueError for unknown ones."""
    thin_keys = 0.0 if thin_keys is None else read_number("thin_keys", thin_keys, "[0, 1)")
    if residual_length is None:
        residual_length = RESIDUAL_LENGTH if quantize is not None else THIN_RESIDUAL_LENGTH
    length = read_count("residual_length", residual_length, least=1)
    if isinstance(quantize, Quantizer):
        return quantize
    if quantize is not None and (not isinstance(quantize, str) or quantize not in PACKINGS):
        raise ValueError(f"`quantize={quantize!r}` is unknown: choose one of {tuple(PACKINGS)}, or None.")
    return None if quantize is None and not thin_keys else Quantizer(quantize, length, thin_keys=thin_keys)
