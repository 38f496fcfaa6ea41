"""Protected tokens: they stay in every head of every layer, whatever the method and what is done with the cache."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import CACHE_CASES, CacheCase, parametrize_cases
from models import drive, generate, random_rows, random_tokens, tiny_model
from test_bad_calls import assert_refused
from test_compile import check_one_graph
from test_layers_share import LargestValues
from test_waits import asked_by_dynamic_cache, count_asked

from pyramid_cache import (
    AdaKVCache,
    H2OCache,
    Policy,
    PolicyCache,
    PyramidCache,
    PyramidKVCache,
    SnapKVCache,
    StreamingLLMCache,
)
from pyramid_cache.engine import checks
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.policy import ScoringView


LENGTHS = (40, 31)
SCATTERED, PER_ROW = [0, 1, 7, 20, 29], [[3, 30], [0, 5, 9, 10]]
CASES = {case.short_name: case for case in CACHE_CASES if case.evicts}
every_case = parametrize_cases(CASES.values())


def build(case: CacheCase, protect: Any, **settings: Any) -> CompressedCache:
    """A cache of a tight budget, which protected tokens fit in the deep layers of `PyramidCache` too."""
    share = {"budget": 0.5} if case.cache_class is PyramidCache else {}
    return replace(case, tight=case.tight | share | settings | {"protect": protect}).build(tiny_model("llama"))


def spans_of(protect: Any) -> list[Sequence[int]]:
    """The protected positions of each of two rows."""
    if isinstance(protect, int):
        return [range(protect)] * 2
    return protect if isinstance(protect[0], list) else [protect] * 2


def forms_for(case: CacheCase) -> list[Any]:
    """Of `StreamingLLMCache`, sinks are protected; there are four without it."""
    return [6] if case.cache_class is StreamingLLMCache else [6, SCATTERED, PER_ROW]


def assert_protected(cache: CompressedCache, spans: Sequence[Sequence[int]]) -> None:
    assert cache.batch_size == len(spans)
    for layer in range(len(cache.layers)):
        for span, heads in zip(spans, cache.positions(layer).tolist(), strict=True):
            assert all(set(span) <= set(head) for head in heads), (layer, span, heads)


# In use.


@every_case
def test_they_stay(case: CacheCase, tmp_path: Path) -> None:
    """After a prompt, each of sixty tokens and a second turn; in a file; and with other rows. Budgets are the same."""
    model, pieces = tiny_model("llama"), [*[1] * 60, 9, *[1] * 5]
    plain = build(case, None)
    drive(model, plain, random_rows(LENGTHS), random_tokens(2, sum(pieces)), pieces=pieces)
    for protect in forms_for(case):
        cache, spans = build(case, protect), spans_of(protect)
        is_checked = lambda step: assert_protected(cache, spans)  # noqa: B023, E731
        drive(model, cache, random_rows(LENGTHS), random_tokens(2, sum(pieces)), is_checked, pieces=pieces)
        kept, wanted = cache.num_kept_tokens(), plain.num_kept_tokens()
        if case.records:
            assert kept == wanted
        else:  # layers share what they hold anew: each loses less than a token of a head to rounding
            assert abs(sum(kept) - sum(wanted)) <= 2 * len(kept)
        cache.save(tmp_path / "cache")
        loaded = case.cache_class.load(tmp_path / "cache", model if case.from_model else model.config)
        assert loaded.settings == cache.settings
        loaded.batch_select_indices(torch.tensor([1, 0, 1]))
        lengths = [length + sum(pieces) for length in (31, 40, 31)]
        mask = torch.ones(3, max(LENGTHS) + sum(pieces), dtype=torch.long)
        mask[[0, 2], :9] = 0
        for step in range(12):
            mask = torch.cat([mask, mask[:, -1:]], dim=1)
            positions = torch.tensor(lengths)[:, None] + step
            with torch.no_grad():
                model(random_tokens(3, 1), attention_mask=mask, position_ids=positions, past_key_values=loaded)
        loaded.compress()
        assert_protected(loaded, [spans[1], spans[0], spans[1]])


@every_case
def test_they_stay_in_rows_that_generate_repeats(case: CacheCase) -> None:
    for protect in forms_for(case):
        cache = build(case, protect)
        generate(tiny_model("llama"), cache, random_rows(LENGTHS), 40, num_beams=2)
        assert_protected(cache, [span for span in spans_of(protect) for _ in range(2)])


def test_steps_ask_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_position_ids", lambda *arguments: None)
    for name in ("h2o", "snapkv"):
        assert count_asked(tiny_model("llama"), build(CASES[name], SCATTERED)) <= asked_by_dynamic_cache()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["h2o", "tova", "streaming", "adakv"])
def test_compiled_steps_are_one_graph(name: str, backend: str) -> None:
    """Which keeps what the uncompiled one keeps."""
    case = CASES[name]
    protect = 6 if name == "streaming" else PER_ROW
    check_one_graph(replace(case, tight=case.tight | {"protect": protect}), backend)


@pytest.mark.parametrize("cache_class, interval", [(H2OCache, 1), (SnapKVCache, 4), (AdaKVCache, 4)])
def test_they_may_take_the_whole_budget(cache_class: type[PolicyCache], interval: int) -> None:
    """Then nothing else stays."""
    floors = [{"floor_ratio": 0.0}, {"floor_ratio": 1.0}] if cache_class is AdaKVCache else [{}]
    for settings in floors:
        cache = cache_class(tiny_model("llama").config, 12, protect=12, eviction_interval=interval, **settings)
        drive(tiny_model("llama"), cache, random_rows(LENGTHS), random_tokens(2, 4 * interval))
        for layer in range(3):
            assert torch.equal(cache.positions(layer).sort().values[..., -12:], torch.arange(12).expand(2, 2, -1))


def test_layers_that_share_a_budget() -> None:
    """A layer whose tokens are all worse than those of later ones keeps the protected ones, and no others."""
    for protect, policy, wanted in ((SCATTERED, LargestValues(1e4), [5, 5, 26]), (12, LargestValues(), [12] * 3)):
        cache = PolicyCache(tiny_model("llama").config, 12, policy, protect=protect, eviction_interval=4)
        drive(tiny_model("llama"), cache, random_rows(LENGTHS), random_tokens(2, 30), pieces=[1] * 13 + [17])
        assert_protected(cache, spans_of(protect))
        for row in range(2):
            assert [layer.num_held_per_row[row] for layer in cache.layers] == wanted


# Against others.


@dataclass(frozen=True)
class LargeKeys(Policy):
    """Some positions have the highest score."""

    highest: tuple[int, ...] = ()

    def score(self, view: ScoringView) -> torch.Tensor:
        is_highest = torch.isin(view.positions, torch.tensor(self.highest, dtype=torch.int32))
        return view.key.norm(dim=-1).masked_fill(is_highest, float("inf"))


@dataclass(frozen=True)
class Latest(Policy):
    """The latest tokens stay; the first of all, which is protected, has no number as its score."""

    highest_from: int = 10**6

    def score(self, view: ScoringView) -> torch.Tensor:
        scores = view.positions.float().masked_fill(view.positions >= self.highest_from, float("inf"))
        return scores.masked_fill(view.positions == 0, float("nan")).expand(-1, view.key.shape[1], -1)


@pytest.mark.parametrize("interval", [1, 4])
def test_they_rank_as_if_the_policy_gave_them_the_highest_score(interval: int) -> None:
    model, rows, later = tiny_model("llama"), random_rows(LENGTHS), random_tokens(2, 40)
    traces = []
    for policy, protect in ((LargeKeys(), SCATTERED), (LargeKeys(tuple(SCATTERED)), None)):
        cache = PolicyCache(model.config, 12, policy, protect=protect, eviction_interval=interval)
        traces.append(drive(model, cache, rows, later, pieces=[1] * 30 + [7, 1, 1, 1]))
    assert torch.equal(traces[0].logits, traces[1].logits)
    for layers in zip(*(trace.positions for trace in traces), strict=True):
        assert all(torch.equal(*pair) for pair in zip(*layers, strict=True))


@pytest.mark.parametrize("highest_from", [10**6, 0])
def test_what_stays_by_hand(highest_from: int) -> None:
    """Of ten and six tokens five stay, and of seven again five. It is the same where a policy wants to keep all."""
    cache = PolicyCache(tiny_model("llama").config, 5, Latest(highest_from), eviction_interval=2, protect=[3, 0, 3])
    trace = drive(tiny_model("llama"), cache, random_rows((10, 6)), random_tokens(2, 2))
    expected = [
        ([0, 3, 7, 8, 9], [0, 2, 3, 4, 5]),
        ([0, 3, 7, 8, 9, 10], [0, 2, 3, 4, 5, 6]),
        ([0, 3, 9, 10, 11], [0, 3, 5, 6, 7]),
    ]
    for step, rows in enumerate(expected):
        assert [trace.held(step, 2, row, 1) for row in range(2)] == list(rows)


def test_nothing_else_changes() -> None:
    """None and no position are the same, and so is what a cache keeps anyway."""
    model, rows, later = tiny_model("llama"), random_rows(LENGTHS), random_tokens(2, 30)
    for name, same in (("snapkv", [None, 0, [], [[], []]]), ("streaming", [None, 4, [0, 1]])):
        caches = [build(CASES[name], protect) for protect in same]
        traces = [drive(model, cache, rows, later) for cache in caches]
        assert all(torch.equal(trace.logits, traces[0].logits) for trace in traces)
        if name == "snapkv":
            assert all(layer.state.protected is None for cache in caches for layer in cache.layers)


# Arguments and errors.


def test_forms() -> None:
    config = tiny_model("llama").config
    for given, wanted in (
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (range(3), [[0, 1, 2]]),
        ((2, np.int32(0), 2), [[0, 2]]),
        (torch.tensor([5, 1]), [[1, 5]]),
        (np.array([[1, 0], [2, 2]]), [[0, 1], [2]]),
        ([torch.tensor([4]), ()], [[4], []]),
    ):
        settings = H2OCache(config, 12, protect=given).settings
        assert json.loads(json.dumps(settings))["protect"] == wanted


def test_more_than_the_budget_is_refused_at_once() -> None:
    config = tiny_model("llama").config
    others = [[0], list(range(0, 26, 2))]
    calls: list[tuple[str, Callable[[], Any], str, Any]] = [
        (
            f"{cache_class.__name__} {protect}",
            lambda a=cache_class, b=protect: a(config, 12, protect=b),
            match,
            ValueError,
        )
        for cache_class, protect, match in (
            (H2OCache, 13, "`budget=12`.*13 tokens of `protect`.*Raise"),
            (PyramidCache, others, "`budget=12`.*13 tokens of `protect`"),
            (StreamingLLMCache, 12, "`budget=12` includes the 12 sink.*at least 13, or lower.*`protect`"),
        )
    ]
    for protect in ([0, 2], [1], [[0, 1], [0]], [[0], []]):
        call = lambda given=protect: StreamingLLMCache(config, 12, protect=given)  # noqa: E731
        calls.append((str(protect), call, "first tokens.*num_sink_tokens=N", NotImplementedError))
    assert_refused(calls)


@torch.no_grad()
def test_a_prompt_whose_protected_tokens_do_not_fit_is_refused() -> None:
    """Before anything is stored, and with the layer that keeps fewest; a longer prompt then fits."""
    model = tiny_model("llama")
    for cache, match in (
        (H2OCache(model.config, 0.25, protect=11), "Layer 0 keeps 10 of the 40 tokens of row 0, but 11 are protected"),
        (
            PyramidCache(model, 0.4, protect=14),
            "Layer 2 keeps 13 of the 40 .*until this .* at least 14, or protect fewer",
        ),
        (SnapKVCache(model.config, "60KiB", protect=6), "Layer 0 keeps 5 .*, but 6 are protected"),
    ):
        with pytest.raises(ValueError, match=match):
            model(random_tokens(2, 40), past_key_values=cache)
        assert cache.get_seq_length() == 0 and not cache.layers[0].is_initialized
        model(random_tokens(1, 48), past_key_values=cache)
        assert_protected(cache, [cache.layers[0].protect[0]])


@torch.no_grad()
def test_a_batch_of_other_rows_is_refused() -> None:
    model, cache = tiny_model("llama"), H2OCache(tiny_model("llama").config, 12, protect=PER_ROW)
    for num_rows in (1, 3):
        with pytest.raises(ValueError, match=f"for 2 rows, but the model was given {num_rows}. Give one list"):
            model(random_tokens(num_rows, 40), past_key_values=cache)
        assert cache.get_seq_length() == 0
    model(random_tokens(4, 40), past_key_values=cache)
    assert_protected(cache, [PER_ROW[0], PER_ROW[0], PER_ROW[1], PER_ROW[1]])


@torch.no_grad()
def test_later_refusals_change_nothing() -> None:
    """Layers that keep the whole budget of a short prompt keep different numbers of a longer one."""
    model = tiny_model("llama")
    cache = PyramidKVCache(model.config, 20, window_size=4, protect=18)
    model(random_tokens(1, 19), past_key_values=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="Layer 2 keeps .* of the 42 tokens .*18 are protected"):
        model(random_tokens(1, 23), past_key_values=cache)
    for each in (cache, before):
        for step in range(10):
            model(random_tokens(1, 1, seed=step), past_key_values=each)
        with pytest.raises(ValueError, match="Layer 2 keeps .* of the 29 tokens"):
            each.compress()
        model(random_tokens(1, 1), past_key_values=each)
    assert all(torch.equal(cache.positions(layer), before.positions(layer)) for layer in range(3))
    assert_protected(cache, [range(18)])
    cache = H2OCache(model.config, 0.25, protect=11)
    cache.activate_past_recording()
    model(random_tokens(1, 46), past_key_values=cache)
    with pytest.raises(ValueError, match="keeps 10 of the 43 tokens"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.get_seq_length() == 44 and cache.num_kept_tokens() == [11] * 3
    assert_protected(cache, [range(11)])
