"""
The extension point: a method is a score for each token.

A `Policy` is asked after each prompt, and while an answer is generated every few tokens, how much each token of a
layer is worth; the layer keeps those that are worth most. It looks at a `ScoringView` and at nothing else, so that
padding, beams, later turns, files and the bound on memory are no concern of its own. docs/write-a-policy.md builds
one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from pyramid_cache.engine.budget import Budget
from pyramid_cache.engine.rope import RotaryFrequencies


@dataclass(frozen=True)
class ScoringView:
    """
    What a policy sees of one layer when tokens have to go.

    Attributes:
        key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`, as attention sees them: keys carry RoPE.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` int32, the rank of each token in its row, -1 for
            padding and empty slots. Of a prompt tokens come in this order, later on in any.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, the tokens that each row has seen.
        num_kept (`torch.Tensor`): `(batch, 1, 1)` int32, how many of them stay.
        attention (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32, the probability with which the
            last `window_size` queries attended to each token: their mean, over the query heads of a KV head too. Each
            token generated since has taken over `1 / window_size` of it. `(batch, 1, tokens)`, the mean over all
            heads, if heads share tokens. None if `window_size` is 0.
        state (`dict[str, torch.Tensor]`): What `Policy.observe` has returned last.
        layer_idx (`int`): Which layer of the model this is.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    num_kept: torch.Tensor
    attention: torch.Tensor | None
    state: dict[str, torch.Tensor]
    layer_idx: int

    @property
    def is_token(self) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool, False for padding and empty slots."""
        return self.positions >= 0

    def is_recent(self, num_recent: int) -> torch.Tensor:
        """
        `(batch, kv_heads or 1, tokens)` bool: the latest tokens of each row, but no more than half of what stays (of
        one token that stays, that one): a window that is the whole budget would leave no choice.
        """
        most = (self.num_kept // 2).clamp(min=1)
        return self.positions >= self.length - most.clamp(max=num_recent)

    def is_first(self, num_first: int) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool: the first tokens of each row, its attention sinks."""
        return self.is_token & (self.positions < num_first)

    def pool(self, scores: torch.Tensor, kernel_size: int, kind: str = "average") -> torch.Tensor:
        """
        Each token's score becomes the average (what lies beyond the ends counts as 0) or the maximum of those around
        it, so that a token keeps its neighbours.

        Args:
            scores (`torch.Tensor`): `(batch, kv_heads or 1, tokens)`.
            kernel_size (`int`): Odd: how many tokens, itself in the middle.
            kind (`str`): "average" or "maximum".
        """
        order = self.positions.expand_as(scores).argsort(dim=-1, stable=True)
        fill = 0.0 if kind == "average" else float("-inf")
        ordered = scores.masked_fill(~self.is_token, fill).gather(-1, order)
        pool = functional.avg_pool1d if kind == "average" else functional.max_pool1d
        pooled = pool(ordered, kernel_size, stride=1, padding=kernel_size // 2)
        return torch.empty_like(scores).scatter_(-1, order, pooled)


@dataclass(frozen=True)
class PromptView:
    """
    What a policy sees of one layer while a forward pass brings several tokens.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, queries, head_dim)` of the new tokens, as attention sees them: they
            carry RoPE.
        positions (`torch.Tensor`): `(batch, 1, queries)` int32 of the new tokens, -1 for padding.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, the tokens that each row has seen, these included.
        scaling (`float`): What attention multiplies logits with.
        state (`dict[str, torch.Tensor]`): What `Policy.observe` has returned last; empty before.
        find_rotary (`Callable`): Gives the rotary frequencies of the layer; see `rotary`.
        longest (`int`): The length of the longest row.
    """

    query: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    scaling: float
    state: dict[str, torch.Tensor]
    find_rotary: Callable[[], RotaryFrequencies | None]
    longest: int

    @property
    def rotary(self) -> RotaryFrequencies | None:
        """How the layer rotates queries and keys; None for a model without RoPE."""
        return self.find_rotary()

    def unrotated_query(self) -> torch.Tensor:
        """The queries `(batch, heads, queries, head_dim)` as they were before RoPE."""
        rotary = self.rotary
        if rotary is None:
            return self.query
        return rotary.rotate(self.query, -rotary.model_angles(self.positions.clamp(min=0), self.longest))


class Policy(ABC):
    """
    What a method decides. A subclass is a frozen dataclass whose fields are the method's hyper-parameters.

    Attributes:
        window_size (`int`): How many of the last queries `ScoringView.attention` is the mean of; 0 for a method that
            does not look at attention.
        heads_share_tokens (`bool`): Whether all heads of a layer keep the same tokens.
        state_names (`tuple[str, ...]`): The names of what `observe` returns.
        floor_ratio (`float`): Where heads share the budget of their layer (`RaggedLayer`), the part of a head's equal
            share that it keeps whatever the others have.
    """

    window_size: int = 0
    heads_share_tokens: bool = False
    state_names: tuple[str, ...] = ()
    floor_ratio: float = 0.2

    @abstractmethod
    def score(self, view: ScoringView) -> torch.Tensor:
        """
        What each token is worth.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, tokens)`, or `(batch, 1, tokens)` if heads share tokens; `inf` for what
            must stay. Scores of padding and empty slots are not looked at. Of equal scores the older goes first.
        """

    def observe(self, prompt: PromptView) -> dict[str, torch.Tensor]:
        """
        Called for each forward pass of several tokens, before `score`: float32 tensors to remember, batch first, under
        the names in `state_names`. They count as memory of the cache.
        """
        return {}

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        """
        How many tokens of a prompt a layer keeps: the same in each layer.

        Args:
            prompt_length (`int`): In tokens, without padding.
            budget (`Budget`): A fraction, or a number of tokens.
            depth (`int`): The rank of the layer among the `num_layers` that evict.
        """
        return budget.num_tokens(prompt_length)
