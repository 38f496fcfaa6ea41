"""Which tokens the layers of a cache hold, as numbers to print and to draw."""

import torch
from transformers import Cache

from pyramid_cache.engine.layer import CompressedLayer


def kept_tokens(cache: Cache) -> list[int]:
    """How many tokens each layer holds: the largest number among rows and KV heads."""
    return [
        int(num_held_by_head(layer).max()) if isinstance(layer, CompressedLayer) else latest_tokens(layer)
        for layer in cache.layers
    ]


def num_held_by_head(layer: CompressedLayer) -> torch.Tensor:
    """`(batch, kv_heads)` int64: how many tokens of each row each KV head holds."""
    return (layer.held_positions() >= 0).sum(dim=-1)


def kept_positions(cache: Cache, num_positions: int, row: int = 0) -> torch.Tensor:
    """
    The share of the KV heads that hold each position of a row.

    Returns:
        `torch.Tensor`: `(layers, num_positions)` float32, on the CPU. Layers of transformers hold the latest tokens;
        those that hold no tokens one by one, as linear attention does, have NaN.
    """
    shares = torch.zeros(len(cache.layers), num_positions, device="cpu")
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            shares[layer_idx] = share_of_heads(layer.held_positions()[row], num_positions)
        elif num_latest := latest_tokens(layer):
            shares[layer_idx, max(num_positions - num_latest, 0) :] = 1
        else:
            shares[layer_idx] = torch.nan
    return shares


def latest_tokens(layer: object) -> int:
    """How many tokens a layer of transformers holds, always the latest ones; 0 if it is no attention layer."""
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else keys.shape[-2]


def share_of_heads(positions: torch.Tensor, num_positions: int) -> torch.Tensor:
    """
    The share of the KV heads that hold each position.

    Args:
        positions (`torch.Tensor`): `(kv_heads, slots)`, the position held in each slot, or -1.

    Returns:
        `torch.Tensor`: `(num_positions,)` float32, on the CPU.
    """
    counts = torch.bincount(positions[positions >= 0].cpu(), minlength=num_positions)
    return counts / positions.shape[0]


def budgets(layers: list[CompressedLayer], prompt_length: int | None) -> list[float]:
    """
    How many tokens each layer may keep: the mean over rows of the tokens it has seen, or of a prompt of some length.

    Args:
        prompt_length (`int`, *optional*): In tokens. A budget in bytes is known only after the layers have run.
    """
    if prompt_length is not None:
        return [float(min(layer.num_tokens_to_keep(prompt_length), prompt_length)) for layer in layers]
    means = []
    for layer in layers:
        seen = layer.num_seen_per_row
        is_unlimited = layer.budget is not None and layer.budget.is_unlimited
        # The method has not looked at recorded tokens yet.
        kept = seen if is_unlimited or not layer.state.row_kept else map(min, layer.state.row_kept, seen)
        means.append(sum(kept) / len(seen))
    return means
