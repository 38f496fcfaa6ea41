"""
`decode_attention` and `decode_packed_attention` of `pyramid_cache.ops` on CUDA, in Triton.

A segment is what one KV head of one row holds: packed tokens, and the latest ones, which all heads have as many of.
For `decode_attention` no tokens are packed, and all slots are the latest. Each segment is cut into parts of one size:
some of its latest tokens, then some of those that it packs. A program whose part lies beyond the end of its segment
leaves at once, and what it would have written is never read.

A first kernel attends, reads keys and values once, where they lie, and leaves the logits behind. A second one, which
then knows every log-sum-exp, merges the outputs and turns the logits into probabilities.

Logits and log-sum-exps are in base 2, and nothing waits for the device, as in `triton_scores`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyramid_cache.ops.launching import ceil_div, on_device, padded
from pyramid_cache.ops.triton_scores import LOG2E, _capped, num_multiprocessors


# Parts of a segment that the second kernel takes in at once, and of which it adds the outputs at once.
MAX_SPLITS = 128
SPLITS_PER_STEP = tl.constexpr(16)

# Query heads of one program: the fewest that tensor cores take. Larger groups, which are rare, are shared out among
# programs that read the same keys at about the same time.
HEADS_PER_PROGRAM = 16


class DecodeBlocks(NamedTuple):
    """How the first kernel is cut."""

    slots: int  # keys and values of one step
    num_warps: int  # of one program
    num_stages: int  # steps whose loads are under way at once, in shared memory
    max_registers: int | None = None  # of a thread; the assembler decides by default


# By bytes of an element and head_dim rounded up to a power of two. 48 to 64 KiB of keys and values are under way in
# each of two programs of a multiprocessor, where 26 KiB would keep an H200 busy. Left to decide, the assembler makes
# room for a third program (168 registers) and spills two registers for it.
DECODE_BLOCKS = {
    (2, 64): DecodeBlocks(slots=64, num_warps=4, num_stages=4, max_registers=224),
    (2, 128): DecodeBlocks(slots=64, num_warps=4, num_stages=3, max_registers=224),
    (2, 256): DecodeBlocks(slots=32, num_warps=4, num_stages=3, max_registers=224),
    (4, 64): DecodeBlocks(slots=64, num_warps=4, num_stages=2),
    (4, 128): DecodeBlocks(slots=32, num_warps=8, num_stages=2),
    (4, 256): DecodeBlocks(slots=16, num_warps=8, num_stages=2),
}


@triton.jit
def _part_of(split, segment, starts_ptr, padded_packed, num_latest, padded_latest, latest_parts, part_size):
    """
    What a split has of a segment.

    Returns:
        Whether these are latest tokens; where the segment begins among all packed tokens; the part's first token and
        its end, counted from the first latest or packed token of the segment, end <= first if there is no such part;
        the end of what may be read and written of its logits; the column of token 0 in the logits, where packed tokens
        come first; and how many parts the segment has.
    """
    is_latest = split < latest_parts
    if starts_ptr is None:
        first = split * part_size
        column = segment * padded_latest
        return True, 0, first, tl.minimum(first + part_size, num_latest), padded_latest, column, latest_parts
    else:
        start = tl.load(starts_ptr + segment)
        length = (tl.load(starts_ptr + segment + 1) - start).to(tl.int32)
        first = tl.where(is_latest, split, split - latest_parts) * part_size
        end = tl.minimum(first + part_size, tl.where(is_latest, num_latest, length))
        column = tl.where(is_latest, padded_packed + segment * padded_latest, start)
        return is_latest, start, first, end, end, column, latest_parts + (length + part_size - 1) // part_size


@triton.jit(
    do_not_specialize=(
        "starts_ptr held_ptr bias_ptr stride_hb stride_hh stride_bb stride_bh kv_heads group num_chunks num_segments "
        "num_splits num_latest latest_parts"
    ).split()
)
def attend_kernel(
    query_ptr, packed_key_ptr, packed_value_ptr, starts_ptr, key_ptr, value_ptr, held_ptr, bias_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_pkn, stride_pkd,
    stride_pvn, stride_pvd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_hb, stride_hh, stride_hn,
    stride_bb, stride_bh, stride_bn,
    kv_heads, group, num_chunks, num_segments, num_splits, padded_packed, num_latest, padded_latest, latest_parts,
    part_size, factor, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    Attention of up to `ROWS` heads of a group over one part of a segment: output, log-sum-exp, and the logits
    themselves, minus infinity where nothing is held. The bias is that of packed tokens, or of slots where no head
    packs any token.

    The first parts of all segments come first, so that programs without a part are the last to start. The scratch is
    logits (group, padded_packed + num_segments * padded_latest), outputs (segments, splits, group, VALUE_DIM) and
    log-sum-exps (segments, splits, group).
    """
    program = tl.program_id(0)
    chunk = program % num_chunks
    split = program // num_chunks // num_segments
    segment = (program // num_chunks % num_segments).to(tl.int64)
    is_latest, start, begin, end, logits_end, column, _ = _part_of(
        split, segment, starts_ptr, padded_packed, num_latest, padded_latest, latest_parts, part_size
    )
    if end <= begin:
        return

    batch = segment // kv_heads
    kv_head = segment - batch * kv_heads
    key_ptr += batch * stride_kb + kv_head * stride_kh
    value_ptr += batch * stride_vb + kv_head * stride_vh
    if starts_ptr is not None:
        # Chosen without a branch, behind which the compiler would know nothing of alignment.
        key_ptr = tl.where(is_latest, key_ptr, packed_key_ptr + start * stride_pkn)
        value_ptr = tl.where(is_latest, value_ptr, packed_value_ptr + start * stride_pvn)
        stride_kn, stride_kd = tl.where(is_latest, stride_kn, stride_pkn), tl.where(is_latest, stride_kd, stride_pkd)
        stride_vn, stride_vd = tl.where(is_latest, stride_vn, stride_pvn), tl.where(is_latest, stride_vd, stride_pvd)

    rows = (chunk * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < group
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    is_dim = dims < HEAD_DIM
    is_value_dim = value_dims < VALUE_DIM
    query = tl.load(
        query_ptr
        + batch * stride_qb
        + (kv_head * group + rows)[:, None] * stride_qh
        + dims[None, :].to(tl.int64) * stride_qd,
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    num_columns = padded_packed + num_segments.to(tl.int64) * padded_latest
    logits_ptr = scratch_ptr + column + rows * num_columns
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    output = tl.zeros([ROWS, BLOCK_DV], dtype=tl.float32)
    tokens = begin + tl.arange(0, BLOCK_N)
    if held_ptr is not None:
        held_ptr += batch * stride_hb + kv_head * stride_hh
        held_end = end
        if starts_ptr is not None:
            held_end = tl.where(is_latest, end, begin)  # of packed tokens none is missing
        held = tl.load(held_ptr + tokens.to(tl.int64) * stride_hn, mask=tokens < held_end, other=1)
    if bias_ptr is not None:
        if starts_ptr is None:
            bias_ptr += batch * stride_bb + kv_head * stride_bh
            bias_end = end
        else:
            bias_ptr += start * stride_bn
            bias_end = tl.where(is_latest, begin, end)  # of latest tokens none has a bias
        bias = tl.load(bias_ptr + tokens.to(tl.int64) * stride_bn, mask=tokens < bias_end, other=0.0)
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        is_used = is_token
        if held_ptr is not None:
            is_used = is_used & (held != 0)
            # One step ahead: the compiler does not start loads early that wait for another one of the same step.
            behind = tokens + BLOCK_N
            held = tl.load(held_ptr + behind.to(tl.int64) * stride_hn, mask=behind < held_end, other=1)
        key = tl.load(
            key_ptr + tokens[:, None].to(tl.int64) * stride_kn + dims[None, :].to(tl.int64) * stride_kd,
            mask=is_token[:, None] & is_dim[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if softcap is not None:
            logits = _capped(logits, softcap)
        if bias_ptr is not None:
            logits += (bias * LOG2E)[None, :]
            behind = tokens + BLOCK_N
            bias = tl.load(bias_ptr + behind.to(tl.int64) * stride_bn, mask=behind < bias_end, other=0.0)
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

    outputs_ptr = scratch_ptr + group * num_columns
    lse_ptr = outputs_ptr + num_segments.to(tl.int64) * num_splits * group * VALUE_DIM
    parts = (segment * num_splits + split) * group + rows
    tl.store(
        outputs_ptr + parts[:, None] * VALUE_DIM + value_dims[None, :],
        output / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=is_row[:, None] & is_value_dim[None, :],
    )
    tl.store(lse_ptr + parts, highest + tl.log2(total), mask=is_row)


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


@triton.jit(
    do_not_specialize=(
        "starts_ptr sinks_ptr packed_sums_ptr latest_sums_ptr kv_heads group num_tiles num_segments num_splits "
        "num_latest latest_parts"
    ).split()
)
def merge_kernel(
    scratch_ptr, starts_ptr, sinks_ptr, out_ptr, packed_sums_ptr, latest_sums_ptr,
    kv_heads, group, num_tiles, num_segments, num_splits, padded_packed, num_latest, padded_latest, latest_parts,
    part_size,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """
    The first programs merge one head's output each; the others turn the logits of one of the `num_tiles` tiles of a
    part into sums of probabilities.
    """
    program = tl.program_id(0)
    num_heads = num_segments * group
    is_output = program < num_heads
    tile = tl.where(is_output, 0, (program - num_heads) // num_segments)
    segment = tl.where(is_output, program // group, (program - num_heads) % num_segments).to(tl.int64)
    is_latest, start, begin, end, logits_end, column, num_parts = _part_of(
        tile // num_tiles, segment, starts_ptr, padded_packed, num_latest, padded_latest, latest_parts, part_size
    )
    first = begin + tile % num_tiles * BLOCK_N
    tokens = first + tl.arange(0, BLOCK_N)
    if sinks_ptr is not None:
        sinks_ptr += segment % kv_heads * group
    num_columns = padded_packed + num_segments.to(tl.int64) * padded_latest
    outputs_ptr = scratch_ptr + group * num_columns
    lse_ptr = outputs_ptr + num_segments.to(tl.int64) * num_splits * group * VALUE_DIM
    outputs_ptr += segment * num_splits * group * VALUE_DIM
    lse_ptr += segment * num_splits * group
    if is_output:
        row = program % group
        lse = _merged_lse(lse_ptr, sinks_ptr, row + tl.arange(0, 1), group, num_parts, BLOCK_S)
        pivot = tl.where(lse == float("-inf"), 0.0, lse)
        value_dims = tl.arange(0, BLOCK_DV)
        is_value_dim = value_dims < VALUE_DIM
        output = tl.zeros([SPLITS_PER_STEP, BLOCK_DV], dtype=tl.float32)
        for first_split in range(0, num_parts, SPLITS_PER_STEP):
            splits = first_split + tl.arange(0, SPLITS_PER_STEP)
            is_split = splits < num_parts
            parts = splits.to(tl.int64) * group + row
            share = tl.exp2(tl.load(lse_ptr + parts, mask=is_split, other=float("-inf")) - pivot)
            output += share[:, None] * tl.load(
                outputs_ptr + parts[:, None] * VALUE_DIM + value_dims[None, :],
                mask=is_split[:, None] & is_value_dim[None, :],
                other=0.0,
            )
        out_ptr += program.to(tl.int64) * VALUE_DIM
        tl.store(out_ptr + value_dims, tl.sum(output, axis=0).to(out_ptr.dtype.element_ty), mask=is_value_dim)
    elif first < end:
        sums = tl.zeros([BLOCK_N], dtype=tl.float32)
        for first_row in range(0, group, ROWS):
            rows = first_row + tl.arange(0, ROWS)
            lse = _merged_lse(lse_ptr, sinks_ptr, rows, group, num_parts, BLOCK_S)
            logits = tl.load(
                scratch_ptr + column + rows.to(tl.int64)[:, None] * num_columns + tokens[None, :],
                mask=(rows < group)[:, None] & (tokens < logits_end)[None, :],
                other=float("-inf"),
            )
            # Chosen, not computed: of a head that attends to nothing the log-sum-exp is minus infinity as well.
            sums += tl.sum(tl.where(logits == float("-inf"), 0.0, tl.exp2(logits - lse[:, None])), axis=0)
        sums_ptr = latest_sums_ptr + segment * num_latest
        if starts_ptr is not None:
            sums_ptr = tl.where(is_latest, sums_ptr, packed_sums_ptr + start)
        tl.store(sums_ptr + tokens, sums, mask=tokens < end)


def part_tiles(
    num_packed: int, longest: int, num_latest: int, num_segments: int, num_chunks: int, tile: int, multiprocessors: int
) -> int:
    """
    How many tiles of tokens a part has.

    Two programs per multiprocessor fit side by side, and one more would run alone. They share all tokens evenly,
    whichever segments these are of: cut by the longest segment alone, the others would leave most of the device idle.
    Of each segment the last part of both kinds may be nearly empty; programs are set aside for these, up to half.

    Args:
        num_packed (`int`): Packed tokens of all segments.
        longest (`int`): Packed tokens of the longest, at most.
        num_latest (`int`): Latest tokens of each.
        num_segments (`int`): How many there are.
        num_chunks (`int`): Programs for each part.
        tile (`int`): Tokens of one step.
        multiprocessors (`int`): Of the device.
    """
    num_programs = 2 * multiprocessors // num_chunks
    latest_tiles = ceil_div(num_latest, tile)
    if not num_packed:
        return ceil_div(latest_tiles, max(min(num_programs // num_segments, MAX_SPLITS), 1))
    num_programs = max(num_programs - 2 * num_segments, num_programs // 2, 1)
    fewest = ceil_div(longest, tile) + latest_tiles
    # One less, for the parts of both kinds are rounded up.
    return max(ceil_div(num_packed + num_segments * num_latest, num_programs * tile), ceil_div(fewest, MAX_SPLITS - 1))


def slot_strides(numbers: torch.Tensor) -> tuple[int, int, int]:
    """Of `(batch, kv_heads or 1, slots)`, for any KV head."""
    batch, head, slot = numbers.stride()
    return batch, 0 if numbers.shape[1] == 1 else head, slot


def decode_packed_attention(
    query: torch.Tensor,
    packed_key: torch.Tensor | None,
    packed_value: torch.Tensor | None,
    starts: torch.Tensor | None,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With sinks, too, and with None where no head packs any token: `bias` is then that of `decode_attention`."""
    batch, heads, _, head_dim = query.shape
    kv_heads, num_latest, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group, num_segments, device = heads // kv_heads, batch * kv_heads, key.device
    num_packed = 0
    packed_strides: tuple[int, ...] = (0, 0, 0, 0)
    if packed_key is not None and packed_value is not None:
        num_packed = packed_key.shape[0]
        packed_strides = (*packed_key.stride(), *packed_value.stride())
        starts = starts.contiguous()
    block_dim, block_value_dim = padded(head_dim), padded(value_dim)
    blocks = DECODE_BLOCKS[key.element_size(), max(block_dim, block_value_dim, 64)]
    num_chunks = ceil_div(group, HEADS_PER_PROGRAM)
    part_size = blocks.slots * part_tiles(
        num_packed, longest, num_latest, num_segments, num_chunks, blocks.slots, num_multiprocessors(device)
    )
    latest_parts = ceil_div(num_latest, part_size)
    num_splits = latest_parts + ceil_div(longest, part_size)
    # So that rows of logits begin where wide loads may.
    padded_packed, padded_latest = ceil_div(num_packed, 16) * 16, ceil_div(num_latest, 16) * 16
    num_columns = padded_packed + num_segments * padded_latest
    scratch_size = group * (num_columns + num_segments * num_splits * (value_dim + 1))
    scratch = torch.empty(scratch_size, dtype=torch.float32, device=device)
    output = torch.empty(batch, 1, heads, value_dim, dtype=value.dtype, device=device)
    packed_sums = torch.empty(num_packed, dtype=torch.float32, device=device)
    latest_sums = torch.empty(batch, kv_heads, num_latest, dtype=torch.float32, device=device)
    mask_strides = (0, 0, 0) if mask is None else slot_strides(mask)
    bias_strides: tuple[int | None, ...] = (None, None, None)  # which the compiled kernel then does not take
    if bias is not None:
        bias_strides = slot_strides(bias) if starts is None else (0, 0, bias.stride(0))
    sizes = (num_segments, num_splits, padded_packed, num_latest, padded_latest, latest_parts, part_size)
    # Heads whose logits the second kernel takes in at once, and tokens.
    merged_rows = min(padded(group, 1), 16)
    merged_tokens = 4096 // merged_rows
    num_tiles = ceil_div(part_size, merged_tokens)
    with on_device(device):
        attend_kernel[num_splits * num_segments * num_chunks,](
            query, packed_key, packed_value, starts, key, value, mask, bias, scratch,
            query.stride(0), query.stride(1), query.stride(3),
            *packed_strides,
            *key.stride(),
            *value.stride(),
            *mask_strides,
            *bias_strides,
            kv_heads, group, num_chunks, *sizes, scaling if softcap else scaling * LOG2E.value, softcap or None,
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_dim, BLOCK_DV=block_value_dim,
            ROWS=HEADS_PER_PROGRAM, BLOCK_N=blocks.slots,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, maxnreg=blocks.max_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[num_segments * (group + num_splits * num_tiles),](
            scratch, starts, None if sink_logits is None else sink_logits.contiguous(), output,
            packed_sums, latest_sums,
            kv_heads, group, num_tiles, *sizes,
            VALUE_DIM=value_dim, BLOCK_DV=block_value_dim, ROWS=merged_rows, BLOCK_N=merged_tokens,
            BLOCK_S=MAX_SPLITS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output, packed_sums, latest_sums


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, _, probabilities = decode_packed_attention(
        query, None, None, None, 0, key, value, scaling, softcap, mask, bias, sink_logits
    )
    return output, probabilities
