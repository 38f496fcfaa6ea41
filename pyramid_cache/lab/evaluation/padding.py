"""Prompts of several lengths in one batch: padded on the left, as `generate` takes them."""

from collections.abc import Sequence
from typing import Any

import torch


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Rows of token ids as one tensor.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `(rows, longest)` token ids, and `(rows,)` how many columns of padding each row
        begins with; None if no row has any.
    """
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * num + list(row) for num, row in zip(padding, rows, strict=True)], device=device)
    return ids, torch.tensor(padding, device=device) if any(padding) else None


def padding_arguments(padding: torch.Tensor | None, num_seen: int, num_new: int) -> dict[str, Any]:
    """
    What a model is told of padding.

    Args:
        padding (`torch.Tensor`, *optional*): `(rows,)`, the columns that each row begins with; None if there are none.
        num_seen (`int`): Columns that the cache has seen, padding included.
        num_new (`int`): Columns to read.
    """
    if padding is None:
        return {}
    columns = torch.arange(num_seen + num_new, device=padding.device) - padding[:, None]
    return {"attention_mask": (columns >= 0).long(), "position_ids": columns[:, num_seen:].clamp(min=0)}
