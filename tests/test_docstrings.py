"""The examples in docstrings and docs run, and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from pyramid_cache import caches


MODULES = [f"pyramid_cache.caches.{module.name}" for module in pkgutil.iter_modules(caches.__path__)]


@pytest.mark.parametrize(
    "name", [*MODULES, "pyramid_cache.engine.cache", "pyramid_cache.engine.policy_cache", "pyramid_cache.plot.scores"]
)
def test_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


def test_example_of_the_ops() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ops.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
