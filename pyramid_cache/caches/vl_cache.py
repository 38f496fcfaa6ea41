"""
VL-Cache of Tu et al., 2024 (https://arxiv.org/abs/2410.23317).

In a prompt with images, the text behind the last image asks what the answer must find. Its queries choose the tokens
that stay, those of images and of text alike: a token's score is the attention that all of them give it. They also tell
how much a layer needs. A layer whose attention is spread keeps more tokens than one whose attention is on few.

Departures from the paper: scores are averaged over the query heads of a KV head. Each row of a batch has its own
budgets. Layers are cut once all have read the prompt, as their budgets need the sparsity of all. A prompt without an
image is scored by its last queries. Generated tokens, which the paper keeps for ever, are scored too: each query takes
over its share. So memory is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import bounded_shares, floor_of_product, read_count, read_number
from pyramid_cache.engine.policy import Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.protection import plain, spans_of_rows
from pyramid_cache.engine.rope import running_calls
from pyramid_cache.engine.state import LayerState, row
from pyramid_cache.ops.reference import CHUNK_ELEMENTS
from pyramid_cache.ops.transfer import numbers_on


# A probability below this share of the highest of its query counts as none (paper, Section 3.1: p = 1 %).
THRESHOLD = 0.01
# Each layer keeps this share of the prompt at least (paper, Algorithm 1).
LEAST_SHARE = 0.01
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def read_image_tokens(name: str, value: Any) -> tuple[tuple[int, int] | None, ...] | None:
    """
    Spans of positions as users write them: of all rows, or one for each row. Raises ValueError for what is no span.
    """
    given = plain(value)
    if given is None:
        return None
    is_list = isinstance(given, list)
    spans = given if is_list and all(isinstance(each, list | None) for each in given) else [given]
    for span in spans:
        is_pair = isinstance(span, list) and len(span) == 2 and all(type(each) is int for each in span)
        if span is not None and not (is_pair and 0 <= span[0] < span[1]):
            raise ValueError(
                f"`{name}={value!r}` must be a pair of positions (start, stop) with 0 <= start < stop, padding not "
                f"counted, or one pair or None for each row. {span!r} is none."
            )
    if not spans:
        raise ValueError(f"`{name}={value!r}` has no row. Leave it out to let the model's inputs tell.")
    return tuple(None if span is None else (span[0], span[1]) for span in spans)


@dataclass(eq=False)
class SparsityState(LayerState):
    """`sparsity` `(batch, 1, 1)` float32: the share of attention that the latest prompt of each row hardly used."""

    sparsity: torch.Tensor | None = row()


@dataclass(frozen=True)
class VLPolicy(Policy):
    """A token's score is the attention of the text behind the last image. See `VLCache` for the fields."""

    image_tokens: tuple[tuple[int, int] | None, ...] | None = setting(None, read_image_tokens)
    window_size: int = setting(32, read_count, 1)
    recent_ratio: float = setting(0.1, read_number, "[0, 1)")

    divides_budget = True
    state_class = SparsityState

    def check_rows(self, row_lengths: list[int]) -> None:
        if self.image_tokens is None:
            return
        spans = spans_of_rows(self.image_tokens, len(row_lengths))  # type: ignore[arg-type]
        if not spans:
            raise ValueError(
                f"`image_tokens` has spans for {len(self.image_tokens)} rows, but the model was given "
                f"{len(row_lengths)}. Give one for each row of the batch, or one for all."
            )
        for number, (span, length) in enumerate(zip(spans, row_lengths, strict=True)):
            if span is not None and span[1] > length:
                raise ValueError(
                    f"`image_tokens={tuple(span)}` ends behind row {number}, which has {length} tokens. Give "
                    "positions of this row, padding not counted."
                )

    def count_queries(self, prompt: PromptView) -> list[int]:
        """The tokens of each row behind its last image; `window_size` if there is no image, or nothing behind it."""
        query_positions = prompt.query_positions[:, 0]
        ends = self._image_ends(prompt, query_positions)
        lengths = prompt.length[:, 0, 0]
        return [
            length - end if 0 < end < length else self.window_size
            for length, end in zip(lengths.tolist(), ends, strict=True)
        ]

    def _image_ends(self, prompt: PromptView, query_positions: torch.Tensor) -> list[int]:
        """The position behind the last image that each row has in this forward pass, 0 if it has none."""
        if self.image_tokens is not None:
            spans = spans_of_rows(self.image_tokens, len(query_positions))  # type: ignore[arg-type]
            stops = [0 if span is None else span[1] for span in spans]
            ends = numbers_on(query_positions.device, stops, torch.int32)
            # A later turn is behind the images of the first.
            return torch.maximum(ends, first_of(query_positions)).masked_fill(ends == 0, 0).tolist()
        is_image = find_images(prompt)
        if is_image is None:
            return [0] * len(query_positions)
        return (query_positions + 1).masked_fill(~is_image.to(query_positions.device), 0).amax(dim=-1).tolist()

    def observe(self, prompt: PromptView) -> None:
        state = prompt.state
        windows = numbers_on(prompt.key.device, state.row_windows, torch.int32)[:, None]
        positions = prompt.query_positions[:, 0]
        counts = (positions >= 0) & (positions >= prompt.length[:, 0] - windows)  # (batch, queries)
        sparsity = prompt.mean_over_heads(sparsity_of_heads(prompt, counts)[..., None])
        if state.sparsity is not None:  # a row without new tokens
            sparsity = torch.where(counts.any(dim=-1)[:, None, None], sparsity, state.sparsity)
        state.sparsity = sparsity

    def divide(self, states: Sequence[Any]) -> list[list[int]]:
        densities = torch.stack([1 - state.sparsity[:, 0, 0].cpu() for state in states]).T.tolist()  # by row
        layers = [list(state.row_kept) for state in states]
        for number, density in enumerate(densities):
            kept, length = [numbers[number] for numbers in layers], states[0].row_lengths[number]
            if min(kept) >= length:  # which may grow up to it
                continue
            least = max([floor_of_product(LEAST_SHARE, length), 1, *states[0].row_protected[number : number + 1]])
            shares = bounded_shares(sum(kept), tuple(density), min(least, *kept), length)
            for numbers, share in zip(layers, shares, strict=True):
                numbers[number] = share
        return layers

    def score(self, view: ScoringView) -> torch.Tensor:
        row_recent = [max(floor_of_product(self.recent_ratio, kept), 1) for kept in view.state.row_kept]
        num_recent = numbers_on(view.key.device, row_recent, torch.int32)[:, None, None]
        return view.attention.masked_fill(view.is_recent(num_recent), float("inf"))


