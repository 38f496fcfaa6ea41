"""The site in docs/: every cache has its page, and what the pages say is what the code does."""

import argparse
import ast
import importlib.util
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from caches import CACHE_CASES
from models import build_model, random_tokens
from pages import DOCS, ROOT, anchors_of, links_of, run_page, section_of, table_rows
from transformers import PreTrainedModel

import pyramid_cache
from pyramid_cache import ops, plot
from pyramid_cache.caches.massive_activation import MassiveActivationLayer
from pyramid_cache.caches.pyramid import num_kept_of_zone
from pyramid_cache.engine.cache import CompressedCache


CACHE_NAMES = [name for name in pyramid_cache.__all__ if name not in ("Policy", "PolicyCache")]
# Tags of mkdocs' own are no concern of what is read here.
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
NAV: dict[str, Any] = {title: place for entry in SITE["nav"] for title, place in entry.items()}
PAGES: dict[str, Path] = {
    title: DOCS / place for entry in NAV["Caches"] if isinstance(entry, dict) for title, place in entry.items()
}
MAX_PICTURE_BYTES = 60_000
QUALITY = DOCS / "quality.md"
BUDGETS = ["0.5", "0.25", "0.1"]
COMMAND = "python tests/test_docs.py --write"


def paths_in(nav: Any) -> list[str]:
    """The files of a navigation, in their order."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [path for value in values for path in paths_in(value)]


def one_line(page: Path) -> str:
    """A page without its line breaks."""
    return " ".join(page.read_text().split())


# Where pages are and lead.


def test_every_cache_has_a_page_and_every_page_a_place() -> None:
    assert sorted(PAGES) == sorted(CACHE_NAMES)
    assert len(set(PAGES.values())) == len(CACHE_NAMES)
    on_disk = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(paths_in(SITE["nav"])) == sorted(on_disk)
    for name, page in PAGES.items():
        assert page.read_text().startswith(f"# {name}\n")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    links = links_of(page.read_text())
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page.name}"
        if page != ROOT / "README.md":
            assert DOCS in target.parents, f"{link} in {page.name} is not part of the site"
        if anchor:
            assert anchor in anchors_of(target.read_text()), f"{link} in {page.name}"


def test_the_api_page_is_of_all_that_is_public() -> None:
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    expected = {f"pyramid_cache.{name}" for name in pyramid_cache.__all__}
    expected |= {f"pyramid_cache.ops.{name}" for name in ops.__all__}
    beside = {"cache.CompressedCache", "policy.ScoringView", "policy.PromptView"}
    expected |= {f"pyramid_cache.plot.{name}" for name in plot.__all__}
    assert set(shown) == expected | {f"pyramid_cache.engine.{name}" for name in beside}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute))


def test_what_all_caches_can_be_asked_is_on_the_api_page() -> None:
    text = (DOCS / "api.md").read_text()
    [members] = re.findall(r"members: \[(.*)\]", text)
    public = {
        name
        for name, member in vars(CompressedCache).items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property | classmethod))
    }
    # What models and layers call, and what is transformers' own.
    assert public - set(members.split(", ")) == {"update", "require_whole", "is_croppable", "compressed_layers"}
    assert set(members.split(", ")) <= public


def test_the_page_of_the_ops_names_each() -> None:
    text = (DOCS / "ops.md").read_text()
    assert [name for name in ops.__all__ if f"`{name}`" not in text] == []


def test_the_table_of_caches() -> None:
    title, *rows = table_rows((DOCS / "caches" / "index.md").read_text())
    assert title == ["cache", "keeps", "looks at", "bounded"]
    assert [re.match(r"\[(\w+)\]\((.*)\)", row[0]).groups() for row in rows] == [
        (name, page.name) for name, page in PAGES.items()
    ]
    bounded = {case.cache_class.__name__: case.is_bounded for case in CACHE_CASES}
    assert {name: row[3] == "yes" for name, row in zip(PAGES, rows, strict=True)} == bounded


# What a page says of its cache.


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_settings_are_those_of_the_constructor(name: str) -> None:
    title, *rows = table_rows(section_of(PAGES[name].read_text(), "Settings"))
    assert title == ["argument", "default", "what it is", "larger", "smaller"]
    parameters = list(inspect.signature(getattr(pyramid_cache, name).__init__).parameters.values())[1:]
    expected = [
        [f"`{parameter.name}`", "–" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"]
        for parameter in parameters
    ]
    assert [row[:2] for row in rows] == expected
    assert all(len(row) == 5 and all(row) for row in rows)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_example_of_a_page_runs(name: str) -> None:
    model = build_model("llama", num_hidden_layers=2)
    inputs = {"input_ids": random_tokens(1, 200), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    names = run_page(PAGES[name], {"model": model, "inputs": inputs, **vars(pyramid_cache)}, shows_output=False)
    assert type(names["cache"]) is getattr(pyramid_cache, name)
    assert names["output"].shape == (1, 232)
    assert names["cache"].get_seq_length() == 231


# Memory: what stands on a page is run with the numbers of a model, and compared with what is held.

BATCH, PROMPT_LENGTH, BUDGET, INTERVAL = 2, 300, 100, 32
# What all layers of a cache share: rotary frequencies, and turns of sinks.
MAX_SHARED_BYTES = 1024


def memory_formula(name: str, **numbers: Any) -> dict[str, Any]:
    """What the block under "Memory" defines, given its numbers."""
    [block] = re.findall(r"```text\n(.*?)```", section_of(PAGES[name].read_text(), "Memory"), re.DOTALL)
    exec(block, {}, numbers)
    return numbers


def numbers_of(model: PreTrainedModel) -> dict[str, int]:
    """What formulas call the sizes of a model."""
    config = model.config
    return {
        "layers": config.num_hidden_layers,
        "batch": BATCH,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "itemsize": model.dtype.itemsize,
    }


@torch.no_grad()
def read(model: PreTrainedModel, cache: CompressedCache, num_steps: int = 0) -> None:
    """A prompt of two rows, and decode steps."""
    model(random_tokens(BATCH, PROMPT_LENGTH), past_key_values=cache)
    for _ in range(num_steps):
        model(random_tokens(BATCH, 1), past_key_values=cache)


def assert_holds(cache: CompressedCache, expected: int, shares_tensors: bool = False) -> None:
    """Whether a cache holds as many bytes as a formula says; beside that only what its layers share."""
    rest = cache.nbytes - expected
    assert 0 <= rest <= (MAX_SHARED_BYTES if shares_tensors else 0)
    # Of twice as many layers or rows the rest is no more.
    assert rest < expected / 50


SLOT_CACHES = [
    name for name in CACHE_NAMES if name not in ("PyramidCache", "H2OCache", "StreamingLLMCache", "ShadowKVCache")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLOT_CACHES)
def test_memory_of_caches_with_a_score(name: str, dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    cache = getattr(pyramid_cache, name)(model.config, BUDGET, eviction_interval=INTERVAL)
    settings = {"use_covariance": True} if name == "ExpectedAttentionCache" else {}
    shares = name in ("ExpectedAttentionCache", "MassiveActivationCache")

    def expected(slots: int) -> int:
        return int(memory_formula(name, **numbers_of(model), slots=slots, **settings)["nbytes"])

    read(model, cache)
    assert_holds(cache, expected(BUDGET), shares)
    held = []
    with torch.no_grad():
        for _ in range(2 * INTERVAL):
            model(random_tokens(BATCH, 1), past_key_values=cache)
            held.append(cache.nbytes)
    rest = max(held) - expected(BUDGET + INTERVAL)
    assert 0 <= rest <= shares * MAX_SHARED_BYTES
    cache.compress()
    assert_holds(cache, expected(BUDGET), shares)


def test_memory_of_expected_attention_without_covariance() -> None:
    model = build_model("llama")
    cache = pyramid_cache.ExpectedAttentionCache(model.config, BUDGET, use_covariance=False)
    read(model, cache)
    numbers = memory_formula("ExpectedAttentionCache", **numbers_of(model), slots=BUDGET, use_covariance=False)
    assert_holds(cache, int(numbers["nbytes"]), shares_tensors=True)


def test_memory_of_statistics_in_tokens() -> None:
    """32 heads over 8 of width 128 in bfloat16: as much as 260 tokens, as the page says."""
    numbers = {"layers": 1, "batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "itemsize": 2}
    sizes = [
        memory_formula("ExpectedAttentionCache", **numbers, slots=slots, use_covariance=True)["nbytes"]
        for slots in (0, 1)
    ]
    assert "as 260 tokens" in one_line(PAGES["ExpectedAttentionCache"])
    assert round(sizes[0] / (sizes[1] - sizes[0]), -1) == 260


def test_memory_of_massive_activations_from_the_model() -> None:
    model = build_model("llama")
    cache = pyramid_cache.MassiveActivationCache(model, BUDGET)
    read(model, cache)
    numbers = memory_formula("MassiveActivationCache", **numbers_of(model), slots=BUDGET)
    layers = [layer for layer in cache.layers if isinstance(layer, MassiveActivationLayer) and layer.is_probed]
    assert "36 bytes more per row" in one_line(PAGES["MassiveActivationCache"])
    assert_holds(cache, int(numbers["nbytes"]) + 36 * BATCH * len(layers), shares_tensors=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_h2o(dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    numbers = numbers_of(model)
    expected = memory_formula("H2OCache", **numbers, budget=BUDGET)["nbytes"]
    cache = pyramid_cache.H2OCache(model.config, BUDGET)
    read(model, cache)
    assert_holds(cache, expected - 8 * numbers["layers"] * BATCH * numbers["kv_heads"])
    cache.reset()
    read(model, cache, num_steps=40)
    assert_holds(cache, expected)


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_memory_of_streaming_llm(num_sink_tokens: int, prefill: str) -> None:
    model = build_model("llama")
    sizes = {"budget": BUDGET, "num_sink_tokens": num_sink_tokens}
    expected = memory_formula("StreamingLLMCache", **numbers_of(model), **sizes)["nbytes"]
    for num_steps in (0, 40):
        cache = pyramid_cache.StreamingLLMCache(model.config, **sizes, prefill=prefill)
        read(model, cache, num_steps)
        assert_holds(cache, expected, shares_tensors=True)


@pytest.mark.parametrize("budget", [0.4, BUDGET])
@pytest.mark.parametrize("from_model", [False, True])
def test_memory_of_pyramid(from_model: bool, budget: float | int) -> None:
    model = build_model("llama")
    numbers = numbers_of(model)
    kept_per_layer = budget * PROMPT_LENGTH if isinstance(budget, float) else budget
    kept_tokens = int(kept_per_layer * numbers["layers"])
    cache = pyramid_cache.PyramidCache(model if from_model else model.config, budget)
    read(model, cache)
    assert sum(cache.num_kept_tokens()) == kept_tokens
    assert_holds(cache, memory_formula("PyramidCache", **numbers, kept_tokens=kept_tokens)["nbytes"])


def test_what_pyramid_keeps_of_generated_tokens() -> None:
    text = one_line(PAGES["PyramidCache"])
    [(zone, first, depth, last)] = re.findall(
        r"zones of (\d+), .* first layer keeps (\d+) and the last of (\d+) keeps (\d+)", text
    )
    assert num_kept_of_zone(0, int(depth)) == int(first)
    assert num_kept_of_zone(int(depth) - 1, int(depth)) == int(last)
    assert int(zone) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_memory_of_shadow_kv(quantize: str | None, dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    settings: dict[str, Any] = {
        "budget": 19,
        "rank": 6,
        "chunk_size": 4,
        "num_outlier_chunks": 3,
        "num_spread_bands": 3,
        "num_local_tokens": 9,
        "offload_interval": 8,
        "quantize": quantize,
    }
    cache = pyramid_cache.ShadowKVCache(model.config, **settings)
    read(model, cache)
    stored = dtype.itemsize if quantize is None else 1
    numbers = memory_formula("ShadowKVCache", **numbers_of(model), **settings, tokens=PROMPT_LENGTH, stored=stored)
    memory = cache.memory()
    assert sum(memory["host"].values()) == numbers["host_nbytes"]
    assert_holds(cache, numbers["device_nbytes"] + numbers["host_nbytes"], shares_tensors=True)


def test_what_shadow_kv_says_of_models() -> None:
    """The shares of the full cache that its page gives follow from the formula."""
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(pyramid_cache.ShadowKVCache.__init__).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
    text = one_line(PAGES["ShadowKVCache"])

    def shares(tokens: int, layers: int, kv_heads: int, head_dim: int, itemsize: int) -> tuple[str, str]:
        sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": itemsize, "batch": 1}
        numbers = memory_formula("ShadowKVCache", **sizes, **defaults, tokens=tokens, stored=itemsize)
        full = layers * kv_heads * 2 * head_dim * itemsize * tokens
        return f"{numbers['device_nbytes'] / full:.2f}", f"{numbers['host_nbytes'] / full:.2f}"

    device, host = shares(131_072, 32, 8, 128, 2)
    assert f"take {device} of the full cache on the device, and {host} on the host" in text
    device, _ = shares(4_096, 30, 3, 64, 4)
    assert f"holds {device} times what the full cache takes" in text
    # From where on it saves memory, to a hundred tokens.
    for about, shape in ((3000, (32, 8, 128, 2)), (5000, (30, 3, 64, 4))):
        assert f"about {about:,}" in text
        assert float(shares(about - 150, *shape)[0]) > 1 > float(shares(about + 150, *shape)[0])


# What larger and smaller values do, as far as sizes tell.


def nbytes(cache: CompressedCache) -> int:
    return cache.nbytes


def fall_with_depth(cache: CompressedCache) -> int:
    """How many tokens more the first layer holds than the last."""
    kept = cache.num_kept_tokens()
    return kept[0] - kept[-1]


def fall_behind_dense_layers(cache: CompressedCache) -> int:
    """How many tokens less than before the last layer holds, the first ones holding more."""
    return -cache.num_kept_tokens()[-1]


def spread_of_heads(cache: CompressedCache) -> int:
    """By how much the numbers of tokens that the heads of a layer hold differ."""
    held = (cache.positions(0) >= 0).sum(dim=-1)
    return int(held.max() - held.min())


# Class, what else it is given, the argument, a smaller and a larger value, what is measured, and whether that is more.
EFFECTS = [
    ("SnapKVCache", {}, "budget", 60, 90, nbytes, True),
    ("SnapKVCache", {"budget": 60}, "eviction_interval", 8, 40, nbytes, True),
    ("TOVACache", {"budget": 60}, "eviction_interval", 1, 40, nbytes, True),
    ("PyramidCache", {"budget": 0.4}, "decay_ratio", 0.2, 0.9, fall_with_depth, False),
    ("PyramidCache", {"budget": 0.4, "decay_ratio": 0.2}, "min_context_length", 0, 64, fall_with_depth, False),
    ("PyramidCache", {"budget": 0.5}, "first_pruned_layer", 0, 1, fall_behind_dense_layers, True),
    ("PyramidKVCache", {"budget": 100, "window_size": 8}, "beta", 2, 10, fall_with_depth, True),
    ("AdaKVCache", {"budget": 60, "window_size": 8}, "floor_ratio", 0.1, 1.0, spread_of_heads, False),
    ("ExpectedAttentionCache", {"budget": 60}, "use_covariance", False, True, nbytes, True),
    ("StreamingLLMCache", {}, "budget", 60, 90, nbytes, True),
    ("ShadowKVCache", {}, "budget", 16, 32, nbytes, True),
    ("ShadowKVCache", {}, "rank", 4, 8, nbytes, True),
    ("ShadowKVCache", {}, "chunk_size", 2, 4, nbytes, False),
    ("ShadowKVCache", {}, "num_outlier_chunks", 2, 6, nbytes, True),
    ("ShadowKVCache", {}, "num_spread_bands", 0, 4, nbytes, True),
    ("ShadowKVCache", {}, "num_local_tokens", 4, 12, nbytes, True),
    ("ShadowKVCache", {}, "offload_interval", 4, 12, nbytes, True),
]
SMALL_SHADOW = {
    "budget": 16,
    "rank": 6,
    "chunk_size": 4,
    "num_outlier_chunks": 2,
    "num_local_tokens": 4,
    "offload_interval": 8,
}


@pytest.mark.parametrize(
    ("name", "others", "argument", "smaller", "larger", "measure", "is_more"),
    EFFECTS,
    ids=lambda value: str(value)[:24],
)
def test_what_larger_values_do(
    name: str,
    others: dict[str, Any],
    argument: str,
    smaller: Any,
    larger: Any,
    measure: Callable[[CompressedCache], int],
    is_more: bool,
) -> None:
    model = build_model("llama", num_hidden_layers=4)
    settings = {**(SMALL_SHADOW if name == "ShadowKVCache" else {}), **others}
    measured = []
    for value in (smaller, larger):
        torch.manual_seed(1)
        cache = getattr(pyramid_cache, name)(model.config, **{**settings, argument: value})
        steps = 30 if argument == "eviction_interval" else 0
        read(model, cache, steps)
        measured.append(measure(cache))
    assert (measured[0] < measured[1]) if is_more else (measured[0] > measured[1]), measured


# What the pages say of quality comes from one table.


def answers(protocols: tuple[str, ...] = ("context", "question")) -> dict[tuple[str, str], list[float]]:
    """
    Exact answers in docs/quality.md by task ("needles-8-1024, question first") and label: at 0.5, 0.25 and 0.1.
    `DynamicCache` has one number.
    """
    part = section_of(QUALITY.read_text(), "All caches")
    found: dict[tuple[str, str], list[float]] = {}
    for section in part.split("\n### ")[1:]:
        task = section.partition("\n")[0]
        if not task.endswith(tuple(f"{protocol} first" for protocol in protocols)):
            continue
        [full] = re.findall(r"^DynamicCache: ([\d.]+) /", section, re.MULTILINE)
        found[task, "DynamicCache"] = [float(full)]
        title, *rows = table_rows(section)
        assert title == ["cache", *BUDGETS]
        for label, *cells in rows:
            found[task, label] = [float(cell.partition(" / ")[0]) for cell in cells]
    return found


def results_table(labels: list[str]) -> str:
    """Exact answers of some rows of docs/quality.md."""
    found = answers()
    lines = ["| task | cache | full cache | 0.5 | 0.25 | 0.1 |", "|---|---|---|---|---|---|"]
    for task in dict.fromkeys(task for task, _ in found):
        for label in labels:
            numbers = [*found[task, "DynamicCache"], *found[task, label]]
            lines.append(f"| {task} | {label} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    return "\n".join(lines)


def with_results(page: str) -> str:
    """A page whose results are those of docs/quality.md."""
    return re.sub(
        r"<!-- results: (.*?) -->\n.*?<!-- end of results -->",
        lambda match: (
            f"<!-- results: {match[1]} -->\n\n{results_table(match[1].split('; '))}\n\n<!-- end of results -->"
        ),
        page,
        flags=re.DOTALL,
    )


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_results_are_those_of_the_table(name: str) -> None:
    page = PAGES[name].read_text()
    assert page.count("<!-- results: ") == 1
    [labels] = re.findall(r"<!-- results: (.*) -->", page)
    assert set(labels.split("; ")) == {
        label for _, label in answers() if label.partition("(")[0].partition(",")[0] == name
    }
    assert with_results(page) == page, f"{PAGES[name]} is not what docs/quality.md has. Run `{COMMAND}`."


class TestClaims:
    """What the pages say of caches beside each other, in docs/quality.md; of exact answers, at 0.5, 0.25 and 0.1."""

    EIGHT, LONGER, ONE, PAIRS = "needles-8-1024", "needles-8-2048", "needles-1-4096", "recall-448"
    KEEPS_ALL = ("ShadowKVCache", "DynamicCache")

    def of(self, label: str, *protocols: str) -> list[list[float]]:
        found = answers(protocols or ("context", "question"))
        return [numbers for (_, other), numbers in found.items() if other == label]

    def evicting(self, task: str, index: int) -> dict[str, float]:
        found = answers()
        return {
            label: numbers[index]
            for (other, label), numbers in found.items()
            if other == task and label not in self.KEEPS_ALL
        }

    def is_nowhere_ahead(self, label: str, other: str, *protocols: str, indices: tuple[int, ...] = (0, 1, 2)) -> bool:
        return not any(index in indices for _, index in self.ahead(label, other, *protocols))

    def ahead(self, label: str, other: str, *protocols: str) -> dict[tuple[str, int], tuple[float, float]]:
        """By task and budget where one has more answers than another: both numbers."""
        found = answers(protocols or ("context", "question"))
        return {
            (task, index): (number, found[task, other][index])
            for (task, name), numbers in found.items()
            if name == label
            for index, number in enumerate(numbers)
            if number > found[task, other][index]
        }

    def best(self, task: str, index: int) -> set[str]:
        numbers = self.evicting(task, index)
        return {label for label, number in numbers.items() if number == max(numbers.values())}

    def test_pyramid(self) -> None:
        longer = f"{self.LONGER}, question first"
        assert self.ahead("PyramidCache(config)", "SnapKVCache", "question") == {
            (longer, 0): (0.35, 0.15),
            (longer, 1): (0.15, 0.07),
            (longer, 2): (0.03, 0.0),
        }
        for label in ("TOVACache", "RKVCache", "MassiveActivationCache"):
            assert self.is_nowhere_ahead("PyramidCache(config)", label, "question")
        assert self.is_nowhere_ahead("PyramidCache(model)", "PyramidCache(config)", "question")

    def test_h2o(self) -> None:
        assert self.is_nowhere_ahead("SnapKVCache", "H2OCache", "context")
        for label in ("TOVACache", "RKVCache", "MassiveActivationCache"):
            assert self.is_nowhere_ahead("H2OCache", label, "question")

    def test_snapkv(self) -> None:
        assert self.ahead("SnapKVCache", "MassiveActivationCache") == {
            (f"{self.LONGER}, context first", 0): (0.23, 0.2)
        }
        pairs = zip(self.of("SnapKVCache", "question"), self.of("MassiveActivationCache", "question"), strict=True)
        assert all(number < other for numbers, others in pairs for number, other in zip(numbers, others, strict=True))

    def test_pyramidkv(self) -> None:
        assert self.ahead("PyramidKVCache", "SnapKVCache") == {(f"{self.LONGER}, question first", 0): (0.17, 0.15)}

    def test_adakv(self) -> None:
        assert self.is_nowhere_ahead("AdaKVCache", "SnapKVCache", indices=(0, 1))
        numbers = self.evicting(f"{self.EIGHT}, question first", 2)
        assert numbers["AdaKVCache"] > numbers["SnapKVCache"]

    def test_tova(self) -> None:
        task = f"{self.EIGHT}, question first"
        assert self.best(task, 2) == {"TOVACache"}
        assert min(answers()[task, "TOVACache"][:2]) >= answers()[task, "DynamicCache"][0]

    def test_keydiff(self) -> None:
        assert self.best(f"{self.ONE}, context first", 0) == {"KeyDiffCache"}
        for index in (0, 1):
            pairs = self.evicting(f"{self.PAIRS}, context first", index)
            assert sorted(pairs, key=pairs.get)[-2:] == ["KeyDiffCache", "ExpectedAttentionCache"]
        needles = [
            numbers[2] for (task, label), numbers in answers().items() if label == "KeyDiffCache" and task[0] == "n"
        ]
        assert max(needles) <= 0.05
        for label in ("TOVACache", "MassiveActivationCache"):
            assert self.is_nowhere_ahead("KeyDiffCache", label, "question")

    def test_knorm(self) -> None:
        assert max(max(numbers) for numbers in self.of("KnormCache")) <= 0.2

    def test_expected_attention(self) -> None:
        for index in (0, 1):
            assert self.best(f"{self.PAIRS}, context first", index) == {"ExpectedAttentionCache"}
        for protocol in ("context", "question"):
            assert answers()[f"{self.ONE}, {protocol} first", "ExpectedAttentionCache"] == [0, 0, 0]

    def test_rkv(self) -> None:
        for task in (self.EIGHT, self.ONE):
            for index in (0, 1):
                numbers = self.evicting(f"{task}, question first", index)
                ahead = {label.partition(",")[0] for label, number in numbers.items() if number > numbers["RKVCache"]}
                assert ahead <= {"MassiveActivationCache", "TOVACache"}
        assert answers()[f"{self.ONE}, question first", "RKVCache"][0] == 1
        assert max(numbers[2] for numbers in self.of("RKVCache", "context")) < 0.1

    def test_massive_activation(self) -> None:
        found = answers()
        one, eight = f"{self.ONE}, question first", f"{self.EIGHT}, question first"
        assert found[one, "MassiveActivationCache"][2] == found[one, "DynamicCache"][0]
        assert found[eight, "MassiveActivationCache"][0] >= found[eight, "DynamicCache"][0]
        assert found[eight, "MassiveActivationCache"][2] < found[eight, "TOVACache"][2]
        longer = f"{self.LONGER}, question first"
        assert found[longer, "MassiveActivationCache"][1] == found[longer, "DynamicCache"][0]
        assert self.best(longer, 2) == {"TOVACache"}

    def test_shadow_kv(self) -> None:
        found = answers()
        for protocol in ("context", "question"):
            task = f"{self.EIGHT}, {protocol} first"
            assert found[task, "ShadowKVCache"][0] >= found[task, "DynamicCache"][0]
            assert found[f"{self.ONE}, {protocol} first", "ShadowKVCache"][1] == 1

    def test_beside_kvpress(self) -> None:
        """SnapKV's hidden numbers at a half and a quarter, and all of Knorm's."""
        part = QUALITY.read_text().partition("## Beside kvpress")[2]
        for label, other, tasks, width in (("SnapKVCache", "SnapKV", "needles", 2), ("KnormCache", "Knorm", "", 3)):
            compared = 0
            for section in part.split("\n### ")[1:]:
                if not section.startswith(tasks):
                    continue
                rows = {
                    row[0]: [cell.partition(" / ")[0] for cell in row[2 : 2 + width]]
                    for row in table_rows(section)[1:]
                }
                assert rows[label] == rows[other]
                compared += 1
            assert compared >= 4


# Recorded runs.


def test_every_recorded_run_has_its_command_and_machine() -> None:
    folder = DOCS / "results"
    title, *rows = table_rows((folder / "README.md").read_text())
    assert title == ["file", "command (after `pyramid-cache`)", "machine"]
    files: dict[str, list[str]] = {}
    for pattern, command, machine in rows:
        pattern = re.sub(r"^\[`(.*)`\]\(.*\)$|^`(.*)`$", lambda match: match[1] or match[2], pattern)
        matching = sorted(path.name for path in folder.glob(pattern))
        assert matching, f"there is no {pattern}"
        for file in matching:
            assert file not in files, f"{file} is in two rows"
            files[file] = [command, machine]
    assert sorted(files) == sorted(path.name for path in folder.glob("*.json"))
    for file, (command, machine) in files.items():
        record = json.loads((folder / file).read_text())
        if "command" in record:
            _, words = record["command"].split(maxsplit=1)
            # The table leaves out defaults, but says nothing else.
            assert set(re.findall(r"`([^`]*)`", command)[0].split()) <= {
                *words.split(),
                "FOLDER",
                "--out",
                "--threads",
            }
        if "machine" in record:
            processor = record["machine"]["accelerator"] or record["machine"]["processor"]
            assert re.sub(r"\(R\)| Processor", "", processor).strip() in machine
            assert record["versions"]["torch"].partition("+")[0] in machine
            assert record["versions"]["transformers"] in machine


def recorded(file: str) -> Any:
    """A record of docs/results."""
    return json.loads((DOCS / "results" / file).read_text())


def test_figures_are_those_of_recorded_runs() -> None:
    run = recorded("2026-11-22-amd-epyc-2-cores-budget-0.25.json")
    rows = {row["cache"]: row for row in run["rows"]}
    assert (run["settings"]["budget"], run["settings"]["batch_size"]) == (0.25, 8)
    for name, label in (("H2OCache", "h2o"), ("StreamingLLMCache", "streaming")):
        text = one_line(PAGES[name])
        assert f"decoding was {rows[label]['decode_ratio']:.2f} times as fast as" in text
        assert f"the prefill took {rows[label]['prefill_ratio']:.2f} of the time" in text
    run = recorded("2026-11-22-amd-epyc-2-cores-pyramid-0.4.json")
    [ratio] = [row["prefill_ratio"] for row in run["rows"] if row["label"] == "PyramidCache(model)"]
    sizes = run["settings"]
    assert (
        f"at a budget of {sizes['budget']} took {ratio:.2f} of the time of `DynamicCache` for {sizes['batch_size']} prompts of "
        f"{sizes['prompt_tokens']:,} tokens" in one_line(PAGES["PyramidCache"])
    )
    rows = recorded("2026-11-26-nvidia-h100-80gb-hbm3-gpu.json")["parts"]["ops"]["result"]["rows"]
    ratios = {row["op"]: row["ratio_to_attention"] for row in rows if row["length"] == 32_768}
    assert (
        f"{ratios['all_row_scores']:.2f} times attention alone at 32,768 tokens on an H100 ([ops](../ops.md)); those of a window cost "
        f"{ratios['window_scores']:.2f}" in one_line(PAGES["H2OCache"])
    )


def test_what_a_model_says_without_massive_tokens() -> None:
    rows = table_rows(section_of((DOCS / "massive-activations.md").read_text(), "What happens without them"))
    kept, forced_out, _ = (float(row[1]) for row in rows[1:])
    assert f"a perplexity of {forced_out:.0f} instead of {kept:.0f}" in one_line(PAGES["MassiveActivationCache"])


def test_the_first_page_asks_for_the_versions_that_are_needed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    versions = [
        re.search(pattern, text)[1]
        for pattern in (r'python = ">=([\d.]+)"', r"torch>=([\d.]+)", r"transformers>=([\d.]+)")
    ]
    python, torch_version, transformers_version = versions
    assert f"Python {python}, torch {torch_version} and transformers {transformers_version} or newer" in one_line(
        DOCS / "index.md"
    )


# What the page of the design says.


def test_the_design_lists_all_folders() -> None:
    block = re.findall(r"```text\n(.*?)```", (DOCS / "design.md").read_text(), re.DOTALL)[0]
    folders = re.findall(r"(\w+)/ ", block)
    assert set(folders) == {
        path.name for path in (ROOT / "pyramid_cache").iterdir() if (path / "__init__.py").exists()
    }


def test_the_design_counts_methods_right() -> None:
    words = [
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
    ]
    scored = [name for name in CACHE_NAMES if issubclass(getattr(pyramid_cache, name), pyramid_cache.PolicyCache)]
    text = section_of((DOCS / "design.md").read_text(), "Policies")
    assert f"{words[len(scored)].capitalize()} of the {words[len(CACHE_NAMES)]} caches are a `Policy`" in text
    assert f"{words[len(CACHE_NAMES) - len(scored)].capitalize()} methods have layers of their own" in text
    own = re.findall(r"^- `(\w+)`", text, re.MULTILINE)
    assert sorted(own) == sorted(set(CACHE_NAMES) - set(scored))


def test_errors_are_as_the_design_has_them() -> None:
    """Each says what the table has, in an error of that class."""
    raised: dict[str, str] = {}
    for path in (ROOT / "pyramid_cache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                constants = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                text = "".join(part if isinstance(part, str) else "?" for part in constants)
                raised[node.exc.func.id] = raised.get(node.exc.func.id, "") + text + "\n"
    title, *rows = table_rows(section_of((DOCS / "design.md").read_text(), "What is refused"))
    assert title == ["what", "error", "of which it says"] and len(rows) >= 10
    for _, error, words in rows:
        assert words.strip("`") in raised[re.match(r"`(\w+)`", error)[1]], words


def test_files_that_the_design_names_are_there() -> None:
    for name in re.findall(r"`((?:engine|ops|tests)/[\w/]+\.py)`", (DOCS / "design.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "pyramid_cache" / name).exists(), name


# Pictures.


def png_texts(data: bytes) -> dict[str, str]:
    """The texts in the metadata of a PNG, whose chunks are checked."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    texts, start = {}, 8
    while start < len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        content = data[start + 8 : start + 8 + length]
        assert zlib.crc32(kind + content) == struct.unpack(">I", data[start + 8 + length : start + 12 + length])[0]
        if kind == b"tEXt":
            keyword, _, text = content.partition(b"\0")
            texts[keyword.decode("latin-1")] = text.decode("latin-1")
        start += 12 + length
    return texts


