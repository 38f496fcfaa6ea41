"""Compressed requests in continuous batching: each gives what `generate` gives with the same cache alone."""

import copy
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, CacheCase
from models import VOCAB_SIZE, build_model
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

import pyramid_cache as library


serving = pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)

from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.cache import PagedAttentionCache  # noqa: E402

from pyramid_cache.serving.paged import CompressedAllocator, CompressedPagedCache  # noqa: E402
from pyramid_cache.serving.request import Request  # noqa: E402


PAGE_OF_SERVING = Path(__file__).parent.parent / "docs" / "serving.md"
BUDGET, INTERVAL, PAGE = 16, 8, 4
BUILD: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "snapkv": lambda model: library.SnapKVCache(model.config, BUDGET, window_size=6, eviction_interval=INTERVAL),
    "h2o": lambda model: library.H2OCache(model.config, BUDGET),  # evicts at every step
    "tova": lambda model: library.TOVACache(model.config, BUDGET, eviction_interval=INTERVAL),  # heads share tokens
    "streaming": lambda model: library.StreamingLLMCache(model.config, BUDGET),  # moves keys
    "keydiff": lambda model: library.KeyDiffCache(model.config, 0.25, eviction_interval=INTERVAL),  # no attention
    "defensive": lambda model: library.DefensiveKVCache(
        model.config, BUDGET, window_size=6, ranking="head", protect=2, merge=True
    ),  # sees attention by query heads
}


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def alone(model: PreTrainedModel, prompt: list[int], cache: Cache | None, num_new: int) -> list[int]:
    """What `generate` answers to one prompt."""
    options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options)[0, len(prompt) :].tolist()


def batching(num_blocks: int, max_batch_tokens: int, **settings: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        num_blocks=num_blocks,
        page_size=PAGE,
        max_batch_tokens=max_batch_tokens,
        auto_switch_to_flash=False,
        **settings,
    )


