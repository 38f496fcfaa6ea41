"""
The specification of the attention ops, in plain PyTorch on any device.

Scores are attention probabilities summed over query rows and averaged over the query heads that share a KV head.
They are accumulated in float32, and queries are taken in chunks, so that no `query x key` matrix is ever materialised.
"""

import torch


# Elements of the logits of one chunk: 16 MiB in float32. Larger ones cost page faults on the CPU and memory everywhere.
CHUNK_ELEMENTS = 1 << 22


def softmax_of_logits(
    logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention probabilities as models of every family make them.

    Args:
        logits (`torch.Tensor`): float32 `(batch, kv_heads, group, rows, keys)`, scaled.
        mask (`torch.Tensor`, *optional*): bool, broadcastable to the logits, True where attention is allowed. A row that
            may attend to nothing gets zeros.
        softcap (`float`, *optional*): logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss: they take part in
            the normalisation and are then dropped.

    Returns:
        `torch.Tensor`: of the shape of `logits`.
    """
    batch, kv_heads, group, rows, _ = logits.shape
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
        return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    probabilities = torch.softmax(logits, dim=-1)
    # A softmax over nothing is 0/0: such a row attends to nothing.
    return probabilities if mask is None else probabilities.masked_fill(~mask, 0.0)


def grouped_logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Scaled logits of `(batch, heads, rows, head_dim)` queries on `(batch, kv_heads, keys, head_dim)` keys, in float32
    `(batch, kv_heads, group, rows, keys)`, without repeating the keys for every head of a group.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    # Scaled before the product, which would overflow in float16 otherwise.
    query = query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim) * scaling
    logits = torch.matmul(query, key.transpose(-1, -2))
    return logits.view(batch, kv_heads, heads // kv_heads, rows, -1).float()


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    How much attention each key receives from the given query rows. Attention is causal and bottom-right aligned: row `i`
    sees the keys up to `keys - rows + i`.

    Args:
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`, the last `rows` queries of the sequence.
        key (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`, `rows <= keys`.
        scaling (`float`): factor on the logits.
        key_mask (`torch.Tensor`, *optional*): bool `(batch, kv_heads or 1, keys)`, False for padding and empty slots.
        row_weights (`torch.Tensor`, *optional*): `(batch or 1, rows)` float32 weight of each query row; 1 by default.
        softcap, sink_logits: as in `softmax_of_logits`.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, keys)` float32, summed over rows, averaged over the heads of a group.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    scores = torch.zeros(batch, kv_heads, num_keys, dtype=torch.float32, device=key.device)
    rows_per_chunk = max(CHUNK_ELEMENTS // (batch * heads * num_keys), 1)
    for start in range(0, rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, rows)
        visible = num_keys - rows + stop
        last_key = torch.arange(num_keys - rows + start, visible, device=key.device)
        allowed = torch.arange(visible, device=key.device) <= last_key[:, None]
        if key_mask is not None:
            allowed = allowed & key_mask[:, :, None, None, :visible]
        logits = grouped_logits(query[:, :, start:stop], key[:, :, :visible], scaling)
        probabilities = softmax_of_logits(logits, allowed, softcap, sink_logits)
        if row_weights is not None:
            probabilities = probabilities * row_weights[:, None, None, start:stop, None]
        scores[:, :, :visible] += probabilities.sum(dim=3).mean(dim=2)
    return scores


def decode_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention probabilities of one query per row over slots in any order.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        key (`torch.Tensor`): `(batch, kv_heads, slots, head_dim)`.
        mask (`torch.Tensor`, *optional*): bool `(batch, kv_heads or 1, slots)`, False for a slot that is empty.
        scaling, softcap, sink_logits: as in `attention_scores`.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, group, slots)` float32, `group` being the query heads that share a KV head.
    """
    mask = None if mask is None else mask[:, :, None, None, :]
    return softmax_of_logits(grouped_logits(query, key, scaling), mask, softcap, sink_logits).squeeze(3)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of one query per row over slots in any order, with the probabilities it used.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        key, value (`torch.Tensor`): `(batch, kv_heads, slots, head_dim)`; the values may have a width of their own.
        mask, scaling, softcap, sink_logits: as in `decode_probabilities`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the output `(batch, 1, heads, value_dim)`, laid out as attention functions
        of transformers return it, and the probabilities `(batch, kv_heads, slots)`, float32, averaged over a group.
    """
    probabilities = decode_probabilities(
        query, key, scaling=scaling, mask=mask, softcap=softcap, sink_logits=sink_logits
    )
    output = torch.matmul(probabilities.to(value.dtype), value)  # (batch, kv_heads, group, value_dim)
    return output.view(query.shape[0], 1, query.shape[1], value.shape[-1]), probabilities.mean(dim=2)


def split_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention over several sets of keys at once, each of which sees the queries turned in a way of its own.

    Args:
        parts: Query `(batch, heads, rows, head_dim)`, key and value `(batch, kv_heads, keys, head_dim)` and a bool mask
            `(batch, 1, rows, keys)`, True where attention is allowed, for each set of keys.
        scaling, softcap, sink_logits: as in `attention_scores`.

    Returns:
        `torch.Tensor`: `(batch, rows, heads, value_dim)`; zeros for a row that may attend to nothing.
    """
    logits = torch.cat([grouped_logits(query, key, scaling) for query, key, _, _ in parts], dim=-1)
    mask = torch.cat([mask for *_, mask in parts], dim=-1)[:, :, None]
    probabilities = softmax_of_logits(logits, mask, softcap, sink_logits).flatten(2, 3)
    values = [value for _, _, value, _ in parts]
    widths = [value.shape[2] for value in values]
    shares = probabilities.to(values[0].dtype).split(widths, dim=-1)
    output = sum(share @ value for share, value in zip(shares, values, strict=True))
    batch, heads, rows, _ = parts[0][0].shape
    return output.view(batch, heads, rows, -1).transpose(1, 2)
