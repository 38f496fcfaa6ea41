"""The examples in the docstrings of the caches run and print what they say."""

import doctest

import pytest

from pyramid_cache.caches import h2o, pyramid, streaming_llm


@pytest.mark.parametrize("module", [h2o, pyramid, streaming_llm])
def test_examples(module) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
