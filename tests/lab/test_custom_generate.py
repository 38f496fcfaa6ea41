"""examples/custom_generate: caches by name, through the `custom_generate` of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model
from modes import tiny_tokenizer
from pages import DOCS, EXAMPLES, ROOT, run_page
from transformers import DynamicCache, dynamic_module_utils

from pyramid_cache import KVSharerCache, ReplayTexts, SnapKVCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.replay import ReplayingCache
from pyramid_cache.lab.registry import CACHES, Workload


PROMPT = random_tokens(1, 100, seed=9)
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
CUSTOM = {**PLAIN, "custom_generate": str(EXAMPLES / "custom_generate"), "trust_remote_code": True}


@pytest.fixture(autouse=True)
def no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code into a folder of its own, and runs it there."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def assert_same(output: Any, expected: Any) -> None:
    """The same tokens, with caches that are alike."""
    built, cache = output[CACHE_ARGUMENT], expected[CACHE_ARGUMENT]
    assert torch.equal(output.sequences, expected.sequences)
    assert type(built) is type(cache) and built is not cache
    assert built.settings == cache.settings and built.num_kept_tokens() == cache.num_kept_tokens()


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_by_its_name(name: str) -> None:
    model, entry = tiny_model("llama"), CACHES[name]
    settings: dict[str, Any] = {"budget": 48} if entry.has_budget else {}
    if entry.cache_class is KVSharerCache:
        settings["sharing"] = {2: 0}
        cache = KVSharerCache(model, **settings)
    else:
        cache = entry.build(model, 48, Workload(PROMPT.shape[1], has_tokenizer=False))
    settings |= {"texts": ReplayTexts((), (), ())} if issubclass(entry.cache_class, ReplayingCache) else {}
    output = model.generate(PROMPT, cache=name, **settings, **CUSTOM)
    assert_same(output, model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, **PLAIN))


def test_the_name_of_a_class() -> None:
    model = tiny_model("llama")
    output, expected = (
        model.generate(PROMPT, cache=name, budget=48, **CUSTOM)
        for name in ("LayerDefensiveKVCache", "layer-defensive")
    )
    assert_same(output, expected)


def test_settings_and_what_plain_generate_reads() -> None:
    """Settings of the registry give way. A mask and a stop string are passed on, a revision is not."""
    model, mask = tiny_model("llama"), torch.ones(2, 50, dtype=torch.long)
    prompt = PROMPT.view(2, 50)
    mask[0, :9] = 0
    others = {"attention_mask": mask, "tokenizer": tiny_tokenizer(), "stop_strings": ["t007"], "num_beams": 2}
    settings = {"budget": 0.5, "window_size": 4, "merge": False, "protect": 3}
    output = model.generate(prompt, cache="snapkv-merge", revision="main", **settings, **others, **CUSTOM)
    cache = SnapKVCache(model.config, **settings)
    assert_same(output, model.generate(prompt, **{CACHE_ARGUMENT: cache}, **others, **PLAIN))


@pytest.mark.parametrize("given", [{}, {"cache": "snap"}, {"cache": DynamicCache()}, {"cache": ["snapkv"]}])
def test_wrong_names_are_refused_with_the_list(given: dict[str, Any]) -> None:
    cache = given.get("cache")
    shown = repr(cache) if isinstance(cache, str | None) else f"a {type(cache).__name__}"
    with pytest.raises(ValueError) as raised:
        tiny_model("llama").generate(PROMPT, **given, **CUSTOM)
    assert f"`cache` is {shown}, but must be one of {', '.join(CACHES)}, or the name of a class." in str(raised.value)


def test_a_cache_built_already_is_refused() -> None:
    """transformers 5.24 renames the argument if it stands alone, and drops it with a warning beside a name."""
    model, cache = tiny_model("llama"), DynamicCache()
    with pytest.raises(ValueError, match="leave `custom_generate` out"):
        model.generate(PROMPT, past_key_values=cache, **CUSTOM)
    both = {"past_key_values": cache, "cache": "snapkv", "budget": 48}
    if CACHE_ARGUMENT == "cache":
        with pytest.warns(FutureWarning, match="ignoring deprecated `past_key_values"):
            output = model.generate(PROMPT, **both, **CUSTOM)
        assert type(output.cache) is SnapKVCache
    else:
        with pytest.raises(ValueError, match="`past_key_values` is built here"):
            model.generate(PROMPT, **both, **CUSTOM)
    assert cache.get_seq_length() == 0


def test_what_neither_knows_is_refused() -> None:
    model, snapkv = tiny_model("llama"), {"cache": "snapkv", **CUSTOM}
    with pytest.raises(ValueError, match="window_sise"):
        model.generate(PROMPT, window_sise=4, **snapkv)
    with pytest.raises(ValueError, match="budget"):
        model.generate(PROMPT, budget=-1, **snapkv)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(PROMPT, **{**snapkv, "trust_remote_code": False})


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, inputs = tiny_model("llama"), {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    output = run_page(DOCS / "custom-generate.md", {"model": model, "inputs": inputs})["output"]
    cache = SnapKVCache(model.config, budget=0.25)
    assert torch.equal(output, model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, max_new_tokens=32))
