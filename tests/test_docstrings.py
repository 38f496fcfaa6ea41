"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import pyramid_cache


PACKAGE = Path(pyramid_cache.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("pyramid_cache.serving."):  # for newer versions of transformers than the oldest ones
        pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("name", [name for name in pyramid_cache.__all__ if name not in ("Policy", "ReplayTexts")])
def test_every_cache_has_an_example_that_prints(name: str) -> None:
    """In the docstring of the class, in a few lines, on a model that is made from a config."""
    examples = doctest.DocTestParser().get_examples(getattr(pyramid_cache, name).__doc__)
    assert sum(example.source.count("\n") for example in examples) < 15
    assert any(example.want for example in examples)
    source = "".join(example.source for example in examples)
    assert f"{name}(" in source and "LlamaConfig(" in source and "from_pretrained" not in source
