"""
Which tokens to keep: pure functions on tensors. Ties are broken by age: of two equal scores the older goes first.
"""

import torch

from pyramid_cache.engine.budget import MAX_TOKENS, floor_of_product
from pyramid_cache.ops.transfer import numbers_on


def best_tokens(priority: torch.Tensor, num_kept: torch.Tensor, max_kept: int) -> torch.Tensor:
    """
    The tokens of highest priority, in their order.

    Args:
        priority (`torch.Tensor`): `(batch, heads, tokens)` float, older tokens first; `inf` for what must stay and
            `-inf` for padding. If more tokens than `num_kept` must stay, the oldest of them go. NaN is the lowest
            priority that a token can have, so that a row with an overflow keeps as many tokens as any other.
        num_kept (`torch.Tensor`): `(batch,)`, how many tokens each row keeps at most.
        max_kept (`int`): The largest of them.

    Returns:
        `torch.Tensor`: `(batch, heads, max_kept)` int64 indices, ascending, with -1 behind the last of a shorter row.
    """
    num_tokens = priority.shape[-1]
    priority = priority.masked_fill(priority.isnan(), torch.finfo(priority.dtype).min)
    # A stable descending sort of the reversed tokens puts the newest of equals first.
    order = priority.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :max_kept]
    indices = num_tokens - 1 - order
    is_token = priority.gather(-1, indices) > float("-inf")
    is_kept = torch.arange(indices.shape[-1], device=priority.device) < num_kept[:, None, None]
    indices = torch.where(is_token & is_kept, indices, num_tokens).sort(dim=-1).values
    return torch.where(indices < num_tokens, indices, -1)


def best_of_all_heads(priority: torch.Tensor, row_kept: list[int], floor_ratio: float) -> torch.Tensor:
    """
    Which tokens stay if heads share a budget.

    Args:
        priority (`torch.Tensor`): `(batch, kv_heads, tokens)`, as for `best_tokens`. Of equal scores of two heads, the
            one of the later head stays.
        row_kept (`list[int]`): How many tokens the heads of each row keep on average.
        floor_ratio (`float`): Each head keeps at least this share of that number.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, tokens)` bool. In each row `kv_heads * row_kept` are True, or all tokens if
            there are fewer.
    """
    kv_heads, num_tokens = priority.shape[1:]
    device = priority.device
    num_safe = [floor_of_product(floor_ratio, kept) for kept in row_kept]
    safe = best_tokens(priority, numbers_on(device, num_safe, torch.int64), max(num_safe))
    priority = priority.masked_fill(is_index(safe, num_tokens), float("inf"))
    totals = numbers_on(device, [kv_heads * kept for kept in row_kept], torch.int64)
    best = best_tokens(priority.flatten(1)[:, None], totals, kv_heads * max(row_kept))
    return is_index(best, kv_heads * num_tokens).view_as(priority)


def is_index(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`(batch, heads, num_tokens)` bool: whether a token is among the indices `(batch, heads, kept)`; -1 is none."""
    found = torch.zeros(*indices.shape[:2], num_tokens + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, indices.masked_fill(indices < 0, num_tokens), True)[..., :num_tokens]


def lowest_token(priority: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    The token of lowest priority, the one that `best_tokens` would drop first.

    Args:
        priority (`torch.Tensor`): `(batch, heads, slots)` float, `inf` for what must stay. NaN counts as for
            `best_tokens`.
        positions (`torch.Tensor`): `(batch, heads, slots)`, distinct among the tokens of a head.

    Returns:
        `torch.Tensor`: `(batch, heads, 1)` int64: its slot.
    """
    infinity = float("inf")
    priority = priority.nan_to_num(torch.finfo(priority.dtype).min, posinf=infinity, neginf=-infinity)
    is_higher = priority > priority.amin(dim=-1, keepdim=True)
    return positions.masked_fill(is_higher, torch.iinfo(positions.dtype).max).argmin(dim=-1, keepdim=True)


def gather_tokens(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    Copies tokens out of `(batch, heads, tokens, ...)` by `(batch, heads or 1, kept)` indices; -1 gives the first
    token.
    """
    indices = indices.clamp(min=0)
    if tensor.dim() == 4:
        indices = indices[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    elif indices.shape[1] != tensor.shape[1]:
        indices = indices.expand(-1, tensor.shape[1], -1)
    return tensor.gather(2, indices)


def in_order(positions: torch.Tensor, is_chosen: torch.Tensor, most: int) -> torch.Tensor:
    """
    The slots of the chosen tokens in order of position, `(batch, kv_heads or 1, most)` int64, with -1 behind the last
    one of a head.
    """
    ordered, slots = positions.masked_fill(~is_chosen, MAX_TOKENS).sort(dim=-1)
    return slots[..., :most].masked_fill(ordered[..., :most] == MAX_TOKENS, -1)
