"""
The ops of `pyramid_cache.ops.scores` on CUDA, in Triton. Functions have the arguments and results of the ops.

Scores keep a tile of keys where it is and stream the queries past it, so that a key's score is summed in one program:
no atomics, nothing of the size `queries x keys`, and the same bits every time. Decoding splits the slots over the
whole device, reads keys and values once, and leaves the logits behind; a second kernel, which then knows every
log-sum-exp, turns them into probabilities and merges the outputs.

Logits and log-sum-exps are in base 2 inside the kernels, where `exp2` is one instruction. Nothing here waits for the
device, so that CUDA graphs can record it. Sizes that grow with the text are not specialised: no length is compiled
anew.

The arguments of a kernel stand in rows: the tensors, the strides of each, numbers, and what it is compiled for.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyramid_cache.ops.launching import ceil_div, on_device, padded


LOG2E = tl.constexpr(1.4426950408889634)

# Partial results that one row of the second kernel takes in at once.
MAX_SPLITS = 128


class ScoreBlocks(NamedTuple):
    """How `attention_scores` is cut."""

    keys: int  # of one program: the rows of its matrix product, 64 or more for a warp group's instruction
    rows: int  # queries that pass it at once
    num_warps: int  # 4, or 8 for two warp groups
    num_stages: int  # steps of the loop whose loads are under way at once, in shared memory


class DecodeBlocks(NamedTuple):
    """How the first kernel of decoding is cut."""

    slots: int  # keys and values of one step
    num_warps: int  # of one program
    num_stages: int  # steps whose loads are under way at once, in shared memory
    max_registers: int | None = None  # of a thread; the assembler decides by default


# By bytes of an element and head_dim rounded up to a power of two. float32 has no tensor cores here (they would round
# to ten bits), so its operands live in registers: larger tiles spill them.
SCORE_BLOCKS = {
    (2, 64): ScoreBlocks(keys=128, rows=128, num_warps=4, num_stages=3),
    (2, 128): ScoreBlocks(keys=128, rows=64, num_warps=4, num_stages=3),
    (2, 256): ScoreBlocks(keys=128, rows=64, num_warps=8, num_stages=2),
    (4, 64): ScoreBlocks(keys=32, rows=32, num_warps=4, num_stages=2),
    (4, 128): ScoreBlocks(keys=32, rows=32, num_warps=8, num_stages=2),
    (4, 256): ScoreBlocks(keys=32, rows=32, num_warps=8, num_stages=2),
}
# On an H100 or H200, 128 rows at once leave room for two programs of a multiprocessor, and take a fifth less time.
# Compiled for capability 8.0 they spill.
HOPPER_SCORE_BLOCKS = SCORE_BLOCKS | {(2, 128): ScoreBlocks(keys=128, rows=128, num_warps=4, num_stages=2)}
# 48 to 64 KiB of keys and values under way in each of two programs of a multiprocessor, where 26 KiB would keep an
# H200 busy. Left to decide, the assembler makes room for a third program (168 registers) and spills two registers for
# it.
DECODE_BLOCKS = {
    (2, 64): DecodeBlocks(slots=64, num_warps=4, num_stages=4, max_registers=224),
    (2, 128): DecodeBlocks(slots=64, num_warps=4, num_stages=3, max_registers=224),
    (2, 256): DecodeBlocks(slots=32, num_warps=4, num_stages=3, max_registers=224),
    (4, 64): DecodeBlocks(slots=64, num_warps=4, num_stages=2),
    (4, 128): DecodeBlocks(slots=32, num_warps=8, num_stages=2),
    (4, 256): DecodeBlocks(slots=16, num_warps=8, num_stages=2),
}


@triton.jit
def _capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`; tanh by an exponential that overflows to the right limit."""
    return softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2E / softcap)) + 1.0)


