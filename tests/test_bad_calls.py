"""Bad calls: each has its own clear error, and afterwards the cache goes on as if it had not been made, or asks for `reset()`."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import build_config, build_model, left_pad, random_rows, random_tokens, tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pyramid_cache import (
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    KnormCache,
    PyramidCache,
    PyramidKVCache,
    RKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import pyramid_schedule
from pyramid_cache.engine.cache import CompressedCache


# Construction.

NO_NUMBERS: list[Any] = [
    None,
    "12",
    "",
    [12],
    (12,),
    {"tokens": 12},
    True,
    False,
    np.bool_(True),
    1j,
    b"12",
    torch.tensor(12),
    np.array([12]),
    math.nan,
    math.inf,
    -math.inf,
    int,
]
NO_COUNTS: list[Any] = [*NO_NUMBERS, 12.5, 12.0, np.float64(12), -1, -(10**30), 2**31, 10**30]
NO_SHARES: list[Any] = [*NO_NUMBERS, -0.1, 1.1, -1, 2, 10**30, torch.tensor(0.5)]
NO_BUDGETS: list[Any] = [
    *(value for value in NO_NUMBERS),
    *(0, 0.0, -3, -0.4, 1.5, 40.0, 2**31, 10**30, np.int64(0), np.float32(-0.5), Fraction(3, 2), torch.tensor(0.4)),
    *("12 apples", "MiB", "-4MiB", "0MiB", "0.4", "40%", "1e3MB", "0.2B", "12 TiB of memory", "nanMiB"),
]
IMPOSSIBLE: dict[tuple[type[CompressedCache], str], list[Any]] = {
    (PyramidCache, "budget"): [*NO_BUDGETS, 1, 4],
    (H2OCache, "budget"): NO_BUDGETS,
    (H2OCache, "heavy_ratio"): [*NO_SHARES, 1.0],
    (StreamingLLMCache, "budget"): [*NO_COUNTS, 0, 3, 4],
    (StreamingLLMCache, "num_sink_tokens"): [*NO_COUNTS, 12, 13],
    (StreamingLLMCache, "prefill"): ["sparse", "Dense", "", None, True, ["dense"], np.array(["dense"]), b"dense"],
    (PyramidCache, "preset"): ["llama-9-900b", "", 7, True, ["llama-2-7b"], np.array(["llama-2-7b"])],
    # None stands for the default.
    (PyramidCache, "recent_ratio"): [*NO_SHARES[1:], 1.0, 0.4, 0.7],
    (PyramidCache, "num_sink_tokens"): NO_COUNTS,
    (PyramidCache, "min_context_length"): NO_COUNTS,
    (PyramidCache, "distance_weight"): [*NO_NUMBERS, 0, 0.0, -1.2, 1e300],
    (PyramidCache, "decay_ratio"): [*NO_SHARES, 0, 0.0],
    (PyramidCache, "first_pruned_layer"): [*NO_COUNTS, 3, 2],
    (PyramidCache, "prune_own_layer"): ["no", 0, 1, [], np.bool_(False), torch.tensor(True)],
    (SnapKVCache, "budget"): NO_BUDGETS,
    (SnapKVCache, "window_size"): [*NO_COUNTS, 0],
    (SnapKVCache, "kernel_size"): [*NO_COUNTS, 0, 4],
    (SnapKVCache, "eviction_interval"): [*NO_COUNTS, 0],
    (PyramidKVCache, "window_size"): [*NO_COUNTS, 0],
    (PyramidKVCache, "kernel_size"): [*NO_COUNTS, 0, 4],
    (PyramidKVCache, "beta"): [*NO_NUMBERS, 0, 0.5, -2, 2**31, 10**30],
    (TOVACache, "eviction_interval"): [*NO_COUNTS, 0],
    (KeyDiffCache, "eviction_interval"): [*NO_COUNTS, 0],
    (KnormCache, "eviction_interval"): [*NO_COUNTS, 0],
    (ExpectedAttentionCache, "num_future_positions"): [*NO_COUNTS, 0],
    (ExpectedAttentionCache, "num_sink_tokens"): NO_COUNTS,
    (ExpectedAttentionCache, "use_covariance"): ["no", 0, 1, [], np.bool_(False), torch.tensor(True)],
    (ExpectedAttentionCache, "epsilon"): [*NO_NUMBERS, -0.1],
    (RKVCache, "window_size"): [*NO_COUNTS, 0],
    (RKVCache, "kernel_size"): [*NO_COUNTS, 0, 4],
    (RKVCache, "importance_weight"): NO_SHARES,
    (RKVCache, "similarity_threshold"): NO_SHARES,
    (RKVCache, "eviction_interval"): [*NO_COUNTS, 0],
}
REQUIRED: dict[type[CompressedCache], dict[str, Any]] = {
    PyramidCache: {},
    H2OCache: {},
    StreamingLLMCache: {"budget": 12},
    **dict.fromkeys((SnapKVCache, PyramidKVCache, TOVACache, KeyDiffCache, KnormCache), {}),
    **dict.fromkeys((ExpectedAttentionCache, RKVCache), {}),
}


def shown(value: Any) -> str:
    """How a message shows a value, as a pattern; a long one may be cut."""
    return "".join(character if character.isalnum() else "." for character in str(value))[:20]


@pytest.mark.parametrize(
    "cache_class, argument, value",
    [(*key, value) for key, values in IMPOSSIBLE.items() for value in values],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value)[:30],
)
def test_impossible_settings(cache_class: type[CompressedCache], argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"(?s)(?=.*`{argument}\\b)(?=.*{shown(value)})"):
        cache_class(build_config("llama"), **REQUIRED[cache_class] | {argument: value})


@pytest.mark.parametrize("cache_class", REQUIRED)
@pytest.mark.parametrize(
    "source, match",
    [
        ("meta-llama/Llama-2-7b", "config.*str"),
        (None, "config.*NoneType"),
        (32, "config.*int"),
        (LlamaConfig, "config.*class LlamaConfig"),
        (PreTrainedModel, "config.*class PreTrainedModel"),
        (torch.nn.Linear(2, 2), "config.*Linear"),
        (build_config("llama").to_dict(), "config.*dict"),
        ([build_config("llama")], "config.*list"),
        (GenerationConfig(), "config.*GenerationConfig"),
        (DynamicCache(), "config.*DynamicCache"),
        (
            BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32),
            "bert.*encoder",
        ),
        (T5Config(d_model=32, num_layers=2, num_heads=2), "t5.*Use DynamicCache|t5.*encoder-decoder"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_something_that_is_no_config_of_a_decoder(cache_class: type[CompressedCache], source: Any, match: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=match):
        cache_class(source, **REQUIRED[cache_class])


@pytest.mark.parametrize("cache_class", REQUIRED)
def test_arguments_that_do_not_exist(cache_class: type[CompressedCache]) -> None:
    for arguments in ({"bugdet": 12}, {"num_sinks": 4}, {"window_sise": 12}, {"offloading": True}):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            cache_class(build_config("llama"), **REQUIRED[cache_class], **arguments)
    with pytest.raises(TypeError, match="positional"):
        cache_class(build_config("llama"), 12, 0.5, 4, "dense", 3)
    with pytest.raises(TypeError, match="config"):
        cache_class(**REQUIRED[cache_class])


@pytest.mark.parametrize(
    "cache_class, settings, plain",
    [
        (PyramidCache, {"budget": np.float32(0.5), "recent_ratio": np.float64(0.25)}, {"budget": 0.5, "recent_ratio": 0.25}),
        (PyramidCache, {"budget": Fraction(1, 2), "decay_ratio": np.float32(0.5)}, {"budget": 0.5, "decay_ratio": 0.5}),
        (
            PyramidCache,
            {"budget": np.int64(16), "num_sink_tokens": np.int32(2), "min_context_length": np.uint8(3), "distance_weight": 2},
            {"budget": 16, "num_sink_tokens": 2, "min_context_length": 3, "distance_weight": 2.0},
        ),
        (PyramidCache, {"budget": 0.6, "first_pruned_layer": np.int64(1)}, {"budget": 0.6, "first_pruned_layer": 1}),
        (H2OCache, {"budget": np.int64(16), "heavy_ratio": np.float16(0.25)}, {"budget": 16, "heavy_ratio": 0.25}),
        (H2OCache, {"budget": np.float32(0.5), "heavy_ratio": 0}, {"budget": 0.5, "heavy_ratio": 0.0}),
        (
            StreamingLLMCache,
            {"budget": np.int64(16), "num_sink_tokens": np.int16(2)},
            {"budget": 16, "num_sink_tokens": 2},
        ),
        (
            PyramidKVCache,
            {"budget": np.int64(16), "window_size": np.int16(6), "kernel_size": np.uint8(3), "beta": np.float32(4), "eviction_interval": np.int64(2)},
            {"budget": 16, "window_size": 6, "kernel_size": 3, "beta": 4, "eviction_interval": 2},
        ),
    ],
)  # fmt: skip
def test_numbers_of_numpy_are_numbers(
    cache_class: type[CompressedCache], settings: dict[str, Any], plain: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    outputs = []
    for each in (settings, plain):
        scene = Scene(model, cache_class(model.config, **each))
        outputs.append(scene.read_prompt() + scene.go_on())
    assert_same(*outputs)


@pytest.mark.parametrize(
    "cache",
    [
        lambda config: PyramidCache(config, budget=2**31 - 1),
        lambda config: PyramidCache(config, budget="9" * 400 + "GiB"),
        lambda config: PyramidCache(config, budget=1.0, num_sink_tokens=2**31 - 1, min_context_length=2**31 - 1),
        lambda config: H2OCache(config, budget=2**31 - 1),
        lambda config: H2OCache(config, budget="999999999999GB"),
        lambda config: PyramidKVCache(
            config,
            budget=2**31 - 1,
            window_size=2**31 - 1,
            kernel_size=2**31 - 1,
            beta=2**31 - 1,
            eviction_interval=2**31 - 1,
        ),
        lambda config: StreamingLLMCache(config, budget=2**31 - 1, num_sink_tokens=2**31 - 2),
    ],
)
def test_the_largest_settings_keep_everything(cache: Callable[[LlamaConfig], CompressedCache]) -> None:
    model = tiny_model("llama")
    scenes = [Scene(model, cache(model.config)), Scene(model, DynamicCache(config=model.config))]
    for one, other in zip(*(scene.read_prompt() + scene.go_on()[: len(PIECES)] for scene in scenes), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("decay_ratio", [1e-30, 1e-300, 5e-324])
def test_the_steepest_pyramid_meets_its_budget(decay_ratio: float) -> None:
    assert pyramid_schedule(100, 150, (1.0, 0.5, decay_ratio), 4) == (97, 49, 4)


def test_bytes_that_hold_no_token() -> None:
    model = tiny_model("llama")
    for cache_class in (PyramidCache, H2OCache):
        scene = Scene(model, cache_class(model.config, budget="16B"))
        for _ in range(2):
            with pytest.raises(ValueError, match="16 bytes.*Raise the budget"):
                scene.read_prompt()


# A cache in use.

PROMPT = random_tokens(2, 40)
MORE = random_tokens(2, 6, seed=1)
PIECES = (1, 4, 1)
PADDING = 15


class Scene:
    """A model, and a cache that has read a prompt of two rows or is about to.

    Args:
        is_padded: Whether the first `PADDING` columns of the second row's prompt are padding.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, is_padded: bool = False) -> None:
        self.model, self.cache, self.is_padded = model, cache, is_padded

    def mask(self, length: int) -> torch.Tensor:
        """The right mask over that many columns."""
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, : PADDING * self.is_padded] = 0
        return mask

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, model: PreTrainedModel | None = None, **kwargs: Any) -> torch.Tensor:
        """Logits `(batch, new, vocabulary)` of the tokens, by this or another model with the cache."""
        return (model or self.model)(tokens, past_key_values=self.cache, **kwargs).logits

    def step(self, length: int = 1, **kwargs: Any) -> torch.Tensor:
        """The next tokens after the prompt; by default with a mask where there is padding."""
        if self.is_padded:
            kwargs = {"attention_mask": self.mask(40 + length)} | kwargs
        return self.forward(MORE[:, :length], **kwargs)

    def read_prompt(self, **kwargs: Any) -> list[torch.Tensor]:
        """Feed the prompt and return the logits of its last token."""
        if self.is_padded:
            kwargs = {"attention_mask": self.mask(40)} | kwargs
        return [self.forward(PROMPT, **kwargs)[:, -1]]

    def go_on(self) -> list[torch.Tensor]:
        """Feed the rest, in pieces: logits of the last token of each, and what every layer then holds."""
        logits, length = [], 0
        for piece in PIECES:
            mask = {"attention_mask": self.mask(40 + length + piece)} if self.is_padded else {}
            logits.append(self.forward(MORE[:, length : length + piece], **mask)[:, -1])
            length += piece
        return logits + ([] if isinstance(self.cache, DynamicCache) else [self.cache.positions(i) for i in range(3)])


