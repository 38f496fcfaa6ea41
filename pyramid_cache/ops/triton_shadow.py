"""
The CUDA kernels of `pyramid_cache.ops.shadow`. Functions have the arguments and results of the ops.

Grids have one dimension, offsets are computed in 64 bits and strides are free; nothing waits for the host. The
arguments of a kernel stand in rows: the tensors, the strides of each, numbers, and what it is compiled for.
"""

import torch
import triton
import triton.language as tl

from pyramid_cache.ops.launching import ceil_div, on_device, padded


# Comparisons of one step of `plan_chunks`, of all threads together.
COMPARISONS_PER_STEP = 4096
# Elements that one program of `gather_values` holds at once.
ELEMENTS_PER_COPY = 8192


@triton.jit
def plan_kernel(
    held, wanted, incoming,
    held_row, held_head, held_place,
    wanted_row, wanted_head, wanted_place,
    kv_heads, num_places,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // kv_heads, program % kv_heads
    held += row * held_row + head * held_head
    wanted += row * wanted_row + head * wanted_head
    incoming += program * num_places

    places = tl.arange(0, BLOCK)
    is_place = places < num_places
    held += places.to(tl.int64) * held_place
    chunks = tl.load(held, mask=is_place, other=-1).to(tl.int32)
    # `held` is written below, and where there are fewer places than threads several of them read the same one.
    tl.debug_barrier()

    stays = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, STEP):
        others = start + tl.arange(0, STEP)
        asked = tl.load(wanted + others.to(tl.int64) * wanted_place, mask=others < num_places, other=-1).to(tl.int32)
        is_same = (chunks[:, None] == asked[None, :]) & (asked >= 0)[None, :]
        stays = tl.maximum(stays, tl.max(is_same.to(tl.int32), axis=1))

    # The n-th missing chunk goes to the n-th free place. What is beyond the last place comes last, and gets none.
    is_free = stays == 0
    place_rank = tl.cumsum(is_free.to(tl.int32), axis=0) - 1
    loads = tl.full([BLOCK], -1, tl.int32)
    num_missing = 0
    for start in range(0, BLOCK, STEP):
        others = start + tl.arange(0, STEP)
        asked = tl.load(wanted + others.to(tl.int64) * wanted_place, mask=others < num_places, other=-1).to(tl.int32)
        is_same = chunks[:, None] == asked[None, :]
        is_missing = (asked >= 0) & (tl.max(is_same.to(tl.int32), axis=0) == 0)
        rank = num_missing + tl.cumsum(is_missing.to(tl.int32), axis=0) - 1
        is_match = (place_rank[:, None] == rank[None, :]) & is_free[:, None] & is_missing[None, :]
        loads = tl.maximum(loads, tl.max(tl.where(is_match, asked[None, :], -1), axis=1))
        num_missing += tl.sum(is_missing.to(tl.int32), axis=0)

    tl.store(incoming + places, loads.to(tl.int64), mask=is_place)
    tl.store(held, tl.where(stays > 0, chunks, loads).to(tl.int64), mask=is_place)


