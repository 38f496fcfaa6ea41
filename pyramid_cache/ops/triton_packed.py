"""
`pyramid_cache.ops.decode_packed_attention` on CUDA, in Triton: keys and values are read once, where they lie.

Each segment is cut into parts of one size: some of its latest tokens, then some of those that it packs. A long segment
has more parts than a short one; a program whose part lies beyond the end of its segment leaves at once, and what it
would have written is never read. A first kernel attends and leaves the logits behind; a second one, which then knows
every log-sum-exp, merges the outputs and turns the logits into probabilities.

Logits and log-sum-exps are in base 2, and nothing waits for the device, as in `triton_scores`.
"""

import torch
import triton
import triton.language as tl

from pyramid_cache.ops.launching import ceil_div, on_device, padded
from pyramid_cache.ops.packed import segment_starts
from pyramid_cache.ops.triton_scores import (
    DECODE_BLOCKS,
    LOG2E,
    MAX_SPLITS,
    _attend,
    _group_sums,
    _merge_outputs,
    num_multiprocessors,
)


# Query heads of one program: the fewest that tensor cores take. Larger groups, which are rare, are shared out among
# programs that read the same keys at about the same time.
HEADS_PER_PROGRAM = 16


@triton.jit
def _part_of(split, segment, starts_ptr, num_packed, num_latest, latest_parts, part_size):
    """
    What a split has of a segment.

    Returns:
        Whether these are latest tokens; where the segment begins among all packed tokens; the part's first token and
        its end, counted from the first latest or packed token of the segment, end <= first if there is no such part;
        the column of that token 0 in the logits, where packed tokens come first; and how many parts the segment has.
    """
    is_latest = split < latest_parts
    start = tl.load(starts_ptr + segment)
    length = (tl.load(starts_ptr + segment + 1) - start).to(tl.int32)
    first = tl.where(is_latest, split, split - latest_parts) * part_size
    end = tl.minimum(first + part_size, tl.where(is_latest, num_latest, length))
    column = tl.where(is_latest, num_packed + segment * num_latest, start)
    return is_latest, start, first, end, column, latest_parts + (length + part_size - 1) // part_size


