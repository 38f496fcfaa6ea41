"""Runs of `model.generate`, timed up to the first token and from there on, and the bytes that caches hold."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache


class Stopwatch(LogitsProcessor):
    """Notes when the logits of each token were there. Those of the first token end the prefill."""

    def __init__(self, device: torch.device, on_token: Callable[[int], None]) -> None:
        self.device, self.on_token = device, on_token
        self.stamps: list[float] = []
        self.note()

    def note(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.stamps.append(time.perf_counter())

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.note()
        self.on_token(len(self.stamps) - 1)
        return scores

    @property
    def prefill_seconds(self) -> float:
        return self.stamps[1] - self.stamps[0]

    @property
    def seconds_of_steps(self) -> list[float]:
        """Those of each decode step."""
        return [later - earlier for earlier, later in itertools.pairwise(self.stamps[1:])]


def generate(
    model: Any,
    input_ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda done: None,
    stopwatch: Stopwatch | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, Stopwatch]:
    """
    Decodes greedily from `(batch, tokens)` without padding. Returns all tokens, and when new ones were there. Settings
    are those of `model.generate`. Steps are not compiled: their times would hold the compilation.
    """
    stopwatch = stopwatch or Stopwatch(model.device, on_token)
    sequences = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([stopwatch]),
        **{"disable_compile": True, **settings},
    )
    return sequences, stopwatch


def held_bytes(cache: Cache) -> int:
    """The bytes that a cache holds. For a cache of transformers, those of the storages of its layers' tensors."""
    return cache.nbytes if isinstance(cache, CompressedCache) else storage_bytes(layer_tensors(cache))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages of tensors, each storage once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def layer_tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """The tensors of a cache's layers. A tensor that wraps others, as quantized ones do, stands for those."""
    waiting: list[Any] = [value for layer in cache.layers for value in vars(layer).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif is_traceable_wrapper_subclass(value):
            waiting += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, torch.Tensor):
            yield value
