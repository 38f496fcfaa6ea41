"""Models whose weights wait elsewhere between forward passes, and models on two devices that nobody needs to have."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel


def split_map(model: PreTrainedModel, first: str | int, second: str | int) -> dict[str, str | int]:
    """A device map: the later layers on the second device, all else on the first."""
    num_layers = model.config.num_hidden_layers
    layers = {f"model.layers.{index}": second if index >= num_layers // 2 else first for index in range(num_layers)}
    return {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": first, "lm_head": first, **layers}


# All weights in a dictionary on the CPU and the rotary frequencies too, all in files, and what `device_map` does.
OFFLOADS: dict[str, Callable[[PreTrainedModel, str], PreTrainedModel]] = {
    "`accelerate.cpu_offload`": lambda model, folder: cpu_offload(
        model, execution_device=torch.device("cpu"), offload_buffers=True
    ),
    "`accelerate.disk_offload`": lambda model, folder: disk_offload(
        model, folder, execution_device=torch.device("cpu")
    ),
    "`device_map`: layers on the CPU and the disk": lambda model, folder: dispatch_model(
        model, split_map(model, "cpu", "disk"), main_device="cpu", offload_dir=folder
    ),
}


class PlacedTensor(torch.Tensor):
    """
    A tensor that says it is on some device, and keeps its numbers on the CPU. Operations on tensors of two devices
    fail as they would on an accelerator. All others give what they give on the CPU.
    """

    device = None

    @staticmethod
    def __new__(cls, data: torch.Tensor, device: torch.device) -> "PlacedTensor":
        same = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, data.shape, **same, device="meta")
        tensor.data_on_cpu, tensor.device, tensor.tolist = data, device, data.tolist
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run_placed(func, args, kwargs or {})


# Operations that may take tensors of two devices: copies, and indices that are on the CPU.
ACROSS_DEVICES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
}


def run_placed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers of its tensors. Results are where its arguments are, or are asked to be."""
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    # Numbers that were wrapped into tensors go with any device. So does what torch itself made where it believes a
    # tensor to be: on meta.
    placed = [tensor for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"]
    devices = [tensor.device for tensor in placed if tensor.device.type != "meta"]
    if func not in ACROSS_DEVICES and len(set(devices)) > 1:
        raise RuntimeError(f"{func} takes tensors on {sorted(map(str, set(devices)))}")
    device = devices[0] if devices else torch.device("meta" if placed else "cpu")
    if func is torch.ops.aten.index.Tensor:
        indices = [index for index in args[1] if index is not None]
        if any(index.device.type != "cpu" and index.device != device for index in indices):
            raise RuntimeError(f"{func} takes indices on another device than {device}")
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def bare(item: Any) -> Any:
        return item.data_on_cpu if isinstance(item, PlacedTensor) else item

    results = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    in_place = {id(bare(tensor)): tensor for tensor in tensors}

    def place(item: Any) -> Any:
        if id(item) in in_place or not isinstance(item, torch.Tensor):
            return in_place.get(id(item), item)
        return PlacedTensor(item, device)

    return results if device.type == "cpu" else tree_map(place, results)


class PlacedDispatch(TorchDispatchMode):
    """Operations that make a tensor on a device, of no tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run_placed(func, args, kwargs or {})


class PlacedConstants(TorchFunctionMode):
    """`torch.tensor(..., device=...)`, which asks for the device before any operation."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


# A kind of device that torch has no kernels for and nobody who runs these tests has.
FIRST, SECOND = "xla:0", "xla:1"


@contextmanager
def two_devices(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model with its layers on two devices, with the hooks that accelerate's `device_map` gives it."""
    model.requires_grad_(False)
    for name, device in split_map(model, FIRST, SECOND).items():
        block = model.get_submodule(name)._apply(partial(PlacedTensor, device=torch.device(device)))
        add_hook_to_module(block, AlignDevicesHook(device, skip_keys=model._skip_keys_device_placement))
    with PlacedConstants(), PlacedDispatch():
        yield model
