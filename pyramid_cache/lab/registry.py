"""
The caches that the lab measures: one row each. A new cache needs one row here to be in every command and every table.
A budget is a fraction of the prompt (`0.25`), tokens per layer (`512`) or bytes (`"256MiB"`).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

import pyramid_cache as library
from pyramid_cache.engine.budget import bytes_to_tokens, floor_of_product, parse_budget
from pyramid_cache.engine.replay import ReplayingCache


BudgetLike = float | int | str

BASELINE = "dynamic"


@dataclass(frozen=True)
class Workload:
    """What a cache is built for."""

    num_tokens: int  # tokens of the prompt, of which a fraction is taken
    batch_size: int = 1
    num_later: int = 0  # tokens that come behind the prompt at most: StaticCache has room for them from the start
    has_tokenizer: bool = True  # of the model; else caches that replay prompts put no instruction in front of them


@dataclass(frozen=True)
class CacheEntry:
    """A cache that can be measured."""

    name: str  # what commands call it
    label: str  # what tables call it
    cache_class: type[Cache]
    settings: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the constructor
    # The constructor is given the model instead of its config, and the cache reads prompts in a way of its own. Others
    # read them with full attention and evict afterwards: one reading serves them all.
    from_model: bool = False
    # A decode step sees something else than several tokens at once do: answers are read token by token.
    reads_answers_by_step: bool = False
    takes_batches: bool = True  # one cache reads prompts of several lengths; others are built for one length
    takes_budget: bool = True
    copies_rows: bool = True  # `batch_select_indices` makes many rows of one

    @property
    def has_budget(self) -> bool:
        """Whether it holds what a budget allows. The caches of transformers have none, and those that keep all."""
        return self.takes_budget and self.name not in TRANSFORMERS

    def build(self, model: PreTrainedModel, budget: BudgetLike, workload: Workload) -> Cache:
        """
        A new cache for a model; a ValueError if it refuses the budget, or cannot be built here. The caches of
        transformers ignore the budget. For ShadowKVCache fractions and bytes pay for all that a step attends to.
        """
        if self.name in TRANSFORMERS:
            return build_of_transformers(self.name, model, workload)
        settings, build = dict(self.settings), cast(Any, self.cache_class)
        if self.cache_class is library.ShadowKVCache and parse_budget(budget).kind != "tokens":
            budget, tail = shadow_settings(tokens_of_budget(budget, model, workload))
            settings = tail | settings
        if not workload.has_tokenizer and issubclass(self.cache_class, ReplayingCache):
            settings["texts"] = library.ReplayTexts((), (), ())
        budgets = [budget] if self.has_budget else []
        return build(model if self.from_model else model.config, *budgets, **settings)


def shadow_settings(num_attended: int) -> tuple[int, dict[str, int]]:
    """For steps that attend to so many tokens: up to a quarter each are outliers and the latest, the rest chunks."""
    num_chunks, num_local = min(num_attended // 32, 48), min(num_attended // 4, 32)
    settings = {"num_outlier_chunks": num_chunks, "num_local_tokens": num_local, "offload_interval": 8}
    return max(num_attended - (8 * num_chunks + num_local + 8), 1), settings


def tokens_of_budget(budget: BudgetLike, model: PreTrainedModel, workload: Workload) -> int:
    """The tokens per layer that a budget comes to for prompts of a given shape."""
    parsed = parse_budget(budget)
    if parsed.kind == "fraction":
        return floor_of_product(parsed.amount, workload.num_tokens)
    if parsed.kind == "tokens":
        return int(parsed.amount)
    config = model.config.get_text_config(decoder=True)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * num_kv_heads * head_dim * model.dtype.itemsize
    num_layers, num_rows = config.num_hidden_layers, workload.batch_size
    return bytes_to_tokens(int(parsed.amount), num_layers, num_rows, bytes_per_token, num_spare_slots=0)


def build_of_transformers(name: str, model: PreTrainedModel, workload: Workload) -> Cache:
    """A new one of the caches in `TRANSFORMERS`."""
    if name == "static":
        return StaticCache(config=model.config, max_cache_len=workload.num_tokens + workload.num_later)
    if name == "quantized":
        try:
            return QuantizedCache("quanto", model.config)
        except ImportError as error:
            raise ValueError(f"The cache `quantized` needs the package optimum-quanto: {error}") from error
    if name == "offloaded" and model.device.type == "cpu":
        raise ValueError("The cache `offloaded` moves layers to the host: choose another device than the cpu.")
    return DynamicCache(config=model.config, offloading=name == "offloaded")


TRANSFORMERS = {
    entry.name: entry
    for entry in (
        CacheEntry(BASELINE, "DynamicCache", DynamicCache),
        CacheEntry("static", "StaticCache", StaticCache, copies_rows=False),
        CacheEntry("quantized", "QuantizedCache, 4 bits", QuantizedCache, copies_rows=False),
        CacheEntry("offloaded", "DynamicCache, offloaded", DynamicCache, copies_rows=False),
    )
}
# The order is that of tables. Where a class has several rows, its own name stands for the one labelled with it alone.
CACHES = {
    entry.name: entry
    for entry in (
        CacheEntry("h2o", "H2OCache", library.H2OCache),
        CacheEntry("snapkv", "SnapKVCache", library.SnapKVCache),
        CacheEntry("h2o-merge", "H2OCache(merge)", library.H2OCache, {"merge": True, "eviction_interval": 8}),
        CacheEntry("snapkv-merge", "SnapKVCache(merge)", library.SnapKVCache, {"merge": True}),
        CacheEntry("snapkv-kivi4", "SnapKVCache(kivi4)", library.SnapKVCache, {"quantize": "kivi4"}),
        CacheEntry("pyramidkv", "PyramidKVCache", library.PyramidKVCache),
        CacheEntry("adakv", "AdaKVCache", library.AdaKVCache),
        CacheEntry("critical", "CriticalKVCache", library.CriticalKVCache),
        CacheEntry("critical-ada", "CriticalKVCache(layer)", library.CriticalKVCache, {"ranking": "layer"}),
        CacheEntry("defensive", "DefensiveKVCache", library.DefensiveKVCache),
        CacheEntry("layer-defensive", "LayerDefensiveKVCache", library.LayerDefensiveKVCache),
        CacheEntry(
            "layer-defensive-merge", "LayerDefensiveKVCache(merge)", library.LayerDefensiveKVCache, {"merge": True}
        ),
        CacheEntry(
            "layer-defensive-online",
            "LayerDefensiveKVCache(model-online)",
            library.LayerDefensiveKVCache,
            {"ranking": "model-online"},
        ),
        CacheEntry("tova", "TOVACache", library.TOVACache),
        CacheEntry("keydiff", "KeyDiffCache", library.KeyDiffCache),
        CacheEntry("knorm", "KnormCache", library.KnormCache),
        CacheEntry("expected-attention", "ExpectedAttentionCache", library.ExpectedAttentionCache),
        CacheEntry("rkv", "RKVCache", library.RKVCache),
        CacheEntry("scissorhands", "ScissorhandsCache", library.ScissorhandsCache),
        CacheEntry("massive", "MassiveActivationCache", library.MassiveActivationCache),
        CacheEntry("kv-merger", "KVMergerCache", library.KVMergerCache),
        CacheEntry("vl", "VLCache", library.VLCache),
        CacheEntry("kvzip", "KVzipCache", library.KVzipCache, from_model=True),
        CacheEntry("kvzip-plus", "KVzipPlusCache", library.KVzipPlusCache, from_model=True),
        CacheEntry("matching", "AttentionMatchingCache", library.AttentionMatchingCache, from_model=True),
        CacheEntry("pyramid-config", "PyramidCache(config)", library.PyramidCache),
        CacheEntry("pyramid", "PyramidCache(model)", library.PyramidCache, from_model=True),
        CacheEntry("shadow", "ShadowKVCache", library.ShadowKVCache, reads_answers_by_step=True, takes_batches=False),
        CacheEntry("kivi", "KIVICache", library.KIVICache, takes_budget=False),
        CacheEntry("kivi2", "KIVICache(2 bits)", library.KIVICache, {"nbits": 2}, takes_budget=False),
        CacheEntry("streaming", "StreamingLLMCache", library.StreamingLLMCache),
    )
}
# The row that a class's name stands for. `PyramidCache` is built from the model, which prunes the prefill as in its
# paper.
BY_CLASS = {entry.label: name for name, entry in (TRANSFORMERS | CACHES).items() if entry.label.isidentifier()}
BY_CLASS |= {"PyramidCache": "pyramid", "QuantizedCache": "quantized"}


def find_entry(name: str) -> CacheEntry:
    """The row of a cache, by its short name or by the name of its class; ValueError if there is none."""
    every = TRANSFORMERS | CACHES
    short = BY_CLASS.get(name, name)
    if short not in every:
        raise ValueError(f"{name!r} is no cache. Choose from {', '.join(every)}, or give the name of a class.")
    return every[short]


def read_budget(text: str) -> BudgetLike:
    """Reads "512" as tokens, "0.25" as a fraction and "256MiB" as bytes; ValueError for anything else."""
    value: BudgetLike = text
    for convert in (float, int):
        with contextlib.suppress(ValueError):
            value = convert(text)
    parse_budget(value)
    return value
