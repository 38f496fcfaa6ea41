"""
Decoding over heads that hold different numbers of tokens, stored one behind the other without padding.

A *segment* is what one KV head of one row holds. Segments lie row by row and head by head, one right behind the other;
`starts` tells on the device where each begins. Beside the packed tokens there are the latest ones, in slots.
"""

import itertools
import operator

import torch

from pyramid_cache.ops.registration import (
    check_dtype,
    check_latest,
    check_query,
    check_shape,
    kernels,
    needs_gradients,
    register,
)
from pyramid_cache.ops.transfer import numbers_on


def decode_packed_attention(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    packed_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention of one query per row over packed tokens and the latest ones, with the probabilities that it used. It is
    differentiable, and does not wait for the device.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        packed_key, packed_value (`torch.Tensor`): `(tokens, head_dim)` and `(tokens, value_dim)`. What lies behind the
            last segment must be finite.
        starts (`torch.Tensor`): `(batch * kv_heads + 1,)` int64, where each segment begins, and where the last one
            ends. Segments may be empty.
        longest (`int`): At least the length of the longest segment; a much larger number costs time.
        key, value (`torch.Tensor`): `(batch, kv_heads, latest, head_dim)` and `(batch, kv_heads, latest, value_dim)`:
            at least one token, that of the query.
        scaling, softcap: As in `attention_scores`.
        mask (`torch.Tensor`, *optional*): bool `(batch, kv_heads or 1, latest)`, False for a slot of the latest tokens
            that is empty; what it holds must be finite.
        packed_bias (`torch.Tensor`, *optional*): `(tokens,)` float32, added to the capped logits of the packed tokens,
            as `bias` of `decode_attention`. The latest tokens have none.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the output `(batch, 1, heads, value_dim)`; and probabilities
        in float32, summed over the query heads that share a KV head: `(tokens,)` of the packed tokens, of which those
        behind the last segment may be anything, and `(batch, kv_heads, latest)` of the latest.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_query(query, key, rows=1)
    check_shape("value", value, *key.shape[:3], None)
    check_latest(key)
    check_shape("packed_key", packed_key, None, query.shape[3])
    check_shape("packed_value", packed_value, packed_key.shape[0], value.shape[3])
    check_dtype("packed_key", packed_key, key.dtype)
    check_dtype("packed_value", packed_value, value.dtype)
    check_shape("starts", starts, query.shape[0] * key.shape[1] + 1)
    check_dtype("starts", starts, torch.int64)
    check_shape("mask", mask, *key.shape[:3], or_one=1)
    check_dtype("mask", mask, torch.bool)
    check_shape("packed_bias", packed_bias, packed_key.shape[0])
    check_dtype("packed_bias", packed_bias, torch.float32)
    arguments = (query, packed_key, packed_value, starts, longest, key, value, scaling, softcap, mask, packed_bias)
    run = decode_by_segments if needs_gradients(*arguments) else decode_packed_unchecked
    return run(*arguments)


def segment_starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    """The `starts` of segments of these lengths."""
    return numbers_on(device, [*itertools.accumulate(lengths, initial=0)], torch.int64)


def decode_by_segments(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    packed_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    In float32 and in shapes that no number on the device decides. Each packed token meets the queries of its segment,
    and what it gives is added to that of its segment. Compilers make one loop of it; uncompiled it takes the memory of
    the keys once for each query head of a group.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, num_latest, dtype = key.shape[1], key.shape[2], value.dtype
    num_segments, group = batch * kv_heads, heads // kv_heads
    query, packed_key, packed_value, key, value = (
        each.float() for each in (query, packed_key, packed_value, key, value)
    )
    query = query.reshape(num_segments, group, head_dim) * scaling
    places = torch.arange(packed_key.shape[0], device=key.device)
    is_packed = (places < starts[-1])[:, None]
    segments = torch.searchsorted(starts[1:], places, right=True).clamp(max=num_segments - 1)
    packed_logits = (query[segments] * packed_key[:, None]).sum(dim=-1)  # (tokens, group)
    logits = query @ key.reshape(num_segments, num_latest, head_dim).mT  # (segments, group, latest)
    if softcap:
        packed_logits, logits = (torch.tanh(each / softcap) * softcap for each in (packed_logits, logits))
    if packed_bias is not None:
        packed_logits = packed_logits + packed_bias[:, None]
    packed_logits = packed_logits.masked_fill(~is_packed, float("-inf"))
    if mask is not None:
        is_latest = mask.expand(-1, kv_heads, -1).reshape(num_segments, 1, num_latest)
        logits = logits.masked_fill(~is_latest, float("-inf"))
    with torch.no_grad():
        index = segments[:, None].expand(-1, group)
        highest = logits.amax(dim=-1).scatter_reduce(0, index, packed_logits, "amax")  # (segments, group)
    packed_weights, weights = torch.exp(packed_logits - highest[segments]), torch.exp(logits - highest[..., None])
    totals = weights.sum(dim=-1).index_add(0, segments, packed_weights)
    packed_shares, shares = packed_weights / totals[segments], weights / totals[..., None]
    output = shares @ value.reshape(num_segments, num_latest, -1)
    output = output.index_add(0, segments, packed_shares[..., None] * packed_value[:, None])
    sums = packed_shares.sum(dim=1), shares.sum(dim=1).view(batch, kv_heads, num_latest)
    return output.view(batch, 1, heads, -1).to(dtype), *sums


def decode_one_by_one(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    packed_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    On the CPU: the products of one segment after the other, with views of what is stored, and all else of all segments
    at once. Products are in the precision of the inputs, as `decode_attention` makes them there.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, group, num_latest = key.shape[1], heads // key.shape[1], key.shape[2]
    num_segments, ends = batch * kv_heads, starts.tolist()
    longest = max(map(operator.sub, ends[1:], ends))
    queries = (query * scaling).reshape(num_segments, group, head_dim)
    # Minus infinity behind the end of a segment, and the latest tokens behind that of the longest.
    logits = query.new_full((num_segments, group, longest + num_latest), float("-inf"))
    logits[..., longest:] = queries @ key.reshape(num_segments, num_latest, head_dim).mT
    for segment in range(num_segments):
        start, end = ends[segment], ends[segment + 1]
        torch.mm(queries[segment], packed_key[start:end].T, out=logits[segment, :, : end - start])
    logits = logits.float()
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
        is_behind = torch.arange(longest, device="cpu") >= starts.diff()[:, None, None]
        logits[..., :longest].masked_fill_(is_behind, float("-inf"))
    if packed_bias is not None:
        for segment in range(num_segments):
            start, end = ends[segment], ends[segment + 1]
            logits[segment, :, : end - start] += packed_bias[start:end]
    if mask is not None:
        is_latest = mask.expand(-1, kv_heads, -1).reshape(num_segments, 1, num_latest)
        logits[..., longest:].masked_fill_(~is_latest, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)  # (segments, group, longest + latest)
    shares = probabilities.to(value.dtype)
    output = shares[..., longest:] @ value.reshape(num_segments, num_latest, -1)
    sums = probabilities.sum(dim=1)
    packed_sums = sums.new_zeros(packed_key.shape[0])
    for segment in range(num_segments):
        start, end = ends[segment], ends[segment + 1]
        output[segment].addmm_(shares[segment, :, : end - start], packed_value[start:end])
        packed_sums[start:end] = sums[segment, : end - start]
    latest_sums = sums[:, longest:].reshape(batch, kv_heads, num_latest).clone()
    return output.view(batch, 1, heads, -1), packed_sums, latest_sums


def _on_cuda(query, packed_key, packed_value, starts, longest, key, value, *rest):
    # Packed tensors may be empty, which the kernels take.
    module = kernels("triton_decode", query, key, value)
    run = decode_by_segments if module is None else module.decode_packed_attention
    return run(query, packed_key, packed_value, starts, longest, key, value, *rest)


def _fake(query, packed_key, packed_value, starts, longest, key, value, *rest):
    output = value.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    sums = (states.new_empty(states.shape[:-1], dtype=torch.float32) for states in (packed_key, key))
    return output, *sums


decode_packed_unchecked = register(
    "decode_packed_attention(Tensor query, Tensor packed_key, Tensor packed_value, Tensor starts, int longest, Tensor "
    "key, Tensor value, float scaling, float? softcap, Tensor? mask, Tensor? packed_bias) -> (Tensor, Tensor, Tensor)",
    cpu=decode_one_by_one,
    cuda=_on_cuda,
    fake=_fake,
)
