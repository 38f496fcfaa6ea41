"""
Tokens that stay stand for those that go.

An evicted token takes its share of attention with it. A bias gives it back: a number that is added to the logit of a
slot, so that the slot counts as much as several tokens. A `Compactor` chooses biases, and may change keys and values.
"""

from abc import ABC, abstractmethod

import torch
from torch.nn import functional

from pyramid_cache.engine.policy import LayerView, PromptView
from pyramid_cache.engine.protection import is_protected
from pyramid_cache.engine.selection import gather_tokens


# Elements of the similarities that are held at once: 64 MiB in float32.
SIMILARITY_ELEMENTS = 1 << 24


class Compactor(ABC):
    """
    What becomes of the tokens that a layer evicts. Each layer has one of its own.

    Attributes:
        merges_generated (`bool`): Whether generated tokens are compacted as well, for which several must go at once.
    """

    merges_generated = True

    def observe(self, prompt: PromptView) -> None:  # noqa: B027
        """Sees each forward pass of several tokens before the layer evicts."""

    def forget(self) -> None:  # noqa: B027
        """Forgets what `observe` saw: after a prompt the layer has evicted, or need not."""

    @abstractmethod
    def compact(self, view: LayerView, is_kept: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """
        Changes the tokens that stay.

        Args:
            view (`LayerView`): All tokens that the layer holds.
            is_kept (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` bool, which of them stay.
            bias (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32; 0 if it is None.

        Gradients pass to keys and values, as they do through eviction.

        Returns:
            `dict[str, torch.Tensor]`: New "keys", "values" and "bias" of all tokens, as far as they change. What they
                hold for tokens that go is not looked at.
        """


class Merging(Compactor):
    """
    Each token that goes joins the one that stays and has the most similar key, by cosine, in its head. A slot then
    holds the means of keys and values of the tokens that it stands for, and the logarithm of their number as its bias.
    Protected tokens stay as they are.
    """

    def compact(self, view: LayerView, is_kept: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        batch, kv_heads, num_tokens, _ = view.key.shape
        is_kept, positions = (each.expand(batch, kv_heads, -1) for each in (is_kept, view.positions))
        is_victim, is_target = ~is_kept & (positions >= 0), is_kept
        if view.state.protected is not None:
            is_target = is_target & ~is_protected(positions, view.state.protected)
        is_victim = is_victim & is_target.any(dim=-1, keepdim=True)
        target = most_similar(view.key.detach(), is_victim, is_target)
        masses = torch.ones_like(positions, dtype=torch.float32) if bias is None else bias.exp()
        masses = masses.masked_fill(~(is_victim | is_kept), 0)
        return joined(view, target, masses, masses)


def joined(
    view: LayerView, target: torch.Tensor, masses: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Tokens that join others, as `Compactor.compact` returns them: weighed means of keys and values, and as the bias the
    logarithm of how many tokens each slot stands for.

    Args:
        target (`torch.Tensor`): `(batch, kv_heads, tokens)` int64, which token each joins: itself, if it stays.
        masses (`torch.Tensor`): `(batch, kv_heads, tokens)` float32, how many tokens each stands for; 0 for one that
            leaves nothing behind.
        weights (`torch.Tensor`): `(batch, kv_heads, tokens)` float32, its part of the means.
    """
    tiny = torch.finfo(masses.dtype).tiny
    totals, sums = (torch.zeros_like(each).scatter_add_(2, target, each).clamp(min=tiny) for each in (masses, weights))
    found = {"bias": totals.log()}
    shares = (weights / sums.gather(2, target))[..., None]
    for name, tensor in (("keys", view.key), ("values", view.value)):
        index = target[..., None].expand_as(tensor)
        means = torch.zeros_like(tensor, dtype=torch.float32).scatter_add_(2, index, tensor.float() * shares)
        found[name] = means.to(tensor.dtype)
    return found


def most_similar(key: torch.Tensor, is_victim: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """
    `(batch, kv_heads, tokens)` int64: for each victim the target whose key has the largest cosine with its own, for
    any other token itself.

    Args:
        key (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
        is_victim, is_target (`torch.Tensor`): `(batch, kv_heads, tokens)` bool.
    """
    batch, kv_heads, num_tokens, _ = key.shape
    most_victims, most_targets = (int(each.sum(dim=-1).max()) for each in (is_victim, is_target))
    # Heads with fewer of them have others at the end.
    victims, targets = (
        (~each).int().argsort(dim=-1, stable=True)[..., :most]
        for each, most in ((is_victim, most_victims), (is_target, most_targets))
    )
    unit = functional.normalize(key.float(), dim=-1)
    target_keys, is_known = gather_tokens(unit, targets), is_target.gather(-1, targets)
    best = torch.empty_like(victims)
    step = max(SIMILARITY_ELEMENTS // max(batch * kv_heads * most_targets, 1), 1)
    for start in range(0, most_victims, step):
        chunk = victims[..., start : start + step]
        cosines = gather_tokens(unit, chunk) @ target_keys.mT
        nearest = cosines.masked_fill_(~is_known[:, :, None], float("-inf")).argmax(dim=-1)
        best[..., start : start + step] = targets.gather(-1, nearest)
    own = torch.arange(num_tokens, device=key.device).expand(batch, kv_heads, -1)
    best = torch.where(is_victim.gather(-1, victims), best, victims)
    return own.scatter(-1, victims, best)