def assert_same(results: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(results) == len(wanted)
    for result, expected in zip(results, wanted, strict=True):
        assert torch.equal(result, expected)


@remember
def undisturbed(case: CacheCase, budget: str, is_padded: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a cache gives for the prompt and for the rest if nothing bad happens."""
    model = tiny_model("llama")
    scene = Scene(model, case.build(model, budget), is_padded)
    return scene.read_prompt(), scene.go_on()


CacheCase.__hash__ = lambda case: hash(case.name)


@dataclass(frozen=True)
class BadCall:
    """A bad call.

    Attributes:
        name: What the call is called in test ids.
        call: Makes the call.
        match: What the message says.
        error: The exception.
        after: The cache afterwards: "usable", as if nothing had happened, or refused until "reset". "either" where it
            depends on the cache when the error is noticed.
        on: The cache before: "fresh", "filled" with a prompt, or "padded".
        budget: The settings of the cache.
    """

    name: str
    call: Callable[[Scene], Any]
    match: str
    error: type[BaseException] = ValueError
    after: str = "usable"
    on: str = "filled"
    budget: str = "tight"


def states(*shape: int, **kwargs: Any) -> torch.Tensor:
    """Random keys or values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(**kwargs)


def updated(*arguments: Any) -> Callable[[Scene], Any]:
    """A call of `update`."""
    return lambda scene: scene.cache.update(*arguments)


def method(name: str, *arguments: Any) -> Callable[[Scene], Any]:
    """A call of a method."""
    return lambda scene: getattr(scene.cache, name)(*arguments)


GOOD = states(2, 2, 1, 16)

METHOD_CALLS: list[BadCall] = [
    *(
        BadCall(f"crop({value!r})", method("crop", value), f"crop.*{shown(value)}.*negative")
        for value in (3, True, 1.5, -1.5, math.nan, "2", None, [-1], torch.tensor(3), torch.tensor(-1.5), 10**30)
    ),
    *(
        BadCall(
            f"crop({value}) of {on}", method("crop", value), f"crop.*{value}.*only 40 tokens", on=on, budget="large"
        )
        for on in ("filled", "padded")
        for value in (-41, -(10**30))
    ),
    *(
        BadCall(f"crop({value}) of evicted", method("crop", value), f"crop.*{value}.*undone", NotImplementedError)
        for value in (-1, -40)
    ),
    *(
        BadCall(f"{name}({value!r})", method(name, value), match)
        for name in ("reorder_cache", "batch_select_indices")
        for value, match in (
            (torch.tensor([0, 2]), "2.*2 rows"),
            (torch.tensor([0, -3]), "-3.*2 rows"),
            (torch.tensor([5]), "5.*2 rows"),
            (torch.tensor([0.0, 1.0]), "float32"),
            (torch.tensor([0j, 1j]), "complex64"),
            (torch.tensor([], dtype=torch.long), "no row"),
            ([], "no row"),
            (torch.tensor([[0, 1]]), r"\(1, 2\)"),
            (torch.tensor(1), r"\(\)"),
            (torch.tensor([True]), "1.*2 rows"),
            (torch.tensor([True, False, True]), "3.*2 rows"),
            (torch.tensor([False, False]), "no row"),
            ([0, 7], "7.*2 rows"),
            (None, "None"),
            ("01", "01"),
            ({0, 1}, "set|0, 1"),
        )
    ),
    *(
        BadCall(f"batch_repeat_interleave({value!r})", method("batch_repeat_interleave", value), shown(value))
        for value in (0, -1, 1.5, 2.0, "2", None, torch.tensor([1, 2]), torch.tensor(2.0), [2], math.nan)
    ),
    *(
        BadCall(f"positions({value!r})", method("positions", value), f"layer.*{shown(value)}")
        for value in (3, 99, -1, "0", None, 1.0, [0], torch.tensor([0, 1]), slice(0, 1))
    ),
    BadCall("positions of nothing", method("positions", 0), "holds nothing yet", on="fresh"),
    *(
        BadCall(f"update of layer {value!r}, {on}", updated(GOOD, GOOD, value), match, on=on)
        for on in ("fresh", "filled")
        for value, match in (
            (3, "3 layers.*layer 3"),
            (99, "3 layers.*layer 99"),
            (-1, "layer.*-1"),
            ("0", "layer.*0"),
            (None, "layer.*None"),
            (1.0, "layer.*1.0"),
            ([0], "layer.*0"),
        )
    ),
    *(
        BadCall(f"update, {name}, {on}", updated(keys, values, 0), match, on=on)
        for on in ("fresh", "filled")
        for name, keys, values, match in (
            ("keys None", None, GOOD, "NoneType"),
            ("values None", GOOD, None, "NoneType"),
            ("lists", GOOD.tolist(), GOOD.tolist(), "list"),
            ("arrays", GOOD.numpy(), GOOD.numpy(), "ndarray"),
            ("three dimensions", GOOD[0], GOOD[0], r"\(2, 1, 16\)"),
            ("five dimensions", GOOD[None], GOOD[None], r"\(1, 2, 2, 1, 16\)"),
            ("a number", torch.tensor(1.0), torch.tensor(1.0), r"\(\)"),
            ("no tokens", GOOD[:, :, :0], GOOD[:, :, :0], r"\(2, 2, 0, 16\)"),
            ("no rows", GOOD[:0], GOOD[:0], r"\(0, 2, 1, 16\)"),
            ("integers", GOOD.long(), GOOD.long(), "int64"),
            ("bools", GOOD.bool(), GOOD.bool(), "bool"),
            ("complex", GOOD.to(torch.complex64), GOOD.to(torch.complex64), "complex64"),
            ("lengths apart", GOOD, states(2, 2, 3, 16), r"\(2, 2, 1, 16\).*\(2, 2, 3, 16\)"),
            ("rows apart", GOOD, states(3, 2, 1, 16), r"\(2, 2, 1, 16\).*\(3, 2, 1, 16\)"),
            ("heads apart", GOOD, states(2, 4, 1, 16), r"\(2, 2, 1, 16\).*\(2, 4, 1, 16\)"),
            ("values of three dimensions", GOOD, GOOD[0], r"\(2, 2, 1, 16\).*\(2, 1, 16\)"),
            ("devices apart", GOOD, GOOD.to("meta"), "cpu.*meta"),
        )
    ),
    *(
        BadCall(f"update, {name}", updated(keys, values, 0), match)
        for name, keys, values, match in (
            ("one row", GOOD[:1], GOOD[:1], "2 rows.*given 1"),
            ("three rows", *2 * (states(3, 2, 1, 16),), "2 rows.*given 3"),
            ("one head", GOOD[:, :1], GOOD[:, :1], "2 KV heads.*1 of width 16"),
            ("four heads", *2 * (states(2, 4, 1, 16),), "2 KV heads.*4 of width 16"),
            ("narrow heads", GOOD[..., :8], GOOD[..., :8], "width 16.*width 8"),
            ("narrow values", GOOD, GOOD[..., :8], "16 .values.*width 16 and 8"),
            ("float64", GOOD.double(), GOOD.double(), "float32.*float64"),
            ("float64 values", GOOD, GOOD.double(), "float32.*float64"),
            ("bfloat16", GOOD.bfloat16(), GOOD.bfloat16(), "float32.*bfloat16"),
            ("meta", GOOD.to("meta"), GOOD.to("meta"), "cpu.*meta"),
        )
    ),
]


def update_and_forget(scene: Scene) -> None:
    """Keys go out and never come back."""
    for _ in range(2):
        scene.cache.update(states(2, 2, 1, 16), states(2, 2, 1, 16), 0)


def attend_twice(scene: Scene) -> None:
    """A module asks the cache for attention without having handed it keys."""
    module = scene.model.model.layers[0].self_attn
    query = states(2, 4, 1, 16)
    call = AttentionCall(sdpa_attention_forward, module, query, GOOD, GOOD, None, {})
    scene.cache.layers[0].attend(call)


# Where a forward pass can break off so that some layers have seen its tokens and others have not.
BREAKS: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    "before the second layer": lambda model: model.model.layers[1],
    "before the keys of the second layer": lambda model: model.model.layers[1].self_attn.k_proj,
    "after the attention of the first layer": lambda model: model.model.layers[0].self_attn.o_proj,
    "before the last layer": lambda model: model.model.layers[2].input_layernorm,
}


def break_off(scene: Scene, module: torch.nn.Module, error: type[BaseException], call: Callable[[], Any]) -> None:
    """A call in which something goes wrong just before a module of the model runs."""

    def fail(*_: Any) -> None:
        raise error("broken off")

    handle = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="broken off"):
            call()
    finally:
        handle.remove()