def answers(model: PreTrainedModel, prompts: list[list[int]], num_new: int, config: Any, **given: Any) -> list[Any]:
    """The outputs of `generate_batch`, in the order of the prompts."""
    given = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | given
    generation = GenerationConfig(max_new_tokens=num_new, **given)
    return list(model.generate_batch(prompts, generation, continuous_batching_config=config).values())


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each request held that had to wait."""
    numbers: list[int] = []
    original = Request.park
    monkeypatch.setattr(
        Request, "park", lambda self, pages: (numbers.append(self.num_slots), original(self, pages))[1]
    )
    return numbers


@pytest.mark.parametrize("name", BUILD)
def test_requests_give_what_generate_gives(name: str, parked: list[int]) -> None:
    """With enough blocks; and with few, where prompts come in chunks and requests wait while others go on."""
    model, num_new = build_model("llama"), 24
    prompts = prompts_of([1, 3, 70, 9, 41, 15, 33, 64, 8, 50])
    wanted = [alone(model, prompt, BUILD[name](model), num_new) for prompt in prompts]
    model = copy.deepcopy(model)  # whose layers nobody has asked how they rotate keys
    with serving.compressed(model, BUILD[name](model)):
        for num_blocks, max_batch_tokens in ((400, 600), (24, 16)):
            found = answers(model, prompts, num_new, batching(num_blocks, max_batch_tokens))
            assert [each.generated_tokens for each in found] == wanted
            assert all(each.error is None for each in found)
            assert bool(parked) == (num_blocks == 24)


@pytest.mark.parametrize("attention", ["paged|eager", "sdpa"])
@pytest.mark.parametrize("family", ["gemma", "qwen3", "phi3", "olmo2"])
def test_families(family: str, attention: str) -> None:
    model, num_new = build_model(family), 12
    prompts = prompts_of([40, 7, 29])
    if attention == "paged|eager":
        model.set_attn_implementation("eager")
    wanted = [alone(model, prompt, BUILD["snapkv"](model), num_new) for prompt in prompts]
    with serving.compressed(model, BUILD["snapkv"](model)):
        found = answers(model, prompts, num_new, batching(100, 24))
    assert [each.generated_tokens for each in found] == wanted
    model.set_attn_implementation("sdpa")


def test_blocks_stay_within_the_bound_and_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that answer hold no more than budget and interval; at the end all blocks are free."""
    model, used, caches = build_model("llama"), [], []
    original = CompressedAllocator.allocate_cache_to_request

    def allocate(self: CompressedAllocator, request_id: str, past_length: int, query_length: int) -> None:
        original(self, request_id, past_length, query_length)
        if self.requests.get(request_id) is not None and self.requests[request_id].is_compressed:
            used.append(len(self.block_table[request_id]))

    def keep(self: CompressedPagedCache, *args: Any, **kwargs: Any) -> None:
        caches.append(self)
        original_init(self, *args, **kwargs)

    original_init = CompressedPagedCache.__init__
    monkeypatch.setattr(CompressedAllocator, "allocate_cache_to_request", allocate)
    monkeypatch.setattr(CompressedPagedCache, "__init__", keep)
    with serving.compressed(model, BUILD["snapkv"](model)):
        answers(model, prompts_of([70, 60, 50]), 40, batching(100, 200))
    bound = -(-(BUDGET + INTERVAL) // PAGE)
    assert max(used) == bound and len(used) > 60
    (cache,) = caches
    cache.pool.try_to_free_sectors()
    assert cache.compute_free_capacity() == 1.0 and not cache.allocator.requests and not cache.states


def test_cancelled_requests_free_their_blocks() -> None:
    """One that answers, and one that waits for its first block. The others go on as if they had been alone."""
    model, config = build_model("llama"), GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=400)
    prompts = prompts_of([40, 50, 60])
    wanted = alone(model, prompts[0], BUILD["snapkv"](model), 30)
    with serving.compressed(model, BUILD["snapkv"](model)):
        manager = model.init_continuous_batching(config, batching(20, 64))
        manager.start()
        endless = [manager.add_request(prompt) for prompt in prompts[1:]]
        short = manager.add_request(prompts[0], max_new_tokens=30)
        for each in endless:
            manager.cancel_request(each)
        result = next(iter(manager.request_id_iter(short)))
        manager.stop(keep_for_next_session=True)
        cache = manager.batch_processor.cache
        cache.pool.try_to_free_sectors()
        assert result.generated_tokens == wanted
        assert cache.compute_free_capacity() == 1.0 and not cache.allocator.requests


def test_a_cancelled_request_that_waits_frees_what_was_put_aside() -> None:
    model, config = build_model("llama"), GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=60)
    with serving.compressed(model, library.SnapKVCache(model.config, 1.0)):  # which grow until one has to wait
        manager = model.init_continuous_batching(config, batching(20, 64))
        manager.batch_processor = processor = manager._create_batch_processor()
        ids, requests = manager.add_requests(prompts_of([20, 20])), processor.cache.allocator.requests
        waiting: list[str] = []
        while not waiting:
            processor.prepare_next_batch()
            manager._generation_step()
            processor.update_batch()
            waiting = [each for each in ids if each in requests and requests[each].parked is not None]
        processor.scheduler.set_request_cancellation(waiting[0])
        processor.prepare_next_batch()
        assert set(requests) == set(ids) - set(waiting)


def test_several_answers_to_one_prompt() -> None:
    """Children share the reading of the prompt but for its last token."""
    model, prompts = build_model("llama"), prompts_of([40, 9])
    wanted = [alone(model, prompt, BUILD["snapkv"](model), 12) for prompt in prompts]
    with serving.compressed(model, BUILD["snapkv"](model)):
        given = {"num_return_sequences": 3, "do_sample": True, "temperature": 1e-6}  # sampling that has no choice
        found = answers(model, prompts, 12, batching(200, 24), **given)
    assert [each.generated_tokens for each in found] == [wanted[0]] * 3 + [wanted[1]] * 3


