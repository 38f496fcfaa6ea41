"""The text of a prompt, coloured by how many layers hold each token."""

import html
import itertools
import unicodedata
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedTokenizerBase

from pyramid_cache.plot.arguments import as_row, compressed_layers, loses_tokens, require_filled, tokens_seen
from pyramid_cache.plot.held import kept_positions


# The colours of tokens that no layer and that all layers hold. Both have one hue: only the lightness tells shades
# apart.
PALEST, STRONGEST = (255, 255, 255), (8, 81, 156)
# The lightest grey that is legible on white (a contrast of 4.5), and the share from which on white text has more
# contrast with the background than black.
FORGOTTEN_COLOR = "#767676"
LEAST_WHITE_SHARE = 0.773
NUM_LEGEND_STEPS = 5
# More tokens than any character needs. Bytes that are no text must not become one group: the time to decode a group
# grows with the square of its length.
MAX_GROUP_TOKENS = 16


@dataclass(frozen=True)
class TokenGroup:
    """The token at position `start`, or the tokens from there to before `stop` that make up a character together."""

    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class KeptText:
    """
    A text with the layers that hold its tokens. A notebook shows it in colour, `print` as plain text.

    Attributes:
        name (`str`): The class of the cache.
        groups (`list[TokenGroup]`): The text.
        tokens (`list[str]`): The tokens, as the tokenizer writes them.
        is_held (`torch.Tensor`): `(layers, tokens)` bool: whether a KV head of the layer holds the token. Tokens after
            the last column have not been seen yet.
        layer_indices (`list[int]`): The indices of these layers in the model.
        num_model_layers (`int`): The number of layers of the model.
        num_behind (`int`): How many tokens the cache has seen after these.
        is_lost (`bool`): Whether a layer loses the tokens that it does not hold.
    """

    name: str
    groups: list[TokenGroup]
    tokens: list[str]
    is_held: torch.Tensor
    layer_indices: list[int]
    num_model_layers: int
    num_behind: int
    is_lost: bool

    @property
    def num_layers(self) -> int:
        """How many layers count."""
        return len(self.layer_indices)

    @property
    def num_layers_per_token(self) -> list[int]:
        """How many of these layers hold each token that has been seen."""
        return self.is_held.sum(dim=0).tolist()

    @property
    def held_by(self) -> str:
        """How a token relates to a layer that holds it."""
        return "kept by" if self.is_lost else "in the buffer of"

    @property
    def heading(self) -> str:
        """The counts, and what they leave out."""
        counts, num_layers = self.num_layers_per_token, self.num_layers
        num_all, num_none = counts.count(num_layers), counts.count(0)
        heading = f"{self.name}, {len(counts):,} tokens: {num_all:,} {self.held_by} all {num_layers} layers, "
        heading += f"{num_none:,} {self.held_by} none."
        if not self.is_lost:
            heading += " None is lost: what is in the buffer is what a step attends to."
        if num_layers < self.num_model_layers:
            heading += f" {num_layers} of the model's {self.num_model_layers} layers count: "
            heading += "the others are transformers' own."
        if self.num_behind:
            heading += f" {self.num_behind:,} tokens behind these are not shown."
        return heading

    def __str__(self) -> str:
        """The text, with tokens that no layer holds in brackets that hardly any text has."""
        counts, parts = self.num_layers_per_token, []

        def is_forgotten(group: TokenGroup) -> bool:
            return group.stop <= len(counts) and not any(counts[group.start : group.stop])

        for forgotten, groups in itertools.groupby(self.groups, key=is_forgotten):
            text = "".join(group.text for group in groups)
            parts.append(f"⟦{text}⟧" if forgotten else text)
        return f"{self.heading} ⟦{self.held_by.capitalize()} no layer⟧.\n\n{''.join(parts)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        steps = sorted({round(i * self.num_layers / (NUM_LEGEND_STEPS - 1)) for i in range(NUM_LEGEND_STEPS)})
        legend = " ".join(
            f'<span style="{style_of(count / self.num_layers)};padding:0 0.5em">{count}</span>' for count in steps
        )
        text = "".join(self.as_html(group) for group in self.groups)
        return (
            '<div style="background:#ffffff;color:#000000;padding:0.5em">'
            f'<div style="font-family:sans-serif;margin-bottom:0.5em">{html.escape(self.heading)}<br>'
            f"layers: {legend}</div>"
            '<pre style="background:#ffffff;color:#000000;white-space:pre-wrap;overflow-wrap:anywhere">'
            f"\n{text}</pre></div>"
        )

    def as_html(self, group: TokenGroup) -> str:
        """A group as a span with a tooltip; its colour is that of the mean of its tokens that have been seen."""
        is_held = self.is_held[:, group.start : group.stop]
        tooltip = "&#10;".join(html.escape(self.describe(position)) for position in range(group.start, group.stop))
        style = style_of(is_held.double().mean().item()) if is_held.numel() else "border:1px dotted #767676"
        return f'<span title="{tooltip}" style="{style}">{html.escape(visible(group.text))}</span>'

    def describe(self, position: int) -> str:
        """A line of a tooltip."""
        token = f"{self.tokens[position]!r}, position {position}"
        if position >= self.is_held.shape[1]:
            return f"{token}: not seen yet"
        holding = [self.layer_indices[index] for index in self.is_held[:, position].nonzero().flatten().tolist()]
        which = f": {ranges(holding)}" if holding else ""
        return f"{token}: {self.held_by} {len(holding)} of {self.num_layers} layers{which}"


