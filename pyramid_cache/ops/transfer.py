"""Numbers that the host knows, on the device where tensors are."""

from collections.abc import Sequence

import torch


def numbers_on(device: torch.device, numbers: Sequence, dtype: torch.dtype) -> torch.Tensor:
    """
    A tensor of numbers, or of lists of numbers, without waiting for the device. A plain copy waits until the device
    has done all that it was told before; one from pinned memory is done in its turn.
    """
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
