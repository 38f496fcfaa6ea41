"""
The extension point: a method gives each token a score.

A layer asks its `Policy` for scores after each prompt, and every few tokens while an answer is generated. It keeps the
tokens with the highest scores. A policy sees views of a layer and nothing else. The layer takes care of padding,
beams, later turns, files and the bound on memory. docs/write-a-policy.md builds a policy.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.nn import functional

from pyramid_cache.engine.budget import Budget, read_kernel_size
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.selection import lowest_token
from pyramid_cache.engine.state import LayerState
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import Tokens


@dataclass
class LayerView:
    """
    What a policy sees of a layer.

    Attributes:
        key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`, as attention sees them: keys carry RoPE.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` int32, the rank of each token in its row, -1 for
            padding and empty slots. The tokens of a prompt are in order of position, those of later calls in any.
        length (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens each row has seen.
        state (`Any`): What the layer remembers: an instance of the policy's `state_class`, whose fields it may set.
        layer_idx (`int`): Which layer of the model this is.
        find_rotary (`Callable`): Gives the rotary frequencies of the layer; see `rotary`.
        longest (`int`): The length of the longest row in the forward pass that the latest tokens are of.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    state: Any
    layer_idx: int
    find_rotary: Callable[[], RotaryFrequencies | None]
    longest: Any

    @functools.cached_property
    def rotary(self) -> RotaryFrequencies | None:
        """How the layer rotates keys; None for a layer without RoPE. A policy with `needs_rotary` may ask."""
        return self.find_rotary()

    def remembered(self, name: str) -> torch.Tensor | None:
        """A `slot()` field of the state `(batch, kv_heads or 1, tokens)` in the order of the keys; None if not set."""
        tensor = getattr(self.state, name)
        return None if tensor is None else tensor[:, :, : self.key.shape[2]]

    @property
    def is_token(self) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool, False for padding and empty slots."""
        return self.positions >= 0


@dataclass
class ScoringView(LayerView):
    """
    The view of one layer that a policy scores when the layer has to evict. See `LayerView` for the other attributes.

    Attributes:
        num_kept (`torch.Tensor`): `(batch, 1, 1)` int32, how many of the tokens stay.
        attention (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32, the mean probability with which
            the last `window_size` queries attended to each token, over the query heads of a KV head. A generated
            token scales it by `1 - 1 / window_size`, and adds its own attention times `1 / window_size`. If heads
            share tokens, it is the mean over all heads, `(batch, 1, tokens)`. If `window_size` is None, it is the sum
            over all queries and over the query heads of a KV head. None if `window_size` is 0.
    """

    num_kept: torch.Tensor
    attention: torch.Tensor | None

    def is_recent(self, num_recent: int | torch.Tensor) -> torch.Tensor:
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


@dataclass
class PromptView(LayerView):
    """
    The view of one layer that a policy observes in a forward pass of several tokens. See `LayerView` for the other
    attributes: its keys are the tokens held so far, and the new ones behind them.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, queries, head_dim)`, the queries of the new tokens, with RoPE.
        query_positions (`torch.Tensor`): `(batch, 1, queries)` int32, -1 for padding.
        scaling (`float`): The factor of attention on its logits.
    """

    query: torch.Tensor
    query_positions: torch.Tensor
    scaling: float

    def unrotated_query(self) -> torch.Tensor:
        """The queries `(batch, heads, queries, head_dim)` without RoPE."""
        rotary = self.rotary
        if rotary is None:
            return self.query
        return rotary.rotate(self.query, -rotary.model_angles(self.query_positions.clamp(min=0), self.longest))


def setting(default: Any, read: Callable[..., Any], *limits: Any) -> Any:
    """A field of a policy. Its value is what `read(name, value, *limits)` makes of what users give, or raises."""
    return field(default=default, metadata={"read": lambda name, value: read(name, value, *limits)})


def kernel_setting(default: int) -> Any:
    """A field of a policy: over how many neighbouring tokens `ScoringView.pool` goes."""
    return setting(default, lambda name, value: read_kernel_size(value))


class Policy(ABC):
    """
    The decisions of a method. A subclass is a frozen dataclass whose fields are the method's hyper-parameters.

    Attributes:
        window_size (`int` or None): How many of the last queries `ScoringView.attention` is the mean of; 0 for a
            method that does not look at attention, None for the sum over all queries.
        newest_weight (`float`): How much more the newest query of the window counts than the oldest.
        heads_share_tokens (`bool`): Whether all heads of a layer keep the same tokens.
        layers_share_budget (`bool`): Whether the tokens of all layers compete, so that a layer keeps as many as are
            among the best of all. Scores must then compare between layers.
        reads_counts (`bool`): Whether `score` reads numbers of the state that the host counts. With an eviction
            interval of 1, steps of such a policy are not compiled.
        needs_rotary (`bool`): Whether the policy asks its views how keys are rotated.
        state_class (`type`): What a layer remembers: `LayerState`, or a dataclass derived from it with more fields.
    """

    window_size: int | None = 0
    newest_weight: float = 1.0
    heads_share_tokens: bool = False
    layers_share_budget: bool = False
    reads_counts: bool = False
    needs_rotary: bool = False
    state_class: type[LayerState] = LayerState

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            if "read" in each.metadata:
                object.__setattr__(self, each.name, each.metadata["read"](each.name, getattr(self, each.name)))

    @abstractmethod
    def score(self, view: ScoringView) -> torch.Tensor:
        """
        The score of each token.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, tokens)`, or `(batch, 1, tokens)` if heads share tokens; `inf` for
            tokens that must stay. Scores of padding and empty slots are ignored. Of two equal scores, the older token
            goes first.
        """

    def first_to_go(self, view: ScoringView) -> torch.Tensor:
        """
        The slot `(batch, kv_heads or 1, 1)` int64 of the token that goes if one goes. No slot is empty. A method that
        knows it without scores may say so.
        """
        return lowest_token(self.score(view).float(), view.positions)

    def observe(self, prompt: PromptView) -> None:  # noqa: B027
        """Sets fields of `prompt.state`. Each prompt and each later turn of several tokens calls it before `score`."""

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        """
        How many tokens a layer keeps. The default is the same number in each layer.

        Args:
            prompt_length (`int`): The tokens that a row has seen, without padding: those of the prompt, and in later
                turns and in `compress` all of them.
            budget (`Budget`): A fraction, or a number of tokens.
            depth (`int`): The rank of the layer among the `num_layers` that evict.
        """
        return budget.num_tokens(prompt_length)

    def num_queries(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        """How many of the last queries of a prompt count. The default is `window_size`."""
        return self.window_size or 0

    def prepare(self, state: Any) -> None:  # noqa: B027
        """Sets fields of `state` that follow from its `row_lengths` and `row_kept`, when these are counted anew."""

    def build_store(self) -> SlotStore:
        """The store of a layer."""
        return SlotStore(self.state_class)

    # Methods that attend at other positions than the model's.

    repositions: bool = False

    def check_prompt(  # noqa: B027
        self,
        tokens: Tokens,
        position_ids: torch.Tensor | None,
        rotary: RotaryFrequencies | None,
        state: Any,
        num_kept: int,
    ) -> None:
        """
        Raises if the layer cannot move these new tokens. Nothing has been stored or counted so far.

        Args:
            tokens (`Tokens`): The new ones.
            position_ids (`torch.Tensor`, *optional*): As the model passes them to its attention function.
            num_kept (`int`): How many tokens the layer may keep.
        """

    def moves_new(self, view: LayerView) -> bool:
        """Whether `reposition_new` has something to do."""
        return False

    def reposition_new(
        self, view: LayerView, states: torch.Tensor, positions: torch.Tensor, longest: int | torch.Tensor
    ) -> torch.Tensor:
        """
        Queries or keys `(batch, any, tokens, head_dim)` of new tokens at `positions` `(batch, 1, tokens)`, as
        attention shall see them. `longest` is the length of the longest row in the forward pass that they are of.
        """
        return states

    def reposition_held(self, view: LayerView, slots_stay: bool) -> None:  # noqa: B027
        """
        Moves keys of the slots in place, after each eviction. `slots_stay` says that tokens are in the slots in which
        they were at the last call.
        """

    def may_fix(self, state: Any) -> bool:
        """Whether the next step of a layer may have fixed shapes, as compiled steps have."""
        return True

    def moved_in_graph(self, view: LayerView) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        What `reposition_held` would have moved after the last token went, for a step in a graph that evicts a token
        for each that comes: slots `(batch, kv_heads or 1, moved)` and their keys `(batch, kv_heads, moved, head_dim)`.
        """
        return None

    def moves_between_steps(self, state: Any) -> bool:
        """Whether `reposition_held` must follow a step of fixed shapes as well."""
        return False

    @property
    def num_extra_slots(self) -> int:
        """How many slots of a row would take the memory of large tensors that the state has beside slots."""
        return 0

    @property
    def score_label(self) -> str | None:
        """The name and the unit of `ScoringView.attention`."""
        if self.window_size is None:
            return "attention so far (sum of probabilities over queries)"
        return f"mean attention of the last {self.window_size} queries (probability)" if self.window_size else None
