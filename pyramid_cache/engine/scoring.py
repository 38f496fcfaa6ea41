"""
Attention of several queries, and how much attention each key gets.

The attention that the user chose runs once. Scores are computed from its log-sum-exps or from its probabilities. Where
it gives neither, the log-sum-exps of the scoring rows are computed beside it.
"""

from collections.abc import Callable

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.policy import PromptView
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops import attention_scores, attention_with_lse, row_lse
from pyramid_cache.ops.reference import CHUNK_ELEMENTS, causal_mask, grouped_logits, softmax_of_logits


def attend_and_score(
    call: AttentionCall, tokens: Tokens, num_rows: int, row_weights: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """
    Runs the attention of a call, and sums up the probabilities that its last `num_rows` queries give to each key.

    Args:
        tokens (`Tokens`): The tokens in the columns of the keys.
        row_weights (`torch.Tensor`, *optional*): `(batch or 1, num_rows)`, 1 by default. Padded queries have weight 0
            anyway.

    Returns:
        The output of attention, as attention functions return it, and the scores `(batch, kv_heads, keys)` float32,
        summed over the query heads that share a KV head. The scores of padding are 0.
    """
    is_token = tokens.positions[:, 0] >= 0 if tokens.has_gaps else None
    if is_token is not None:
        is_query = is_token[:, -num_rows:].to(torch.float32)
        row_weights = is_query if row_weights is None else row_weights * is_query
    output: tuple[torch.Tensor, torch.Tensor | None]
    found = None if call.lse is not None else run_with_lse(call, is_token, tokens.row_present)
    if found is not None:
        output, lse = (found[0], None), found[1][:, :, -num_rows:]
    else:
        output = call.run()
        if output[1] is not None and not call.kwargs.get("dropout"):
            return output, sum_of_probabilities(output[1].detach()[:, :, -num_rows:], call.key.shape[1], row_weights)
        lse = None if call.lse is None else call.lse[:, :, -num_rows:]
    # Autocast would round the logits that the log-sum-exps are computed from.
    with torch.no_grad(), torch.autocast(call.key.device.type, enabled=False):
        arguments = call.logit_arguments
        sink_logits = arguments.pop("sink_logits")
        query, key = call.query[:, :, -num_rows:], call.key
        if lse is None:
            lse = row_lse(query, key, key_mask=is_token, sink_logits=sink_logits, **arguments)
        # How many columns of padding each row begins with. The op skips them.
        key_start = None if is_token is None else is_token.int().argmax(dim=-1).int()
        scores = attention_scores(query, key, lse, row_weights=row_weights, key_start=key_start, **arguments)
        # The log-sum-exps leave out padding between tokens, so that the scores of these columns have no meaning.
        return output, scores if is_token is None else scores.masked_fill_(~is_token[:, None], 0.0)


def run_with_lse(
    call: AttentionCall, is_token: torch.Tensor | None, row_present: list[int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    The output of the attention that the user chose, and its log-sum-exps. None where it does not give them.
    """
    if call.function is sdpa_attention_forward:
        implementation = "sdpa"
    elif call.function is flash_attention_forward:
        implementation = call.module.config._attn_implementation
    else:
        return None
    arguments = call.logit_arguments
    is_plain = (
        arguments.pop("sink_logits") is None
        and not call.kwargs.get("dropout")
        and call.kwargs.get("position_bias") is None
        and call.kwargs.get("sliding_window") is None
    )
    has_known_mask = implementation != "sdpa" or call.mask is None or call.mask.dtype == torch.bool
    if not is_plain or not has_known_mask:
        return None
    return attention_with_lse(
        implementation,
        call.query,
        call.key,
        call.value,
        # One mask serves all heads: masks have been checked to hide nothing but padding and later tokens.
        mask=None if implementation != "sdpa" or call.mask is None else call.mask[:, :1],
        key_mask=is_token,
        row_present=None if is_token is None else row_present,
        **arguments,
    )


def attend_with_bias(
    call: AttentionCall, tokens: Tokens, num_rows: int, row_weights: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
    """
    `attend_and_score` where keys have a bias, which the attention functions of models do not know. It computes in
    float32, some queries at a time. There are no scores if `num_rows` is 0.
    """
    arguments = call.logit_arguments
    sink_logits = arguments.pop("sink_logits")
    batch, heads, num_queries, _ = call.query.shape
    kv_heads, num_keys = call.key.shape[1:3]
    key, value, first_row = call.key.float(), call.value.float(), num_queries - num_rows
    is_token, bias = tokens.positions >= 0, call.bias[:, :, None, None]
    sums = torch.zeros(batch, kv_heads, num_keys, dtype=torch.float32, device=key.device) if num_rows else None
    outputs, rows_per_chunk = [], max(CHUNK_ELEMENTS // (batch * heads * num_keys), 1)
    for start in range(0, num_queries, rows_per_chunk):
        stop = min(start + rows_per_chunk, num_queries)
        is_visible = is_token[..., None, : num_keys - num_queries + stop]
        is_visible = is_visible & causal_mask(start, stop, num_queries, num_keys, key.device)
        visible = is_visible.shape[-1]
        logits = grouped_logits(call.query[:, :, start:stop].float(), key[:, :, :visible], **arguments)
        probabilities = softmax_of_logits(logits + bias[..., :visible], is_visible[:, :, None], sink_logits)
        output = probabilities @ value[:, :, None, :visible]  # (batch, kv_heads, group, rows, value_dim)
        outputs.append(output.flatten(1, 2).transpose(1, 2).to(call.value.dtype))
        if sums is not None and stop > first_row:
            first = max(start, first_row)
            weights = is_token[..., num_keys - num_queries + first : visible].float()
            if row_weights is not None:
                weights = weights * row_weights[:, None, first - first_row : stop - first_row]
            counted = probabilities.detach()[..., first - start :, :].sum(dim=2)
            sums[..., :visible] += (weights[..., None] * counted).sum(dim=2)
    return (torch.cat(outputs, dim=1), None), sums


def sum_of_probabilities(probabilities: torch.Tensor, kv_heads: int, row_weights: torch.Tensor | None) -> torch.Tensor:
    """
    Scores from attention probabilities `(batch, heads, rows, keys)`, one KV head at a time: a float32 copy of all
    would take as much memory as eager attention.
    """
    batch, heads, num_rows, num_keys = probabilities.shape
    if row_weights is None:
        return probabilities.unflatten(1, (kv_heads, -1)).sum(dim=(2, 3), dtype=torch.float32)
    scores = []
    for per_head in probabilities.chunk(kv_heads, dim=1):
        per_row = per_head.sum(dim=1, dtype=torch.float32)  # (batch, rows, keys)
        # A choice instead of a product: rows of padding may hold NaN.
        per_row = torch.where(row_weights[..., None] != 0, per_row * row_weights[..., None], 0.0)
        scores.append(per_row.sum(dim=1))
    return torch.stack(scores, dim=1)


def sum_of_measures(
    prompt: PromptView, num_rows: int, row_weights: torch.Tensor | None, measure: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """
    The scores of `attend_and_score` where `measure` turns each query's mean over the query heads of a KV head into
    another number. Attention is computed again, some queries of one KV head at a time.
    """
    batch, kv_heads, num_keys = prompt.key.shape[:3]
    heads, num_queries = prompt.query.shape[1:3]
    group = heads // kv_heads
    scores = torch.zeros(batch, kv_heads, num_keys, dtype=torch.float32, device=prompt.key.device)
    rows_per_chunk = max(CHUNK_ELEMENTS // (batch * group * num_keys), 1)
    for start in range(0, num_rows, rows_per_chunk):
        chunk = slice(start, min(start + rows_per_chunk, num_rows))
        queries = slice(num_queries - num_rows + chunk.start, num_queries - num_rows + chunk.stop)
        for head in range(kv_heads):
            probabilities, is_visible = prompt.head_attention(head, queries)
            measured = measure(probabilities.mean(dim=1), is_visible.sum(dim=-1, keepdim=True))
            if row_weights is not None:
                measured = measured * row_weights[:, chunk, None]
            scores[:, head] += measured.sum(dim=1)
    return scores * group
