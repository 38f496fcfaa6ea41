"""
What is compared: attention as transformers' sdpa runs it, and the way of the caches to the same output with scores.

Inputs are random. Those of decoding are a full layer of `H2OCache`: all slots held, half of them recent.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from pyramid_cache.ops import attention_scores, decode_attention, decode_attention_and_evict, row_lse
from pyramid_cache.ops.lse import attention_with_lse, can_give_lse


PREFILL_OPS = ("window_scores", "all_row_scores")
DECODE_OPS = ("decode_scores", "decode_scores_and_evict")
OPS = PREFILL_OPS + DECODE_OPS
# What the ops may need beyond their inputs and outputs: chunks of logits, and workspaces of torch's own kernels.
WORKSPACE_BYTES = 1 << 28


@dataclass(frozen=True)
class Shape:
    """
    Args:
        length (`int`): Keys; also the queries, but for decoding.
        window (`int`): The rows whose scores `window_scores` takes.
    """

    length: int
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int

    def random_query(self, length: int) -> torch.Tensor:
        """Normal values, `(batch_size, heads, length, head_dim)`, laid out as the projections of models leave them."""
        return self.random(length, self.heads).transpose(1, 2)

    def random_key(self, length: int) -> torch.Tensor:
        """Normal values, `(batch_size, kv_heads, length, head_dim)`, laid out as caches hold them."""
        return self.random(self.kv_heads, length)

    def random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(self.batch_size, *sizes, self.head_dim, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """
    Args:
        attention (`functools.partial`): `sdpa` of query, key and value.
        with_scores (`Callable`): Returns the same output, and scores `(batch, kv_heads, keys)`.
        recomputes_lse (`bool`): Whether no provider gives the log-sum-exps, so that they are computed a second time.
    """

    attention: functools.partial
    with_scores: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    recomputes_lse: bool = False


def bytes_moved(op: str, shape: Shape) -> int:
    """
    The bytes that attention with scores cannot do without: queries, keys, values, log-sum-exps, scores and output once
    each. Where decoding updates scores in place they are read as well, and so are the positions of the slots.
    """
    rows = 1 if op in DECODE_OPS else shape.length
    per_head = shape.batch_size * shape.head_dim * shape.dtype.itemsize
    queries_and_output = 2 * shape.heads * rows * per_head
    keys_and_values = 2 * shape.kv_heads * shape.length * per_head
    log_sum_exps = shape.batch_size * shape.heads * rows * 4
    slots = shape.batch_size * shape.kv_heads * shape.length * 4
    return queries_and_output + keys_and_values + log_sum_exps + slots * (3 if op == "decode_scores_and_evict" else 1)


def check_memory(op: str, shape: Shape, copies: int, available: int | None) -> None:
    """Raises ValueError where so many sets of inputs with their outputs have no room."""
    # Both attentions hold an output at once.
    needed = (copies + 1) * bytes_moved(op, shape) + WORKSPACE_BYTES
    if available is not None and needed > available:
        raise ValueError(
            f"{op} at length {shape.length} takes about {needed / 2**30:,.1f} GiB, but {shape.device} has "
            f"{available / 2**30:,.1f} GiB free. Lower --lengths or --batch-size."
        )


def build_case(op: str, shape: Shape) -> Case:
    """New random inputs, and the two functions on them."""
    return build_decode_case(op, shape) if op in DECODE_OPS else build_prefill_case(op, shape)


def build_prefill_case(op: str, shape: Shape) -> Case:
    """A prompt of `length` tokens, without padding."""
    query = shape.random_query(shape.length)
    key, value = shape.random_key(shape.length), shape.random_key(shape.length)
    scaling = shape.head_dim**-0.5
    rows = shape.window if op == "window_scores" else shape.length

    def with_scores() -> tuple[torch.Tensor, torch.Tensor]:
        given = attention_with_lse("sdpa", query, key, value, scaling=scaling)
        scored = query[:, :, -rows:]
        if given is None:
            output, lse = attention(), row_lse(scored, key, scaling=scaling)
        else:
            output, lse = given[0], given[1][:, :, -rows:]
        return output, attention_scores(scored, key, lse, scaling=scaling)

    attention = functools.partial(sdpa, query, key, value, is_causal=True)
    return Case(attention, with_scores, recomputes_lse=not can_give_lse("sdpa", query, key, value))


def build_decode_case(op: str, shape: Shape) -> Case:
    """One new token of each row over `length` slots, all held."""
    query = shape.random_query(1)
    key, value = shape.random_key(shape.length), shape.random_key(shape.length)
    scaling = shape.head_dim**-0.5
    attention = functools.partial(sdpa, query, key, value, is_causal=False)
    if op == "decode_scores":

        def with_scores() -> tuple[torch.Tensor, torch.Tensor]:
            output, _, probabilities = decode_attention(query, key, value, scaling=scaling)
            return output, probabilities

        return Case(attention, with_scores)
    slots_shape = (shape.batch_size, shape.kv_heads, shape.length)
    order = torch.rand(slots_shape, device=shape.device).argsort(dim=-1)
    positions, accumulated = order.int(), torch.rand(slots_shape, device=shape.device)
    new_key, new_value = shape.random_key(1), shape.random_key(1)
    # The slot of the oldest token takes the new one.
    slots = positions.argmin(dim=-1, keepdim=True)
    next_position, num_recent = (
        torch.full((shape.batch_size, 1, 1), number, dtype=torch.int32, device=shape.device)
        for number in (shape.length + 1, shape.length // 2)
    )

    def with_scores_and_eviction() -> tuple[torch.Tensor, torch.Tensor]:
        output, _, _ = decode_attention_and_evict(
            query,
            new_key,
            new_value,
            slots,
            key=key,
            value=value,
            positions=positions,
            scores=accumulated,
            next_position=next_position,
            num_recent=num_recent,
            has_empty_slots=False,
            scaling=scaling,
        )
        return output, accumulated

    return Case(attention, with_scores_and_eviction)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """What transformers' sdpa comes to without a mask; `(batch, rows, heads, head_dim)` like its output."""
    output = scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
    return output.transpose(1, 2).contiguous()
