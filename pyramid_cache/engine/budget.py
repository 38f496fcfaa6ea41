"""How many tokens each layer keeps: pure functions of numbers."""

import functools
import math
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal


# Positions are int32.
MAX_TOKENS = 2**31 - 1
BUDGET_FORMS = "a fraction of the prompt (0 < budget <= 1.0), a number of tokens (a positive int) or bytes ('256MiB')"
BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """What a layer may keep of a row: a fraction of the prompt, tokens per layer, or bytes of the whole cache."""

    kind: Literal["fraction", "tokens", "bytes"]
    amount: float | int

    @property
    def is_unlimited(self) -> bool:
        """Whether the whole prompt may be kept, which is taken to mean that nothing is ever evicted."""
        return self.kind == "fraction" and self.amount == 1

    def num_tokens(self, prompt_length: int) -> int:
        """What a layer may keep of a prompt: a token at least. `bytes_to_tokens` comes first for a budget in bytes."""
        if self.kind == "fraction":
            return max(floor_of_product(self.amount, prompt_length), 1)
        return int(self.amount)


def floor_of_product(fraction: float, count: int) -> int:
    """`floor(fraction * count)` of the decimal number that was written: 0.29 of 100 is 29, though 0.29 * 100 < 29."""
    return math.floor(Fraction(repr(float(fraction))) * count)


def is_number(value: object) -> bool:
    """Whether it is a real number, one of numpy's included; a bool is none, nor is a tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def read_count(name: str, number: Any, least: int) -> int:
    """A number of tokens or layers as users write it, numpy's included. Raises ValueError unless it can be one."""
    if isinstance(number, bool) or not isinstance(number, Integral) or not least <= int(number) <= MAX_TOKENS:
        raise ValueError(f"`{name}={number!r}` must be an integer of at least {least} and at most {MAX_TOKENS:,}.")
    return int(number)


def read_number(name: str, number: Any, interval: str) -> float:
    """A number as users write it. Raises ValueError outside of an interval such as "[0, 1)", without the 1."""
    low, high = map(float, interval[1:-1].split(","))
    excluded = (low if interval[0] == "(" else None, high if interval[-1] == ")" else None)
    if not is_number(number) or not low <= number <= high or number in excluded:
        raise ValueError(f"`{name}={number!r}` must be a number in {interval}.")
    return float(number)


def read_kernel_size(kernel_size: Any) -> int:
    """Over how many neighbouring tokens scores are pooled, as users write it. Raises ValueError unless it is odd."""
    kernel_size = read_count("kernel_size", kernel_size, least=1)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"`kernel_size={kernel_size}` must be odd, for a token is in the middle of its neighbours. Give "
            f"{kernel_size - 1} or {kernel_size + 1}."
        )
    return kernel_size


