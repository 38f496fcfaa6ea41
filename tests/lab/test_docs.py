"""The site in docs/: every cache has its page, and what the pages say is what the code does."""

import ast
import importlib.util
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from caches import CACHE_CASES, parameters_of
from models import build_model, random_tokens
from modes import tiny_tokenizer
from pages import DOCS, ROOT, anchors_of, links_of, rewrite, run_page, section_of, table_rows
from transformers import PreTrainedModel

import pyramid_cache
from pyramid_cache import ops, plot
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.policy_cache import CommonOptions
from pyramid_cache.lab.bench.host_costs import COUNTS


CACHE_NAMES = [name for name in pyramid_cache.__all__ if name.endswith("Cache") and name != "PolicyCache"]
# Tags of mkdocs' own are no concern of what is read here.
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
NAV: dict[str, Any] = {title: place for entry in SITE["nav"] for title, place in entry.items()}
PAGES: dict[str, Path] = {
    title: DOCS / place for entry in NAV["Caches"] if isinstance(entry, dict) for title, place in entry.items()
}
MAX_PICTURE_BYTES = 60_000
QUALITY, SPEED = DOCS / "quality.md", DOCS / "speed.md"
BUDGETS = ["0.5", "0.25", "0.1"]
COMMAND = "PYTHONPATH=tests python tests/lab/test_docs.py --write"


