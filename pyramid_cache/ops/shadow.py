"""
The ops of a ShadowKV cache (arXiv 2410.21465): keys of low rank stay on the device, values on the host, and of both
only the chunks that a step attends to are brought into a buffer.

A step is `select_chunks`, `plan_chunks`, then `reconstruct_keys` and `gather_values` into the places that the plan
gives out, then attention over the buffer. No op waits for the device, so a step can be captured in a CUDA graph.

Chunk `c` is the tokens `c * chunk_size` to `(c + 1) * chunk_size - 1` of a row's storage, and place `p` the slots
`p * chunk_size` to `(p + 1) * chunk_size - 1` of the buffer. Keys carry their rotation, so a chunk may be in any
place. Where the last chunk is short, the slots that it leaves keep what they held, and must not be attended to.

The docstrings are the specification. `shadow_reference` computes the ops on the CPU, `triton_shadow` on CUDA.
"""

from collections.abc import Callable
from typing import Any

import torch

from pyramid_cache.ops import shadow_reference
from pyramid_cache.ops.registration import KERNEL_DTYPES, check_dtype, check_query, check_shape, kernels_of, register


# Factors and landmarks may be stored in one byte a number; whoever quantises them puts their scale into the other
# factor of the product.
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)


def select_chunks(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    num_chunks: int,
    scaling: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """
    The chunks that a query attends to most, by their landmarks: of each query head's softmax over the landmarks, the
    largest of a group of heads counts.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`, rotated.
        landmarks (`torch.Tensor`): `(batch, kv_heads, chunks, head_dim)`, one vector for each chunk, such as the
            mean of its keys. In the query's dtype or one of `QUANTIZED_DTYPES`.
        num_chunks (`int`): How many chunks each KV head takes.
        scaling (`float`): Factor on the logits.
        mask (`torch.Tensor`): bool `(batch, kv_heads, chunks)`, False for a chunk that must not be taken: there is
            none, or it is held elsewhere.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, num_chunks)` int64, distinct chunks, those attended to most first, then -1
        where a head has fewer than `num_chunks`. Which of equal chunks are taken is not defined.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_query(query, landmarks, name="landmarks", rows=1)
    check_dtype("landmarks", landmarks, query.dtype, *QUANTIZED_DTYPES)
    if num_chunks < 1:
        raise ValueError(f"`num_chunks` must be at least 1, but is {num_chunks}.")
    check_shape("mask", mask, *landmarks.shape[:3])
    check_dtype("mask", mask, torch.bool)
    return select_chunks_unchecked(query, landmarks, mask, num_chunks, scaling)


def plan_chunks(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """
    Where the wanted chunks go in a buffer that holds some of them already. Those stay where they are; each of the
    others takes a place whose chunk is not wanted.

    Args:
        held (`torch.Tensor`): `(batch, kv_heads, places)` int64, the chunk in each place of the buffer, -1 for none.
            Changed in place: what each place holds once `incoming` is loaded, -1 for a place that is left over, and
            must not be attended to.
        wanted (`torch.Tensor`): `(batch, kv_heads, places)` int64, distinct chunks in any order, -1 for none.

    Returns:
        `torch.Tensor`: `incoming`, `(batch, kv_heads, places)` int64, the chunk to load into each place, -1 for a
        place to leave alone.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_shape("held", held, None, None, None)
    check_shape("wanted", wanted, *held.shape)
    check_dtype("held", held, torch.int64)
    check_dtype("wanted", wanted, torch.int64)
    _check_device(held.device, wanted=wanted)
    return plan_chunks_unchecked(held, wanted)


def reconstruct_keys(
    buffer: torch.Tensor,
    low_rank: torch.Tensor,
    basis: torch.Tensor,
    incoming: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    *,
    chunk_size: int,
    interleaved: bool = False,
) -> None:
    """
    Writes the keys of the incoming chunks into their places: `low_rank @ basis`, in float32, rotated to where the
    tokens are in the storage.

    Args:
        buffer (`torch.Tensor`): `(batch, kv_heads, places * chunk_size, head_dim)`, may be a slice of a larger one.
            Only the slots of tokens that are loaded change.
        low_rank (`torch.Tensor`): `(batch, tokens, rank)`, the factor that all heads share, in the dtype of the basis
            or in one of `QUANTIZED_DTYPES`. The last chunk may have fewer tokens than others.
        basis (`torch.Tensor`): `(batch, kv_heads, rank, head_dim)`, the factor of each head.
        incoming (`torch.Tensor`): `(batch, kv_heads, places)` int64 from `plan_chunks`. Chunks that do not exist are
            left out, as -1 is.
        inverse_frequencies (`torch.Tensor`): `(rotary_dim / 2,)` float32. The first `rotary_dim` dimensions of a head
            turn, by angles that are rounded to float32 as models round them; the others are left as they are.
        chunk_size (`int`): Tokens of a chunk.
        interleaved (`bool`, defaults to `False`): Dimension `2 i` turns with `2 i + 1` (GLM, Cohere), not `i` with
            `i + rotary_dim / 2` (Llama).

    Raises:
        ValueError: For shapes, dtypes and devices that do not fit.
    """
    batch, kv_heads = _check_buffer(buffer, incoming, chunk_size)
    head_dim = buffer.shape[3]
    check_shape("low_rank", low_rank, batch, None, None)
    check_shape("basis", basis, batch, kv_heads, low_rank.shape[2], head_dim)
    check_shape("inverse_frequencies", inverse_frequencies, None)
    if 2 * inverse_frequencies.shape[0] > head_dim:
        raise ValueError(
            f"{inverse_frequencies.shape[0]} inverse frequencies turn two dimensions each, more than the {head_dim} "
            "of a head. Pass one for each pair."
        )
    check_dtype("buffer", buffer, *KERNEL_DTYPES)
    check_dtype("basis", basis, *KERNEL_DTYPES)
    check_dtype("low_rank", low_rank, basis.dtype, *QUANTIZED_DTYPES)
    check_dtype("inverse_frequencies", inverse_frequencies, torch.float32)
    _check_device(buffer.device, low_rank=low_rank, basis=basis, inverse_frequencies=inverse_frequencies)
    reconstruct_keys_unchecked(buffer, low_rank, basis, incoming, inverse_frequencies, interleaved, chunk_size)


def gather_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, *, chunk_size: int) -> None:
    """
    Copies the values of the incoming chunks into their places. Values in pinned memory of the host are read from there
    by the kernel itself; they must neither change nor be freed until it has run.

    Args:
        buffer (`torch.Tensor`): `(batch, kv_heads, places * chunk_size, value_dim)`, may be a slice of a larger one.
            Only the slots of tokens that are loaded change.
        values (`torch.Tensor`): `(batch, kv_heads, tokens, value_dim)` in the buffer's dtype, on its device or in
            pinned memory. The last chunk may have fewer tokens than others. Fastest where a head's values are
            contiguous.
        incoming (`torch.Tensor`): `(batch, kv_heads, places)` int64 from `plan_chunks`. Chunks that do not exist are
            left out, as -1 is.
        chunk_size (`int`): Tokens of a chunk.

    Raises:
        ValueError: For shapes, dtypes and devices that do not fit, and for values on the host that are not pinned.
    """
    batch, kv_heads = _check_buffer(buffer, incoming, chunk_size)
    check_shape("values", values, batch, kv_heads, None, buffer.shape[3])
    check_dtype("values", values, buffer.dtype)
    if values.device.type != "cpu":
        _check_device(buffer.device, values=values)
    gather_values_unchecked(buffer, values, incoming, chunk_size)


