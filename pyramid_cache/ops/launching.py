"""What the launchers of the Triton kernels share. They run in every layer of every token: microseconds count."""

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its tensors say. Its interpreter, on the CPU, has none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def padded(size: int, smallest: int = 16) -> int:
    """
    The power of two that a dimension of a block is padded to, 16 or more where it takes part in a matrix product.
    """
    return max(1 << (size - 1).bit_length(), smallest)


def ceil_div(size: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own function takes microseconds."""
    return -(-size // divisor)
