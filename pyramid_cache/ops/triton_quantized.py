"""
`decode_quantized_attention` of `pyramid_cache.ops` on CUDA, in Triton.

The slots of a head are cut into parts of one size, as in `triton_decode`, whose second kernel merges them here too.
The first kernel reads codes and scales, and restores keys and values in registers. No copy in full precision is made.
Slots behind the codes are read as they are.

A byte holds channels of several parts of a head, the first part in its lowest bits. Channels that lie side by side in
one part and share a scale make up *runs* of up to 32. Blocks have the shape (runs, slots, channels of a run). Bytes
are loaded once, and a shift makes further runs of their parts. A scale is loaded once for a run. Products are of all
runs at once.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from pyramid_cache.ops.launching import ceil_div, on_device, padded
from pyramid_cache.ops.quantized import Coded, attend_in_tiles
from pyramid_cache.ops.triton_decode import (
    HEADS_PER_PROGRAM,
    MAX_SPLITS,
    DecodeBlocks,
    merge_kernel,
    part_tiles,
    slot_strides,
)
from pyramid_cache.ops.triton_scores import LOG2E, _capped, num_multiprocessors


# By bytes of an element of the queries and head_dim rounded up to a power of two. Not measured on a GPU. None spills
# registers, and two programs fit on a multiprocessor.
CODE_BLOCKS = {
    (2, 64): DecodeBlocks(slots=64, num_warps=4, num_stages=3, max_registers=255),
    (2, 128): DecodeBlocks(slots=64, num_warps=4, num_stages=3, max_registers=255),
    (2, 256): DecodeBlocks(slots=32, num_warps=4, num_stages=3, max_registers=255),
    (4, 64): DecodeBlocks(slots=32, num_warps=4, num_stages=1),
    (4, 128): DecodeBlocks(slots=32, num_warps=8, num_stages=1),
    (4, 256): DecodeBlocks(slots=16, num_warps=8, num_stages=1),
}
# Channels of a run. Products of longer ones spill registers.
LONGEST_RUN = 32
# The fewest slots of a step. Where tokens share the scales of keys, a step is within one group of them.
LEAST_SLOTS = 16


@triton.jit
def _run_starts(
    PARTS: tl.constexpr, NUM_BYTES: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """The first channel of each run `(PARTS * BLOCK_RUNS,)`, and whether there is such a run."""
    runs = tl.arange(0, PARTS * BLOCK_RUNS)
    in_part = runs % BLOCK_RUNS
    return runs // BLOCK_RUNS * NUM_BYTES + in_part * RUN, in_part * RUN < NUM_BYTES


@triton.jit
def _restored(
    codes_ptr, scales_ptr, tokens, is_token, scale_row,
    BITS: tl.constexpr, IS_FLOAT: tl.constexpr, NUM_BYTES: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr,
    BLOCK_RUN: tl.constexpr, GROUP: tl.constexpr, NUM_SCALES: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """
    The numbers `(runs, slots, channels)` of the codes of some tokens, in float32. If they are grouped by channel, all
    tokens have the scales of one row.
    """
    PARTS: tl.constexpr = 8 // BITS
    HIGHEST: tl.constexpr = (1 << BITS) - 1
    in_run = tl.arange(0, BLOCK_RUN)
    byte_starts = tl.arange(0, BLOCK_RUNS) * RUN
    codes = tl.load(
        codes_ptr + (tokens.to(tl.int64) * NUM_BYTES)[None, :, None] + (byte_starts[:, None] + in_run)[:, None, :],
        mask=is_token[None, :, None] & ((byte_starts < NUM_BYTES)[:, None] & (in_run < RUN))[:, None, :],
        other=0,
    )
    if PARTS > 1:
        shifts = (tl.arange(0, PARTS) * BITS).to(tl.uint8)
        codes = (codes[None, :, :, :] >> shifts[:, None, None, None]) & HIGHEST
        codes = tl.reshape(codes, [PARTS * BLOCK_RUNS, tokens.shape[0], BLOCK_RUN])
    if IS_FLOAT:
        # The bits of float8_e4m3fn in their places of float16, whose exponents are larger by 8. GPUs before those of
        # capability 8.9 have no instruction for it.
        wide = codes.to(tl.uint16)
        halves = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = halves.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        numbers = codes.to(tl.float32)
    channels, is_run = _run_starts(PARTS, NUM_BYTES, RUN, BLOCK_RUNS)
    if BY_CHANNEL:
        offsets = (scale_row * NUM_SCALES + (channels[:, None] + in_run))[:, None, :]
        is_scale = (is_run[:, None] & (in_run < RUN))[:, None, :]
    else:
        offsets = ((tokens.to(tl.int64) * NUM_SCALES)[None, :] + (channels // GROUP)[:, None])[:, :, None]
        is_scale = (is_run[:, None] & is_token)[:, :, None]
    numbers *= tl.load(scales_ptr + offsets, mask=is_scale, other=0.0).to(tl.float32)
    if not IS_FLOAT:
        numbers += tl.load(scales_ptr + offsets + NUM_SCALES // 2, mask=is_scale, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def _loaded(
    states_ptr, tokens, is_token, stride_n, stride_d,
    PARTS: tl.constexpr, NUM_BYTES: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK_RUN: tl.constexpr,
):  # fmt: skip
    """Queries, keys or values of some tokens, `(runs, tokens, channels)`."""
    in_run = tl.arange(0, BLOCK_RUN)
    channels, is_run = _run_starts(PARTS, NUM_BYTES, RUN, BLOCK_RUNS)
    return tl.load(
        states_ptr
        + (tokens.to(tl.int64) * stride_n)[None, :, None]
        + ((channels[:, None] + in_run).to(tl.int64) * stride_d)[:, None, :],
        mask=is_token[None, :, None] & (is_run[:, None] & (in_run < RUN))[:, None, :],
        other=0.0,
    )


@triton.jit
def _weighed(
    query, key, highest, total, logits_ptr, held_ptr, bias_ptr, stride_hn, stride_bn,
    tokens, is_token, stop, is_row, num_columns, factor, softcap,
):  # fmt: skip
    """
    Leaves the logits of the slots before `stop` behind. Returns the highest so far and the sum of exponentials, these
    exponentials, and what earlier ones are to be multiplied by.
    """
    logits = tl.sum(tl.dot(query, tl.permute(key, (0, 2, 1)), input_precision="ieee"), axis=0) * factor
    if softcap is not None:
        logits = _capped(logits, softcap)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + tokens.to(tl.int64) * stride_bn, mask=is_token, other=0.0)
        logits += (bias * LOG2E)[None, :]
    is_used = is_token
    if held_ptr is not None:
        is_used = is_used & (tl.load(held_ptr + tokens.to(tl.int64) * stride_hn, mask=is_token, other=0) != 0)
    logits = tl.where(is_used[None, :], logits, float("-inf"))
    rows = tl.arange(0, logits.shape[0]).to(tl.int64)
    places = (rows * num_columns)[:, None] + tokens[None, :]
    tl.store(logits_ptr + places, logits, mask=is_row[:, None] & (tokens < stop)[None, :])
    before = highest
    highest = tl.maximum(before, tl.max(logits, axis=1))
    # Minus infinity where every logit so far is.
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    rescaling = tl.exp2(before - pivot)
    weights = tl.exp2(logits - pivot[:, None])
    total = total * rescaling + tl.sum(weights, axis=1)
    return highest, total, weights, rescaling


@triton.jit
def _added(output, weights, rescaling, value):
    """Outputs `(runs, rows, channels)` with those of one more step."""
    shape: tl.constexpr = [value.shape[0], weights.shape[0], weights.shape[1]]
    shares = tl.broadcast_to(weights.to(value.dtype)[None, :, :], shape)
    return tl.dot(shares, value, output * rescaling[None, :, None], input_precision="ieee")


@triton.jit(
    do_not_specialize=(
        "starts_ptr held_ptr bias_ptr stride_hb stride_hh stride_bb stride_bh kv_heads group num_chunks num_segments "
        "num_splits code_slots scale_rows num_quantized num_slots"
    ).split()
)
def attend_codes_kernel(
    query_ptr, key_codes_ptr, key_scales_ptr, value_codes_ptr, value_scales_ptr, starts_ptr, key_ptr, value_ptr,
    held_ptr, bias_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_hb, stride_hh, stride_hn,
    stride_bb, stride_bh, stride_bn,
    kv_heads, group, num_chunks, num_segments, num_splits, code_slots, scale_rows, num_quantized, num_slots,
    padded_slots, part_size, factor, softcap,
    BITS: tl.constexpr, IS_FLOAT: tl.constexpr, CHANNEL_GROUP: tl.constexpr,
    KEY_BYTES: tl.constexpr, KEY_RUN: tl.constexpr, KEY_BLOCK_RUNS: tl.constexpr, KEY_BLOCK_RUN: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_SCALES: tl.constexpr,
    VALUE_BYTES: tl.constexpr, VALUE_RUN: tl.constexpr, VALUE_BLOCK_RUNS: tl.constexpr, VALUE_BLOCK_RUN: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_SCALES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    Attention of up to `ROWS` heads of a group over one part of the slots of a KV head: output, log-sum-exp, and the
    logits themselves, minus infinity where nothing is held. The scratch is that of `triton_decode.attend_kernel`
    without packed tokens. With `starts` `(batch, kv_heads + 1)` the codes of the heads of a row lie one behind the
    other.
    """
    PARTS: tl.constexpr = 8 // BITS
    VALUE_DIM: tl.constexpr = VALUE_BYTES * PARTS
    program = tl.program_id(0)
    chunk = program % num_chunks
    split = program // num_chunks // num_segments
    segment = (program // num_chunks % num_segments).to(tl.int64)
    begin = split * part_size
    end = tl.minimum(begin + part_size, num_slots)
    batch = segment // kv_heads
    kv_head = segment - batch * kv_heads
    key_ptr += batch * stride_kb + kv_head * stride_kh
    value_ptr += batch * stride_vb + kv_head * stride_vh
    if held_ptr is not None:
        held_ptr += batch * stride_hb + kv_head * stride_hh
    if bias_ptr is not None:
        bias_ptr += batch * stride_bb + kv_head * stride_bh
    codes_stop = tl.minimum(end, num_quantized)
    if starts_ptr is None:
        place, codes_end = segment * code_slots, codes_stop
    else:
        starts_ptr += segment + batch
        start = tl.load(starts_ptr)
        place = batch * code_slots + start
        codes_end = tl.minimum(codes_stop, (tl.load(starts_ptr + 1) - start).to(tl.int32))
    key_codes_ptr += place * KEY_BYTES
    value_codes_ptr += place * VALUE_BYTES
    value_scales_ptr += place * VALUE_SCALES
    if not CHANNEL_GROUP:
        key_scales_ptr += place * KEY_SCALES

    rows = chunk * ROWS + tl.arange(0, ROWS)
    is_row = rows < group
    query = _loaded(
        query_ptr + batch * stride_qb + kv_head * group * stride_qh, rows, is_row, stride_qh, stride_qd,
        PARTS, KEY_BYTES, KEY_RUN, KEY_BLOCK_RUNS, KEY_BLOCK_RUN,
    )  # fmt: skip
    num_columns = num_segments.to(tl.int64) * padded_slots
    logits_ptr = scratch_ptr + segment * padded_slots + (chunk * ROWS).to(tl.int64) * num_columns
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    output = tl.zeros([PARTS * VALUE_BLOCK_RUNS, ROWS, VALUE_BLOCK_RUN], dtype=tl.float32)
    for first in range(begin, codes_stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < codes_end
        scale_row = segment * scale_rows
        if CHANNEL_GROUP:
            scale_row += first // CHANNEL_GROUP
        key = _restored(
            key_codes_ptr, key_scales_ptr, tokens, is_token, scale_row, BITS, IS_FLOAT,
            KEY_BYTES, KEY_RUN, KEY_BLOCK_RUNS, KEY_BLOCK_RUN, KEY_GROUP, KEY_SCALES, CHANNEL_GROUP > 0,
        ).to(query.dtype)  # fmt: skip
        highest, total, weights, rescaling = _weighed(
            query, key, highest, total, logits_ptr, held_ptr, bias_ptr, stride_hn, stride_bn,
            tokens, is_token, codes_stop, is_row, num_columns, factor, softcap,
        )  # fmt: skip
        value = _restored(
            value_codes_ptr, value_scales_ptr, tokens, is_token, scale_row, BITS, IS_FLOAT,
            VALUE_BYTES, VALUE_RUN, VALUE_BLOCK_RUNS, VALUE_BLOCK_RUN, VALUE_GROUP, VALUE_SCALES, False,
        ).to(query.dtype)  # fmt: skip
        output = _added(output, weights, rescaling, value)
    for first in range(tl.maximum(begin, num_quantized), end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        latest = tokens - num_quantized
        key = _loaded(
            key_ptr, latest, is_token, stride_kn, stride_kd, PARTS, KEY_BYTES, KEY_RUN, KEY_BLOCK_RUNS, KEY_BLOCK_RUN
        )
        highest, total, weights, rescaling = _weighed(
            query, key, highest, total, logits_ptr, held_ptr, bias_ptr, stride_hn, stride_bn,
            tokens, is_token, end, is_row, num_columns, factor, softcap,
        )  # fmt: skip
        value = _loaded(
            value_ptr, latest, is_token, stride_vn, stride_vd,
            PARTS, VALUE_BYTES, VALUE_RUN, VALUE_BLOCK_RUNS, VALUE_BLOCK_RUN,
        )  # fmt: skip
        output = _added(output, weights, rescaling, value)

    outputs_ptr = scratch_ptr + group * num_columns
    lse_ptr = outputs_ptr + num_segments.to(tl.int64) * num_splits * group * VALUE_DIM
    parts = (segment * num_splits + split) * group + rows
    channels, is_run = _run_starts(PARTS, VALUE_BYTES, VALUE_RUN, VALUE_BLOCK_RUNS)
    in_run = tl.arange(0, VALUE_BLOCK_RUN)
    tl.store(
        outputs_ptr + (parts * VALUE_DIM)[None, :, None] + (channels[:, None] + in_run)[:, None, :],
        output / tl.where(total == 0.0, 1.0, total)[None, :, None],
        mask=is_row[None, :, None] & (is_run[:, None] & (in_run < VALUE_RUN))[:, None, :],
    )
    tl.store(lse_ptr + parts, highest + tl.log2(total), mask=is_row)


def cut_in_runs(coded: Coded) -> tuple[int, int, int, int, int, int]:
    """Bytes of a token, channels of a run, both sizes of a block of runs, channels that share a scale, scales."""
    num_bytes = coded.codes.shape[-1]
    group = coded.group_size if coded.dim == 3 else num_bytes
    run = math.gcd(num_bytes, group, LONGEST_RUN)
    return num_bytes, run, padded(num_bytes // run, 1), padded(run), group, coded.scales.shape[-1]


def decode_quantized_attention(
    query: torch.Tensor,
    keys: Coded,
    values: Coded,
    num_quantized: int,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    starts: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, head_dim = query.shape
    kv_heads, value_dim, device = key.shape[1], value.shape[3], key.device
    group, num_segments, num_slots = heads // kv_heads, batch * kv_heads, num_quantized + key.shape[2]
    blocks = CODE_BLOCKS[key.element_size(), max(padded(head_dim), padded(value_dim), 64)]
    channel_group, tile = 0, blocks.slots
    if keys.dim == 2:
        channel_group = keys.group_size
        tile = min(tile, channel_group & -channel_group)  # a power of two that divides the group
        if tile < LEAST_SLOTS:
            return attend_in_tiles(
                query, keys, values, num_quantized, key, value, mask, bias, sink_logits, starts, scaling, softcap
            )
    num_chunks = ceil_div(group, HEADS_PER_PROGRAM)
    part_size = tile * part_tiles(0, 0, num_slots, num_segments, num_chunks, tile, num_multiprocessors(device))
    num_splits, padded_slots = ceil_div(num_slots, part_size), ceil_div(num_slots, 16) * 16
    scratch_size = group * num_segments * (padded_slots + num_splits * (value_dim + 1))
    scratch = torch.empty(scratch_size, dtype=torch.float32, device=device)
    output = torch.empty(batch, 1, heads, value_dim, dtype=value.dtype, device=device)
    sums = torch.empty(batch, kv_heads, num_slots, dtype=torch.float32, device=device)
    mask_strides = (0, 0, 0) if mask is None else slot_strides(mask)
    bias_strides: tuple[int | None, ...] = (None, None, None) if bias is None else slot_strides(bias)
    merged_rows = min(padded(group, 1), 16)
    merged_tokens = 4096 // merged_rows
    num_tiles = ceil_div(part_size, merged_tokens)
    names = "BYTES RUN BLOCK_RUNS BLOCK_RUN GROUP SCALES".split()
    runs: dict[str, Any] = {
        f"{prefix}_{name}": number
        for prefix, coded in (("KEY", keys), ("VALUE", values))
        for name, number in zip(names, cut_in_runs(coded), strict=True)
    }
    with on_device(device):
        attend_codes_kernel[num_splits * num_segments * num_chunks,](
            query, keys.codes.contiguous(), keys.scales.contiguous(),
            values.codes.contiguous(), values.scales.contiguous(),
            None if starts is None else starts.contiguous(), key, value, mask, bias, scratch,
            query.stride(0), query.stride(1), query.stride(3),
            *key.stride(),
            *value.stride(),
            *mask_strides,
            *bias_strides,
            kv_heads, group, num_chunks, num_segments, num_splits, keys.codes.shape[2], keys.scales.shape[2],
            num_quantized, num_slots, padded_slots, part_size,
            scaling if softcap else scaling * LOG2E.value, softcap or None,
            BITS=keys.packing.bits, IS_FLOAT=keys.packing.is_float, CHANNEL_GROUP=channel_group, **runs,
            ROWS=HEADS_PER_PROGRAM, BLOCK_N=tile,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, maxnreg=blocks.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[num_segments * (group + num_splits * num_tiles),](
            scratch, None, None if sink_logits is None else sink_logits.contiguous(), output, sums, sums,
            kv_heads, group, num_tiles, num_segments, num_splits, 0, num_slots, padded_slots, num_splits, part_size,
            VALUE_DIM=value_dim, BLOCK_DV=padded(value_dim), ROWS=merged_rows, BLOCK_N=merged_tokens,
            BLOCK_S=MAX_SPLITS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output, sums