@triton.jit(
    do_not_specialize=(
        "starts_ptr kv_heads group num_chunks num_segments num_splits num_packed num_latest latest_parts part_size"
    ).split()
)
def packed_kernel(
    query_ptr, packed_key_ptr, packed_value_ptr, starts_ptr, key_ptr, value_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_pkn, stride_pkd,
    stride_pvn, stride_pvd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    kv_heads, group, num_chunks, num_segments, num_splits, num_packed, num_latest, latest_parts, part_size,
    factor, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    Attention of up to `ROWS` heads of a group over one part of a segment.

    The first parts of all segments come first, so that programs without a part are the last to start. The scratch is
    outputs (segments, splits, group, VALUE_DIM), log-sum-exps (segments, splits, group), and logits (group, num_packed
    + num_segments * num_latest).
    """
    program = tl.program_id(0)
    chunk = program % num_chunks
    split = program // num_chunks // num_segments
    segment = (program // num_chunks % num_segments).to(tl.int64)
    is_latest, start, begin, end, column, _ = _part_of(
        split, segment, starts_ptr, num_packed, num_latest, latest_parts, part_size
    )
    if end <= begin:
        return

    batch = segment // kv_heads
    kv_head = segment - batch * kv_heads
    rows = (chunk * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    # Chosen without a branch, behind which the compiler would know nothing of alignment.
    key_ptr = tl.where(
        is_latest, key_ptr + batch * stride_kb + kv_head * stride_kh, packed_key_ptr + start * stride_pkn
    )
    value_ptr = tl.where(
        is_latest, value_ptr + batch * stride_vb + kv_head * stride_vh, packed_value_ptr + start * stride_pvn
    )
    stride_kn, stride_kd = tl.where(is_latest, stride_kn, stride_pkn), tl.where(is_latest, stride_kd, stride_pkd)
    stride_vn, stride_vd = tl.where(is_latest, stride_vn, stride_pvn), tl.where(is_latest, stride_vd, stride_pvd)

    first_part = (segment * num_splits + split) * group
    lse_ptr = scratch_ptr + num_segments.to(tl.int64) * num_splits * group * VALUE_DIM
    logits_ptr = lse_ptr + num_segments.to(tl.int64) * num_splits * group + column
    num_columns = num_packed + num_segments.to(tl.int64) * num_latest
    _attend(
        query_ptr + batch * stride_qb + kv_head * group * stride_qh, key_ptr, value_ptr, None,
        logits_ptr, scratch_ptr + first_part * VALUE_DIM, lse_ptr + first_part,
        stride_qh, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, 0, num_columns,
        rows, rows < group, begin, end, end, factor, softcap,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, ROWS, BLOCK_N,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=(
        "starts_ptr packed_sums_ptr latest_sums_ptr group num_segments num_splits num_packed num_latest latest_parts "
        "part_size"
    ).split()
)
def packed_merge_kernel(
    scratch_ptr, starts_ptr, out_ptr, packed_sums_ptr, latest_sums_ptr,
    group, num_segments, num_splits, num_packed, num_latest, latest_parts, part_size,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS_PER_STEP: tl.constexpr,
):  # fmt: skip
    """
    The first programs merge one head's output each; the others turn the logits of a part into sums of probabilities.
    """
    program = tl.program_id(0)
    num_heads = num_segments * group
    lse_ptr = scratch_ptr + num_segments.to(tl.int64) * num_splits * group * VALUE_DIM
    if program < num_heads:
        segment = (program // group).to(tl.int64)
        _, _, _, _, _, num_parts = _part_of(0, segment, starts_ptr, num_packed, num_latest, latest_parts, part_size)
        first_part = segment * num_splits * group
        _merge_outputs(
            out_ptr + program.to(tl.int64) * VALUE_DIM, scratch_ptr, lse_ptr, None,
            first_part, program % group, group, num_parts, VALUE_DIM, BLOCK_DV, BLOCK_S, SPLITS_PER_STEP,
        )  # fmt: skip
    else:
        split = (program - num_heads) // num_segments
        segment = ((program - num_heads) % num_segments).to(tl.int64)
        is_latest, start, begin, end, column, num_parts = _part_of(
            split, segment, starts_ptr, num_packed, num_latest, latest_parts, part_size
        )
        num_columns = num_packed + num_segments.to(tl.int64) * num_latest
        logits_ptr = lse_ptr + num_segments.to(tl.int64) * num_splits * group + column
        lse_ptr += segment * num_splits * group
        sums_ptr = tl.where(is_latest, latest_sums_ptr + segment * num_latest, packed_sums_ptr + start)
        for first in range(begin, end, BLOCK_N):
            tokens = first + tl.arange(0, BLOCK_N)
            sums = _group_sums(
                logits_ptr, num_columns, lse_ptr, None,
                tokens, tokens < end, group, num_parts, ROWS, BLOCK_N, BLOCK_S,
            )  # fmt: skip
            tl.store(sums_ptr + tokens, sums, mask=tokens < end)


def part_tiles(
    num_packed: int, longest: int, num_latest: int, num_segments: int, num_chunks: int, tile: int, multiprocessors: int
) -> int:
    """
    How many tiles of tokens a part has.

    Two programs per multiprocessor fit side by side, and share all tokens evenly, whichever segments these are of: cut
    by the longest segment alone, the others would leave most of the device idle. Of each segment the last part of both
    kinds may be nearly empty; programs are set aside for these, up to half.

    Args:
        num_packed (`int`): Packed tokens of all segments.
        longest (`int`): Packed tokens of the longest.
        num_latest (`int`): Latest tokens of each.
        num_segments (`int`): How many there are.
        num_chunks (`int`): Programs for each part.
        tile (`int`): Tokens of one step.
        multiprocessors (`int`): Of the device.
    """
    num_programs = 2 * multiprocessors // num_chunks
    num_programs = max(num_programs - 2 * num_segments, num_programs // 2, 1)
    fewest = ceil_div(longest, tile) + ceil_div(num_latest, tile)
    # One less, for the parts of both kinds are rounded up.
    return max(ceil_div(num_packed + num_segments * num_latest, num_programs * tile), ceil_div(fewest, MAX_SPLITS - 1))


def decode_packed_attention(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    lengths: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, _, head_dim = query.shape
    kv_heads, num_latest, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, num_segments, device = heads // kv_heads, batch * kv_heads, key.device
    starts = segment_starts(lengths, device) if starts is None else starts.contiguous()
    block_dim, block_value_dim = padded(head_dim), padded(value_dim)
    blocks = DECODE_BLOCKS[key.element_size(), max(block_dim, block_value_dim, 64)]
    num_chunks = ceil_div(group, HEADS_PER_PROGRAM)
    num_packed, longest = packed_key.shape[0], max(lengths)
    part_size = blocks.slots * part_tiles(
        num_packed, longest, num_latest, num_segments, num_chunks, blocks.slots, num_multiprocessors(device)
    )
    latest_parts = ceil_div(num_latest, part_size)
    num_splits = latest_parts + ceil_div(longest, part_size)
    scratch = torch.empty(
        group * (num_segments * num_splits * (value_dim + 1) + num_packed + num_segments * num_latest),
        dtype=torch.float32,
        device=device,
    )
    output = torch.empty(batch, 1, heads, value_dim, dtype=value.dtype, device=device)
    packed_sums = torch.empty(num_packed, dtype=torch.float32, device=device)
    latest_sums = torch.empty(batch, kv_heads, num_latest, dtype=torch.float32, device=device)
    sizes = (num_segments, num_splits, num_packed, num_latest, latest_parts, part_size)
    # Heads whose logits the second kernel takes in at once.
    merged_rows = min(padded(group, 1), 16)
    with on_device(device):
        packed_kernel[num_splits * num_segments * num_chunks,](
            query, packed_key, packed_value, starts, key, value, scratch,
            query.stride(0), query.stride(1), query.stride(3),
            *packed_key.stride(),
            *packed_value.stride(),
            *key.stride(),
            *value.stride(),
            kv_heads, group, num_chunks, *sizes, scaling if softcap else scaling * LOG2E.value, softcap or None,
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_dim, BLOCK_DV=block_value_dim,
            ROWS=HEADS_PER_PROGRAM, BLOCK_N=blocks.slots,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, maxnreg=blocks.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
        packed_merge_kernel[num_segments * (group + num_splits),](
            scratch, starts, output, packed_sums, latest_sums,
            group, *sizes,
            VALUE_DIM=value_dim, BLOCK_DV=block_value_dim, ROWS=merged_rows, BLOCK_N=4096 // merged_rows,
            BLOCK_S=MAX_SPLITS, SPLITS_PER_STEP=16, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output, packed_sums, latest_sums
