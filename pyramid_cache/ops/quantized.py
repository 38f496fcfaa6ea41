"""
Keys and values in 8, 4 or 2 bits, or in fewer channels, and attention of one query over them. `triton_quantized`
computes it for codes on CUDA. All else restores them tile by tile.

Numbers of a group share a scale. In the integer formats a number is `low + scale * code`: `low` is the least number of
the group, and the codes are 0 to `2 ** bits - 1` (Liu et al., 2024, KIVI, https://arxiv.org/abs/2402.02750, Section
3.1). In float8 it is `scale * code`. Codes of less than a byte are packed: the first of them in the lowest bits of all
bytes, so that `head_dim` channels take `head_dim * bits / 8` bytes, and slices of channels unpack without a shuffle.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from pyramid_cache.ops.reference import softmax_of_logits
from pyramid_cache.ops.registration import (
    check_dtype,
    check_latest,
    check_query,
    check_shape,
    kernels,
    register,
)


FLOAT8 = torch.float8_e4m3fn
# The exponents of float16 are larger by 8. Of its bits, one of float8 has all but the second and the last seven.
FLOAT8_FACTOR = 2.0**8
FLOAT8_BITS = -0x4080
# Elements of the tiles of `attend_in_tiles`, which stay in the processor's cache; on other devices launches cost more.
TILE_ELEMENTS = {"cpu": 1 << 20}
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
    scales = scale.new_empty(*scale.shape[:-1], 2, scale.shape[-1])  # not by `cat`, which autocast to bfloat16 refuses
    scales[..., 0, :], scales[..., 1, :] = scale, low
    return packed.contiguous(), scales.flatten(-2)


def float8_halves(codes: torch.Tensor) -> torch.Tensor:
    """
    The numbers of float8 codes in float16, divided by `FLOAT8_FACTOR`: their bits in the places that they have there.
    torch converts them one by one on the CPU, which takes several times as long.
    """
    return codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(FLOAT8_BITS).view(torch.float16)


def as_float16(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in float16. Larger ones become the largest."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).half()


def packed_slots(packed: torch.Tensor, starts: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """
    The slots from `start` to `stop` of each head `(batch, kv_heads, slots, any)`, of what all heads of a row hold one
    behind the other `(batch, 1, tokens, any)`. Those behind the end of a head hold anything. `starts` are
    `(batch, kv_heads + 1)` int64: where each head begins, and where the last one ends.
    """
    offsets = torch.arange(start, stop, device=starts.device)
    places = (starts[:, :-1, None] + offsets).clamp(max=packed.shape[2] - 1).flatten(1)
    index = places[:, None, :, None].expand(-1, -1, -1, packed.shape[3])
    return packed.gather(2, index).unflatten(2, (starts.shape[1] - 1, -1)).squeeze(1)


class Coded(NamedTuple):
    """What `quantize` gave for keys or values, or a slice of their tokens."""

    codes: torch.Tensor
    scales: torch.Tensor
    packing: Packing
    dim: int
    group_size: int

    @property
    def width(self) -> int:
        return self.codes.shape[-1] * 8 // self.packing.bits

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers `(batch, kv_heads, tokens, width)` in that dtype."""
        numbers = self.codes.new_empty(*self.codes.shape[:-1], self.width, dtype=torch.float32)
        return self.scaled(self.write_codes(numbers)).to(dtype)

    def write_codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Writes the codes into numbers `(batch, kv_heads, tokens, width)`, which it returns; of float8, divided."""
        bits, is_float = self.packing
        if is_float:
            return numbers.copy_(float8_halves(self.codes))
        for part, channels in enumerate(numbers.chunk(8 // bits, dim=-1)):
            shifted = self.codes >> bits * part if part else self.codes
            channels.copy_(shifted if (part + 1) * bits == 8 else shifted & self.packing.num_levels)
        return numbers

    def scaled(self, numbers: torch.Tensor) -> torch.Tensor:
        """What numbers of `write_codes` stand for, in their place."""
        grouped, scales = numbers.unflatten(self.dim, (-1, self.group_size)), self.scales.float()
        if self.packing.is_float:
            grouped.mul_(scales.unsqueeze(self.dim + 1) * FLOAT8_FACTOR)
        else:
            scale, low = (each.unsqueeze(self.dim + 1) for each in scales.chunk(2, dim=-1))
            grouped.mul_(scale).add_(low)
        return numbers

    def tile(self, start: int, stop: int, starts: torch.Tensor | None = None) -> "Coded":
        """The slots from `start` to `stop`. Codes of heads that are packed need `starts`: see `packed_slots`."""
        if starts is not None:
            codes, scales = (packed_slots(each, starts, start, stop) for each in (self.codes, self.scales))
            return self._replace(codes=codes, scales=scales)
        group = self.group_size if self.dim == 2 else 1
        codes, scales = self.codes[:, :, start:stop], self.scales[:, :, start // group : -(-stop // group)]
        return self._replace(codes=codes, scales=scales)

    def tiles(self, scaled: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of slots, and their codes `(batch * kv_heads, tokens, width)` in float32, or what these stand for."""
        batch, kv_heads, num_slots, _ = self.codes.shape
        num_elements = TILE_ELEMENTS.get(self.codes.device.type, TILE_ELEMENTS_ELSEWHERE)
        multiple = self.group_size if self.dim == 2 else 1
        step = max(num_elements // (batch * kv_heads * self.width * multiple), 1) * multiple
        # Memory that is new for each tile would cost page faults.
        room = self.codes.new_empty(batch, kv_heads, min(step, num_slots), self.width, dtype=torch.float32)
        for start in range(0, num_slots, step):
            tile = self.tile(start, min(start + step, num_slots))
            numbers = tile.write_codes(room[:, :, : tile.codes.shape[2]])
            if scaled:
                tile.scaled(numbers)
            yield slice(start, start + tile.codes.shape[2]), numbers.flatten(0, 1)

    def by_group(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and least numbers, `(batch * kv_heads, groups, tokens)` float32, of groups of channels."""
        scales = self.scales.flatten(0, 1).mT.float().contiguous()
        if self.packing.is_float:
            return scales * FLOAT8_FACTOR, None
        scale, low = scales.chunk(2, dim=1)
        return scale, low

    def write_logits(self, logits: torch.Tensor, queries: torch.Tensor) -> None:
        """
        Writes the products of queries `(batch * kv_heads, group, width)` with all keys into logits
        `(batch * kv_heads, group, slots)`. Where channels share a scale, products take the codes as they are, and
        scales come into the results.
        """
        if self.dim == 2:
            for tile, keys in self.tiles(scaled=True):
                logits[..., tile] = torch.bmm(queries, keys.mT)
            return
        scale, low = self.by_group()
        rows = self._apart(queries)
        for tile, codes in self.tiles():
            products = torch.bmm(rows, codes.mT).unflatten(1, (scale.shape[1], -1))
            logits[..., tile] = products.mul_(scale[:, :, None, tile]).sum(dim=1)
        if low is not None:
            logits += torch.bmm(queries.unflatten(-1, (-1, self.group_size)).sum(dim=-1), low)

    def add_values(self, output: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds all values, with weights `(batch * kv_heads, group, slots)`, to `(batch * kv_heads, group, width)`."""
        scale, low = self.by_group()
        shares = (weights[:, None] * scale[:, :, None]).flatten(1, 2)
        for tile, codes in self.tiles():
            output += self._together(torch.bmm(shares[..., tile], codes))
        if low is not None:
            output += torch.bmm(weights, low.mT).repeat_interleave(self.group_size, dim=-1)

    def _apart(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries `(batch * kv_heads, groups * group, width)`, of which those of a group see its channels alone."""
        is_in = channels_of_groups(self.width // self.group_size, self.group_size, queries.device)
        return (queries[:, None] * is_in).flatten(1, 2)

    def _together(self, products: torch.Tensor) -> torch.Tensor:
        """The channels of each group from the products of that group, `(batch * kv_heads, groups * group, width)`."""
        is_in = channels_of_groups(self.width // self.group_size, self.group_size, products.device)
        return products.unflatten(1, (len(is_in), -1)).mul_(is_in).sum(dim=1)


def channels_of_groups(num_groups: int, size: int, device: torch.device) -> torch.Tensor:
    """Which channels each group has, `(groups, 1, width)` of ones and zeros."""
    return torch.eye(num_groups, dtype=torch.float32, device=device).repeat_interleave(size, dim=1)[:, None]


class Plain(NamedTuple):
    """Keys or values `(batch, kv_heads, tokens, width)` as they came, where `Coded` has codes."""

    numbers: torch.Tensor

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """The same in that dtype."""
        return self.numbers.to(dtype)

    def tile(self, start: int, stop: int, starts: torch.Tensor | None = None) -> "Plain":
        """See `Coded.tile`."""
        if starts is not None:
            return Plain(packed_slots(self.numbers, starts, start, stop))
        return Plain(self.numbers[:, :, start:stop])

    def write_logits(self, logits: torch.Tensor, queries: torch.Tensor) -> None:
        """See `Coded.write_logits`."""
        logits.copy_(torch.bmm(queries.to(self.numbers.dtype), self.numbers.flatten(0, 1).mT))

    def add_values(self, output: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Coded.add_values`."""
        output += torch.bmm(weights.to(self.numbers.dtype), self.numbers.flatten(0, 1))


def decode_quantized_attention(
    query: torch.Tensor,
    keys: Coded | Plain,
    values: Coded | Plain,
    num_quantized: int,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `decode_attention` over quantised slots, and slots of keys and values behind them. No copy of the quantised ones in
    full precision is made. It has no gradient.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        keys, values (`Coded` or `Plain`): Those of the quantised slots. Values are grouped by channels of a token.
        num_quantized (`int`): How many slots of each head are quantised.
        key, value (`torch.Tensor`): `(batch, kv_heads, latest, head_dim)`, of the slots behind them, at least one; the
            values may have a width of their own.
        mask, bias, scaling, softcap, sink_logits: As in `decode_attention`, for all slots.
        starts (`torch.Tensor`, *optional*): `(batch, kv_heads + 1)` int64. If it is given, codes and scales are
            `(batch, 1, tokens, any)`, with the heads of a row one behind the other. It says where each of them begins
            and where the last one ends. The mask must be False for quantised slots behind the end of a head.
        channels (`torch.Tensor`, *optional*): `(batch, kv_heads, any)` int64, those that keys of quantised slots have,
            if they have lost others. Plain PyTorch attends to these, and to `Plain` ones, on every device.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: As `decode_attention`.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_query(query, key, rows=1)
    batch, kv_heads, num_latest, width = key.shape
    check_shape("value", value, batch, kv_heads, num_latest, None)
    check_latest(key)
    num_slots = num_quantized + num_latest
    if channels is not None or isinstance(keys, Plain) or isinstance(values, Plain):
        check_shape("channels", channels, batch, kv_heads, None)
        slots = mask, bias, sink_logits, starts
        with torch.no_grad():
            return attend_in_tiles(query, keys, values, num_quantized, key, value, *slots, scaling, softcap, channels)
    if keys.packing != values.packing:
        raise ValueError(f"`keys` have {keys.packing} and `values` {values.packing}. Quantise both in the same way.")
    shape = (batch, kv_heads, num_quantized) if starts is None else (batch, 1, None)
    for name, coded, dim in (("keys", keys, width), ("values", values, value.shape[3])):
        check_shape(f"{name}.codes", coded.codes, *shape, dim * coded.packing.bits // 8)
        check_dtype(f"{name}.codes", coded.codes, torch.uint8)
        numbers = 1 if coded.packing.is_float else 2
        if coded.dim == 3:
            check_shape(f"{name}.scales", coded.scales, *shape, numbers * dim // coded.group_size)
        else:
            num_groups = num_quantized // coded.group_size
            check_shape(f"{name}.scales", coded.scales, batch, kv_heads, num_groups, numbers * dim)
    check_shape("mask", mask, batch, kv_heads, num_slots, or_one=1)
    check_dtype("mask", mask, torch.bool)
    check_shape("bias", bias, batch, kv_heads, num_slots, or_one=1)
    check_dtype("bias", bias, torch.float32)
    check_shape("sink_logits", sink_logits, query.shape[1])
    check_shape("starts", starts, batch, kv_heads + 1)
    check_dtype("starts", starts, torch.int64)
    if values.dim != 3 or (starts is not None and keys.dim != 3):
        raise ValueError("Tokens can share scales only as keys that are not packed: give codes of dimension 3.")
    return _decode_quantized(
        query,
        *keys[:2],
        *values[:2],
        *(key, value, mask, bias, sink_logits, starts),
        *(num_quantized, *keys.packing, *keys[3:], values.group_size, scaling, softcap),
    )


def attend_in_tiles(
    query: torch.Tensor,
    keys: Coded | Plain,
    values: Coded | Plain,
    num_quantized: int,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    starts: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    channels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain PyTorch. Of the quantised slots, no more than a tile is ever restored."""
    batch, kv_heads, num_latest, width = key.shape
    if starts is not None:
        keys, values = (coded.tile(0, num_quantized, starts) for coded in (keys, values))
    queries = (query * scaling).reshape(batch * kv_heads, -1, width)
    logits = query.new_empty(*queries.shape[:2], num_quantized + num_latest, dtype=torch.float32)
    logits[..., num_quantized:] = torch.bmm(queries, key.flatten(0, 1).mT)
    queries = queries.float()
    if channels is not None:
        queries = queries.gather(-1, channels.flatten(0, 1)[:, None].expand(-1, queries.shape[1], -1))
    keys.write_logits(logits[..., :num_quantized], queries)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.view(batch, kv_heads, -1, 1, logits.shape[-1])
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    probabilities = softmax_of_logits(logits, None if mask is None else mask[:, :, None, None], sink_logits).squeeze(3)
    weights = probabilities.flatten(0, 1)
    output = torch.bmm(weights[..., num_quantized:].to(value.dtype), value.flatten(0, 1)).float()
    values.add_values(output, weights[..., :num_quantized])
    return output.view(batch, 1, -1, value.shape[-1]).to(value.dtype), probabilities.sum(dim=2)


def _on_cpu(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    starts: torch.Tensor | None,
    num_quantized: int,
    bits: int,
    is_float: bool,
    key_dim: int,
    key_group: int,
    value_group: int,
    scaling: float,
    softcap: float | None,
    run: Callable = attend_in_tiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With the numbers of a schema in the place of `Coded`."""
    keys = Coded(key_codes, key_scales, Packing(bits, is_float), key_dim, key_group)
    values = Coded(value_codes, value_scales, keys.packing, 3, value_group)
    slots = mask, bias, sink_logits, starts
    return run(query, keys, values, num_quantized, key, value, *slots, scaling, softcap)


def _on_cuda(query, key_codes, key_scales, value_codes, value_scales, key, value, *rest):
    module = kernels("triton_quantized", query, key, value)
    run = attend_in_tiles if module is None else module.decode_quantized_attention
    return _on_cpu(query, key_codes, key_scales, value_codes, value_scales, key, value, *rest, run=run)


def _fake(query, key_codes, key_scales, value_codes, value_scales, key, value, mask, bias, sinks, starts, *numbers):
    output = value.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    return output, value.new_empty(*key.shape[:2], numbers[0] + key.shape[2], dtype=torch.float32)


_decode_quantized = register(
    "decode_quantized_attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor "
    "value_scales, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sink_logits, Tensor? starts, int "
    "num_quantized, int bits, bool is_float, int key_dim, int key_group, int value_group, float scaling, float? "
    "softcap) -> (Tensor, Tensor)",
    cpu=_on_cpu,
    cuda=_on_cuda,
    fake=_fake,
)
