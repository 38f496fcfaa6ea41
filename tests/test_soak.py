"""Long streams: every step of a bounded cache is compared with the lists of test_properties.py.

At checkpoints neither the cache nor the process may hold more than before.
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from caches import CACHE_CASES, CacheCase, parameters_of, parametrize_cases
from models import build_model, left_pad, random_rows
from test_properties import Run, Setup
from transformers import LogitsProcessor


@torch.no_grad()
def soak(case: CacheCase, lengths: tuple[int, ...], checkpoints: list[int]) -> list[tuple[int, int, int]]:
    """
    Feeds tokens one by one to a tight cache until the last checkpoint. Attention is compared at every step, and the
    tokens held at each fifth. Returns for each checkpoint the bytes of the cache, the living tensors and the bytes of
    the process.
    """
    arguments = parameters_of(case.cache_class).values()
    defaults = {one.name: one.default for one in arguments if one.default is not one.empty}
    setup = Setup(
        case.cache_class,
        defaults | case.tight,
        num_layers=2,
        kv_heads=2,
        group=2,
        batch_size=len(lengths),
        padding=tuple(max(lengths) - length for length in lengths),
    )
    run, measured = Run(setup), []
    run.update(max(lengths))
    for step in range(1, checkpoints[-1] + 1):
        run.update(1)
        if step % 5 == 0:
            run.check()
        if step in checkpoints:
            measured.append((run.cache.nbytes, count_tensors(), resident_bytes()))
    return measured


def count_tensors() -> int:
    """Living tensors of the whole process."""
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def resident_bytes() -> int:
    """Memory of the process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def check_flat(measured: list[tuple[int, int, int]], spread: float = 0.0) -> None:
    """Nothing has grown between the first checkpoint and the last, but for a share of the bytes."""
    held_bytes, num_tensors, resident = zip(*measured, strict=True)
    assert 0 < max(held_bytes) <= (1 + spread) * min(held_bytes)
    assert max(num_tensors) == num_tensors[0]  # of all tests that run in this process, so that there may be fewer
    assert resident[-1] - resident[0] <= 8 << 20


@parametrize_cases(case for case in CACHE_CASES if case.is_bounded and not case.has_own_reference)
@pytest.mark.parametrize("num_steps", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_long_streams(case: CacheCase, num_steps: int) -> None:
    """A padded batch, in which one row is longer than the budget and one fills it while generating."""
    check_flat(soak(case, (23, 9), [num_steps // 5, num_steps // 2, num_steps]))


@parametrize_cases(case for case in CACHE_CASES if case.is_bounded)
def test_generate_leaves_nothing_behind(case: CacheCase) -> None:
    """But for the tokens and the mask that it keeps itself."""
    model = build_model("llama", num_hidden_layers=2)
    cache, measured = case.build(model), []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] in (33, 57, 81):  # as far from an eviction each, whatever the interval of the table
                measured.append((cache.nbytes, count_tensors(), resident_bytes()))
            return scores

    input_ids, mask = left_pad(random_rows((23, 9), seed=29))
    settings = {"max_new_tokens": 60, "do_sample": True, "logits_processor": [Watch()]}
    model.generate(input_ids, attention_mask=mask, past_key_values=cache, **settings)
    assert cache.get_seq_length() == 82 and len(measured) == 3
    # How many of the tokens that a head keeps are older ones, which take less, is left to their scores.
    check_flat(measured, spread=0.05 if case.quantizes else 0.0)