@triton.jit
def _add_rows(
    sums, key, query_ptr, lse_ptr, weights_ptr,
    stride_qh, stride_qm, stride_qd, stride_lh, stride_lm, stride_wm,
    first_row, num_blocks, num_rows, hidden, factor, softcap,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """
    Adds what `num_blocks` blocks of rows, from `first_row` on, of each of `HEADS` heads give to a tile of keys.

    One loop over the blocks of all heads, because loads are only under way early within a loop, and a window of 64
    rows is one block per head. Row `i` sees the keys of the tile where `hidden <= i`.
    """
    dims = tl.arange(0, BLOCK_D)
    block = tl.arange(0, BLOCK_M)
    is_dim = dims < HEAD_DIM
    query_offsets = block[:, None].to(tl.int64) * stride_qm + dims[None, :].to(tl.int64) * stride_qd
    blocks_per_head = tl.maximum(num_blocks, 1)
    for step in range(HEADS * num_blocks):
        head = step // blocks_per_head
        row = first_row + (step - head * blocks_per_head) * BLOCK_M
        rows = row + block
        is_row = rows < num_rows
        lse = tl.load(
            lse_ptr + head.to(tl.int64) * stride_lh + rows.to(tl.int64) * stride_lm,
            mask=is_row,
            other=float("inf"),
        )
        counts = tl.abs(lse) != float("inf")
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + rows.to(tl.int64) * stride_wm, mask=is_row, other=0.0)
            counts = counts & (weights != 0.0)
        # Infinite where a row does not count: what a vector of its own would say passes through shared memory again.
        lse = tl.where(counts, lse * LOG2E, float("inf"))
        query = tl.load(
            query_ptr + (head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qm) + query_offsets,
            mask=is_row[:, None] & is_dim[None, :],
            other=0.0,
        )
        logits = tl.dot(key, tl.trans(query), input_precision="ieee") * factor  # (keys, rows)
        if softcap is not None:
            logits = _capped(logits, softcap) * LOG2E
        probabilities = tl.exp2(logits - lse[None, :])
        if weights_ptr is not None:
            probabilities = probabilities * weights[None, :]
        # Chosen, not multiplied: a row that does not count may hold infinities.
        is_visible = lse[None, :] != float("inf")
        if IS_DIAGONAL:
            # Against numbers that do not change with the step, which take no registers.
            is_visible = is_visible & ((hidden - row)[:, None] <= block[None, :])
        sums += tl.sum(tl.where(is_visible, probabilities, 0.0), axis=1)
    return sums


