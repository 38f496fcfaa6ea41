"""Runs of `model.generate` with each cache, timed up to the first token and from there on."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.demo.planted_number import Prompts
from pyramid_cache.lab.loaded_model import LoadedModel
from pyramid_cache.lab.registry import BASELINE, BudgetLike, CacheEntry, Workload, find_entry
from pyramid_cache.lab.weights import ProgressCallback
from pyramid_cache.plot.held import kept_positions, kept_tokens


WARM_UP_NEW_TOKENS = 4
WARM_UP_PROMPT_TOKENS = 512


@dataclass
class Result:
    """What one cache did with the prompts: times of each repeat, and what it held at the end of the first."""

    entry: CacheEntry
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    held_bytes: int = 0
    kept_tokens: list[int] = field(default_factory=list)  # per layer
    kept_positions: torch.Tensor | None = None  # (layers, positions): the share of heads, for the first row
    answers: list[str] = field(default_factory=list)  # one per row


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
    def decode_seconds(self) -> float:
        return self.stamps[-1] - self.stamps[1]


def measure_caches(
    loaded: LoadedModel,
    prompts: Prompts,
    names: list[str],
    budget: BudgetLike,
    max_new_tokens: int,
    repeats: int,
    progress: ProgressCallback,
) -> list[Result]:
    """
    Measures each cache on the same prompts, and the baseline. In each round all caches take their turn, so that other
    work on the machine falls on all of them alike. Before the first round each cache runs once unmeasured.
    """
    model, input_ids = loaded.model, prompts.input_ids.to(loaded.model.device)
    results = [Result(find_entry(name)) for name in (names if BASELINE in names else [BASELINE, *names])]

    def new_cache(entry: CacheEntry) -> Cache:
        return entry.build(model, budget, Workload(prompts.num_tokens, len(prompts.numbers), max_new_tokens))

    for result in results:  # a budget that a cache refuses is refused before anything runs
        new_cache(result.entry)
    for result in results:
        progress(f"{result.entry.label}: warming up", 0, None)
        # On a CPU a piece of the prompt will do; other devices choose their kernels by the shapes.
        piece = input_ids[:, :WARM_UP_PROMPT_TOKENS] if model.device.type == "cpu" else input_ids
        # A budget can be too small for the piece only; if it is for the prompt too, the measured run says so.
        with contextlib.suppress(ValueError):
            generate(model, piece, new_cache(result.entry), WARM_UP_NEW_TOKENS)
    for repeat in range(repeats):
        for result in results:
            description = f"{result.entry.label}{f', round {repeat + 1} of {repeats}' if repeats > 1 else ''}"
            progress(f"{description}: reading {prompts.num_tokens:,} tokens", 0, None)
            cache = new_cache(result.entry)
            on_token = lambda done, text=description: progress(f"{text}: answering", done, max_new_tokens)  # noqa: E731
            sequences, stopwatch = generate(model, input_ids, cache, max_new_tokens, on_token)
            result.prefill_seconds.append(stopwatch.prefill_seconds)
            result.decode_seconds.append(stopwatch.decode_seconds)
            if repeat == 0:
                result.answers = [loaded.answer(row) for row in sequences[:, prompts.num_tokens :].tolist()]
                result.held_bytes = held_bytes(cache)
                result.kept_tokens = kept_tokens(cache)
                result.kept_positions = kept_positions(cache, sequences.shape[1] - 1)
            del cache  # before the next one fills the memory
    return results


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
