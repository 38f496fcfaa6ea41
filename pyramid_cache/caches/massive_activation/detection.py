"""
Which tokens have massive activations, told from keys and values alone.

In most models a few tokens, among them the first one and in some the first full stop or line break, have one or two
dimensions in their hidden state that are thousands of times larger than all others, the same ones for every text (Sun
et al., 2024, https://arxiv.org/abs/2402.17762). The normalisation before attention leaves nothing else of such a
token: its key, before rotation, and its value are nearly constant vectors, the value a short one. So the tokens show
without hidden states: a value much shorter than others, and a key in the direction of another such token's.
docs/massive-activations.md compares this with the definition.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, pad

from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.selection import gather_tokens


# Value norms of tokens with massive activations are 0.1 to 0.35 of the median in SmolLM2-135M, those of others above
# 0.5; cosines of their keys are above 0.9 from the layer on where the activations appear.
MAX_VALUE_RATIO = 0.5
LEAST_COSINE = 0.9
MAX_MASSIVE_TOKENS = 8
# Where nothing is found, the first tokens are the best guess: StreamingLLM's sinks.
NUM_FIRST_TOKENS = 4
# Only the keys of the tokens with the shortest values are looked at.
NUM_CANDIDATES = 64


class MassiveTokens(NamedTuple):
    """
    Tokens that were found, 8 at most, those with the shortest values first.

    Attributes:
        positions (`torch.Tensor`): `(batch, 8)` int32, -1 behind the last one of a row.
        value_ratios (`torch.Tensor`): `(batch, 8)` float32, of the value norm to its median, the mean over heads;
            infinite behind the last.
        cosines (`torch.Tensor`): `(batch, 8)` float32, of the un-rotated key and the template, the mean over heads.
    """

    positions: torch.Tensor
    value_ratios: torch.Tensor
    cosines: torch.Tensor

    def and_later(self, later: "MassiveTokens") -> "MassiveTokens":
        """Both together, without those that are beyond the cap. Of equal values the earlier ones come first."""
        positions, ratios, cosines = (torch.cat(parts, dim=1) for parts in zip(self, later, strict=True))
        order = ratios.argsort(dim=1, stable=True)[:, :MAX_MASSIVE_TOKENS]
        return MassiveTokens(positions.gather(1, order), ratios.gather(1, order), cosines.gather(1, order))


@torch.no_grad()
def massive_in_keys_and_values(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rotary: RotaryFrequencies | None,
    longest: int,
    template: tuple[torch.Tensor, torch.Tensor] | None = None,
    mean_over_heads: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor.mean(dim=1),
) -> tuple[MassiveTokens, tuple[torch.Tensor, torch.Tensor]]:
    """
    The tokens that look massive to one layer: values shorter than half of the median, and un-rotated keys in the
    direction (cosine above 0.9) of a template. That is the first token of the row if its own value is so short, else
    the token with the shortest one. Of more than 8 those with the shortest values are taken; only the 64 tokens with
    the shortest values are looked at.

    Args:
        key (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)` as the model rotated it.
        value (`torch.Tensor`): `(batch, kv_heads, tokens, value_dim)`.
        positions (`torch.Tensor`): `(batch, 1, tokens)` int32, -1 for padding, which neither counts nor is found.
            Positions that the model counted from elsewhere, padding included, change nothing: only differences matter.
        rotary (`RotaryFrequencies`, *optional*): None for keys that are not rotated.
        longest (`int`): The length of the longest row in the forward pass that these tokens are of.
        template (`tuple`, *optional*): What later tokens are compared with, both float32: the un-rotated key `(batch,
            kv_heads, head_dim)` of a token whose value is short, and the median norm of the prompt's values `(batch,
            kv_heads)`. A row whose key is zero has none yet, and takes it from these tokens.
        mean_over_heads (`Callable`): Gives the mean of `(batch, kv_heads, ...)` over all KV heads.

    Returns:
        `tuple`: The `MassiveTokens`, and the template for later ones.
    """
    positions = positions[:, 0]
    is_token = positions >= 0
    norms = value.to(torch.promote_types(value.dtype, torch.float32)).norm(dim=-1).float()  # (batch, kv_heads, tokens)
    if template is None:
        median = norms.masked_fill(~is_token[:, None], float("nan")).nanmedian(dim=-1).values.nan_to_num(0)
        template = norms.new_zeros(*key.shape[:2], key.shape[3]), median
    template_key, median = template
    ratios = mean_over_heads(norms / median[..., None].clamp(min=torch.finfo(torch.float32).tiny))
    # Stable: of equals the first one, whatever the device.
    ratios, columns = ratios.masked_fill(~is_token, float("inf")).sort(dim=1, stable=True)
    ratios, columns = ratios[:, :NUM_CANDIDATES], columns[:, :NUM_CANDIDATES]
    positions = positions.gather(1, columns)  # (batch, candidates)
    keys = gather_tokens(key, columns[:, None]).float()
    if rotary is not None:
        keys = rotary.rotate(keys, -rotary.model_angles(positions[:, None], longest))

    is_short = ratios < MAX_VALUE_RATIO
    # The first candidate, which has the shortest value, where the first token of the row is none.
    chosen = ((positions == 0) & is_short).int().argmax(dim=1)[:, None]
    own_key = gather_tokens(keys, chosen[:, None])[:, :, 0].masked_fill(~is_short.gather(1, chosen)[..., None], 0)
    has_key = template_key.ne(0).flatten(1).any(dim=1)
    template_key = torch.where(has_key[:, None, None], template_key, own_key)

    cosines = mean_over_heads(cosine_similarity(keys, template_key[:, :, None], dim=-1))
    is_massive = is_short & (cosines > LEAST_COSINE)
    # Those that were found come first and keep their order.
    order = (~is_massive).byte().argsort(dim=1, stable=True)[:, :MAX_MASSIVE_TOKENS]
    is_none, room = ~is_massive.gather(1, order), (0, MAX_MASSIVE_TOKENS - order.shape[1])
    found = MassiveTokens(
        pad(positions.gather(1, order).masked_fill(is_none, -1), room, value=-1),
        pad(ratios.gather(1, order).masked_fill(is_none, float("inf")), room, value=float("inf")),
        pad(cosines.gather(1, order).masked_fill(is_none, 0), room),
    )
    return found, (template_key, median)