def test_what_is_not_compressed_is_as_without_us() -> None:
    """`generate` in the same context, and `generate_batch` before and after it."""
    model, prompts = build_model("llama"), prompts_of([40, 20])
    dense = [alone(model, prompt, None, 12) for prompt in prompts]
    config = batching(100, 100)
    assert [each.generated_tokens for each in answers(model, prompts, 12, config)] == dense
    with serving.compressed(model, BUILD["snapkv"](model)):
        answers(model, prompts, 12, config)
        assert alone(model, prompts[0], DynamicCache(config=model.config), 12) == dense[0]
        other = build_model("qwen3")
        assert answers(other, prompts, 4, config)[0].generated_tokens == alone(other, prompts[0], None, 4)
    assert [each.generated_tokens for each in answers(model, prompts, 12, config)] == dense
    from transformers.generation.continuous_batching import continuous_api

    assert continuous_api.PagedAttentionCache is PagedAttentionCache


def test_a_kept_manager_goes_with_its_context() -> None:
    """`persistent_manager=True` keeps a manager for later calls, within `compressed`."""
    model, prompts = build_model("llama"), prompts_of([40])
    config, generation = batching(100, 100), GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=12)
    given = {"continuous_batching_config": config, "persistent_manager": True}
    with serving.compressed(model, BUILD["snapkv"](model)):
        first, second = (list(model.generate_batch(prompts, generation, **given).values()) for _ in range(2))
        assert first[0].generated_tokens == second[0].generated_tokens
    dense = answers(model, prompts, 12, config)[0].generated_tokens
    assert dense == alone(model, prompts[0], None, 12) != first[0].generated_tokens


