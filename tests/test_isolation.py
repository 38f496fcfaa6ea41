"""Caches leave nothing behind when they go, and change nothing for other caches, other threads and transformers itself."""

import contextlib
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_budget, every_cache
from models import build_model, generate, left_pad, random_rows, random_tokens
from test_memory import reachable_tensors
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyramid_cache import PyramidCache, ShadowKVCache
from pyramid_cache.engine import attention


ROW_LENGTHS = (40, 28)
NEW_TOKENS = 6


# Leaks.


class Footprint:
    """Weak references to a cache, its layers, and every tensor and storage that can be reached from it."""

    def __init__(self, cache: Cache) -> None:
        tensors = list(reachable_tensors(cache))
        self.objects = [weakref.ref(item) for item in (cache, *cache.layers, *tensors)]
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def living(self) -> list[str]:
        """What is still there."""
        objects = [type(reference()).__name__ for reference in self.objects if reference() is not None]
        return objects + ["storage" for storage in self.storages if not storage.expired()]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Nothing in reference cycles is freed inside."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def by_steps(model: PreTrainedModel, cache: Cache) -> None:
    """A padded prompt and single tokens."""
    with torch.no_grad():
        input_ids, attention_mask = left_pad(random_rows(ROW_LENGTHS))
        for _ in range(3):
            model(input_ids, attention_mask=attention_mask, past_key_values=cache)
            input_ids = random_tokens(len(ROW_LENGTHS), 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=-1)


def by_generate(model: PreTrainedModel, cache: Cache) -> None:
    """Greedy search."""
    generate(model, cache, random_rows(ROW_LENGTHS), 3)


def by_beams(model: PreTrainedModel, cache: Cache) -> None:
    """Beam search, which repeats and reorders rows."""
    model.generate(random_tokens(1, 40), past_key_values=cache, max_new_tokens=4, num_beams=3, num_return_sequences=2)


def mask_of(cache: Cache) -> torch.Tensor:
    """The mask over what `by_steps` fed, and one token more."""
    mask = left_pad(random_rows(ROW_LENGTHS))[1]
    return torch.nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)


def by_interrupted_forward(model: PreTrainedModel, cache: Cache) -> None:
    """A forward that fails between its first and its last layer, on a cache in use."""
    by_steps(model, cache)

    def fail(*_: Any) -> None:
        raise InterruptedError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    # A traceback would hold the frames of the forward, and those the cache.
    has_gradients = not isinstance(cache, ShadowKVCache)
    with contextlib.suppress(InterruptedError), torch.set_grad_enabled(has_gradients):
        model(random_tokens(len(ROW_LENGTHS), 1), attention_mask=mask_of(cache), past_key_values=cache)
    handle.remove()


def by_training(model: PreTrainedModel, cache: Cache) -> None:
    """A forward with gradients whose graph has gone, and a backward."""
    model(random_tokens(1, 40), past_key_values=cache).logits[:, -1].sum().backward()


