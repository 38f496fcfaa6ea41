"""
The processes that `accelerate launch` or `torchrun` has started for one evaluation: each has contexts of its own.
"""

import os
from datetime import timedelta

import torch

from pyramid_cache.lab.evaluation.cells import CellStore


# How long a process that is done waits for the slowest one.
PATIENCE = timedelta(days=7)


class Team:
    """
    Which process this is, from 0 on, and which device is its own: by default the GPU of this process, or else the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.process, self.num_processes = 0, 1
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.device.type == "cpu", timeout=PATIENCE)
            self.process, self.num_processes = state.process_index, state.num_processes
            self.device = device or state.device

    def share(self, store: CellStore) -> None:
        """Waits for the others, and gives each the cells of all."""
        if self.num_processes == 1:
            return
        from accelerate.utils import gather_object

        for cell in gather_object(list(store.cells.values())):
            store.cells[cell.key] = cell

    def leave(self) -> None:
        """Ends what connects the processes, which some backends do not survive at exit."""
        if self.num_processes > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
