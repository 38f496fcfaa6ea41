"""
Where values are that the device has no room for: in memory of the host that the device can read, or in a mapped file.

What goes to the host and comes from there does so on a second stream of a CUDA device, beside what it works out.
Elsewhere there is one order of things, and nothing to wait for.
"""

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pyramid_cache.engine.budget import parse_budget
from pyramid_cache.ops.shadow import gather_values


DISK = "disk:"


@dataclass(frozen=True)
class HostPlace:
    """
    Attributes:
        folder (`str`, *optional*): Of the files that hold values; without one they are in memory.
        budget (`int`, *optional*): Bytes that the layers together may take.
        num_layers (`int`): How many layers there are, which take as much each.
    """

    folder: str | None = None
    budget: int | None = None
    num_layers: int = 1

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """
        A tensor of zeros for values of a device. A file has no name, and is gone with its tensor.

        Raises:
            ValueError: It takes more than the budget, with as much for each of the other layers.
            OSError: There is no room for the file.
        """
        numel = math.prod(shape)
        needed = numel * dtype.itemsize * self.num_layers
        if self.budget is not None and needed > self.budget:
            rows, _, tokens, _ = shape
            other = "" if self.folder is not None else f", or `host='{DISK}PATH'` with a budget for the disk"
            raise ValueError(
                f"Values of {rows} rows of {tokens:,} tokens take {needed:,} bytes on the host in {self.num_layers} "
                f"layers, more than `host_budget={self.budget:,}`. Raise it, give fewer or shorter rows{other}."
            )
        if self.folder is None or not numel:
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda" and numel > 0)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="pyramid_cache-") as file:
            # All of it at once: a full disk is an error here, and no signal later.
            os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)


def read_host(host: str, host_budget: int | str | None, num_layers: int) -> HostPlace:
    """
    Where values go, as users write it.

    Raises:
        ValueError: It is neither "memory" nor a folder that exists behind "disk:" and takes files, or the budget is no
            number of bytes.
    """
    folder = None
    if host != "memory":
        folder = (
            os.path.expanduser(host.removeprefix(DISK)) if isinstance(host, str) and host.startswith(DISK) else None
        )
        if folder is None or not os.path.isdir(folder):
            raise ValueError(f"`host={host!r}` must be 'memory', or '{DISK}' and a folder that exists.")
        require_writable(folder)
    amount: Any = host_budget
    if isinstance(host_budget, str):
        try:
            amount = parse_budget(host_budget).amount
        except ValueError:
            amount = None  # refused below, by its own name
    if host_budget is not None and (isinstance(amount, bool) or not isinstance(amount, int) or amount < 1):
        raise ValueError(f"`host_budget={host_budget!r}` must be a number of bytes, such as 2**34 or '16GiB'.")
    return HostPlace(folder, amount, num_layers)


@functools.lru_cache(maxsize=1)  # each layer asks for the same folder
def require_writable(folder: str) -> None:
    """Raises ValueError for a folder that takes no files."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`host='{DISK}{folder}'`: no file can be made there ({error.strerror}). Give another folder."
        ) from error


# The second stream.


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each CUDA device."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(device: torch.device, *read: torch.Tensor) -> Iterator[None]:
    """
    What is launched inside runs beside what is launched behind it, up to `join`, and after all before. `read` are
    tensors that may be let go before.
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
    """What is launched from here on runs after what was launched `beside`. The host does not wait."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(second_stream(device))


def wait_for_host(device: torch.device) -> None:
    """
    Waits until values have come to the host and been read from there, so that they can be read and moved on the host.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
        second_stream(device).synchronize()


def fetch_values(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, *, chunk_size: int) -> None:
    """
    `gather_values`, of values in pageable memory too: mapped files are read by the host, which waits for the device to
    say what it wants.
    """
    if buffer.device.type == "cpu" or values.is_pinned():
        gather_values(buffer, values, incoming, chunk_size=chunk_size)
    else:
        gather_through_host(buffer, values, incoming, chunk_size)


def gather_through_host(buffer: torch.Tensor, values: torch.Tensor, incoming: torch.Tensor, chunk_size: int) -> None:
    """`gather_values`, the host reading what the device has no access to."""
    staging = torch.zeros(buffer.shape, dtype=buffer.dtype)
    gather_values(staging, values, incoming.cpu(), chunk_size=chunk_size)
    # The last chunk is a full one here.
    arrives = (incoming >= 0).repeat_interleave(chunk_size, dim=-1)[..., None]
    buffer.copy_(torch.where(arrives, staging.to(buffer.device), buffer))