def test_another_thread_gets_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not compressed, whose paged cache is built while that of another one is."""
    model, other, prompts = build_model("llama"), build_model("qwen3"), prompts_of([40])
    original, is_building = CompressedPagedCache.__init__, threading.Event()

    def build(self: CompressedPagedCache, *args: Any, **kwargs: Any) -> None:
        is_building.set()
        time.sleep(0.5)
        original(self, *args, **kwargs)

    monkeypatch.setattr(CompressedPagedCache, "__init__", build)
    with serving.compressed(model, BUILD["snapkv"](model)):
        thread = threading.Thread(target=answers, args=(model, prompts, 4, batching(100, 64)))
        thread.start()
        is_building.wait()
        found = answers(other, prompts, 12, batching(100, 64))[0].generated_tokens
        thread.join()
    assert found == alone(other, prompts[0], None, 12)


def test_a_copy_of_the_model_is_not_compressed() -> None:
    model, prompts = build_model("llama"), prompts_of([40])
    with serving.compressed(model, BUILD["snapkv"](model)):
        other = copy.deepcopy(model)
    assert answers(other, prompts, 12, batching(100, 64))[0].generated_tokens == alone(model, prompts[0], None, 12)


def test_a_hard_stop_forgets_requests_that_wait() -> None:
    model, config = build_model("llama"), GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=12)
    prompts = prompts_of([20, 20, 20])
    with serving.compressed(model, library.SnapKVCache(model.config, 1.0)):
        manager = model.init_continuous_batching(config, batching(20, 64))
        manager.batch_processor = processor = manager._create_batch_processor()
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=55)
        requests = processor.cache.allocator.requests
        while not any(each.parked for each in requests.values()):
            processor.prepare_next_batch()
            manager._generation_step()
            processor.update_batch()
        processor.reset()
        assert not requests and not processor.cache.states


def test_policies_that_look_at_more_queries_than_their_window() -> None:
    """They are given all queries of a prompt that comes in chunks."""

    @dataclass(frozen=True)
    class Half(library.Policy):
        window_size: int = 4

        def num_queries(self, prompt_length: int, budget: Any, num_layers: int) -> int:
            return max(prompt_length // 2, 1)

        def score(self, view: Any) -> torch.Tensor:
            return view.attention

    model, prompts = build_model("llama"), prompts_of([40, 29])
    wanted = [alone(model, prompt, library.PolicyCache(model.config, 16, Half()), 12) for prompt in prompts]
    with serving.compressed(model, library.PolicyCache(model.config, 16, Half())):
        found = answers(model, prompts, 12, batching(100, 12))
    assert [each.generated_tokens for each in found] == wanted


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model, prompts = peft.get_peft_model(copy.deepcopy(build_model("llama")), settings).eval(), prompts_of([40])
    wanted = alone(model.get_base_model(), prompts[0], BUILD["snapkv"](model), 12)
    with serving.compressed(model, BUILD["snapkv"](model)):
        assert answers(model, prompts, 12, batching(100, 64))[0].generated_tokens == wanted


def test_a_prompt_that_is_refused_fails_alone() -> None:
    """The budget has no room for what is protected of a short prompt; a long one takes more blocks than there are."""
    model, prompts = build_model("llama"), prompts_of([6, 60])
    with serving.compressed(model, library.SnapKVCache(model.config, 0.25, window_size=2, protect=4)):
        short, long = answers(model, prompts, 4, batching(100, 100))
    assert "`protect`" in short.error and not short.generated_tokens
    assert long.error is None and len(long.generated_tokens) == 4
    with serving.compressed(model, BUILD["snapkv"](model)):
        short, long = answers(model, prompts, 4, batching(14, 100))
    assert "take 15 blocks of 4 tokens, but there are 14" in long.error
    with serving.compressed(model, library.SnapKVCache(model.config, 1.0)):
        outputs = answers(model, [[], [5, 6, 7], prompts[1]], 2, batching(1, 16))
        assert ["needs 1" in str(outputs[0].error), outputs[1].error] == [True, None]  # 3 + 2 - 1 tokens are stored
        given = {"num_return_sequences": 2, "do_sample": True, "temperature": 1e-6}
        assert all(each.error for each in answers(model, [[5]], 2, batching(8, 16), **given))
    with serving.compressed(model, BUILD["snapkv"](model)):
        short, long = answers(model, prompts, 4, batching(14, 100))
    assert short.generated_tokens == alone(model, prompts[0], BUILD["snapkv"](model), 4)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda model: DynamicCache(config=model.config), ValueError, "cannot have"),
        (lambda model: library.ShadowKVCache(model.config), ValueError, "cannot have"),
        (lambda model: library.SnapKVCache, ValueError, "the class SnapKVCache"),
        (lambda model: library.AdaKVCache(model.config, 16), NotImplementedError, 'Give AdaKVCache `ranking="head"`'),
        (lambda model: library.SnapKVCache(model.config, 16, quantize="int8"), NotImplementedError, "`quantize"),
        (lambda model: library.SnapKVCache(model.config, 16, thin_keys=0.4), NotImplementedError, "`thin_keys=0.4`"),
        (lambda model: library.PyramidCache(model.config, 16), NotImplementedError, "different numbers"),
        (lambda model: library.PyramidKVCache(model.config, "200KB"), NotImplementedError, "different numbers"),
        (
            lambda model: library.KVzipCache(model, 16, texts=library.ReplayTexts((), (), ())),
            NotImplementedError,
            "second time",
        ),
        (lambda model: library.SnapKVCache(model.config, "1KB"), ValueError, "1KB|bytes"),
    ],
)
def test_caches_that_requests_cannot_have(build: Callable, error: type[Exception], text: str) -> None:
    model = build_model("llama")
    with pytest.raises(error, match=text), serving.compressed(model, build(model)):
        pass
    assert "init_continuous_batching" not in vars(model)


def test_each_cache_is_served_or_refused() -> None:
    """The page names those that are served. Tokens of a few are compared above; those of all in the slow tier."""
    model, served = build_model("llama"), set()
    for case in CACHE_CASES:
        try:
            with serving.compressed(model, case.build(model)):
                served.add(case.cache_class.__name__)
        except (NotImplementedError, ValueError):
            continue
    [listed] = re.findall(r"^- Served are (.*?)\.\n-? ?", PAGE_OF_SERVING.read_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+Cache)`", listed)) == served | {"DefensiveKVCache"}


def test_wrong_calls() -> None:
    model = build_model("llama")
    used = BUILD["snapkv"](model)
    alone(model, [5, 6, 7], used, 2)
    with pytest.raises(ValueError, match="has seen tokens"), serving.compressed(model, used):
        pass
    for family, settings, text in (
        ("llama", {"num_hidden_layers": 2}, "built for 3 layers"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "longest request"),
        ("gemma2", {"layer_types": ["full_attention"] * 3, "attention": "eager"}, "softcapping"),
    ):
        other = build_model(family, **settings)
        with pytest.raises((ValueError, NotImplementedError), match=text):
            with serving.compressed(other, BUILD["snapkv"](model)):
                pass
    hybrid = build_model("gemma3")
    with pytest.raises(NotImplementedError, match="sliding window"):
        with serving.compressed(hybrid, BUILD["snapkv"](hybrid)):
            pass
    with serving.compressed(model, BUILD["snapkv"](model)):
        with pytest.raises(ValueError, match="active"), serving.compressed(model, BUILD["snapkv"](model)):
            pass
        for name, value in {"use_async_batching": True, "use_cuda_graph": True, "cpu_offload_space": 1.0}.items():
            with pytest.raises(NotImplementedError, match=name):
                model.init_continuous_batching(continuous_batching_config=batching(20, 20, **{name: value}))


def test_layers_that_share_are_refused() -> None:
    model = build_model("llama")
    for cache in (library.MiniCache(model.config, start_layer=0), library.KVSharerCache(model.config, {2: 0})):
        name = type(cache).__name__
        with pytest.raises(ValueError, match=f"`cache` is a {name}"), serving.compressed(model, cache):
            pass


def test_other_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pyramid_cache.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers.generation.continuous_batching.cache_allocators", None)
    monkeypatch.delattr(sys.modules["transformers.generation.continuous_batching"], "cache_allocators")
    with pytest.raises(ImportError, match=r"transformers 5\.24 or newer"):
        import pyramid_cache.serving  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize("case", CACHE_CASES, ids=lambda case: case.short_name)
def test_every_cache(case: CacheCase) -> None:
    """Each cache that is served, with blocks for a few requests."""
    model, num_new = build_model("llama"), 24
    prompts = prompts_of([40, 3, 70, 41, 40, 64])
    try:
        with serving.compressed(model, case.build(model)):
            found = answers(model, prompts, num_new, batching(24, 24))
    except (NotImplementedError, ValueError):
        return
    wanted = [alone(model, prompt, case.build(model), num_new) for prompt in prompts]
    assert [each.generated_tokens for each in found] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming"])
def test_random_arrivals(name: str, parked: list[int]) -> None:
    """200 requests of random lengths at random times, a tenth of them cancelled, with blocks for a few."""
    model, chosen = build_model("llama"), random.Random(3)
    prompts = prompts_of([chosen.randint(1, 120) for _ in range(200)])
    lengths = [chosen.randint(1, 40) for _ in prompts]
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=8)
    with serving.compressed(model, BUILD[name](model)):
        manager = model.init_continuous_batching(config, batching(48, 50))
        manager.start()
        ids = []
        for prompt, length in zip(prompts, lengths, strict=True):
            ids.append(manager.add_request(prompt, max_new_tokens=length))
            if len(ids) > len(prompts) // 2:  # the first half comes at once, more than the blocks hold on any machine
                time.sleep(chosen.random() / 100)
        cancelled = set(chosen.sample(ids, 20))
        for each in cancelled:
            manager.cancel_request(each)
        results = {}
        while len(set(results) | cancelled) < len(ids):
            output = manager.get_result(timeout=60)
            results[output.request_id] = output
        manager.stop(keep_for_next_session=True)
        cache = manager.batch_processor.cache
        cache.pool.try_to_free_sectors()
        assert cache.compute_free_capacity() == 1.0 and not cache.allocator.requests
    assert parked
    for each, prompt, length in zip(ids, prompts, lengths, strict=True):
        if each in results and not results[each].error:
            assert results[each].generated_tokens == alone(model, prompt, BUILD[name](model), length), each
