"""Where values are that the device has no room for: in memory of the host that the device can read, or in a mapped file."""

import math
import os
import tempfile
from dataclasses import dataclass

import torch

from pyramid_cache.engine.budget import parse_budget


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
            raise ValueError(
                f"Values of {tuple(shape)} take {needed:,} bytes on the host in {self.num_layers} layers, more than "
                f"`host_budget={self.budget:,}`. Raise it, give fewer or shorter rows, or `host='{DISK}PATH'`."
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
        ValueError: It is neither "memory" nor a folder that exists behind "disk:", or the budget is no number of bytes.
    """
    folder = None
    if host != "memory":
        folder = host.removeprefix(DISK) if isinstance(host, str) and host.startswith(DISK) else None
        if folder is None or not os.path.isdir(folder):
            raise ValueError(f"`host={host!r}` must be 'memory', or '{DISK}' and a folder that exists.")
    if host_budget is None:
        return HostPlace(folder, None, num_layers)
    budget = parse_budget(host_budget) if isinstance(host_budget, str) else None
    amount = host_budget if budget is None else budget.amount
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise ValueError(f"`host_budget={host_budget!r}` must be a number of bytes, such as 2**34 or '16GiB'.")
    return HostPlace(folder, amount, num_layers)
