"""Two layers in one: which tokens are merged, and how (MiniCache, Section 4). Pure functions of tensors."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional


# Directions that are nearer than that to the opposite of each other have no direction between them, in radians.
LEAST_ANGLE = 1e-3


def shared_directions(
    first: torch.Tensor, second: torch.Tensor, interpolation: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Unit vectors between those of two layers by spherical interpolation, and the angles between the two.

    Args:
        first, second (`torch.Tensor`): `(..., width)`.
        interpolation (`float`): 0 gives the directions of `first`, 1 those of `second`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(..., width)` and `(...,)` float32.
    """
    first, second = functional.normalize(first.float(), dim=-1), functional.normalize(second.float(), dim=-1)
    angles = (first * second).sum(dim=-1).clamp(-1, 1).acos()
    # Instead of a division by the sine of the angle the sum is normalised: it is the same where there is a sine.
    safe = angles.clamp(min=LEAST_ANGLE)[..., None]
    between = ((1 - interpolation) * safe).sin() * first + (interpolation * safe).sin() * second
    nearer = second if interpolation >= 0.5 else first
    between = torch.where(safe > math.pi - LEAST_ANGLE, nearer, between)
    return functional.normalize(between, dim=-1), angles


class MergedLayers(NamedTuple):
    """
    The keys, or the values, of two layers.

    Attributes:
        directions (`torch.Tensor`): `(batch, kv_heads, tokens, width)`: the shared direction of each token. Of a token
            that is not merged, the vector of the first layer.
        norms (`torch.Tensor`): `(batch, kv_heads, tokens, 2)`, of the first and of the second layer. Of a token that
            is not merged, 1 for the first layer.
        exact (`torch.Tensor`, *optional*): `(batch, kv_heads, unmerged, width)`: the vectors of the second layer that
            are not merged, equally many of each block. None if all are.
        places (`torch.Tensor`, *optional*): `(batch, kv_heads, unmerged)` uint8, where they are in their block.
    """

    directions: torch.Tensor
    norms: torch.Tensor
    exact: torch.Tensor | None
    places: torch.Tensor | None

    def restored(self, layer: int, block_length: int) -> torch.Tensor:
        """What the first (0) or the second layer (1) held, but for the merging: `(batch, kv_heads, tokens, width)`."""
        numbers = (self.directions.float() * self.norms[..., layer : layer + 1].float()).to(self.directions.dtype)
        if layer and self.exact is not None:
            num_blocks = numbers.shape[2] // block_length
            index = slots_of(self.places.long(), num_blocks, block_length)[..., None].expand_as(self.exact)
            numbers = numbers.scatter(2, index, self.exact)
        return numbers


def slots_of(places: torch.Tensor, num_blocks: int, block_length: int) -> torch.Tensor:
    """Places in blocks, `(batch, kv_heads, any)` with as many of each block, as places among all tokens."""
    starts = torch.arange(num_blocks, device=places.device)[:, None] * block_length
    return (places.unflatten(2, (num_blocks, -1)) + starts).flatten(2)


@dataclass(frozen=True)
class Merger:
    """
    How pairs of layers are merged.

    Attributes:
        interpolation (`float`): Where shared directions are between those of the first layer (0) and of the second.
        num_exact (`int`): How many tokens of a block stay unmerged: those of the largest angles.
        block_length (`int`): How many tokens are merged at once.
        residual_length (`int`): How many of the latest tokens of each row are not merged yet.
    """

    interpolation: float
    num_exact: int
    block_length: int
    residual_length: int

    def num_merged(self, row_length: int) -> int:
        """How many of the first tokens of a row of that length are in merged blocks."""
        return max(row_length - self.residual_length, 0) // self.block_length * self.block_length

    def merge(self, first: torch.Tensor, second: torch.Tensor) -> MergedLayers:
        """The keys, or the values, of two layers, each `(batch, kv_heads, tokens, width)` of whole blocks."""
        directions, angles = shared_directions(first, second, self.interpolation)
        norms = torch.stack([each.float().norm(dim=-1) for each in (first, second)], dim=-1)
        if not self.num_exact:
            return MergedLayers(directions.to(first.dtype), norms.to(first.dtype), None, None)
        blocks = angles.unflatten(2, (-1, self.block_length))
        # Of equal angles the older token stays unmerged.
        places = blocks.sort(dim=-1, descending=True, stable=True).indices[..., : self.num_exact].flatten(2)
        slots = slots_of(places, blocks.shape[2], self.block_length)
        index = slots[..., None].expand(-1, -1, -1, first.shape[3])
        directions = directions.to(first.dtype).scatter(2, index, first.gather(2, index))
        norms = norms.to(first.dtype)
        norms[..., 0].scatter_(2, slots, 1)
        return MergedLayers(directions, norms, second.gather(2, index), places.to(torch.uint8))
