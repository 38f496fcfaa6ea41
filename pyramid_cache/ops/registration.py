"""
Where the package's ops meet `torch.library`: `torch.ops.pyramid_cache.*`.

`Library.define` and `impl` are used rather than `torch.library.custom_op`, which costs twice as much for every call of
an op that is called once per layer and token. The ops are for inference: the public functions take another way where
gradients are asked for, and an op that is called directly refuses.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


# What the kernels of attention take.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def register(schema: str, *, cpu: Callable, cuda: Callable, fake: Callable) -> Callable:
    """
    Defines an op and gives it its kernels.

    Args:
        schema (`str`): As `torch.library` takes it, without the namespace: `"name(Tensor a, ...) -> Tensor"`.
        cpu, cuda (`Callable`): What computes it on these devices. CUDA is asked whenever one of the tensors is there.
        fake (`Callable`): What gives empty tensors of the right shapes, for compilers.

    Returns:
        `Callable`: The op.
    """
    # Of each op, kept where it outlives this module: notebooks import modules anew, and an op is defined only once.
    libraries = vars(torch.ops.pyramid_cache).setdefault("libraries", {})
    name = schema.partition("(")[0]
    if name in libraries:
        libraries.pop(name)._destroy()
    library = libraries[name] = torch.library.Library("pyramid_cache", "FRAGMENT")
    library.define(schema)
    library.impl(name, as_given(name, cpu, "cpu"), "CPU")
    library.impl(name, as_given(name, cuda, "cuda"), "CUDA")
    torch.library.register_fake(f"pyramid_cache::{name}", fake, lib=library)
    return getattr(torch.ops.pyramid_cache, name).default


def needs_gradients(*arguments: Any) -> bool:
    """Whether autograd would record what is computed from these."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
    )


def as_given(name: str, kernel: Callable, device_type: str) -> Callable:
    """
    The kernel, computing with the precision of its arguments, and refusing what it could not pass gradients through.
    """

    def run(*arguments):
        if needs_gradients(*arguments):
            raise NotImplementedError(
                f"`torch.ops.pyramid_cache.{name}` has no gradient. Call it under `torch.no_grad()`; the functions "
                "of `pyramid_cache.ops` that decode are differentiable."
            )
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return kernel(*arguments)
        return kernel(*arguments)

    return run


def kernels(module: str, *states: torch.Tensor) -> ModuleType | None:
    """The Triton kernels in a module of the package, if they take such queries, keys and values."""
    dtype = states[0].dtype
    fits = all(state.dtype == dtype and state.shape[-1] <= MAX_HEAD_DIM and state.numel() > 0 for state in states)
    return kernels_of(module, states[0].device) if fits and dtype in KERNEL_DTYPES else None


@functools.cache
def kernels_of(module: str, device: torch.device) -> ModuleType | None:
    """
    The Triton kernels in a module of the package, imported when they are first asked for. None where there is no
    Triton, as on Windows, and for GPUs older than NVIDIA's of 2020, whose shared memory is too small for the blocks.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        return importlib.import_module(f"pyramid_cache.ops.{module}")
    except ImportError:
        return None


def check_shape(name: str, tensor: torch.Tensor | None, *shape: int | None, or_one: int | None = None) -> None:
    """
    Raises ValueError unless a tensor that is given has this shape; None stands for any size. The dimension `or_one`
    may have the size 1 as well.
    """
    if tensor is None:
        return
    fits = tensor.ndim == len(shape)  # a loop, since a generator would be half of a step's calls
    for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=False)):
        fits = fits and (wanted is None or size == wanted or (size == 1 and dim == or_one))
    if not fits:
        sizes = ["any" if size is None else str(size) for size in shape]
        if or_one is not None:
            sizes[or_one] += " or 1"
        raise ValueError(f"`{name}` must have the shape ({', '.join(sizes)}), but has {tuple(tensor.shape)}.")


def check_dtype(name: str, tensor: torch.Tensor | None, *dtypes: torch.dtype) -> None:
    """Raises ValueError unless a tensor that is given has one of these dtypes."""
    if tensor is not None and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"`{name}` must be {wanted}, but is {tensor.dtype}. Convert it with `.to({dtypes[0]})`.")


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises unless the query heads can share the KV heads evenly."""
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads: that is no whole number each.")


def check_latest(key: torch.Tensor) -> None:
    """Raises unless there is a token behind those that are packed or quantised."""
    if not key.shape[2]:
        raise ValueError("`key` holds no token. Give at least the token of the query.")


def check_query(query: torch.Tensor, key: torch.Tensor, *, name: str = "key", rows: int | None = None) -> None:
    """Raises unless a query `(batch, heads, rows, head_dim)` can ask keys `(batch, kv_heads, keys, head_dim)`."""
    check_shape("query", query, None, None, rows, None)
    batch, heads, _, head_dim = query.shape
    check_shape(name, key, batch, None, None, head_dim)
    check_heads(heads, key.shape[1])
