"""
What a layer holds, declared once: the fields of a `LayerState` say what they are, and everything that moves, copies,
saves or counts them is a loop over these fields.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


def slot(fill: float = 0) -> Any:
    """A field whose tensors have their slots in dimension 2. New slots hold `fill`."""
    return field(default=None, metadata={"kind": "slot", "fill": fill})


def row() -> Any:
    """A field whose tensors only share the batch dimension, which comes first."""
    return field(default=None, metadata={"kind": "row"})


def counts() -> Any:
    """A field with one number for each row, known without asking the device."""
    return field(default_factory=list, metadata={"kind": "counts"})


def number(default: int) -> Any:
    """A field with one number."""
    return field(default=default, metadata={"kind": "number"})


# The slots of quantised tokens, and of those with thin keys.
CODES = ("key_codes", "key_scales", "value_codes", "value_scales")


@dataclass(eq=False)
class LayerState:
    """
    The state of a layer. A method that needs more derives a dataclass and declares its fields with `slot()`, `row()`,
    `counts()` or `number()`. Beams, files, offloading and byte counts follow from the declaration.

    Attributes:
        keys, values (`torch.Tensor`): `(batch, kv_heads, slots, head_dim)`.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, slots)` int32, -1 for empty slots. None while dense.
        attention (`torch.Tensor`): `(batch, kv_heads or 1, slots)` float32, see `ScoringView.attention`.
        bias (`torch.Tensor`): `(batch, kv_heads, slots)` float32, what is added to the logits of each slot. None while
            each slot stands for its own token alone.
        key_codes, value_codes (`torch.Tensor`): `(batch, kv_heads, slots, bytes)` uint8, of quantised tokens. Or
            `(batch, kv_heads, slots, any)`, thin keys and their values as they are.
        key_scales, value_scales (`torch.Tensor`): `(batch, kv_heads, slots, any)`, the scales of their channels.
        key_groups (`torch.Tensor`): `(batch, kv_heads, groups, any)`, scales that tokens share, in the place of
            `key_scales`.
        key_channels (`torch.Tensor`): `(batch, kv_heads, any)` int64, the channels that thin keys have.
        query_squares (`torch.Tensor`): `(batch, kv_heads, head_dim)` float32, the mean square of the last queries,
            until all rows have chosen their channels.
        next_position (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens each row has seen.
        num_kept (`torch.Tensor`): `(batch, 1, 1)` int32, how many tokens of each row may be held.
        column_positions (`torch.Tensor`): `(batch, 1, columns)` int32, of a dense prompt with padding; else None.
        free_slots (`torch.Tensor`): `(batch, kv_heads or 1, 1)` int64, where the next token of each head goes. None
            if it goes behind the used slots.
        protected (`torch.Tensor`): `(batch, any)` int32, the positions of tokens that never go, ascending, and filled
            up with `MAX_TOKENS`. None if there are none.
        row_lengths, row_held, row_kept (`list[int]`): Tokens seen, tokens held, tokens that may be held.
        row_windows (`list[int]`): How many of the last queries `attention` is the mean of.
        row_quantized (`list[int]`): How many of the first tokens of each row are quantised, if they are held.
        row_protected (`list[int]`): How many tokens never go, those that have not come included.
        length (`int`): How many slots are in use.
        num_quantized (`int`): How many of them, the first ones, are in codes alone. The first slot of keys and values
            is the one behind them. Codes have no other slots then.
        num_seen (`int`): Columns seen, padding included.
        budget_tokens (`int`): The tokens that a budget in bytes pays for, known from the first tokens on.
        columns_ascend (`int`): Whether the columns of each dense row are in order of their positions.
        has_traces (`int`): Whether a mask has hidden tokens that an earlier one showed.
        rank, num_ranks (`int`): Of which of the processes that share the heads these are, and how many there are.
    """

    keys: torch.Tensor | None = slot()
    values: torch.Tensor | None = slot()
    positions: torch.Tensor | None = slot(fill=-1)
    attention: torch.Tensor | None = slot()
    bias: torch.Tensor | None = slot()
    key_codes: torch.Tensor | None = slot()
    key_scales: torch.Tensor | None = slot()
    value_codes: torch.Tensor | None = slot()
    value_scales: torch.Tensor | None = slot()
    key_groups: torch.Tensor | None = row()
    key_channels: torch.Tensor | None = row()
    query_squares: torch.Tensor | None = row()
    next_position: torch.Tensor | None = row()
    num_kept: torch.Tensor | None = row()
    column_positions: torch.Tensor | None = row()
    free_slots: torch.Tensor | None = row()
    protected: torch.Tensor | None = row()
    row_lengths: list[int] = counts()
    row_held: list[int] = counts()
    row_kept: list[int] = counts()
    row_windows: list[int] = counts()
    row_quantized: list[int] = counts()
    row_protected: list[int] = counts()
    length: int = number(0)
    num_quantized: int = number(0)
    num_seen: int = number(0)
    budget_tokens: int = number(0)
    columns_ascend: int = number(1)
    has_traces: int = number(0)
    rank: int = number(0)
    num_ranks: int = number(1)

    def __post_init__(self) -> None:
        # Dictionaries, since compilers do not trace dataclasses.
        self._kinds = {each.name: each.metadata["kind"] for each in dataclasses.fields(self)}
        self._fills = {each.name: each.metadata.get("fill", 0) for each in dataclasses.fields(self)}
        # What new tokens have none of: the bias, and what a method remembers of each token.
        known = ("keys", "values", "positions", "attention", *CODES)
        self.own_slots = [name for name in self.names("slot") if name not in known]

    def names(self, *kinds: str) -> list[str]:
        """The names of the fields of these kinds."""
        return [name for name, kind in self._kinds.items() if kind in kinds]

    def fill_of(self, name: str) -> float:
        """What new slots of a field hold."""
        return self._fills[name]

    def require_slot(self, name: str) -> None:
        """Raises ValueError unless a `slot()` field has this name."""
        if self._kinds.get(name) != "slot":
            raise ValueError(
                f"`remember({name!r})`: {type(self).__name__}, the policy's `state_class`, declares no `slot()` field "
                "of that name. Derive a dataclass from LayerState that does: see docs/write-a-policy.md, Remembering."
            )

    def tensors(self, *kinds: str) -> dict[str, torch.Tensor]:
        """The tensors of these kinds, "slot" and "row", by name; all by default."""
        found = {name: getattr(self, name) for name in self.names(*(kinds or ("slot", "row")))}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def numbers(self) -> dict[str, Any]:
        """What the host knows, by name."""
        return {name: getattr(self, name) for name in self.names("counts", "number")}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Sets a tensor; one of its shape that is there already stays where it is, and gets the numbers."""
        if (held := getattr(self, name)) is None or held.shape != tensor.shape:
            setattr(self, name, tensor)
        else:
            held.copy_(tensor)

    def resize_own_slots(self, num_slots: int) -> None:
        """Gives the bias, codes, and what a method remembers of each token, that many slots."""
        for name in (*self.own_slots, *CODES):
            if (tensor := getattr(self, name)) is not None:
                length = min(tensor.shape[2], num_slots)
                setattr(self, name, grown(tensor, length, num_slots, self.fill_of(name)))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies a function to all tensors. Their first dimension is the batch."""
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    def map_counts(self, rows: Sequence[int]) -> None:
        """Selects the counts of the rows at these indices."""
        for name in self.names("counts"):
            numbers = getattr(self, name)
            setattr(self, name, [numbers[index] for index in rows] if numbers else [])

    @property
    def is_dense(self) -> bool:
        """Whether tokens are in order of arrival, since nothing has been evicted, and not in slots."""
        return self.positions is None

    def num_used(self, name: str) -> int:
        """How many slots of the tensor of that name are in use."""
        if name in ("keys", "values"):
            return self.length - self.num_quantized
        return getattr(self, name).shape[2] if self.num_quantized and name in CODES else self.length

    @property
    def num_slots(self) -> int:
        """How many slots there are, in use or not."""
        return self.num_quantized + self.keys.shape[2]

    @property
    def must_evict(self) -> bool:
        """Whether some row holds more tokens than it may keep."""
        return any(held > kept for held, kept in zip(self.row_held, self.row_kept, strict=True))

    @property
    def has_empty_slots(self) -> bool:
        """Whether some row holds fewer tokens than there are slots in use."""
        return min(self.row_held) < self.length


def grown(tensor: torch.Tensor, length: int, num_slots: int, fill: float) -> torch.Tensor:
    """A tensor with `num_slots` slots in dimension 2, the first `length` of them copied, the others holding `fill`."""
    if num_slots == length == tensor.shape[2]:
        return tensor
    result = tensor.new_empty(*tensor.shape[:2], num_slots, *tensor.shape[3:])
    result[:, :, :length] = tensor[:, :, :length]
    result[:, :, length:] = fill
    return result


def expanded(slots: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Slots `(batch, kv_heads or 1, chosen)` as an index for a tensor `(batch, kv_heads or 1, slots, ...)`."""
    if tensor.dim() == 4:
        return slots[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return slots.expand(-1, tensor.shape[1], -1)
