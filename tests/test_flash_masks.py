"""Attention functions that take 2-D padding masks, as flash-attention does, played by one that runs on the CPU."""

import pytest
import torch
from caches import CacheCase, every_cache
from models import build_model, drive, random_rows, random_tokens
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask


def attend_like_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal and bottom-right aligned, with a `(batch, keys)` mask at most; `(batch, queries, heads, head_dim)`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], num_keys)
        allowed = allowed & attention_mask[:, None, None].bool()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    # Queries of padding see nothing; flash-attention leaves them out and fills in zeros.
    return output.nan_to_num().transpose(1, 2).contiguous(), None


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
        torch.testing.assert_close(trace.logits, traces[0].logits, atol=1e-4, rtol=0)
        for found, wanted in zip(trace.positions, traces[0].positions, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one.sort().values, other.sort().values)
