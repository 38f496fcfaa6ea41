"""Caches whose contents are written out by hand, for tests of what is drawn and shown of them."""

import torch
from models import build_config

from pyramid_cache import H2OCache


def hand_made_cache(
    held: list[list[list[list[int]]]], num_seen: int, scores: list[list[list[list[float]]]] | None = None
) -> H2OCache:
    """An H2OCache with the given contents, whose rows have seen as many tokens each, none of them padding.

    Args:
        held: For each layer, row and KV head the positions in the slots, -1 for an empty one.
        num_seen: Tokens of each row.
        scores: As `held`: the score in each slot.
    """
    kv_heads = len(held[0][0])
    config = build_config("llama", num_hidden_layers=len(held), num_attention_heads=4, num_key_value_heads=kv_heads)
    cache = H2OCache(config, budget=4)
    for index, layer in enumerate(cache.layers):
        positions = torch.tensor(held[index], dtype=torch.int32)
        states = torch.zeros(*positions.shape, 16)
        layer.lazy_initialization(states, states)
        state = layer.state
        state.keys, state.values, state.positions = states, states.clone(), positions
        state.length, state.num_seen = positions.shape[-1], num_seen
        state.row_lengths = [num_seen] * layer.batch_size
        state.row_held = [int(row.ge(0).sum(-1).max()) for row in positions]
        state.row_kept = [4] * layer.batch_size
        if scores is not None:
            state.attention = torch.tensor(scores[index])
    return cache
