"""
One reading of a prompt for many caches.

A cache that reads its prompt with full attention sees the same queries, keys and values as any other: it is read once, and
what each layer got is handed to every cache, which evicts from it what it would have evicted from its own.
"""

import weakref
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.caches.h2o import H2OCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.recording import RecordedChunk


@dataclass(frozen=True)
class Reading:
    """
    A prompt as the layers of a model got it.

    Attributes:
        modules (`list[weakref.ref]`): The attention module of each layer.
        chunks (`list[RecordedChunk]`): Queries, keys and values of each layer. Caches share these tensors: none writes to
            them.
        logits (`torch.Tensor`): `(batch, vocabulary)` of the last token.
    """

    modules: list[weakref.ref]
    chunks: list[RecordedChunk]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.chunks[0].num_columns

    def followed_by(self, later: "Reading") -> "Reading":
        """Both, as if they had been read in one forward pass."""
        chunks = [
            replace(
                last,
                query=torch.cat([first.query, last.query], dim=2),
                key=torch.cat([first.key, last.key], dim=2),
                value=torch.cat([first.value, last.value], dim=2),
            )
            for first, last in zip(self.chunks, later.chunks, strict=True)
        ]
        return Reading(self.modules, chunks, later.logits)


class Reader:
    """
    Reads a context once, and questions behind it.

    Args:
        model (`PreTrainedModel`): Each of its layers has full attention. Its rotary frequencies do not depend on the length
            of what it reads at a time (as with dynamic or longrope scaling): a question read behind the context is to
            be what it would be if both were read at once.
        ids (`torch.Tensor`): `(batch, tokens)`, the context, without padding.

    Raises:
        NotImplementedError: The model has layers of other kinds, or such frequencies.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.model = model
        self.cache = H2OCache(model.config, budget=1.0)  # never evicts, and never scores
        if len(self.cache.compressed_layers) < len(self.cache.layers):
            raise NotImplementedError(
                f"A model of type {model.config.model_type!r} has layers of other kinds than full attention, whose reading "
                "cannot be shared by caches. Evaluate a model without them."
            )
        rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise NotImplementedError(
                f"The rotary frequencies of this model depend on the length of the prompt ({rope_type!r} scaling), so that a "
                "context and its questions cannot be read one after the other. Evaluate a model with others."
            )
        self.context = self._record(ids)
        self.cache.crop(0)

    @torch.no_grad()
    def _record(self, ids: torch.Tensor) -> Reading:
        self.cache.activate_past_recording()
        logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
        layers = self.cache.compressed_layers
        return Reading([layer._module for layer in layers], [layer.recorded[-1] for layer in layers], logits)

    def with_question(self, ids: torch.Tensor) -> Reading:
        """The context and a question `(batch, tokens)` behind it."""
        question = self._record(ids)
        self.cache.crop(-ids.shape[1])
        return self.context.followed_by(question)


@torch.no_grad()
def fill(cache: CompressedCache, reading: Reading) -> None:
    """
    Makes a new cache hold what it would hold had it read the prompt itself, with full attention.

    Args:
        cache (`CompressedCache`): Empty, and of the same model.
    """
    for layer, module, chunk in zip(cache.compressed_layers, reading.modules, reading.chunks, strict=True):
        layer.lazy_initialization(chunk.key, chunk.value)
        layer._check_module(module())
        layer.activate_past_recording()
        layer.recorded.append(chunk)
    cache.crop(0)
    for layer in cache.compressed_layers:
        layer.record_past = False


def full_cache(model: PreTrainedModel, reading: Reading) -> DynamicCache:
    """A DynamicCache that holds a whole prompt."""
    cache = DynamicCache(config=model.config)
    for layer_idx, chunk in enumerate(reading.chunks):
        cache.update(chunk.key, chunk.value, layer_idx)
    return cache
