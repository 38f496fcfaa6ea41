"""The slots of ShadowKV beside its shadow: outliers, chunks that steps exchange, and the latest tokens."""

from collections.abc import Callable
from typing import Any

import torch

from pyramid_cache.caches.shadow_kv.host import HostPlace, HostValues
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.caches.shadow_kv.store import Shadow, ShadowState
from pyramid_cache.engine.rotation import export_frequencies
from pyramid_cache.engine.store import SlotStore


class ShadowStore(SlotStore):
    """The tokens of a layer: those of the shadow, and those in slots. See `ShadowKVLayer`."""

    state: ShadowState

    def __init__(self, settings: ShadowSettings, host: HostPlace) -> None:
        self.settings, self.host = settings, host
        super().__init__(ShadowState)

    def reset(self) -> None:
        super().reset()
        self.shadow = Shadow(self.settings, self.host, self.state)

    @property
    def outlier_slots(self) -> slice:
        """The slots of what no landmark stands for well."""
        return slice(0, self.settings.num_outlier_chunks * self.settings.chunk_size)

    @property
    def sparse_slots(self) -> slice:
        """The slots that steps exchange, for the row with the most chunks. They stay as many until the next turn."""
        return slice(self.outlier_slots.stop, self.tail)

    @property
    def tail(self) -> int:
        """The first slot of the latest tokens."""
        return (self.settings.num_outlier_chunks + self.state.held_chunks.shape[-1]) * self.settings.chunk_size

    def outside(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of keys, values and positions `(batch, 1, columns)` of what is not in the shadow."""
        state, row_shadow = self.state, self.state.row_shadow
        slots = slice(self.tail if all(row_shadow) else 0, state.length)
        positions = state.positions[:, :1, slots].clone()
        if slots.start == 0:
            positions[..., : self.tail].masked_fill_(self.per_row(row_shadow) > 0, -1)
        return state.keys[:, :, slots].clone(), state.values[:, :, slots].clone(), positions

    def in_order(self) -> dict[str, torch.Tensor]:
        """The tokens of the shadow, then the others."""
        shadow = self.shadow.everything(self.state.keys[:, :, self.outlier_slots])
        parts = zip(("keys", "values", "positions"), shadow, self.outside(), strict=True)
        return {name: torch.cat(both, dim=2) for name, *both in parts}

    def put_in_order(self, held: dict[str, torch.Tensor]) -> None:
        """Nothing: the shadow is in order, and no slot has room for all of it."""

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Values stay on the host: the function tells which rows it takes, and from where."""
        super().map_rows(function)
        if (values := self.shadow.values) is not None:
            values.select(function(torch.arange(len(values.tensor), device=values.device)))

    def leave_inference_mode(self) -> None:
        keys = self.state.keys
        super().leave_inference_mode()
        if self.state.keys is not keys and self.shadow.values is not None:
            self.shadow.values.select(torch.arange(len(keys), device=self.shadow.values.device))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().held_tensors()
        if self.shadow.values is not None:
            tensors |= {f"keys in {name}": tensors.pop(name) for name in ("factors", "basis", "landmarks")}
            tensors["host values"] = self.shadow.values.tensor
        return tensors

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        numbers, tensors = super().state_dict()
        rotary, frequencies = export_frequencies(self.shadow.rotary)
        trimmed = {} if self.shadow.values is None else self.shadow.trimmed()
        return numbers | {"rotary": rotary}, tensors | trimmed | frequencies

    def load_state_dict(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        known = self.state.names("slot", "row")
        super().load_state_dict(numbers, {name: tensor for name, tensor in tensors.items() if name in known})
        if "host_values" in tensors:
            values = tensors["host_values"]
            self.shadow.values = HostValues(self.host, values)
            self.shadow.values.add(values, [0] * len(values), [values.shape[2]] * len(values))
