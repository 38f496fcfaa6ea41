"""Bad calls have clear errors. Afterwards the cache goes on as if nothing had happened, or asks for `reset()`."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache as remember
from functools import partial
from operator import methodcaller
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_cache, parametrize_cases
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
    H2OCache,
    MassiveActivationCache,
    PyramidCache,
    PyramidKVCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
)
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import pyramid_schedule
from pyramid_cache.engine.cache import CompressedCache


Errors = type[BaseException] | tuple[type[BaseException], ...]

# Construction.

NO_NUMBERS: list[Any] = [
    *(None, "12", "", [12], (12,), {"tokens": 12}, True, False, np.bool_(True), 1j, b"12"),
    *(torch.tensor(12), np.array([12]), math.nan, math.inf, -math.inf, int),
]
NO_COUNTS: list[Any] = [*NO_NUMBERS, 12.5, 12.0, np.float64(12), -1, -(10**30), 2**31, 10**30]
NO_POSITIVE_COUNTS: list[Any] = [*NO_COUNTS, 0]
NO_SHARES: list[Any] = [*NO_NUMBERS, -0.1, 1.1, -1, 2, 10**30, torch.tensor(0.5)]
NO_BOOLS: list[Any] = ["no", 0, 1, [], np.bool_(False), torch.tensor(True)]
# By argument, for all caches that have it.
IMPOSSIBLE: dict[str, list[Any]] = {
    "budget": [
        *(*NO_NUMBERS, 0, 0.0, -3, -0.4, 1.5, 40.0, 2**31, 10**30),
        *(np.int64(0), np.float32(-0.5), Fraction(3, 2), torch.tensor(0.4)),
        *("12 apples", "MiB", "-4MiB", "0MiB", "0.4", "40%", "1e3MB", "0.2B", "12 TiB of memory", "nanMiB"),
    ],
    "prefill": ["sparse", "Dense", "", None, True, ["dense"], np.array(["dense"]), b"dense"],
    "preset": ["llama-9-900b", "", 7, True, ["llama-2-7b"], np.array(["llama-2-7b"])],
    "num_sink_tokens": NO_COUNTS,
    "min_context_length": NO_COUNTS,
    "first_pruned_layer": [*NO_COUNTS, 3, 2],
    "window_size": NO_POSITIVE_COUNTS,
    "kernel_size": [*NO_POSITIVE_COUNTS, 4],
    "eviction_interval": NO_POSITIVE_COUNTS,
    "num_future_positions": NO_POSITIVE_COUNTS,
    "heavy_ratio": [*NO_SHARES, 1.0],
    "recent_ratio": [*NO_SHARES[1:], 1.0, 0.4, 0.7],  # None stands for the default
    "decay_ratio": [*NO_SHARES, 0, 0.0],
    "floor_ratio": NO_SHARES,
    "importance_weight": NO_SHARES,
    "similarity_threshold": NO_SHARES,
    "distance_weight": [*NO_NUMBERS, 0, 0.0, -1.2, 1e300],
    "beta": [*NO_NUMBERS, 0, 0.5, -2, 2**31, 10**30],
    "epsilon": [*NO_NUMBERS, -0.1],
    "prune_own_layer": NO_BOOLS,
    "use_covariance": NO_BOOLS,
}
# What one cache refuses besides.
ALSO_IMPOSSIBLE: dict[tuple[type[CompressedCache], str], list[Any]] = {
    (PyramidCache, "budget"): [1, 4],
    (StreamingLLMCache, "budget"): [*NO_COUNTS, 3, 4],
    (StreamingLLMCache, "num_sink_tokens"): [12, 13],
}
# Two caches test their settings in files of their own.
CLASSES = {case.cache_class for case in CACHE_CASES} - {MassiveActivationCache, ShadowKVCache}
every_class = pytest.mark.parametrize("cache_class", sorted(CLASSES, key=str))
REQUIRED: dict[type[CompressedCache], dict[str, Any]] = {StreamingLLMCache: {"budget": 12}}


def shown(value: Any) -> str:
    """How a message shows a value, as a pattern; a long one may be cut."""
    return "".join(character if character.isalnum() else "." for character in str(value))[:20]


def assert_refused(calls: Iterable[tuple[str, Callable[[], Any], str, Errors]]) -> None:
    """Each named call raises its error with its message. The assertion names each call that does not."""
    problems = []
    for name, call, match, error in calls:
        try:
            call()
        except error as raised:
            if not re.search(f"(?s){match}", str(raised)):
                problems.append(f"{name}: {match!r} is not in {str(raised)!r}")
        except Exception as raised:
            problems.append(f"{name}: {raised!r}")
        else:
            problems.append(f"{name}: nothing was raised")
    assert problems == []


@every_class
def test_impossible_settings(cache_class: type[CompressedCache]) -> None:
    """Each is refused with the name of the argument and the value."""
    config, required = build_config("llama"), REQUIRED.get(cache_class, {})
    calls = [
        (
            f"{argument}={value!r}",
            partial(cache_class, config, **required | {argument: value}),
            f"(?=.*`{argument}\\b)(?=.*{shown(value)})",
            ValueError,
        )
        for argument in list(inspect.signature(cache_class).parameters)[1:]
        for value in IMPOSSIBLE[argument] + ALSO_IMPOSSIBLE.get((cache_class, argument), [])
    ]
    assert len(calls) > 30
    assert_refused(calls)


@every_class
def test_something_that_is_no_config_of_a_decoder(cache_class: type[CompressedCache]) -> None:
    bert = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    sources = (
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
        (bert, "bert.*encoder"),
        (T5Config(d_model=32, num_layers=2, num_heads=2), "t5.*Use DynamicCache|t5.*encoder-decoder"),
    )
    errors = (ValueError, NotImplementedError)
    assert_refused((match, partial(cache_class, source, budget=12), match, errors) for source, match in sources)


@every_class
def test_arguments_that_do_not_exist(cache_class: type[CompressedCache]) -> None:
    config = build_config("llama")
    for argument in ("bugdet", "num_sinks", "window_sise", "offloading"):
        with pytest.raises(TypeError, match=argument):
            cache_class(config, **{argument: 12}, budget=12)
    with pytest.raises(TypeError, match="positional"):
        cache_class(config, 12, 0.5, 4, "dense", 3)
    with pytest.raises(TypeError, match="config"):
        cache_class(budget=12)


def test_numbers_of_numpy_are_numbers() -> None:
    model = tiny_model("llama")
    for cache_class, settings in (
        (PyramidCache, {"budget": Fraction(1, 2), "recent_ratio": np.float64(0.25), "decay_ratio": np.float32(0.5)}),
        (PyramidCache, {"budget": np.int64(16), "num_sink_tokens": np.int32(2), "min_context_length": np.uint8(3)}),
        (PyramidCache, {"budget": np.float32(0.6), "first_pruned_layer": np.int64(1), "distance_weight": 2}),
        (H2OCache, {"budget": np.int64(16), "heavy_ratio": np.float16(0.25)}),
        (StreamingLLMCache, {"budget": np.int64(16), "num_sink_tokens": np.int16(2)}),
        (
            PyramidKVCache,
            {"budget": 16, "window_size": np.int16(6), "kernel_size": np.uint8(3), "beta": np.float32(4)},
        ),
    ):
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        plain = {name: float(value) if isinstance(value, Fraction) else value for name, value in plain.items()}
        scenes = [Scene(model, cache_class(model.config, **each)) for each in (settings, plain)]
        assert_same(*(scene.read_prompt() + scene.go_on() for scene in scenes))


def test_the_largest_settings_keep_everything() -> None:
    model, largest = tiny_model("llama"), 2**31 - 1
    other = Scene(model, DynamicCache(config=model.config))
    wanted = other.read_prompt() + other.go_on()
    for cache_class, settings in (
        (PyramidCache, {"budget": largest}),
        (PyramidCache, {"budget": "9" * 400 + "GiB"}),
        (PyramidCache, {"budget": 1.0, "num_sink_tokens": largest, "min_context_length": largest}),
        (H2OCache, {"budget": largest}),
        (H2OCache, {"budget": "999999999999GB"}),
        (
            PyramidKVCache,
            dict.fromkeys(("budget", "window_size", "kernel_size", "beta", "eviction_interval"), largest),
        ),
        (StreamingLLMCache, {"budget": largest, "num_sink_tokens": largest - 1}),
    ):
        scene = Scene(model, cache_class(model.config, **settings))
        for one, other in zip(scene.read_prompt() + scene.go_on()[: len(PIECES)], wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_the_steepest_pyramid_meets_its_budget() -> None:
    for decay_ratio in (1e-30, 1e-300, 5e-324):
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
FULL = torch.cat([PROMPT, MORE[:, :3]], dim=1)
PIECES = ((1, 0), (4, 1), (1, 5))  # lengths and starts
PADDING = 15


class Scene:
    """A model, and a cache that has read a prompt of two rows or is about to.

    Args:
        is_padded: Whether the first `PADDING` columns of the second row's prompt are padding.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, is_padded: bool = False) -> None:
        self.model, self.cache, self.is_padded = model, cache, is_padded

    def right_mask(self, length: int) -> torch.Tensor:
        """The right mask over that many columns."""
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, : PADDING * self.is_padded] = 0
        return mask

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, model: PreTrainedModel | None = None, **kwargs: Any) -> torch.Tensor:
        """Logits `(batch, new, vocabulary)` of the tokens, by this or another model with the cache."""
        names = {"mask": "attention_mask", "positions": "position_ids"}
        kwargs = {names[name]: value for name, value in kwargs.items()}
        return (model or self.model)(tokens, past_key_values=self.cache, **kwargs).logits

    def step(self, length: int = 1, start: int = 0, **kwargs: Any) -> torch.Tensor:
        """The next tokens after the prompt; by default with a mask where there is padding."""
        if self.is_padded:
            kwargs = {"mask": self.right_mask(40 + start + length)} | kwargs
        return self.forward(MORE[:, start : start + length], **kwargs)

    def read_prompt(self, **kwargs: Any) -> list[torch.Tensor]:
        """Feed the prompt and return the logits of its last token."""
        if self.is_padded:
            kwargs = {"mask": self.right_mask(40)} | kwargs
        return [self.forward(PROMPT, **kwargs)[:, -1]]

    def go_on(self) -> list[torch.Tensor]:
        """Feed the rest, in pieces: logits of the last token of each, and what every layer then holds."""
        logits = [self.step(length, start)[:, -1] for length, start in PIECES]
        return logits + ([] if isinstance(self.cache, DynamicCache) else [self.cache.positions(i) for i in range(3)])

    def generate(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A call of `generate`."""
        return self.model.generate(tokens, **{"past_key_values": self.cache, "max_new_tokens": 3} | kwargs)


def assert_same(results: list[torch.Tensor], wanted: list[torch.Tensor], name: str = "") -> None:
    """Bit for bit, after the call of that name."""
    assert len(results) == len(wanted)
    for result, expected in zip(results, wanted, strict=True):
        assert torch.equal(result, expected), name


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
        on: The cache before: "fresh", "filled" with a prompt, or "padded".
        after: The cache afterwards: "usable", as if nothing had happened, or refused until "reset". "either" where it
            depends on the cache when the error is noticed.
        budget: The settings of the cache.
    """

    name: str
    call: Callable[[Scene], Any]
    match: str
    error: Errors = ValueError
    on: str = "filled"
    after: str = "usable"
    budget: str = "tight"

    def on_scene(self, scene: Scene) -> tuple[str, Callable[[], Any], str, Errors]:
        """As `assert_refused` takes it."""
        return self.name, partial(self.call, scene), self.match, self.error


Rows = Iterable[tuple[str, Callable[[Scene], Any], str]]


def usable(rows: Rows, error: Errors = ValueError, on: str = "filled", budget: str = "tight") -> list[BadCall]:
    """Calls that leave the cache as it was, each with its name and message."""
    return [BadCall(*row, error, on, "usable", budget) for row in rows]


def fatal(rows: Rows, error: Errors = ValueError, on: str = "filled", budget: str = "tight") -> list[BadCall]:
    """Calls after which the cache asks for a reset."""
    return [BadCall(*row, error, on, "reset", budget) for row in rows]


def states(*shape: int) -> torch.Tensor:
    """Random keys or values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def method(name: str, *arguments: Any) -> Callable[[Scene], Any]:
    """A call of a method of the cache."""
    return lambda scene: getattr(scene.cache, name)(*arguments)


# Calls of methods of the scene.
forward, step, prompt, generated = (
    partial(methodcaller, name) for name in ("forward", "step", "read_prompt", "generate")
)
GOOD = states(2, 2, 1, 16)
NO_CROPS = (3, True, 1.5, -1.5, math.nan, "2", None, [-1], torch.tensor(3), torch.tensor(-1.5), 10**30)
NO_REPEATS = (0, -1, 1.5, 2.0, "2", None, torch.tensor([1, 2]), torch.tensor(2.0), [2], math.nan)
NO_LAYERS = (99, -1, "0", None, 1.0, [0])
NO_ROWS = (
    (torch.tensor([0, 2]), "2.*2 rows"),
    (torch.tensor([0, -3]), "-3.*2 rows"),
    (torch.tensor([0.0, 1.0]), "float32"),
    (torch.tensor([0j, 1j]), "complex64"),
    (torch.tensor([], dtype=torch.long), "no row"),
    (torch.tensor([[0, 1]]), r"\(1, 2\)"),
    (torch.tensor(1), r"\(\)"),
    (torch.tensor([True]), "1.*2 rows"),
    (torch.tensor([True, False, True]), "3.*2 rows"),
    (torch.tensor([False, False]), "no row"),
    *(([0, 7], "7.*2 rows"), ([], "no row"), (None, "None"), ("01", "01"), ({0, 1}, "set|0, 1")),
)
# Keys and values that no cache takes.
NO_STATES = (
    (None, GOOD, "NoneType"),
    (GOOD, None, "NoneType"),
    (GOOD.tolist(), GOOD.tolist(), "list"),
    (GOOD[0], GOOD[0], r"\(2, 1, 16\)"),
    (torch.tensor(1.0), torch.tensor(1.0), r"\(\)"),
    (GOOD[:, :, :0], GOOD[:, :, :0], r"\(2, 2, 0, 16\)"),
    (GOOD[:0], GOOD[:0], r"\(0, 2, 1, 16\)"),
    (GOOD.long(), GOOD.long(), "int64"),
    (GOOD.to(torch.complex64), GOOD.to(torch.complex64), "complex64"),
    (GOOD, states(2, 2, 3, 16), r"\(2, 2, 1, 16\).*\(2, 2, 3, 16\)"),
    (GOOD, states(2, 4, 1, 16), r"\(2, 2, 1, 16\).*\(2, 4, 1, 16\)"),
    (GOOD, GOOD.to("meta"), "cpu.*meta"),
)
# And those that do not fit what a filled cache holds.
OTHER_STATES = (
    (GOOD[:1], GOOD[:1], "2 rows.*given 1"),
    (GOOD[:, :1], GOOD[:, :1], "2 KV heads.*1 of width 16"),
    (GOOD[..., :8], GOOD[..., :8], "width 16.*width 8"),
    (GOOD, GOOD[..., :8], "16 .values.*width 16 and 8"),
    (GOOD.double(), GOOD.double(), "float32.*float64"),
    (GOOD, GOOD.double(), "float32.*float64"),
    (GOOD.to("meta"), GOOD.to("meta"), "cpu.*meta"),
)

METHOD_CALLS: list[BadCall] = [
    *usable((f"crop({value!r})", method("crop", value), f"crop.*{shown(value)}.*negative") for value in NO_CROPS),
    *usable(
        ((f"crop({n}) of evicted", method("crop", n), f"crop.*{n}.*undone") for n in (-1, -40)), NotImplementedError
    ),
    *(
        bad
        for on in ("filled", "padded")
        for n in (-41, -(10**30))
        for bad in usable([(f"crop({n})", method("crop", n), f"crop.*{n}.*only 40 tokens")], on=on, budget="large")
    ),
    *usable(
        (f"{name}({value!r})", method(name, value), match)
        for name in ("reorder_cache", "batch_select_indices")
        for value, match in NO_ROWS
    ),
    *usable(
        (f"batch_repeat_interleave({value!r})", method("batch_repeat_interleave", value), shown(value))
        for value in NO_REPEATS
    ),
    *usable(
        (f"positions({value!r})", method("positions", value), f"layer.*{shown(value)}")
        for value in (3, *NO_LAYERS, torch.tensor([0, 1]), slice(0, 1))
    ),
    *usable([("positions of nothing", method("positions", 0), "holds nothing yet")], on="fresh"),
    *(
        bad
        for on, no_states in (("fresh", NO_STATES), ("filled", NO_STATES + OTHER_STATES))
        for bad in [
            *usable([("update of layer 3", method("update", GOOD, GOOD, 3), "3 layers.*layer 3")], on=on),
            *usable(
                ((f"layer {n!r}", method("update", GOOD, GOOD, n), f"layer.*{shown(n)}") for n in NO_LAYERS), on=on
            ),
            *usable(((match, method("update", *pair, 0), match) for *pair, match in no_states), on=on),
        ]
    ),
    *usable(
        (f"{n} rows", forward(random_tokens(n, length)), f"2 rows.*{n}") for n, length in ((1, 5), (3, 1), (4, 5))
    ),
]


def update(scene: Scene, *layers: int) -> None:
    """Keys go out to these layers and never come back."""
    for layer in layers:
        scene.cache.update(GOOD, GOOD, layer)


def attend_twice(scene: Scene) -> None:
    """A module asks the cache for attention without having handed it keys."""
    module = scene.model.model.layers[0].self_attn
    call = AttentionCall(sdpa_attention_forward, module, states(2, 4, 1, 16), GOOD, GOOD, None, {})
    scene.cache.layers[0].attend(call)


# Where a forward pass can break off so that some layers have seen its tokens and others have not.
SECOND = "before the second layer"
BREAKS: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    SECOND: lambda model: model.model.layers[1],
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


def broken_off(place: str, then: Callable[[Scene], Any], error: type = KeyboardInterrupt, length: int = 1):
    """The next tokens break off, or the prompt of a fresh cache; then something else is called."""

    def call(scene: Scene) -> None:
        is_fresh = scene.cache.get_seq_length() == 0
        read = scene.read_prompt if is_fresh else lambda: scene.step(length)
        break_off(scene, BREAKS[place](scene.model), error, read)
        then(scene)

    return call


def fail_in_attention(scene: Scene) -> None:
    """The second layer's attention runs out of memory."""
    with patch.object(scene.cache.layers[1], "attend_step", side_effect=MemoryError), pytest.raises(MemoryError):
        scene.step()
    scene.step()


def by_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Callable[[Scene], Any]:
    """The next step by another model."""
    return lambda scene: scene.step(model=build_model("llama", seed=seed, **overrides).to(dtype))


BROKEN = r"broke off.*reset\(\)"
ORDER_CALLS: list[BadCall] = [
    *fatal(
        [
            ("update twice", lambda scene: update(scene, 0, 0), r"broke off in the attention of layer 0.*reset\(\)"),
            ("out of memory", fail_in_attention, r"broke off in the attention of layer 1.*reset\(\)"),
            (
                "update of all layers without attention",
                lambda scene: update(scene, 0, 1, 2),
                "layer 0 did not go through.*attn_implementation='sdpa'",
            ),
            ("a later layer alone", lambda scene: [update(scene, 2), scene.step()], "reset"),
            ("generate after a break", broken_off(SECOND, generated(FULL)), BROKEN),
            (
                "a copy after a break",
                broken_off(SECOND, lambda scene: Scene(scene.model, copy.deepcopy(scene.cache)).step()),
                BROKEN,
            ),
            *(
                (f"{error.__name__} {place}", broken_off(place, Scene.step, error, length), r"broke off.*\[4.,.* 40\]")
                for place in BREAKS
                for error, length in ((RuntimeError, 1), (KeyboardInterrupt, 4))
            ),
        ],
        RuntimeError,
    ),
    *fatal(
        [
            ("update twice", lambda scene: update(scene, 0, 0), r"broke off in the attention of layer 0.*reset\(\)"),
            *(
                (f"prompt {place}", broken_off(place, Scene.read_prompt), r"broke off.*\[40, .*0\]")
                for place in BREAKS
            ),
        ],
        RuntimeError,
        "fresh",
    ),
    *fatal(
        [(f"crop({n}) after a break", broken_off(SECOND, method("crop", n)), BROKEN) for n in (-1, 0)],
        RuntimeError,
        budget="large",
    ),
    *usable([("attention without update", attend_twice, "given 0 tokens and asked for 1")], RuntimeError),
    *fatal(
        [
            ("another model, twin", by_model(seed=5), "another model"),
            ("another model, deeper", by_model(num_hidden_layers=4), "another model"),
        ]
    ),
    *fatal(
        [
            ("another model, deeper", by_model(num_hidden_layers=4), "3 layers.*4"),
            ("another model, shallower", by_model(num_hidden_layers=2), "3 layers.*2"),
        ],
        on="fresh",
    ),
    *usable(
        [
            ("another model, other heads", by_model(num_key_value_heads=1), "2 KV heads.*1"),
            ("another model, other width", by_model(head_dim=8), "width 16.*width 8"),
            ("another model, half", by_model(dtype=torch.bfloat16), "float32.*bfloat16"),
            ("another model, double", by_model(dtype=torch.float64), "float32.*float64"),
        ]
    ),
]


AttentionInterface.register("own_attention", sdpa_attention_forward)
AttentionMaskInterface.register("own_attention", sdpa_mask)


def attention_of(implementation: str) -> Callable[[Scene], Any]:
    """The next step, by the same model under another attention function."""

    def call(scene: Scene) -> None:
        before, config = scene.model.config._attn_implementation, scene.model.config
        try:
            config._attn_implementation = implementation
            # transformers would compile what makes a mask for flex_attention.
            scene.step(mask=causal(2, 1, 1, 41))
        finally:
            config._attn_implementation = before

    return call


def in_training(scene: Scene) -> None:
    """The next step with attention dropout."""
    modules = [layer.self_attn for layer in scene.model.model.layers]
    try:
        scene.model.train()
        for module in modules:
            module.attention_dropout = 0.5
        scene.step()
    finally:
        scene.model.eval()
        for module in modules:
            module.attention_dropout = 0.0


def causal(*shape: int) -> torch.Tensor:
    """A causal mask `(rows, 1, queries, columns)` for the last queries."""
    return torch.ones(shape, dtype=torch.bool).tril(shape[3] - shape[2])


def hidden(mask: torch.Tensor, *columns: int) -> torch.Tensor:
    """A copy of a mask that hides these columns of the first row."""
    mask = mask.clone()
    mask[0, ..., list(columns)] = 0
    return mask


def pad_on_the_right(scene: Scene) -> None:
    """The prompt with padding behind it, and a token."""
    scene.read_prompt(mask=hidden(ONES[:, :40], *range(30, 40)))
    scene.step(mask=hidden(ONES, *range(30, 40)))


ONES = torch.ones(2, 41, dtype=torch.long)
PADDED = ONES.clone()
PADDED[1, :PADDING] = 0
SQUARE = torch.ones(40, 40, dtype=torch.bool)

WINDOW = causal(2, 1, 5, 45) & ~causal(2, 1, 5, 45).tril(20)
MASK_CALLS: list[BadCall] = [
    # Too short: transformers takes what is missing for padding.
    *fatal(
        (
            f"{columns} columns for {length} tokens",
            step(length, mask=ONES[:, :1].expand(-1, columns)),
            f"mask covers {columns} tokens.*{40 + length}",
        )
        for columns, length in ((1, 1), (24, 1), (40, 1), (5, 5), (41, 5))
    ),
    *fatal(
        [
            ("no column at all", step(mask=ONES[:, :0]), "mask covers 0 tokens.*41"),
            ("all zero", step(mask=torch.zeros_like(ONES)), "mask covers 0 tokens.*41"),
            ("additive, 2-D", step(mask=torch.zeros(2, 41)), "mask covers 0 tokens.*41"),
            ("hides an old token", step(mask=hidden(ONES, 5)), "mask shows.*40, 41.*Pass a mask"),
            (
                "hides an old token from 5",
                step(5, mask=hidden(torch.ones(2, 45), 5)),
                "mask shows.*39, 40.*Pass a mask",
            ),
            ("padding where there was none", step(mask=PADDED), "mask shows.*41, 26.*Pass a mask"),
            ("hides the new token of a row", step(mask=hidden(ONES, 40)), "mask shows.*40, 41.*Pass a mask"),
            # Four dimensions: transformers passes such a mask on.
            ("4-D, 40 columns", step(mask=causal(2, 1, 1, 40)), "mask has 40 columns.*41"),
            ("4-D, 42 columns", step(mask=causal(2, 1, 1, 42)), "mask has 42 columns.*41"),
            ("4-D, 3 rows", step(mask=causal(3, 1, 1, 41)), r"mask.*\(3, 1, 1, 41\)"),
            ("4-D, too few queries", step(5, mask=causal(2, 1, 1, 45)), r"mask.*\(2, 1, 1, 45\)"),
            ("4-D, too many queries", step(mask=causal(2, 1, 41, 41)), r"mask.*\(2, 1, 41, 41\)"),
            ("4-D, integers", step(mask=causal(2, 1, 1, 41).long()), "mask.*int64"),
            ("4-D, all hidden", step(mask=torch.zeros(2, 1, 1, 41, dtype=torch.bool)), "mask covers 0"),
            ("4-D, hides an old token", step(mask=hidden(causal(2, 1, 1, 41), 3)), "mask shows.*40, 41"),
            *(
                (
                    f"positions {given}",
                    step(len(given), positions=torch.tensor([given])),
                    rf"position_ids. end at \[{given[-1]}.*40.*start again",
                )
                for given in ([0], [-5], [39], [12.5], [0, 1, 2, 3], [39, 40, 41, 42], [43, 42, 41, 40])
            ),
        ]
    ),
    *fatal(
        [
            ("shows padding", step(mask=ONES), "mask.*40, 25.*Pass a mask"),
            ("no mask, one token", step(mask=None), "mask.*40 columns.*40, 25.*Pass a mask"),
            ("shows padding to 5 tokens", step(5, mask=torch.ones(2, 45)), "mask shows.*40, 40.*Pass a mask"),
            ("no mask, 5 tokens", step(5, mask=None), "mask shows.*40, 40.*Pass a mask"),
            ("rows of padding exchanged", step(mask=PADDED.flip(0)), "mask shows.*26, 41.*Pass a mask"),
            (
                "positions that count the padded row's tokens for none",
                step(positions=torch.tensor([[40], [24]])),
                r"position_ids. end at \[40, 24\].*40, 25",
            ),
        ],
        on="padded",
    ),
    *fatal([("4-D, a window", step(5, mask=WINDOW), "not causal|mask shows")], (NotImplementedError, ValueError)),
    *fatal(
        [
            ("4-D, bidirectional", step(5, mask=torch.ones(2, 1, 5, 45, dtype=torch.bool)), "not causal"),
            ("flex_attention", attention_of("flex_attention"), "flex_attention.*sdpa"),
            ("somebody's attention", attention_of("own_attention"), "own_attention.*sdpa"),
            ("dropout", in_training, "dropout.*eval"),
        ],
        NotImplementedError,
    ),
    *fatal([("no attention", attention_of("no_such_attention"), "no_such_attention")], (KeyError, ValueError)),
    *(
        BadCall(f"prompt, {name}", prompt(mask=mask), match, error, "fresh", "either")
        for name, mask, match, error in (
            ("1 column", ONES[:, :1], "mask covers 1 tokens.*40", ValueError),
            ("39 columns", ONES[:, :39], "mask covers 39 tokens.*40", ValueError),
            ("39 columns, 4-D", causal(2, 1, 40, 39), "mask has 39 columns.*40", ValueError),
            ("41 columns, 4-D", causal(2, 1, 40, 41), "mask has 41 columns.*40", ValueError),
            ("39 queries", causal(2, 1, 39, 40), r"mask.*\(2, 1, 39, 40\)", ValueError),
            ("three rows", causal(3, 1, 40, 40), r"mask.*\(3, 1, 40, 40\)", ValueError),
            ("bidirectional", SQUARE.expand(2, 1, -1, -1), "not causal", NotImplementedError),
            ("transposed", causal(2, 1, 40, 40).mT, "not causal", NotImplementedError),
            ("packed", causal(2, 1, 40, 40) & ~SQUARE.tril(-20), "not causal", NotImplementedError),
            ("a bias", torch.randn(2, 1, 40, 40), "not causal|covers", (NotImplementedError, ValueError)),
        )
    ),
    *fatal(
        [("right padding", pad_on_the_right, "padded on the right.*Pad on the left")], NotImplementedError, "fresh"
    ),
    *usable(
        [
            (
                "three positions for one",
                step(positions=torch.tensor([[40, 41, 42]])),
                r"\(2, 2, 3, 16\).*\(2, 2, 1, 16\)",
            )
        ]
    ),
    *usable(
        [("positions of three rows", step(positions=torch.full((3, 1), 40)), "size of tensor")],
        RuntimeError,
    ),
]


RESTARTED = "start again|mask covers {} tokens"
GENERATE_CALLS: list[BadCall] = [
    *usable(
        [
            ("beams", generated(FULL, num_beams=3), "2 rows.*given 6"),
            ("two sequences", generated(FULL, num_return_sequences=2, do_sample=True), "2 rows.*given 4"),
            ("1 prompt", generated(random_tokens(1, 43)), "2 rows.*given 1"),
            ("3 prompts", generated(random_tokens(3, 43)), "2 rows.*given 3"),
            ("no new tokens wanted", generated(FULL, max_new_tokens=0), "max_new_tokens"),
            ("max_length exceeded", generated(FULL, max_new_tokens=None, max_length=10), "max_length"),
            ("a tuple", lambda scene: scene.generate(FULL, past_key_values=(scene.cache,)), "tuple"),
            ("no tokens", forward(MORE[:, :0]), "no new tokens: the cache has seen 40"),
            # A question alone, behind a context that the cache has read: `generate` takes it for the whole history.
            (
                "a question",
                generated(random_tokens(2, 20)),
                "seen 40, .*Give it the history with new tokens behind it",
            ),
            *(
                (f"cache_implementation={name!r}", generated(FULL, cache_implementation=name), "cache_implementation")
                for name in ("static", "dynamic", "quantized", "offloaded")
            ),
        ]
    ),
    *usable(
        [
            ("a list", lambda scene: scene.model(PROMPT, past_key_values=[scene.cache]), "list"),
            ("the cache as the mask", lambda scene: scene.model(PROMPT, scene.cache), "Cache"),
        ],
        AttributeError,
    ),
    *usable([("a token out of reach", forward(MORE[:, :1] + 1000), "out of range")], IndexError),
    *usable([("chunks of 0", generated(FULL, prefill_chunk_size=0), "split_size|chunk")], (RuntimeError, ValueError)),
    *fatal(
        [
            ("no cache wanted", generated(FULL, use_cache=False), "use_cache=False|mask covers 44 tokens"),
            (
                "another model",
                lambda scene: Scene(build_model("llama", seed=5), scene.cache).generate(FULL),
                "another model",
            ),
            *(
                (
                    f"prompt of {n} tokens",
                    generated(random_tokens(2, n, seed=7)),
                    f"position_ids.*{RESTARTED.format(n)}",
                )
                for n in (30, 39, 40)
            ),
        ]
    ),
    *fatal(
        # transformers cuts a prompt no longer than what was seen at the wrong end.
        (
            (
                f"prompt of {n} tokens",
                generated(random_tokens(2, n), attention_mask=PADDED[:, :n]),
                RESTARTED.format(n),
            )
            for n in (30, 39, 40)
        ),
        on="padded",
    ),
]
ALL_CALLS = METHOD_CALLS + ORDER_CALLS + MASK_CALLS + GENERATE_CALLS
HARMLESS_CALLS = [bad for bad in ALL_CALLS if bad.after == "usable"]
FATAL_CALLS = [bad for bad in ALL_CALLS if bad.after != "usable"]


def scene_of(case: CacheCase, on: str, budget: str) -> Scene:
    """A cache as it is before a call."""
    model = tiny_model("llama")
    scene = Scene(model, case.build(model, budget), is_padded=on == "padded")
    if on != "fresh":
        assert_same(scene.read_prompt(), undisturbed(case, budget, scene.is_padded)[0])
    return scene


@every_cache
def test_calls_that_change_nothing(case: CacheCase) -> None:
    """One cache goes through all of them, and then on as one that never saw them."""
    num_calls = 0
    for on, budget in sorted({(bad.on, bad.budget) for bad in HARMLESS_CALLS}):
        scene = scene_of(case, on, budget)
        calls = [bad for bad in HARMLESS_CALLS if (bad.on, bad.budget) == (on, budget)]
        if not case.evicts:  # all can be taken back
            calls = [bad for bad in calls if not bad.name.endswith("of evicted")]
        assert_refused(bad.on_scene(scene) for bad in calls)
        num_calls += len(calls)
        prompt_logits, later = undisturbed(case, budget, scene.is_padded)
        if on == "fresh":
            assert_same(scene.read_prompt(), prompt_logits)
        assert_same(scene.go_on(), later)
    assert num_calls > 120


# Each call on two caches of the quick tier.
@every_cache
def test_calls_that_ask_for_a_reset(case: CacheCase) -> None:
    for bad in FATAL_CALLS[CACHE_CASES.index(case) % 3 :: 3]:
        scene = scene_of(case, bad.on, bad.budget)
        assert_refused([bad.on_scene(scene)])
        if bad.after == "reset" or scene.cache.get_seq_length() > 0:
            assert_refused([(f"a step after {bad.name}", scene.step, r"cache\.reset\(\)", RuntimeError)])
            scene.cache.reset()
        assert scene.cache.get_seq_length() == sum(scene.cache.num_kept_tokens()) == 0
        prompt_logits, later = undisturbed(case, bad.budget, scene.is_padded)
        assert_same(scene.read_prompt() + scene.go_on(), prompt_logits + later, bad.name)


@parametrize_cases(case for case in CACHE_CASES if case.cache_class in (H2OCache, SnapKVCache))
def test_bad_masks_under_eager_attention(case: CacheCase) -> None:
    """The masks that arrive are additive."""
    model = build_model("llama", attention="eager")
    for bad in MASK_CALLS:
        if any(word in bad.name for word in ("column", "token", "padding")):
            scene = Scene(model, case.build(model), is_padded=bad.on == "padded")
            if bad.on != "fresh":
                scene.read_prompt()
            assert_refused([bad.on_scene(scene)])


@every_cache
def test_a_forward_pass_that_breaks_off_outside_the_layers_leaves_the_cache_whole(case: CacheCase) -> None:
    """Before the keys of the first layer its tokens were not read; behind the last layer they were."""
    model = tiny_model("llama")
    scene = Scene(model, case.build(model))
    prompt_logits, later = undisturbed(case, "tight", False)
    first = model.model.layers[0]
    early = (model.model.embed_tokens, first, first.input_layernorm, first.self_attn.v_proj)
    for module in early:
        break_off(scene, module, KeyboardInterrupt, scene.read_prompt)
    assert_same(scene.read_prompt(), prompt_logits)
    for module in early:
        break_off(scene, module, KeyboardInterrupt, scene.step)
    assert_same(scene.go_on(), later)
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
    """transformers refuses after it has asked the cache to record: the next `generate` is a plain one again."""
    scenes = [scene_of(case, "filled", "tight") for _ in range(2)]
    for assistant in ({"assistant_model": scenes[0].model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="batch_size = 1"):
            scenes[0].generate(FULL, **assistant)
    for scene in scenes:
        scene.generate(FULL)
    logits, wanted = (scene.forward(random_tokens(2, 1)) for scene in scenes)
    assert torch.equal(logits, wanted)


def test_the_class_in_place_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` marks it as the user's before it fails. Caches of the class notice the next start all the same."""
    model = tiny_model("llama")
    monkeypatch.setattr(H2OCache, "_is_user_defined", False, raising=False)
    # What stumbles over it first differs between versions of transformers.
    with pytest.raises(TypeError, match="get_seq_length|'property' object"):
        model.generate(PROMPT, past_key_values=H2OCache, max_new_tokens=2)
    cache = H2OCache(model.config, budget=12)
    cache.activate_past_recording()
    model.generate(PROMPT, past_key_values=cache, max_new_tokens=2)
    assert not any(layer.record_past for layer in cache.layers)


def test_a_cache_of_the_twin_of_a_model() -> None:
    """Hidden states are pruned by hooks on the model that was given; another one has none."""
    cache = PyramidCache(build_model("llama", seed=1), budget=0.5)
    twin = build_model("llama", seed=2)
    with pytest.raises(ValueError, match="another model"):
        Scene(twin, cache).read_prompt()
    with pytest.raises(RuntimeError, match=r"cache\.reset\(\)"):
        Scene(twin, cache).read_prompt()


@every_cache
def test_what_dynamic_cache_answers_too(case: CacheCase) -> None:
    """Calls that transformers defines for any number, and masks longer than what was seen."""
    scene = scene_of(case, "filled", "tight")
    other = Scene(scene.model, DynamicCache(config=scene.model.config))
    other.read_prompt()
    for layer in (2, 3, 99, -1):
        assert scene.cache.get_seq_length(layer) == other.cache.get_seq_length(layer)
    scene.step(mask=torch.ones(2, 60))
    scene.cache.reset()
    prompt_logits, later = undisturbed(case, "tight", False)
    assert_same(scene.read_prompt(), prompt_logits)
    scene.cache.reorder_cache([-1, -2])
    scene.cache.batch_select_indices(torch.tensor([True, True]))
    scene.cache.reorder_cache(torch.tensor([1, 0], dtype=torch.int32))
    scene.cache.batch_repeat_interleave(np.int64(1))
    assert_same(scene.go_on(), later)


@torch.no_grad()
def test_outputs_of_evicted_tokens_are_refused() -> None:
    """Attention weights, and hidden states where a prompt's are pruned."""
    model, tokens = build_model("llama", attention="eager"), PROMPT[:1]
    for cache in (PyramidCache(model), PyramidCache(model.config), H2OCache(model), StreamingLLMCache(model, 12)):
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(tokens, past_key_values=cache, output_attentions=True)
    whole = model(tokens, past_key_values=H2OCache(model, budget=1.0), output_attentions=True)
    assert all(weights.shape == (1, 4, 40, 40) for weights in whole.attentions)
    model(tokens, past_key_values=PyramidCache(model.config, budget=0.4), output_hidden_states=True)
    with pytest.raises(NotImplementedError, match="output_hidden_states"):
        model(tokens, past_key_values=PyramidCache(model, budget=0.4), output_hidden_states=True)


@torch.no_grad()
def test_crop_is_all_or_nothing() -> None:
    """The first layer holds the whole prompt and could be cropped, the deeper ones have evicted."""
    model = tiny_model("llama")
    cache = PyramidCache(model.config, budget=0.9, min_context_length=0)
    model(PROMPT[:1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-5)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [40, 40, 40]


@torch.no_grad()
def test_crop_of_a_padded_turn() -> None:
    """Only the tokens among the cropped columns count."""
    model, rows = tiny_model("llama"), random_rows((9, 4))
    input_ids, mask = left_pad(rows)
    cache, wanted = H2OCache(model.config, budget=1.0), DynamicCache(config=model.config)
    more = random_tokens(2, 3)
    for each in (cache, wanted):
        model(more, past_key_values=each)
    model(input_ids, attention_mask=torch.cat([torch.ones_like(more), mask], dim=1), past_key_values=cache)
    cache.crop(-9)
    assert cache.layers[0].row_lengths == [3, 3]
    output, expected = (model(more[:, :1], past_key_values=each).logits for each in (cache, wanted))
    assert torch.equal(output, expected)


@torch.no_grad()
def test_position_ids_with_gaps_are_refused_by_streaming_llm() -> None:
    model, tokens, positions = tiny_model("llama"), PROMPT[:1], torch.arange(40)[None]
    shifted, plain = (
        model(tokens, position_ids=each, past_key_values=StreamingLLMCache(model.config, 12)).logits
        for each in (positions + 7, None)
    )
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="position_ids"):
        model(tokens, position_ids=2 * positions, past_key_values=StreamingLLMCache(model.config, 12))