@triton.jit(do_not_specialize=["num_tokens"])  # a longer prompt is not compiled anew
def reconstruct_kernel(
    buffer, low_rank, basis, incoming, inverse_frequencies,
    buffer_row, buffer_head, buffer_slot, buffer_column,
    low_rank_row, low_rank_token, low_rank_rank,
    basis_row, basis_head, basis_rank, basis_column,
    incoming_row, incoming_head, incoming_place,
    frequencies_pair,
    kv_heads, num_slots, num_tokens, rank, programs_per_head,
    CHUNK_SIZE: tl.constexpr, NUM_PAIRS: tl.constexpr, NUM_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, RANK_STEP: tl.constexpr, RANK_STEPS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // programs_per_head % kv_heads).to(tl.int64)
    row = (program // programs_per_head // kv_heads).to(tl.int64)
    buffer += row * buffer_row + head * buffer_head
    low_rank += row * low_rank_row
    basis += row * basis_row + head * basis_head
    incoming += row * incoming_row + head * incoming_head

    slots = program % programs_per_head * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    places = (slots // CHUNK_SIZE).to(tl.int64)
    chunks = tl.load(incoming + places * incoming_place, mask=slots < num_slots, other=-1)
    tokens = chunks * CHUNK_SIZE + slots % CHUNK_SIZE
    is_loaded = (chunks >= 0) & (tokens < num_tokens)
    if tl.max(is_loaded.to(tl.int32), axis=0) == 0:
        return

    pairs = tl.arange(0, BLOCK_PAIRS)
    is_pair = pairs < NUM_PAIRS
    turned_columns = tl.arange(0, 2 * BLOCK_PAIRS)
    rest_columns = 2 * NUM_PAIRS + tl.arange(0, BLOCK_REST)

    # Interleaved pairs are computed side by side and taken apart later: columns that are read two apart load slowly.
    both = tl.zeros([BLOCK_SLOTS, 2 * BLOCK_PAIRS], tl.float32)
    first = tl.zeros([BLOCK_SLOTS, BLOCK_PAIRS], tl.float32)
    second = tl.zeros([BLOCK_SLOTS, BLOCK_PAIRS], tl.float32)
    rest = tl.zeros([BLOCK_SLOTS, BLOCK_REST], tl.float32)
    token_rows = low_rank + tokens[:, None] * low_rank_token
    for step in range(RANK_STEPS):
        ranks = step * RANK_STEP + tl.arange(0, RANK_STEP)
        is_rank = ranks < rank
        columns = ranks.to(tl.int64)[None, :] * low_rank_rank
        factor = tl.load(token_rows + columns, mask=is_loaded[:, None] & is_rank[None, :], other=0.0)
        # A product takes one dtype. A byte is a number that float16 and bfloat16 have, too.
        factor = factor.to(basis.dtype.element_ty)
        basis_rows = basis + ranks.to(tl.int64)[:, None] * basis_rank
        if NUM_PAIRS > 0 and INTERLEAVED:
            both = add_product(both, factor, basis_rows, basis_column, turned_columns, is_rank, 2 * NUM_PAIRS)
        if NUM_PAIRS > 0 and not INTERLEAVED:
            first = add_product(first, factor, basis_rows, basis_column, pairs, is_rank, NUM_PAIRS)
            second = add_product(second, factor, basis_rows, basis_column, NUM_PAIRS + pairs, is_rank, 2 * NUM_PAIRS)
        if NUM_REST > 0:
            head_dim: tl.constexpr = 2 * NUM_PAIRS + NUM_REST
            rest = add_product(rest, factor, basis_rows, basis_column, rest_columns, is_rank, head_dim)

    buffer_rows = buffer + slots.to(tl.int64)[:, None] * buffer_slot
    if NUM_PAIRS > 0:
        frequencies = tl.load(inverse_frequencies + pairs.to(tl.int64) * frequencies_pair, mask=is_pair, other=0.0)
        # What is not loaded is not stored either, but without the choice the assembler spills registers.
        token_positions = tl.where(is_loaded, tokens, 0).to(tl.float32)
        cosine, sine = cosine_and_sine(token_positions[:, None] * frequencies[None, :])
        if INTERLEAVED:
            first, second = tl.split(tl.reshape(both, [BLOCK_SLOTS, BLOCK_PAIRS, 2]))
        left, right = first * cosine - second * sine, second * cosine + first * sine
        if INTERLEAVED:
            both = tl.reshape(tl.join(left, right), [BLOCK_SLOTS, 2 * BLOCK_PAIRS])
            store_columns(buffer_rows, buffer_column, turned_columns, both, is_loaded, 2 * NUM_PAIRS)
        else:
            store_columns(buffer_rows, buffer_column, pairs, left, is_loaded, NUM_PAIRS)
            store_columns(buffer_rows, buffer_column, NUM_PAIRS + pairs, right, is_loaded, 2 * NUM_PAIRS)
    if NUM_REST > 0:
        store_columns(buffer_rows, buffer_column, rest_columns, rest, is_loaded, 2 * NUM_PAIRS + NUM_REST)


@triton.jit
def add_product(total, factor, basis_rows, basis_column, columns, is_rank, end: tl.constexpr):
    """`total` plus `factor` times those columns of the basis that are before `end`."""
    mask = is_rank[:, None] & (columns < end)[None, :]
    basis = tl.load(basis_rows + columns.to(tl.int64)[None, :] * basis_column, mask=mask, other=0.0)
    return tl.dot(factor, basis, total, input_precision="ieee")


@triton.jit
def store_columns(buffer_rows, buffer_column, columns, keys, is_loaded, end: tl.constexpr):
    """Writes the columns that are before `end`, of the slots that are loaded."""
    mask = is_loaded[:, None] & (columns < end)[None, :]
    tl.store(
        buffer_rows + columns.to(tl.int64)[None, :] * buffer_column, keys.to(buffer_rows.dtype.element_ty), mask=mask
    )


@triton.jit
def cosine_and_sine(angles):
    """
    Of float32 angles of any size, to about 1e-7. `tl.cos` and `tl.sin` are as exact, but each brings a second way for
    large angles along, and a tile of them needs more registers than there are.
    """
    # In float64, as float32 has no digits left for the fraction of a turn at position 1,000,000. 2 / pi and pi / 2.
    quarters = angles.to(tl.float64) * 0.63661977236758134
    nearest = tl.floor(quarters + 0.5)
    angle = ((quarters - nearest) * 1.5707963267948966).to(tl.float32)
    # Taylor series: within pi / 4 of zero, what is left out is below 3e-8.
    square = angle * angle
    sine = 1.0 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    sine = angle * sine
    cosine = 1.0 + square * (-0.5 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    quadrant = nearest.to(tl.int32) & 3
    is_odd = (quadrant & 1) == 1
    cosine, sine = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return cosine, tl.where(quadrant >= 2, -sine, sine)


@triton.jit(do_not_specialize=["num_tokens"])
def gather_kernel(
    buffer, values, incoming,
    buffer_row, buffer_head, buffer_slot, buffer_column,
    values_row, values_head, values_token, values_column,
    incoming_row, incoming_head, incoming_place,
    kv_heads, num_places, num_tokens,
    CHUNK_SIZE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = (program % num_places).to(tl.int64)
    head = (program // num_places % kv_heads).to(tl.int64)
    row = (program // num_places // kv_heads).to(tl.int64)
    chunk = tl.load(incoming + row * incoming_row + head * incoming_head + place * incoming_place)
    if chunk < 0:
        return

    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    source = values + row * values_row + head * values_head + columns[None, :] * values_column
    target = buffer + row * buffer_row + head * buffer_head + columns[None, :] * buffer_column
    for start in range(0, CHUNK_SIZE, BLOCK_TOKENS):
        offsets = start + tl.arange(0, BLOCK_TOKENS)
        tokens = chunk * CHUNK_SIZE + offsets
        slots = place * CHUNK_SIZE + offsets
        exists = (offsets < CHUNK_SIZE) & (tokens < num_tokens)
        mask = exists[:, None] & (columns < VALUE_DIM)[None, :]
        copied = tl.load(source + tokens[:, None] * values_token, mask=mask)
        tl.store(target + slots[:, None] * buffer_slot, copied, mask=mask)


def plan_chunks(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`pyramid_cache.ops.shadow.plan_chunks`: one program for each KV head, which compares every pair in tiles."""
    incoming = torch.empty(wanted.shape, dtype=wanted.dtype, device=wanted.device)
    batch, kv_heads, num_places = held.shape
    if incoming.numel() == 0:
        return incoming
    block = padded(num_places)
    with on_device(held.device):
        plan_kernel[(batch * kv_heads,)](
            held, wanted, incoming,
            *held.stride(),
            *wanted.stride(),
            kv_heads, num_places,
            BLOCK=block, STEP=min(max(COMPARISONS_PER_STEP // block, 8), 32, block),
            num_warps=8 if block >= 512 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return incoming


def reconstruct_keys(
    buffer: torch.Tensor,
    low_rank: torch.Tensor,
    basis: torch.Tensor,
    incoming: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    interleaved: bool,
    chunk_size: int,
) -> None:
    """
    `pyramid_cache.ops.shadow.reconstruct_keys`: gather, product and rotation of a block of slots in one program.

    A program of more slots reads the basis less often, but does more for nothing, since one without anything to load
    ends at once. Products in float32 have no tensor cores and need more registers: with twice the slots some of them
    lie on the stack.
    """
    batch, kv_heads, num_slots, head_dim = buffer.shape
    if incoming.numel() == 0:
        return
    rank, num_pairs = low_rank.shape[2], inverse_frequencies.shape[0]
    num_rest, is_wide = head_dim - 2 * num_pairs, basis.dtype == torch.float32
    block_slots = 16 if is_wide else 64 if head_dim <= 128 else 32
    rank_step = 16 if is_wide else 32
    programs_per_head = ceil_div(num_slots, block_slots)
    with on_device(buffer.device):
        reconstruct_kernel[(batch * kv_heads * programs_per_head,)](
            buffer, low_rank, basis, incoming, inverse_frequencies,
            *buffer.stride(),
            *low_rank.stride(),
            *basis.stride(),
            *incoming.stride(),
            *inverse_frequencies.stride(),
            kv_heads, num_slots, low_rank.shape[1], rank, programs_per_head,
            CHUNK_SIZE=chunk_size, NUM_PAIRS=num_pairs, NUM_REST=num_rest,
            INTERLEAVED=interleaved, RANK_STEP=rank_step, RANK_STEPS=ceil_div(rank, rank_step),
            BLOCK_SLOTS=block_slots, BLOCK_PAIRS=padded(num_pairs), BLOCK_REST=padded(num_rest),
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def gather_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    """
    `pyramid_cache.ops.shadow.gather_values`: one program for each place, each thread of which moves 16 bytes at once.
    Pinned memory of the host is read through its pointer, which unified addressing makes valid on the device; Triton's
    launcher accepts it as it is.
    """
    batch, kv_heads, num_places = incoming.shape
    if incoming.numel() == 0:
        return
    num_tokens, value_dim = values.shape[2:]
    block_columns = padded(value_dim, 1)
    block_tokens = min(padded(chunk_size, 1), max(ELEMENTS_PER_COPY // block_columns, 1))
    warps = block_tokens * block_columns * values.element_size() // 512
    with on_device(buffer.device):
        gather_kernel[(batch * kv_heads * num_places,)](
            buffer, values, incoming,
            *buffer.stride(),
            *values.stride(),
            *incoming.stride(),
            kv_heads, num_places, num_tokens,
            CHUNK_SIZE=chunk_size, VALUE_DIM=value_dim, BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
            num_warps=min(max(warps, 1), 8), enable_fp_fusion=True,
        )  # fmt: skip