def broken_off(
    place: str, error: type[BaseException], length: int, then: Callable[[Scene], Any]
) -> Callable[[Scene], Any]:
    """The next tokens break off, or the prompt of a fresh cache; then something else is called."""

    def call(scene: Scene) -> None:
        is_fresh = scene.cache.get_seq_length() == 0
        read = scene.read_prompt if is_fresh else lambda: scene.step(length)
        break_off(scene, BREAKS[place](scene.model), error, read)
        then(scene)

    return call


def fail_in_attention(scene: Scene) -> None:
    """The second layer's attention runs out of memory."""

    def fail(*_: Any) -> None:
        raise MemoryError

    scene.cache.layers[1].attend_step = fail
    try:
        with pytest.raises(MemoryError):
            scene.step()
    finally:
        del scene.cache.layers[1].attend_step
    scene.step()


ORDER_CALLS: list[BadCall] = [
    BadCall(
        "update twice", update_and_forget, r"broke off in the attention of layer 0.*reset\(\)", RuntimeError, "reset"
    ),
    BadCall(
        "update twice",
        update_and_forget,
        r"broke off in the attention of layer 0.*reset\(\)",
        RuntimeError,
        "reset",
        "fresh",
    ),
    BadCall(
        "update of all layers without attention",
        lambda scene: [scene.cache.update(GOOD, GOOD, layer) for layer in range(3)],
        "layer 0 did not go through.*attn_implementation='sdpa'",
        RuntimeError,
        "reset",
    ),
    *(
        BadCall(
            f"{error.__name__} {place}, {length} tokens",
            broken_off(place, error, length, lambda scene: scene.step()),
            r"broke off.*\[4.,.* 40\].*reset\(\)",
            RuntimeError,
            "reset",
        )
        for place in BREAKS
        for error, length in ((RuntimeError, 1), (KeyboardInterrupt, 1), (KeyboardInterrupt, 4))
    ),
    *(
        BadCall(
            f"a prompt that broke off {place}",
            broken_off(place, KeyboardInterrupt, 40, lambda scene: scene.read_prompt()),
            r"broke off.*\[40, .*0\].*reset\(\)",
            RuntimeError,
            "reset",
            "fresh",
        )
        for place in BREAKS
    ),
    *(
        BadCall(
            f"{name} after a forward pass that broke off",
            broken_off("before the second layer", KeyboardInterrupt, 1, then),
            r"broke off.*reset\(\)",
            RuntimeError,
            "reset",
            budget=budget,
        )
        for budget in ("tight", "large")
        for name, then in (
            (f"crop(-1), {budget},", lambda scene: scene.cache.crop(-1)),
            (f"crop(0), {budget},", lambda scene: scene.cache.crop(0)),
            (f"generate, {budget},", lambda scene: generated(FULL)(scene)),
            (f"a copy, {budget},", lambda scene: Scene(scene.model, copy.deepcopy(scene.cache)).step()),
        )
    ),
    BadCall(
        "out of memory in attention",
        fail_in_attention,
        r"broke off in the attention of layer 1.*reset\(\)",
        RuntimeError,
        "reset",
    ),
    BadCall("attention without update", attend_twice, "given 0 tokens and asked for 1", RuntimeError),
    BadCall(
        "update of a later layer alone",
        lambda scene: [scene.cache.update(GOOD, GOOD, 2), scene.step()],
        "reset",
        RuntimeError,
        "reset",
    ),
    *(
        BadCall(
            f"another model, {name}, {on}",
            lambda scene, build=build: scene.step(model=build()),
            match,
            error,
            after,
            on,
        )
        for name, build, match, error, after, on in (
            ("twin", lambda: build_model("llama", seed=5), "another model", ValueError, "reset", "filled"),
            (
                "deeper",
                lambda: build_model("llama", num_hidden_layers=4),
                "another model",
                ValueError,
                "reset",
                "filled",
            ),
            ("deeper", lambda: build_model("llama", num_hidden_layers=4), "3 layers.*4", ValueError, "reset", "fresh"),
            (
                "shallower",
                lambda: build_model("llama", num_hidden_layers=2),
                "3 layers.*2",
                ValueError,
                "reset",
                "fresh",
            ),
            (
                "other heads",
                lambda: build_model("llama", num_key_value_heads=1),
                "2 KV heads.*1",
                ValueError,
                "usable",
                "filled",
            ),
            (
                "other width",
                lambda: build_model("llama", head_dim=8),
                "width 16.*width 8",
                ValueError,
                "usable",
                "filled",
            ),
            ("half", lambda: build_model("llama").bfloat16(), "float32.*bfloat16", ValueError, "usable", "filled"),
            ("double", lambda: build_model("llama").double(), "float32.*float64", ValueError, "usable", "filled"),
        )
    ),
    *(
        BadCall(
            f"{rows} rows, {length} tokens",
            lambda scene, shape=(rows, length): scene.forward(random_tokens(*shape)),
            f"2 rows.*{rows}",
        )
        for rows in (1, 3, 4)
        for length in (1, 5)
    ),
]


