"""
Heads that several processes share: tensor parallelism (`tp_plan="auto"`).

Each process, a rank, holds some of the KV heads of every layer. What a head keeps by its own scores needs no other
rank. What heads choose together is chosen from the scores of all ranks: they exchange them at each eviction, and
nothing in other steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional


@dataclass(frozen=True)
class HeadRanks:
    """The ranks among which the heads of a layer are split evenly, in order."""

    group: Any
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadRanks":
        """Process groups are not copied."""
        return self

    def gathered(self, priority: torch.Tensor) -> torch.Tensor:
        """
        Priorities `(batch, heads, slots)` of this rank as `(batch, size * heads, most slots)` of all. Ranks with fewer
        slots have -inf behind them.
        """
        most = torch.tensor(priority.shape[2], device=priority.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self.group)
        priority = functional.pad(priority, (0, int(most) - priority.shape[2]), value=float("-inf")).contiguous()
        parts = [torch.empty_like(priority) for _ in range(self.size)]
        distributed.all_gather(parts, priority, group=self.group)
        return torch.cat(parts, dim=1)

    def own(self, tensor: torch.Tensor, num_slots: int) -> torch.Tensor:
        """What is this rank's of `(batch, size * heads, most slots)`."""
        return tensor.chunk(self.size, dim=1)[self.rank][..., :num_slots]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total


def ranks_of(module: nn.Module) -> HeadRanks | None:
    """
    The ranks among which an attention layer is split; None if it is whole.

    Raises:
        NotImplementedError: Its weights are split in a way that does not tell which heads a rank has.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    parameters: Any = module.parameters()
    meshes = {each.device_mesh for each in parameters if is_split(each)}
    if not meshes:
        return None
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1:
        raise NotImplementedError(
            f"The weights of {type(module).__name__} are split over {mesh.ndim} dimensions of a device mesh, which "
            "does not tell which heads a process has. Split them over one (`tp_plan='auto'`), or use DynamicCache."
        )
    return HeadRanks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def is_split(parameter: Any) -> bool:
    """Whether a rank holds a part of a parameter alone: it is a `DTensor` then."""
    return any(placement.is_shard() for placement in getattr(parameter, "placements", ()))
