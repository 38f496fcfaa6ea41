"""
The attention ops of `pyramid_cache.ops.scores` in plain PyTorch: for the CPU, and for devices and dtypes that the
Triton kernels do not take. No matrix of all queries and all keys is ever made.
"""

from typing import Any

import torch


# Elements of the logits of one chunk of `row_lse`: 16 MiB in float32. Larger ones cost page faults on the CPU and
# memory everywhere.
CHUNK_ELEMENTS = 1 << 22
# Tiles of `attention_scores`, which stay in the processor's cache. Twice as many elements cost no more at 8,192
# tokens, half as many a tenth more, on two cores.
ROWS_PER_TILE = 64
TILE_ELEMENTS = 1 << 20
# In base 2, because torch takes three and a half times as long for `exp` as for `exp2`: a third of all there is to do.
LOG2E = 1.4426950408889634


def grouped_logits(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """
    Scaled logits of `(batch, heads, rows, head_dim)` queries on `(batch, kv_heads, keys, head_dim)` keys, in float32
    `(batch, kv_heads, group, rows, keys)`, without repeating the keys for every head of a group. Products are made in
    the precision of the inputs. With a `softcap` logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    # Scaled before the product, which would overflow in float16 otherwise.
    query = query.reshape(batch * kv_heads, heads // kv_heads * rows, head_dim) * scaling
    logits = torch.bmm(query, key.flatten(0, 1).mT)
    logits = logits.view(batch, kv_heads, heads // kv_heads, rows, -1).float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def softmax_of_logits(
    logits: torch.Tensor, mask: torch.Tensor | None = None, sink_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Attention probabilities as models of every family make them, of the shape of the logits.

    Args:
        logits (`torch.Tensor`): float32 `(batch, kv_heads, group, rows, keys)`, scaled and capped.
        mask (`torch.Tensor`, *optional*): bool, broadcastable to the logits, True where attention is allowed. A row
            that may attend to nothing gets zeros.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss: they take part in
            the normalisation and are then dropped.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(with_sinks(logits, sink_logits), dim=-1)[..., : logits.shape[-1]]
    # A softmax over nothing is 0/0.
    return probabilities if mask is None else probabilities.masked_fill(~mask, 0.0)


def with_sinks(logits: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """The logits with a column for the sink behind them, if there are sinks."""
    if sink_logits is None:
        return logits
    batch, kv_heads, group, rows, _ = logits.shape
    column = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
    return torch.cat([logits, column], dim=-1)


def causal_mask(start: int, stop: int, rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """`(stop - start, visible)` bool: row `i` of the last `rows` columns sees the keys up to `keys - rows + i`."""
    last_key = torch.arange(keys - rows + start, keys - rows + stop, device=device)
    return torch.arange(keys - rows + stop, device=device) <= last_key[:, None]


def row_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The log-sum-exps that attention of the last `rows` queries normalises with, for attention that does not give them.

    Args:
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`, the last queries of the sequence.
        key (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`, `rows <= keys`.
        scaling (`float`): factor on the logits.
        key_mask (`torch.Tensor`, *optional*): bool `(batch, keys)`, False for padding.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss, which take part in
            it.

    Returns:
        `torch.Tensor`: `(batch, heads, rows)` float32, minus infinity where a row attends to nothing.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=key.device)
    query, key = query.float(), key.float()
    rows_per_chunk = max(CHUNK_ELEMENTS // max(batch * heads * keys, 1), 1)
    for start in range(0, rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, rows)
        visible = keys - rows + stop
        allowed = causal_mask(start, stop, rows, keys, key.device)
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None, None, :visible]
        logits = grouped_logits(query[:, :, start:stop], key[:, :, :visible], scaling, softcap)
        logits = with_sinks(logits.masked_fill(~allowed, float("-inf")), sink_logits)
        lse[:, :, start:stop] = logits.logsumexp(dim=-1).flatten(1, 2)
    return lse


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    row_weights: torch.Tensor | None,
    key_start: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """
    With the log-sum-exps known, one pass over tiles: no softmax and no maximum. Half precision is widened tile by
    tile: logits rounded to bfloat16 would be off by percents, and on the CPU their product costs as much as one in
    float32.
    """
    batch, heads, num_rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    group, offset = heads // kv_heads, num_keys - num_rows
    scores = torch.zeros(batch, kv_heads, num_keys, dtype=torch.float32, device=key.device)
    if not num_rows:
        return scores
    # A row that attends to nothing, or does not count, must not bring its infinite exponentials in.
    is_idle = lse.isinf()
    if row_weights is not None:
        is_idle |= (row_weights == 0)[:, None]
        row_weights = row_weights.expand(batch, -1)
    lse = (lse * LOG2E).masked_fill_(is_idle, float("inf")).reshape(batch, kv_heads, group, num_rows, 1)
    query = query.reshape(batch, kv_heads, group, num_rows, head_dim)
    factor = scaling if softcap else scaling * LOG2E
    first_keys = [0] * batch if key_start is None else key_start.tolist()
    rows_per_tile = min(ROWS_PER_TILE, num_rows)
    keys_per_tile = min(max(TILE_ELEMENTS // (heads * rows_per_tile), rows_per_tile), num_keys)
    workspace = torch.empty(heads * rows_per_tile * keys_per_tile, dtype=torch.float32, device=key.device)
    future = torch.ones(rows_per_tile, rows_per_tile, dtype=torch.bool, device=key.device).triu_(1)
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
                probabilities = tile.exp2_()
                if row_weights is None:
                    scores[row, :, left:right] += probabilities.sum(dim=1)
                else:
                    weights = row_weights[row, start:stop].repeat(group).expand(kv_heads, 1, -1)
                    scores[row, :, left:right] += torch.bmm(weights, probabilities).squeeze(1)
    return scores


def decode_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The probabilities `(batch, kv_heads, group, slots)` float32 of `decode_attention`, head by head. Products are made
    in the precision of the inputs.
    """
    logits = grouped_logits(query, key, scaling, softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None, :]
    mask = None if mask is None else mask[:, :, None, None, :]
    return softmax_of_logits(logits, mask, sink_logits).squeeze(3)


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
    """With products in the precision of the inputs, as transformers' eager attention makes them."""
    probabilities = decode_probabilities(query, key, mask, sink_logits, scaling=scaling, softcap=softcap, bias=bias)
    return weighted(value, probabilities), probabilities.sum(dim=2)


def weighted(value: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """The output `(batch, 1, heads, value_dim)` of attention with probabilities `(batch, kv_heads, group, slots)`."""
    output = torch.bmm(probabilities.to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return output.view(len(value), 1, -1, value.shape[-1])


def decode_in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode_attention` with products in float32, as the kernels make them."""
    output, probabilities = decode_attention(query.float(), key.float(), value.float(), *rest)
    return output.to(value.dtype), probabilities
