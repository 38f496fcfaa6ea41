"""Attention functions that take 2-D padding masks, as flash-attention does, played by one that runs on the CPU."""

from collections.abc import Callable

import pytest
import torch
from models import build_model, drive, random_rows, random_tokens
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from pyramid_cache import H2OCache, PyramidCache, SnapKVCache, StreamingLLMCache


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "pyramid_config": lambda model: PyramidCache(model.config, budget=0.4),
    "pyramid_model": lambda model: PyramidCache(model, budget=0.4),
    "h2o": lambda model: H2OCache(model.config, budget=14),
    "snapkv": lambda model: SnapKVCache(model.config, budget=14, window_size=4, eviction_interval=4),
    "streaming_llm": lambda model: StreamingLLMCache(model.config, budget=14),
    "streaming_llm_dense": lambda model: StreamingLLMCache(model.config, budget=14, prefill="dense"),
}


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
@pytest.mark.parametrize("name", CACHES)
def test_tokens_and_logits_are_those_of_sdpa(name: str, lengths: tuple[int, ...]) -> None:
    AttentionInterface.register("flash_on_cpu", attend_like_flash)
    AttentionMaskInterface.register("flash_on_cpu", flash_attention_mask)
    sdpa, flash = build_model("llama"), build_model("llama")
    flash.config._attn_implementation = "flash_on_cpu"  # the setter for users would look for flash-attention itself
    rows, pieces = random_rows(lengths, seed=31), [1] * 6 + [7] + [1] * 4
    later = random_tokens(len(rows), sum(pieces), seed=32)
    output, wanted = (drive(model, CACHES[name](model), rows, later, pieces=pieces) for model in (flash, sdpa))
    torch.testing.assert_close(output.logits, wanted.logits, atol=1e-4, rtol=0)
    for step in range(len(pieces) + 1):
        for layer in range(3):
            for row in range(len(rows)):
                for head in range(2):
                    assert output.held(step, layer, row, head) == wanted.held(step, layer, row, head)
