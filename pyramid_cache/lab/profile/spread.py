"""How widely the attention of a layer is spread, seen in what the last queries of a text look at: pure functions."""

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
        sink_share (`float`): The attention that massive tokens get.
        local_share (`float`): What the last tokens get, massive ones aside.
        support (`float`): How many tokens get 0.95 of the attention, as a share of all: the massive tokens, the last
            ones, and as few others as that takes.
    """

    sink_share: float
    local_share: float
    support: float


def attention_spread(attention: torch.Tensor, is_massive: torch.Tensor, num_local: int) -> AttentionSpread:
    """
    The shares and the support of one layer.

    Args:
        attention (`torch.Tensor`): `(kv_heads, tokens)` float32, what each key got from the last queries, in any unit.
        is_massive (`torch.Tensor`): `(tokens,)` bool.
        num_local (`int`): How many of the last tokens are local.
    """
    is_local = torch.zeros_like(is_massive)
    is_local[-num_local:] = True
    is_local &= ~is_massive
    is_other = ~is_massive & ~is_local
    # What learned sinks of the model took is no token's.
    shares = attention / attention.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    sink_share, local_share = shares[:, is_massive].sum(dim=-1), shares[:, is_local].sum(dim=-1)  # (kv_heads,)
    others = shares[:, is_other].sort(dim=-1, descending=True).values
    missing = (SUPPORT_SHARE - sink_share - local_share)[:, None]
    # As many as leave it missing without the next one: rounding must not ask for more tokens than there are.
    num_others = ((others.cumsum(dim=-1) - others) < missing).sum(dim=-1)
    support = (~is_other).sum() + num_others.float().mean()
    return AttentionSpread(sink_share.mean().item(), local_share.mean().item(), support.item() / attention.shape[1])


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