def paths_in(nav: Any) -> list[str]:
    """The files of a navigation, in their order."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [path for value in values for path in paths_in(value)]


def one_line(page: Path) -> str:
    """A page without its line breaks."""
    return " ".join(page.read_text().split())


def test_every_cache_has_a_page_and_every_page_a_place() -> None:
    assert sorted(PAGES) == sorted(CACHE_NAMES)
    assert len(set(PAGES.values())) == len(CACHE_NAMES)
    on_disk = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(paths_in(SITE["nav"])) == sorted(on_disk)
    for name, page in PAGES.items():
        assert page.read_text().startswith(f"# {name}\n")


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")):
        for link in links_of(page.read_text()):
            path, _, anchor = link.partition("#")
            if re.match(r"https?://", link):
                continue
            target = (page.parent / path).resolve() if path else page
            is_of_the_site = page.parent == ROOT or DOCS in target.parents
            if not target.exists() or not is_of_the_site or (anchor and anchor not in anchors_of(target.read_text())):
                wrong.append(f"{link} in {page.relative_to(ROOT)}")
    assert wrong == []


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'{name} = "{cited[name]}"' in project for name in ("version", "license"))
    assert f"## {cited['version']} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_api_page_is_of_all_that_is_public() -> None:
    text = (DOCS / "api.md").read_text()
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    expected = {f"{module.__name__}.{name}" for module in (pyramid_cache, ops, plot) for name in module.__all__}
    beside = {"cache.CompressedCache", "policy.LayerView", "policy.ScoringView", "policy.PromptView"}
    served = {"pyramid_cache.serving.compressed"}  # which older versions of transformers cannot import
    assert set(shown) == expected | served | {f"pyramid_cache.engine.{name}" for name in beside}
    for name in set(shown) - served:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute))
    # What all caches can be asked, but what models and layers call, and what is transformers' own.
    members = set(re.findall(r"members: \[(.*)\]", text)[0].split(", "))
    public = {
        name
        for name, member in vars(CompressedCache).items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property | classmethod))
    }
    inner = {"update", "require_whole", "is_croppable", "is_initialized", "compressed_layers"}
    inner |= {"get_mask_sizes", "is_compileable", "release", "held_tensors", "advance", "is_counted"}
    inner |= {"get_conv_state", "has_previous_state"}
    assert public - members == inner
    assert members <= public
    page_of_ops = (DOCS / "ops.md").read_text()
    assert [name for name in ops.__all__ if f"`{name}`" not in page_of_ops] == []


def test_the_table_of_caches() -> None:
    title, *rows = table_rows((DOCS / "caches" / "index.md").read_text())
    assert title == ["cache", "keeps", "looks at", "bounded"]
    assert [re.match(r"\[(\w+)\]\((.*)\)", row[0]).groups() for row in rows] == [
        (name, page.name) for name, page in PAGES.items()
    ]
    bounded = {case.cache_class.__name__: case.is_bounded for case in CACHE_CASES}
    bounded |= {"KVzipCache": bounded["KVzipPlusCache"], "KIVICache": False, "MiniCache": False}
    bounded |= {"KVSharerCache": False}
    assert {name: row[3] == "yes" for name, row in zip(PAGES, rows, strict=True)} == bounded


def test_settings_are_those_of_the_constructor() -> None:
    for name, page in PAGES.items():
        title, *rows = table_rows(section_of(page.read_text(), "Settings"))
        assert title == ["argument", "default", "what it is", "larger", "smaller"], name
        parameters = list(parameters_of(getattr(pyramid_cache, name)).values())
        own = inspect.signature(getattr(pyramid_cache, name)).parameters
        expected = [
            [f"`{each.name}`", "–" if each.default is inspect.Parameter.empty else f"`{each.default!r}`"]
            for each in parameters
            if each.name not in CommonOptions.__annotations__ or each.name in own
        ]
        assert [row[:2] for row in rows] == expected, name
        assert all(len(row) == 5 and all(row) for row in rows), name


def test_the_example_of_each_page_runs() -> None:
    model = build_model("llama", num_hidden_layers=4)
    inputs = {"input_ids": random_tokens(1, 200), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    known = {"model": model, "inputs": inputs, "tokenizer": tiny_tokenizer(), **vars(pyramid_cache)}
    for name, page in PAGES.items():
        names = run_page(page, dict(known), shows_output=False)
        assert type(names["cache"]) is getattr(pyramid_cache, name)
        assert names["output"].shape == (1, 232), name
        assert names["cache"].get_seq_length() == 231, name


# Memory: what stands on a page is run with the numbers of a model, and compared with what is held.

BATCH, PROMPT_LENGTH, BUDGET, INTERVAL = 2, 300, 100, 16
# Caches whose layers hold different numbers of tokens, and what they are given.
SHARE_A_BUDGET: dict[str, dict[str, Any]] = {
    "LayerDefensiveKVCache": {},
    "KVzipCache": {"texts": ((), (), ())},
    "KVzipPlusCache": {"texts": ((), (), ())},
    "AttentionMatchingCache": {"texts": ((), (), ())},
}
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
def read(
    model: PreTrainedModel, cache: CompressedCache, num_steps: int = 0, prompt_length: int = PROMPT_LENGTH
) -> None:
    """A prompt of two rows, and decode steps."""
    for length in ([prompt_length] if prompt_length else []) + [1] * num_steps:
        model(random_tokens(BATCH, length), past_key_values=cache)


def check_memory(
    name: str,
    model: Any,
    *source: Any,
    formula: dict,
    steps: int = 0,
    shared: bool = False,
    **named: Any,
) -> CompressedCache:
    """
    Builds a cache, reads a prompt and takes steps. It must hold as many bytes as the formula says; with `shared`
    beside that only what its layers share.
    """
    cache = getattr(pyramid_cache, name)(*(source or [model.config]), **named)
    read(model, cache, steps)
    numbers = memory_formula(name, **numbers_of(model), **formula)
    expected = int(numbers["nbytes"])
    rest = cache.nbytes - expected
    assert 0 <= rest <= (MAX_SHARED_BYTES if shared else 0), name
    assert rest < expected / 50, name  # of twice as many layers or rows the rest is no more
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_caches_with_a_score(dtype: torch.dtype) -> None:
    own_formulas = {"PyramidCache", "H2OCache", "StreamingLLMCache", "ShadowKVCache", "KIVICache", *SHARE_A_BUDGET}
    own_formulas |= {"MiniCache", "KVSharerCache", "VLCache"}
    # The bytes of a number count in all formulas alike: one cache has them in float32, too.
    names = ["RKVCache"] if dtype == torch.float32 else sorted(set(CACHE_NAMES) - own_formulas)
    model = build_model("llama").to(dtype)
    for name in names:
        more = {"use_covariance": True} if name == "ExpectedAttentionCache" else {}
        shared = name in ("ExpectedAttentionCache", "MassiveActivationCache")
        formula = {"slots": BUDGET, "eviction_interval": INTERVAL, **more}
        cache = check_memory(name, model, formula=formula, shared=shared, budget=BUDGET, eviction_interval=INTERVAL)
        start, held = cache.nbytes, []
        for _ in range(2 * INTERVAL):
            read(model, cache, 1, prompt_length=0)
            held.append(cache.nbytes)
        formula["slots"] += INTERVAL
        numbers = memory_formula(name, **numbers_of(model), **formula)
        largest = int(numbers["nbytes"])
        assert 0 <= max(held) - largest <= shared * MAX_SHARED_BYTES, name
        cache.compress()
        assert cache.nbytes == start, name


def test_memory_of_kivi() -> None:
    model = build_model("llama", hidden_size=64, head_dim=32)
    for nbits, residual_length in ((4, 128), (2, 40)):
        formula = {"tokens": PROMPT_LENGTH, "n": (PROMPT_LENGTH - residual_length) // 32 * 32, "nbits": nbits}
        settings = {"nbits": nbits, "residual_length": residual_length}
        check_memory("KIVICache", model, formula=formula | {"group_size": 32}, **settings)


def test_memory_of_layers_that_share() -> None:
    model = build_model("llama", num_hidden_layers=5)
    for start, num_pairs, outliers in ((None, 1, 0.05), (1, 2, 0.2)):
        formula = {"tokens": PROMPT_LENGTH, "n": 200, "pairs": num_pairs, "outliers": outliers}
        settings = {"start_layer": start, "outliers": outliers, "residual_length": 40}
        check_memory("MiniCache", model, formula=formula, **settings)
    for sharing in ({3: 1}, {3: 1, 2: 1, 4: 0}):
        formula = {"tokens": PROMPT_LENGTH, "shared": len(sharing)}
        check_memory("KVSharerCache", model, formula=formula, sharing=sharing)


def test_memory_of_other_caches_and_settings() -> None:
    model, slots = build_model("llama"), {"slots": BUDGET}
    formula = slots | {"use_covariance": False}
    check_memory("ExpectedAttentionCache", model, budget=BUDGET, use_covariance=False, formula=formula, shared=True)
    half, formula = build_model("llama").to(torch.bfloat16), {"budget": BUDGET}
    for steps in (0, 40):
        check_memory("H2OCache", half, budget=BUDGET, formula=formula, steps=steps)
    for name, settings in SHARE_A_BUDGET.items():
        cache = getattr(pyramid_cache, name)(half, BUDGET, eviction_interval=INTERVAL, **settings)
        read(half, cache)
        slots = sum(sum(layer.num_held_per_row) for layer in cache.layers) / (BATCH * len(cache.layers))
        assert BUDGET - 1 < slots <= BUDGET
        numbers = memory_formula(name, **numbers_of(half), slots=slots)
        assert cache.nbytes == pytest.approx(numbers["nbytes"]), name
    cache = pyramid_cache.VLCache(half.config, BUDGET)
    read(half, cache)
    slots = sum(cache.num_kept_tokens()) / len(cache.layers)
    assert cache.nbytes == pytest.approx(memory_formula("VLCache", **numbers_of(half), slots=slots)["nbytes"])
    for sinks, steps in ((4, 0), (0, 0), (4, 40), (0, 40)):
        sizes = {"budget": BUDGET, "num_sink_tokens": sinks}
        check_memory("StreamingLLMCache", model, **sizes, steps=steps, formula=sizes, shared=True)
    for source, budget, share in ((model, 0.4, 0.4 * PROMPT_LENGTH), (model.config, BUDGET, BUDGET)):
        formula = {"kept_tokens": int(share * model.config.num_hidden_layers)}
        cache = check_memory("PyramidCache", model, source, budget=budget, formula=formula)
        assert sum(cache.num_kept_tokens()) == formula["kept_tokens"]
        read(model, cache, 2 * INTERVAL, prompt_length=0)
        longest = formula["kept_tokens"] + cache.layers[0].eviction_interval * model.config.num_hidden_layers
        assert sum(cache.num_kept_tokens()) <= longest
        numbers = memory_formula("PyramidCache", **numbers_of(model), kept_tokens=longest)
        assert cache.nbytes <= numbers["nbytes"]


def test_memory_of_shadow_kv() -> None:
    sizes = {"budget": 19, "rank": 6, "chunk_size": 4, "num_outlier_chunks": 3, "num_spread_bands": 3}
    sizes |= {"num_local_tokens": 9, "offload_interval": 8}
    for quantize, dtype in ((None, torch.bfloat16), ("int8", torch.float32), ("fp8", torch.bfloat16)):
        model = build_model("llama").to(dtype)
        settings = sizes | {"quantize": quantize}
        cache = pyramid_cache.ShadowKVCache(model.config, **settings)
        read(model, cache)
        stored = dtype.itemsize if quantize is None else 1
        numbers = memory_formula("ShadowKVCache", **numbers_of(model), **settings, tokens=PROMPT_LENGTH, stored=stored)
        assert sum(cache.memory()["host"].values()) == numbers["host_nbytes"]
        rest = cache.nbytes - numbers["device_nbytes"] - numbers["host_nbytes"]
        assert 0 <= rest <= min(MAX_SHARED_BYTES, numbers["device_nbytes"] / 50)


def answers() -> dict[tuple[str, str], list[float]]:
    """
    Exact answers in docs/quality.md by task ("needles-8-1024, question first") and label: at 0.5, 0.25 and 0.1.
    `DynamicCache` has one number.
    """
    part = section_of(QUALITY.read_text(), "All caches")
    found: dict[tuple[str, str], list[float]] = {}
    for section in part.split("\n### ")[1:]:
        task = section.partition("\n")[0]
        if not task.endswith((" context first", " question first")):
            continue
        [full] = re.findall(r"^DynamicCache: ([\d.]+) /", section, re.MULTILINE)
        found[task, "DynamicCache"] = [float(full)]
        title, *rows = table_rows(section)
        assert title == ["cache", *BUDGETS]
        for label, *cells in rows:
            found[task, label] = [float(cell.partition(" / ")[0]) for cell in cells]
    return found


def with_results(page: str) -> str:
    """A page whose results are exact answers of some rows of docs/quality.md."""
    found = answers()

    def table(match: re.Match[str]) -> str:
        lines = ["| task | cache | full cache | 0.5 | 0.25 | 0.1 |", "|---|---|---|---|---|---|"]
        for task, label in itertools.product(dict.fromkeys(task for task, _ in found), match[1].split("; ")):
            if (task, label) not in found:  # a cache that reads prompts twice is not measured in all
                continue
            numbers = [*found[task, "DynamicCache"], *found[task, label]]
            lines.append(f"| {task} | {label} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
        return "\n".join([f"<!-- results: {match[1]} -->", "", *lines, "", "<!-- end of results -->"])

    return re.sub(r"<!-- results: (.*?) -->\n.*?<!-- end of results -->", table, page, flags=re.DOTALL)


def test_results_are_those_of_the_table() -> None:
    for name, page in PAGES.items():
        text = page.read_text()
        labels = [label for row in re.findall(r"<!-- results: (.*) -->", text) for label in row.split("; ")]
        own = {label for _, label in answers() if re.split(r"[(,]", label)[0] == name}
        assert set(labels) == own, name
        assert with_results(text) == text, f"{page} is not what docs/quality.md has. Run `{COMMAND}`."


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
            known = {*words.split(), "FOLDER", "--out", "--threads"}
            assert set(re.findall(r"`([^`]*)`", command)[0].split()) <= known
        if "machine" in record:
            processor = record["machine"]["accelerator"] or record["machine"]["processor"]
            assert re.sub(r"\(R\)| Processor", "", processor).strip() in machine
            assert record["versions"]["torch"].partition("+")[0] in machine
            assert record["versions"]["transformers"] in machine


def test_the_design_names_folders_files_and_caches_that_are_there() -> None:
    text = (DOCS / "design.md").read_text()
    folders = re.findall(r"(\w+)/ ", re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0])
    assert set(folders) == {path.parent.name for path in (ROOT / "pyramid_cache").glob("*/__init__.py")}
    for name in re.findall(r"`((?:caches|engine|ops|tests)/[\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "pyramid_cache" / name).exists(), name
    own = [name for name in CACHE_NAMES if not issubclass(getattr(pyramid_cache, name), pyramid_cache.PolicyCache)]
    assert re.findall(r"^- `(\w+)` is no policy", section_of(text, "Policies"), re.MULTILINE) == own


def calls_of_first_layer(
    model: PreTrainedModel, cache: CompressedCache, ids: torch.Tensor, before: Callable | None = None
) -> list[str]:
    """The calls of functions of the library in a forward pass, as `file:function`, up to the second layer."""
    calls: list[str] = []
    folder = f"{Path(pyramid_cache.__file__).parent}/"

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls.append(f"{frame.f_code.co_filename.removeprefix(folder)}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        if before is not None:
            before()
        model(ids, past_key_values=cache)
    finally:
        sys.setprofile(None)
    layers = [place for place, call in enumerate(calls) if call == "engine/cache.py:update"]
    return calls[: layers[1]]


@torch.no_grad()
def test_a_token_travels_as_the_page_says() -> None:
    text = (DOCS / "token.md").read_text()
    functions = {
        f"{path.relative_to(ROOT / 'pyramid_cache')}:{node.name}"
        for path in (ROOT / "pyramid_cache").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = r"`([\w/]+\.py:\w+)`"
    assert [name for name in re.findall(named, text) if name not in functions] == []
    model = build_model("llama", num_hidden_layers=2)
    cache = pyramid_cache.SnapKVCache(model.config, budget=16, window_size=8, eviction_interval=2)
    lengths = {"A prompt": 40, "The first decode step": 1, "The steps that follow": 1}
    calls = {title: calls_of_first_layer(model, cache, random_tokens(1, length)) for title, length in lengths.items()}
    assert cache.num_kept_tokens() == [16, 16]
    cache.step()
    model(random_tokens(1, 1), past_key_values=cache)
    calls["A compiled step"] = calls_of_first_layer(model, cache, random_tokens(1, 1), cache.step)
    for title, made in calls.items():
        names, rest = re.findall(named, section_of(text, title)), iter(made)
        missed = [name for name in names if name not in made]
        assert missed == []
        assert [name for name in names if name not in rest] == [], title  # in this order


def description_of(picture: Path) -> dict[str, Any]:
    """What the script wrote into the metadata of a picture."""
    image = pytest.importorskip("PIL.Image").open(picture)
    image.load()  # a broken file raises
    return json.loads(image.text["Description"])


def drawing() -> Any:
    """The script that draws the pictures, as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_caches", ROOT / "examples" / "draw_caches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_has_the_picture_that_its_script_draws(tmp_path: Path) -> None:
    draw, model = drawing(), build_model("llama")
    tiny_tokenizer().save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    assert set(draw.SETTINGS) == set(PAGES)
    for name, page in PAGES.items():
        picture = page.with_name(draw.file_name(name))
        assert picture == page.with_suffix(".png")
        assert re.findall(r"!\[.*\]\((.*)\)", page.read_text()) == [picture.name]
        assert picture.stat().st_size < MAX_PICTURE_BYTES
        description = description_of(picture)
        assert description["call"] == draw.call_of(name)
        assert (description["prompt_tokens"], description["new_tokens"]) == (draw.PROMPT_TOKENS, draw.NEW_TOKENS)
        assert len(description["held"]) == 30
        draw.build(name, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PyramidCache", "TOVACache", "ShadowKVCache"])
def test_pictures_show_what_caches_hold(name: str, tmp_path: Path) -> None:
    """With the real model: each layer holds as many tokens as when the picture was drawn."""
    draw = drawing()
    draw.main(["--out", str(tmp_path), "--caches", name])
    drawn, shown = (description_of(folder / draw.file_name(name)) for folder in (tmp_path, DOCS / "caches"))
    assert drawn["held"] == shown["held"]


# What a table is of: the record behind a marker in the page.
MARKED = re.compile(r"<!-- times: (\S+) -->\n.*?<!-- end of times -->", re.DOTALL)


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `bench caches`, or of examples/bench_kvpress.py under the same names."""
    if "kvpress" not in record["versions"]:
        return [row | {"label": row["label"].replace(", dense", "")} for row in record["rows"]]
    names = {"label": "press", "prefill_ratio": "prefill_seconds_ratio"}
    return [
        row | {name: row[key] for name, key in names.items()} | {"tokens_ratio": 1 / row["step_seconds_ratio"]}
        for row in record["rows"]
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per cache: at each length the time of one row's prompt, tokens/s by rows and bytes of one row."""
    lengths, batch_sizes = (sorted({row[name] for row in rows}) for name in ("length", "batch_size"))
    tokens = f"tokens/s, {' / '.join(map(str, batch_sizes))} row{'s' * (batch_sizes[-1] > 1)}"
    titles = [title for length in lengths for title in (f"{length:,}: read", tokens, "bytes")]
    lines = [f"| cache | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    found = {(row["label"], row["length"], row["batch_size"]): row for row in rows}
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for length in lengths:
            own = [found[label, length, batch_size] for batch_size in batch_sizes]
            rates = " / ".join(f"{row['tokens_ratio']:.2f}" for row in own)
            cells += [f"{own[0]['prefill_ratio']:.2f}", rates, f"{own[0]['bytes_ratio']:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_times(page: str) -> str:
    """A page whose tables are those of the records."""

    def marked(match: re.Match[str]) -> str:
        record = json.loads((DOCS / "results" / match[1]).read_text())
        return f"<!-- times: {match[1]} -->\n\n{table(rows_of(record))}\n\n<!-- end of times -->"

    return MARKED.sub(marked, page)


def with_counts(page: str) -> str:
    """
    A page whose counts are those of `bench host`. Each record that the marker names gets a column for each count, with
    the last word of the file's name in its title.
    """

    def marked(match: re.Match[str]) -> str:
        columns: dict[str, list[str]] = {"cache": []}
        labels = []
        paths = [DOCS / "results" / name for name in match[1].split()]
        for name, path in itertools.product(COUNTS, paths):
            rows, digits = json.loads(path.read_text())["rows"], 2 if name == "waits" else 1
            labels.append([row["label"].partition(",")[0] for row in rows])
            more = [f"{row[f'more_{name}']:+.{digits}f}" for row in rows[1:]]
            columns[f"{name}, {path.stem.rpartition('-')[2]}"] = [f"{rows[0][name]:.{digits}f}", *more]
        assert all(each == labels[0] for each in labels)
        columns["cache"] = labels[0]
        lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"<!-- counts: {match[1]} -->\n\n{text}\n\n<!-- end of counts -->"

    return re.sub(r"<!-- counts: (.*?) -->\n.*?<!-- end of counts -->", marked, page, flags=re.DOTALL)


def with_answers(page: str) -> str:
    """
    A page with tables of records of `eval`. A marker names a score, a protocol and records; a line has a cache, a cell
    what it scored in a task at each budget.
    """

    def marked(match: re.Match[str]) -> str:
        score, protocol, *names = match[1].split()
        records = [json.loads((DOCS / "results" / name).read_text()) for name in names]
        rows = [row for record in records for row in record["rows"] if row["protocol"] == protocol]
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        found = {(row["label"], row["task"], row["budget"]): f"{row[score]:.2f}" for row in rows}
        budgets = sorted({budget for _, _, budget in found if budget < 1}, reverse=True)
        lines = [f"| cache | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [1.0] if (label, tasks[0], 1.0) in found else budgets
            cells = [[found[label, task, each] for each in own if (label, task, each) in found] for task in tasks]
            lines.append(f"| {label} | {' | '.join(' / '.join(numbers) or '–' for numbers in cells)} |")
        text = "\n".join(lines)
        return f"<!-- answers: {match[1]} -->\n\n{text}\n\n<!-- end of answers -->"

    return re.sub(r"<!-- answers: (.*?) -->\n.*?<!-- end of answers -->", marked, page, flags=re.DOTALL)


def test_tables_are_those_of_the_records() -> None:
    page, quality = SPEED.read_text(), QUALITY.read_text()
    assert (len(MARKED.findall(page)), page.count("<!-- counts: "), quality.count("<!-- answers: ")) == (3, 1, 6)
    assert with_counts(with_times(page)) == page, f"{SPEED.name} is not what the records have. Run `{COMMAND}`."
    assert with_answers(quality) == quality, f"{QUALITY.name} is not what the records have. Run `{COMMAND}`."


if __name__ == "__main__":
    rewrite([*PAGES.values(), SPEED, QUALITY], lambda text: with_answers(with_counts(with_times(with_results(text)))))
