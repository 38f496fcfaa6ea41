"""
Past recording: the tokens of forward passes that `generate` may still take back, whose eviction waits.

Assisted generation and prompt lookup feed a model several guessed tokens at once, and then crop those that it would
not have said. What was evicted could not be cropped; so layers keep such tokens aside, with their queries, until
`crop` has said which of them stay, and only then do with those what they would have done without an assistant.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.tokens import Tokens


@dataclass(frozen=True)
class RecordedChunk:
    """
    What one layer got in one forward pass.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, columns, head_dim)`.
        key, value (`torch.Tensor`): `(batch, kv_heads, columns, head_dim)`.
        seen (`Tokens`): All that the rows had seen by then, padding included; the columns of the chunk are the last.
        longest (`int`): The length of the longest row in that forward pass, which some rotary embeddings depend on.
        logit_kwargs (`dict`): What the attention function was told about logits, and heeded.
        lse (`torch.Tensor`, *optional*): `(batch, heads, columns)` float32, the log-sum-exps that attention normalised
            the columns by, if they are known: for a chunk that begins a conversation.
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
        """The chunk of a call, with the new keys and values among those that it attends to."""
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
        """What remains when the last columns are taken back."""
        left = self.num_columns - num_columns
        return replace(
            self,
            query=self.query[:, :, :left],
            key=self.key[:, :, :left],
            value=self.value[:, :, :left],
            seen=self.seen.without_last(num_columns),
            lse=None if self.lse is None else self.lse[:, :, :left],
        )

    def followed_by(self, later: "RecordedChunk") -> "RecordedChunk":
        """Both, as if they had come in one forward pass; log-sum-exps as far as the first has them."""
        return replace(
            later,
            query=torch.cat([self.query, later.query], dim=2),
            key=torch.cat([self.key, later.key], dim=2),
            value=torch.cat([self.value, later.value], dim=2),
            lse=self.lse,
        )

    def steps(self) -> Iterator["RecordedChunk"]:
        """The chunk cut into single columns, none of which is padding."""
        for column in range(self.num_columns):
            only = slice(column, column + 1)
            yield replace(
                self, query=self.query[:, :, only], key=self.key[:, :, only], value=self.value[:, :, only], lse=None
            )

    def call(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        """The call over what the layer holds by now, of which nobody needs the output."""
        return AttentionCall(no_attention, module, self.query, key, value, None, self.logit_kwargs, self.lse)

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RecordedChunk":
        """Applies a function to all tensors, whose first dimension is the batch."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in ("query", "key", "value")}
        if self.lse is not None:
            tensors["lse"] = function(self.lse)
        return replace(self, seen=replace(self.seen, positions=function(self.seen.positions)), **tensors)

    def map_rows(self, rows: list[int]) -> "RecordedChunk":
        """The counts of the rows at these indices."""
        return replace(self, seen=self.seen.map_rows(rows))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the chunk refers to, by role."""
        held = {"keys": self.key, "values": self.value, "queries": self.query, "positions": self.seen.positions}
        return held if self.lse is None else held | {"log_sum_exps": self.lse}


def no_attention(*args, **kwargs) -> tuple[None, None]:
    """An attention function for tokens that were attended to before."""
    return None, None