AttentionInterface.register("own_attention", sdpa_attention_forward)
AttentionMaskInterface.register("own_attention", sdpa_mask)


def attention_of(implementation: str) -> Callable[[Scene], Any]:
    """The next step, by the same model under another attention function."""

    def call(scene: Scene) -> None:
        before = scene.model.config._attn_implementation
        try:
            scene.model.config._attn_implementation = implementation
            scene.step(
                attention_mask=causal(2, 1, 1, 41)
            )  # transformers would compile what makes one for flex_attention
        finally:
            scene.model.config._attn_implementation = before

    return call


def in_training(scene: Scene) -> None:
    """The next step with attention dropout."""
    model = scene.model
    try:
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        scene.step()
    finally:
        model.eval()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


def causal(*shape: int) -> torch.Tensor:
    """A causal mask `(rows, 1, queries, columns)` for the last queries."""
    return torch.ones(shape, dtype=torch.bool).tril(shape[3] - shape[2])


def hidden(mask: torch.Tensor, *columns: int) -> torch.Tensor:
    """A copy of a mask that hides these columns of the first row."""
    mask = mask.clone()
    mask[0, ..., list(columns)] = 0
    return mask


def masked(mask: torch.Tensor, length: int = 1) -> Callable[[Scene], Any]:
    """The next tokens with a mask."""
    return lambda scene: scene.step(length, attention_mask=mask)


