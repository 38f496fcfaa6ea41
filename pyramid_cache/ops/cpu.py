"""
Attention scores on the CPU, out of the log-sum-exp of the attention kernel that runs anyway.

With the log-sum-exp `L_i` of every query row known, the score of key `j` is `sum_i exp(scale * q_i.k_j - L_i)`: one
pass over tiles that stay in the processor's cache, no softmax, no maximum, nothing of the size `queries x keys`.
"""

import torch


# Measured on two cores, 9 heads, head_dim 64: this tile costs 0.85 of the attention itself at 2,048 tokens and 0.55 at
# 8,192. Tiles that outgrow the second-level cache cost three times as much at 8,192.
ROWS_PER_TILE = 64
TILE_ELEMENTS = 1 << 19


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The kernel that `scaled_dot_product_attention` runs on the CPU, called so that it also returns its log-sum-exp.

    Args:
        query (`torch.Tensor`): `(batch, heads, seq, head_dim)`.
        key, value (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`.
        mask (`torch.Tensor`, *optional*): bool `(batch, 1, seq, keys)`, True where attention is allowed. Causal without, and
            then there are as many keys as queries.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: output `(batch, seq, heads, head_dim)` and log-sum-exp `(batch, heads, seq)`.
    """
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=mask, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), lse


def scores_from_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scaling: float,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Causal scores of a float32 prompt from its log-sum-exp; the semantics are those of `attention_scores`.

    Args:
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`, the last `rows` queries of the sequence.
        key (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`, `rows <= keys`.
        lse (`torch.Tensor`): `(batch, heads, rows)`, natural log-sum-exp of the scaled logits of each row.
        row_weights (`torch.Tensor`, *optional*): `(batch or 1, rows)`, 0 or more. Rows of padding must have weight 0.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, keys)` float32, summed over rows, averaged over a group. What a key of padding
        gets has no meaning: the log-sum-exp left it out.
    """
    batch, heads, num_rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    group, offset = heads // kv_heads, num_keys - num_rows
    if row_weights is not None:
        # exp(x - (L - log w)) = w * exp(x - L); a weight of 0 becomes exp(-inf).
        lse = lse - row_weights[:, None].log()
    query = query.reshape(batch, kv_heads, group, num_rows, head_dim)
    lse = lse.reshape(batch, kv_heads, group, num_rows, 1)
    rows_per_tile = min(ROWS_PER_TILE, num_rows)
    keys_per_tile = min(max(TILE_ELEMENTS // (heads * rows_per_tile), rows_per_tile), num_keys)
    workspace = query.new_empty(heads * rows_per_tile * keys_per_tile)
    future = torch.ones(rows_per_tile, rows_per_tile, dtype=torch.bool).triu_(1)
    scores = query.new_zeros(batch, kv_heads, num_keys)
    for row in range(batch):
        transposed = key[row].transpose(1, 2)
        for start in range(0, num_rows, rows_per_tile):
            stop = min(start + rows_per_tile, num_rows)
            rows = stop - start
            tile_query = query[row, :, :, start:stop].reshape(kv_heads, group * rows, head_dim) * scaling
            tile_lse = lse[row, :, :, start:stop].reshape(kv_heads, group * rows, 1)
            diagonal, visible = offset + start, offset + stop
            for left in range(0, visible, keys_per_tile):
                right = min(left + keys_per_tile, visible)
                tile = workspace[: heads * rows * (right - left)].view(kv_heads, group * rows, right - left)
                torch.baddbmm(tile_lse.expand_as(tile), tile_query, transposed[:, :, left:right], beta=-1, out=tile)
                if right > diagonal:
                    first = max(left, diagonal)
                    hidden = future[:rows, first - diagonal : right - diagonal]
                    tile.view(kv_heads, group, rows, -1)[..., first - left :].masked_fill_(hidden, float("-inf"))
                scores[row, :, left:right] += tile.exp_().sum(dim=1)
    return scores.div_(group)


def split_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], scaling: float
) -> torch.Tensor:
    """
    `pyramid_cache.ops.reference.split_attention` for float32 on the CPU: one run of the attention kernel for each set of
    keys, put together by their log-sum-exps.
    """
    outputs, lses = [], []
    for query, key, value, mask in parts:
        output, lse = attention_with_lse(query, key, value, scaling, mask)
        # The kernel gives zero, not minus infinity, for a row without keys.
        lses.append(lse.masked_fill(~mask.any(dim=-1), float("-inf")))
        outputs.append(output)
    total = torch.stack(lses).logsumexp(dim=0)
    total = total.masked_fill(total == float("-inf"), 0.0)
    weights = [(lse - total).exp().transpose(1, 2)[..., None] for lse in lses]
    return sum(output * weight for output, weight in zip(outputs, weights, strict=True))
