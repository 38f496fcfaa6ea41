"""The table of caches and settings that drives the tests of everything `generate` can do.

A new cache is covered by one row here and, where it keeps tokens by a rule of its own, a policy in `reference.py`
(for a `Policy` of the package a `ReferenceScore` there, which serves every test that needs a reference).
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache import AdaKVCache, DefensiveKVCache, PolicyCache, PyramidCache, ShadowKVCache
from pyramid_cache.caches.shadow_kv.layer import ShadowKVLayer
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.policy_cache import CommonOptions, EvictionOptions
from pyramid_cache.engine.replay import ReplayingCache
from pyramid_cache.lab.registry import CACHES


@dataclass(frozen=True)
class CacheCase:
    """A cache with its settings.

    Attributes:
        short_name: Its row in the registry.
        tight: Settings under which a prompt of 40 tokens loses tokens in every layer but possibly the first. Without a
            budget, those under which its oldest tokens are quantised.
        from_model: Whether it is built from the model itself instead of its config.
        is_bounded: Whether it holds no more however much is generated.
        evicts: Whether tokens are lost. Others bring back what they do not hold when it is attended to, or hold all.
        tier: "quick" if the tests of every cache run with it always, "slow" if only with `-m slow`: what caches of one
            layer class have in common is tested on one of them.
        has_own_reference: Whether what it keeps is worked out in a test file of its own alone, because it depends on
            more than `HeldTokens` of reference.py.
        always: Settings whatever the budget.
        records: Whether tokens may be taken back, as assisted generation does.
        compacts: Whether tokens that stay are changed, to stand for those that go or by being quantised.
    """

    short_name: str
    tight: dict[str, Any]
    from_model: bool = False
    is_bounded: bool = True
    evicts: bool = True
    tier: str = "slow"
    has_own_reference: bool = False
    always: dict[str, Any] = field(default_factory=dict)
    records: bool = True
    compacts: bool = False

    @property
    def cache_class(self) -> type[CompressedCache]:
        """The cache."""
        return CACHES[self.short_name].cache_class

    @property
    def name(self) -> str:
        """What the case is called in test ids and in docs/compatibility.md."""
        settings = [f"{name}={value!r}" for name, value in CACHES[self.short_name].settings.items()]
        return f"{self.cache_class.__name__}({', '.join(['model' if self.from_model else 'config', *settings])})"

    @property
    def large(self) -> dict[str, Any]:
        """Settings under which prompts and answers of tests stay as they are: as in `DynamicCache`."""
        settings = {"budget": 4096} if self.has_budget else {}
        settings |= {"residual_length": 4096} if self.quantizes else {}
        return {**settings, **CACHES[self.short_name].settings, **self.always}

    @property
    def has_budget(self) -> bool:
        """Whether it is given a budget. Without one it holds all tokens."""
        return CACHES[self.short_name].has_budget

    @property
    def brings_back(self) -> bool:
        """Whether tokens that are not held are brought back when they are attended to."""
        return self.has_budget and not self.evicts

    def is_full(self, num_kept: list[int]) -> bool:
        """
        Whether layers hold what a tight budget lets them hold on average, 12 tokens, but for those that wait to go.
        """
        if not isinstance(self.tight.get("budget"), int):
            return True
        num_waiting = self.tight.get("eviction_interval", 1) - 1
        return 12 * len(num_kept) <= sum(num_kept) <= (12 + num_waiting) * len(num_kept)

    @property
    def prunes_prefill(self) -> bool:
        """Whether hidden states are pruned while a prompt is read."""
        return self.cache_class is PyramidCache and self.from_model

    @property
    def reads_again(self) -> bool:
        """Whether prompts are read a second time, for which token ids are needed and no encoder."""
        return issubclass(self.cache_class, ReplayingCache)

    @property
    def has_one_graph(self) -> bool:
        """Whether `torch.compile` makes one graph of a decode step, because no size changes with it."""
        return self.is_bounded and self.tight.get("eviction_interval", 1) == 1 and not self.quantizes

    @property
    def heads_compete(self) -> bool:
        """Whether heads share what their layer holds, which then keep different numbers of tokens."""
        return issubclass(self.cache_class, (AdaKVCache, DefensiveKVCache, ReplayingCache))

    @property
    def quantizes(self) -> bool:
        """Whether older tokens are quantised, or have thin keys."""
        return "residual_length" in self.tight

    def most_waits(self, num_layers: int, num_steps: int) -> int:
        """
        How often the host may ask the device for numbers in decode steps: never, but for heads that share a budget.
        How many tokens each of them keeps is asked once by each layer at each eviction. If older tokens are quantised,
        it is asked once for each block.
        """
        if self.quantizes:
            return num_layers * 2 * num_steps
        if not self.heads_compete:
            return 0
        return num_layers * (num_steps // self.tight["eviction_interval"] + 1)

    def build(self, model: PreTrainedModel, budget: str = "tight") -> CompressedCache:
        """A new cache for a model, `budget` being "large" or "tight"."""
        return self.make(model, getattr(self, budget))

    def make(self, model: PreTrainedModel, settings: dict[str, Any]) -> CompressedCache:
        """A new cache for a model with settings of one's own."""
        return self.cache_class(model if self.from_model else model.config, **{**settings, **self.always})

    def build_from(self, source: PreTrainedConfig | PreTrainedModel, budget: str = "tight") -> CompressedCache:
        """A new cache from what the constructor is given."""
        return self.cache_class(source, **{**getattr(self, budget), **self.always})


