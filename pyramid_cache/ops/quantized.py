"""
Keys and values in 8, 4 or 2 bits, or in fewer channels, and attention of one query over them, tile by tile.

Numbers of a group share a scale. In the integer formats a number is `low + scale * code`: `low` is the least number of
the group, and the codes are 0 to `2 ** bits - 1` (Liu et al., 2024, KIVI, https://arxiv.org/abs/2402.02750, Section
3.1). In float8 it is `scale * code`. Codes of less than a byte are packed: the first of them in the lowest bits of all
bytes, so that `head_dim` channels take `head_dim * bits / 8` bytes, and slices of channels unpack without a shuffle.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pyramid_cache.ops.reference import softmax_of_logits


FLOAT8 = torch.float8_e4m3fn
# Elements of the tiles of `attend_in_tiles`, which stay in the processor's cache; on other devices launches cost more.
TILE_ELEMENTS = {"cpu": 1 << 19}
TILE_ELEMENTS_ELSEWHERE = 1 << 24


class Packing(NamedTuple):
    """How numbers are stored: in so many `bits`, as integers or as float8."""

    bits: int
    is_float: bool = False

    @property
    def num_levels(self) -> int:
        """How many steps there are between the least and the largest number of a group."""
        return (1 << self.bits) - 1


def quantize(numbers: torch.Tensor, packing: Packing, dim: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Codes and scales of numbers `(batch, kv_heads, tokens, width)`.

    Args:
        packing (`Packing`): The format.
        dim (`int`): Which numbers are a group: neighbouring channels of a token (3), or neighbouring tokens of a
            channel (2).
        group_size (`int`): How many; it divides that size.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Codes `(batch, kv_heads, tokens, width * bits / 8)` uint8; and scales
            `(batch, kv_heads, tokens, 2 * groups)`, or `(batch, kv_heads, groups, 2 * width)` if tokens are grouped:
            those of all groups and then their least numbers, in float16. In float8 there are scales alone, in float32.
    """
    grouped = numbers.float().unflatten(dim, (-1, group_size))
    if packing.is_float:
        scale = grouped.abs().amax(dim=dim + 1) / torch.finfo(FLOAT8).max
        codes = grouped / scale.masked_fill(scale == 0, 1).unsqueeze(dim + 1)
        return codes.flatten(dim, dim + 1).to(FLOAT8).view(torch.uint8), scale
    lows, highs = grouped.aminmax(dim=dim + 1)
    low = as_float16(lows)
    # Of the numbers as they are stored, so that what is rounded here is made up for by the codes.
    scale = as_float16((highs - low.float()) / packing.num_levels)
    steps = scale.float().masked_fill(scale == 0, 1).unsqueeze(dim + 1)
    codes = ((grouped - low.float().unsqueeze(dim + 1)) / steps).round_().clamp_(0, packing.num_levels)
    packed, *later = codes.flatten(dim, dim + 1).to(torch.uint8).chunk(8 // packing.bits, dim=-1)
    for index, part in enumerate(later, start=1):
        packed = packed | part << packing.bits * index
    return packed.contiguous(), torch.cat([scale, low], dim=-1)


def restore(
    codes: torch.Tensor, scales: torch.Tensor, packing: Packing, dim: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The numbers `(..., tokens, width)` of what `quantize` gave, in that dtype; of a slice of whole groups, too."""
    if packing.is_float:
        numbers = codes.view(FLOAT8).float().unflatten(dim, (-1, group_size))
        return numbers.mul_(scales.unsqueeze(dim + 1)).flatten(dim, dim + 1).to(dtype)
    width, num_parts = codes.shape[-1], 8 // packing.bits
    numbers = torch.empty(*codes.shape[:-1], width * num_parts, dtype=torch.float32, device=codes.device)
    for index in range(num_parts):
        shifted = codes >> packing.bits * index if index else codes
        part = shifted if index == num_parts - 1 else shifted & packing.num_levels
        numbers[..., index * width : (index + 1) * width] = part
    scale, low = (each.unsqueeze(dim + 1) for each in scales.float().chunk(2, dim=-1))
    return numbers.unflatten(dim, (-1, group_size)).mul_(scale).add_(low).flatten(dim, dim + 1).to(dtype)


def as_float16(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in float16. Larger ones become the largest."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).half()


class Coded(NamedTuple):
    """What `quantize` gave for keys or values, or a slice of their tokens."""

    codes: torch.Tensor
    scales: torch.Tensor
    packing: Packing
    dim: int
    group_size: int

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers `(batch, kv_heads, tokens, width)` in that dtype."""
        return restore(*self, dtype)

    @property
    def multiplies_codes(self) -> bool:
        """Whether products take the codes as they are, and scales come into the results: a third of the time."""
        return self.dim == 3 and not self.packing.is_float

    def pieces(self) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Codes `(batch * kv_heads, tokens, any)` in float32 of channels that share a scale; with their slice."""
        codes, (bits, _), width = self.codes.flatten(0, 1), self.packing, self.codes.shape[-1]
        for part in range(8 // bits):
            shifted = codes >> bits * part if part else codes
            numbers = (shifted if (part + 1) * bits == 8 else shifted & self.packing.num_levels).float()
            start, first = 0, part * width
            while start < width:  # a group may reach from one part into the next
                group = (first + start) // self.group_size
                stop = min((group + 1) * self.group_size - first, width)
                yield slice(first + start, first + stop), group, numbers[..., start:stop]
                start = stop

    def _by_group(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and least numbers, `(batch * kv_heads, groups, tokens)` float32."""
        scales = self.scales.flatten(0, 1).mT.float()
        return scales[:, : scales.shape[1] // 2], scales[:, scales.shape[1] // 2 :]

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """The products `(batch * kv_heads, group, tokens)` float32 of queries `(batch * kv_heads, group, width)`."""
        if not self.multiplies_codes:
            return torch.bmm(query, self.restored(query.dtype).flatten(0, 1).mT).float()
        query, (scale, low) = query.float(), self._by_group()
        logits = torch.bmm(query.unflatten(-1, (-1, self.group_size)).sum(dim=-1), low)
        for channels, group, codes in self.pieces():
            logits.addcmul_(torch.bmm(query[..., channels], codes.mT), scale[:, group, None])
        return logits

    def weighted(self, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sums `(batch * kv_heads, group, width)` float32 of the numbers, with weights `(..., group, tokens)`."""
        if not self.multiplies_codes:
            return torch.bmm(weights.to(dtype), self.restored(dtype).flatten(0, 1)).float()
        scale, low = self._by_group()
        sums = torch.bmm(weights, low.mT).repeat_interleave(self.group_size, dim=-1)
        for channels, group, codes in self.pieces():
            sums[..., channels] += torch.bmm(weights * scale[:, group, None], codes)
        return sums


class Plain(NamedTuple):
    """Keys or values `(batch, kv_heads, tokens, width)` as they came, where `Coded` has codes."""

    numbers: torch.Tensor

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        return self.numbers.to(dtype)

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        return torch.bmm(query, self.restored(query.dtype).flatten(0, 1).mT).float()

    def weighted(self, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.bmm(weights.to(dtype), self.restored(dtype).flatten(0, 1)).float()


class Thin(NamedTuple):
    """Keys of so many `width` channels, of which `held` has those at `channels` `(batch, kv_heads, any)` int64."""

    held: Coded | Plain
    channels: torch.Tensor
    width: int

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """The keys, with 0 in the other channels."""
        held = self.held.restored(dtype)
        keys = held.new_zeros(*held.shape[:-1], self.width)
        return keys.scatter_(-1, self.channels[:, :, None].expand_as(held), held)

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """See `Coded.logits`: the same channels of the queries are enough."""
        channels = self.channels.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1)
        return self.held.logits(query.gather(-1, channels))


def attend_in_tiles(
    query: torch.Tensor,
    coded: Callable[[str, int, int], Any],
    num_quantized: int,
    tile_multiple: int,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `decode_attention` over quantised slots, and slots of keys and values behind them. Of the quantised ones, no more
    than a tile is ever restored.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        coded (`Callable`): Given "keys" or "values", a start and a stop, these quantised slots: `Coded`, `Plain` or
            `Thin`.
        num_quantized (`int`): How many there are.
        tile_multiple (`int`): Tiles start at multiples of it.
        key, value (`torch.Tensor`): `(batch, kv_heads, latest, head_dim)`, of the slots behind them.
        mask, bias, scaling, softcap, sink_logits: As in `decode_attention`, for all slots.
    """
    batch, kv_heads, num_latest, width = key.shape
    num_elements = TILE_ELEMENTS.get(query.device.type, TILE_ELEMENTS_ELSEWHERE)
    step = max(num_elements // (batch * kv_heads * width * tile_multiple), 1) * tile_multiple
    tiles = [slice(start, min(start + step, num_quantized)) for start in range(0, num_quantized, step)]
    queries = (query * scaling).reshape(batch * kv_heads, -1, width)
    logits = torch.empty(*queries.shape[:2], num_quantized + num_latest, dtype=torch.float32, device=key.device)
    for tile in tiles:
        logits[..., tile] = coded("keys", tile.start, tile.stop).logits(queries)
    logits[..., num_quantized:] = torch.bmm(queries, key.flatten(0, 1).mT)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.view(batch, kv_heads, -1, 1, logits.shape[-1])
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    probabilities = softmax_of_logits(logits, None if mask is None else mask[:, :, None, None], sink_logits).squeeze(3)
    weights = probabilities.flatten(0, 1)
    output = torch.bmm(weights[..., num_quantized:].to(value.dtype), value.flatten(0, 1)).float()
    for tile in tiles:
        output += coded("values", tile.start, tile.stop).weighted(weights[..., tile], value.dtype)
    return output.view(batch, 1, -1, value.shape[-1]).to(value.dtype), probabilities.sum(dim=2)
