"""The caches that `bench caches` measures by their names: those of the library, and those of transformers."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from pyramid_cache import ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine.budget import floor_of_product, parse_budget
from pyramid_cache.lab.evaluation.caches import CACHES as EVALUATED


BASELINE = "dynamic"
DEFAULT_BUDGET = 0.25


@dataclass(frozen=True)
class Workload:
    """
    Args:
        num_tokens (`int`): Of the prompt.
        batch_size (`int`): Rows that are decoded.
        longest (`int`): Tokens that a row has at the end.
    """

    num_tokens: int
    batch_size: int
    longest: int


@dataclass(frozen=True)
class Contender:
    """
    A cache that is measured.

    Attributes:
        name (`str`): As `--caches` has it, with its budget.
        label (`str`): As tables have it.
        build (`Callable`): Makes a new cache for a model and a workload.
        copies_rows (`bool`): Whether `batch_select_indices` makes many rows of one, so that one reading of the prompt serves
            all of them.
    """

    name: str
    label: str
    build: Callable[[PreTrainedModel, Workload], Cache]
    copies_rows: bool = True


def quantized(model: PreTrainedModel, workload: Workload) -> QuantizedCache:
    """transformers' cache of four bits."""
    try:
        return QuantizedCache("quanto", model.config)
    except ImportError as error:
        raise ValueError(
            f"--caches quantized needs the package optimum-quanto: {' '.join(str(error).split())}"
        ) from error


def offloaded(model: PreTrainedModel, workload: Workload) -> DynamicCache:
    """transformers' cache that keeps all layers but one or two on the host."""
    if model.device.type == "cpu":
        raise ValueError("--caches offloaded moves layers to the host and needs another --device than cpu.")
    return DynamicCache(config=model.config, offloading=True)


TRANSFORMERS = {
    BASELINE: Contender(BASELINE, "DynamicCache", lambda model, workload: DynamicCache(config=model.config)),
    "static": Contender(
        "static",
        "StaticCache",
        lambda model, workload: StaticCache(config=model.config, max_cache_len=workload.longest),
        copies_rows=False,
    ),
    "quantized": Contender("quantized", "QuantizedCache, 4 bits", quantized, copies_rows=False),
    "offloaded": Contender("offloaded", "DynamicCache, offloaded", offloaded, copies_rows=False),
}
NAMES = (*TRANSFORMERS, *EVALUATED)


def parse_contender(text: str) -> Contender:
    """
    Reads a name, and behind a colon its budget: tokens, or a fraction of the prompt.

    Raises:
        ValueError: There is no such cache, or no such budget.
    """
    name, _, written = text.partition(":")
    if name in TRANSFORMERS and not written:
        return TRANSFORMERS[name]
    if name not in EVALUATED:
        known = ", ".join(NAMES)
        raise ValueError(f"{text!r} is no cache; those of transformers have no budget. Caches are {known}.")
    try:
        budget = int(written) if written.isdecimal() else float(written or DEFAULT_BUDGET)
        parse_budget(budget)
    except ValueError as error:
        raise ValueError(f"{text!r}: a budget is a number of tokens or a fraction of the prompt.") from error
    return Contender(f"{name}:{budget}", f"{EVALUATED[name].label}, {budget}", builder(name, budget))


def builder(name: str, budget: int | float) -> Callable[[PreTrainedModel, Workload], Cache]:
    """What makes a cache of the library; of ShadowKVCache the budget is its `budget`."""

    def build(model: PreTrainedModel, workload: Workload) -> Cache:
        if name == "shadow":
            return ShadowKVCache(model.config, budget=budget)
        if name in ("streaming", "streaming-dense"):
            is_fraction = isinstance(budget, float)
            window_length = floor_of_product(budget, workload.num_tokens) if is_fraction else budget
            prefill = "dense" if name == "streaming-dense" else "streaming"
            return StreamingLLMCache(model.config, budget=window_length, prefill=prefill)
        return EVALUATED[name].build(model, budget, workload.num_tokens, 0)

    return build
