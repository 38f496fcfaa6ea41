"""Attention ops that also tell how much each key was attended to. `pyramid_cache.ops.reference` is their specification."""

from pyramid_cache.ops.cpu import causal_attention_with_lse, scores_from_lse
from pyramid_cache.ops.reference import (
    attention_scores,
    decode_attention,
    decode_probabilities,
    grouped_logits,
    softmax_of_logits,
)


__all__ = [
    "attention_scores",
    "causal_attention_with_lse",
    "decode_attention",
    "decode_probabilities",
    "grouped_logits",
    "scores_from_lse",
    "softmax_of_logits",
]
