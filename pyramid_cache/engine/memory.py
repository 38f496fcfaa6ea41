"""What the layers of a cache hold: bytes by device and role, and a table."""

from typing import TYPE_CHECKING

import torch

from pyramid_cache.engine.layer import CompressedLayer


if TYPE_CHECKING:
    from pyramid_cache.engine.cache import CompressedCache


def memory_of(cache: "CompressedCache") -> dict[str, dict[str, int]]:
    """See `CompressedCache.memory`."""
    tensors = [("bookkeeping", tensor) for tensor in cache.held_tensors()]
    for layer in cache.layers:
        tensors += held_tensors(layer).items()
    held: dict[str, dict[str, int]] = {}
    storages: set[int] = set()
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() == 0:
            continue
        storages.add(storage.data_ptr())
        is_moved, role = name.startswith("host "), name.removeprefix("host ").split()[0]
        device = "host" if is_moved else str(tensor.device)
        roles = held.setdefault(device, {"keys": 0, "values": 0, "bookkeeping": 0})
        roles[role if role in roles else "bookkeeping"] += storage.nbytes()
    return held


def held_tensors(layer: object) -> dict[str, torch.Tensor]:
    """The tensors of a layer, of ours or of transformers, by name."""
    return layer.held_tensors() if isinstance(layer, CompressedLayer) else tensors_of(layer)


def tensors_of(layer: object) -> dict[str, torch.Tensor]:
    """The tensors of a layer of transformers, by name."""
    held = dict(vars(layer))
    for name in [name for name, value in held.items() if isinstance(value, dict)]:  # states by number
        held |= {f"{name}.{number}": state for number, state in held.pop(name).items()}
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def summary_of(cache: "CompressedCache") -> str:
    """See `CompressedCache.summary`."""
    lines = [f"{type(cache).__name__}: {cache.get_seq_length()} tokens seen, {cache.nbytes:,} bytes held"]
    if on_host := sum(cache.memory().get("host", {}).values()):
        lines[0] += f", {on_host:,} of them on the host"
    lines.append(f"{'layer':>5}  {'kind':<24}{'kept per row':>16}{'bytes':>16}")
    for index, layer in enumerate(cache.layers):
        kept = "-"
        if isinstance(layer, CompressedLayer):
            held = layer.num_held_per_row
            low, high = min(held, default=0), max(held, default=0)
            kept = str(low) if low == high else f"{low}-{high}"
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in held_tensors(layer).values())
        lines.append(f"{index:>5}  {type(layer).__name__:<24}{kept:>16}{num_bytes:>16,}")
    return "\n".join(lines)
