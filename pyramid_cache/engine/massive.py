"""
Massive activations: which tokens have them, told from hidden states or from keys and values alone.

In most models a few tokens, among them the first one and in some the first full stop or line break, have one or two
dimensions in their hidden state that are thousands of times larger than all others, the same ones for every text (Sun
et al., 2024, https://arxiv.org/abs/2402.17762). The normalisation before attention leaves nothing else of such a
token: its key, before rotation, and its value are nearly constant vectors, the value a short one. All queries may look
there when they need not look anywhere. What a model says without these tokens is worth nothing.

Hidden states tell them by definition (`massive_in_hidden_states`). Keys and values tell them without hooks
(`massive_in_keys_and_values`): a value much shorter than others, and a key in the direction of another such token's.

Both are facts about models and no way to choose tokens, which is why they are here: the command that measures them and
the caches that use them share this file.
"""

from dataclasses import dataclass

import torch

from pyramid_cache.engine.rope import RotaryFrequencies


# The definition of Sun et al., Section 2, with their second number: beyond 100, and 1,000 times the median.
LEAST_MAGNITUDE = 100.0
LEAST_RATIO = 1000.0
# Value norms of tokens with massive activations are 0.1 to 0.35 of the median in SmolLM2-135M, those of others above
# 0.5; cosines of their keys are above 0.9 from the layer on where the activations appear.
MAX_VALUE_RATIO = 0.5
LEAST_COSINE = 0.9
MAX_MASSIVE_TOKENS = 8
# Where nothing is found, the first tokens are the best guess: StreamingLLM's sinks.
NUM_FIRST_TOKENS = 4
# Only the keys of the tokens with the shortest values are looked at.
NUM_CANDIDATES = 64
# Tokens out of which the median of a long text is taken.
NUM_MEDIAN_TOKENS = 1024


