"""The shadow of a layer: the tokens of each row but for its latest ones, in a form that takes less of the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch
from torch.nn.functional import pad

from pyramid_cache.caches.shadow_kv.host import HostPlace, HostValues, extended, join
from pyramid_cache.caches.shadow_kv.landmarks import landmarks_of, lowest_cosines, probe_of
from pyramid_cache.caches.shadow_kv.low_rank import add_keys
from pyramid_cache.caches.shadow_kv.quantization import QUANTIZE, add_scaled, stored
from pyramid_cache.caches.shadow_kv.settings import ShadowSettings
from pyramid_cache.engine.rotation import RotaryFrequencies
from pyramid_cache.engine.state import row
from pyramid_cache.ops.shadow import plan_chunks, reconstruct_keys, select_chunks
from pyramid_cache.ops.transfer import numbers_on


# How many tokens' keys are copied to float32 at once.
TOKENS_PER_BLOCK = 8192


@dataclass
class Shadow:
    """
    The first `row_tokens` tokens of each row. Chunk `c` is its tokens `c * chunk_size` to `(c + 1) * chunk_size - 1`.

    Attributes:
        place (`HostPlace`): Where values go.
        rotary (`RotaryFrequencies`): What keys are turned by. Any frequencies would do as long as keys are turned back
            and forth by the same: those of the model are the ones that make them of low rank.
        factors (`torch.Tensor`): `(batch, tokens, rank)`. Their product with `basis` is the keys before RoPE.
        basis (`torch.Tensor`): `(batch, kv_heads, rank, head_dim)`.
        landmarks (`torch.Tensor`): `(batch, kv_heads, chunks, head_dim + num_bands)`, of `landmarks_of`.
        landmark_scales (`torch.Tensor`): `(batch, kv_heads, 1, head_dim + num_bands)` float32, of quantised landmarks.
        is_selectable (`torch.Tensor`): `(batch, kv_heads, chunks)` bool, False for outliers and for what is no chunk.
        outlier_chunks (`torch.Tensor`): `(batch, kv_heads, num_outlier_chunks)` int64, -1 for none.
        outlier_cosines (`torch.Tensor`): Like it, float32: the lowest cosine of a key of the chunk and their mean.
    """

    settings: ShadowSettings
    place: HostPlace
    row_tokens: list[int] = field(default_factory=list)
    rotary: RotaryFrequencies = None  # type: ignore[assignment]
    values: HostValues = None  # type: ignore[assignment]
    factors: torch.Tensor = row()
    basis: torch.Tensor = row()
    landmarks: torch.Tensor = row()
    landmark_scales: torch.Tensor = row()
    is_selectable: torch.Tensor = row()
    outlier_chunks: torch.Tensor = row()
    outlier_cosines: torch.Tensor = row()

    @property
    def num_tokens(self) -> int:
        """Of the longest row, as is `num_chunks`."""
        return max(self.row_tokens, default=0)

    @property
    def num_chunks(self) -> int:
        return self.num_tokens // self.settings.chunk_size

    @property
    def num_bands(self) -> int:
        """At most one for each two dimensions of a head."""
        return min(self.settings.num_spread_bands, -(-self.basis.shape[3] // 2))

    def _per_row(self, numbers: list[int]) -> torch.Tensor:
        return numbers_on(self.basis.device, numbers, torch.int32).view(-1, 1, 1)

    def begin(self, key: torch.Tensor, value: torch.Tensor, rotary: RotaryFrequencies) -> None:
        """Empty tensors for rows, heads, dtypes and device as those of keys and values `(batch, kv_heads, ...)`."""
        places, head_dim, quantize = key.shape[:2], key.shape[3], self.settings.quantize
        dtype = key.dtype if quantize is None else QUANTIZE[quantize]
        self.row_tokens, self.rotary, self.values = [0] * len(key), rotary, HostValues(self.place, value)
        self.factors, self.basis = key.new_zeros(len(key), 0, 0, dtype=dtype), key.new_zeros(*places, 0, head_dim)
        width, outliers = head_dim + self.num_bands, (*places, self.settings.num_outlier_chunks)
        self.landmarks = key.new_zeros(*places, 0, width, dtype=dtype)
        if quantize is not None:
            self.landmark_scales = key.new_ones(*places, 1, width, dtype=torch.float32)
        self.is_selectable = key.new_zeros(*places, 0, dtype=torch.bool)
        self.outlier_chunks = key.new_full(outliers, -1, dtype=torch.int64)
        self.outlier_cosines = key.new_full(outliers, float("inf"), dtype=torch.float32)

    def add(self, key: torch.Tensor, value: torch.Tensor, counts: list[int], *, refit: bool) -> torch.Tensor:
        """
        Takes full chunks behind those of each row, and chooses the outliers anew.

        Args:
            key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`.
            counts (`list[int]`): How many of the tokens each row has, its first ones.
            refit (`bool`): Whether the basis is fitted anew in rows that have one.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, num_outlier_chunks)` int64, where each outlier comes from: an index into
            the outliers so far with the new chunks behind them.
        """
        size, starts, device = self.settings.chunk_size, self.row_tokens, key.device
        refits = [count > 0 and (refit or not start) for start, count in zip(starts, counts, strict=True)]
        is_token = torch.arange(key.shape[2], device=device) < self._per_row(counts)  # (batch, 1, tokens)
        self._add_factors(key, is_token, counts, refits)
        self.values.add(value, starts, counts)
        chunks = key.unflatten(2, (-1, size)).float()  # (batch, kv_heads, chunks, chunk_size, head_dim)
        is_chunk, landmarks = is_token[..., ::size], landmarks_of(chunks, self.num_bands)
        cosines = lowest_cosines(chunks, landmarks[..., : key.shape[3]]).masked_fill(~is_chunk, float("inf"))
        landmarks = landmarks.masked_fill(~is_chunk[..., None], 0)
        if self.landmark_scales is not None:
            self.landmarks, self.landmark_scales, landmarks = add_scaled(
                self.landmarks, self.landmark_scales, landmarks, refits
            )
        first, num_new = ([number // size for number in numbers] for numbers in (starts, counts))
        self.landmarks = extended(self.landmarks, stored(landmarks, self.landmarks.dtype), first, num_new)
        new = (self._per_row(first) + torch.arange(cosines.shape[2], device=device)).expand_as(cosines)
        cosines = torch.cat([self.outlier_cosines, cosines], dim=-1)
        # Of equal cosines the older chunk.
        chosen = cosines.sort(dim=-1, stable=True).indices[..., : self.settings.num_outlier_chunks]
        self.outlier_cosines = cosines.gather(-1, chosen)
        chunks = torch.cat([self.outlier_chunks, new], dim=-1).gather(-1, chosen)
        self.outlier_chunks = chunks.masked_fill(self.outlier_cosines.isinf(), -1)
        self.row_tokens = [start + count for start, count in zip(starts, counts, strict=True)]
        index = torch.arange(self.landmarks.shape[2], device=device)
        is_outlier = (self.outlier_chunks[..., None] == index).any(dim=2)
        self.is_selectable = (index < self._per_row(self.row_tokens) // size) & ~is_outlier
        return chosen

    def _add_factors(self, key: torch.Tensor, is_token: torch.Tensor, counts: list[int], refits: list[bool]) -> None:
        """Projects keys onto the basis, which is first fitted to them and to those held so far where `refits` asks."""
        positions = self._per_row(self.row_tokens) + torch.arange(key.shape[2], device=key.device)

        def unrotated() -> Iterator[torch.Tensor]:  # (batch, tokens, kv_heads * head_dim)
            for start in range(0, key.shape[2], TOKENS_PER_BLOCK):
                block = slice(start, start + TOKENS_PER_BLOCK)
                angles = self.rotary.model_angles(positions[..., block], longest=0)
                keys = self.rotary.rotate(key[:, :, block].float(), -angles)
                yield keys.masked_fill(~is_token[..., block, None], 0).transpose(1, 2).flatten(2)

        joint = self.basis.transpose(1, 2).flatten(2)
        self.factors, joint, factors = add_keys(unrotated, self.factors, joint, self.settings.rank, refits)
        self.basis = joint.unflatten(2, (key.shape[1], key.shape[3])).transpose(1, 2).contiguous()
        self.factors = extended(self.factors, factors, self.row_tokens, counts)

    def forget(self, rows: list[int]) -> None:
        """Empties these rows."""
        self.row_tokens = [0 if index in rows else count for index, count in enumerate(self.row_tokens)]
        for index in rows:
            self.factors[index] = self.landmarks[index] = 0  # they would count for the next basis and scales
            self.is_selectable[index] = False
            self.outlier_chunks[index], self.outlier_cosines[index] = -1, float("inf")

    def select(self, query: torch.Tensor, scaling: float, num_chunks: int) -> torch.Tensor:
        """
        The chunks `(batch, kv_heads, num_chunks)` int64 that a query `(batch, heads, 1, head_dim)` attends to most, -1
        for none.
        """
        probe = probe_of(query, self.num_bands)
        if self.landmark_scales is not None:
            group = query.shape[1] // self.landmarks.shape[1]
            probe = (probe * self.landmark_scales.repeat_interleave(group, dim=1)).to(query.dtype)
        landmarks, mask = self.landmarks[:, :, : self.num_chunks], self.is_selectable[..., : self.num_chunks]
        return select_chunks(probe, landmarks, num_chunks=num_chunks, scaling=scaling, mask=mask)

    def latest(self, num_chunks: int) -> torch.Tensor:
        """The latest chunks `(batch, kv_heads, num_chunks)` int64 that are no outliers, -1 for none."""
        is_selectable = self.is_selectable[..., : self.num_chunks]
        chunks = torch.where(is_selectable, torch.arange(self.num_chunks, device=is_selectable.device), -1)
        chunks = chunks.sort(dim=-1, descending=True).values[..., :num_chunks]
        return pad(chunks, (0, num_chunks - chunks.shape[-1]), value=-1)

    def load(self, keys: torch.Tensor, values: torch.Tensor, held: torch.Tensor, wanted: torch.Tensor) -> None:
        """
        Brings wanted chunks `(batch, kv_heads, places)` int64, -1 for none, into places, which hold the chunks `held`
        `(batch, kv_heads, places)`. Writes to `held`, and to the places' keys and values `(batch, kv_heads, places *
        chunk_size, head_dim)`.
        """
        size = self.settings.chunk_size
        incoming = plan_chunks(held, wanted)
        self.values.load(values, incoming, size)
        frequencies, is_interleaved = self.rotary.inv_freq.to(keys.device), self.rotary.layout == "interleaved"
        low_rank = keys, self.factors, self.basis, incoming, frequencies
        reconstruct_keys(*low_rank, chunk_size=size, interleaved=is_interleaved)
        join(keys.device)

    def everything(self, outlier_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Keys, rebuilt but for the outliers, values, and positions `(batch, 1, tokens)` int32 of all tokens, -1 behind
        the last of a shorter row. `outlier_keys` are `(batch, kv_heads, num_outlier_chunks * chunk_size, head_dim)`.
        """
        num_tokens, device = self.num_tokens, outlier_keys.device
        with torch.autocast(device.type, enabled=False):
            keys = self.factors[:, None, :num_tokens].float() @ self.basis.float()
        positions = torch.arange(num_tokens, dtype=torch.int32, device=device).expand(len(self.row_tokens), 1, -1)
        keys = self.rotary.rotate(keys, self.rotary.model_angles(positions, longest=0)).to(outlier_keys.dtype)
        keys = pad(keys, (0, 0, 0, 1))  # one place more, for slots of no outlier
        places = tokens_of(self.outlier_chunks, self.settings.chunk_size).long()
        index = torch.where(places < 0, num_tokens, places)[..., None].expand_as(outlier_keys)
        keys = keys.scatter_(2, index, outlier_keys)[:, :, :num_tokens]
        positions = positions.masked_fill(positions >= self._per_row(self.row_tokens), -1)
        return keys, self.values.on_device(num_tokens), positions

    def row_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors with the batch first."""
        tensors = {name: getattr(self, name) for name in ROW_TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Maps all tensors. Values stay on the host: the function tells which rows it takes, and from where."""
        for name, tensor in self.row_tensors().items():
            setattr(self, name, function(tensor))
        if self.values is not None:
            self.values.select(function(torch.arange(len(self.values.tensor), device=self.values.device)))

    def export_tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds, without unused places."""
        tensors = self.row_tensors()
        if tensors:
            tensors["factors"] = self.factors[:, : self.num_tokens]
            tensors["landmarks"] = self.landmarks[:, :, : self.num_chunks]
            tensors["is_selectable"] = self.is_selectable[..., : self.num_chunks]
            tensors["host_values"] = self.values.on_host(self.num_tokens)
        return tensors

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `export_tensors` gave, if it gave anything."""
        for name in ROW_TENSORS:
            setattr(self, name, tensors.get(name))
            if name in tensors and len(tensors[name]) != len(self.row_tokens):
                raise ValueError(f"`{name}` has {len(tensors[name])} rows, not {len(self.row_tokens)}")
        if "host_values" in tensors:
            values = tensors["host_values"]
            self.values = HostValues(self.place, values)
            self.values.add(values, [0] * len(values), [values.shape[2]] * len(values))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, by a name whose first word is its role."""
        tensors = self.row_tensors()
        if tensors:
            tensors |= {f"keys in {name}": tensors.pop(name) for name in ("factors", "basis", "landmarks")}
            tensors["host values"] = self.values.tensor
        return tensors


ROW_TENSORS = tuple(each.name for each in fields(Shadow) if each.metadata.get("kind") == "row")


def tokens_of(chunks: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The tokens `(batch, kv_heads, chunks * chunk_size)` int32 of chunks, -1 for those of none."""
    tokens = chunks[..., None] * chunk_size + torch.arange(chunk_size, device=chunks.device)
    return tokens.masked_fill(chunks[..., None] < 0, -1).flatten(2).int()
