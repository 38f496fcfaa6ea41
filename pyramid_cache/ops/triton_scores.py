"""
`pyramid_cache.ops.attention_scores` on CUDA, in Triton.

A tile of keys stays where it is and the queries stream past it, so that a key's score is summed in one program: no
atomics, nothing of the size `queries x keys`, and the same bits every time.

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


class ScoreBlocks(NamedTuple):
    """How `attention_scores` is cut."""

    keys: int  # of one program: the rows of its matrix product, 64 or more for a warp group's instruction
    rows: int  # queries that pass it at once
    num_warps: int  # 4, or 8 for two warp groups
    num_stages: int  # steps of the loop whose loads are under way at once, in shared memory


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


@triton.jit
def _capped(logits, softcap):
    """`softcap * tanh(logits / softcap)` in base 2; tanh by an exponential that overflows to the right limit."""
    return (softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2E / softcap)) + 1.0)) * LOG2E


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
            logits = _capped(logits, softcap)
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