TWELVE = {"budget": 12}
BY_ATTENTION = {**TWELVE, "window_size": 4, "kernel_size": 3, "eviction_interval": 3}
BY_CHUNKS = {"rank": 6, "chunk_size": 2, "num_outlier_chunks": 1, "num_local_tokens": 2, "offload_interval": 2}
PYRAMID = {"budget": 0.4, "eviction_interval": 3, "decay_ratio": 0.3, "prefill_depth": 0.0}
CACHE_CASES = (
    CacheCase("pyramid-config", PYRAMID, tier="quick"),
    CacheCase("pyramid", PYRAMID, from_model=True, tier="quick"),
    CacheCase("h2o", TWELVE, tier="quick"),
    CacheCase("streaming", TWELVE, tier="quick"),
    CacheCase("snapkv", BY_ATTENTION, tier="quick"),
    CacheCase("adakv", BY_ATTENTION, has_own_reference=True),
    CacheCase("critical", BY_ATTENTION, has_own_reference=True),
    CacheCase("defensive", BY_ATTENTION, has_own_reference=True),
    CacheCase("layer-defensive", BY_ATTENTION, has_own_reference=True, records=False),
    CacheCase("pyramidkv", {**TWELVE, "window_size": 4, "beta": 3.0, "eviction_interval": 2}),
    CacheCase("vl", {**TWELVE, "window_size": 4, "eviction_interval": 3}, has_own_reference=True, records=False),
    CacheCase("tova", {**TWELVE, "eviction_interval": 1}),
    CacheCase("keydiff", {**TWELVE, "eviction_interval": 4}),
    CacheCase("knorm", {**TWELVE, "eviction_interval": 3}),
    CacheCase("expected-attention", {**TWELVE, "eviction_interval": 3}, has_own_reference=True),
    CacheCase("massive", BY_ATTENTION, has_own_reference=True),
    CacheCase(
        "kv-merger", {**TWELVE, "threshold": 0.3, "eviction_interval": 3}, has_own_reference=True, compacts=True
    ),
    CacheCase("rkv", {**BY_ATTENTION, "eviction_interval": 4}),
    CacheCase(
        "kvzip-plus",
        {**TWELVE, "chunk_size": 16, "eviction_interval": 3},
        from_model=True,
        has_own_reference=True,
        always={"texts": ((5, 6), (5, 7), (8,))},
        records=False,
    ),
    CacheCase(
        "matching",
        {**TWELVE, "chunk_size": 16, "num_references": 64, "eviction_interval": 3},
        from_model=True,
        has_own_reference=True,
        always={"texts": ((5, 6), (5, 7), (8,))},
        records=False,
        compacts=True,
    ),
    CacheCase(
        "scissorhands",
        {**TWELVE, "window_size": 8, "num_recent": 3, "eviction_interval": 3},
        has_own_reference=True,
    ),
    CacheCase(
        "snapkv-kivi4",
        {**BY_ATTENTION, "quantize": "kivi4", "residual_length": 4},
        has_own_reference=True,
        compacts=True,
    ),
    CacheCase(
        "snapkv-think",
        {**BY_ATTENTION, "thin_keys": 0.4, "residual_length": 4},
        has_own_reference=True,
        compacts=True,
    ),
    CacheCase("shadow", {"budget": 4, **BY_CHUNKS}, is_bounded=False, evicts=False, has_own_reference=True),
    CacheCase(
        "kivi",
        {"residual_length": 4, "group_size": 8},
        is_bounded=False,
        evicts=False,
        has_own_reference=True,
        compacts=True,
    ),
)
RECORDING_CASES = tuple(case for case in CACHE_CASES if case.records)
PLAIN_CASES = tuple(case for case in CACHE_CASES if not case.reads_again)
QUICK_CASES = tuple(case for case in CACHE_CASES if case.tier == "quick")
BUDGETS = ("large", "tight")


