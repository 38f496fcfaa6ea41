"""Attention in float64 by its definition, on any device, which the ops and their kernels are compared with."""

import math
from collections.abc import Callable

import torch


def causal(rows: int, keys: int, key_mask: torch.Tensor | None = None, device: str = "cpu") -> torch.Tensor:
    """`(batch or 1, 1, rows, keys)` bool, aligned bottom-right; `key_mask` `(batch, keys)` is False for padding."""
    allowed = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)[None, None]
    return allowed if key_mask is None else allowed & key_mask[:, None, None]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    allowed: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Probabilities `(batch, heads, rows, keys)` and log-sum-exps `(batch, heads, rows)`, of which the sinks `(heads,)`
    take a part; zeros and minus infinity for a row without keys. A bias, like `allowed`, is broadcast to the logits.
    """
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits.masked_fill(~allowed, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    return (logits - lse[..., None]).exp().nan_to_num(0.0), lse


def output_of(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`(batch, rows, heads, value_dim)`."""
    value = value.double().repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)
    return torch.einsum("bhqk,bhkd->bqhd", probabilities, value)


def scores_of(probabilities: torch.Tensor, kv_heads: int, row_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted sums over rows and over the heads of a group: `(batch, kv_heads, keys)`."""
    if row_weights is not None:
        probabilities = probabilities * row_weights.double()[:, None, :, None]
    return probabilities.sum(dim=2).unflatten(1, (kv_heads, -1)).sum(dim=2)


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decode_attention` returns: output, sums of probabilities of each group."""
    kv_heads = key.shape[1]
    allowed = key.new_ones(1, 1, key.shape[2], dtype=torch.bool) if mask is None else mask
    added = key.new_zeros(1, 1, key.shape[2]) if bias is None else bias
    allowed, added = (
        of_slots if of_slots.shape[1] == 1 else of_slots.repeat_interleave(query.shape[1] // kv_heads, dim=1)
        for of_slots in (allowed, added)
    )
    probabilities, _ = attention(query, key, scaling, allowed[:, :, None], softcap, sinks, added[:, :, None])
    return output_of(probabilities, value), scores_of(probabilities, kv_heads)


def packed_decode(
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    lengths: list[int],
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    packed_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `decode_packed_attention` returns, segment by segment."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    outputs, packed_sums, latest_sums = [], [], []
    if packed_bias is None:
        packed_bias = packed_key.new_zeros(len(packed_key))
    segments = zip(*(packed.split(lengths) for packed in (packed_key, packed_value, packed_bias)), strict=True)
    for segment, (packed_keys, packed_values, biases) in enumerate(segments):
        row, head = divmod(segment, kv_heads)
        keys, values = torch.cat([packed_keys, key[row, head]]), torch.cat([packed_values, value[row, head]])
        queries = query[row : row + 1, head * group : (head + 1) * group]
        bias = torch.cat([biases, biases.new_zeros(key.shape[2])])[None, None]
        output, sums = decode(queries, keys[None, None], values[None, None], None, bias, None, scaling, softcap)
        outputs.append(output[0, 0])
        packed_sums.append(sums[0, 0, : lengths[segment]])
        latest_sums.append(sums[0, 0, lengths[segment] :])
    output = torch.cat(outputs).view(query.shape[0], 1, query.shape[1], -1)
    return output, torch.cat(packed_sums), torch.stack(latest_sums).view(key.shape[:3])


def check_rows_that_do_not_count(attention_scores: Callable, device: str) -> None:
    """
    Raises unless rows of weight 0 and of infinite log-sum-exps add nothing to scores, whatever they hold. The function
    takes the arguments of `pyramid_cache.ops.reference.attention_scores`.
    """
    query, key = torch.randn(2, 4, 50, 64).to(device), torch.randn(2, 2, 80, 64).to(device)
    lse = attention(query, key, 0.125, causal(50, 80, device=device))[1].float()
    row_weights = torch.rand(2, 50).to(device)
    row_weights[:, 5:9] = 0.0
    lse[:, 1, 30], lse[:, 2, 31] = math.inf, -math.inf
    arguments = (key, lse, row_weights, None, 0.125, None)
    expected = attention_scores(query, *arguments)
    query[:, :, 5], query[:, :, 6], query[:, 1, 30], query[:, 2, 31] = math.nan, math.inf, math.nan, -math.inf
    lse[:, :, 7], lse[:, :, 8] = math.nan, -1e30
    found = attention_scores(query, *arguments)
    assert found.isfinite().all() and torch.equal(found, expected)
    # What counts and is NaN stays in its row of the batch, and in its group. Row 20 of 50 sees the first 51 keys.
    query[1, 0, 20] = math.nan
    spoiled = attention_scores(query, *arguments)
    assert spoiled[1, 0, :51].isnan().all()
    spoiled[1, 0, :51] = expected[1, 0, :51]
    assert torch.equal(spoiled, expected)