USES: list[Callable[[PreTrainedModel, Cache], None]] = [
    by_steps,
    by_generate,
    by_beams,
    by_interrupted_forward,
    by_training,
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@every_budget
@every_cache
def test_tensors_go_with_their_cache(case: CacheCase, budget: str, use: Callable) -> None:
    """At once, without a garbage collector: nothing refers to a cache, nor does a cache refer to itself."""
    model = build_model("llama", num_hidden_layers=2)
    with without_collector():
        cache = case.build(model, budget)
        use(model, cache)
        footprint = Footprint(cache)
        assert len(footprint.storages) >= 4  # keys and values of two layers
        del cache
        assert footprint.living() == []


@every_cache
def test_copies_and_originals_go_on_their_own(case: CacheCase) -> None:
    model = build_model("llama", num_hidden_layers=2)
    with without_collector():
        caches = [case.build(model)]
        by_steps(model, caches[0])
        caches.append(copy.deepcopy(caches[0]))
        with torch.no_grad():
            step = {"input_ids": random_tokens(2, 1), "attention_mask": mask_of(caches[0])}
            wanted = model(**step, past_key_values=copy.deepcopy(caches[0])).logits
        footprints = [Footprint(cache) for cache in caches]
        del caches[0]
        assert footprints[0].living() == [] and footprints[1].living()
        with torch.no_grad():
            assert torch.equal(model(**step, past_key_values=caches[0]).logits, wanted)
        footprints.append(Footprint(caches[0]))
        caches.clear()
        assert footprints[1].living() == footprints[2].living() == []


@every_cache
def test_reset_lets_tensors_go(case: CacheCase) -> None:
    model = build_model("llama", num_hidden_layers=2)
    cache = case.build(model)
    with without_collector():
        by_steps(model, cache)
        storages = [StorageWeakRef(layer.keys.untyped_storage()) for layer in cache.layers]
        cache.reset()
        assert all(storage.expired() for storage in storages)


@pytest.mark.slow
@every_cache
def test_compiled_code_holds_no_cache(case: CacheCase) -> None:
    """The graphs and guards of a compiled model live on; a second cache runs on them."""
    torch._dynamo.reset()
    model = build_model("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    try:
        for _ in range(2):
            cache = case.build(model)
            by_steps(compiled, cache)
            footprint = Footprint(cache)
            del cache
            gc.collect()  # Dynamo's own frames form cycles while it compiles
            assert footprint.living() == []
    finally:
        torch._dynamo.reset()


@every_budget
@every_cache
def test_a_model_goes_though_its_caches_stay(case: CacheCase, budget: str) -> None:
    model = build_model("llama", num_hidden_layers=2)
    cache = case.build(model, budget)
    by_generate(model, cache)
    modules = [weakref.ref(module) for module in model.modules()]
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    held = cache.nbytes
    del model
    gc.collect()
    assert not any(module() for module in modules)
    assert all(storage.expired() for storage in storages)
    assert cache.nbytes == held > 0 and (cache.positions(1) >= 0).any()


# Other caches on the same model.


class CoarseLayer(QuantizedLayer):
    """Quantization to multiples of a 16th, which needs no library."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 16).round()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor / 16


def coarse_cache(model: PreTrainedModel) -> Cache:
    """A quantized cache whose residual is shorter than the prompt."""
    return Cache(layers=[CoarseLayer(residual_length=8) for _ in range(model.config.num_hidden_layers)])


class OffloadedCache(DynamicCache):
    """
    A layer comes back to the device once its copy on the CPU is written. transformers 5.17 does not wait for that, and reads
    numbers that are not there yet when the device is behind the host.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config, offloading=True)

    def prefetch(self, *args, **kwargs) -> None:
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(*args, **kwargs)


OTHERS: dict[str, Callable[[PreTrainedModel], Cache | None]] = {
    "none": lambda model: None,
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "QuantizedCache": coarse_cache,
    # Its streams need an accelerator, and the model on it.
    "offloaded": lambda model: OffloadedCache(model.config),
}
every_other = pytest.mark.parametrize(
    "other", [pytest.param(name, marks=[pytest.mark.cuda] if name == "offloaded" else []) for name in OTHERS]
)


def outcome(model: PreTrainedModel, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of greedy search over a padded batch; without a cache if it is None."""
    input_ids, attention_mask = (tensor.to(model.device) for tensor in left_pad(random_rows(ROW_LENGTHS)))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=cache is not None,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


def assert_equal(outcome: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Bit for bit, tokens and logits."""
    for part, wanted_part in zip(outcome, wanted, strict=True):
        assert torch.equal(part, wanted_part)


@pytest.fixture
def untouched() -> Iterator[None]:
    """transformers as it was before any cache was built."""
    attention.uninstall()
    yield
    attention.install()


@every_other
@every_budget
@every_cache
def test_other_caches_are_as_before(case: CacheCase, budget: str, other: str, untouched: None) -> None:
    model = build_model("llama").to("cuda" if other == "offloaded" else "cpu")
    before = outcome(model, OTHERS[other](model))
    waiting = OTHERS[other](model)  # built before ours, used after
    outcome(model, cache := case.build(model, budget))
    assert cache.get_seq_length() == max(ROW_LENGTHS) + NEW_TOKENS - 1
    assert_equal(outcome(model, waiting), before)
    attention.uninstall()
    assert_equal(outcome(model, OTHERS[other](model)), before)


def test_the_quantized_cache_of_these_tests_quantizes() -> None:
    """Else equality with it would say nothing."""
    model = build_model("llama")
    quantized, exact = (outcome(model, OTHERS[name](model)) for name in ("QuantizedCache", "DynamicCache"))
    assert torch.equal(quantized[1][0], exact[1][0])
    assert 0 < (quantized[1][1] - exact[1][1]).abs().max() < 5


def test_uninstall_restores_transformers(untouched: None) -> None:
    method, functions = vars(AttentionInterface)["get_interface"], dict(ALL_ATTENTION_FUNCTIONS)
    model = build_model("llama")
    for case in CACHE_CASES:
        outcome(model, case.build(model))
    assert vars(AttentionInterface)["get_interface"] is not method
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    attention.uninstall()
    attention.uninstall()
    assert vars(AttentionInterface)["get_interface"] is method
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions


@every_budget
@every_cache
def test_a_cache_never_goes_on_in_silence_once_uninstalled(case: CacheCase, budget: str, untouched: None) -> None:
    model = build_model("llama")
    cache = case.build(model, budget)
    with torch.no_grad():
        model(random_tokens(1, 40), past_key_values=cache)
        attention.uninstall()
        with pytest.raises(RuntimeError, match="did not go through the attention interface"):
            model(random_tokens(1, 1), past_key_values=cache)


def walk(model: PreTrainedModel, cache: Cache) -> Iterator[torch.Tensor]:
    """Greedy decoding of a padded batch that stops after each forward; yields its logits `(batch, vocabulary)`."""
    input_ids, attention_mask = left_pad(random_rows(ROW_LENGTHS))
    for _ in range(NEW_TOKENS):
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        with torch.no_grad():
            output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache)
        yield output.logits[:, -1]
        input_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=-1)


