"""
One reading of prompts for many caches.

A cache that reads its prompt with full attention sees the same queries, keys and values as any other. A prompt is read
once, and every cache evicts from what each layer got. Prompts of several lengths are padded on the left.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.layer import Arrival, CompressedLayer
from pyramid_cache.engine.pending import RecordedChunk
from pyramid_cache.engine.ranks import HeadRanks
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops import attention_with_lse, row_lse


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids `(rows, longest)`, and how many columns of padding each row begins with `(rows,)` if any has some."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * num + list(row) for num, row in zip(padding, rows, strict=True)], device=device)
    return ids, torch.tensor(padding, device=device) if any(padding) else None


def padding_arguments(padding: torch.Tensor | None, num_seen: int, num_new: int) -> dict[str, Any]:
    """What a model is told of padding `(rows,)` when the cache has seen some columns, padding included."""
    if padding is None:
        return {}
    columns = torch.arange(num_seen + num_new, device=padding.device) - padding[:, None]
    return {"attention_mask": (columns >= 0).long(), "position_ids": columns[:, num_seen:].clamp(min=0)}


@dataclass(frozen=True)
class Reading:
    """A prompt as the layers of a model got it. Caches share these tensors: none writes to them."""

    layers: list[tuple[nn.Module, RecordedChunk]]  # attention modules, and the queries, keys, values that they had
    logits: torch.Tensor  # (batch, vocabulary), of the last token
    padding: torch.Tensor | None = None  # see `pad_left`
    # What caches have seen that read the prompt a second time, by the names of the caches. It depends on no budget.
    replays: dict[str, Any] = field(default_factory=dict)
    ranks: HeadRanks | None = None  # which share the heads of all layers

    @property
    def num_tokens(self) -> int:
        return self.layers[0][1].num_columns

    @property
    def nbytes(self) -> int:
        """What the full cache takes for the prompt."""
        return sum(chunk.key.nbytes + chunk.value.nbytes for _, chunk in self.layers)

    def share_of(self, num_bytes: int) -> float:
        """What so many bytes are of those of the full cache; the mean of all ranks that share the heads."""
        share = num_bytes / self.nbytes
        return share if self.ranks is None else float(self.ranks.mean(torch.tensor(share, device=self.logits.device)))

    def followed_by(self, later: "Reading") -> "Reading":
        """Both, as if they had been read in one forward pass."""
        layers = [
            (module, joined(first, last)) for (_, first), (module, last) in zip(self.layers, later.layers, strict=True)
        ]
        return replace(later, layers=layers)


def joined(first: RecordedChunk, last: RecordedChunk) -> RecordedChunk:
    """Both as one. Log-sum-exps are known if the first has them."""
    parts: dict[str, Any] = {
        name: torch.cat([getattr(first, name), getattr(last, name)], dim=2) for name in ("query", "key", "value")
    }
    return replace(last, lse=first.lse, **parts)


def replay(cache: CompressedCache, reading: Reading) -> None:
    """Fills a new cache as if it had read the prompt itself, with full attention."""
    for layer, (module, chunk) in zip(cache.compressed_layers, reading.layers, strict=True):
        layer.module = module
        layer.lazy_initialization(chunk.key, chunk.value)
        layer.set_ranks(reading.ranks)
        layer.activate_past_recording()
        layer.pending.chunks.append(chunk)
    cache.crop(0)
    for layer in cache.compressed_layers:
        layer.record_past = False


class ReadingLayer(CompressedLayer):
    """Records what it gets, and how its attention module rotates keys: other caches may ask when none is running."""

    def num_tokens_to_keep(self, row_length: int) -> int:
        return max(row_length, 1)

    def check(self, call: AttentionCall, arrival: Arrival, is_step: bool) -> None:
        if self.module is None:
            with contextlib.suppress(NotImplementedError):  # raised again for those that ask
                self.rotary_of(call.module)
        super().check(call, arrival, is_step)

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        return call.run()

    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return call.run()


class Reader:
    """
    Reads a context, as `pad_left` gives it, once, and questions behind it. Raises NotImplementedError for models in
    which that differs from reading both at once: layers without full attention, and rotary frequencies that depend on
    lengths.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        self.model = model
        self.padding = padding
        self.cache = CompressedCache(model.config, lambda place, masks: ReadingLayer(place, masks, SlotStore()))
        if len(self.cache.compressed_layers) < len(self.cache.layers):
            raise NotImplementedError(
                f"A model of type {model.config.model_type!r} has layers of other kinds than full attention, whose "
                "reading cannot be shared by caches. Evaluate a model without them."
            )
        rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise NotImplementedError(
                f"The rotary frequencies of this model depend on the length of the prompt ({rope_type!r} scaling), so "
                "that a context and its questions cannot be read one after the other. Evaluate a model with others."
            )
        self.context = with_lse(self._record(ids))
        self.cache.crop(0)

    @torch.no_grad()
    def _record(self, ids: torch.Tensor) -> Reading:
        self.cache.activate_past_recording()
        arguments = padding_arguments(self.padding, self.cache.get_seq_length(), ids.shape[1])
        logits = self.model(ids, **{CACHE_ARGUMENT: self.cache}, logits_to_keep=1, **arguments).logits[:, -1]
        recorded = [(layer.module, layer.pending.chunks[-1]) for layer in self.cache.compressed_layers]
        return Reading(recorded, logits, self.padding, ranks=self.cache.compressed_layers[0].store.ranks)

    def with_question(self, ids: torch.Tensor) -> Reading:
        """The context and a question `(batch, tokens)` behind it."""
        question = self._record(ids)
        self.cache.crop(-ids.shape[1])
        return with_lse(self.context.followed_by(question))


@torch.no_grad()
def with_lse(reading: Reading) -> Reading:
    """Works out the log-sum-exps of the last queries, which have none yet, for all caches. With padding each does."""
    if any(chunk.has_padding for _, chunk in reading.layers[:1]):
        return replace(reading, layers=[(module, replace(chunk, lse=None)) for module, chunk in reading.layers])
    layers = []
    for module, chunk in reading.layers:
        known = [] if chunk.lse is None else [chunk.lse]
        query = chunk.query[:, :, sum(lse.shape[2] for lse in known) :]
        arguments = {name: chunk.logit_kwargs[name] for name in ("scaling", "softcap")}
        sink_logits, found = chunk.logit_kwargs["s_aux"], None
        if sink_logits is None:
            found = attention_with_lse("sdpa", query, chunk.key, chunk.value, **arguments)
        lse = row_lse(query, chunk.key, sink_logits=sink_logits, **arguments) if found is None else found[1]
        layers.append((module, replace(chunk, lse=torch.cat([*known, lse], dim=2))))
    return replace(reading, layers=layers)


def filled(cache: Cache, reading: Reading) -> Cache:
    """A new cache of transformers that has got a whole prompt."""
    for layer_idx, (_, chunk) in enumerate(reading.layers):
        cache.update(chunk.key, chunk.value, layer_idx)
    return cache
