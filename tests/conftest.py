"""
Settings shared by every test: one thread and fixed seeds, so that float32 results repeat bit for bit; and two tiers.

The quick tier is what `-m` selects by default. What `-m` cannot select is not generated: parameters with the mark
`slow`, and all but one combination of the parameters of a test with a mark that `-m` excludes.

The environment variable PYRAMID_EXAMPLES says how many examples hypothesis tries in each test, instead of those of
the tier.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
import torch
from hypothesis import settings


QUICK_EXAMPLES, SLOW_EXAMPLES = 50, 150


@cache
def may_select(expression: str, marks: frozenset[str]) -> bool:
    """Whether `-m expression` selects some tests that have these marks, with or without other ones."""
    return any(
        eval(expression or "True", {}, defaultdict(bool, dict.fromkeys(marks | others, True)))
        for others in (set(), {"slow"}, {"cuda"}, {"slow", "cuda"})
    )


def pytest_configure(config: pytest.Config) -> None:
    """Chooses how many examples hypothesis tries."""
    num_examples = SLOW_EXAMPLES if may_select(config.option.markexpr, frozenset(["slow"])) else QUICK_EXAMPLES
    num_examples = int(os.environ.get("PYRAMID_EXAMPLES", num_examples))
    settings.register_profile("tier", max_examples=num_examples, derandomize=True, database=None, deadline=None)
    settings.load_profile("tier")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leaves out parameters that `-m` cannot select: collecting them can take longer than running the others."""
    expression, definition = metafunc.config.option.markexpr, metafunc.definition
    is_selected = may_select(expression, frozenset(mark.name for mark in definition.iter_markers()))

    for place, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[0], list(mark.args[1])
        marks = [frozenset(one.name for one in getattr(parameters, "marks", ())) for parameters in values]
        kept = [index for index in range(len(values)) if may_select(expression, marks[index])]
        if not (kept and is_selected):  # One test stays that is not selected, so that its name is known.
            kept = (kept or list(range(len(values))))[:1]
        options = dict(mark.kwargs)
        if isinstance(options.get("ids"), Iterable):
            ids = list(options["ids"])
            options["ids"] = [ids[index] for index in kept]
        definition.own_markers[place] = pytest.mark.parametrize(
            names, [values[index] for index in kept], **options
        ).mark


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> Iterator[None]:
    """
    Run torch on one thread: the order of float32 sums must not depend on the machine's cores. Processes that tests
    start run on one, too: workers of pytest share the cores already.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