def parse_budget(budget: float | int | str) -> Budget:
    """Reads a budget as users write it, numpy's numbers included. Raises ValueError unless it is of `BUDGET_FORMS`."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", budget)
        if match is None or match[2].lower() not in BYTE_UNITS:
            raise ValueError(
                f"`budget={budget!r}` is no number of bytes. Give {BUDGET_FORMS}; units are B, KB, MB, GB, KiB, MiB, "
                "GiB, and a fraction or a number of tokens is no string."
            )
        num_bytes = int(Fraction(match[1]) * BYTE_UNITS[match[2].lower()])
        if num_bytes < 1:
            raise ValueError(f"`budget={budget!r}` holds nothing. Give {BUDGET_FORMS}.")
        return Budget("bytes", num_bytes)
    if not is_number(budget):
        raise ValueError(f"`budget` must be {BUDGET_FORMS}, but is {budget!r}.")
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(f"`budget={budget}` keeps no token. Give {BUDGET_FORMS}.")
        if budget > MAX_TOKENS:
            raise ValueError(f"`budget={budget}` exceeds {MAX_TOKENS:,} tokens. `budget=1.0` never evicts.")
        return Budget("tokens", int(budget))
    if not 0 < budget <= 1:
        hint = f" For {float(budget):.0f} tokens give the int." if math.isfinite(budget) and budget > 1 else ""
        raise ValueError(f"`budget={budget}` is no share of the prompt. Give {BUDGET_FORMS}.{hint}")
    return Budget("fraction", float(budget))


def bytes_to_tokens(
    num_bytes: int, num_layers: int, batch_size: int, bytes_per_token: int, num_spare_slots: int
) -> int:
    """
    The tokens per layer and row that a budget in bytes pays for, in which a layer has so many spare slots beyond those
    that it keeps. `bytes_per_token` is for one layer and row. Raises ValueError if not even one token fits.
    """
    num_tokens = num_bytes // (num_layers * batch_size * bytes_per_token) - num_spare_slots
    if num_tokens < 1:
        least = num_layers * batch_size * bytes_per_token * (1 + num_spare_slots)
        raise ValueError(
            f"A budget of {num_bytes:,} bytes cannot hold one token, and the {num_spare_slots} that may come in "
            f"before others go or are quantised, for {batch_size} rows in {num_layers} layers: that takes {least:,} "
            "bytes. Raise the budget, or lower `eviction_interval` or `residual_length`."
        )
    return min(num_tokens, MAX_TOKENS)


def cosine_decay(num_layers: int, decay_ratio: float) -> list[float]:
    """The shape of the pyramid: 1 at the first layer, falling as half a cosine to `decay_ratio` at the last one."""
    steps = max(num_layers - 1, 1)
    return [
        (1 - decay_ratio) * (math.cos(math.pi * layer / steps) + 1) / 2 + decay_ratio for layer in range(num_layers)
    ]


def linear_decay(num_layers: int, decay_ratio: float) -> list[float]:
    """The shape of a pyramid with straight sides: 1 at the first layer, falling to `decay_ratio` at the last one."""
    return [1 - (1 - decay_ratio) * layer / max(num_layers - 1, 1) for layer in range(num_layers)]


@functools.lru_cache(maxsize=1024)
def pyramid_schedule(
    prompt_length: int, total: int, shape: tuple[float, ...], minimum: int, num_dense_layers: int = 0
) -> tuple[int, ...]:
    """
    Numbers of tokens per layer with a given sum: `clip(scale * shape, minimum, prompt_length)`, scale being solved.

    Args:
        total (`int`): Tokens kept over all layers; met exactly if the bounds allow it.
        shape (`tuple[float, ...]`): One positive number per layer, never rising, as `cosine_decay` gives.
        num_dense_layers (`int`): The first layers, which keep everything.

    Raises:
        ValueError: The layers that keep everything and the minimum of the others take more than `total`.
    """
    num_layers, minimum, dense = len(shape), min(minimum, prompt_length), num_dense_layers * prompt_length
    needed = dense + (num_layers - num_dense_layers) * minimum
    rest = min(total, num_layers * prompt_length) - dense
    if dense + rest < needed:
        raise ValueError(
            f"A budget of {total} tokens over {num_layers} layers is too small for a prompt of {prompt_length}: "
            f"{num_dense_layers} layers that keep all of it and {minimum} tokens in each of the others take {needed}. "
            "Raise `budget`, or let fewer layers keep everything."
        )
    return (prompt_length,) * num_dense_layers + bounded_shares(rest, shape[num_dense_layers:], minimum, prompt_length)


def bounded_shares(total: int, shape: tuple[float, ...], minimum: int, maximum: int) -> tuple[int, ...]:
    """
    Whole numbers of a given sum in proportion to a shape of positive numbers: `clip(scale * shape, minimum, maximum)`.
    What has a larger share never gets less, and of equal shares the earlier never gets less.
    """

    def shares(scale: float) -> list[float]:
        return [min(max(scale * share, minimum), maximum) for share in shape]

    # Down to neighbouring floats, however far down a shape reaches: about 60 halvings for that of a pyramid.
    low, high = 0.0, min(maximum / min(shape, default=1.0), sys.float_info.max)
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    exact = shares(high)
    numbers = [math.floor(number) for number in exact]
    by_remainder = sorted(range(len(shape)), key=lambda index: (numbers[index] - exact[index], index))
    # This keeps the order: of two with the same floor, the smaller share never has the larger remainder.
    for index in by_remainder[: total - sum(numbers)]:
        numbers[index] += 1
    return tuple(numbers)
