"""
The caches that the lab measures: one row each. A new cache needs one row here to be in every command and every table.
A budget is a fraction of the prompt (`0.25`), tokens per layer (`512`) or bytes (`"256MiB"`). Further arguments stand
behind a name: `layer-defensive:quantize=kivi4`.
"""

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args, get_type_hints

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
    # Further arguments of the constructor. KVSharerCache has `num_shared` instead: how many layers share.
    settings: Mapping[str, Any] = field(default_factory=dict)
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
        return self.takes_budget and self.row not in TRANSFORMERS

    @property
    def row(self) -> str:
        """The name of the row that it is, or that further arguments were given to."""
        return self.name.partition(":")[0]

    @property
    def quantizes(self) -> bool:
        """Whether it holds numbers in fewer bits than the model has them."""
        return "quantize" in self.settings or issubclass(self.cache_class, (library.KIVICache, QuantizedCache))

    def with_arguments(self, arguments: Sequence[str]) -> "CacheEntry":
        """The same with further arguments of the constructor, "name=value" each; ValueError if it takes no such."""
        added: dict[str, Any] = {}
        for argument in arguments:
            name, _, value = argument.partition("=")
            if not value or name not in arguments_of(self.cache_class):
                known = ", ".join(f"{each}=…" for each in arguments_of(self.cache_class)) or "none"
                raise ValueError(f"{argument!r} is no argument of `{self.cache_class.__name__}`, which takes {known}.")
            added[name] = read_value(value)
        shown = ", ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in added.items())
        label = f"{self.label[:-1]}, {shown})" if self.label.endswith(")") else f"{self.label}({shown})"
        return replace(self, name=":".join((self.name, *arguments)), label=label, settings={**self.settings, **added})

    def build(self, model: PreTrainedModel, budget: BudgetLike, workload: Workload) -> Cache:
        """
        A new cache for a model; a ValueError if it refuses the budget, or cannot be built here. The caches of
        transformers ignore the budget. For ShadowKVCache fractions and bytes pay for all that a step attends to.
        """
        if self.row in TRANSFORMERS:
            return build_of_transformers(self, model, workload)
        settings, build = dict(self.settings), cast(Any, self.cache_class)
        if self.cache_class is library.ShadowKVCache and parse_budget(budget).kind != "tokens":
            budget, tail = shadow_settings(tokens_of_budget(budget, model, workload))
            settings = tail | settings
        if self.cache_class is library.KVSharerCache:
            from pyramid_cache.lab.profile.sharing import sharing_of  # which reads texts

            settings["sharing"] = sharing_of(model, settings.pop("num_shared"), workload.has_tokenizer)
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


def build_of_transformers(entry: CacheEntry, model: PreTrainedModel, workload: Workload) -> Cache:
    """A new one of the caches in `TRANSFORMERS`."""
    if entry.row == "static":
        return StaticCache(config=model.config, max_cache_len=workload.num_tokens + workload.num_later)
    if entry.row == "quantized":
        try:
            return QuantizedCache(config=model.config, **{"backend": "quanto", **entry.settings})
        except ImportError as error:
            raise ValueError(f"The cache `{entry.name}` needs another package: {error}") from error
    if entry.row == "offloaded" and model.device.type == "cpu":
        raise ValueError("The cache `offloaded` moves layers to the host: choose another device than the cpu.")
    return DynamicCache(config=model.config, offloading=entry.row == "offloaded")


TRANSFORMERS = {
    entry.name: entry
    for entry in (
        CacheEntry(BASELINE, "DynamicCache", DynamicCache),
        CacheEntry("static", "StaticCache", StaticCache, copies_rows=False),
        CacheEntry("quantized", "QuantizedCache", QuantizedCache, takes_batches=False, copies_rows=False),
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
        CacheEntry("snapkv-think", "SnapKVCache(think)", library.SnapKVCache, {"thin_keys": 0.4}),
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
        CacheEntry("minicache", "MiniCache", library.MiniCache, takes_budget=False),
        *(
            CacheEntry(name, label, library.KVSharerCache, {"num_shared": num}, from_model=True, takes_budget=False)
            for name, label, num in (
                ("kv-sharer-2", "KVSharerCache(2 layers)", 2),
                ("kv-sharer", "KVSharerCache", 4),
                ("kv-sharer-8", "KVSharerCache(8 layers)", 8),
            )
        ),
        CacheEntry("streaming", "StreamingLLMCache", library.StreamingLLMCache),
    )
}
# The row that a class's name stands for. `PyramidCache` is built from the model, which prunes the prefill as in its
# paper.
BY_CLASS = {entry.label: name for name, entry in (TRANSFORMERS | CACHES).items() if entry.label.isidentifier()}
BY_CLASS |= {"PyramidCache": "pyramid", "QuantizedCache": "quantized"}


@dataclass(frozen=True)
class Contender:
    """A cache at a budget. Caches without one ignore it."""

    entry: CacheEntry
    budget: BudgetLike = 1.0

    @property
    def name(self) -> str:
        """What commands call it."""
        return f"{self.entry.name}:{self.budget}" if self.entry.has_budget else self.entry.name

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.entry.label}, {self.budget}" if self.entry.has_budget else self.entry.label

    def build(self, model: PreTrainedModel, workload: Workload) -> Cache:
        """A new cache for a model; a ValueError if it refuses the budget, or cannot be built here."""
        return self.entry.build(model, self.budget, workload)


def read_contender(text: str) -> Contender:
    """Reads "snapkv:0.25"; ValueError unless a cache that takes a budget has one, and others none."""
    *words, last = text.split(":")
    if not words or "=" in last:
        words, last = [*words, last], ""
    if more := [word for word in words[1:] if "=" not in word]:
        raise ValueError(f"{text!r} has more than one budget: {', '.join([*more, last])}. Give one.")
    entry = find_entry(":".join(words))
    if entry.has_budget != bool(last):
        problem = f"takes no budget. Give {entry.name!r}" if last else f"has no budget. Give one: {entry.name}:0.25"
        raise ValueError(f"{text!r} {problem}.")
    return Contender(entry, read_budget(last)) if last else Contender(entry)


def find_entry(name: str) -> CacheEntry:
    """
    A cache by its short name or by the name of its class, with arguments if there are some behind it, as in
    "snapkv:quantize=kivi4". ValueError if there is none.
    """
    every = TRANSFORMERS | CACHES
    base, *arguments = name.split(":")
    short = BY_CLASS.get(base, base)
    if short not in every:
        raise ValueError(f"{base!r} is no cache. Choose from {', '.join(every)}, or give the name of a class.")
    return every[short].with_arguments(arguments) if arguments else every[short]


def arguments_of(cache_class: type[Cache]) -> list[str]:
    """The names of what a cache can be given behind its name. The full caches take nothing."""
    if cache_class in (DynamicCache, StaticCache):
        return []
    found = list(inspect.signature(cache_class).parameters)
    for passed_on in get_args(get_type_hints(cache_class.__init__).get("options")):
        found += passed_on.__annotations__
    return [name for name in found if name not in ("config", "model", "budget", "options")]


def read_value(text: str) -> Any:
    """Reads "4", "0.5" and "true" as what they are, and all else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_budget(text: str) -> BudgetLike:
    """Reads "512" as tokens, "0.25" as a fraction and "256MiB" as bytes; ValueError for anything else."""
    value: BudgetLike = text
    for convert in (float, int):
        with contextlib.suppress(ValueError):
            value = convert(text)
    parse_budget(value)
    return value