@triton.jit(
    do_not_specialize=(
        "lse_ptr weights_ptr start_ptr out_ptr stride_lb stride_lh stride_lm stride_wb stride_wm stride_start "
        "num_programs kv_heads num_rows num_keys"
    ).split()
)
def scores_kernel(
    query_ptr, key_ptr, lse_ptr, weights_ptr, start_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_lb, stride_lh, stride_lm,
    stride_wb, stride_wm,
    stride_start,
    num_programs, kv_heads, num_rows, num_keys, factor, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    The scores of one tile of keys out of a group of query heads.

    Programs of the first keys, which every row sees, come first: the last to start are the shortest.
    """
    program = tl.program_id(0)
    tile = program // num_programs
    pair = (program - tile * num_programs).to(tl.int64)
    batch = pair // kv_heads
    kv_head = pair - batch * kv_heads

    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    is_key = keys < num_keys
    key = tl.load(
        key_ptr
        + batch * stride_kb
        + kv_head * stride_kh
        + keys[:, None].to(tl.int64) * stride_kn
        + dims[None, :].to(tl.int64) * stride_kd,
        mask=is_key[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    start = 0
    if start_ptr is not None:
        start = tl.load(start_ptr + batch * stride_start).to(tl.int32)

    # Rows count from 0, which is the position `offset`. A row that sees a key behind the padding lies behind it, too.
    offset = num_keys - num_rows
    first_key = tile * BLOCK_N
    first_row = tl.maximum(tl.maximum(first_key, start) - offset, 0)
    last_row = tl.where(first_key + BLOCK_N <= start, first_row, tl.maximum(num_rows, first_row))
    # Rows from `all_visible` on see the whole tile. Those before are masked, which takes registers: in smaller blocks.
    all_visible = tl.maximum(first_key + BLOCK_N - 1 - offset, first_row)
    DIAGONAL_M: tl.constexpr = min(BLOCK_M, 64)
    num_diagonal = (tl.minimum(all_visible, last_row) - first_row + DIAGONAL_M - 1) // DIAGONAL_M
    first_visible = first_row + num_diagonal * DIAGONAL_M
    num_visible = (tl.maximum(last_row - first_visible, 0) + BLOCK_M - 1) // BLOCK_M

    query_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    lse_ptr += batch * stride_lb + kv_head * GROUP * stride_lh
    if weights_ptr is not None:
        weights_ptr += batch * stride_wb
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    sums = _add_rows(
        sums, key, query_ptr, lse_ptr, weights_ptr, stride_qh, stride_qm, stride_qd, stride_lh, stride_lm, stride_wm,
        first_row, num_diagonal, num_rows, keys - offset, factor, softcap,
        GROUP, HEAD_DIM, BLOCK_D, DIAGONAL_M, True,
    )  # fmt: skip
    sums = _add_rows(
        sums, key, query_ptr, lse_ptr, weights_ptr, stride_qh, stride_qm, stride_qd, stride_lh, stride_lm, stride_wm,
        first_visible, num_visible, num_rows, keys - offset, factor, softcap,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    tl.store(out_ptr + pair * num_keys + keys, tl.where(keys >= start, sums, 0.0), mask=is_key)


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, held_ptr, logits_ptr, outputs_ptr, lse_ptr,
    stride_qh, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_hn, stride_logits,
    rows, is_row, begin, end, logits_end, factor, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    Attention of `ROWS` heads of a group over tokens from `begin` to `end`: output, log-sum-exp, and the logits
    themselves, minus infinity where nothing is held and for tokens from `end` to `logits_end`.
    """
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    is_dim = dims < HEAD_DIM
    is_value_dim = value_dims < VALUE_DIM
    query = tl.load(
        query_ptr + rows.to(tl.int64)[:, None] * stride_qh + dims[None, :].to(tl.int64) * stride_qd,
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    logits_ptr += rows.to(tl.int64) * stride_logits
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    output = tl.zeros([ROWS, BLOCK_DV], dtype=tl.float32)
    if held_ptr is not None:
        tokens = begin + tl.arange(0, BLOCK_N)
        held = tl.load(held_ptr + tokens.to(tl.int64) * stride_hn, mask=tokens < end, other=0)
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        is_used = is_token
        if held_ptr is not None:
            is_used = is_used & (held != 0)
            # One step ahead: the compiler does not start loads early that wait for another one of the same step.
            behind = tokens + BLOCK_N
            held = tl.load(held_ptr + behind.to(tl.int64) * stride_hn, mask=behind < end, other=0)
        key = tl.load(
            key_ptr + tokens[:, None].to(tl.int64) * stride_kn + dims[None, :].to(tl.int64) * stride_kd,
            mask=is_token[:, None] & is_dim[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if softcap is not None:
            logits = _capped(logits, softcap) * LOG2E
        logits = tl.where(is_used[None, :], logits, float("-inf"))
        tl.store(logits_ptr[:, None] + tokens[None, :], logits, mask=is_row[:, None] & (tokens < logits_end)[None, :])
        before = highest
        highest = tl.maximum(before, tl.max(logits, axis=1))
        # Minus infinity where every logit so far is.
        pivot = tl.where(highest == float("-inf"), 0.0, highest)
        rescaling = tl.exp2(before - pivot)
        weights = tl.exp2(logits - pivot[:, None])
        total = total * rescaling + tl.sum(weights, axis=1)
        # What an empty slot holds may be anything, and 0 times NaN is NaN.
        value = tl.load(
            value_ptr + tokens[:, None].to(tl.int64) * stride_vn + value_dims[None, :].to(tl.int64) * stride_vd,
            mask=is_used[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        output = tl.dot(weights.to(value.dtype), value, output * rescaling[:, None], input_precision="ieee")

    tl.store(
        outputs_ptr + rows[:, None] * VALUE_DIM + value_dims[None, :],
        output / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=is_row[:, None] & is_value_dim[None, :],
    )
    tl.store(lse_ptr + rows, highest + tl.log2(total), mask=is_row)


@triton.jit(
    do_not_specialize=(
        "held_ptr stride_hb stride_hh kv_heads group num_chunks num_slots num_splits split_size num_programs"
    ).split()
)
def decode_kernel(
    query_ptr, key_ptr, value_ptr, held_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_hb, stride_hh, stride_hn,
    kv_heads, group, num_chunks, num_slots, padded_slots, num_splits, split_size, num_programs, factor, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    Attention of up to `ROWS` heads of a group over one split of the slots.

    The scratch is logits (programs, group, padded_slots), outputs (programs, splits, group, VALUE_DIM) and
    log-sum-exps (programs, splits, group), where a program stands for a KV head of a row of the batch.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = (program % num_chunks).to(tl.int32)
    split = ((program // num_chunks) % num_splits).to(tl.int32)
    pair = program // num_chunks // num_splits
    batch = pair // kv_heads
    kv_head = pair - batch * kv_heads
    rows = chunk * ROWS + tl.arange(0, ROWS)
    if held_ptr is not None:
        held_ptr += batch * stride_hb + kv_head * stride_hh
    begin = split * split_size
    first_part = (pair * num_splits + split) * group
    outputs_ptr = scratch_ptr + num_programs.to(tl.int64) * group * padded_slots
    lse_ptr = outputs_ptr + num_programs.to(tl.int64) * num_splits * group * VALUE_DIM
    _attend(
        query_ptr + batch * stride_qb + kv_head * group * stride_qh,
        key_ptr + batch * stride_kb + kv_head * stride_kh,
        value_ptr + batch * stride_vb + kv_head * stride_vh,
        held_ptr,
        scratch_ptr + pair * group * padded_slots, outputs_ptr + first_part * VALUE_DIM, lse_ptr + first_part,
        stride_qh, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_hn, padded_slots,
        rows, rows < group, begin, tl.minimum(begin + split_size, num_slots), padded_slots, factor, softcap,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, ROWS, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _merged_lse(lse_ptr, sinks_ptr, rows, group, num_splits, BLOCK_S: tl.constexpr):
    """The log-sum-exps in base 2 over all splits, and the sinks, of some rows of a group."""
    splits = tl.arange(0, BLOCK_S)
    is_row = rows < group
    parts = tl.load(
        lse_ptr + splits[None, :] * group + rows[:, None],
        mask=is_row[:, None] & (splits < num_splits)[None, :],
        other=float("-inf"),
    )
    highest = tl.max(parts, axis=1)
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + rows, mask=is_row, other=0.0).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sinks)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(parts - pivot[:, None]), axis=1)
    if sinks_ptr is not None:
        total += tl.exp2(sinks - pivot)
    return pivot + tl.log2(total)


@triton.jit
def _merge_outputs(
    out_ptr, outputs_ptr, lse_ptr, sinks_ptr, first_part, row, group, num_splits,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS_PER_STEP: tl.constexpr,
):  # fmt: skip
    """Writes the output of one head out of those of its splits, of which the group's begin at `first_part`."""
    lse = _merged_lse(lse_ptr + first_part, sinks_ptr, row + tl.arange(0, 1), group, num_splits, BLOCK_S)
    pivot = tl.where(lse == float("-inf"), 0.0, lse)
    value_dims = tl.arange(0, BLOCK_DV)
    is_value_dim = value_dims < VALUE_DIM
    output = tl.zeros([SPLITS_PER_STEP, BLOCK_DV], dtype=tl.float32)
    for first_split in range(0, num_splits, SPLITS_PER_STEP):
        splits = first_split + tl.arange(0, SPLITS_PER_STEP)
        is_split = splits < num_splits
        parts = first_part + splits.to(tl.int64) * group + row
        share = tl.exp2(tl.load(lse_ptr + parts, mask=is_split, other=float("-inf")) - pivot)
        output += share[:, None] * tl.load(
            outputs_ptr + parts[:, None] * VALUE_DIM + value_dims[None, :],
            mask=is_split[:, None] & is_value_dim[None, :],
            other=0.0,
        )
    tl.store(out_ptr + value_dims, tl.sum(output, axis=0).to(out_ptr.dtype.element_ty), mask=is_value_dim)


@triton.jit
def _group_sums(
    logits_ptr, stride_logits, lse_ptr, sinks_ptr, tokens, is_token, group, num_splits,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The probabilities of some tokens, summed over the heads of a group."""
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first_row in range(0, group, ROWS):
        rows = first_row + tl.arange(0, ROWS)
        lse = _merged_lse(lse_ptr, sinks_ptr, rows, group, num_splits, BLOCK_S)
        logits = tl.load(
            logits_ptr + rows.to(tl.int64)[:, None] * stride_logits + tokens[None, :],
            mask=(rows < group)[:, None] & is_token[None, :],
            other=float("-inf"),
        )
        # Chosen, not computed: of a head that attends to nothing the log-sum-exp is minus infinity as well.
        sums += tl.sum(tl.where(logits == float("-inf"), 0.0, tl.exp2(logits - lse[:, None])), axis=0)
    return sums


@triton.jit(
    do_not_specialize=(
        "sinks_ptr probabilities_ptr stride_sb stride_sh kv_heads group num_slots num_splits num_tiles num_programs"
    ).split()
)
def merge_kernel(
    scratch_ptr, sinks_ptr, out_ptr, probabilities_ptr,
    stride_sb, stride_sh, stride_sn,
    kv_heads, group, num_slots, padded_slots, num_splits, num_tiles, num_programs,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS_PER_STEP: tl.constexpr,
):  # fmt: skip
    """
    The first programs each turn the logits of a tile of slots into probabilities; the others merge one head's output
    each.
    """
    program = tl.program_id(0).to(tl.int64)
    outputs_ptr = scratch_ptr + num_programs.to(tl.int64) * group * padded_slots
    lse_ptr = outputs_ptr + num_programs.to(tl.int64) * num_splits * group * VALUE_DIM
    if program < num_programs.to(tl.int64) * num_tiles:
        pair = program // num_tiles
        batch = pair // kv_heads
        kv_head = pair - batch * kv_heads
        if sinks_ptr is not None:
            sinks_ptr += kv_head * group
        slots = (program - pair * num_tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = _group_sums(
            scratch_ptr + pair * group * padded_slots, padded_slots, lse_ptr + pair * num_splits * group, sinks_ptr,
            slots, slots < padded_slots, group, num_splits, ROWS, BLOCK_N, BLOCK_S,
        )  # fmt: skip
        probabilities_ptr += batch * stride_sb + kv_head * stride_sh
        tl.store(probabilities_ptr + slots.to(tl.int64) * stride_sn, sums, mask=slots < num_slots)
    else:
        head = program - num_programs.to(tl.int64) * num_tiles
        pair = head // group
        if sinks_ptr is not None:
            sinks_ptr += (pair % kv_heads) * group
        _merge_outputs(
            out_ptr + head * VALUE_DIM, outputs_ptr, lse_ptr, sinks_ptr, pair * num_splits * group,
            (head - pair * group).to(tl.int32), group, num_splits, VALUE_DIM, BLOCK_DV, BLOCK_S, SPLITS_PER_STEP,
        )  # fmt: skip


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """
    How many programs run side by side. Triton's interpreter, on the CPU, is told 8, so that slots are split there,
    too.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def score_blocks(device: torch.device) -> dict[tuple[int, int], ScoreBlocks]:
    """How `attention_scores` is cut on a device."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return HOPPER_SCORE_BLOCKS if is_hopper else SCORE_BLOCKS


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    row_weights: torch.Tensor | None,
    key_start: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    batch, heads, num_rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    num_programs = batch * kv_heads
    scores = torch.empty(batch, kv_heads, num_keys, dtype=torch.float32, device=key.device)
    block_dim = padded(head_dim)
    blocks = score_blocks(key.device)[key.element_size(), max(block_dim, 64)]
    # A window of fewer rows than a block would be padded up to it, and soft caps take registers.
    blocks = blocks._replace(rows=min(blocks.rows, padded(num_rows), 64 if softcap else blocks.rows))
    if blocks.keys > 64 and num_programs * ceil_div(num_keys, blocks.keys) < num_multiprocessors(key.device):
        blocks = blocks._replace(keys=64, num_warps=4)
    weight_strides = (0, 0)
    if row_weights is not None:
        weight_strides = (row_weights.stride(0) * (row_weights.shape[0] > 1), row_weights.stride(1))
    with on_device(key.device):
        scores_kernel[num_programs * ceil_div(num_keys, blocks.keys),](
            query, key, lse, row_weights, key_start, scores,
            *query.stride(),
            *key.stride(),
            *lse.stride(),
            *weight_strides,
            0 if key_start is None else key_start.stride(0),
            num_programs, kv_heads, num_rows, num_keys, scaling if softcap else scaling * LOG2E.value, softcap or None,
            GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_dim, BLOCK_M=blocks.rows, BLOCK_N=blocks.keys,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


def num_splits_of(num_tiles: int, num_programs: int, multiprocessors: int) -> tuple[int, int]:
    """
    Into how many splits of how many tiles each the slots are cut.

    Two programs per multiprocessor fit side by side. Rounded down: one program more than fits would run alone.

    Args:
        num_tiles (`int`): Blocks of slots.
        num_programs (`int`): Programs of each split.
        multiprocessors (`int`): Of the device.
    """
    num_splits = max(min(2 * multiprocessors // num_programs, num_tiles, MAX_SPLITS), 1)
    tiles_per_split = ceil_div(num_tiles, num_splits)
    return ceil_div(num_tiles, tiles_per_split), tiles_per_split


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, head_dim = query.shape
    kv_heads, num_slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, device = heads // kv_heads, key.device
    block_dim, block_value_dim = padded(head_dim), padded(value_dim)
    # Heads of one program. Tensor cores take 16 at least, and the outputs of more than 32 would not fit the registers.
    rows = 16 if group <= 16 else 32
    blocks = DECODE_BLOCKS[key.element_size(), max(block_dim, block_value_dim, 64)]
    if rows == 32:  # twice the logits and outputs: half of each for a thread
        blocks = DecodeBlocks(max(blocks.slots // 2, 16), num_warps=8, num_stages=blocks.num_stages)
    num_chunks = ceil_div(group, rows)
    num_programs = batch * kv_heads
    num_splits, tiles_per_split = num_splits_of(
        ceil_div(num_slots, blocks.slots), num_programs * num_chunks, num_multiprocessors(device)
    )
    padded_slots = ceil_div(num_slots, 16) * 16  # so that rows of logits begin where wide loads may
    scratch = torch.empty(
        num_programs * group * (padded_slots + num_splits * (value_dim + 1)), dtype=torch.float32, device=device
    )
    output = torch.empty(batch, 1, heads, value_dim, dtype=value.dtype, device=device)
    probabilities = torch.empty(key.shape[:3], dtype=torch.float32, device=device)
    mask_strides = (0, 0, 0) if mask is None else mask.stride()
    if mask is not None and mask.shape[1] == 1:
        mask_strides = (mask_strides[0], 0, mask_strides[2])

    # Heads whose logits the second kernel takes in at once.
    merged_rows = min(padded(group, 1), 16)
    merged_slots = 4096 // merged_rows
    num_tiles = ceil_div(num_slots, merged_slots)
    with on_device(device):
        decode_kernel[num_programs * num_splits * num_chunks,](
            query, key, value, mask, scratch,
            query.stride(0), query.stride(1), query.stride(3),
            *key.stride(),
            *value.stride(),
            *mask_strides,
            kv_heads, group, num_chunks, num_slots, padded_slots, num_splits, tiles_per_split * blocks.slots,
            num_programs, scaling if softcap else scaling * LOG2E.value, softcap or None,
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_dim, BLOCK_DV=block_value_dim,
            ROWS=rows, BLOCK_N=blocks.slots,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, maxnreg=blocks.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[num_programs * num_tiles + batch * heads,](
            scratch, None if sink_logits is None else sink_logits.contiguous(), output, probabilities,
            *probabilities.stride(),
            kv_heads, group, num_slots, padded_slots, num_splits, num_tiles, num_programs,
            VALUE_DIM=value_dim, BLOCK_DV=block_value_dim, ROWS=merged_rows, BLOCK_N=merged_slots, BLOCK_S=MAX_SPLITS,
            SPLITS_PER_STEP=16, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output, probabilities
