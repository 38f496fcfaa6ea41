"""
Bad calls have clear errors. Afterwards the cache goes on as if nothing had happened, or asks for `reset()`. What a
user may do to a model is no bad call.
"""

import copy
import io
import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache as remember
from functools import partial
from operator import methodcaller
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import transformers
from caches import CACHE_CASES, PLAIN_CASES, RECORDING_CASES, CacheCase, every_cache, parameters_of, parametrize_cases
from models import build_config, build_model, generate, left_pad, random_rows, random_tokens, tiny_model
from reference import attention_implementation
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pyramid_cache import (
    H2OCache,
    MassiveActivationCache,
    PyramidCache,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
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
        *(np.int64(0), np.float32(-0.5), torch.tensor(0.4)),
        *("12 apples", "MiB", "-4MiB", "0MiB", "0.4", "40%", "1e3MB", "0.2B", "12 TiB of memory", "nanMiB"),
    ],
    "preset": ["llama-9-900b", "", 7, True, ["llama-2-7b"], np.array(["llama-2-7b"])],
    "num_sink_tokens": NO_COUNTS,
    "min_context_length": NO_COUNTS,
    "first_pruned_layer": [*NO_COUNTS, 3, 2],
    "window_size": NO_POSITIVE_COUNTS,
    "num_recent": NO_POSITIVE_COUNTS,
    "kernel_size": [*NO_POSITIVE_COUNTS, 4],
    "eviction_interval": NO_POSITIVE_COUNTS,
    "ranking": ["heads", "", 1, True, ("head",)],
    "protect": [
        *("12", b"12", {"tokens": 12}, True, np.bool_(True), 1.5, math.nan, -1, 2**31, int, torch.tensor(0.5)),
        *([1.5], [0, -1], [True], [2**31 - 1], [[0], 1], [[0], [None]], torch.tensor([True]), np.array([0.5])),
    ],
    "num_future_positions": NO_POSITIVE_COUNTS,
    "heavy_ratio": [*NO_SHARES, 1.0],
    "recent_ratio": [*NO_SHARES, 1.0],
    "decay_ratio": [*NO_SHARES, 0, 0.0],
    "prefill_depth": NO_SHARES,
    "floor_ratio": NO_SHARES,
    "first_ratio": NO_SHARES,
    "importance_weight": NO_SHARES,
    "similarity_threshold": NO_SHARES,
    "distance_weight": [*NO_NUMBERS, 0, 0.0, -1.2, 1e300],
    "beta": [*NO_NUMBERS, 0, 0.5, -2, 2**31, 10**30],
    "epsilon": [*NO_NUMBERS, -0.1],
    "use_covariance": NO_BOOLS,
    "merge": NO_BOOLS,
    "quantize": ["int4", "", 4, True, ["kivi4"], "KIVI4"],
    "residual_length": NO_POSITIVE_COUNTS[1:],  # None is the default of caches that evict
    "nbits": [*NO_POSITIVE_COUNTS, 1, 3, 8, 4.0],
    "group_size": [*NO_POSITIVE_COUNTS, 4, 12],
    "thin_keys": [*NO_NUMBERS[1:], -0.1, 1, 1.0, 40, -1],
    "image_tokens": [5, "ab", True, [], (3, 3), (4, 2), (-1, 4), (1, 2, 3), (1.0, 2), [(1, 2), 3], [[1, 2], [2]]],
    "threshold": [*NO_NUMBERS, -1.1, 1.1],
}
# What one cache refuses besides.
ALSO_IMPOSSIBLE: dict[tuple[type[CompressedCache], str], list[Any]] = {
    (PyramidCache, "budget"): [1, 4, Fraction(3, 2)],
    (StreamingLLMCache, "budget"): [3, 4],
    (StreamingLLMCache, "num_sink_tokens"): [12, 13],
}
# Two caches test their settings in files of their own.
CLASSES = {case.cache_class for case in PLAIN_CASES} - {MassiveActivationCache, ShadowKVCache}
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
        for argument, parameter in list(parameters_of(cache_class).items())[1:]
        for value in IMPOSSIBLE[argument] + ALSO_IMPOSSIBLE.get((cache_class, argument), [])
        if value is not None or parameter.default is not None
    ]
    assert len(calls) > 20
    assert_refused(calls)


