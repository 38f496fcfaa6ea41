"""
Heads that several processes share: tensor parallelism (`tp_plan="auto"`).

Each process, a rank, holds some of the KV heads of every layer. What a head keeps by its own scores needs no other
rank. What heads choose together is chosen from the scores of all ranks: they exchange them at each eviction, and
nothing in other steps.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class HeadRanks:
    """The ranks among which the heads of a layer are split evenly, in order."""

    group: Any
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadRanks":
        """Process groups are not copied."""
        return self

    def _parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, of one shape, in order."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def gathered(self, priority: torch.Tensor) -> torch.Tensor:
        """Priorities `(batch, heads, slots)` of this rank as `(batch, size * heads, slots)` of all."""
        return torch.cat(self._parts(priority), dim=1)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is this rank's of `(batch, size * heads, slots)`."""
        return tensor.chunk(self.size, dim=1)[self.rank]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        The mean over all ranks. It is added up in one order: `all_reduce` has another for each piece of a tensor, and
        scores that are equal would differ by a rounding.
        """
        return functools.reduce(torch.add, self._parts(tensor)) / self.size


def ranks_of(module: nn.Module, query_heads: int, kv_heads: int) -> HeadRanks | None:
    """
    The ranks among which the heads of an attention layer are split, whose attention is given so many heads here. None
    if each rank has all heads: the weights are whole, or the model gathers the heads (Phi-3, OLMo 2).

    Raises:
        NotImplementedError: The weights are split in a way that does not tell which heads a rank has.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    parameters: Any = module.parameters()
    meshes = {each.device_mesh for each in parameters if is_split(each)}
    if not meshes:
        return None
    num_heads = getattr(getattr(module, "config", None), "num_attention_heads", 0)
    has_whole_groups = query_heads == kv_heads * getattr(module, "num_key_value_groups", 1)
    if has_whole_groups and query_heads == num_heads:
        return None
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1 or not has_whole_groups or query_heads * mesh.size() != num_heads:
        raise NotImplementedError(
            f"A process has {query_heads} query heads and {kv_heads} KV heads of {type(module).__name__}, whose "
            f"{num_heads or 'unknown number of'} query heads are split over a device mesh of shape "
            f"{tuple(mesh.shape)}. That does not tell which heads it has. Split queries, keys and values over one "
            "dimension (`tp_plan='auto'`), or use DynamicCache."
        )
    return HeadRanks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def is_split(parameter: Any) -> bool:
    """Whether a rank holds a part of a parameter alone: it is a `DTensor` then."""
    return any(placement.is_shard() for placement in getattr(parameter, "placements", ()))