def first_of(query_positions: torch.Tensor) -> torch.Tensor:
    """The first position of each row among `(batch, queries)`; -1 is padding."""
    return query_positions.masked_fill(query_positions < 0, torch.iinfo(query_positions.dtype).max).amin(dim=-1)


def find_images(prompt: PromptView) -> torch.Tensor | None:
    """
    `(batch, queries)` bool: which of the new tokens stand for images or videos, as the running model is told by token
    types, or by ids that its config names. None if it is told neither.
    """
    shape = prompt.query_positions[:, 0].shape
    for module, given in running_calls(prompt.find_module()):
        for name in TOKEN_TYPES:
            types = given.get(name)
            if isinstance(types, torch.Tensor) and types.shape == shape:
                return types != 0
        ids, config = given.get("input_ids"), getattr(module, "config", None)
        names = [getattr(config, name, None) for name in IMAGE_IDS]
        known = [name for name in names if isinstance(name, int)]
        if known and isinstance(ids, torch.Tensor) and ids.shape == shape:
            return torch.isin(ids, numbers_on(ids.device, known, ids.dtype))
    return None


def sparsity_of_heads(prompt: PromptView, counts: torch.Tensor) -> torch.Tensor:
    """
    The sparsity of each KV head `(batch, kv_heads)` float32, the mean over its query heads: of all keys that the
    queries marked in `counts` `(batch, queries)` see, the share that gets less than 1 % of the query's highest
    probability. Some queries of one KV head at a time.
    """
    batch, kv_heads, num_keys = prompt.key.shape[:3]
    group, num_queries = prompt.query.shape[1] // kv_heads, counts.shape[1]
    first = int(counts.any(dim=0).int().argmax())
    rows_per_chunk = max(CHUNK_ELEMENTS // (batch * group * num_keys), 1)
    hardly = torch.zeros(batch, kv_heads, device=prompt.key.device)
    seen = torch.zeros_like(hardly)
    for start in range(first, num_queries, rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        for head in range(kv_heads):
            probabilities, is_visible = prompt.head_attention(head, chunk)
            is_counted = (is_visible & counts[:, chunk, None])[:, None]
            is_low = probabilities < THRESHOLD * probabilities.amax(dim=-1, keepdim=True)
            hardly[:, head] += (is_low & is_counted).float().mean(dim=1).sum(dim=(1, 2))
            seen[:, head] += is_counted[:, 0].sum(dim=(1, 2))
    return hardly / seen.clamp(min=1)


class VLCache(PolicyCache):
    """
    Keeps, per KV head, the tokens to which the text behind the last image attends, more of them in layers whose
    attention is spread (VL-Cache, https://arxiv.org/abs/2410.23317). For models that read images and text.

    The layers hold `budget` tokens on average, and each up to `eviction_interval` more: `layers * batch * kv_heads
    * (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes together. A prompt stays whole until the last
    layer has read it. See `PolicyCache` for the other arguments and the errors; a `ranking` of "model" or
    "model-online" is refused.

    Args:
        image_tokens (`Sequence`, *optional*): Where the images of a prompt are: a pair of positions `(start, stop)`,
            padding not counted, or one pair or None for each row. Of several images, `stop` is the end of the last
            one. By default the model's inputs tell: `mm_token_type_ids` or `token_type_ids`, or `input_ids` and the
            image token of its config. A prompt of embeddings tells nothing.
        window_size (`int`, defaults to 32): How many of the last queries choose where a prompt, or a part of one that
            is read in pieces, has no image, or no text behind it.
        recent_ratio (`float`, defaults to 0.1): The share of a layer's budget that the latest tokens have, at least
            one token and half of the budget at most. Larger values leave less room for others.

    Raises:
        ValueError: `image_tokens` is no pair of positions, has another number of rows than the prompt, or ends behind
            it.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import VLCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = VLCache(model.config, budget=16, image_tokens=(4, 30))
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> cache.get_seq_length(), sum(cache.num_kept_tokens())
    (40, 32)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        image_tokens: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
        window_size: int = 32,
        recent_ratio: float = 0.1,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = VLPolicy(image_tokens, window_size, recent_ratio)  # type: ignore[arg-type]
        super().__init__(config, budget, policy, **options)
