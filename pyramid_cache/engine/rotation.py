"""
Rotary angles, and states turned by them, so that stored keys can be moved to other positions.

A model rotates keys before a cache sees them, and RoPE enters a score only through the difference of two angles. So a
key is moved by rotating it once more, from the angle it has to the angle it should have. What it has is the product of
position and inverse frequency in float32, off by up to 0.03 radians at position 1,000,000; what it should have is the
same product in float64. A factor on cosines and sines (yarn, longrope) sits in the states and is never touched.
"""

import functools
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from pyramid_cache.ops.transfer import numbers_on


@dataclass(eq=False)
class RotaryFrequencies:
    """How one attention layer rotates its keys: the first `rotary_dim` dimensions of each head."""

    # (rotary_dim / 2,) float32, negative for a model that turns the other way.
    inv_freq: torch.Tensor
    # "half" pairs dimension `i` with `i + rotary_dim / 2` (Llama), "interleaved" `2 i` with `2 i + 1`.
    layout: Literal["half", "interleaved"] = "half"
    # (rotary_dim / 2,), longrope only: in a forward that reaches beyond this many tokens, it replaces `inv_freq`.
    long_inv_freq: torch.Tensor | None = None
    original_max_position_embeddings: int | None = None
    # What `turn_by` was asked last, and its answer.
    latest_key: tuple = field(default=(), init=False)
    latest_turn: tuple = field(default=(), init=False)

    @functools.cached_property
    def content(self) -> tuple:
        """What is equal for two that rotate alike."""
        tensors = export_frequencies(self)[1].values()
        return self.layout, self.original_max_position_embeddings, *(tuple(each.tolist()) for each in tensors)

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return 2 * self.inv_freq.shape[-1]

    def model_angles(self, positions: torch.Tensor, longest: int | torch.Tensor) -> torch.Tensor:
        """
        The angles `(..., rotary_dim / 2)` in float64 that the model's float32 arithmetic used for positions `(...)`.
        `longest` is the largest position of the forward, over all rows, plus one; a tensor does not wait for the host.
        """
        inv_freq = self.inv_freq.to(positions.device)
        if self.long_inv_freq is not None:
            is_long = torch.as_tensor(longest > self.original_max_position_embeddings)
            inv_freq = torch.where(is_long.to(inv_freq.device), self.long_inv_freq.to(inv_freq.device), inv_freq)
        return (positions[..., None].float() * inv_freq).double()

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """The exact angles `(..., rotary_dim / 2)` in float64 for integers `(...)`; longrope's short frequencies."""
        return positions[..., None].double() * self.inv_freq.to(positions.device).double()

    def rotate(self, states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """
        Turns queries or keys `(batch, heads, seq, head_dim)` by angles `(..., rotary_dim / 2)`, which may have a 1 for
        each of the others. Computes in float32 (float64 for float64 states) and rounds once.
        """
        return turned(states, self.quarter_turn(states), *self.cosine_and_sine(angles, states))

    def cosine_and_sine(self, angles: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of float64 angles, `(..., head_dim)` each, in the precision in which states `(..., head_dim)` are turned. They
        are 1 and 0 for the dimensions that do not turn.
        """
        compute_dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        cosine, sine = angles.double().cos().to(compute_dtype), angles.double().sin().to(compute_dtype)
        return self.full_width(cosine, states, fill=1), self.full_width(sine, states)

    def full_width(self, tensor: torch.Tensor, states: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """A number for each pair of dimensions `(..., rotary_dim / 2)`, as one for each dimension of states."""
        both = torch.cat([tensor, tensor], dim=-1) if self.layout == "half" else tensor.repeat_interleave(2, dim=-1)
        num_still = states.shape[-1] - self.rotary_dim
        return pad(both, (0, num_still), value=fill) if num_still else both

    def quarter_turn(self, states: torch.Tensor) -> torch.Tensor:
        """States `(..., head_dim)`, each pair of dimensions turned by a right angle, and 0 where none turns."""
        rotated, num_still = states[..., : self.rotary_dim], states.shape[-1] - self.rotary_dim
        if self.layout == "half":
            first, second = rotated.chunk(2, dim=-1)
            rotated = torch.cat([-second, first], dim=-1)
        else:
            rotated = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], dim=-1).flatten(-2)
        return pad(rotated, (0, num_still)) if num_still else rotated

    def held_tensors(self) -> list[torch.Tensor]:
        """Every tensor that this refers to."""
        return [*export_frequencies(self)[1].values(), *self.latest_turn]

    def turn_by(self, distances: list[int], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `cosine_and_sine` that move states `(batch, any, tokens, head_dim)` by these distances, one for each row. What
        was asked last is kept: the layers of a forward pass ask for the same.
        """
        key = (distances, states.dtype, states.device, states.shape[-1])
        if self.latest_key != key:
            angles = self.angles(numbers_on(states.device, distances, torch.int64).view(-1, 1, 1))
            self.latest_key, self.latest_turn = key, self.cosine_and_sine(angles, states)
        return self.latest_turn


def turned(states: torch.Tensor, quarter_turn: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """States `(..., head_dim)` turned by angles whose cosines and sines are given, rounded once."""
    return torch.addcmul(states * cosine, quarter_turn, sine).to(states.dtype)


def export_frequencies(rotary: RotaryFrequencies | None) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Frequencies for a file: what JSON takes, and tensors by name."""
    if rotary is None:
        return None, {}
    values = {each.name: getattr(rotary, each.name) for each in fields(rotary) if each.init}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in values.items() if value is not None and name not in tensors}, tensors


def import_frequencies(numbers: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> RotaryFrequencies | None:
    """The frequencies that `export_frequencies` gave, out of the numbers and tensors of a file."""
    names = {each.name for each in fields(RotaryFrequencies)} & tensors.keys()
    return None if numbers is None else RotaryFrequencies(**numbers | {name: tensors[name] for name in names})