def read_kept_text(
    cache: Cache,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    row: int = 0,
    attention_mask: torch.Tensor | None = None,
) -> KeptText:
    """See `CompressedCache.show`."""
    require_filled(cache)
    row = as_row(row, cache.batch_size)
    token_ids = tokens_of_row(cache, input_ids, row, attention_mask)
    strange = [token_id for token_id in token_ids if not 0 <= token_id < len(tokenizer)]
    if strange:
        raise ValueError(
            f"`input_ids` hold {strange[0]}, which is none of the {len(tokenizer)} tokens of the tokenizer. Give what "
            "the model read, and not labels."
        )
    num_seen, indices = tokens_seen(cache, row), [layer.place.layer_idx for layer in compressed_layers(cache)]
    return KeptText(
        name=type(cache).__name__,
        groups=group_tokens(tokenizer, token_ids),
        tokens=[str(token) for token in tokenizer.convert_ids_to_tokens(token_ids)],
        is_held=kept_positions(cache, num_seen, row)[indices, : len(token_ids)] > 0,
        layer_indices=indices,
        num_model_layers=len(cache.layers),
        num_behind=max(num_seen - len(token_ids), 0),
        is_lost=loses_tokens(cache),
    )


def tokens_of_row(cache: Cache, input_ids: torch.Tensor, row: int, attention_mask: torch.Tensor | None) -> list[int]:
    """
    The tokens of a row without padding, in order.

    Raises:
        ValueError: They do not fit what the cache has seen.
    """
    input_ids = as_rows("input_ids", input_ids, cache.batch_size)
    num_columns, num_seen, row_length = input_ids.shape[1], cache.get_seq_length(), tokens_seen(cache, row)
    if num_columns > num_seen + 1:
        raise ValueError(
            f"`input_ids` have {num_columns} tokens, but the cache has seen {num_seen}. Give what it has seen: the "
            "prompt, or the sequences that `generate` returned, which have one token more."
        )
    if attention_mask is None:
        num_padding = num_seen - row_length
        padding = input_ids[row, :num_padding]
        if num_padding >= num_columns or (padding != padding[:1]).any():
            raise ValueError(
                f"The cache has seen {num_seen} columns, and {row_length} tokens of row {row} in them, but the first "
                f"{num_padding} of the {num_columns} `input_ids` of the row are not padding. Give the "
                "`attention_mask` as well."
            )
        return input_ids[row, num_padding:].tolist()
    mask = as_rows("attention_mask", attention_mask, cache.batch_size)[row] != 0
    if len(mask) > num_columns:
        raise ValueError(f"`attention_mask` has {len(mask)} columns, but `input_ids` have {num_columns}.")
    is_token = torch.nn.functional.pad(mask, (0, num_columns - len(mask)), value=True)
    num_tokens = int(is_token[:num_seen].sum())
    if num_tokens > row_length or (num_columns >= num_seen and num_tokens < row_length) or not num_tokens:
        raise ValueError(
            f"`attention_mask` shows {num_tokens} tokens of row {row} in {min(num_columns, num_seen)} columns, but "
            f"the cache has seen {row_length} in {num_seen}. Give the mask that the model was given."
        )
    return input_ids[row, is_token].tolist()


def as_rows(name: str, tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Integers `(batch, tokens)` on the CPU; a single row may be given as `(tokens,)`."""
    try:
        rows = torch.as_tensor(tensor).cpu()
    except (TypeError, ValueError, RuntimeError):
        kind = type(tensor).__name__
        raise ValueError(f"`{name}` must be a tensor (batch, tokens) of integers, but is a {kind}.") from None
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.is_floating_point() or rows.is_complex() or rows.shape[0] != batch_size:
        raise ValueError(
            f"`{name}` are {rows.dtype} {tuple(rows.shape)}, but the cache holds {batch_size} rows: give integers "
            f"({batch_size}, tokens)."
        )
    if not rows.shape[1]:
        raise ValueError(f"`{name}` have no tokens. Give what the cache has seen, the prompt at least.")
    return rows


def group_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[TokenGroup]:
    """
    The text of each token, decoded after the group before it: tokenizers drop the space in front of a text's first
    word. Tokens that end inside a character share a group with those that complete it.
    """

    def decode(start: int, stop: int) -> str:
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(token_ids[start:stop], **settings))

    groups: list[TokenGroup] = []
    context, start = 0, 0
    for stop in range(1, len(token_ids) + 1):
        before, text = decode(context, start), decode(context, stop)
        # An incomplete character decodes to U+FFFD. If the last token does not complete it, U+FFFD stays.
        if text.endswith("\ufffd") and stop < min(len(token_ids), start + MAX_GROUP_TOKENS):
            continue
        groups.append(TokenGroup(start, stop, text[len(before) :]))
        context, start = start, stop
    return groups


def visible(text: str) -> str:
    """The text with control characters written out, because HTML cannot hold them; tabs and newlines stay."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text)


def style_of(share: float) -> str:
    """The colours, as CSS, of a token that this share of the layers holds."""
    background = [round(pale + share * (strong - pale)) for pale, strong in zip(PALEST, STRONGEST, strict=True)]
    color = FORGOTTEN_COLOR if not share else "#000000" if share < LEAST_WHITE_SHARE else "#ffffff"
    return f"background:#{bytes(background).hex()};color:{color}"


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: "0-3, 7"."""
    # Neighbours have the same distance to their ranks.
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
