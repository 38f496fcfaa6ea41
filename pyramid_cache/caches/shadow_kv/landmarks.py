"""
Landmarks: the vectors by which a query chooses chunks of keys. A landmark is the mean of a chunk's keys (ShadowKV,
arXiv 2410.21465, section 3.1) and their spread around it. The spread takes the place of the bounds of Quest (arXiv
2406.10774).
"""

import math

import torch
from torch.nn.functional import pad


def landmarks_of(chunks: torch.Tensor, num_bands: int) -> torch.Tensor:
    """
    The mean of the keys of each chunk, and the standard deviations of the keys in each band of dimensions.

    Args:
        chunks (`torch.Tensor`): `(batch, kv_heads, chunks, chunk_size, head_dim)` float32.
        num_bands (`int`): How many bands there are.

    Returns:
        `torch.Tensor`: `(batch, kv_heads, chunks, head_dim + num_bands)`. The product with `probe_of` a query is the
        logit of the mean, plus the logit of a deviation towards the query by one standard deviation of each band.
    """
    variances, means = torch.var_mean(chunks, dim=3, correction=0)
    return torch.cat([means, in_bands(variances.sqrt(), num_bands)], dim=-1)


def lowest_cosines(chunks: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """`(batch, kv_heads, chunks)`: the lowest cosine of a key of each chunk and their mean, -1 where there is NaN."""
    if chunks.shape[3] == 1:  # each stands for itself, but for rounding
        return torch.ones_like(means[..., 0])
    return torch.cosine_similarity(chunks, means[..., None, :], dim=-1).amin(dim=-1).nan_to_num(nan=-1.0)


def probe_of(query: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """
    The vectors `(..., head_dim + num_bands)` by which queries `(..., head_dim)` multiply landmarks. `bands` is the
    `band_matrix`.
    """
    return torch.cat([query, query.abs() @ bands], dim=-1)


def band_matrix(head_dim: int, num_bands: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix `(head_dim, num_bands)` by which `in_bands` multiplies."""
    return in_bands(torch.eye(head_dim, device=device), num_bands).to(dtype)


def in_bands(numbers: torch.Tensor, num_bands: int) -> torch.Tensor:
    """
    Sums `(..., num_bands)` over bands of dimensions, divided by the root of the band's width, so that they stay in the
    range of float16. The product of two of them is the product of a sum and a mean. The two dimensions of a RoPE pair,
    half a head apart, are in one band.
    """
    if not num_bands:
        return numbers[..., :0]
    half = -(-numbers.shape[-1] // 2)
    width = -(-half // num_bands)
    pairs = pad(numbers, (0, 2 * half - numbers.shape[-1])).unflatten(-1, (2, half)).sum(dim=-2)
    bands = pad(pairs, (0, num_bands * width - half)).unflatten(-1, (num_bands, width)).sum(dim=-1)
    return bands / math.sqrt(2 * width)
