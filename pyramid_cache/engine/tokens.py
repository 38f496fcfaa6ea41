"""
Which columns of a forward pass are tokens and which are padding, read once per forward from the mask that arrives.

transformers builds one mask per forward, in coordinates of everything seen: `None`, a 2-D padding mask
(flash-attention), a bool 4-D mask (sdpa) or an additive 4-D mask (eager). All layers of a cache get the same tensor,
so the answer is kept with a weak reference to it.
"""

import weakref
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tokens:
    """
    The tokens in some columns of keys, counted per row without padding.

    Attributes:
        positions (`torch.Tensor`): `(batch, kv_heads or 1, columns)` int32, the rank of each column's token among the
            tokens of its row, which is the position that `generate` gives it; -1 for padding and empty slots.
        row_lengths (`list[int]`): How many tokens each row has seen.
        row_present (`list[int]`): How many of these tokens are in the columns.
        num_seen (`int`): Columns that the model has been given, padding included.
        ends_in_padding (`bool`): Whether some row's last column is padding.
        is_ascending (`bool`): Whether the columns of each row are in order of their positions, gaps first.
        longest (`int`): The length of the longest row in the forward pass that the last columns are of, if that was an
            earlier one; else 0.
    """

    positions: torch.Tensor
    row_lengths: list[int]
    row_present: list[int]
    num_seen: int
    ends_in_padding: bool = False
    is_ascending: bool = True
    longest: int = 0

    @property
    def has_gaps(self) -> bool:
        """Whether some column holds no token."""
        return min(self.row_present) < self.positions.shape[-1]

    def to(self, device: torch.device) -> "Tokens":
        """The same tokens on another device."""
        return self if self.positions.device == device else replace(self, positions=self.positions.to(device))

    def without_last(self, num_columns: int) -> "Tokens":
        """The tokens without those of the last columns."""
        positions, num_left = self.positions, self.positions.shape[-1] - num_columns
        if not self.has_gaps:
            return Tokens.without_padding(positions.shape[0], num_left, positions.device)
        return Tokens.from_validity((positions[:, 0, :num_left] >= 0).cpu(), positions.device)

    def map_rows(self, rows: list[int]) -> "Tokens":
        """The tokens with the counts of the rows at these indices. The caller maps `positions`."""
        row_lengths, row_present = ([counts[row] for row in rows] for counts in (self.row_lengths, self.row_present))
        return replace(self, row_lengths=row_lengths, row_present=row_present)

    @staticmethod
    def without_padding(batch_size: int, num_columns: int, device: torch.device) -> "Tokens":
        positions = torch.arange(num_columns, dtype=torch.int32, device=device).expand(batch_size, 1, -1)
        lengths = [num_columns] * batch_size
        return Tokens(positions, lengths, lengths, num_columns)

    @staticmethod
    def from_validity(is_token: torch.Tensor, device: torch.device) -> "Tokens":
        """The tokens of a `(batch, columns)` bool mask on the CPU, False for padding."""
        if is_token.all():
            return Tokens.without_padding(is_token.shape[0], is_token.shape[1], device)
        ranks = is_token.cumsum(dim=1, dtype=torch.int32) - 1
        positions = ranks.masked_fill(~is_token, -1)[:, None].to(device)
        lengths = is_token.sum(dim=1).tolist()
        ends_in_padding = bool((is_token.any(dim=1) & ~is_token[:, -1]).any())  # a row without tokens is not begun
        is_ascending = not bool((is_token[:, :-1] & ~is_token[:, 1:]).any())
        return Tokens(positions, lengths, lengths, is_token.shape[1], ends_in_padding, is_ascending)


