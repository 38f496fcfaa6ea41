"""Attention that scores: with padding of all kinds, through every attention function, against the definition."""

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_model, drive, random_rows, random_tokens
from synthetic import ATTENTION_FUNCTIONS, SyntheticModel, attend_like_flash
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.tokens import Tokens


KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16


@pytest.mark.parametrize("lengths", [(43,), (43, 29, 50)], ids=["one", "padded"])
@every_cache
def test_other_attention_gives_what_sdpa_gives(case: CacheCase, lengths: tuple[int, ...]) -> None:
    """Logits and held positions through turns, with attention like flash-attention's and with eager attention."""
    AttentionInterface.register("flash_on_cpu", attend_like_flash)
    AttentionMaskInterface.register("flash_on_cpu", flash_attention_mask)
    rows, pieces = random_rows(lengths, seed=31), [1] * 6 + [7] + [1] * 4
    later, traces = random_tokens(len(rows), sum(pieces), seed=32), []
    for attention in ("sdpa", "flash_on_cpu", "eager"):
        model = build_model("llama")
        model.config._attn_implementation = attention  # the setter for users would look for flash-attention itself
        traces.append(drive(model, case.build(model), rows, later, pieces=pieces))
    for trace in traces[1:]:
        # Rounding may move a number to the next of the codes that it is quantised to.
        atol = 2e-3 if case.quantizes else 1e-4
        torch.testing.assert_close(trace.logits, traces[0].logits, atol=atol, rtol=0)
        for found, wanted in zip(trace.positions, traces[0].positions, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one.sort().values, other.sort().values)


@every_cache
def test_masks_for_each_head(case: CacheCase) -> None:
    """A mask of four dimensions that is the same for all heads, spelled out."""
    model, tokens = build_model("llama"), random_tokens(2, 40)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    allowed[1, :, :, :7] = False
    caches = [case.build(model) for _ in range(2)]
    with torch.no_grad():
        for cache, heads in zip(caches, (1, model.config.num_attention_heads), strict=True):
            model(tokens, attention_mask=allowed.expand(-1, heads, -1, -1), past_key_values=cache)
    for layer in range(len(caches[0].layers)):
        assert torch.equal(caches[0].positions(layer), caches[1].positions(layer))


@pytest.mark.parametrize(
    "num_queries, is_weighted, num_rows", [(9, False, 9), (9, True, 4), (21, False, 1), (21, True, 9), (21, False, 4)]
)
@pytest.mark.parametrize("attention", ATTENTION_FUNCTIONS)
def test_scores_leave_padding_out(attention: str, num_queries: int, is_weighted: bool, num_rows: int) -> None:
    """Padding before a row, within it, and none; its keys would draw all attention, were they seen."""
    model = SyntheticModel(1, KV_HEADS, GROUP, HEAD_DIM, attention)
    is_token = torch.ones(3, 21, dtype=torch.bool)
    is_token[0, :5], is_token[1, 13:16], is_token[1, 0] = False, False, False
    query = torch.randn(3, KV_HEADS * GROUP, num_queries, HEAD_DIM)
    key, value = (torch.randn(3, KV_HEADS, 21, HEAD_DIM) for _ in range(2))
    key = torch.where(is_token[:, None, :, None], key, 30 * query[:, ::GROUP, -1:])
    weights = torch.rand(1, num_rows) if is_weighted else None
    mask = model.mask(is_token, num_queries, is_explicit=True)
    arguments = {"scaling": model.scaling, "dropout": 0.0}
    call = AttentionCall(ATTENTION_FUNCTIONS[attention], model.layers[0], query, key, value, mask, arguments)
    with torch.no_grad():
        (output, _), scores = attend_and_score(
            call, Tokens.from_validity(is_token, torch.device("cpu")), num_rows, weights
        )

    allowed = torch.ones(num_queries, 21, dtype=torch.bool).tril(21 - num_queries) & is_token[:, None, None]
    is_query = is_token[:, None, -num_queries:, None]
    repeated_key, repeated_value = (states.double().repeat_interleave(GROUP, dim=1) for states in (key, value))
    logits = model.scaling * query.double() @ repeated_key.transpose(2, 3)
    probabilities = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1).masked_fill(~is_query, 0.0)
    expected = (probabilities @ repeated_value).transpose(1, 2)
    found = output.masked_fill(~is_query.transpose(1, 2), 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    rows = probabilities[:, :, -num_rows:]
    rows = rows if weights is None else rows * weights[:, None, :, None]
    expected = rows.unflatten(1, (KV_HEADS, GROUP)).sum(dim=(2, 3))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert scores.masked_select(~is_token[:, None]).eq(0).all()
