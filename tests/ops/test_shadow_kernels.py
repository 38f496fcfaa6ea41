"""The Triton kernels of a ShadowKV cache against their specification."""

from itertools import product

import pytest
import torch
from kernel_device import BF16, DEVICE, F16, F32, IS_INTERPRETED, MARKS, needs_gpu, on_gpu
from shadow_step import (
    CHUNK_SIZE,
    PART,
    inverse_frequencies,
    overlapping,
    random_incoming,
    select,
    step,
    step_tensors,
)

from pyramid_cache.ops import shadow_reference, triton_shadow


pytestmark = MARKS
I8 = torch.int8


def assert_rounded_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of numbers about one: sums that differ in their order, rounded once to the dtype."""
    tolerance = 1e-5 if wanted.dtype == torch.float32 else torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("places, chunks", [(1, 2), (21, 30), (100, 150), on_gpu(1024, 1600)])
def test_plans_are_those_of_the_specification(places: int, chunks: int) -> None:
    batch, kv_heads = (1, 1) if places == 1024 else (3, 2)
    held = torch.full((batch, kv_heads, places), -1)
    # A buffer's books may be a slice with its places apart.
    held_here = torch.full((batch, kv_heads, 2 * places), -1, device=DEVICE)[..., ::2]
    for turn in range(3 if places == 100 else 8):
        wanted = torch.rand(batch, kv_heads, chunks).argsort(dim=-1)[..., :places]
        if turn % 2:
            wanted[torch.rand(wanted.shape) < 0.1] = -1
        incoming = shadow_reference.plan_chunks(held, wanted)
        found = triton_shadow.plan_chunks(held_here, wanted.to(DEVICE))
        assert torch.equal(found.cpu(), incoming) and torch.equal(held_here.cpu(), held)


# Batch, KV heads, rank, head_dim, dimensions that turn, whether pairs are interleaved, and the size of chunks.
SHAPES = [
    (1, 2, 5, 64, 64, False, 8),
    (2, 1, 160, 128, 128, True, 8),
    (1, 3, 40, 80, 32, False, 5),
    (2, 2, 33, 80, 20, True, 5),
    (1, 2, 40, 256, 256, False, 8),
    (1, 2, 5, 64, 0, False, 3),
]
# Of the buffer, and of the factors: one case for each shape in the interpreter, and all pairs on a GPU.
DTYPES = [(F32, F32, F32), (F16, F16, F16), (F32, F16, F16), (F16, I8, F16), (F32, I8, F32), (F32, F32, F32)]
GPU_DTYPES = [(BF16, BF16, BF16), (BF16, I8, BF16), (F16, F16, F16), (F32, I8, F32)]


@pytest.mark.parametrize(
    "dtypes, shape", [*zip(DTYPES, SHAPES, strict=True), *(on_gpu(*pair) for pair in product(GPU_DTYPES, SHAPES))]
)
def test_reconstructed_keys_are_those_of_the_specification(dtypes: tuple, shape: tuple) -> None:
    batch, kv_heads, rank, head_dim, rotary_dim, interleaved, chunk_size = shape
    buffer_dtype, low_rank_dtype, basis_dtype = dtypes
    # Long prompts: float32 has no digits left for the fraction of a turn at 1,000,000 radians.
    places, chunks = 11, 1_200_000 // chunk_size
    tokens = chunks * chunk_size - 2
    # Products are of numbers about one; what is stored in a byte is larger, and the basis smaller.
    size = 40 * rank**0.5 if low_rank_dtype == I8 else 1
    low_rank = overlapping(batch, tokens, rank, dtype=low_rank_dtype, size=size / rank**0.5)
    # As in the paper's code: the rank is the last dimension in memory.
    basis = (torch.randn(batch, kv_heads, head_dim, rank) / size).to(basis_dtype).mT
    incoming, frequencies = random_incoming(batch, kv_heads, places, chunks), inverse_frequencies(rotary_dim)
    # A slice of a larger buffer, whose heads and slots are the other way round in memory.
    wanted = torch.randn(batch, places * chunk_size + 7, kv_heads, head_dim).to(buffer_dtype).transpose(1, 2)
    found = wanted.to(DEVICE, copy=True)
    part, inputs = slice(3, 3 + places * chunk_size), (low_rank, basis, incoming, frequencies)
    shadow_reference.reconstruct_keys(wanted[:, :, part], *inputs, interleaved, chunk_size)
    here = (tensor.to(DEVICE) for tensor in inputs)
    triton_shadow.reconstruct_keys(found[:, :, part], *here, interleaved, chunk_size)
    assert_rounded_alike(found, wanted)


@pytest.mark.parametrize(
    "batch, kv_heads, value_dim, chunk_size, dtype", [(1, 3, 64, 8, F32), (3, 1, 80, 5, BF16), (1, 2, 256, 50, F16)]
)
def test_gathered_values_are_those_of_the_specification(
    batch: int, kv_heads: int, value_dim: int, chunk_size: int, dtype: torch.dtype
) -> None:
    places, tokens, part = 4, 5 * chunk_size - 2, slice(3, 3 + 4 * chunk_size)
    values = torch.randn(batch, kv_heads, tokens, value_dim, dtype=dtype)
    incoming = random_incoming(batch, kv_heads, places, 5)
    wanted = torch.randn(batch, places * chunk_size + 7, kv_heads, value_dim, dtype=dtype).transpose(1, 2)
    start = wanted.clone()
    shadow_reference.gather_values(wanted[:, :, part], values, incoming, chunk_size)
    # Heads that follow each other, and tokens that do.
    for source in (values, values.transpose(1, 2).contiguous().transpose(1, 2)):
        for here in [source] if IS_INTERPRETED else [source.to(DEVICE), source.pin_memory()]:
            found = start.to(DEVICE, copy=True)
            triton_shadow.gather_values(found[:, :, part], here, incoming.to(DEVICE), chunk_size)
            assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("kv_heads, head_stride, token_stride", [(1, 0, 2**27 + 16), (3, 2**30 + 16, 512)])
def test_offsets_may_exceed_32_bits(kv_heads: int, head_stride: int, token_stride: int) -> None:
    # Tokens, slots and ranks, or heads, are so far apart that the last are beyond 2**31 elements. What lies between
    # them is never touched: 5 or 6 GB that the CPU only reserves.
    memory = torch.empty(kv_heads * head_stride + 20 * token_stride, dtype=torch.float16, device=DEVICE)

    def far_apart(width: int, column: int) -> torch.Tensor:
        return memory.as_strided((1, kv_heads, 20, width), (0, head_stride, token_stride, 1), column)

    values, low_rank, basis, buffer = far_apart(20, 0), far_apart(20, 0)[:, 0], far_apart(16, 64), far_apart(16, 128)
    values.copy_(torch.randn(1, kv_heads, 20, 20))
    basis.copy_(torch.randn(1, kv_heads, 20, 16) / 20**0.5)
    values = values[..., :16]
    incoming = torch.stack([torch.randperm(5) for _ in range(kv_heads)])[None]
    inputs = (low_rank.cpu(), basis.cpu(), incoming, inverse_frequencies(16))
    wanted = torch.empty(1, kv_heads, 20, 16, dtype=torch.float16)
    shadow_reference.reconstruct_keys(wanted, *inputs, False, 4)
    here = (low_rank, basis, *(tensor.to(DEVICE) for tensor in inputs[2:]))
    triton_shadow.reconstruct_keys(buffer, *here, False, 4)
    assert_rounded_alike(buffer, wanted)
    shadow_reference.gather_values(wanted, values.cpu(), incoming, 4)
    triton_shadow.gather_values(buffer, values, incoming.to(DEVICE), 4)
    assert torch.equal(buffer.cpu(), wanted)


@needs_gpu
@pytest.mark.parametrize("is_compiled", [False, True])
def test_steps_on_a_gpu_follow_the_query(is_compiled: bool) -> None:
    tensors = step_tensors("cuda")
    tensors["values"] = tensors["values"].pin_memory()
    run = torch.compile(step, fullgraph=True) if is_compiled else step
    for _ in range(4):
        # Half of the query stays, so that some chunks do.
        tensors["query"].mul_(0.5).add_(torch.randn(2, 8, 1, 64, device="cuda"))
        run(tensors)
        torch.cuda.synchronize()
        cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        # Each chunk that is wanted lies in whatever place `held` says.
        held, wanted = cpu["held"], select(cpu)
        assert torch.equal(held.sort(dim=-1).values, wanted.sort(dim=-1).values)
        keys, values = torch.zeros(2, 2, 2, PART.stop - PART.start, 64)
        factors = [cpu[name] for name in ("low_rank", "basis")]
        shadow_reference.reconstruct_keys(keys, *factors, held, cpu["inverse_frequencies"], False, CHUNK_SIZE)
        shadow_reference.gather_values(values, cpu["values"], held, CHUNK_SIZE)
        is_loaded = held.ge(0).repeat_interleave(CHUNK_SIZE, dim=-1)
        assert_rounded_alike(cpu["keys_buffer"][:, :, PART][is_loaded], keys[is_loaded])
        assert torch.equal(cpu["values_buffer"][:, :, PART][is_loaded], values[is_loaded])