ONES = torch.ones(2, 41, dtype=torch.long)
PADDED = ONES.clone()
PADDED[1, :PADDING] = 0

MASK_CALLS: list[BadCall] = [
    # Too short: transformers takes what is missing for padding.
    *(
        BadCall(
            f"{length} columns for a step of {step}",
            masked(ONES[:, :1].expand(-1, length), step),
            f"mask covers {length} tokens.*{40 + step}",
            after="reset",
        )
        for length, step in ((1, 1), (24, 1), (40, 1), (5, 5), (41, 5))
    ),
    BadCall("no column at all", masked(ONES[:, :0]), "mask covers 0 tokens.*41", after="reset"),
    BadCall("all zero", masked(torch.zeros_like(ONES)), "mask covers 0 tokens.*41", after="reset"),
    BadCall("additive, 2-D", masked(torch.zeros(2, 41)), "mask covers 0 tokens.*41", after="reset"),
    BadCall("hides an old token", masked(hidden(ONES, 5)), "mask shows.*40, 41.*Pass a mask", after="reset"),
    BadCall(
        "hides an old token from several",
        masked(hidden(torch.ones(2, 45), 5), 5),
        "mask shows.*39, 40.*Pass a mask",
        after="reset",
    ),
    BadCall("pads what was not padded", masked(PADDED), "mask shows.*41, 26.*Pass a mask", after="reset"),
    BadCall(
        "hides the new token of a row", masked(hidden(ONES, 40)), "mask shows.*40, 41.*Pass a mask", after="reset"
    ),
    BadCall("shows padding", masked(ONES), "mask.*40, 25.*Pass a mask", after="reset", on="padded"),
    BadCall("none", masked(None), "mask.*40 columns.*40, 25.*Pass a mask", after="reset", on="padded"),
    BadCall(
        "shows padding to several",
        masked(torch.ones(2, 45), 5),
        "mask shows.*40, 40.*Pass a mask",
        after="reset",
        on="padded",
    ),
    BadCall(
        "none where there is padding",
        lambda scene: scene.step(5, attention_mask=None),
        "mask shows.*40, 40.*Pass a mask",
        after="reset",
        on="padded",
    ),
    BadCall("rows exchanged", masked(PADDED.flip(0)), "mask shows.*26, 41.*Pass a mask", after="reset", on="padded"),
    # Four dimensions: transformers passes such a mask on.
    *(
        BadCall(
            f"4-D, {length} columns", masked(causal(2, 1, 1, length)), f"mask has {length} columns.*41", after="reset"
        )
        for length in (1, 40, 42)
    ),
    *(
        BadCall(f"4-D, {rows} rows", masked(causal(rows, 1, 1, 41)), rf"mask.*\({rows}, 1, 1, 41\)", after="reset")
        for rows in (3, 4)
    ),
    BadCall("4-D, too few queries", masked(causal(2, 1, 1, 45), 5), r"mask.*\(2, 1, 1, 45\)", after="reset"),
    BadCall("4-D, too many queries", masked(causal(2, 1, 41, 41)), r"mask.*\(2, 1, 41, 41\)", after="reset"),
    BadCall(
        "4-D, bidirectional",
        masked(torch.ones(2, 1, 5, 45, dtype=torch.bool), 5),
        "not causal",
        NotImplementedError,
        "reset",
    ),
    BadCall(
        "4-D, a window",
        masked(causal(2, 1, 5, 45) & ~causal(2, 1, 5, 45).tril(20), 5),
        "not causal|mask shows",
        (NotImplementedError, ValueError),
        "reset",
    ),
    BadCall("4-D, integers", masked(causal(2, 1, 1, 41).long()), "mask.*int64", after="reset"),
    BadCall("4-D, all hidden", masked(torch.zeros(2, 1, 1, 41, dtype=torch.bool)), "mask covers 0", after="reset"),
    BadCall("4-D, hides an old token", masked(hidden(causal(2, 1, 1, 41), 3)), "mask shows.*40, 41", after="reset"),
    # The prompt.
    *(
        BadCall(
            f"{length} columns for a prompt",
            lambda scene, length=length: scene.read_prompt(attention_mask=ONES[:, :length]),
            f"mask covers {length} tokens.*40",
            after="either",
            on="fresh",
        )
        for length in (1, 39)
    ),
    *(
        BadCall(
            f"4-D prompt, {name}",
            lambda scene, mask=mask: scene.read_prompt(attention_mask=mask),
            match,
            error,
            "either",
            "fresh",
        )
        for name, mask, match, error in (
            ("39 columns", causal(2, 1, 40, 39), "mask has 39 columns.*40", ValueError),
            ("41 columns", causal(2, 1, 40, 41), "mask has 41 columns.*40", ValueError),
            ("39 queries", causal(2, 1, 39, 40), r"mask.*\(2, 1, 39, 40\)", ValueError),
            ("three rows", causal(3, 1, 40, 40), r"mask.*\(3, 1, 40, 40\)", ValueError),
            ("bidirectional", torch.ones(2, 1, 40, 40, dtype=torch.bool), "not causal", NotImplementedError),
            ("transposed", causal(2, 1, 40, 40).mT, "not causal", NotImplementedError),
            (
                "packed",
                causal(2, 1, 40, 40) & ~torch.ones(40, 40, dtype=torch.bool).tril(-20),
                "not causal",
                NotImplementedError,
            ),
            ("a bias", torch.randn(2, 1, 40, 40), "not causal|covers", (NotImplementedError, ValueError)),
        )
    ),
    BadCall(
        "right padding",
        lambda scene: [
            scene.read_prompt(attention_mask=hidden(ONES[:, :40], *range(30, 40))),
            scene.step(attention_mask=hidden(ONES, *range(30, 40))),
        ],
        "padded on the right.*Pad on the left",
        NotImplementedError,
        "reset",
        "fresh",
    ),
    # Positions.
    BadCall(
        "three positions for one token",
        lambda scene: scene.step(position_ids=torch.tensor([[40, 41, 42]])),
        r"\(2, 2, 3, 16\).*\(2, 2, 1, 16\)",
    ),
    BadCall(
        "positions of three rows",
        lambda scene: scene.step(position_ids=torch.full((3, 1), 40)),
        "size of tensor",
        RuntimeError,
    ),
    *(
        BadCall(
            f"position {positions}",
            lambda scene, positions=positions: scene.step(len(positions), position_ids=torch.tensor([positions])),
            rf"position_ids. end at \[{positions[-1]}.*40.*start again",
            after="reset",
        )
        for positions in ([0], [-5], [39], [12.5], [0, 1, 2, 3], [39, 40, 41, 42], [43, 42, 41, 40])
    ),
    BadCall(
        "positions that count padding for none",
        lambda scene: scene.step(position_ids=torch.tensor([[40], [24]])),
        r"position_ids. end at \[40, 24\].*40, 25",
        after="reset",
        on="padded",
    ),
    # Attention functions.
    BadCall("flex_attention", attention_of("flex_attention"), "flex_attention.*sdpa", NotImplementedError, "reset"),
    BadCall(
        "an attention function of somebody's",
        attention_of("own_attention"),
        "own_attention.*sdpa",
        NotImplementedError,
        "reset",
    ),
    BadCall("dropout", in_training, "dropout.*eval", NotImplementedError, "reset"),
    BadCall(
        "unknown implementation",
        attention_of("no_such_attention"),
        "no_such_attention",
        (KeyError, ValueError),
        "reset",
    ),
]


