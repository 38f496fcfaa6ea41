"""Scores by attention with queries and keys exchanged, against sums over a float64 matrix."""

import exact
import pytest
import torch

from pyramid_cache.ops.transposed import transposed_flash_scores


# Relative to each score. In half precision, the CPU's kernel takes exponentials that are off by 6e-5.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
# Tensor cores cut sums short, and multiply float32 in three passes.
CUDA_TOLERANCE = 3e-4
DTYPES = list(TOLERANCES)


def make_inputs(
    dtype: torch.dtype, rows: int, head_dim: int, group: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Query, key and the log-sum-exp of causal attention, for a batch of 2 and 2 KV heads."""
    query = torch.randn(2, 2 * group, rows, head_dim, device=device).mul(2).to(dtype)
    key = torch.randn(2, rows, 2, head_dim, device=device).to(dtype).transpose(1, 2)
    return query, key, causal_lse(query, key, head_dim**-0.5), head_dim**-0.5


def causal_lse(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    rows = query.shape[2]
    return exact.attention(query, key, scaling, exact.causal(rows, rows, device=query.device))[1].float()


def wanted_scores(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, weights: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`(batch, heads, keys)`: of the log-sum-exp that is given, in which a row may attend to nothing."""
    rows = query.shape[2]
    allowed = exact.causal(rows, rows, device=query.device)
    probabilities, true_lse = exact.attention(query, key, scaling, allowed)
    share = (true_lse - lse.double()).exp().masked_fill(lse.isinf(), 0.0)
    return exact.scores_of(probabilities * share[..., None], key.shape[1], weights, group_sum=False)


def weights_of(rows: int, kind: str, device: str = "cpu") -> torch.Tensor | None:
    """Weights from 1e-6 to 50, among them zeros if there are several, for all rows of the batch at once or each."""
    if kind == "none":
        return None
    weights = 10 ** torch.empty(2 if kind == "per_row" else 1, rows, device=device).uniform_(-6, 1.7)
    if rows > 1:
        weights[:, ::3] = 0.0
        weights[:, -2:] = 0.0
    return weights


def check(scores: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Every score must be right for its own size, however small; what gets nothing must have exactly that."""
    assert scores.dtype == torch.float32 and scores.shape == wanted.shape
    is_zero = wanted == 0
    assert (scores[is_zero] == 0).all()
    error = ((scores.double() - wanted) / wanted)[~is_zero].abs().max().item()
    print(f"{scores.device.type} {dtype}: relative error at most {error:.1e} of {tuple(scores.shape)}")
    assert error <= (CUDA_TOLERANCE if scores.is_cuda else TOLERANCES[dtype])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(dtype: torch.dtype, device: str) -> None:
    shapes = ((1, 16, 1), (37, 64, 3), (131, 80, 2), (300, 128, 4))
    for rows, head_dim, group in shapes if device == "cpu" else (*shapes, (1031, 80, 2), (2048, 128, 4)):
        query, key, lse, scaling = make_inputs(dtype, rows, head_dim, group, device)
        for kind in ("none", "one_for_all", "per_row"):
            weights = weights_of(rows, kind, device)
            wanted = wanted_scores(query, key, lse, weights, scaling)
            check(transposed_flash_scores(query, key, lse, weights, scaling, False), wanted, dtype)
            summed = transposed_flash_scores(query, key, lse, weights, scaling, True)
            check(summed, wanted.view(2, 2, group, rows).sum(dim=2), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_attend_to_nothing_add_nothing(dtype: torch.dtype) -> None:
    for infinity in (float("inf"), float("-inf")):
        query, key, lse, scaling = make_inputs(dtype, 37, 64, 3)
        lse[0, :, :5] = infinity
        lse[1, 2, 30:] = infinity
        weights = weights_of(37, "per_row")
        scores = transposed_flash_scores(query, key, lse, weights, scaling, False)
        assert (scores[1, 2, 30:] == 0).all()
        check(scores, wanted_scores(query, key, lse, weights, scaling), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_log_sum_exps_keep_their_precision(dtype: torch.dtype) -> None:
    """Logits up to 300: eight bits of the log-sum-exp alone would leave scores wrong by a factor."""
    query, key, _, scaling = make_inputs(dtype, 64, 64, 1)
    query = query * 32
    lse = causal_lse(query, key, scaling)
    scores = transposed_flash_scores(query, key, lse, None, scaling, False)
    wanted = wanted_scores(query, key, lse, None, scaling)
    # Sums in float32 of terms up to 2,000, times the scaling; what rounds to zero by far is left out.
    kept = wanted > 1e-6
    torch.testing.assert_close(scores.double()[kept], wanted[kept], atol=0, rtol=2e-4)


def test_what_it_cannot_compute_is_refused() -> None:
    query, key, lse, scaling = make_inputs(torch.float32, 9, 16, 1)
    with pytest.raises(ValueError, match="as many rows as keys, but there are 4 and 9"):
        transposed_flash_scores(query[:, :, 5:], key, lse[:, :, 5:], None, scaling, True)
    with pytest.raises(ValueError, match="must be 0 or more"):
        transposed_flash_scores(query, key, lse, -torch.ones(1, 9), scaling, True)
    with pytest.raises(ValueError, match="No attention kernel .* torch.float64 on cpu with head_dim 16"):
        transposed_flash_scores(query.double(), key.double(), lse, None, scaling, True)
