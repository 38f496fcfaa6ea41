"""The caches that are evaluated: one row each. A new cache needs nothing else to be in every table of results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from pyramid_cache import (
    AdaKVCache,
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    KnormCache,
    MassiveActivationCache,
    PyramidCache,
    PyramidKVCache,
    RKVCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.engine.budget import floor_of_product
from pyramid_cache.engine.cache import CompressedCache


# Called with the model, the budget as a fraction, the tokens of the prompt that it is a fraction of, and how many tokens at
# most come behind them.
CacheBuilder = Callable[[PreTrainedModel, float, int, int], CompressedCache]

BASELINE = "dynamic"
BASELINE_LABEL = "DynamicCache"


@dataclass(frozen=True)
class EvaluatedCache:
    """
    A cache under evaluation.

    Attributes:
        label (`str`): What tables call it.
        build (`Callable`): Makes a new one.
        reading (`str`): How it reads a prompt. "dense": with full attention, after which it evicts; one reading then serves
            all such caches. "stream": each token sees what it would see had the tokens come one by one; it makes no
            difference then whether a question is read with its context or after it. "own": in another way.
        reads_answers_by_step (`bool`): Whether a decode step sees something else than several tokens that come at once, so
            that answers are read as they would be generated, token by token.
        takes_batches (`bool`): Whether it is built for any length of prompt, so that one reads prompts of several lengths in a
            batch. Others are asked about one context after another.
    """

    label: str
    build: CacheBuilder
    reading: Literal["dense", "stream", "own"] = "dense"
    reads_answers_by_step: bool = False
    takes_batches: bool = False


def from_config(cache_class: Callable[..., CompressedCache], **settings: object) -> CacheBuilder:
    """Builds a cache that takes the model's config and a budget."""
    return lambda model, budget, num_tokens, num_later: cache_class(model.config, budget, **settings)


def streaming(prefill: str) -> CacheBuilder:
    """
    Builds a StreamingLLMCache that still holds the budget when the last token of an answer has come: other caches evict
    nothing meanwhile. Its window has one token beside the sinks at least.
    """

    def build(model: PreTrainedModel, budget: float, num_tokens: int, num_later: int) -> StreamingLLMCache:
        window_length = max(floor_of_product(budget, num_tokens), 5) + num_later
        return StreamingLLMCache(model.config, budget=window_length, prefill=prefill)

    return build


def shadow(model: PreTrainedModel, budget: float, num_tokens: int, num_later: int) -> ShadowKVCache:
    """
    Builds a ShadowKVCache whose steps attend to the budget: outliers take a quarter of it, the latest tokens another, as far as
    the defaults go, and chunks of the shadow the rest.
    """
    num_attended = floor_of_product(budget, num_tokens)
    settings = {"num_outlier_chunks": min(num_attended // 32, 48), "num_local_tokens": min(num_attended // 4, 32)}
    num_others = 8 * settings["num_outlier_chunks"] + settings["num_local_tokens"] + 8
    return ShadowKVCache(model.config, max(num_attended - num_others, 1), offload_interval=8, **settings)


CACHES: dict[str, EvaluatedCache] = {
    "h2o": EvaluatedCache("H2OCache", from_config(H2OCache), takes_batches=True),
    "snapkv": EvaluatedCache("SnapKVCache", from_config(SnapKVCache), takes_batches=True),
    "pyramidkv": EvaluatedCache("PyramidKVCache", from_config(PyramidKVCache), takes_batches=True),
    "adakv": EvaluatedCache("AdaKVCache", from_config(AdaKVCache), takes_batches=True),
    "tova": EvaluatedCache("TOVACache", from_config(TOVACache), takes_batches=True),
    "keydiff": EvaluatedCache("KeyDiffCache", from_config(KeyDiffCache), takes_batches=True),
    "knorm": EvaluatedCache("KnormCache", from_config(KnormCache), takes_batches=True),
    "expected-attention": EvaluatedCache(
        "ExpectedAttentionCache", from_config(ExpectedAttentionCache), takes_batches=True
    ),
    "rkv": EvaluatedCache("RKVCache", from_config(RKVCache), takes_batches=True),
    "massive": EvaluatedCache("MassiveActivationCache", from_config(MassiveActivationCache), takes_batches=True),
    "massive-follow": EvaluatedCache(
        "MassiveActivationCache, follow_attention",
        from_config(MassiveActivationCache, follow_attention=True),
        takes_batches=True,
    ),
    "pyramid-config": EvaluatedCache("PyramidCache(config)", from_config(PyramidCache), takes_batches=True),
    "pyramid": EvaluatedCache(
        "PyramidCache(model)",
        lambda model, budget, num_tokens, num_later: PyramidCache(model, budget),
        reading="own",
        takes_batches=True,
    ),
    "shadow": EvaluatedCache("ShadowKVCache", shadow, reads_answers_by_step=True),
    "streaming-dense": EvaluatedCache("StreamingLLMCache, dense", streaming("dense")),
    "streaming": EvaluatedCache("StreamingLLMCache", streaming("streaming"), reading="stream"),
}