def generated(tokens: torch.Tensor, **kwargs: Any) -> Callable[[Scene], Any]:
    """A call of `generate`."""

    def call(scene: Scene) -> None:
        scene.model.generate(tokens, past_key_values=scene.cache, max_new_tokens=3, **kwargs)

    return call


FULL = torch.cat([PROMPT, MORE[:, :3]], dim=1)
GENERATE_CALLS: list[BadCall] = [
    *(
        BadCall(f"cache_implementation={name!r}", generated(FULL, cache_implementation=name), "cache_implementation")
        for name in ("static", "dynamic", "quantized", "offloaded")
    ),
    *(
        BadCall(f"{name}", generated(FULL, **kwargs), f"2 rows.*given {rows}")
        for name, kwargs, rows in (
            ("beams", {"num_beams": 3}, 6),
            ("two sequences", {"num_return_sequences": 2, "do_sample": True}, 4),
        )
    ),
    *(BadCall(f"{rows} prompts", generated(random_tokens(rows, 43)), f"2 rows.*given {rows}") for rows in (1, 3)),
    BadCall(
        "no cache wanted",
        generated(FULL, use_cache=False),
        "position_ids.*use_cache=False|mask covers 44 tokens",
        after="reset",
    ),
    BadCall(
        "no new tokens",
        lambda scene: scene.model.generate(FULL, past_key_values=scene.cache, max_new_tokens=0),
        "max_new_tokens",
    ),
    BadCall(
        "max_length exceeded",
        lambda scene: scene.model.generate(FULL, past_key_values=scene.cache, max_length=10),
        "max_length",
    ),
    BadCall(
        "a tuple", lambda scene: scene.model.generate(FULL, past_key_values=(scene.cache,), max_new_tokens=2), "tuple"
    ),
    BadCall("a list", lambda scene: scene.model(PROMPT, past_key_values=[scene.cache]), "list", AttributeError),
    BadCall("the cache as the mask", lambda scene: scene.model(PROMPT, scene.cache), "Cache", AttributeError),
    BadCall(
        "a token that is not in the vocabulary",
        lambda scene: scene.forward(MORE[:, :1] + 1000),
        "out of range",
        IndexError,
    ),
    BadCall("no tokens", lambda scene: scene.forward(MORE[:, :0]), "no new tokens: the cache has seen 40"),
    *(
        BadCall(
            f"another prompt of {length} tokens",
            generated(random_tokens(2, length, seed=7)),
            f"position_ids.*start again|mask covers {length} tokens",
            after="reset",
        )
        for length in (30, 39, 40)
    ),
    # A prompt that is no longer than what was seen. transformers cuts it at the wrong end; the mask gives that away.
    *(
        BadCall(
            f"a prompt of {length} tokens",
            lambda scene, length=length: generated(random_tokens(2, length), attention_mask=scene.mask(length))(scene),
            f"start again|mask covers {length} tokens",
            after="reset",
            on="padded",
        )
        for length in (30, 39, 40)
    ),
    BadCall("a prompt of 20 tokens", generated(random_tokens(2, 20)), "no new tokens: the cache has seen 40"),
    BadCall("chunks of 0", generated(FULL, prefill_chunk_size=0), "split_size|chunk", (RuntimeError, ValueError)),
    BadCall(
        "another model",
        lambda scene: build_model("llama", seed=5).generate(FULL, past_key_values=scene.cache, max_new_tokens=2),
        "another model",
        after="reset",
    ),
]
ALL_CALLS = METHOD_CALLS + ORDER_CALLS + MASK_CALLS + GENERATE_CALLS


