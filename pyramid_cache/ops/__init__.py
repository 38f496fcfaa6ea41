"""Attention ops that also tell how much each key was attended to. `pyramid_cache.ops.reference` is their specification."""

import torch

from pyramid_cache.ops import cpu, reference
from pyramid_cache.ops.cpu import is_plain_on_cpu
from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.reference import decode_probabilities, row_lse
from pyramid_cache.ops.scores import attention_scores, decode_attention, decode_attention_and_evict
from pyramid_cache.ops.shadow import gather_values, plan_chunks, reconstruct_keys, select_chunks


__all__ = [
    "attention_scores",
    "attention_with_lse",
    "decode_attention",
    "decode_attention_and_evict",
    "decode_probabilities",
    "gather_values",
    "is_plain_on_cpu",
    "plan_chunks",
    "reconstruct_keys",
    "row_lse",
    "select_chunks",
    "split_attention",
]


def split_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], **logit_arguments
) -> torch.Tensor:
    """See `pyramid_cache.ops.reference.split_attention`."""
    if is_plain_on_cpu(*parts[0][:3], **logit_arguments):
        return cpu.split_attention(parts, logit_arguments["scaling"])
    return reference.split_attention(parts, **logit_arguments)