@contextmanager
def shadow_within_reach(config: PreTrainedConfig) -> Iterator[ShadowKVCache]:
    """
    A cache of full rank each of whose steps attends to everything, most of it from the shadow: as what was never
    taken apart.
    """
    with patch.object(ShadowKVLayer, "num_tokens_to_keep", lambda layer, row_length: 11):
        yield ShadowKVCache(config, budget=400, **{**BY_CHUNKS, "rank": 10_000})


def parametrize_cases(cases: Iterable[CacheCase]) -> pytest.MarkDecorator:
    """Runs a test with each of some cases, those of the slow tier only with `-m slow`."""
    parameters = [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.tier == "slow" else ()) for case in cases
    ]
    return pytest.mark.parametrize("case", parameters)


def pair_with_caches(
    name: str, values: Iterable[Any], cases: Sequence[CacheCase] = CACHE_CASES, shift: int = 0
) -> pytest.MarkDecorator:
    """
    Runs a test with pairs of a value and a cache: what a value does and what a cache does seldom depend on each other.
    The quick tier has each value and each of its caches in one pair at least, the slow tier every third pair.
    """
    values = list(values)
    period = min(3, len(values))
    quick = [case for case in cases if case.tier == "quick"]
    chosen = {
        (turn % len(values), quick[(turn + shift) % len(quick)].name) for turn in range(max(len(values), len(quick)))
    }
    parameters = [
        pytest.param(
            value,
            case,
            id=f"{getattr(value, 'name', value)}-{case.name}",
            marks=() if (place, case.name) in chosen else pytest.mark.slow,
        )
        for place, value in enumerate(values)
        for column, case in enumerate(cases)
        if (place, case.name) in chosen or (place + column) % period == 0
    ]
    return pytest.mark.parametrize(f"{name}, case", parameters)


OPTIONS = {name for each in (CommonOptions, EvictionOptions) for name in each.__annotations__}
PASSED_ON = {name: each for name, each in inspect.signature(PolicyCache).parameters.items() if name in OPTIONS}


def parameters_of(cache_class: type[CompressedCache]) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor by name, those included that it passes on as `**options`."""
    own = dict(inspect.signature(cache_class).parameters)
    if own.pop("options", None) is None:
        return own
    return own | {name: each for name, each in PASSED_ON.items() if name not in own}


every_cache = parametrize_cases(CACHE_CASES)
# Those whose steps can have fixed shapes.
every_fixed = parametrize_cases(case for case in CACHE_CASES if not case.quantizes)
every_budget = pytest.mark.parametrize("budget", BUDGETS)
