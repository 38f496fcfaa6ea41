"""Tokens that never go: the positions that users name, and their rank among the other tokens."""

import reprlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from pyramid_cache.engine.budget import MAX_TOKENS
from pyramid_cache.ops.transfer import numbers_on


Protect: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | None


def read_protect(protect: Any) -> tuple[Sequence[int], ...]:
    """
    The positions that users protect, ascending: of all rows, or one sequence for each row. Empty if there are none.
    numpy's numbers and arrays are read as well. Raises ValueError for what is no number and no position.
    """
    given = plain(protect)
    if given is None:
        return ()
    is_sequence = isinstance(given, list)
    rows = given if is_sequence and all(isinstance(each, list) for each in given) else [given]
    numbers = [each for row in rows for each in row] if is_sequence else [given]
    highest = MAX_TOKENS - 1 if is_sequence else MAX_TOKENS
    wrong = [each for each in numbers if type(each) is not int or not 0 <= each <= highest]
    if wrong:
        raise ValueError(
            f"`protect={reprlib.repr(protect)}` must be the number of tokens at the start of each row, a list of "
            f"positions (padding not counted), or a list of such lists, one for each row. {wrong[0]!r} is no integer "
            f"from 0 to {highest:,}."
        )
    spans = tuple(tuple(sorted(set(row))) for row in rows) if is_sequence else (range(given),)
    return spans if any(spans) else ()


def plain(value: Any) -> Any:
    """Lists and numbers of Python in the place of tensors, arrays and other sequences."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple | range) else value


def plain_setting(spans: tuple[Sequence[int], ...]) -> int | list[list[int]]:
    """What `read_protect` has read, as JSON has it."""
    return len(spans[0]) if isinstance(spans[0], range) else [list(span) for span in spans]


def spans_of_rows(spans: tuple[Sequence[int], ...], batch_size: int) -> list[Sequence[int]]:
    """
    The span of each row of a batch, whose rows `generate` may have repeated side by side. Empty if the rows are no
    multiple of those of `spans`.
    """
    repeats, rest = divmod(batch_size, len(spans))
    return [] if rest else [span for span in spans for _ in range(repeats)]


def protected_positions(spans: list[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The positions of each row `(batch, any)` int32, shorter ones filled up with `MAX_TOKENS`."""
    longest = max(map(len, spans))
    return numbers_on(device, [[*span, *[MAX_TOKENS] * (longest - len(span))] for span in spans], torch.int32)


def protected_first(priority: torch.Tensor, positions: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """
    Priorities in which protected tokens, and they alone, have `inf`.

    Args:
        priority (`torch.Tensor`): `(batch, heads, tokens)` float, see `best_tokens`.
        positions (`torch.Tensor`): `(batch, heads or 1, tokens)` int32.
        protected (`torch.Tensor`): `(batch, any)` int32, see `protected_positions`.
    """
    is_safe = is_protected(positions, protected)
    return priority.clamp(max=torch.finfo(priority.dtype).max).masked_fill(is_safe, float("inf"))


def is_protected(positions: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Which of the `positions` `(batch, heads or 1, tokens)` are among those of `protected_positions`, as bool."""
    flat = positions.flatten(1).contiguous()
    places = torch.searchsorted(protected, flat).clamp(max=protected.shape[1] - 1)
    return (protected.gather(1, places) == flat).view(positions.shape)
