"""Attention ops that also tell how much each key was attended to. `pyramid_cache.ops.reference` is their specification."""

import torch

from pyramid_cache.ops import cpu, reference
from pyramid_cache.ops.cpu import attention_with_lse, scores_from_lse
from pyramid_cache.ops.reference import (
    attention_scores,
    decode_attention,
    decode_probabilities,
)


__all__ = [
    "attention_scores",
    "attention_with_lse",
    "can_reuse_lse",
    "decode_attention",
    "decode_probabilities",
    "scores_from_lse",
    "split_attention",
]


def can_reuse_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **logit_arguments) -> bool:
    """Whether the CPU's attention kernel, which gives its log-sum-exp, computes this attention."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and key.shape == value.shape
        and not torch.is_grad_enabled()
        and all(logit_arguments.get(name) is None for name in ("softcap", "sink_logits"))
    )


def split_attention(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], **logit_arguments
) -> torch.Tensor:
    """See `pyramid_cache.ops.reference.split_attention`."""
    if can_reuse_lse(*parts[0][:3], **logit_arguments):
        return cpu.split_attention(parts, logit_arguments["scaling"])
    return reference.split_attention(parts, **logit_arguments)
