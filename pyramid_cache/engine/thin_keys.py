"""
ThinK of Xu et al., 2024: Thinner Key Cache by Query-Driven Pruning (https://arxiv.org/abs/2407.21018).

The logit of a key is a sum over channels, of which few matter. Each KV head keeps those channels whose product of
query and key is largest, and old keys are stored without the others. The latest keys stay whole.

Departure from the paper, which chooses channels at the end of a long prompt: a row chooses them when its first tokens
leave the residual, and keeps them. Its last queries are known by then, whether a prompt or steps brought them.
"""

import torch

from pyramid_cache.engine.budget import floor_of_product


# How many of the last queries of a row tell which channels matter.
WINDOW = 32


def num_channels(width: int, ratio: float) -> int:
    """How many channels stay of keys of that width, if this share of them goes."""
    return width - floor_of_product(ratio, width)


def mean_squares(
    query: torch.Tensor, positions: torch.Tensor, length: torch.Tensor, earlier: torch.Tensor | None, kv_heads: int
) -> torch.Tensor:
    """
    The mean over the last `WINDOW` queries of a row, and over the query heads of a KV head, of each channel squared.

    Args:
        query (`torch.Tensor`): `(batch, heads, queries, head_dim)`, with RoPE.
        positions (`torch.Tensor`): `(batch, queries)` int32, -1 for padding.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens each row has seen, these included.
        earlier (`torch.Tensor`, *optional*): The mean before these queries, which take over their share of it.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, head_dim)` float32.
    """
    window = length.clamp(min=1, max=WINDOW)
    is_in_window = ((positions >= 0) & (positions >= length[:, 0] - window[:, 0]))[:, None, :, None]
    squares = query.float().square().unflatten(1, (kv_heads, -1)).mean(dim=2)
    # A choice instead of a product: rows of padding may hold NaN.
    mean = torch.where(is_in_window, squares, 0.0).sum(dim=2) / window
    return mean if earlier is None else mean + earlier * (1 - is_in_window.sum(dim=2) / window)


def best_channels(query_squares: torch.Tensor, key: torch.Tensor, is_token: torch.Tensor, number: int) -> torch.Tensor:
    """
    The channels that matter most: the mean square of queries times that of keys is the largest. Of equal channels the
    later ones stay.

    Args:
        query_squares (`torch.Tensor`): `(batch, kv_heads, head_dim)`, as `mean_squares` gives.
        key (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
        is_token (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` bool.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, number)` int64, ascending.
    """
    squares = torch.where(is_token[..., None], key.float().square(), 0.0).sum(dim=2)  # ranks channels as the mean does
    order = (query_squares * squares).argsort(dim=-1, stable=True)
    return order[..., order.shape[-1] - number :].sort(dim=-1).values
