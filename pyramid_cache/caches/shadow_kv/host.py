"""
Values that the device has no room for: in memory of the host that the device can read, or in a mapped file.

On CUDA, copies to and from the host run on a second stream beside the computation. On other devices everything runs in
order, and nothing has to wait.
"""

import contextlib
import copy
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pyramid_cache.engine.budget import parse_budget
from pyramid_cache.ops.shadow import gather_values_unchecked


DISK = "disk:"
# A tensor that grows while an answer is generated grows by this part of its size.
GROWTH = 16


@dataclass(frozen=True)
class HostPlace:
    """
    Attributes:
        folder (`str`, *optional*): The folder of the files that hold values. Without a folder they are in memory.
        budget (`int`, *optional*): Bytes that the values of all layers may take.
        num_layers (`int`): The number of layers. All take the same number of bytes.
    """

    folder: str | None = None
    budget: int | None = None
    num_layers: int = 1

    def bytes_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """How many bytes tensors of this size take for all layers."""
        return math.prod(shape) * dtype.itemsize * self.num_layers

    def has_room(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether the budget allows tensors of this size for all layers."""
        return self.budget is None or self.bytes_of(shape, dtype) <= self.budget

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """
        A tensor of zeros for values of a device. Its file has no name, and is gone with the tensor.

        Raises:
            ValueError: Tensors of this size for all layers take more than the budget.
            OSError: There is no room for the file.
        """
        numel = math.prod(shape)
        if not self.has_room(shape, dtype):
            needed = self.bytes_of(shape, dtype)
            rows, _, tokens, _ = shape
            other = "" if self.folder is not None else f", or `host='{DISK}PATH'` with a budget for the disk"
            raise ValueError(
                f"Values of {rows} rows of {tokens:,} tokens take {needed:,} bytes on the host in {self.num_layers} "
                f"layers, more than `host_budget={self.budget:,}`. Raise it, give fewer or shorter rows{other}."
            )
        if self.folder is None or not numel:
            return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda" and numel > 0)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="pyramid_cache-") as file:
            # The whole file at once: a full disk raises an error here, and sends no signal later.
            os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype, device="cpu").view(shape)


def read_host(host: str, host_budget: int | str | None) -> HostPlace:
    """
    The place for values that a user's arguments name.

    Raises:
        ValueError: The place is neither "memory" nor "disk:" with an existing folder that takes files, or the budget
            is no number of bytes.
    """
    folder = None
    if host != "memory":
        is_folder = isinstance(host, str) and host.startswith(DISK)
        folder = os.path.expanduser(host.removeprefix(DISK)) if is_folder else None
        if folder is None or not os.path.isdir(folder):
            raise ValueError(f"`host={host!r}` must be 'memory', or '{DISK}' and a folder that exists.")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"`host={host!r}`: no file can be made there ({error.strerror}). Give another folder."
            ) from error
    amount: Any = host_budget
    if isinstance(host_budget, str):
        with contextlib.suppress(ValueError):  # refused below, by its own name
            amount = parse_budget(host_budget).amount
    if host_budget is not None and (isinstance(amount, bool) or not isinstance(amount, int) or amount < 1):
        raise ValueError(f"`host_budget={host_budget!r}` must be a number of bytes, such as 2**34 or '16GiB'.")
    return HostPlace(folder, amount)


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each CUDA device."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(device: torch.device, *read: torch.Tensor) -> Iterator[None]:
    """
    Kernels that are launched inside run after all earlier ones, and beside the later ones up to `join`. `read` are
    tensors that may be freed before that.
    """
    if device.type != "cuda":
        yield
        return
    stream = second_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    for tensor in read:
        tensor.record_stream(stream)


def join(device: torch.device) -> None:
    """Kernels that are launched from here on run after those launched `beside`. The host does not wait."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(second_stream(device))


def wait_for_host(device: torch.device) -> None:
    """Waits until all copies to and from the host are done, so that the host can read and move the values."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
        second_stream(device).synchronize()


class PinnedBytes:
    """Pinned memory of the host as CUDA sees it, at the address that both share. `torch.as_tensor` takes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        data = tensor.data_ptr(), False
        self.tensor = tensor  # lives as long as what is made of this
        self.__cuda_array_interface__ = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": data, "version": 3}


class HostValues:
    """
    The values of a layer, `tensor` `(batch, kv_heads, tokens, value_dim)`, none at first.

    Args:
        place (`HostPlace`): Where they are.
        value (`torch.Tensor`): `(batch, kv_heads, any, value_dim)`. It gives sizes, dtype and device.
    """

    def __init__(self, place: HostPlace, value: torch.Tensor) -> None:
        self.place, self.device, self.dtype = place, value.device, value.dtype
        self.tensor = self._zeros((*value.shape[:2], 0, value.shape[3]))
        # The values for a graph, once there are steps of fixed shapes.
        self.seen: torch.Tensor | None = None

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for values that the host copies: what the device has still to write or to read is done."""
        wait_for_host(self.device)
        return self.place.zeros(shape, self.dtype, self.device)

    def add(self, value: torch.Tensor, starts: list[int], counts: list[int]) -> None:
        """Copies the first `counts` new values of each row behind its first `starts`, while the device goes on."""
        with beside(self.device, value):
            self.tensor = extended(self.tensor, value, starts, counts, self._zeros)

    def load(self, buffer: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
        """`gather_values` into a buffer, which is ready after `join`."""
        if self.device.type == "cpu":
            gather_values_unchecked(buffer, self.tensor, incoming, chunk_size)
            return
        with beside(self.device):
            gather = gather_values_unchecked if self.tensor.is_pinned() else gather_through_host
            gather(buffer, self.tensor, incoming, chunk_size)

    def reserve(self, num_tokens: int) -> None:
        """Gets room for so many tokens in all."""
        self.tensor = with_room(self.tensor, num_tokens, self._zeros)
        self.show()

    def show(self) -> None:
        """
        Makes `seen` of the tensor, if it is another one: a tensor of the device, which reads pinned memory of the
        host. CUDA graphs take no tensors of the host. Where CUDA has pinned the memory for another device, `seen` is
        the tensor itself.
        """
        if self.seen is not None and self.seen.data_ptr() == self.tensor.data_ptr():
            return
        self.seen = self.tensor
        if self.device.type == "cuda" and self.tensor.is_pinned():
            seen = torch.as_tensor(PinnedBytes(self.tensor))
            if seen.device == self.device:
                self.seen = seen.view(self.dtype).view(self.tensor.shape)

    def on_host(self, num_tokens: int) -> torch.Tensor:
        """The first values themselves, all written."""
        wait_for_host(self.device)
        return self.tensor[:, :, :num_tokens]

    def on_device(self, num_tokens: int) -> torch.Tensor:
        """Copies of the first values."""
        join(self.device)
        return self.tensor[:, :, :num_tokens].to(self.device)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the rows at these indices `(rows,)`, in that order."""
        wait_for_host(self.device)  # of the indices, too
        if self.tensor.is_inference() or rows.tolist() != list(range(self.tensor.shape[0])):
            selected = self._zeros((rows.shape[0], *self.tensor.shape[1:]))
            self.tensor = torch.index_select(self.tensor, 0, rows.cpu(), out=selected)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostValues":
        memo[id(self)] = twin = copy.copy(self)
        # A plain copy of the tensor would be neither pinned nor in a file.
        twin.tensor = self._zeros(tuple(self.tensor.shape)).copy_(self.tensor)
        twin.seen = None
        return twin


def extended(
    held: torch.Tensor,
    new: torch.Tensor,
    starts: list[int],
    counts: list[int],
    zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Writes the first `counts` of new tokens `(batch, ..., tokens, width)` of each row behind its first `starts` held
    ones, in place or, without room, in a larger tensor, which `zeros` makes. Copies to the host may still run then.
    """
    size, needed = held.shape[-2], max(map(sum, zip(starts, counts, strict=True)))
    if needed > size:
        held = with_room(held, max(needed, size + size // GROWTH), zeros)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        held[row, ..., start : start + count, :].copy_(new[row, ..., :count, :], non_blocking=True)
    return held


def with_room(
    held: torch.Tensor, num_tokens: int, zeros: Callable[[tuple[int, ...]], torch.Tensor] | None = None
) -> torch.Tensor:
    """`(batch, ..., tokens, width)` with room for so many tokens: the tensor itself if it has that, else a copy."""
    size = held.shape[-2]
    if size >= num_tokens:
        return held
    shape = (*held.shape[:-2], num_tokens, held.shape[-1])
    larger = held.new_zeros(shape) if zeros is None else zeros(shape)
    larger[..., :size, :] = held
    return larger


def gather_through_host(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    """
    `gather_values` of memory that the device cannot read, as that of files: the host reads it, once the device has
    said which chunks it wants.
    """
    staging = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    gather_values_unchecked(staging, values, incoming.cpu(), chunk_size)
    # The last chunk is a full one here.
    arrives = (incoming >= 0).repeat_interleave(chunk_size, dim=-1)[..., None]
    buffer.copy_(torch.where(arrives, staging.to(buffer.device), buffer))
