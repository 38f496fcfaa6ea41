"""
Attention scores from a stock attention kernel: the exact check on the kernels written for it where an `n x n` matrix
is too big.

A key's score `sum_i w_i * exp(scaling * q_i.k_j - lse_i)` is the exponential of a log-sum-exp over the queries that
see the key. So attention with queries and keys exchanged computes it, if `log w_i - lse_i` is added to the logits: by
more dimensions of the heads, 1 on one side. Turned round in time, the queries from `j` on are those up to `j`, which
is causal attention.
"""

import torch

from pyramid_cache.ops.lse import attention_with_lse


# As many as keep the head dims of CUDA's kernels a multiple of 8.
EXTRA_DIMS = 8

# Terms that a number is split into: 3 x 8 bits of bfloat16 carry the 24 of float32.
TERMS = 3


def transposed_flash_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    row_weights: torch.Tensor | None,
    scaling: float,
    group_sum: bool,
) -> torch.Tensor:
    """
    `pyramid_cache.ops.scores.attention_scores` for as many rows as keys, without padding and softcap, in O(rows)
    memory.

    Args:
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`.
        key (`torch.Tensor`): `(batch, kv_heads, rows, head_dim)`.
        lse (`torch.Tensor`): `(batch, heads, rows)` float32. A row where it is infinite attends to nothing.
        row_weights (`torch.Tensor`, *optional*): `(batch or 1, rows)`, 0 or more.
        scaling (`float`): Factor on the logits, above 0.
        group_sum (`bool`): Sums over the query heads that share a KV head.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, rows)` float32, or `(batch, heads, rows)` with `group_sum=False`.

    Raises:
        ValueError: Rows and keys differ in number, a weight is negative, or no kernel takes these tensors.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    if rows != num_keys:
        raise ValueError(
            f"There must be as many rows as keys, but there are {rows} and {num_keys}. Use `attention_scores`."
        )
    if row_weights is not None and bool((row_weights < 0).any()):
        raise ValueError("`row_weights` must be 0 or more, since their logarithms are used. Use `attention_scores`.")
    offset, contributes = -lse, ~lse.isinf()
    if row_weights is not None:
        offset = offset + row_weights[:, None].log()
        contributes = contributes & (row_weights != 0)[:, None]
    extra = _as_dims(offset / scaling, contributes, query.dtype)
    queries = torch.cat([query, extra], dim=-1).flip(2)
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    keys = torch.cat([key, torch.ones_like(extra)], dim=-1).flip(2)
    result = attention_with_lse("sdpa", keys, queries, queries, scaling=scaling)
    if result is None:
        raise ValueError(
            f"No attention kernel with a log-sum-exp takes tensors of {query.dtype} on {query.device.type} with "
            f"head_dim {head_dim} + {EXTRA_DIMS}, or not while gradients are recorded. Use "
            "`pyramid_cache.ops.reference`."
        )
    scores = result[1].flip(2).exp()
    return scores.view(batch, kv_heads, -1, rows).sum(dim=2) if group_sum else scores


def _as_dims(offset: torch.Tensor, contributes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    `(batch, heads, rows, EXTRA_DIMS)` numbers of the dtype that sum to the float32 `offset`, and to something far
    below any logit, yet finite (an infinite one would give infinity minus infinity), where a row must not contribute.
    """
    dims = offset.new_zeros(*offset.shape, EXTRA_DIMS, dtype=dtype)
    left = offset.masked_fill(~contributes, 0.0)
    for term in range(TERMS):
        dims[..., term] = left
        left = left - dims[..., term].float()
    # float16 ends at 65,504. Eight of these, times the scaling of head_dim 256, put the row 30,000 below.
    return dims.masked_fill_(~contributes[..., None], -6e4)
