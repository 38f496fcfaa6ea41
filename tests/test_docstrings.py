"""The examples in docstrings and docs run, and print what they say."""

import doctest
import re
from pathlib import Path

import pytest

from pyramid_cache.caches import h2o, pyramid, streaming_llm


@pytest.mark.parametrize("module", [h2o, pyramid, streaming_llm])
def test_examples(module) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


def test_example_of_the_ops() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ops.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