@every_class
def test_no_config_of_a_decoder_and_no_such_argument(cache_class: type[CompressedCache]) -> None:
    of_bert = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    sources = (
        ("meta-llama/Llama-2-7b", "config.*str"),
        (transformers.LlamaConfig, "config.*class LlamaConfig"),
        (torch.nn.Linear(2, 2), "config.*Linear"),
        (build_config("llama").to_dict(), "config.*dict"),
        (transformers.BertConfig(**of_bert), "bert.*encoder"),
        (transformers.T5Config(d_model=32, num_layers=2, num_heads=2), "t5.*Use DynamicCache|t5.*encoder-decoder"),
    )
    errors, known = (ValueError, NotImplementedError), {"budget": 12}
    if "budget" not in parameters_of(cache_class):
        known = {"residual_length": 12}
    assert_refused((match, partial(cache_class, source, **known), match, errors) for source, match in sources)
    config = build_config("llama")
    calls = [(name, partial(cache_class, config, **known, **{name: 12}), name) for name in ("bugdet", "offloading")]
    calls += [("four", partial(cache_class, config, 12, 0.5, 4), "positional")]
    assert_refused((*call, TypeError) for call in [*calls, ("none", partial(cache_class, **known), "config")])


def test_numbers_of_numpy_are_numbers() -> None:
    model = tiny_model("llama")
    for cache_class, given, plain in (
        (PyramidCache, {"budget": Fraction(1, 2), "recent_ratio": np.float64(0.25)}, {"recent_ratio": 0.25}),
        (PyramidCache, {"decay_ratio": np.float32(0.5), "first_pruned_layer": np.int64(1)}, {"first_pruned_layer": 1}),
        (H2OCache, {"budget": np.int64(16), "heavy_ratio": np.float16(0.25)}, {"budget": 16, "heavy_ratio": 0.25}),
    ):
        others = {"budget": 0.5, "decay_ratio": 0.5} if cache_class is PyramidCache else {}
        scenes = [Scene(model, cache_class(model.config, **others | each)) for each in (given, plain)]
        assert_same(*(scene.read_all() for scene in scenes))


