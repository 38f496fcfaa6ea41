"""
The extension point: a method gives each token a score.

A layer asks its `Policy` for scores after each prompt, and every few tokens while an answer is generated. It keeps the
tokens with the highest scores. A policy sees views of a layer and nothing else. The layer takes care of padding,
beams, later turns, files and the bound on memory. docs/write-a-policy.md builds a policy.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch.nn import functional

from pyramid_cache.engine.budget import Budget, read_kernel_size
from pyramid_cache.engine.projection import projected_norms
from pyramid_cache.engine.ranks import HeadRanks
from pyramid_cache.engine.rope import running_calls
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.selection import gather_tokens, lowest_token
from pyramid_cache.engine.state import LayerState, grown
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops.reference import grouped_logits, softmax_of_logits


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
        find_module (`Callable`): Gives the attention module of the layer.
        ranks (`HeadRanks`, *optional*): The processes that share the heads of the layer; see `mean_over_heads`.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    state: Any
    layer_idx: int
    find_rotary: Callable[[], RotaryFrequencies | None]
    longest: Any
    find_module: Callable[[], Any] = field(default=lambda: None, kw_only=True)
    ranks: HeadRanks | None = field(default=None, kw_only=True)

    @functools.cached_property
    def rotary(self) -> RotaryFrequencies | None:
        """How the layer rotates keys; None for a layer without RoPE. A policy with `needs_rotary` may ask."""
        return self.find_rotary()

    def remembered(self, name: str) -> torch.Tensor | None:
        """
        A `slot()` field of the state `(batch, kv_heads or 1, tokens)` in the order of the keys; None if not set. A
        generated token has the `fill` of the field, 0 by default, until the policy sets it.
        """
        tensor = getattr(self.state, name)
        return None if tensor is None else tensor[:, :, : self.key.shape[2]]

    def remember(self, name: str, tensor: torch.Tensor) -> None:
        """
        Sets a `slot()` field of the state to a tensor `(batch, kv_heads or 1, tokens)` in the order of the keys.
        ValueError if the `state_class` declares no such field.
        """
        state = self.state
        state.require_slot(name)
        num_slots = max(state.keys.shape[2], tensor.shape[2])
        state.put(name, grown(tensor, tensor.shape[2], num_slots, state.fill_of(name)))

    def projected_value_norms(self, order: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """
        `(batch, heads, tokens)` float32: the norms `‖v W_O‖` of order 1 or 2 for each query head, of all tokens or of
        those at `tokens` `(batch, kv_heads or 1, chosen)`. NotImplementedError if the output projection is not known.
        """
        value = self.value if tokens is None else gather_tokens(self.value, tokens)
        return projected_norms(self.find_module(), value, order)

    def mean_over_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        The mean of `(batch, kv_heads, ...)` over all KV heads of the layer, `(batch, 1, ...)`. Where several processes
        share the heads, those of all.
        """
        mean = tensor.mean(dim=1, keepdim=True)
        return mean if self.ranks is None else self.ranks.mean(mean)

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
            over all queries and over the query heads of a KV head. None if `window_size` is 0. A policy with a
            `measure` gets the mean or the sum of what it makes of each query's probabilities.
        ranking (`str`): Which tokens compete; see `PolicyCache`.
    """

    num_kept: torch.Tensor
    attention: torch.Tensor | None
    ranking: str = "head"

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
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
        sink_logits (`torch.Tensor`, *optional*): `(heads,)` learned attention sinks, as in gpt-oss.
        bias (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32, added to the logits, where slots stand
            for more tokens than their own.
    """

    query: torch.Tensor
    query_positions: torch.Tensor
    scaling: float
    softcap: float | None
    sink_logits: torch.Tensor | None
    bias: torch.Tensor | None = None

    def remember(self, name: str, tensor: torch.Tensor) -> None:
        self.state.require_slot(name)
        setattr(self.state, name, tensor)  # the layer makes room for later tokens

    def window_attention(self, num_queries: int) -> Iterator[torch.Tensor]:
        """
        The attention of the last queries, for each KV head in turn: `(batch, group, queries, tokens)` float32, the
        probabilities of each query head of the group. Rows of padding are 0. No more than one KV head's are held.
        """
        queries = slice(max(self.query.shape[2] - num_queries, 0), None)
        for head in range(self.key.shape[1]):
            yield self.head_attention(head, queries)[0]

    def head_attention(self, head: int, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The attention of some queries to the keys of one KV head, `(batch, group, queries, tokens)` float32, and which
        of them each query sees, `(batch, queries, tokens)` bool.
        """
        group = self.query.shape[1] // self.key.shape[1]
        members = slice(head * group, (head + 1) * group)
        key = self.key[:, head : head + 1].float()
        logits = grouped_logits(self.query[:, members, queries].float(), key, self.scaling, self.softcap)
        if self.bias is not None:
            logits = logits + self.bias[:, head, None, None, None]
        rows = self.query_positions[:, 0, queries, None]
        columns = self.positions[:, head if self.positions.shape[1] > 1 else 0, None]
        is_visible = (columns >= 0) & (columns <= rows)
        sinks = None if self.sink_logits is None else self.sink_logits[members]
        return softmax_of_logits(logits, is_visible[:, None, None], sinks)[:, 0], is_visible

    def hidden_norms(self) -> torch.Tensor:
        """`(batch, queries)` float32: the Euclidean norms of the hidden states that the attention layer is given."""
        module, given = running_calls(self.find_module())[0]
        name = next(iter(inspect.signature(module.forward).parameters))
        norms = given[name].float().norm(dim=-1)
        if norms.shape != (self.query.shape[0], self.query.shape[2]):
            raise NotImplementedError("Hidden states are of several requests at a time (`serving.compressed`).")
        return norms

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
        measure (`Callable`, *optional*): Called as `measure(probabilities, num_visible)`. It turns the probabilities
            of a query, means over the query heads of a KV head, into what `ScoringView.attention` is the mean of. It
            works on each number alone, returns float32, and 0 for 0. `num_visible` is how many keys the query sees: a
            number, or a tensor that broadcasts. By default probabilities count as they are.
        heads_share_tokens (`bool`): Whether all heads of a layer keep the same tokens.
        scores_positions (`bool`): Whether scores follow from positions alone. Processes that share the heads of a
            layer then need not exchange them.
        ranking (`str`): Which tokens compete; see `PolicyCache`. Scores must compare between those that do.
        floor_ratio (`float`): Where heads compete, each keeps at least its own best tokens, this share of the mean.
        reads_counts (`bool`): Whether `score` reads numbers of the state that the host counts. With an eviction
            interval of 1, steps of such a policy are not compiled.
        divides_budget (`bool`): Whether the numbers of tokens that layers keep depend on what all of them have
            observed (`divide`). A prompt then stays whole until the last layer has read it.
        needs_replay (`bool`): Whether scores come from a second reading of each prompt, which few caches do.
        needs_rotary (`bool`): Whether the policy asks its views how keys are rotated.
        weighs_values (`bool`): Whether the policy asks its views for `projected_value_norms`. Models whose output
            projection is not known are refused then.
        state_class (`type`): What a layer remembers: `LayerState`, or a dataclass derived from it with more fields.
    """

    window_size: int | None = 0
    newest_weight: float = 1.0
    measure: Callable[..., torch.Tensor] | None = None
    heads_share_tokens: bool = False
    scores_positions: bool = False
    ranking: str = "head"
    floor_ratio: float = 0.0
    reads_counts: bool = False
    divides_budget: bool = False
    needs_replay: bool = False
    needs_rotary: bool = False
    weighs_values: bool = False
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

    def weigh(self, view: LayerView) -> None:  # noqa: B027
        """
        Remembers what the values of tokens weigh, if the policy `weighs_values`. It is called before tokens are
        quantised: so they are weighed as they came, whenever other rows evict.
        """

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

    def count_queries(self, prompt: PromptView) -> list[int] | None:
        """
        How many of the last queries of each row count, where a prompt tells; None where `num_queries` does. Each
        prompt and each later turn of several tokens asks before it is scored, if the policy has a window.
        """
        return None

    def check_rows(self, row_lengths: list[int]) -> None:  # noqa: B027
        """Raises if a forward pass after which rows are so long does not fit the settings. Nothing is stored yet."""

    def divide(self, states: Sequence[Any]) -> list[list[int]]:
        """
        How many tokens each layer keeps of each row, where `divides_budget`. `states` are those of all layers that
        evict, after `observe`. By default as many as `num_tokens` has said.
        """
        return [state.row_kept for state in states]

    def prepare(self, state: Any) -> None:  # noqa: B027
        """Sets fields of `state` that follow from its `row_lengths` and `row_kept`, when these are counted anew."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the constructor of a cache calls the fields, by name, for files."""
        return asdict(self) if is_dataclass(self) else {}

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


@dataclass(frozen=True)
class AllPolicy(Policy):
    """Nothing goes."""

    heads_share_tokens = True

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.positions.float()
