"""What the host does in a decode step, counted: Python calls, torch ops, views and waits. Load changes no count."""

import contextlib
import copy
import cProfile
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine import attention
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.registry import Contender, Workload


# What is counted; "ops" are those that are no views.
COUNTS = ("calls", "ops", "views", "waits")
# Two eviction intervals and two steps: the budget is full, and what is made once is made.
WARM_UP_STEPS = 66
# What the host gets from an op, or the size of the result, is known to the device alone.
ASKING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)


class OpCounter(TorchDispatchMode):
    """Counts, while entered, the ops that reach torch's dispatcher. What an op of `torch.library` runs is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.views = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.views += func.is_view
        self.ops += not func.is_view
        self.waits += waits_for_device(func, args, kwargs)
        return func(*args, **kwargs)


class ListCounter(TorchFunctionMode):
    """Counts, while entered, `tolist()`, which is no op on the CPU. What kernels in Python do is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.lists += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


def waits_for_device(func: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the host would wait for an op on a GPU, as for `item()`, `nonzero()` or an index that is a mask."""
    if func in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return False
    return not ASKING_TAGS.isdisjoint(func.tags)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the garbage collector, which may call Python functions at any time, out of what is counted."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@torch.no_grad()
def count_steps(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, num_steps: int) -> dict[str, float]:
    """
    Counts the work of decode steps, uncompiled, per decoder layer and step.

    Args:
        tokens: `(tokens,)`: a prompt, and one token for each step of `num_later(num_steps)`.
        num_steps: The steps that are counted. Take a multiple of the eviction interval, to average evictions in.

    Returns:
        For each of `COUNTS` a number, that of the whole model divided by its layers. Calls are those of Python
        functions and of functions in C that Python calls.
    """
    prompt, *steps = tokens[None].split([len(tokens) - num_later(num_steps)] + [1] * num_later(num_steps), dim=1)

    def decode(ids: list[torch.Tensor]) -> None:
        for token in ids:
            model(token, **{CACHE_ARGUMENT: cache})

    decode([prompt, *steps[:WARM_UP_STEPS]])
    profiler = cProfile.Profile()
    with no_garbage_collection():
        with OpCounter() as counted, ListCounter() as read:
            decode(steps[WARM_UP_STEPS:-num_steps])
        profiler.runcall(decode, steps[-num_steps:])
    calls = sum(entry.callcount for entry in profiler.getstats())
    totals = (calls, counted.ops, counted.views, counted.waits + read.lists)
    num_parts = num_steps * model.config.get_text_config(decoder=True).num_hidden_layers
    return {name: total / num_parts for name, total in zip(COUNTS, totals, strict=True)}


def num_later(num_steps: int) -> int:
    """The steps behind the prompt: the warm-up, those in which ops are counted and those in which calls are."""
    return WARM_UP_STEPS + 2 * num_steps


def measure_cache(
    model: PreTrainedModel,
    contender: Contender,
    tokens: torch.Tensor,
    num_steps: int,
    baseline: Mapping[str, float] | None,
) -> dict[str, Any]:
    """A row: `count_steps` of a new cache, and as `more_calls` etc. what is more than in the row of the baseline."""
    # What caches of this library put on transformers and on a model stays there; each cache is counted without that of
    # the caches before it.
    attention.uninstall()
    model = copy.deepcopy(model)
    after = num_later(num_steps)
    cache = contender.build(model, Workload(len(tokens) - after, num_later=after))
    counts = count_steps(model, cache, tokens, num_steps)
    more = {f"more_{name}": None if baseline is None else counts[name] - baseline[name] for name in COUNTS}
    return {"cache": contender.name, "label": contender.label, **counts, **more}
