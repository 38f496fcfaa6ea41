"""Checks of what callers hand to the methods of a cache. Each function raises ValueError for a bad argument."""

import operator

import torch


def as_tokens_to_remove(number: int) -> int:
    """The argument of `crop` as an int. Raises unless it is a negative integer or 0."""
    try:
        tokens_to_remove = operator.index(number)
    except TypeError:
        tokens_to_remove = 1
    if isinstance(number, bool) or tokens_to_remove > 0:
        raise ValueError(f"`crop({number!r})`: give the number of tokens to remove as a negative integer, or 0.")
    return tokens_to_remove


def as_row_indices(indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    The int64 indices of the rows that indices or a bool mask choose.

    Args:
        num_rows (`int`): How many rows the cache has, or -1 if that is not known.

    Raises:
        ValueError: The argument chooses no row, or a row that does not exist. Only indices on the CPU are checked: to
            read them on an accelerator would wait for it at every step of a beam search.
    """
    try:
        rows = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"Rows are chosen by a 1-D tensor of integers, not by {indices!r}.") from None
    if rows.dim() == 1 and rows.dtype == torch.bool:
        if num_rows not in (-1, rows.shape[0]):
            raise ValueError(f"A mask over {rows.shape[0]} rows was given to a cache of {num_rows} rows.")
        rows = rows.nonzero().flatten()
    if rows.dim() == 1 and not rows.shape[0]:
        raise ValueError(f"{indices!r} chooses no row. Use a new cache, or call `cache.reset()`, for another batch.")
    if rows.dim() != 1 or rows.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"Rows are chosen by a 1-D tensor of integers, not by one of shape {tuple(rows.shape)} and {rows.dtype}."
        )
    if num_rows != -1 and rows.device.type == "cpu" and not ((rows >= -num_rows) & (rows < num_rows)).all():
        raise ValueError(f"{rows.tolist()} cannot be chosen from a cache of {num_rows} rows.")
    return rows.long()


def as_repeats(number: int) -> int:
    """The argument of `batch_repeat_interleave` as an int. Raises unless it is a positive integer."""
    try:
        repeats = operator.index(number)
    except TypeError:
        repeats = 0
    if repeats < 1:
        raise ValueError(
            f"`batch_repeat_interleave({number!r})`: give how often to repeat each row, a positive integer."
        )
    return repeats


def check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Raises unless these are keys and values of the same new tokens."""
    for states in (key_states, value_states):
        if not isinstance(states, torch.Tensor):
            raise ValueError(f"Keys and values must be tensors, but a {type(states).__name__} was given.")
    shapes = tuple(key_states.shape), tuple(value_states.shape)
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:3] != shapes[1][:3] or 0 in (*shapes[0], *shapes[1]):
        raise ValueError(
            f"Keys of shape {shapes[0]} and values of shape {shapes[1]} are not (batch, kv_heads, tokens, head_dim) "
            "of the same tokens, one at least."
        )
    if not key_states.is_floating_point() or not value_states.is_floating_point():
        raise ValueError(f"Keys and values must be real numbers, not {key_states.dtype} and {value_states.dtype}.")
    if key_states.device != value_states.device:
        raise ValueError(f"Keys are on {key_states.device}, values on {value_states.device}.")