def _check_buffer(buffer: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> tuple[int, int]:
    """Raises unless the buffer has the places of `incoming`; returns batch and KV heads."""
    check_shape("buffer", buffer, None, None, None, None)
    batch, kv_heads, slots, _ = buffer.shape
    check_shape("incoming", incoming, batch, kv_heads, None)
    check_dtype("incoming", incoming, torch.int64)
    _check_device(buffer.device, incoming=incoming)
    places = incoming.shape[2]
    if chunk_size < 1 or slots != places * chunk_size:
        raise ValueError(
            f"`buffer` has {slots} slots, which are not {places} places of {chunk_size} tokens. Pass the part of it "
            "that holds the chunks of `incoming`."
        )
    return batch, kv_heads


def _check_device(device: torch.device, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(
                f"`{name}` is on {tensor.device}, but must be on {device}. Move it there with `.to({device})`."
            )


def _on_cuda(name: str) -> Callable:
    """The op of that name, computed by Triton where there are kernels for the device of its first argument."""

    def run(first: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        return getattr(kernels_of("triton_shadow", first.device) or shadow_reference, name)(first, *rest)

    return run


def _gather_values_cuda(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    if values.device.type == "cpu" and not values.is_pinned():
        raise ValueError(
            f"`values` is in pageable memory of the host, which {buffer.device} cannot read. Pin it once, with "
            "`values = values.pin_memory()`."
        )
    _on_cuda("gather_values")(buffer, values, incoming, chunk_size)


select_chunks_unchecked = register(
    "select_chunks(Tensor query, Tensor landmarks, Tensor mask, SymInt num_chunks, float scaling) -> Tensor",
    cpu=shadow_reference.select_chunks,
    cuda=shadow_reference.select_chunks,
    fake=lambda query, landmarks, mask, num_chunks, scaling: mask.new_empty(
        *mask.shape[:2], num_chunks, dtype=torch.int64
    ),
)
plan_chunks_unchecked = register(
    "plan_chunks(Tensor(a!) held, Tensor wanted) -> Tensor",
    cpu=shadow_reference.plan_chunks,
    cuda=_on_cuda("plan_chunks"),
    fake=lambda held, wanted: wanted.new_empty(wanted.shape),
)
reconstruct_keys_unchecked = register(
    "reconstruct_keys(Tensor(a!) buffer, Tensor low_rank, Tensor basis, Tensor incoming, Tensor inverse_frequencies, "
    "bool interleaved, SymInt chunk_size) -> ()",
    cpu=shadow_reference.reconstruct_keys,
    cuda=_on_cuda("reconstruct_keys"),
    fake=lambda *arguments: None,
)
gather_values_unchecked = register(
    "gather_values(Tensor(a!) buffer, Tensor values, Tensor incoming, SymInt chunk_size) -> ()",
    cpu=shadow_reference.gather_values,
    cuda=_gather_values_cuda,
    fake=lambda *arguments: None,
)
