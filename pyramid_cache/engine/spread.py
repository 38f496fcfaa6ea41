"""How widely the attention of a layer is spread, seen in what the last queries of a prompt look at: pure functions."""

from dataclasses import dataclass
from typing import Literal

import torch


LayerClass = Literal["uniform", "local", "concentrated"]

# The share of attention that counts as all of it, and where the classes of layers end.
SUPPORT_SHARE = 0.95
LEAST_UNIFORM_SUPPORT = 0.5
LEAST_LOCAL_SHARE = 0.7


@dataclass(frozen=True)
class AttentionSpread:
    """
    Of one layer, each the mean over its KV heads.

    Attributes:
        sink_share (`torch.Tensor`): `(batch,)` float32, the attention that massive tokens get.
        local_share (`torch.Tensor`): `(batch,)` float32, what the last tokens get, massive ones aside.
        support (`torch.Tensor`): `(batch,)` float32, how many tokens get 0.95 of the attention: the massive tokens,
            the last ones, and as few others as that takes.
    """

    sink_share: torch.Tensor
    local_share: torch.Tensor
    support: torch.Tensor


def attention_spread(
    attention: torch.Tensor, positions: torch.Tensor, is_massive: torch.Tensor, num_local: int
) -> AttentionSpread:
    """
    The shares and the support of one layer.

    Args:
        attention (`torch.Tensor`): `(batch, kv_heads, tokens)` float32, what each key got from the last queries, in
            any unit.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` int32, -1 for padding, which got nothing.
        is_massive (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` bool.
        num_local (`int`): How many of the last tokens are local.
    """
    positions, is_massive = positions.expand_as(attention), is_massive.expand_as(attention)
    is_token = positions >= 0
    next_position = positions.amax(dim=-1, keepdim=True) + 1
    is_local = (positions >= next_position - num_local) & is_token & ~is_massive
    is_massive = is_massive & is_token
    # What learned sinks of the model took is no token's.
    shares = attention / attention.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    sink_share = (shares * is_massive).sum(dim=-1)  # (batch, kv_heads)
    local_share = (shares * is_local).sum(dim=-1)
    is_other = is_token & ~is_massive & ~is_local
    others = shares.masked_fill(~is_other, 0).sort(dim=-1, descending=True).values
    missing = (SUPPORT_SHARE - sink_share - local_share)[..., None]
    # As many as leave it missing without the next one: rounding must not ask for more tokens than there are.
    num_others = ((others.cumsum(dim=-1) - others) < missing).sum(dim=-1).minimum(is_other.sum(dim=-1))
    support = (is_massive | is_local).sum(dim=-1) + num_others
    return AttentionSpread(sink_share.mean(dim=1), local_share.mean(dim=1), support.float().mean(dim=1))


def layer_class(support: float, local_share: float) -> LayerClass:
    """
    What kind of attention a layer has.

    Args:
        support (`float`): As a fraction of the tokens.

    Returns:
        `str`: "uniform" if more than half of the tokens are needed, "local" if the last tokens get 0.7 of the
        attention or more, else "concentrated".
    """
    if support > LEAST_UNIFORM_SUPPORT:
        return "uniform"
    return "local" if local_share >= LEAST_LOCAL_SHARE else "concentrated"