def test_the_largest_settings_keep_everything() -> None:
    model, largest = tiny_model("llama"), 2**31 - 1
    wanted = Scene(model, DynamicCache(config=model.config)).read_all()
    for cache_class, settings in (
        (PyramidCache, {"budget": "9" * 400 + "GiB"}),
        (PyramidCache, {"budget": 1.0, "num_sink_tokens": largest, "min_context_length": largest}),
        (SnapKVCache, dict.fromkeys(("budget", "window_size", "eviction_interval"), largest)),
        (StreamingLLMCache, {"budget": largest, "num_sink_tokens": largest - 1}),
    ):
        results = Scene(model, cache_class(model.config, **settings)).read_all()
        for result, expected in zip(results, wanted, strict=False):  # a DynamicCache tells no positions
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_extreme_budgets() -> None:
    """The steepest pyramid meets its budget, and bytes that hold no token are refused."""
    for decay_ratio in (1e-30, 1e-300, 5e-324):
        assert pyramid_schedule(100, 150, (1.0, 0.5, decay_ratio), 4) == (97, 49, 4)
    for cache_class in (PyramidCache, H2OCache):
        scene = Scene(tiny_model("llama"), cache_class(build_config("llama"), budget="16B"))
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

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, model: PreTrainedModel | None = None, **kwargs: Any) -> torch.Tensor:
        """Logits `(batch, new, vocabulary)` of the tokens, by this or another model with the cache."""
        names = {"mask": "attention_mask", "positions": "position_ids"}
        kwargs = {names[name]: value for name, value in kwargs.items()}
        return (model or self.model)(tokens, past_key_values=self.cache, **kwargs).logits

    def step(self, length: int = 1, start: int = 0, **kwargs: Any) -> torch.Tensor:
        """The next tokens after the prompt; by default with a mask where there is padding."""
        return self.forward(MORE[:, start : start + length], **self.right_mask(40 + start + length) | kwargs)

    def right_mask(self, length: int) -> dict[str, torch.Tensor]:
        """The mask over that many columns, if one is needed."""
        mask = (torch.arange(length) >= torch.tensor([[0], [PADDING]])).long()
        return {"mask": mask} if self.is_padded else {}

    def read_prompt(self, **kwargs: Any) -> list[torch.Tensor]:
        """Feed the prompt and return the logits of its last token."""
        return [self.forward(PROMPT, **self.right_mask(40) | kwargs)[:, -1]]

    def go_on(self) -> list[torch.Tensor]:
        """Feed the rest, in pieces: logits of the last token of each, and what every layer then holds."""
        logits = [self.step(length, start)[:, -1] for length, start in PIECES]
        return logits + ([] if isinstance(self.cache, DynamicCache) else [self.cache.positions(i) for i in range(3)])

    def read_all(self) -> list[torch.Tensor]:
        """The prompt and the rest."""
        return self.read_prompt() + self.go_on()

    def generate(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A call of `generate`."""
        return self.model.generate(tokens, **{"past_key_values": self.cache, "max_new_tokens": 3} | kwargs)


def assert_same(results: list[torch.Tensor], wanted: list[torch.Tensor], name: str = "") -> None:
    """Bit for bit, after the call of that name."""
    assert len(results) == len(wanted)
    for result, expected in zip(results, wanted, strict=True):
        assert torch.equal(result, expected), name


CacheCase.__hash__ = lambda case: hash(case.name)


@remember
def undisturbed(case: CacheCase, on: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a cache gives for the prompt and for the rest if nothing bad happens."""
    scene = scene_of(case, on, is_read=False)
    return scene.read_prompt(), scene.go_on()


def scene_of(case: CacheCase, on: str, model: PreTrainedModel | None = None, is_read: bool = True) -> Scene:
    """A cache as it is before a call."""
    model = model or tiny_model("llama")
    scene = Scene(model, case.build(model, "large" if on == "large" else "tight"), is_padded=on == "padded")
    if is_read and on != "fresh":
        scene.read_prompt()
    return scene


Calls = dict[tuple[str, Errors], list[tuple[str, Callable[[Scene], Any]]]]


def of_cache(name: str, *arguments: Any) -> Callable[[Scene], Any]:
    """A call of a method of the cache."""
    return lambda scene: getattr(scene.cache, name)(*arguments)


def by_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Callable[[Scene], Any]:
    """The next step by another model."""
    return lambda scene: scene.step(model=build_model("llama", seed=seed, **overrides).to(dtype))


# Calls of methods of the scene.
forward, step, prompt = (partial(methodcaller, name) for name in ("forward", "step", "read_prompt"))
generated = partial(methodcaller, "generate")

GOOD = torch.ones(2, 2, 1, 16)
# Keys and values that no cache takes.
NO_STATES: list[tuple[str, Any, Any]] = [
    ("NoneType", GOOD, None),
    ("list", GOOD.tolist(), GOOD.tolist()),
    (r"\(2, 1, 16\)", GOOD[0], GOOD[0]),
    (r"\(2, 2, 0, 16\)", GOOD[:, :, :0], GOOD[:, :, :0]),
    ("int64", GOOD.long(), GOOD.long()),
    (r"\(2, 2, 1, 16\).*\(2, 4, 1, 16\)", GOOD, GOOD.repeat(1, 2, 1, 1)),
    ("cpu.*meta", GOOD, GOOD.to("meta")),
]
# And those that do not fit what a filled cache holds.
OTHER_STATES: list[tuple[str, Any, Any]] = [
    ("2 rows.*given 1", GOOD[:1], GOOD[:1]),
    ("2 KV heads.*1 KV heads of width 16", GOOD[:, :1], GOOD[:, :1]),
    ("16 .values.*given .*width 16 .keys. and 8 .values", GOOD, GOOD[..., :8]),
    ("float32.*float64", GOOD, GOOD.double()),
    ("cpu.*meta", GOOD.to("meta"), GOOD.to("meta")),
]
NO_ROWS: list[tuple[str, Any]] = [
    *(("2.*2 rows", torch.tensor([0, 2])), ("-3.*2 rows", torch.tensor([0, -3])), ("7.*2 rows", [0, 7])),
    *(("float32", torch.tensor([0.0, 1.0])), (r"\(1, 2\)", torch.tensor([[0, 1]]))),
    *(("3.*2 rows", torch.tensor([True, False, True])), ("no row", torch.tensor([False, False]))),
    *(("no row", []), ("None", None), ("01", "01")),
]
NO_LAYERS = (3, -1, "0", None, 1.0)
NO_CROPS = (3, True, -1.5, math.nan, "2", None, torch.tensor(3))
NO_REPEATS = (0, -1, 2.0, "2", None, torch.tensor([1, 2]), math.nan)

# By the cache before and the error: messages and calls. A cache is "fresh", "filled" with a prompt, "padded" if the
# prompt was, or "large" if there was room for it.
HARMLESS: Calls = {
    ("fresh", ValueError): [
        ("holds nothing yet", of_cache("positions", 0)),
        *((f"layer.*{shown(value)}", of_cache("update", GOOD, GOOD, value)) for value in NO_LAYERS),
        *((match, of_cache("update", *pair, 0)) for match, *pair in NO_STATES),
    ],
    ("filled", ValueError): [
        *((f"layer.*{shown(value)}", of_cache("update", GOOD, GOOD, value)) for value in NO_LAYERS),
        *((match, of_cache("update", *pair, 0)) for match, *pair in NO_STATES + OTHER_STATES),
        *((match, of_cache("reorder_cache", value)) for match, value in NO_ROWS),
        *((match, of_cache("batch_select_indices", value)) for match, value in NO_ROWS),
        *((shown(value), of_cache("batch_repeat_interleave", value)) for value in NO_REPEATS),
        *((f"layer.*{shown(value)}", of_cache("positions", value)) for value in (*NO_LAYERS, slice(0, 1))),
        *((f"crop.*{shown(value)}.*negative", of_cache("crop", value)) for value in NO_CROPS),
        *((f"2 rows.*{n}", forward(random_tokens(n, length))) for n, length in ((1, 5), (3, 1), (4, 5))),
        ("2 KV heads.*1", by_model(num_key_value_heads=1)),
        ("width 16.*width 8", by_model(head_dim=8)),
        ("float32.*bfloat16", by_model(dtype=torch.bfloat16)),
        (r"\(2, 2, 3, 16\).*\(2, 2, 1, 16\)", step(positions=torch.tensor([[40, 41, 42]]))),
        ("no new tokens: the cache has seen 40", forward(MORE[:, :0])),
        # A question alone, behind a context that the cache has read: `generate` takes it for the whole history.
        ("seen 40, .*Give `generate` the history with new tokens at its end", generated(random_tokens(2, 20))),
        ("2 rows.*given 6", generated(FULL, num_beams=3)),
        ("2 rows.*given 1", generated(FULL[:1])),
        ("max_new_tokens", generated(FULL, max_new_tokens=0)),
        ("tuple", lambda scene: scene.generate(FULL, past_key_values=(scene.cache,))),
    ],
    ("filled", NotImplementedError): [("crop.*-1.*undone", of_cache("crop", -1))],
    ("filled", RuntimeError): [
        ("size of tensor", step(positions=torch.full((3, 1), 40))),
    ],
    ("filled", AttributeError): [
        ("list", lambda scene: scene.model(PROMPT, past_key_values=[scene.cache])),
        ("Cache", lambda scene: scene.model(PROMPT, scene.cache)),
    ],
    ("filled", IndexError): [("out of range", forward(MORE[:, :1] + 1000))],
    ("filled", (RuntimeError, ValueError)): [("split_size|chunk", generated(FULL, prefill_chunk_size=0))],
    ("large", ValueError): [(f"crop.*{n}.*only 40 tokens", of_cache("crop", n)) for n in (-41, -(10**30))],
}


def update(scene: Scene, *layers: int) -> None:
    """Keys go out to these layers and never come back."""
    for layer in layers:
        scene.cache.update(GOOD, GOOD, layer)


# Where a forward pass can break off so that some layers have seen its tokens and others have not.
BREAKS = ("model.layers.1", "model.layers.0.self_attn.o_proj", "model.layers.2.input_layernorm")


def break_off(module: torch.nn.Module, call: Callable[[], Any]) -> None:
    """A call that is interrupted just before a module of the model runs."""
    handle = module.register_forward_pre_hook(Mock(side_effect=KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        handle.remove()


def broken_off(then: Callable[[Scene], Any], place: int = 0, length: int = 1) -> Callable[[Scene], Any]:
    """The next tokens break off, or the prompt of a fresh cache; then something else is called."""

    def call(scene: Scene) -> None:
        read = partial(scene.step, length) if scene.cache.get_seq_length() else scene.read_prompt
        break_off(scene.model.get_submodule(BREAKS[place]), read)
        then(scene)

    return call


def fail_in_attention(scene: Scene) -> None:
    """The second layer's attention runs out of memory."""
    with patch.object(scene.cache.layers[1], "attend_step", side_effect=MemoryError), pytest.raises(MemoryError):
        scene.step()
    scene.step()


transformers.AttentionInterface.register("own_attention", sdpa_attention_forward)
transformers.AttentionMaskInterface.register("own_attention", sdpa_mask)


def attention_of(implementation: str) -> Callable[[Scene], Any]:
    """The next step, by the same model under another attention function."""

    def call(scene: Scene) -> None:
        with attention_implementation(scene.model, implementation):
            # transformers would compile what makes a mask for flex_attention.
            scene.step(mask=causal(2, 1, 1, 41))

    return call


def in_training(scene: Scene) -> None:
    """The next step with attention dropout."""
    with patch.object(scene.model.model.layers[0].self_attn, "attention_dropout", 0.5):
        scene.model.train()
        try:
            scene.step()
        finally:
            scene.model.eval()


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
PADDED = (torch.arange(41) >= torch.tensor([[0], [PADDING]])).long()
SQUARE = torch.ones(40, 40, dtype=torch.bool)
EITHER = (NotImplementedError, ValueError)
BROKEN = r"broke off.*\[4.,.* 40\].*reset\(\)"
IN_ATTENTION = r"broke off in the attention of layer {}.*reset\(\)"
RESTARTED = "start again|mask covers {} tokens"
# Masks and positions of a prompt and of the next tokens.
MASKS: Calls = {
    ("fresh", ValueError): [
        ("mask covers 39 tokens.*40", prompt(mask=ONES[:, :39])),
        *((f"mask has {n} columns.*40", prompt(mask=causal(2, 1, 40, n))) for n in (39, 41)),
        (r"mask.*\(2, 1, 39, 40\)", prompt(mask=causal(2, 1, 39, 40))),
    ],
    ("fresh", NotImplementedError): [
        ("not causal", prompt(mask=SQUARE.expand(2, 1, -1, -1))),
        ("not causal", prompt(mask=causal(2, 1, 40, 40) & ~SQUARE.tril(-20))),
        ("padded on the right.*Pad on the left", pad_on_the_right),
    ],
    ("fresh", EITHER): [("not causal|covers", prompt(mask=torch.randn(2, 1, 40, 40)))],
    ("filled", ValueError): [
        # Too short: transformers takes what is missing for padding.
        *((f"mask covers {n} tokens.*{n + 1}", step(mask=torch.ones(2, n))) for n in (0, 40)),
        ("mask covers 41 tokens.*45", step(5, mask=ONES)),
        ("mask shows.*39, 40.*Pass a mask", step(5, mask=hidden(torch.ones(2, 45), 5))),
        *(("mask shows.*40, 41.*Pass a mask", step(mask=hidden(mask, 5))) for mask in (ONES, causal(2, 1, 1, 41))),
        # Four dimensions: transformers passes such a mask on.
        *((f"mask has {n} columns.*41", step(mask=causal(2, 1, 1, n))) for n in (40, 42)),
        *((f"mask.*{shown(shape)}", step(mask=causal(*shape))) for shape in ((3, 1, 1, 41), (2, 1, 41, 41))),
        ("mask.*int64", step(mask=causal(2, 1, 1, 41).long())),
        *(
            (rf"position_ids. end at \[{ids[-1]}.*40.*start again", step(len(ids), positions=torch.tensor([ids])))
            for ids in ([0], [12.5], [43, 42, 41, 40])
        ),
    ],
    ("padded", ValueError): [
        ("mask.*40, 25.*Pass a mask", step(mask=ONES)),
        ("mask.*40 columns.*40, 25.*Pass a mask", step(mask=None)),
        ("mask shows.*26, 41.*Pass a mask", step(mask=PADDED.flip(0))),
        (r"position_ids. end at \[40, 24\].*40, 25", step(positions=torch.tensor([[40], [24]]))),
    ],
    ("filled", NotImplementedError): [("not causal", step(5, mask=torch.ones(2, 1, 5, 45, dtype=torch.bool)))],
    ("filled", EITHER): [("not causal|mask shows", step(5, mask=causal(2, 1, 5, 45) & ~causal(2, 1, 5, 45).tril(20)))],
}
# What the attention of the first layer refuses besides.
IN_FIRST_LAYER: Calls = {
    ("filled", (NotImplementedError,)): [
        *((f"{name}.*sdpa", attention_of(name)) for name in ("flex_attention", "own_attention")),
        ("dropout.*eval", in_training),
    ],
    ("fresh", (ValueError,)): [(f"3 layers.*{n}", by_model(num_hidden_layers=n)) for n in (2, 4)],
    ("filled", (ValueError,)): [
        ("another model", by_model(seed=5)),
        ("another model", by_model(num_hidden_layers=4)),
        (f"position_ids.*{RESTARTED.format(40)}", generated(random_tokens(2, 40, seed=7))),
    ],
    # transformers cuts a prompt no longer than what was seen at the wrong end.
    ("padded", (ValueError,)): [
        (RESTARTED.format(n), generated(random_tokens(2, n), attention_mask=PADDED[:, :n])) for n in (30, 40)
    ],
}
# Calls after which the cache asks for a reset.
FATAL: Calls = {
    ("filled", (KeyError, ValueError)): [("no_such_attention", attention_of("no_such_attention"))],
    ("filled", RuntimeError): [
        (IN_ATTENTION.format(0), lambda scene: update(scene, 0, 0)),
        (IN_ATTENTION.format(1), fail_in_attention),
        ("layer 0 did not go through.*attn_implementation='sdpa'", lambda scene: update(scene, 0, 1, 2)),
        ("reset", lambda scene: [update(scene, 2), scene.step()]),
        (BROKEN, broken_off(generated(FULL))),
        (BROKEN, broken_off(lambda scene: Scene(scene.model, copy.deepcopy(scene.cache)).step(), length=4)),
        *((BROKEN, broken_off(Scene.step, place)) for place in range(3)),
    ],
    ("fresh", RuntimeError): [
        (IN_ATTENTION.format(0), lambda scene: update(scene, 0, 0)),
        *((r"broke off.*\[40, .*0\].*reset\(\)", broken_off(Scene.read_prompt, place)) for place in range(3)),
    ],
    ("large", RuntimeError): [(BROKEN, broken_off(of_cache("crop", n))) for n in (-1, 0)],
}


@parametrize_cases(PLAIN_CASES)
def test_calls_that_change_nothing(case: CacheCase) -> None:
    """One cache goes through all of them, and then on as one that never saw them."""
    for on in ("fresh", "filled", "large", "padded"):
        scene = scene_of(case, on)
        for (before, error), calls in [*HARMLESS.items(), *MASKS.items(), *IN_FIRST_LAYER.items()]:
            if before == on:
                # Where nothing is evicted all can be taken back.
                calls = [call for call in calls if case.evicts or "undone" not in call[0]]
                assert_refused((match, partial(call, scene), match, error) for match, call in calls)
        prompt_logits, later = undisturbed(case, on)
        assert_same((scene.read_prompt() if on == "fresh" else prompt_logits) + scene.go_on(), prompt_logits + later)
    # Three new tokens are read. Then all come again.
    scenes = [scene_of(case, "filled") for _ in range(2)]
    with pytest.raises(ValueError, match="use_cache=False|mask covers 44 tokens"):
        scenes[0].generate(FULL, use_cache=False)
    scenes[1].step(3)
    assert_same(*([scene.step(2, start=3)] for scene in scenes))


@torch.no_grad()
def test_steps_like_the_last_one_are_refused_too() -> None:
    """They skip the checks of what they have in common alone. The last step is as if none had been tried."""
    model, last = tiny_model("llama"), []
    token, bad_mask = random_tokens(2, 1, seed=9), {"attention_mask": torch.ones(2, 7)}
    for is_disturbed in (False, True):
        cache = SnapKVCache(model.config, budget=12)
        with torch.inference_mode():
            for num_new in (40, 1, 1, 1):
                model(random_tokens(2, num_new, seed=num_new), past_key_values=cache)
        model(token, past_key_values=cache)
        if is_disturbed:
            with pytest.raises(ValueError, match="attention mask"):
                model(token, **bad_mask, past_key_values=cache)
            with pytest.raises(NotImplementedError, match="output_attentions"):
                model(token, output_attentions=True, past_key_values=cache)
            with pytest.raises(ValueError, match="filled by another model"):
                build_model("llama")(token, past_key_values=cache)
        last.append((model(token, past_key_values=cache).logits, cache.positions(2)))
    assert all(map(torch.equal, *last))


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [H2OCache, StreamingLLMCache, TOVACache])
def test_a_refused_step_gives_its_slot_back(cache_class: type[CompressedCache]) -> None:
    """Between steps, the free slot is anywhere among the others."""
    model, last = tiny_model("llama"), []
    for is_disturbed in (False, True):
        cache = cache_class(model.config, budget=12, eviction_interval=1)
        for num_new in (40, *[1] * 9):
            if is_disturbed and num_new == 1:
                before = cache.positions(0)
                with pytest.raises(ValueError, match="attention mask"):
                    model(random_tokens(2, 1, seed=9), attention_mask=torch.ones(2, 1), past_key_values=cache)
                assert torch.equal(cache.positions(0), before)
            logits = model(random_tokens(2, num_new, seed=num_new), past_key_values=cache).logits
        last.append((logits, cache.positions(2)))
    assert all(map(torch.equal, *last))


# Each call on one cache of the quick tier in turn: the engine notices them for all.
@every_cache
def test_calls_that_ask_for_a_reset(case: CacheCase) -> None:
    flat = [(key, call) for key, calls in FATAL.items() for call in calls]
    for (on, error), (match, call) in flat[CACHE_CASES.index(case) % 6 :: 6]:
        scene = scene_of(case, on)
        assert_refused([(match, partial(call, scene), match, error)])
        assert_refused([(f"a step after {match}", scene.step, r"cache\.reset\(\)", RuntimeError)])
        scene.cache.reset()
        assert scene.cache.get_seq_length() == sum(scene.cache.num_kept_tokens()) == 0
        prompt_logits, later = undisturbed(case, on)
        assert_same(scene.read_all(), prompt_logits + later, match)


@parametrize_cases(case for case in CACHE_CASES if case.cache_class in (H2OCache, SnapKVCache))
def test_bad_masks_under_eager_attention(case: CacheCase) -> None:
    """The masks that arrive are additive."""
    model = build_model("llama", attention="eager")
    for (on, error), calls in MASKS.items():
        for match, call in calls:
            if re.match("mask (shows.*Pass a mask|covers [1-9]|has)", match):
                assert_refused([(match, partial(call, scene_of(case, on, model)), match, error)])


@every_cache
def test_a_forward_pass_that_breaks_off_outside_the_layers_leaves_the_cache_whole(case: CacheCase) -> None:
    """Before the keys of the first layer its tokens were not read; behind the last layer they were."""
    scene = scene_of(case, "fresh")
    prompt_logits, later = undisturbed(case, "fresh")
    model, first = scene.model, scene.model.model.layers[0]
    early = (model.model.embed_tokens, first, first.input_layernorm, first.self_attn.v_proj)
    for module in early:
        break_off(module, scene.read_prompt)
    assert_same(scene.read_prompt(), prompt_logits)
    for module in early:
        break_off(module, scene.step)
    assert_same(scene.go_on(), later)
    for module in (model.model.norm, model.lm_head):
        scene.cache.reset()
        break_off(module, scene.read_prompt)
        assert_same(scene.go_on(), later)


@every_cache
def test_generate_that_was_broken_off_can_be_taken_up_again(case: CacheCase) -> None:
    """The last token that was streamed has not been read yet."""
    model, prompt = tiny_model("llama"), PROMPT[:1]
    whole = model.generate(prompt, past_key_values=case.build(model), max_new_tokens=9)
    cache, streamer = case.build(model), Mock()
    streamer.put.side_effect = [None] * 4 + [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, past_key_values=cache, max_new_tokens=9, streamer=streamer)
    history = torch.cat([call.args[0].flatten() for call in streamer.put.call_args_list])[None]
    assert history.shape[1] == 44 and cache.get_seq_length() == 43
    assert torch.equal(model.generate(history, past_key_values=cache, max_new_tokens=5), whole)


@parametrize_cases(RECORDING_CASES)
def test_assistants_that_are_refused(case: CacheCase) -> None:
    """transformers refuses after it has asked the cache to record: the next `generate` is a plain one again."""
    scenes = [scene_of(case, "filled") for _ in range(2)]
    for assistant in ({"assistant_model": scenes[0].model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="batch_size = 1"):
            scenes[0].generate(FULL, **assistant)
    for scene in scenes:
        scene.generate(FULL)
    logits, wanted = (scene.forward(random_tokens(2, 1)) for scene in scenes)
    assert torch.equal(logits, wanted)


def test_the_class_and_a_twin_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    `generate` marks a class as the user's cache before it fails. Caches of it notice the next start all the same. The
    hooks that prune hidden states are on the model that was given: its twin has none.
    """
    model = tiny_model("llama")
    monkeypatch.setattr(H2OCache, "_is_user_defined", False, raising=False)
    # What stumbles over it first differs between versions of transformers.
    with pytest.raises(TypeError, match="get_seq_length|'property' object"):
        model.generate(PROMPT, past_key_values=H2OCache, max_new_tokens=2)
    cache = H2OCache(model.config, budget=12)
    cache.activate_past_recording()
    Scene(model, cache).generate(PROMPT)
    assert not any(layer.record_past for layer in cache.layers)
    with pytest.raises(ValueError, match="another model"):
        Scene(build_model("llama", seed=2), PyramidCache(model, budget=0.5)).read_prompt()


@every_cache
def test_what_dynamic_cache_answers_too(case: CacheCase) -> None:
    """Calls that transformers defines for any number, and masks longer than what was seen."""
    scene = scene_of(case, "filled")
    for layer, length in ((2, 40), (3, 0), (99, 0), (-1, 40)):
        assert scene.cache.get_seq_length(layer) == length
    scene.step(mask=torch.ones(2, 60))
    scene.cache.reset()
    prompt_logits, later = undisturbed(case, "filled")
    assert_same(scene.read_prompt(), prompt_logits)
    scene.cache.reorder_cache([-1, -2])
    scene.cache.batch_select_indices(torch.tensor([True, True]))
    scene.cache.reorder_cache(torch.tensor([1, 0], dtype=torch.int32))
    scene.cache.batch_repeat_interleave(np.int64(1))
    assert_same(scene.go_on(), later)


@torch.no_grad()
def test_attention_weights_of_evicted_tokens_are_refused() -> None:
    model, tokens = build_model("llama", attention="eager"), PROMPT[:1]
    for cache in (PyramidCache(model), PyramidCache(model.config), H2OCache(model), StreamingLLMCache(model, 12)):
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(tokens, past_key_values=cache, output_attentions=True)
    whole = model(tokens, past_key_values=H2OCache(model, budget=1.0), output_attentions=True)
    assert all(weights.shape == (1, 4, 40, 40) for weights in whole.attentions)


@torch.no_grad()
def test_crop_is_all_or_nothing_and_counts_tokens() -> None:
    """The first layer could be cropped, the deeper ones have evicted. Of a padded turn only the tokens count."""
    model = tiny_model("llama")
    cache = PyramidCache(model.config, budget=0.9, min_context_length=0)
    model(PROMPT[:1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-5)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [40, 40, 40]

    input_ids, mask = left_pad(random_rows((9, 4)))
    cache, wanted = H2OCache(model.config, budget=1.0), DynamicCache(config=model.config)
    for each in (cache, wanted):
        model(MORE[:, :3], past_key_values=each)
    model(input_ids, attention_mask=torch.cat([ONES[:, :3], mask], dim=1), past_key_values=cache)
    cache.crop(-9)
    assert cache.layers[0].state.row_lengths == [3, 3]
    output, expected = (model(MORE[:, :1], past_key_values=each).logits for each in (cache, wanted))
    assert torch.equal(output, expected)


def test_position_ids_with_gaps_are_refused_by_streaming_llm() -> None:
    """Those that begin elsewhere are not."""
    model, positions = tiny_model("llama"), torch.arange(40)[None]
    scene, other, third = (Scene(model, StreamingLLMCache(model.config, 12)) for _ in range(3))
    (shifted,), (plain,) = scene.read_prompt(positions=positions + 7), other.read_prompt()
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="position_ids"):
        third.read_prompt(positions=2 * positions)


# Models that are copied, saved, compiled, trained or run in mixed precision, as with `DynamicCache`.


@torch.no_grad()
def test_a_hooked_model_can_be_copied_saved_and_changed() -> None:
    """The copy is a model of its own; layers that are put into a hooked model are hooked too."""
    model, tokens, file = build_model("llama"), PROMPT[:1], io.BytesIO()
    wanted = model(tokens, past_key_values=PyramidCache(model)).logits[:, -1]
    torch.save(model, file)
    file.seek(0)
    copies = [torch.load(file, weights_only=False), copy.deepcopy(model)]
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    logits = model(tokens, past_key_values=PyramidCache(model)).logits
    assert torch.equal(logits[:, -1], wanted) and logits[:, 5:-20].isnan().any()
    del model
    for twin, attention, tolerance in zip(copies, ("sdpa", "eager"), (0, 1e-4), strict=True):
        twin.set_attn_implementation(attention)
        output = twin(tokens, past_key_values=PyramidCache(twin)).logits[:, -1]
        torch.testing.assert_close(output, wanted, atol=tolerance, rtol=0)


@parametrize_cases(CACHE_CASES[:4])
def test_half_precision(case: CacheCase) -> None:
    """Under autocast, and where unscaled logits exceed the largest float16."""
    model, rows = build_model("llama"), random_rows((40,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.stack(generate(model, case.build(model), rows, 5).logits).isfinite().all()
    model.half()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 40
    for cache in (DynamicCache(config=model.config), case.build(model)):
        assert torch.stack(generate(model, cache, rows, 5).logits).isfinite().all()


@every_cache
def test_gradients_over_several_steps(case: CacheCase) -> None:
    """
    Where nothing is evicted they are those of `DynamicCache`. What is written must not be what autograd has saved,
    also where only queries have gradients. Those keys of a prompt that later tokens attend to get theirs.
    """
    model, tokens = build_model("llama"), random_tokens(2, 44)

    def gradient(cache: Cache) -> torch.Tensor:
        model.zero_grad()
        pieces = [tokens[:, :30], *tokens[:, 30:].split(1, dim=1)]
        sum(model(piece, past_key_values=cache).logits[:, -1].sum() for piece in pieces).backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    if case.quantizes:
        with pytest.raises(NotImplementedError, match="no_grad"):
            gradient(case.build(model, "large"))
        return
    for trained in ("", "layers.0.self_attn.q_proj"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        wanted = gradient(DynamicCache(config=model.config))
        torch.testing.assert_close(gradient(case.build(model, "large")), wanted, atol=1e-3, rtol=1e-4)
        # Those of dropped tokens are not numbers; values from the host have none, which is refused.
        if not case.from_model and case.evicts:
            assert gradient(case.build(model)).isfinite().all()
    if case.cache_class in (PyramidCache, H2OCache) and not case.from_model:
        model.requires_grad_(True)
        cache = case.build(model)
        model(PROMPT[:1], past_key_values=cache, logits_to_keep=1)
        kept = cache.layers[0].keys
        kept.retain_grad()
        model(MORE[:1, :2], past_key_values=cache).logits.sum().backward()
        assert kept.grad is not None and kept.grad.abs().max() > 0


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_with_hooks() -> None:
    """The prompt too, whose hidden states are pruned."""
    model = build_model("llama", num_hidden_layers=3)
    scenes = [Scene(model, PyramidCache(model, budget=0.4)) for _ in range(2)]
    scenes[0].model = torch.compile(model, backend="eager")
    for logits, expected in zip(*(scene.read_all() for scene in scenes), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_streaming_llm_takes_the_rotation_of_the_model_that_runs() -> None:
    """A config that differs in what the cache cannot see from outside does no harm."""
    other = build_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model = tiny_model("llama")
    caches = [StreamingLLMCache(config, budget=12) for config in (other, model.config)]
    assert torch.equal(*(model(PROMPT, past_key_values=cache).logits for cache in caches))