def median_magnitude(hidden_states: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
    """
    The median of `|h|` over all dimensions and tokens, of long texts over 1,024 tokens that are spread evenly.

    Args:
        hidden_states (`torch.Tensor`): `(batch, tokens, hidden_size)`.
        is_token (`torch.Tensor`, *optional*): `(batch, tokens)` bool, False for padding.

    Returns:
        `torch.Tensor`: `(batch,)` float32; NaN for a row of padding.
    """
    num_tokens = hidden_states.shape[1]
    if num_tokens > NUM_MEDIAN_TOKENS:
        steps = torch.arange(NUM_MEDIAN_TOKENS, device=hidden_states.device)
        if is_token is None:
            hidden_states = hidden_states[:, steps * num_tokens // NUM_MEDIAN_TOKENS]
        else:
            # Tokens first, in their order. A row that has fewer than are taken gives some of them more than once.
            order = (~is_token).byte().argsort(dim=1, stable=True)
            columns = order.gather(1, steps * is_token.sum(dim=1, keepdim=True) // NUM_MEDIAN_TOKENS)
            hidden_states = hidden_states.gather(1, columns[..., None].expand(-1, -1, hidden_states.shape[2]))
            is_token = is_token.gather(1, columns)
    magnitudes = hidden_states.detach().abs().float()
    if is_token is not None:
        magnitudes = magnitudes.masked_fill(~is_token[..., None], float("nan"))
    return magnitudes.flatten(1).nanmedian(dim=1).values


def massive_in_hidden_states(
    hidden_states: torch.Tensor, median: torch.Tensor, is_token: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The tokens with massive activations, by definition: some `|h| > 100` that is at least 1,000 times the median.

    Args:
        hidden_states (`torch.Tensor`): `(batch, tokens, hidden_size)`, the output of a decoder layer.
        median (`torch.Tensor`): `(batch,)` of `median_magnitude`, of these tokens or of a prompt before them.
        is_token (`torch.Tensor`, *optional*): `(batch, tokens)` bool, False for padding.

    Returns:
        `torch.Tensor`: `(batch, tokens)` bool, False for padding.
    """
    largest = torch.linalg.vector_norm(hidden_states.detach(), ord=float("inf"), dim=-1, dtype=torch.float32)
    is_massive = (largest > LEAST_MAGNITUDE) & (largest >= LEAST_RATIO * median[:, None])
    return is_massive if is_token is None else is_massive & is_token


@dataclass(frozen=True)
class MassiveTemplate:
    """
    What the later tokens of a row are compared with.

    Attributes:
        key (`torch.Tensor`): `(batch, kv_heads, head_dim)` float32, the un-rotated key of a token whose value is
            short; zero where there is none.
        value_norm (`torch.Tensor`): `(batch, kv_heads)` float32, the median over the tokens of the prompt.
    """

    key: torch.Tensor
    value_norm: torch.Tensor


@dataclass(frozen=True)
class MassiveTokens:
    """
    Tokens that were found, those with the shortest values first.

    Attributes:
        columns (`torch.Tensor`): `(batch, found)` int64, -1 behind the last one of a row; `found` is at most 8.
        value_ratios (`torch.Tensor`): `(batch, found)` float32, of the value norm to its median, the mean over heads.
        cosines (`torch.Tensor`): `(batch, found)` float32, of the un-rotated key and the template, the mean over
            heads.
    """

    columns: torch.Tensor
    value_ratios: torch.Tensor
    cosines: torch.Tensor

    def mask(self, num_columns: int) -> torch.Tensor:
        """`(batch, num_columns)` bool, True for the tokens that were found."""
        is_found = torch.zeros(self.columns.shape[0], num_columns + 1, dtype=torch.bool, device=self.columns.device)
        return is_found.scatter_(1, self.columns.remainder(num_columns + 1), True)[:, :num_columns]


@torch.no_grad()
def massive_in_keys_and_values(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rotary: RotaryFrequencies | None,
    longest: int,
    template: MassiveTemplate | None = None,
) -> tuple[MassiveTokens, MassiveTemplate]:
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
        template (`MassiveTemplate`, *optional*): Of the prompt, for tokens that came later. A row that has none yet
            takes it from these tokens.

    Returns:
        `tuple[MassiveTokens, MassiveTemplate]`: Their columns, and the template for later tokens.
    """
    is_token = positions[:, 0] >= 0
    norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)  # (batch, kv_heads, tokens)
    if template is None:
        value_norm = norms.masked_fill(~is_token[:, None], float("nan")).nanmedian(dim=-1).values.nan_to_num(0)
    else:
        value_norm = template.value_norm
    ratios = (norms / value_norm[..., None].clamp(min=torch.finfo(torch.float32).tiny)).mean(dim=1)
    ratios = ratios.masked_fill(~is_token, float("inf"))
    num_candidates = min(NUM_CANDIDATES, ratios.shape[1])
    # Stable: of equals the first one, whatever the device.
    ratios_in_order, columns = (part[:, :num_candidates] for part in ratios.sort(dim=1, stable=True))
    candidates = unrotated(gather_columns(key, columns), positions[:, 0].gather(1, columns)[:, None], rotary, longest)

    is_short = ratios_in_order < MAX_VALUE_RATIO  # (batch, candidates)
    is_first = (positions[:, 0].gather(1, columns) == 0) & is_short
    chosen = is_first.int().argmax(dim=1)  # the first candidate, which has the shortest value, where none is
    own_key = candidates.gather(2, chosen[:, None, None, None].expand(-1, candidates.shape[1], 1, candidates.shape[3]))
    own_key = own_key[:, :, 0].masked_fill(~is_short.gather(1, chosen[:, None])[..., None], 0)
    if template is None:
        template_key = own_key
    else:
        has_key = template.key.ne(0).flatten(1).any(dim=1)
        template_key = torch.where(has_key[:, None, None], template.key, own_key)

    cosines = torch.nn.functional.cosine_similarity(candidates, template_key[:, :, None], dim=-1).mean(dim=1)
    is_massive = is_short & (cosines > LEAST_COSINE)
    # Those that were found come first and keep their order.
    order = (~is_massive).byte().argsort(dim=1, stable=True)[:, :MAX_MASSIVE_TOKENS]
    is_massive, columns, ratios, cosines = (
        tensor.gather(1, order) for tensor in (is_massive, columns, ratios_in_order, cosines)
    )
    return MassiveTokens(columns.masked_fill(~is_massive, -1), ratios, cosines), MassiveTemplate(
        template_key, value_norm
    )


def unrotated(
    states: torch.Tensor, positions: torch.Tensor, rotary: RotaryFrequencies | None, longest: int
) -> torch.Tensor:
    """
    Keys as they were before the model rotated them, but for a common turn if the model does not count positions from
    0.

    Args:
        states (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
        positions (`torch.Tensor`): `(batch, 1, tokens)`; what is turned at -1 has no meaning.
        longest (`int`): See `RotaryFrequencies.model_angles`.

    Returns:
        `torch.Tensor`: The same shape, in float32.
    """
    states = states.float()
    return states if rotary is None else rotary.rotate(states, -rotary.model_angles(positions, longest))


def gather_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The columns `(batch, chosen)` of `(batch, kv_heads, tokens, head_dim)`, the same for all heads."""
    return states.gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
