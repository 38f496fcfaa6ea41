"""
Keys of low rank: one factor per token that all heads share, and a basis per head (ShadowKV, arXiv 2410.21465, section
3.1).

Before RoPE the keys of a layer lie near a subspace of few dimensions. Its basis comes from an eigendecomposition of
the Gram matrix of the keys of all heads together. The projection is that of the singular value decomposition, for one
matrix product over the tokens. More tokens can join later: the Gram matrix of the held tokens follows from their
factors. `width` is `kv_heads * head_dim`.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import pad

from pyramid_cache.caches.shadow_kv.quantization import stored, unit_of, widened
from pyramid_cache.ops.transfer import numbers_on


# Shorter axes than this share of the longest one count as zero: so small an eigenvalue is a rounding error of float32,
# and the factors would be divided by it.
SHORTEST_SHARE = 1e-4


def gram_matrix(keys: torch.Tensor) -> torch.Tensor:
    """The product `(batch, width, width)` float32 of keys `(batch, tokens, width)` with themselves."""
    return keys.float().mT @ keys.float()


def fit_basis(gram: torch.Tensor, rank: int | float) -> torch.Tensor:
    """
    The main axes `(batch, rank, width)` float32 of keys with this Gram matrix: so many, or so many that they hold this
    share of the sum of squares. The length of each is the root of the sum of squares along it, so that factors are of
    one size. A row that needs fewer axes than others has zeros behind its last one.
    """
    gram = gram.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # one spoiled row must not make it fail for all
    squares, axes = torch.linalg.eigh(gram)  # ascending
    squares, axes = squares.flip(-1).clamp(min=0), axes.flip(-1)
    if isinstance(rank, float):
        total = squares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
        needed = (squares.cumsum(dim=-1) / total < rank).sum(dim=-1, keepdim=True) + 1
        rank = int(needed.max())
        is_needed = torch.arange(gram.shape[-1], device=gram.device) < needed
        axes = axes * is_needed[:, None]
    lengths = squares[:, :rank].sqrt()
    lengths = lengths.maximum(SHORTEST_SHARE * lengths[:, :1])
    return (axes[..., :rank] * lengths[:, None]).mT.contiguous()


def project(keys: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The factors `(batch, tokens, rank)` float32 whose product with an orthogonal basis is nearest to the keys."""
    basis = basis.float()
    squares = basis.square().sum(dim=-1, keepdim=True)
    return keys.float() @ torch.where(squares > 0, basis / squares, 0).mT


def add_keys(
    blocks: Callable[[], Iterable[torch.Tensor]],
    factors: torch.Tensor,
    basis: torch.Tensor,
    rank: int | float,
    refits: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The factors of new keys. In some rows the basis is first fitted anew, to these keys and to the held ones.

    Args:
        blocks (`Callable`): Each call iterates over the new keys in blocks `(batch, tokens, width)` float32, zero
            where there is no token.
        factors (`torch.Tensor`): `(batch, tokens, rank)`, of the held tokens, in a float dtype or in one byte.
        basis (`torch.Tensor`): `(batch, rank, width)`, the basis of these factors.
        rank (`int` or `float`): See `fit_basis`.
        refits (`list[bool]`): Whether the basis of each row is fitted anew.

    Returns:
        `tuple`: The factors of the held tokens, the basis, and the factors of the new tokens in the same dtype.
    """
    is_quantized = factors.dtype.itemsize == 1
    if any(refits):
        gram = functools.reduce(torch.add, map(gram_matrix, blocks()))
        if factors.shape[1]:  # the held keys are `factors @ basis`
            gram = gram + basis.float().mT @ gram_matrix(factors) @ basis.float()
        fitted = fit_basis(gram, rank)
        if is_quantized:
            # Each axis is scaled so that the largest factor along it becomes the largest number of the dtype.
            held = factors.float() @ project(basis, fitted)
            largest = [held.abs().amax(dim=1)] if held.shape[1] else []
            largest += [project(block, fitted).abs().amax(dim=1) for block in blocks()]
            fitted = fitted * unit_of(torch.stack(largest).amax(dim=0), factors.dtype)[..., None]
        fitted = fitted.to(basis.dtype)
        moved = stored(factors.float() @ project(basis, fitted), factors.dtype)
        if not all(refits):
            is_refitted = numbers_on(basis.device, refits, torch.bool).view(-1, 1, 1)
            missing = basis.shape[1] - fitted.shape[1]
            fitted, moved = pad(fitted, (0, 0, 0, max(missing, 0))), pad(moved, (0, max(missing, 0)))
            basis, factors = pad(basis, (0, 0, 0, max(-missing, 0))), pad(factors, (0, max(-missing, 0)))
            fitted, moved = torch.where(is_refitted, fitted, basis), torch.where(is_refitted, moved, factors)
        basis, factors = fitted, moved
    new = torch.cat([project(block, basis) for block in blocks()], dim=1)
    if is_quantized:
        factors, ratio = widened(factors, new)
        basis = (basis * ratio.mT).to(basis.dtype)
        new = new / ratio
    return factors, basis, stored(new, factors.dtype)
