"""
The attention ops on the CPU, where they differ from their specification in `pyramid_cache.ops.reference`.

With the log-sum-exp `L_i` of every query row known, the score of key `j` is `sum_i exp(scale * q_i.k_j - L_i)`: one
pass over tiles that stay in the processor's cache, no softmax, no maximum, nothing of the size `queries x keys`.
"""

import functools
from typing import Any

import torch

from pyramid_cache.ops import reference
from pyramid_cache.ops.lse import cpu_attention_with_lse


# In base 2, because torch takes three and a half times as long for `exp` as for `exp2`: a third of all there is to do.
LOG2E = 1.4426950408889634
# Twice as many elements cost no more at 8,192 tokens, half as many a tenth more, on two cores.
ROWS_PER_TILE = 64
TILE_ELEMENTS = 1 << 20


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    row_weights: torch.Tensor | None,
    key_start: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    group_sum: bool,
) -> torch.Tensor:
    """
    See `pyramid_cache.ops.scores.attention_scores`. Half precision is widened tile by tile: logits rounded to bfloat16
    would be off by percents, and on the CPU their product costs as much as one in float32.
    """
    batch, heads, num_rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    group, offset = heads // kv_heads, num_keys - num_rows
    num_sums = kv_heads if group_sum else heads
    scores = torch.zeros(batch, num_sums, num_keys, dtype=torch.float32, device="cpu")
    if not num_rows:
        return scores
    # A row that attends to nothing, or does not count, must not bring its infinite exponentials in.
    is_idle = lse.isinf()
    if row_weights is not None:
        is_idle |= (row_weights == 0)[:, None]
        row_weights = row_weights.float().expand(batch, -1)
    lse = (lse.float() * LOG2E).masked_fill_(is_idle, float("inf")).reshape(batch, kv_heads, group, num_rows, 1)
    query = query.reshape(batch, kv_heads, group, num_rows, head_dim)
    factor = scaling if softcap else scaling * LOG2E
    first_keys = [0] * batch if key_start is None else key_start.tolist()
    rows_per_tile = min(ROWS_PER_TILE, num_rows)
    keys_per_tile = min(max(TILE_ELEMENTS // (heads * rows_per_tile), rows_per_tile), num_keys)
    workspace = torch.empty(heads * rows_per_tile * keys_per_tile, dtype=torch.float32, device="cpu")
    future = torch.ones(rows_per_tile, rows_per_tile, dtype=torch.bool, device="cpu").triu_(1)
    for row, first_key in enumerate(first_keys):
        transposed = key[row].transpose(1, 2).float()
        for start in range(max(first_key - offset, 0), num_rows, rows_per_tile):
            stop = min(start + rows_per_tile, num_rows)
            rows = stop - start
            tile_query = query[row, :, :, start:stop].reshape(kv_heads, group * rows, head_dim).float() * factor
            tile_lse = lse[row, :, :, start:stop].reshape(kv_heads, group * rows, 1)
            # NaN less infinity would be NaN.
            tile_query.masked_fill_(tile_lse == float("inf"), 0.0)
            diagonal, visible = offset + start, offset + stop
            for left in range(first_key, visible, keys_per_tile):
                right = min(left + keys_per_tile, visible)
                tile = workspace[: heads * rows * (right - left)].view(kv_heads, group * rows, right - left)
                tile_key = transposed[:, :, left:right]
                if softcap:
                    torch.bmm(tile_query, tile_key, out=tile)
                    tile.div_(softcap).tanh_().mul_(softcap * LOG2E).sub_(tile_lse)
                else:
                    torch.baddbmm(tile_lse.expand_as(tile), tile_query, tile_key, beta=-1, out=tile)
                if right > diagonal:
                    first = max(left, diagonal)
                    hidden = future[:rows, first - diagonal : right - diagonal]
                    tile.view(kv_heads, group, rows, -1)[..., first - left :].masked_fill_(hidden, float("-inf"))
                per_sum = tile.exp2_().view(num_sums, -1, right - left)
                if row_weights is None:
                    scores[row, :, left:right] += per_sum.sum(dim=1)
                else:
                    weights = row_weights[row, start:stop].repeat(per_sum.shape[1] // rows).expand(num_sums, 1, -1)
                    scores[row, :, left:right] += torch.bmm(weights, per_sum).squeeze(1)
    return scores


def is_plain_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> bool:
    """Whether the CPU's float32 attention kernel computes this attention."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and min(query.shape[2], key.shape[2]) > 0
        and not torch.is_autocast_enabled("cpu")
        and key.shape == value.shape
        and not torch.is_grad_enabled()
        and softcap is None
        and sink_logits is None
    )


def split_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `pyramid_cache.ops.reference.split_attention`, on any device; for float32 on the CPU by one run of the attention
    kernel for each set of keys, put together by their log-sum-exps.
    """
    arguments: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
    if not all(is_plain_on_cpu(*states, **arguments) for *states, _ in parts):
        return reference.split_attention(parts, **arguments)
    outputs, lses = [], []
    for query, key, value, mask in parts:
        output, lse = cpu_attention_with_lse(query, key, value, scaling, mask)
        lses.append(lse)
        outputs.append(output)
    total = torch.stack(lses).logsumexp(dim=0)
    total = total.masked_fill(total == float("-inf"), 0.0)
    weights = [(lse - total).exp().transpose(1, 2)[..., None] for lse in lses]
    return functools.reduce(torch.add, map(torch.mul, outputs, weights))
