"""
Where the tests of Triton kernels run: on a GPU, or with `TRITON_INTERPRET=1` on the CPU in Triton's interpreter, which
is what `test_interpreter.py` does. Importing it skips a module that can do neither. Shapes are small, because the
interpreter is slow, and cross the borders of blocks all the same.
"""

import os
from typing import Any

import pytest
import torch


pytest.importorskip("triton", reason="there is no Triton to run kernels with")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

MARKS = [
    pytest.mark.cuda,
    # NumPy minds what GPUs do not: infinities and NaN, which the kernels choose away after they have come up.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
needs_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: too much for the interpreter, or wrong there")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def on_gpu(*values: Any) -> Any:
    """A case for a GPU alone. The interpreter multiplies the bits of bfloat16 as if they were integers."""
    return pytest.param(*values, marks=needs_gpu)


def far_apart(*shape: int, stride: int) -> torch.Tensor:
    """`(..., tokens, width)` float16 whose tokens begin `stride` elements apart. Only what is used is touched."""
    try:
        storage = torch.empty(shape[-2] * stride, dtype=F16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"needs a GPU: there is no room for so many addresses ({error})")
    return storage.as_strided(shape, (*[0] * (len(shape) - 2), stride, 1)).copy_(torch.randn(shape))


def assert_near(found: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor | None, rtol: float = 3e-6) -> None:
    """
    Raises unless a kernel is as near to the truth as its dtype allows: float32 up to the order of its sums, and less
    exact types also up to twice the error of plain PyTorch, which is `eager`.
    """
    limit = rtol * max(exact.abs().max().item(), 1.0) if exact.numel() else 0.0
    if eager is not None:
        limit += 2 * (eager.double() - exact).abs().max().item()
    assert found.shape == exact.shape
    assert not exact.numel() or (found.double() - exact).abs().max().item() <= limit
