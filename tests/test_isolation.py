"""Caches leave nothing behind when they go, and change nothing for other caches, other threads and transformers."""

import contextlib
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from caches import CACHE_CASES, QUICK_CASES, CacheCase, every_cache, parametrize_cases
from models import build_model, drive, generate, left_pad, random_rows, random_tokens
from test_memory import reachable_tensors
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyramid_cache import PyramidCache, ShadowKVCache
from pyramid_cache.engine import attention


ROWS = random_rows((40, 28))
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


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Nothing in reference cycles is freed."""
    gc.disable()
    yield
    gc.enable()


def by_steps(model: PreTrainedModel, cache: Cache) -> None:
    """A padded prompt and single tokens."""
    drive(model, cache, ROWS, 2)


def outcome(model: PreTrainedModel, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of greedy search over a padded batch; without a cache if it is None."""
    output = generate(model, cache, ROWS, NEW_TOKENS, use_cache=cache is not None)
    return output.sequences, torch.stack(output.logits)


def by_beams(model: PreTrainedModel, cache: Cache) -> None:
    """Beam search, which repeats and reorders rows."""
    model.generate(random_tokens(1, 40), past_key_values=cache, max_new_tokens=4, num_beams=3, num_return_sequences=2)


def mask_of(cache: Cache) -> torch.Tensor:
    """The mask over what `by_steps` fed, and one token more."""
    mask = left_pad(ROWS)[1]
    return torch.nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)


def by_interrupted_forward(model: PreTrainedModel, cache: Cache) -> None:
    """A forward that fails between its first and its last layer, on a cache in use."""
    by_steps(model, cache)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    # A traceback would hold the frames of the forward, and those the cache.
    has_gradients = not isinstance(cache, ShadowKVCache) and cache.compressed_layers[0].quantizer is None
    with contextlib.suppress(ZeroDivisionError), torch.set_grad_enabled(has_gradients):
        model(random_tokens(len(ROWS), 1), attention_mask=mask_of(cache), past_key_values=cache)
    handle.remove()


def by_training(model: PreTrainedModel, cache: Cache) -> None:
    """A forward with gradients whose graph has gone, and a backward."""
    model(random_tokens(1, 40), past_key_values=cache).logits[:, -1].sum().backward()


@every_cache
def test_tensors_go_with_their_cache(case: CacheCase, without_collector: None) -> None:
    """At once, without a garbage collector: nothing refers to a cache, nor does a cache refer to itself."""
    model = build_model("llama", num_hidden_layers=2)
    uses = [("tight", use) for use in (by_steps, outcome, by_beams, by_interrupted_forward)]
    uses += [] if case.quantizes else [("tight", by_training)]
    for budget, use in [("large", outcome), *uses]:
        cache = case.build(model, budget)
        use(model, cache)
        footprint = Footprint(cache)
        assert len(footprint.storages) >= 4  # keys and values of two layers
        del cache
        assert footprint.living() == [], use.__name__


@every_cache
def test_copies_and_originals_go_on_their_own(case: CacheCase, without_collector: None) -> None:
    """And `reset` lets tensors go."""
    model = build_model("llama", num_hidden_layers=2)
    cache = case.build(model)
    by_steps(model, cache)
    twin = copy.deepcopy(cache)
    footprints = [Footprint(cache), Footprint(twin)]
    del cache
    assert footprints[0].living() == [] and footprints[1].living()
    with torch.no_grad():
        model(random_tokens(2, 1), attention_mask=mask_of(twin), past_key_values=twin)
    storages = [StorageWeakRef(layer.keys.untyped_storage()) for layer in twin.layers]
    twin.reset()
    assert all(storage.expired() for storage in storages)
    footprints.append(Footprint(twin))
    del twin
    assert footprints[1].living() == footprints[2].living() == []


@pytest.mark.slow
@parametrize_cases(case for case in QUICK_CASES if case.short_name not in ("pyramid-config", "streaming-dense"))
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