def drawing() -> Any:
    """The script that draws the pictures, as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_caches", ROOT / "examples" / "draw_caches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_each_page_has_the_picture_that_its_script_draws(name: str) -> None:
    draw = drawing()
    assert set(draw.SETTINGS) == set(PAGES)
    page = PAGES[name]
    picture = page.with_name(draw.file_name(name))
    assert picture == page.with_suffix(".png")
    [shown] = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    assert shown == picture.name
    data = picture.read_bytes()
    assert len(data) < MAX_PICTURE_BYTES
    description = json.loads(png_texts(data)["Description"])
    assert description["call"] == draw.call_of(name)
    assert (description["prompt_tokens"], description["new_tokens"]) == (draw.PROMPT_TOKENS, draw.NEW_TOKENS)
    assert len(description["held"]) == 30
    draw.build(name, build_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PyramidCache", "TOVACache", "ShadowKVCache"])
def test_pictures_show_what_caches_hold(name: str, tmp_path: Path) -> None:
    """With the real model: each layer holds as many tokens as when the picture was drawn."""
    draw = drawing()
    draw.main(["--out", str(tmp_path), "--caches", name])
    held = [
        json.loads(png_texts((folder / draw.file_name(name)).read_bytes())["Description"])["held"]
        for folder in (tmp_path, DOCS / "caches")
    ]
    assert held[0] == held[1]


# The site itself.


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="needs pip install -e '.[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path / "site"): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    for path in paths_in(SITE["nav"]):
        assert Path(path.replace("README.md", "index.md")).with_suffix(".html") in pages
    api = pages[Path("api.html")]
    for name in (*(f"pyramid_cache.{name}" for name in pyramid_cache.__all__), "pyramid_cache.ops.decode_attention"):
        assert f'id="{name}"' in api
    assert "defaults to" not in api
    for path, page in pages.items():
        assert not re.search(
            r"<(?:script|img)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:(?!.*rel=\"?canonical)", page
        ), path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Writes into the pages of caches what docs/quality.md has, or lists those that differ."
    )
    parser.add_argument("--write", action="store_true", help="write the pages instead of listing them")
    write = parser.parse_args().write
    for file in PAGES.values():
        if with_results(file.read_text()) != file.read_text():
            print(file)
            if write:
                file.write_text(with_results(file.read_text()))
