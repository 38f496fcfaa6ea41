"""
The specification of the attention ops of `pyramid_cache.ops.scores`, in plain PyTorch on any device.

Everything is accumulated in float32, and queries are taken in chunks, so that no `query x key` matrix is ever
materialised. Scores are sums over the query heads that share a KV head.
"""

from collections.abc import Iterator

import torch


# Elements of the logits of one chunk: 16 MiB in float32. Larger ones cost page faults on the CPU and memory
# everywhere.
CHUNK_ELEMENTS = 1 << 22


def grouped_logits(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """
    Scaled logits of `(batch, heads, rows, head_dim)` queries on `(batch, kv_heads, keys, head_dim)` keys, in float32
    `(batch, kv_heads, group, rows, keys)`, without repeating the keys for every head of a group. Products are made in
    the precision of the inputs. With a `softcap` logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    # Scaled before the product, which would overflow in float16 otherwise.
    query = query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim) * scaling
    logits = torch.matmul(query, key.transpose(-1, -2))
    logits = logits.view(batch, kv_heads, heads // kv_heads, rows, -1).float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def softmax_of_logits(
    logits: torch.Tensor, mask: torch.Tensor | None = None, sink_logits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention probabilities as models of every family make them, and the logarithm of what they were divided by.

    Args:
        logits (`torch.Tensor`): float32 `(batch, kv_heads, group, rows, keys)`, scaled and capped.
        mask (`torch.Tensor`, *optional*): bool, broadcastable to the logits, True where attention is allowed. A row
            that may attend to nothing gets zeros.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss: they take part in
            the normalisation and are then dropped.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: of the shape of `logits`; and log-sum-exps `(batch, kv_heads, group,
        rows)`, minus infinity where a row attends to nothing.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    logits = with_sinks(logits, sink_logits)
    probabilities = torch.softmax(logits, dim=-1)
    # The largest probability tells the divisor, for a quarter of the time that `logsumexp` takes beside the softmax.
    highest = logits.amax(dim=-1)
    lse = highest - probabilities.amax(dim=-1).log()
    if sink_logits is not None:
        probabilities = probabilities[..., :-1]
    if mask is not None:
        # A softmax over nothing is 0/0: such a row attends to nothing.
        probabilities = probabilities.masked_fill(~mask, 0.0)
        lse = lse.masked_fill(highest == float("-inf"), float("-inf"))
    return probabilities, lse


def with_sinks(logits: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """The logits with a column for the sink behind them, if there are sinks."""
    if sink_logits is None:
        return logits
    batch, kv_heads, group, rows, _ = logits.shape
    column = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, rows, -1)
    return torch.cat([logits, column], dim=-1)


def causal_chunks(batch: int, heads: int, rows: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Yields `start, stop` of the rows that are taken at once, and how many keys the last of them sees."""
    rows_per_chunk = max(CHUNK_ELEMENTS // max(batch * heads * keys, 1), 1)
    for start in range(0, rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, rows)
        yield start, stop, keys - rows + stop


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
        key_mask (`torch.Tensor`, *optional*): bool `(batch, kv_heads or 1, keys)`, False for padding and empty slots.
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
    for start, stop, visible in causal_chunks(batch, heads, rows, keys):
        allowed = causal_mask(start, stop, rows, keys, key.device)
        if key_mask is not None:
            allowed = allowed & key_mask[:, :, None, None, :visible]
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
    group_sum: bool,
) -> torch.Tensor:
    """The specification of `pyramid_cache.ops.scores.attention_scores`."""
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    query, key = query.float(), key.float()
    scores = torch.zeros(batch, kv_heads, group, keys, dtype=torch.float32, device=key.device)
    # A row that attends to nothing, or does not count, must not bring its infinite exponentials in.
    contributes = lse.isfinite() | lse.isnan()
    if row_weights is not None:
        contributes = contributes & (row_weights != 0)[:, None]
    lse = lse.masked_fill(~contributes, float("inf"))
    for start, stop, visible in causal_chunks(batch, heads, rows, keys):
        allowed = causal_mask(start, stop, rows, keys, key.device)
        if key_start is not None:
            is_token = torch.arange(visible, device=key.device) >= key_start[:, None]  # (batch, visible)
            allowed = allowed & is_token[:, None] & is_token[:, -(stop - start) :, None]
            allowed = allowed[:, None, None]
        logits = grouped_logits(query[:, :, start:stop], key[:, :, :visible], scaling, softcap)
        chunk_lse = lse[:, :, start:stop].view(batch, kv_heads, group, -1, 1)
        # Chosen and not multiplied: a row that does not contribute may hold anything.
        allowed = allowed & (chunk_lse != float("inf"))
        probabilities = (logits - chunk_lse).exp().masked_fill(~allowed, 0.0)
        if row_weights is not None:
            probabilities = probabilities * row_weights[:, None, None, start:stop, None]
        scores[..., :visible] += probabilities.sum(dim=3)
    return scores.sum(dim=2) if group_sum else scores.flatten(1, 2)


def decode_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The probabilities `(batch, kv_heads, group, slots)` float32 of `decode_attention`, head by head, and its
    log-sum-exps `(batch, heads)`. Products are made in the precision of the inputs.
    """
    mask = None if mask is None else mask[:, :, None, None, :]
    probabilities, lse = softmax_of_logits(grouped_logits(query, key, scaling, softcap), mask, sink_logits)
    return probabilities.squeeze(3), lse.flatten(1)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of `pyramid_cache.ops.scores.decode_attention`."""
    wide = (query.float(), key.float(), value.float())
    output, lse, probabilities = decode_in_given_precision(*wide, mask, sink_logits, scaling, softcap)
    return output.to(value.dtype), lse, probabilities


def decode_in_given_precision(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decode_attention` with products in the precision of the inputs, as transformers' eager attention makes them."""
    probabilities, lse = decode_probabilities(query, key, mask, sink_logits, scaling=scaling, softcap=softcap)
    output = torch.matmul(probabilities.to(value.dtype), value)  # (batch, kv_heads, group, value_dim)
    output = output.view(query.shape[0], 1, query.shape[1], value.shape[-1])
    return output, lse, probabilities.sum(dim=2)


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
        parts: Query `(batch, heads, rows, head_dim)`, key and value `(batch, kv_heads, keys, head_dim)` and a bool
            mask `(batch, 1, rows, keys)`, True where attention is allowed, for each set of keys.
        scaling, softcap, sink_logits: as in `row_lse`.

    Returns:
        `torch.Tensor`: `(batch, rows, heads, value_dim)`; zeros for a row that may attend to nothing.
    """
    logits = torch.cat([grouped_logits(query, key, scaling, softcap) for query, key, _, _ in parts], dim=-1)
    mask = torch.cat([mask for *_, mask in parts], dim=-1)[:, :, None]
    probabilities = softmax_of_logits(logits, mask, sink_logits)[0].flatten(2, 3)
    values = [value for _, _, value, _ in parts]
    widths = [value.shape[2] for value in values]
    shares = probabilities.to(values[0].dtype).split(widths, dim=-1)
    output = sum(share @ value for share, value in zip(shares, values, strict=True))
    batch, heads, rows, _ = parts[0][0].shape
    return output.view(batch, heads, rows, -1).transpose(1, 2)