# Each call is made on two caches in turn, and on the others where there is time.
QUICK_CASES = [case for case in CACHE_CASES if case.tier == "quick"]
CASES_AND_CALLS = [
    pytest.param(
        case,
        bad,
        marks=()
        if case in (QUICK_CASES[-turn % len(QUICK_CASES)], QUICK_CASES[(1 - turn) % len(QUICK_CASES)])
        else pytest.mark.slow,
        id=f"{bad.name}-{bad.on}-{case.name}",
    )
    for turn, bad in enumerate(ALL_CALLS)
    for case in CACHE_CASES
]


@pytest.mark.parametrize("case, bad", CASES_AND_CALLS)
def test_bad_calls(case: CacheCase, bad: BadCall) -> None:
    if not case.evicts and bad.name.endswith("of evicted"):
        pytest.skip("nothing is evicted, so that all can be taken back")
    model = tiny_model("llama")
    scene = Scene(model, case.build(model, bad.budget), is_padded=bad.on == "padded")
    prompt_logits, later = undisturbed(case, bad.budget, scene.is_padded)
    if bad.on != "fresh":
        assert_same(scene.read_prompt(), prompt_logits)
    with pytest.raises(bad.error, match=f"(?s){bad.match}"):
        bad.call(scene)
    is_refused = bad.after == "reset" or (bad.after == "either" and scene.cache.get_seq_length() > 0)
    if is_refused:
        with pytest.raises(RuntimeError, match=r"cache\.reset\(\)"):
            scene.step()
        scene.cache.reset()
        assert scene.cache.get_seq_length() == sum(scene.cache.num_kept_tokens()) == 0
    if is_refused or bad.on == "fresh":
        assert_same(scene.read_prompt(), prompt_logits)
    assert_same(scene.go_on(), later)


def test_there_are_enough() -> None:
    """Bad calls, whatever the number of caches that each is made on."""
    assert len({bad.name + bad.on for bad in ALL_CALLS}) == len(ALL_CALLS)
    assert len(ALL_CALLS) + sum(map(len, IMPOSSIBLE.values())) >= 200


@every_cache
def test_bad_masks_under_eager_attention(case: CacheCase) -> None:
    """The masks that arrive are additive."""
    model = build_model("llama", attention="eager")
    calls = [bad for bad in MASK_CALLS if "columns" in bad.name or "token" in bad.name or "padding" in bad.name]
    for bad in calls:
        scene = Scene(model, case.build(model), is_padded=bad.on == "padded")
        if bad.on != "fresh":
            scene.read_prompt()
        with pytest.raises(bad.error, match=f"(?s){bad.match}"):
            bad.call(scene)


@pytest.mark.slow
@every_cache
def test_flex_attention_is_refused(case: CacheCase) -> None:
    model = build_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(NotImplementedError, match="(?s)flex_attention.*sdpa"):
        Scene(model, case.build(model)).read_prompt()


@every_cache
def test_what_breaks_off_before_the_first_layer_never_was(case: CacheCase) -> None:
    model = tiny_model("llama")
    scene = Scene(model, case.build(model))
    prompt_logits, later = undisturbed(case, "tight", False)
    first = model.model.layers[0]
    for module in (model.model.embed_tokens, first, first.input_layernorm, first.self_attn.v_proj):
        break_off(scene, module, KeyboardInterrupt, scene.read_prompt)
    assert_same(scene.read_prompt(), prompt_logits)
    for module in (model.model.embed_tokens, first, first.input_layernorm, first.self_attn.v_proj):
        break_off(scene, module, KeyboardInterrupt, scene.step)
    assert_same(scene.go_on(), later)


@every_cache
def test_what_breaks_off_behind_the_last_layer_was_read(case: CacheCase) -> None:
    model = tiny_model("llama")
    scene = Scene(model, case.build(model))
    _, later = undisturbed(case, "tight", False)
    for module in (model.model.norm, model.lm_head):
        scene.cache.reset()
        break_off(scene, module, KeyboardInterrupt, scene.read_prompt)
        assert_same(scene.go_on(), later)


class Impatient(BaseStreamer):
    """Breaks `generate` off after some tokens."""

    def __init__(self, patience: int) -> None:
        self.patience, self.tokens = patience, []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten())
        if len(self.tokens) > self.patience:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Never comes."""


@every_cache
def test_generate_that_was_broken_off_can_be_taken_up_again(case: CacheCase) -> None:
    """The last token that was streamed has not been read yet."""
    model, prompt = tiny_model("llama"), PROMPT[:1]
    whole = model.generate(prompt, past_key_values=case.build(model), max_new_tokens=9)
    cache, streamer = case.build(model), Impatient(4)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, past_key_values=cache, max_new_tokens=9, streamer=streamer)
    history = torch.cat(streamer.tokens)[None]
    assert history.shape[1] == 44 and cache.get_seq_length() == 43
    assert torch.equal(model.generate(history, past_key_values=cache, max_new_tokens=5), whole)


@every_cache
def test_assistants_that_are_refused(case: CacheCase) -> None:
    """What transformers refuses after it has asked the cache to record: the next `generate` is a plain one again."""
    model = tiny_model("llama")
    scenes = [Scene(model, case.build(model)) for _ in range(2)]
    for scene in scenes:
        scene.read_prompt()
    for assistant in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="batch_size = 1"):
            generated(FULL, **assistant)(scenes[0])
    for scene in scenes:
        generated(FULL)(scene)
    logits, wanted = (scene.forward(random_tokens(2, 1)) for scene in scenes)
    assert torch.equal(logits, wanted)


@every_cache
def test_the_class_in_place_of_a_cache(case: CacheCase) -> None:
    """`generate` marks what it is given as the user's before it fails; other caches notice its next start all the same."""
    model, cache_class = tiny_model("llama"), case.cache_class
    before = {name: value for name, value in vars(cache_class).items() if name == "_is_user_defined"}
    try:
        # What stumbles over it first differs between versions of transformers.
        with pytest.raises(TypeError, match="get_seq_length|'property' object"):
            model.generate(PROMPT, past_key_values=cache_class, max_new_tokens=2)
        cache = case.build(model)
        cache.activate_past_recording()
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=2)
        assert not any(layer.record_past for layer in cache.layers)
    finally:
        if "_is_user_defined" in vars(cache_class) and not before:
            del cache_class._is_user_defined


