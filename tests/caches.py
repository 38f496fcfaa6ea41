"""The table of caches and settings that drives the tests of everything `generate` can do.

A new cache is covered by one row here and, where it keeps tokens by a rule of its own, a policy in `reference.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, StreamingLLMCache
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
    """

    name: str
    cache_class: type[CompressedCache]
    large: dict[str, Any]
    tight: dict[str, Any] = field(default_factory=dict)
    from_model: bool = False
    is_bounded: bool = True

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
    CacheCase("StreamingLLMCache(config)", StreamingLLMCache, {"window_length": 4096}, {"window_length": 12}),
    CacheCase(
        "StreamingLLMCache(config, prefill='dense')",
        StreamingLLMCache,
        {"window_length": 4096, "prefill": "dense"},
        {"window_length": 12, "prefill": "dense"},
    ),
)
BUDGETS = ("large", "tight")

every_cache = pytest.mark.parametrize("case", CACHE_CASES, ids=lambda case: case.name)
every_budget = pytest.mark.parametrize("budget", BUDGETS)
