"""
The extension point: a method gives each token a score.

A layer asks its `Policy` for scores after each prompt, and every few tokens while an answer is generated. It keeps the
tokens with the highest scores. A policy sees a `ScoringView` and nothing else. The layer takes care of padding, beams,
later turns, files and the bound on memory. docs/write-a-policy.md builds a policy.
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
    The view of one layer that a policy scores when the layer has to evict.

    Attributes:
        key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`, as attention sees them: keys carry RoPE.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` int32, the rank of each token in its row, -1 for
            padding and empty slots. The tokens of a prompt are in order of position, those of later calls in any.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens each row has seen.
        num_kept (`torch.Tensor`): `(batch, 1, 1)` int32, how many of them stay.
        attention (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32, the mean probability with which
            the last `window_size` queries attended to each token, over the query heads of a KV head. Each token
            generated since has taken over `1 / window_size` of it. If heads share tokens, it is the mean over all
            heads, `(batch, 1, tokens)`. None if `window_size` is 0.
        state (`dict[str, torch.Tensor]`): The tensors that `Policy.observe` returned last.
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
        `(batch, kv_heads or 1, tokens)` bool: the latest tokens of each row, at most half of the tokens that stay and
        at least one. A window as large as the budget would leave no choice.
        """
        most = (self.num_kept // 2).clamp(min=1)
        return self.positions >= self.length - most.clamp(max=num_recent)

    def is_first(self, num_first: int) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool: the first tokens of each row, its attention sinks."""
        return self.is_token & (self.positions < num_first)

    def pool(self, scores: torch.Tensor, kernel_size: int, kind: str = "average") -> torch.Tensor:
        """
        Each token's score becomes the average or the maximum of the scores around it, so that a token keeps its
        neighbours. For the average, places beyond the ends count as 0.

        Args:
            scores (`torch.Tensor`): `(batch, kv_heads or 1, tokens)`.
            kernel_size (`int`): How many tokens, the token itself in the middle. An odd number.
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
    The view of one layer that a policy observes in a forward pass of several tokens.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, queries, head_dim)`, the queries of the new tokens, with RoPE.
        positions (`torch.Tensor`): `(batch, 1, queries)` int32 of the new tokens, -1 for padding.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens each row has seen, the new ones included.
        scaling (`float`): The factor of attention on its logits.
        state (`dict[str, torch.Tensor]`): The tensors that `Policy.observe` returned last; empty before.
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
        """The queries `(batch, heads, queries, head_dim)` without RoPE."""
        rotary = self.rotary
        if rotary is None:
            return self.query
        return rotary.rotate(self.query, -rotary.model_angles(self.positions.clamp(min=0), self.longest))


class Policy(ABC):
    """
    The decisions of a method. A subclass is a frozen dataclass whose fields are the method's hyper-parameters.

    Attributes:
        window_size (`int`): How many of the last queries `ScoringView.attention` is the mean of; 0 for a method that
            does not look at attention.
        heads_share_tokens (`bool`): Whether all heads of a layer keep the same tokens.
        state_names (`tuple[str, ...]`): The names of the tensors that `observe` returns.
        floor_ratio (`float`): Where heads share the budget of their layer (`RaggedLayer`), each head keeps at least
            this part of an equal share.
    """

    window_size: int = 0
    heads_share_tokens: bool = False
    state_names: tuple[str, ...] = ()
    floor_ratio: float = 0.2

    @abstractmethod
    def score(self, view: ScoringView) -> torch.Tensor:
        """
        The score of each token.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, tokens)`, or `(batch, 1, tokens)` if heads share tokens; `inf` for
            tokens that must stay. Scores of padding and empty slots are ignored. Of two equal scores, the older token
            goes first.
        """

    def observe(self, prompt: PromptView) -> dict[str, torch.Tensor]:
        """
        Returns float32 tensors to remember, batch first, by the names in `state_names`. Each forward pass of several
        tokens calls it before `score`. The tensors count as memory of the cache.
        """
        return {}

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        """
        How many tokens of a prompt a layer keeps. The default is the same number in each layer.

        Args:
            prompt_length (`int`): In tokens, without padding.
            budget (`Budget`): A fraction, or a number of tokens.
            depth (`int`): The rank of the layer among the `num_layers` that evict.
        """
        return budget.num_tokens(prompt_length)
