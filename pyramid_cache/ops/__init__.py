"""
Attention ops that also tell how much each key was attended to. `pyramid_cache.ops.reference` is their specification.
"""

from pyramid_cache.ops.lse import attention_with_lse
from pyramid_cache.ops.packed import decode_packed_attention
from pyramid_cache.ops.reference import row_lse
from pyramid_cache.ops.scores import attention_scores, decode_attention
from pyramid_cache.ops.shadow import gather_values, plan_chunks, reconstruct_keys, select_chunks


__all__ = [
    "attention_scores",
    "attention_with_lse",
    "decode_attention",
    "decode_packed_attention",
    "gather_values",
    "plan_chunks",
    "reconstruct_keys",
    "row_lse",
    "select_chunks",
]
