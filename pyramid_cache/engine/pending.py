"""
Tokens that `generate` may still take back.

Assisted generation and prompt lookup feed a model several guessed tokens at once, and then crop the wrong ones. An
eviction could not be undone. So layers put such tokens aside with their queries until `crop` has told which of them
stay. Only then do they store, score and evict, as they would without an assistant.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.tokens import Tokens


class PendingTokens:
    """
    The tokens of one layer that `crop` may still take back.

    Attributes:
        is_on (`bool`): Whether new tokens are put aside.
        begins_turn (`bool`): Whether the next ones begin a turn, or go on with it.
        chunks (`list[RecordedChunk]`): One for each forward pass.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.begins_turn = False
        self.chunks: list[RecordedChunk] = []

    @property
    def num_columns(self) -> int:
        """Columns that are put aside, padding included."""
        return sum(chunk.num_columns for chunk in self.chunks)

    def take_back(self, num_columns: int) -> int:
        """Drops the last columns, and returns how many of them were not here."""
        while num_columns and self.chunks:
            chunk = self.chunks.pop()
            num_taken = min(num_columns, chunk.num_columns)
            if num_taken < chunk.num_columns:
                self.chunks.append(chunk.without_last(num_taken))
            num_columns -= num_taken
        return num_columns

    def ends_in_padding_without(self, num_columns: int) -> bool:
        """Whether the tokens would end in padding without their last columns."""
        for chunk in reversed(self.chunks):
            if num_columns < chunk.num_columns:
                return num_columns > 0 and chunk.seen.without_last(num_columns).ends_in_padding
            num_columns -= chunk.num_columns
        return False

    def settle(self, are_begun: Callable[[], bool]) -> Iterator[tuple["RecordedChunk", bool]]:
        """
        Gives up the chunks in order, each with whether it is a prompt; what is none comes as single tokens.
        `are_begun` tells whether all rows have tokens that were settled before.
        """
        while self.chunks:
            chunk = self.chunks.pop(0)
            if not chunk.num_columns:
                continue
            is_turn = self.begins_turn and chunk.num_columns > 1
            is_prompt = is_turn or not are_begun() or chunk.has_padding
            self.begins_turn = False
            for piece in [chunk] if is_prompt else chunk.steps():
                yield piece, is_prompt

    def map(self, function: Callable[["RecordedChunk"], "RecordedChunk"]) -> None:
        """Replaces each chunk."""
        self.chunks = [function(chunk) for chunk in self.chunks]

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the chunks refer to, by a name whose first word is its role."""
        return {
            f"{role} of chunk {index}": tensor
            for index, chunk in enumerate(self.chunks)
            for role, tensor in chunk.held_tensors().items()
        }


@dataclass(frozen=True)
class RecordedChunk:
    """
    The tokens that one layer got in one forward pass.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, columns, head_dim)`.
        key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`.
        seen (`Tokens`): All columns that the rows had seen, padding included. Those of the chunk are the last.
        longest (`int`): The length of the longest row in that forward pass. Some rotary embeddings depend on it.
        logit_kwargs (`dict`): The arguments of the attention function that decide logits.
        lse (`torch.Tensor`, *optional*): `(batch, heads, columns)` float32, the log-sum-exps of attention, known for a
            chunk that begins a conversation.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    seen: Tokens
    longest: int
    logit_kwargs: dict[str, Any]
    lse: torch.Tensor | None = None

    @staticmethod
    def of(call: AttentionCall, key: torch.Tensor, value: torch.Tensor, seen: Tokens) -> "RecordedChunk":
        """The chunk of a call. `key` and `value` are those of its new tokens."""
        arguments = call.logit_arguments
        kwargs = {name: arguments[name] for name in ("scaling", "softcap")} | {"s_aux": arguments["sink_logits"]}
        return RecordedChunk(call.query, key, value, seen, max(seen.row_lengths), kwargs)

    @property
    def num_columns(self) -> int:
        return self.key.shape[2]

    @property
    def has_padding(self) -> bool:
        """Whether some column is a token in one row and padding in another."""
        return self.seen.has_gaps and bool((self.seen.positions[..., -self.num_columns :] < 0).any())

    def without_last(self, num_columns: int) -> "RecordedChunk":
        """The chunk without its last columns."""
        left = self.num_columns - num_columns
        return replace(
            self,
            query=self.query[:, :, :left],
            key=self.key[:, :, :left],
            value=self.value[:, :, :left],
            seen=self.seen.without_last(num_columns),
            lse=None if self.lse is None else self.lse[:, :, :left],
        )

    def steps(self) -> Iterator["RecordedChunk"]:
        """The chunk cut into single columns, none of which is padding."""
        for column in range(self.num_columns):
            only = slice(column, column + 1)
            yield replace(
                self, query=self.query[:, :, only], key=self.key[:, :, only], value=self.value[:, :, only], lse=None
            )

    def call(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        """The call of the chunk's queries over the keys that the layer holds now. Its output is not used."""
        return AttentionCall(no_attention, module, self.query, key, value, None, self.logit_kwargs, self.lse)

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RecordedChunk":
        """Applies a function to all tensors. Their first dimension is the batch."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in ("query", "key", "value")}
        if self.lse is not None:
            tensors["lse"] = function(self.lse)
        return replace(self, seen=replace(self.seen, positions=function(self.seen.positions)), **tensors)

    def map_rows(self, rows: list[int]) -> "RecordedChunk":
        """Selects the counts of the rows at these indices."""
        return replace(self, seen=self.seen.map_rows(rows))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the chunk refers to, by role."""
        held = {"keys": self.key, "values": self.value, "queries": self.query, "positions": self.seen.positions}
        return held if self.lse is None else held | {"log_sum_exps": self.lse}


def no_attention(*args, **kwargs) -> tuple[None, None]:
    """The attention function of a replayed chunk. It gives no output, since the model has had it."""
    return None, None