class MaskReader:
    """Reads the mask of a forward pass for all layers of one cache."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets the last mask."""
        self._mask: weakref.ref | None = None
        self._tokens: Tokens | None = None
        self._row_lengths: list[int] | None = None

    @property
    def columns_read(self) -> torch.Tensor | None:
        """`(batch, 1, columns)` int32: positions in the columns of the last forward pass; None if all are tokens."""
        return None if self._tokens is None else self._tokens.positions

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors that the reader refers to."""
        return [] if self._tokens is None else [self._tokens.positions]

    def read(
        self,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        num_queries: int,
        num_keys: int,
        device: torch.device,
    ) -> Tokens:
        """
        The tokens among the `num_keys` columns that a forward pass of `num_queries` queries has seen.

        Raises:
            ValueError: The mask has another length, or hides the newest token of every row.
            NotImplementedError: The mask is not causal, or hides more than padding.
        """
        if attention_mask is None:
            self.forget()
            return Tokens.without_padding(batch_size, num_keys, device)
        if self._tokens is None or not self._has_read(attention_mask):
            is_token = padding_of_mask(attention_mask, batch_size, num_queries, num_keys)
            self.forget()
            self._mask = weakref.ref(attention_mask)
            self._tokens = Tokens.from_validity(is_token, device)
        return self._tokens

    def count(self, attention_mask: torch.Tensor, batch_size: int, num_keys: int) -> list[int]:
        """How many tokens of each row the mask of a decode step shows. Raises as `read` does."""
        if self._row_lengths is None or not self._has_read(attention_mask):
            is_token = padding_of_mask(attention_mask, batch_size, 1, num_keys)
            self.forget()
            self._mask = weakref.ref(attention_mask)
            self._row_lengths = is_token.sum(dim=1).tolist()
        return self._row_lengths

    def _has_read(self, attention_mask: torch.Tensor) -> bool:
        return self._mask is not None and self._mask() is attention_mask


def padding_of_mask(attention_mask: torch.Tensor, batch_size: int, num_queries: int, num_keys: int) -> torch.Tensor:
    """
    `(batch, num_keys)` bool on the CPU, False for padding. See `MaskReader.read` for the errors.
    """
    if not isinstance(attention_mask, torch.Tensor):
        raise NotImplementedError(
            f"Attention masks of type {type(attention_mask).__name__} (flex_attention) are not supported by the "
            "caches of pyramid_cache. Load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    shape = tuple(attention_mask.shape)
    is_bool_or_additive = attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    if len(shape) not in (2, 4) or (len(shape) == 4 and not is_bool_or_additive):
        raise ValueError(
            f"An attention mask of shape {shape} and {attention_mask.dtype} is neither (batch, tokens) nor, bool or "
            "additive, (batch, 1, queries, tokens)."
        )
    if shape[0] not in (1, batch_size) or (len(shape) == 4 and shape[2] != num_queries):
        raise ValueError(
            f"The attention mask has shape {shape}, but the model was given {batch_size} rows of {num_queries} tokens."
        )
    if attention_mask.shape[-1] != num_keys:
        raise ValueError(
            f"The attention mask has {attention_mask.shape[-1]} columns, but {num_keys} tokens have been seen "
            "(padding included). Pass a mask that covers the tokens in the cache and the new ones."
        )
    if attention_mask.dim() == 2:
        is_token = attention_mask != 0
    else:
        is_allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        # The last query sees every token before it, and it never sees padding, even if it is padding itself.
        is_token = is_allowed[:, 0, -1]
        check_causal(is_allowed, is_token, num_queries, num_keys)
    is_token = is_token.expand(batch_size, -1).cpu()
    if not is_token[:, -1].any():
        covered = int(is_token.any(dim=0).nonzero().max()) + 1 if is_token.any() else 0
        raise ValueError(
            f"The attention mask covers {covered} tokens, but {num_keys} have been seen: it hides the newest token of "
            "every row. Pass a mask that covers the tokens in the cache and the new ones."
        )
    return is_token


def check_causal(is_allowed: torch.Tensor, is_token: torch.Tensor, num_queries: int, num_keys: int) -> None:
    """
    Raises unless a `(batch, heads or 1, num_queries, num_keys)` mask is causal and hides nothing else than padding.
    Queries that are padding themselves may see anything that came before them, or everything.
    """
    columns = torch.arange(num_keys, device=is_allowed.device)
    rows_per_chunk = max((1 << 24) // max(is_allowed.shape[0] * is_allowed.shape[1] * num_keys, 1), 1)
    for start in range(0, num_queries, rows_per_chunk):
        stop = min(start + rows_per_chunk, num_queries)
        query_columns = columns[num_keys - num_queries + start : num_keys - num_queries + stop]
        expected = (columns <= query_columns[:, None]) & is_token[:, None]
        is_padding_query = ~is_token[:, query_columns]
        shown = is_allowed[:, :, start:stop]
        agrees = (shown == expected[:, None]).all(dim=-1)
        if is_padding_query.any():
            sees_later = (shown & (columns > query_columns[:, None])).any(dim=-1)
            agrees |= is_padding_query[:, None] & (~sees_later | shown.all(dim=-1))
        if not agrees.all():
            raise NotImplementedError(
                "The attention mask is not causal with padding, the only kind that can be kept up once tokens are "
                "evicted: custom 4-D masks, packed sequences, and prefixes or images that are attended to in both "
                "directions (PaliGemma, Gemma 3) are not supported. Use DynamicCache for them."
            )


def causal_mask(
    implementation: str | None,
    key_mask: torch.Tensor | None,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    The mask that an attention function of transformers takes: causal, bottom-right aligned.

    Args:
        implementation (`str`, *optional*): The model's `attn_implementation`.
        key_mask (`torch.Tensor`, *optional*): `(batch, 1 or heads, num_keys)` bool, False for keys that no query may
            see.
        bias (`torch.Tensor`, *optional*): `(batch, heads, num_keys)`, which is added to the logits of each key.

    Returns:
        `torch.Tensor` or None: 2-D for flash-attention, additive 4-D in `dtype` for eager and where there is a bias,
        bool 4-D otherwise; None where the function makes the right mask itself.
    """
    if implementation is not None and "flash" in implementation:
        return None if key_mask is None else key_mask[:, 0]
    if key_mask is None and bias is None and implementation != "eager" and num_queries in (1, num_keys):
        return None
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    if key_mask is not None:
        allowed = allowed & key_mask[:, :, None]
    if implementation == "eager" or bias is not None:
        given = torch.zeros((), dtype=dtype, device=device) if bias is None else bias[:, :, None].to(dtype)
        return given.masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed
