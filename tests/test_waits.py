"""Decode steps do not wait for the device: they ask tensors for no numbers, and bring it none by plain copies."""

import sys
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import CacheCase, every_cache
from models import random_tokens, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedModel

import pyramid_cache
from pyramid_cache.engine import checks
from pyramid_cache.ops import transfer
from pyramid_cache.ops.transfer import numbers_on


NUM_STEPS = 40
aten = torch.ops.aten
# What makes the host wait for numbers of a CUDA device; indexing with a mask is looked for beside them.
ASKING = (
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)


class AskedNumbers(TorchDispatchMode):
    """Counts the operations whose result, or its size, is known to the device alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        has_mask = function in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        kwargs = kwargs or {}
        has_unknown_size = function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        self.count += has_mask or has_unknown_size or function in ASKING
        return function(*args, **kwargs)


class PlainCopies(TorchFunctionMode):
    """
    Refuses tensors that are made of numbers of the host, in the package wherever they are put, and lists as indices;
    counts lists of the device's numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        is_copy = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        caller = Path(sys._getframe(1).f_code.co_filename)  # the package, the model, or `numbers_on`
        is_ours = caller.is_relative_to(Path(pyramid_cache.__file__).parent)
        is_copy = is_copy and caller != Path(transfer.__file__) and (kwargs.get("device") is not None or is_ours)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            is_copy = any(isinstance(part, list) for part in index)
        assert not is_copy, "use pyramid_cache.ops.transfer.numbers_on"
        self.count += function is torch.Tensor.tolist
        return function(*args, **kwargs)


def count_asked(model: PreTrainedModel, cache: Cache) -> int:
    """What a model asks for in 40 steps behind a prompt of 20."""
    tokens = random_tokens(3, 60)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        with AskedNumbers() as asked, PlainCopies() as copies:
            for step in range(20, 20 + NUM_STEPS):
                position_ids = torch.arange(step, step + 1).expand(3, 1)
                model(tokens[:, step : step + 1], position_ids=position_ids, past_key_values=cache)
    return asked.count + copies.count


@remember
def asked_by_dynamic_cache() -> int:
    return count_asked(tiny_model("llama"), DynamicCache(config=tiny_model("llama").config))


@every_cache
def test_steps_ask_for_no_more_than_with_a_dynamic_cache(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    # Position ids are looked at on the CPU alone, where it costs nothing.
    monkeypatch.setattr(checks, "check_position_ids", lambda *arguments: None)
    model = tiny_model("llama")
    assert count_asked(model, case.build(model)) <= asked_by_dynamic_cache() + case.most_waits(3, NUM_STEPS)


def test_questions_and_copies_are_seen() -> None:
    tensor = torch.arange(3)
    for ask in (
        *(tensor.tolist, tensor.nonzero, tensor.unique, tensor.any().__bool__),
        *(lambda: tensor[tensor > 0], lambda: torch.equal(tensor, tensor), lambda: tensor.repeat_interleave(tensor)),
    ):
        with AskedNumbers() as asked, PlainCopies() as copies:
            ask()
        assert asked.count + copies.count
    in_the_package = compile("torch.tensor([1, 2]).to('cpu')", str(Path(pyramid_cache.__file__)), "eval")
    for copy in (
        *(lambda: torch.tensor([1, 2], device="cpu"), lambda: eval(in_the_package, {"torch": torch})),
        *(lambda: tensor[[0, 2]], lambda: tensor.__setitem__([0, 2], 1)),
    ):
        with PlainCopies(), pytest.raises(AssertionError, match="numbers_on"):
            copy()
    with PlainCopies() as copies:
        assert numbers_on(tensor.device, [1, 2], torch.int32).tolist() == [1, 2]
    assert copies.count == 1
