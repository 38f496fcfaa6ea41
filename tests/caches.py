"""The table of caches and settings that drives the tests of everything `generate` can do.

A new cache is covered by one row here and, where it keeps tokens by a rule of its own, a policy in `reference.py` (for a
`Policy` of the package a `ReferenceScore` there, which serves every test that needs a reference).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache import (
    AdaKVCache,
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    KnormCache,
    MassiveActivationCache,
    PolicyCache,
    PyramidCache,
    PyramidKVCache,
    RKVCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.caches.shadow_kv import ShadowKVLayer
from pyramid_cache.engine.cache import CompressedCache


@dataclass(frozen=True)
class CacheCase:
    """A cache with its settings.

    Attributes:
        name: What the case is called in test ids and in docs/compatibility.md.
        cache_class: The cache.
        large: Settings under which nothing is evicted from prompts and answers of tests: as `DynamicCache`.
        tight: Settings under which a prompt of 40 tokens loses tokens in every layer but possibly the first.
        from_model: Whether it is built from the model itself instead of its config.
        is_bounded: Whether it holds no more however much is generated.
        evicts: Whether tokens that are not held are lost, instead of being brought back when they are attended to.
        tier: "quick" if the tests of every cache run with it always, "slow" if only with `-m slow`: what caches of one
            layer class have in common is tested on one of them.
        has_own_reference: Whether what it keeps is worked out in a test file of its own alone, because it depends on more
            than `HeldTokens` of reference.py.
    """

    name: str
    cache_class: type[CompressedCache]
    large: dict[str, Any]
    tight: dict[str, Any] = field(default_factory=dict)
    from_model: bool = False
    is_bounded: bool = True
    evicts: bool = True
    tier: str = "quick"
    has_own_reference: bool = False

    def is_full(self, num_kept: list[int]) -> bool:
        """Whether layers hold what a tight budget lets them hold on average, 12 tokens, but for those that wait to go."""
        num_waiting = self.tight.get("eviction_interval", 1) - 1
        return 12 * len(num_kept) <= sum(num_kept) <= (12 + num_waiting) * len(num_kept)

    @property
    def prunes_prefill(self) -> bool:
        """Whether hidden states are pruned while a prompt is read."""
        return self.cache_class is PyramidCache and self.from_model

    @property
    def has_one_graph(self) -> bool:
        """Whether `torch.compile` makes one graph of a decode step, because no size changes with it."""
        return self.is_bounded and not issubclass(self.cache_class, PolicyCache)

    def most_waits(self, num_layers: int, num_steps: int) -> int:
        """
        How often the host may ask the device for numbers in decode steps: never, but for heads that share a budget. How many
        tokens each of them keeps is asked once by each layer at each eviction.
        """
        if self.cache_class is not AdaKVCache:
            return 0
        return num_layers * (num_steps // self.tight["eviction_interval"] + 1)

    def build(self, model: PreTrainedModel, budget: str = "tight") -> CompressedCache:
        """A new cache for a model, `budget` being "large" or "tight"."""
        return self.build_from(model if self.from_model else model.config, budget)

    def build_from(self, source: PreTrainedConfig | PreTrainedModel, budget: str = "tight") -> CompressedCache:
        """A new cache from what the constructor is given."""
        return self.cache_class(source, **getattr(self, budget))


CACHE_CASES = (
    CacheCase("PyramidCache(config)", PyramidCache, {"budget": 4096}, {"budget": 0.4}, is_bounded=False),
    CacheCase(
        "PyramidCache(model)", PyramidCache, {"budget": 4096}, {"budget": 0.4}, from_model=True, is_bounded=False
    ),
    CacheCase("H2OCache(config)", H2OCache, {"budget": 4096}, {"budget": 12}),
    CacheCase("StreamingLLMCache(config)", StreamingLLMCache, {"budget": 4096}, {"budget": 12}),
    CacheCase(
        "StreamingLLMCache(config, prefill='dense')",
        StreamingLLMCache,
        {"budget": 4096, "prefill": "dense"},
        {"budget": 12, "prefill": "dense"},
    ),
    CacheCase(
        "SnapKVCache(config)",
        SnapKVCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3},
    ),
    CacheCase(
        "AdaKVCache(config)",
        AdaKVCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3},
        tier="slow",
        has_own_reference=True,
    ),
    CacheCase(
        "PyramidKVCache(config)",
        PyramidKVCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "beta": 3.0, "eviction_interval": 2},
        tier="slow",
    ),
    CacheCase("TOVACache(config)", TOVACache, {"budget": 4096}, {"budget": 12, "eviction_interval": 1}, tier="slow"),
    CacheCase(
        "KeyDiffCache(config)", KeyDiffCache, {"budget": 4096}, {"budget": 12, "eviction_interval": 4}, tier="slow"
    ),
    CacheCase("KnormCache(config)", KnormCache, {"budget": 4096}, {"budget": 12, "eviction_interval": 3}, tier="slow"),
    CacheCase(
        "ExpectedAttentionCache(config)",
        ExpectedAttentionCache,
        {"budget": 4096},
        {"budget": 12, "eviction_interval": 3},
        tier="slow",
        has_own_reference=True,
    ),
    CacheCase(
        "MassiveActivationCache(config)",
        MassiveActivationCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3},
        tier="slow",
        has_own_reference=True,
    ),
    CacheCase(
        "MassiveActivationCache(model)",
        MassiveActivationCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3},
        from_model=True,
        tier="slow",
        has_own_reference=True,
    ),
    CacheCase(
        "RKVCache(config)",
        RKVCache,
        {"budget": 4096},
        {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 4},
        tier="slow",
    ),
    CacheCase(
        "ShadowKVCache(config)",
        ShadowKVCache,
        {"budget": 4096},
        {
            "budget": 4,
            "rank": 6,
            "chunk_size": 2,
            "num_outlier_chunks": 1,
            "num_local_tokens": 2,
            "offload_interval": 2,
        },
        is_bounded=False,
        evicts=False,
        tier="slow",
        has_own_reference=True,
    ),
)
BUDGETS = ("large", "tight")


@contextmanager
def shadow_within_reach(config: PreTrainedConfig) -> Iterator[ShadowKVCache]:
    """A cache of full rank each of whose steps attends to everything, most of it from the shadow: as what was never taken apart."""
    settings = {"chunk_size": 2, "num_outlier_chunks": 1, "num_local_tokens": 2, "offload_interval": 2}
    with patch.object(ShadowKVLayer, "num_tokens_to_keep", lambda layer, row_length: 11):
        yield ShadowKVCache(config, budget=400, rank=10_000, **settings)


def parametrize_cases(cases: Iterable[CacheCase]) -> pytest.MarkDecorator:
    """Runs a test with each of some cases, those of the slow tier only with `-m slow`."""
    parameters = [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if case.tier == "slow" else ()) for case in cases
    ]
    return pytest.mark.parametrize("case", parameters)


every_cache = parametrize_cases(CACHE_CASES)
every_budget = pytest.mark.parametrize("budget", BUDGETS)
