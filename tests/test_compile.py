"""Steps of fixed shapes: `generate` compiles them to one graph, in which nothing moves and nothing waits."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from caches import CACHE_CASES, CacheCase, every_fixed, parametrize_cases
from models import build_model, left_pad, random_rows, random_tokens
from test_waits import AskedNumbers
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel

from pyramid_cache import (
    AdaKVCache,
    H2OCache,
    KnormCache,
    Policy,
    PolicyCache,
    PyramidCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.caches import streaming_llm
from pyramid_cache.engine.policy import ScoringView


NUM_NEW = 200
PROMPTS = (23, 40)


def compile_config(backend: str = "eager", mode: str = "default") -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    config._compile_all_devices = True
    return config


def generate(model: PreTrainedModel, cache: Cache | None, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The whole sequences; rows may begin with padding, whose id is 0."""
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, "suppress_tokens": [0]} | options
    mask = (input_ids != 0).long()
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)


def held(cache: Any) -> list[list[list[list[int]]]]:
    """The positions that each layer, row and head holds, in order."""
    positions = [cache.positions(index).tolist() for index in range(len(cache.layers))]
    return [[[sorted(each for each in head if each >= 0) for head in row] for row in layer] for layer in positions]


@contextmanager
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def check_one_graph(
    case: CacheCase, backend: str, budget: str = "tight", device: str = "cpu", mode: str = "default"
) -> None:
    """
    Tokens and kept positions are those of the uncompiled run, in a first turn, a second one, and with another cache,
    and there is one graph in all.
    """
    model = build_model("llama", num_hidden_layers=2).to(device)
    prompt, later = (each.to(device) for each in (left_pad(random_rows(PROMPTS))[0], random_tokens(2, 9, seed=3)))
    config = compile_config(backend, mode)
    compiled, plain = (case.build(model, budget) for _ in range(2))
    with fresh_graphs():
        outputs = []
        for cache in (compiled, plain):
            options = {"disable_compile": True} if cache is plain else {"compile_config": config}
            first = generate(model, cache, prompt, **options)
            found = [first, held(cache)]
            if cache is compiled:
                assert num_graphs() == 1
            second = generate(model, cache, torch.cat([first, later], dim=1), max_new_tokens=40, **options)
            outputs.append((*found, second, held(cache)))
        assert all(torch.equal(one, other) for one, other in zip(outputs[0][::2], outputs[1][::2], strict=True))
        assert outputs[0][1::2] == outputs[1][1::2]
        assert compiled.num_kept_tokens() == plain.num_kept_tokens()
        assert compiled.get_seq_length() == plain.get_seq_length()
        before = num_graphs()  # sizes may be others in the second turn
        other = generate(model, case.build(model, budget), prompt, compile_config=config)
        assert torch.equal(other, outputs[0][0]) and num_graphs() == before <= 2


QUICK = ("h2o", "streaming", "snapkv", "adakv")