@every_cache
def test_a_model_goes_though_its_caches_stay(case: CacheCase) -> None:
    model = build_model("llama", num_hidden_layers=2)
    cache = case.build(model)
    outcome(model, cache)
    modules = [weakref.ref(module) for module in model.modules()]
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    held = cache.nbytes
    del model
    gc.collect()
    assert not any(module() for module in modules)
    assert all(storage.expired() for storage in storages)
    assert cache.nbytes == held > 0 and (cache.positions(1) >= 0).any()


# Other caches on the same model.


OTHERS: list[Callable[[PreTrainedModel], Cache | None]] = [
    lambda model: None,
    lambda model: DynamicCache(config=model.config),
    lambda model: StaticCache(config=model.config, max_cache_len=64),
]


@pytest.fixture
def untouched() -> Iterator[None]:
    """transformers as it was before any cache was built."""
    attention.uninstall()
    yield
    attention.install()


@every_cache
def test_other_caches_are_as_before(case: CacheCase, untouched: None) -> None:
    """
    What they give does not depend on a cache of ours that is built and used between them. Uninstalling brings back
    transformers as it was, and our cache does not go on in silence.
    """
    method, functions = vars(AttentionInterface)["get_interface"], dict(ALL_ATTENTION_FUNCTIONS)
    model = build_model("llama")
    before = [outcome(model, build(model)) for build in OTHERS]
    waiting = [build(model) for build in OTHERS]  # built before ours, used after
    outcome(model, cache := case.build(model))
    assert cache.get_seq_length() == 40 + NEW_TOKENS - 1
    generate(model, unpadded := case.build(model), ROWS[:1], 1)
    for other, wanted in zip(waiting, before, strict=True):
        assert all(map(torch.equal, outcome(model, other), wanted))
    assert vars(AttentionInterface)["get_interface"] is not method
    for _ in range(2):
        assert dict(ALL_ATTENTION_FUNCTIONS) == functions
        attention.uninstall()
        assert vars(AttentionInterface)["get_interface"] is method
    for build, wanted in zip(OTHERS, before, strict=True):
        assert all(map(torch.equal, outcome(model, build(model)), wanted))
    with torch.no_grad(), pytest.raises(RuntimeError, match="did not go through the attention interface"):
        model(random_tokens(1, 1), past_key_values=unpadded)


@pytest.fixture
def busy_threads() -> Iterator[ThreadPoolExecutor]:
    """Two threads that take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    # The number of torch's threads is a setting of each thread.
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    sys.setswitchinterval(interval)


@every_cache
def test_two_threads_on_one_model(case: CacheCase, busy_threads: ThreadPoolExecutor) -> None:
    """The other one has in turn `DynamicCache`, a cache of the same class, or one that hooks the model."""
    model = build_model("llama")
    others = (OTHERS[1], case.build, lambda model: PyramidCache(model, budget=0.5))
    builds = [case.build, others[CACHE_CASES.index(case) % 3]]
    alone = [outcome(model, build(model)) for build in builds]
    start = threading.Barrier(2)

    def run(build: Callable[[PreTrainedModel], Cache]) -> tuple[torch.Tensor, torch.Tensor]:
        start.wait()
        return outcome(model, build(model))

    for _ in range(2):
        for together, wanted in zip(busy_threads.map(run, builds), alone, strict=True):
            assert all(map(torch.equal, together, wanted))


def test_two_threads_build_the_first_cache(busy_threads: ThreadPoolExecutor, untouched: None) -> None:
    """However they meet, transformers is wrapped once, so that uninstalling undoes it."""
    method = vars(AttentionInterface)["get_interface"]
    start = threading.Barrier(2)
    for _ in range(200):
        list(busy_threads.map(lambda _: (start.wait(), attention.install()), range(2)))
        attention.uninstall()
        assert vars(AttentionInterface)["get_interface"] is method
