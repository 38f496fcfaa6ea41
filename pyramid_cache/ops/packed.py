"""
Decoding over heads that hold different numbers of tokens, stored one behind the other without padding.

A *segment* is what one KV head of one row holds: `lengths` are those of the segments, row by row and head by head.
Beside the packed tokens there are the latest ones, of which every head has all.
"""

import itertools

import torch

from pyramid_cache.ops.reference import decode_in_float32
from pyramid_cache.ops.registration import check_dtype, check_query, check_shape, kernels, needs_gradients, register
from pyramid_cache.ops.transfer import numbers_on


def decode_packed_attention(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    lengths: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention of one query per row over packed tokens and the latest ones, with the probabilities that it used.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        packed_key, packed_value (`torch.Tensor`): `(sum of lengths, head_dim)` and `(sum of lengths, value_dim)`.
        lengths (`list[int]`): Of the segments: `batch * kv_heads` numbers, which may be 0.
        key, value (`torch.Tensor`): `(batch, kv_heads, latest, head_dim)` and `(batch, kv_heads, latest, value_dim)`:
            at least one token, that of the query.
        scaling, softcap: As in `attention_scores`.
        starts (`torch.Tensor`, *optional*): What `segment_starts` makes of `lengths`, which is not looked at again.
            Left out, it is made at every call, and a CUDA device is waited for.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the output `(batch, 1, heads, value_dim)`; and probabilities
        in float32, summed over the query heads that share a KV head: `(sum of lengths,)` of the packed tokens and
        `(batch, kv_heads, latest)` of the latest.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_query(query, key, rows=1)
    check_shape("value", value, *key.shape[:3], None)
    batch, head_dim = query.shape[0], query.shape[3]
    if len(lengths) != batch * key.shape[1] or not key.shape[2]:
        raise ValueError(
            f"`lengths` has {len(lengths)} numbers for {batch} rows of {key.shape[1]} KV heads, and `key` "
            f"{key.shape[2]} tokens: give a number for each head of each row, and at least the token of the query."
        )
    check_shape("packed_key", packed_key, sum(lengths), head_dim)
    check_shape("packed_value", packed_value, sum(lengths), value.shape[3])
    check_dtype("packed_key", packed_key, key.dtype)
    check_dtype("packed_value", packed_value, value.dtype)
    check_shape("starts", starts, len(lengths) + 1)
    check_dtype("starts", starts, torch.int64)
    starts = segment_starts(lengths, key.device) if starts is None else starts
    arguments = (query, packed_key, packed_value, lengths, key, value, scaling, softcap, starts)
    return decode_padded(*arguments) if needs_gradients(*arguments) else _decode_packed_attention(*arguments)


def segment_starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    """`(segments + 1,)` int64 on the device: where each segment begins, and where the last one ends."""
    return numbers_on(device, [*itertools.accumulate(lengths, initial=0)], torch.int64)


def decode_padded(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    lengths: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float32, as `decode_attention` of segments that are padded to the longest."""
    counts, longest = starts.diff().view(*key.shape[:2], 1), max(lengths)
    offsets = torch.arange(longest, device=key.device)
    is_held = offsets < counts
    index = (starts[:-1].view_as(counts) + offsets).masked_fill(~is_held, 0)
    padded_key, padded_value = (
        packed[index].masked_fill(~is_held[..., None], 0.0) for packed in (packed_key, packed_value)
    )
    keys, values = torch.cat([padded_key, key], dim=2), torch.cat([padded_value, value], dim=2)
    mask = torch.nn.functional.pad(is_held, (0, key.shape[2]), value=True)
    output, sums = decode_in_float32(query, keys, values, mask, None, scaling, softcap)
    packed_sums = sums.new_zeros(len(packed_key)).index_add(0, index.flatten(), sums[..., :longest].flatten())
    return output, packed_sums, sums[..., longest:]


def decode_one_by_one(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    lengths: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    On the CPU: the products of one segment after the other, with views of what is stored, and all else of all segments
    at once. Products are in the precision of the inputs, as `decode_attention` makes them there. The lengths say
    enough; `starts` is not needed.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, group, num_latest = key.shape[1], heads // key.shape[1], key.shape[2]
    num_segments, longest = batch * kv_heads, max(lengths)
    queries = (query * scaling).reshape(num_segments, group, head_dim)
    keys, values = packed_key.split(lengths), packed_value.split(lengths)
    # Minus infinity behind the end of a segment, and the latest tokens behind that of the longest.
    logits = query.new_full((num_segments, group, longest + num_latest), float("-inf"))
    logits[..., longest:] = queries @ key.reshape(num_segments, num_latest, head_dim).mT
    for segment_query, segment_key, segment_logits in zip(queries, keys, logits, strict=True):
        torch.mm(segment_query, segment_key.T, out=segment_logits[:, : len(segment_key)])
    logits = logits.float()
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
        is_behind = torch.arange(longest, device="cpu") >= torch.tensor(lengths, device="cpu")[:, None, None]
        logits[..., :longest].masked_fill_(is_behind, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)  # (segments, group, longest + latest)
    shares = probabilities.to(value.dtype)
    output = shares[..., longest:] @ value.reshape(num_segments, num_latest, -1)
    for segment_shares, segment_value, segment_output in zip(shares, values, output, strict=True):
        segment_output.addmm_(segment_shares[:, : len(segment_value)], segment_value)
    sums = probabilities.sum(dim=1)
    packed_sums = torch.cat([of_segment[:length] for of_segment, length in zip(sums, lengths, strict=True)])
    latest_sums = sums[:, longest:].reshape(batch, kv_heads, num_latest).clone()
    return output.view(batch, 1, heads, -1), packed_sums, latest_sums


def _on_cuda(query, packed_key, packed_value, lengths, key, value, *rest):
    # Packed tensors may be empty, which the kernels take.
    module = kernels("triton_decode", query, key, value)
    run = decode_padded if module is None else module.decode_packed_attention
    return run(query, packed_key, packed_value, lengths, key, value, *rest)


def _fake(query, packed_key, packed_value, lengths, key, value, *rest):
    output = value.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    sums = (states.new_empty(states.shape[:-1], dtype=torch.float32) for states in (packed_key, key))
    return output, *sums


_decode_packed_attention = register(
    "decode_packed_attention(Tensor query, Tensor packed_key, Tensor packed_value, int[] lengths, Tensor key, Tensor "
    "value, float scaling, float? softcap, Tensor starts) -> (Tensor, Tensor, Tensor)",
    cpu=decode_one_by_one,
    cuda=_on_cuda,
    fake=_fake,
)