@parametrize_cases(case for case in CACHE_CASES if case.short_name in QUICK)
def test_generate_makes_one_graph(case: CacheCase) -> None:
    check_one_graph(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend, budget", [("inductor", "tight"), ("eager", "large")])
@every_fixed
def test_every_cache_makes_one_graph(case: CacheCase, backend: str, budget: str) -> None:
    check_one_graph(case, backend, budget)


class Steps:
    """A model that decodes with a cache of which each step has fixed shapes, without a compiler."""

    def __init__(self, model: PreTrainedModel, cache: Any, lengths: tuple[int, ...] = PROMPTS) -> None:
        self.model, self.cache = model, cache
        input_ids, self.mask = left_pad(random_rows(lengths))
        self.is_padded = len(set(lengths)) > 1
        self.feed(input_ids)

    @torch.no_grad()
    def feed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` of the last of some more tokens."""
        if self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, torch.ones_like(input_ids)], dim=1)
        options: dict[str, torch.Tensor] = {}
        if self.is_padded:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            options = {"attention_mask": self.mask, "position_ids": positions}
        output = self.model(input_ids, past_key_values=self.cache, **options)
        return output.logits[:, -1]


def addresses(cache: Any) -> dict[str, int]:
    return {
        f"{index} {name}": tensor.data_ptr()
        for index, step in cache._graph.by_layer.items()
        for name, tensor in step.tensors().items()
    }


@every_fixed
def test_nothing_moves_and_nothing_waits(case: CacheCase) -> None:
    """Of 200 steps, beside what evictions between them may ask; logits are those of a run without fixed shapes."""
    model = build_model("llama", num_hidden_layers=2)
    fixed, plain = (Steps(model, case.build(model)) for _ in range(2))
    fixed.cache.step(max_length=300)
    assert fixed.cache.is_compileable and not plain.cache.is_compileable
    before = addresses(fixed.cache)
    assert len(before) >= 2 * 4
    for tokens in random_tokens(NUM_NEW, 2, 1, seed=2):
        with AskedNumbers() as asked:
            logits = fixed.feed(tokens)
        assert asked.count == 0
        fixed.cache.step()
        torch.testing.assert_close(logits, plain.feed(tokens), atol=1e-4, rtol=0)
        assert held(fixed.cache) == held(plain.cache)
    assert addresses(fixed.cache) == before


def by_crop(cache: Any) -> None:
    cache.crop(-3)


def by_compress(cache: Any) -> None:
    cache.compress()


def by_reorder(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def by_copy(cache: Any) -> None:
    copy.deepcopy(cache)


def by_recording(cache: Any) -> None:
    cache.activate_past_recording()
    cache.crop(0)


@every_fixed
def test_other_calls_end_fixed_shapes(case: CacheCase) -> None:
    """
    Afterwards the cache goes on as one that never had them. From short prompts nothing is evicted, and then in the
    steps something of one row.
    """
    model = build_model("llama", num_hidden_layers=2)
    while_evicting = by_compress, by_reorder, by_copy
    settings = [("tight", lengths, call) for lengths in (PROMPTS, (2, 9)) for call in while_evicting]
    settings += [("large", PROMPTS, call) for call in (by_crop, by_recording)[: 1 + case.records]]
    for budget, lengths, call in settings:
        fixed, plain = (Steps(model, case.build(model, budget), lengths) for _ in range(2))
        fixed.cache.step(max_length=200)
        for tokens in random_tokens(8, 2, 1, seed=4):
            fixed.feed(tokens)
            fixed.cache.step()
            plain.feed(tokens)
        for run in (fixed, plain):
            call(run.cache)
            run.mask = run.mask[:, : run.cache.get_seq_length()]
            if call is by_reorder:
                run.mask = run.mask.flip(0)
        assert not fixed.cache.is_compileable and fixed.cache.num_kept_tokens() == plain.cache.num_kept_tokens()
        for number in (1, 1, 5, 1):
            tokens = random_tokens(2, number, seed=number)
            torch.testing.assert_close(fixed.feed(tokens), plain.feed(tokens), atol=1e-4, rtol=0, msg=call.__name__)
        assert held(fixed.cache) == held(plain.cache)


@pytest.mark.parametrize("cache_class", [SnapKVCache, H2OCache])
def test_a_step_after_others_can_be_recorded(cache_class: Any) -> None:
    """Steps like the last one need no checks, but this one may be taken back."""
    model = build_model("llama", num_hidden_layers=2)
    recorded, plain = (Steps(model, cache_class(model.config, budget=12)) for _ in range(2))
    tokens = random_tokens(6, 2, 1, seed=5)
    for run in (recorded, plain):
        for token in tokens[:4]:
            run.feed(token)
    recorded.cache.activate_past_recording()
    recorded.feed(tokens[4])
    recorded.cache.crop(-1)
    recorded.mask = recorded.mask[:, :-1]
    assert held(recorded.cache) == held(plain.cache)
    torch.testing.assert_close(recorded.feed(tokens[5]), plain.feed(tokens[5]), atol=1e-5, rtol=0)


def test_a_step_that_is_not_counted_is_noticed() -> None:
    model = build_model("llama", num_hidden_layers=2)
    run = Steps(model, SnapKVCache(model.config, budget=12))
    run.cache.step()
    run.feed(random_tokens(2, 1))
    with pytest.raises(RuntimeError, match="Call `cache.step\\(\\)` after each forward pass"):
        run.feed(random_tokens(2, 1))
    run.cache.reset()
    assert not run.cache.is_compileable


def test_what_fixed_shapes_cannot_do_is_refused() -> None:
    model = build_model("llama", num_hidden_layers=2)
    run = Steps(model, SnapKVCache(model.config, budget=12))
    run.cache.step()
    with pytest.raises(NotImplementedError, match="Gradients do not pass"):
        model(random_tokens(2, 1), past_key_values=run.cache)
    run = Steps(model, SnapKVCache(model.config, budget=12))
    run.cache.step()
    with pytest.raises(ValueError, match="The cache holds 2 rows, but the model was given 1"), torch.no_grad():
        model(random_tokens(1, 1), past_key_values=run.cache)
    stranger = build_model("llama", num_hidden_layers=2, seed=1)
    run = Steps(model, SnapKVCache(model.config, budget=12))
    run.cache.step()
    with pytest.raises(ValueError, match="filled by another model"), torch.no_grad():
        stranger(random_tokens(2, 1), past_key_values=run.cache)


@pytest.mark.parametrize("cache_class", [SnapKVCache, H2OCache, AdaKVCache])
def test_a_refused_step_leaves_no_trace(cache_class: Any) -> None:
    model, stranger = (build_model("llama", num_hidden_layers=2, seed=seed) for seed in range(2))
    run, plain = (Steps(model, cache_class(model.config, budget=12)) for _ in range(2))
    run.cache.step()
    for tokens in random_tokens(6, 2, 1, seed=3):
        with pytest.raises(ValueError, match="filled by another model"), torch.no_grad():
            stranger(tokens, past_key_values=run.cache)
        with pytest.raises(ValueError, match="The cache holds 2 rows"), torch.no_grad():
            model(tokens[:1], past_key_values=run.cache)
        torch.testing.assert_close(run.feed(tokens), plain.feed(tokens), atol=1e-4, rtol=0)
        run.cache.step()
    assert held(run.cache) == held(plain.cache)


def test_a_step_that_broke_off_is_noticed() -> None:
    model = build_model("llama", num_hidden_layers=2)
    run = Steps(model, SnapKVCache(model.config, budget=12))
    run.cache.step()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.feed(random_tokens(2, 1))
    handle.remove()
    with pytest.raises(RuntimeError, match="broke off"):
        run.cache.step()


@every_fixed
def test_a_prompt_in_inference_mode(case: CacheCase) -> None:
    model = build_model("llama", num_hidden_layers=2)
    with torch.inference_mode():
        run = Steps(model, case.build(model))
    run.cache.step()
    run.feed(random_tokens(2, 1))
    run.cache.step()
    assert run.cache.is_compileable


def test_reaching_max_length() -> None:
    """The cache goes on without fixed shapes, as `DynamicCache` does."""
    model = build_model("llama", num_hidden_layers=2)
    run, plain = Steps(model, H2OCache(model.config, budget=1.0)), Steps(model, DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="max_length=..."):
        run.cache.step()
    for count, tokens in enumerate(random_tokens(9, 2, 1, seed=3)):
        if count <= 5:  # after the prompt of 40 tokens, and after each of five
            run.cache.step(max_length=45)
            assert run.cache.is_compileable == (count < 5)
        torch.testing.assert_close(run.feed(tokens), plain.feed(tokens), atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="max_length=45"):
        run.cache.step(max_length=45)


def test_what_changes_in_the_attention_is_seen_in_steps_like_the_last_one() -> None:
    model = build_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    run, plain = (Steps(model, SnapKVCache(model.config, budget=12)) for _ in range(2))
    first, second = random_tokens(2, 2, 1, seed=3)
    for _ in range(2):
        run.feed(first)
        plain.feed(first)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    for layer in plain.cache.layers:
        layer._known = None  # this step is checked
    torch.testing.assert_close(run.feed(second), plain.feed(second), atol=1e-4, rtol=0)
    model.train()
    with pytest.raises(NotImplementedError, match="dropout"):
        run.feed(first)


@dataclass(frozen=True)
class Counting(Policy):
    """Writes down what the host counts when it is asked for scores."""

    seen: list[tuple] = field(default_factory=list)

    reads_counts = True

    def score(self, view: ScoringView) -> torch.Tensor:
        state = view.state
        self.seen.append((view.longest, state.num_seen, state.row_lengths, int(view.length.max())))
        return view.key.norm(dim=-1)


def test_a_policy_sees_the_token_that_has_come() -> None:
    model = build_model("llama", num_hidden_layers=1)
    policy = Counting()
    run = Steps(model, PolicyCache(model.config, 12, policy, eviction_interval=1), (40, 40))
    assert not run.cache.can_compile
    for tokens in random_tokens(5, 2, 1):
        run.feed(tokens)
    assert policy.seen == [(length, length, [length] * 2, length) for length in range(40, 46)]


def test_streaming_from_prompts_without_all_sinks() -> None:
    model, prompt = build_model("llama", num_hidden_layers=2), left_pad(random_rows((2, 3)))[0]
    with fresh_graphs():
        output = generate(model, StreamingLLMCache(model.config, budget=12), prompt, compile_config=compile_config())
        assert num_graphs() == 1
    plain = StreamingLLMCache(model.config, budget=12)
    assert torch.equal(output, generate(model, plain, prompt, disable_compile=True))


@pytest.mark.parametrize("cache_class", [SnapKVCache, StreamingLLMCache])
def test_modes_that_are_not_compiled_give_what_they_give_without(cache_class: Any) -> None:
    """Beams, assisted generation, prompt lookup, sampling, and prompts in chunks."""
    model = build_model("llama", num_hidden_layers=2)
    prompt = random_tokens(1, 40)
    modes: list[dict[str, Any]] = [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": build_model("llama", num_hidden_layers=1)},
        {"do_sample": True},
        {"prefill_chunk_size": 16},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ]
    for options in modes:
        outputs = []
        with fresh_graphs():
            for setting in ({"compile_config": compile_config()}, {"disable_compile": True}):
                torch.manual_seed(0)
                cache = cache_class(model.config, budget=12)
                output = generate(model, cache, prompt, max_new_tokens=16, **options, **setting)
                outputs.append((getattr(output, "sequences", output), held(cache)))
        assert torch.equal(outputs[0][0], outputs[1][0]) and outputs[0][1] == outputs[1][1], options


def test_attention_weights_are_given_or_refused_as_without_a_compiler() -> None:
    model = build_model("llama", num_hidden_layers=2)
    model.set_attn_implementation("eager")
    options = {"output_attentions": True, "return_dict_in_generate": True, "compile_config": compile_config()}
    with fresh_graphs(), pytest.raises(NotImplementedError, match="output_attentions"):
        generate(model, KnormCache(model.config, budget=12), random_tokens(1, 40), **options)
    output = generate(model, KnormCache(model.config, budget=1.0), random_tokens(1, 40), max_new_tokens=3, **options)
    assert [step[0].shape[-1] for step in output.attentions] == [40, 41, 42]


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "olmo2"])
def test_other_architectures(family: str) -> None:
    """Models with sliding windows are not compiled; soft caps and sinks are part of the graph."""
    model = build_model(family, attention="eager")
    prompt = random_tokens(1, 40)
    with fresh_graphs():
        outputs = [
            generate(model, SnapKVCache(model.config, budget=12), prompt, max_new_tokens=20, **setting)
            for setting in ({"compile_config": compile_config()}, {"disable_compile": True})
        ]
    assert torch.equal(*outputs)


def test_hooks_that_prune_prompts_are_part_of_the_graph() -> None:
    model = build_model("llama", num_hidden_layers=2)
    cache = PyramidCache(model, budget=0.4, prefill_depth=0.0)
    with fresh_graphs():
        generate(model, cache, random_tokens(1, 40), max_new_tokens=4, compile_config=compile_config())
        assert num_graphs() == 1


def test_a_budget_that_holds_everything_is_dynamic_cache() -> None:
    model, prompt = build_model("llama", num_hidden_layers=2), left_pad(random_rows(PROMPTS))[0]
    with fresh_graphs():
        output = generate(model, H2OCache(model.config, budget=1.0), prompt, compile_config=compile_config())
        assert num_graphs() == 1
    assert torch.equal(output, generate(model, DynamicCache(config=model.config), prompt))


def test_streaming_beyond_the_steps_of_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The angles are rebased between steps: one more graph, and none after it."""
    monkeypatch.setattr(streaming_llm, "REBASE_INTERVAL", 64)
    model, prompt = build_model("llama", num_hidden_layers=2), left_pad(random_rows(PROMPTS))[0]
    with fresh_graphs():
        compiled, plain = (StreamingLLMCache(model.config, budget=12) for _ in range(2))
        output = generate(model, compiled, prompt, compile_config=compile_config())
        assert num_graphs() == 2
        assert torch.equal(output, generate(model, plain, prompt, disable_compile=True))
    assert held(compiled) == held(plain)


def test_a_model_that_the_user_compiles() -> None:
    """With `cache.step()` after each forward pass; without it the graph breaks, and the numbers are the same."""
    model = build_model("llama", num_hidden_layers=2)
    for counts in (True, False):
        with fresh_graphs():
            compiled = torch.compile(model, backend="eager", fullgraph=counts, dynamic=False)
            runs = [Steps(model, TOVACache(model.config, budget=12), (40, 40)) for _ in range(2)]
            runs[0].model = compiled
            for tokens in random_tokens(20, 2, 1, seed=2):
                if counts:  # after the prompt as well
                    runs[0].cache.step()
                torch.testing.assert_close(runs[0].feed(tokens), runs[1].feed(tokens), atol=1e-5, rtol=0)
            if counts:
                runs[0].cache.step()
            assert held(runs[0].cache) == held(runs[1].cache)
            assert not counts or num_graphs() == 1


def test_nothing_keeps_a_cache_alive_that_was_compiled() -> None:
    model, prompt = build_model("llama", num_hidden_layers=2), random_tokens(1, 40)
    with fresh_graphs():
        cache = SnapKVCache(model.config, budget=12)
        generate(model, cache, prompt, compile_config=compile_config())
        keys = [weakref.ref(layer.keys) for layer in cache.layers]
        del cache
        gc.collect()
        assert not any(key() is not None for key in keys)