@every_cache
def test_beams_leave_a_row_for_each(case: CacheCase) -> None:
    """The same prompts cannot go on with them, the beams can."""
    model = tiny_model("llama")
    scene = Scene(model, case.build(model))
    beams = model.generate(PROMPT, past_key_values=scene.cache, num_beams=3, num_return_sequences=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="6 rows.*given 2"):
        generated(FULL)(scene)
    twin = copy.deepcopy(scene.cache)
    twin.batch_select_indices([0, 3])
    ids = torch.cat([beams, random_tokens(6, 1)], dim=1)
    logits = scene.forward(ids[:, -1:])
    torch.testing.assert_close(Scene(model, twin).forward(ids[[0, 3], -1:]), logits[[0, 3]], atol=1e-4, rtol=0)


def test_a_cache_of_the_twin_of_a_model() -> None:
    """Hidden states are pruned by hooks on the model that was given; another one has none."""
    cache = PyramidCache(build_model("llama", seed=1), budget=0.5)
    twin = build_model("llama", seed=2)
    with pytest.raises(ValueError, match="another model"):
        Scene(twin, cache).read_prompt()
    with pytest.raises(RuntimeError, match=r"cache\.reset\(\)"):
        Scene(twin, cache).read_prompt()


@every_cache
def test_gradient_checkpointing_leaves_the_cache_alone(case: CacheCase) -> None:
    """transformers takes the cache away, and says so; without gradients it does not from 5.24 on."""
    model = build_model("llama")
    model.gradient_checkpointing_enable()
    model.train()
    cache, other = case.build(model), DynamicCache(config=model.config)
    logits, wanted = (model(PROMPT, past_key_values=each).logits for each in (cache, other))
    assert cache.get_seq_length() == other.get_seq_length() == 0
    assert torch.equal(logits, wanted)
    logits, plain = (Scene(model, each).read_prompt() for each in (cache, other))
    assert cache.get_seq_length() == other.get_seq_length()
    if cache.get_seq_length():
        plain = Scene(model.eval(), case.build(model)).read_prompt()
    assert_same(logits, plain)


@every_cache
def test_what_dynamic_cache_answers_too(case: CacheCase) -> None:
    """Calls that transformers defines for any number, and masks longer than what was seen."""
    model = tiny_model("llama")
    scene, other = Scene(model, case.build(model)), Scene(model, DynamicCache(config=model.config))
    for each in (scene, other):
        each.read_prompt()
    for layer in (2, 3, 99, -1):
        assert scene.cache.get_seq_length(layer) == other.cache.get_seq_length(layer)
    scene.step(attention_mask=torch.ones(2, 60))
    scene.cache.reset()
    prompt_logits, later = undisturbed(case, "tight", False)
    assert_same(scene.read_prompt(), prompt_logits)
    scene.cache.reorder_cache([-1, -2])
    scene.cache.batch_select_indices(torch.tensor([True, True]))
    scene.cache.reorder_cache(torch.tensor([1, 0], dtype=torch.int32))
    scene.cache.batch_repeat_interleave(np.int64(1))
    assert_same(scene.go_on(), later)


def test_attention_weights_of_evicted_tokens_are_refused() -> None:
    model, tokens = build_model("llama", attention="eager"), random_tokens(1, 40)
    caches = [PyramidCache(model), PyramidCache(model.config), H2OCache(model), StreamingLLMCache(model, 12)]
    for cache in caches:
        with torch.no_grad(), pytest.raises(NotImplementedError, match="output_attentions"):
            model(tokens, past_key_values=cache, output_attentions=True)
    whole = model(tokens, past_key_values=H2OCache(model, budget=1.0), output_attentions=True)
    assert all(weights.shape == (1, 4, 40, 40) for weights in whole.attentions)


def test_hidden_states_of_pruned_layers_are_refused() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        model(tokens, past_key_values=PyramidCache(model.config, budget=0.4), output_hidden_states=True)
        with pytest.raises(NotImplementedError, match="output_hidden_states"):
            model(tokens, past_key_values=PyramidCache(model, budget=0.4), output_hidden_states=True)


def test_crop_is_all_or_nothing() -> None:
    """The first layer holds the whole prompt and could be cropped, the deeper ones have evicted."""
    model, tokens = build_model("llama"), random_tokens(1, 40)
    cache = PyramidCache(model.config, budget=0.9, min_context_length=0)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="crop"):
            cache.crop(-5)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [40, 40, 40]


def test_crop_of_a_padded_turn() -> None:
    """Only the tokens among the cropped columns count."""
    model, rows = build_model("llama"), random_rows((9, 4))
    input_ids, mask = left_pad(rows)
    cache = H2OCache(model, budget=1.0)
    more = random_tokens(2, 3)
    with torch.no_grad():
        model(more, past_key_values=cache)
        both = torch.cat([torch.ones_like(more), mask], dim=1)
        model(input_ids, attention_mask=both, past_key_values=cache)
        cache.crop(-9)
        assert cache.layers[0].row_lengths == [3, 3]
        wanted = DynamicCache(config=model.config)
        model(more, past_key_values=wanted)
        output, expected = (model(more[:, :1], past_key_values=each).logits for each in (cache, wanted))
    assert torch.equal(output, expected)


def test_position_ids_with_gaps_are_refused_by_streaming_llm() -> None:
    model, tokens = build_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        shifted = model(tokens, position_ids=torch.arange(40)[None] + 7, past_key_values=StreamingLLMCache(model, 12))
        plain = model(tokens, past_key_values=StreamingLLMCache(model, 12))
        torch.testing.assert_close(shifted.logits, plain.logits, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="position_ids"):
            model(tokens, position_ids=2 * torch.arange(40)[None], past_key_values=StreamingLLMCache(model, 12))


@pytest.mark.parametrize("cache_class", [SnapKVCache, H2OCache])
def test_generate_without_new_tokens_is_refused_with_what_it_takes(
    cache_class: type[SnapKVCache] | type[H2OCache],
) -> None:
    """A question alone, behind a context that the cache has read: `generate` takes it for the whole history."""
    model = tiny_model("llama")
    cache = cache_class(model.config, budget=12)
    model.generate(random_tokens(1, 40), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="seen 41, .*Give it the history with new tokens behind it"):
        model.generate(random_tokens(1, 4), past_key_values=cache, max_new_tokens=2)