# What shares a model with a cache of ours: transformers' own, another of the same class, or one that hooks the model.
COMPANIONS: dict[str, Callable[[CacheCase, PreTrainedModel], Cache]] = {
    "DynamicCache": lambda case, model: DynamicCache(config=model.config),
    "its like": lambda case, model: case.build(model),
    "PyramidCache(model)": lambda case, model: PyramidCache(model, budget=0.5),
}
every_companion = pytest.mark.parametrize("companion", COMPANIONS)


@every_companion
@every_cache
def test_turn_by_turn(case: CacheCase, companion: str) -> None:
    """One forward with one cache, one with the other."""
    model = build_model("llama")
    builds = (lambda: case.build(model), lambda: COMPANIONS[companion](case, model))
    alone = [list(walk(model, build())) for build in builds]
    together = zip(*(walk(model, build()) for build in builds), strict=True)
    for step, pair in enumerate(together):
        for logits, wanted in zip(pair, (alone[0][step], alone[1][step]), strict=True):
            assert torch.equal(logits, wanted)


@pytest.fixture
def busy_threads() -> Iterator[ThreadPoolExecutor]:
    """Two threads that take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    # The number of torch's threads is a setting of each thread.
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    sys.setswitchinterval(interval)


@every_companion
@every_cache
def test_two_threads_on_one_model(case: CacheCase, companion: str, busy_threads: ThreadPoolExecutor) -> None:
    model = build_model("llama")
    builds = (lambda: case.build(model), lambda: COMPANIONS[companion](case, model))
    alone = [outcome(model, build()) for build in builds]
    start = threading.Barrier(2)

    def run(build: Callable[[], Cache]) -> tuple[torch.Tensor, torch.Tensor]:
        start.wait()
        return outcome(model, build())

    for _ in range(2):
        for together, wanted in zip(busy_threads.map(run, builds), alone, strict=True):
            assert_equal(together, wanted)


def test_two_threads_build_the_first_cache(busy_threads: ThreadPoolExecutor, untouched: None) -> None:
    """However they meet, transformers is wrapped once, so that uninstalling undoes it."""
    method = vars(AttentionInterface)["get_interface"]
    start = threading.Barrier(2)

    def install(_: int) -> None:
        start.wait()
        attention.install()

    for _ in range(300):
        list(busy_threads.map(install, range(2)))
        attention.uninstall()
        assert vars(AttentionInterface)["get_interface"] is method
