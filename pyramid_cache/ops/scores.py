"""
Attention that also tells how much each key was attended to: the public functions, and the ops they call.

Their docstrings are the specification. `reference` computes them on the CPU, `triton_scores` and `triton_decode` on
CUDA.
"""

from typing import Any

import torch

from pyramid_cache.ops import reference
from pyramid_cache.ops.registration import check_dtype, check_query, check_shape, kernels, needs_gradients, register


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scaling: float,
    row_weights: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """
    How much attention each key receives from the given query rows, out of the log-sum-exps of the attention that ran:
    key `j` gets `sum_i weight_i * exp(scaling * q_i.k_j - lse_i)`, over the rows `i` that see it. Attention is causal
    and bottom-right aligned: row `i` sees the keys up to `keys - rows + i`. The last `w` rows alone are a slice of
    `query` and `lse`.

    Args:
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`, the last `rows` queries of the sequence.
        key (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`, `rows <= keys`.
        lse (`torch.Tensor`): `(batch, heads, rows)` float32, the natural log-sum-exp of each row's scaled and capped
            logits. A row where it is infinite attends to nothing.
        scaling (`float`): Factor on the logits.
        row_weights (`torch.Tensor`, *optional*): `(batch or 1, rows)` float32, how much each row counts; 1 by default.
            A row of weight 0 adds nothing, whatever it holds.
        key_start (`torch.Tensor`, *optional*): `(batch,)` int32, how many columns of padding each row of the batch
            begins with. Their keys get 0, and their queries add nothing.
        softcap (`float`, *optional*): Logits are `softcap * tanh(logits / softcap)`, as in Gemma 2.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, keys)` float32, summed over the query heads that share a KV head.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
        NotImplementedError: Where autograd would record it.
    """
    check_query(query, key)
    check_dtype("key", key, query.dtype)
    batch, heads, rows, _ = query.shape
    if rows > key.shape[2]:
        raise ValueError(f"{rows} query rows cannot be the last ones of {key.shape[2]} keys.")
    check_shape("lse", lse, batch, heads, rows)
    check_dtype("lse", lse, torch.float32)
    check_shape("row_weights", row_weights, batch, rows, or_one=0)
    check_dtype("row_weights", row_weights, torch.float32)
    check_shape("key_start", key_start, batch)
    check_dtype("key_start", key_start, torch.int32)
    return _attention_scores(query, key, lse, row_weights, key_start, scaling, softcap)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of one query per row over slots in any order, with the probabilities it used. Keys and values are read
    once. It is differentiable.

    Args:
        query (`torch.Tensor`): `(batch, heads, 1, head_dim)`.
        key, value (`torch.Tensor`): `(batch, kv_heads, slots, head_dim)`; the values may have a width of their own.
        scaling, softcap: As in `attention_scores`.
        mask (`torch.Tensor`, *optional*): bool `(batch, kv_heads or 1, slots)`, False for a slot that is empty; what
            it holds must be finite.
        bias (`torch.Tensor`, *optional*): `(batch, kv_heads or 1, slots)` float32, added to the capped logits of the
            slots. The logarithm of `n` makes a slot count as `n` tokens with its key and value. That of an empty slot
            may be any finite number.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss: they take part in
            the normalisation and are then dropped.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the output `(batch, 1, heads, value_dim)`, laid out as attention functions
        of transformers return it; and probabilities `(batch, kv_heads, slots)` float32, summed over the query heads
        that share a KV head. Both are zeros where all slots of a head are empty.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
    """
    check_query(query, key, rows=1)
    check_dtype("key", key, query.dtype)
    check_shape("value", value, *key.shape[:3], None)
    check_shape("sink_logits", sink_logits, query.shape[1])
    check_shape("mask", mask, *key.shape[:3], or_one=1)
    check_dtype("mask", mask, torch.bool)
    check_shape("bias", bias, *key.shape[:3], or_one=1)
    check_dtype("bias", bias, torch.float32)
    arguments = (query, key, value, mask, bias, sink_logits, scaling, softcap)
    return (
        reference.decode_in_float32(*arguments)
        if needs_gradients(*arguments)
        else decode_attention_unchecked(*arguments)
    )


def is_plain_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> bool:
    """
    Whether `decode_attention` stands in for the model's attention of one query when no scores are wanted. On the CPU
    it reads shared KV heads once, where transformers' sdpa repeats them: a third of the time at 8,192 tokens of 8 KV
    heads with 4 query heads each.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and softcap is None
        and sink_logits is None
    )


def _fake_scores(query, key, *rest):
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _fake_decode(query, key, value, *rest):
    output = value.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    return output, value.new_empty(key.shape[:3], dtype=torch.float32)


def _scores_on_cuda(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    return (kernels("triton_scores", query, key) or reference).attention_scores(query, key, *rest)


def _decode_on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    module = kernels("triton_decode", query, key, value)
    run = reference.decode_in_float32 if module is None else module.decode_attention
    return run(query, key, value, *rest)


_attention_scores = register(
    "attention_scores(Tensor query, Tensor key, Tensor lse, Tensor? row_weights, Tensor? key_start, float scaling, "
    "float? softcap) -> Tensor",
    cpu=reference.attention_scores,
    cuda=_scores_on_cuda,
    fake=_fake_scores,
)
decode_attention_unchecked = register(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sink_logits, float "
    "scaling, float? softcap) -> (Tensor, Tensor)",
    cpu=reference.decode_attention,
    cuda=_decode_on_cuda,
    fake=_fake_decode,
)
