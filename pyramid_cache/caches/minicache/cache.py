"""
MiniCache of Liu et al., 2024: KV Cache Compression in Depth Dimension (https://arxiv.org/abs/2405.14366).

In the upper half of a model, the keys and values of a token point nearly the same way in neighbouring layers. So two
layers share the direction of each token, and keep its two norms apart. The tokens whose directions differ most stay
as they are in both. Nothing is evicted.

Departures from the paper, which merges each token as it comes: tokens are merged in blocks once they have left the
latest `residual_length`. A fixed share of each block stays unmerged, by the largest angles in each head, keys and
values apart; the paper takes a threshold between the least and the largest angle of all. What is merged thus depends
on a row alone, and not on how its prompt was fed.
"""

from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pyramid_cache.caches.minicache.merging import Merger
from pyramid_cache.caches.minicache.store import PairStore
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.budget import parse_budget, read_count, read_number
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.policy import AllPolicy
from pyramid_cache.engine.policy_cache import DEFAULT_EVICTION_INTERVAL
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import MaskReader, Tokens


# Places of tokens in a block are stored in a byte.
MAX_BLOCK_LENGTH = 256


class WholeLayer(EvictingLayer):
    """A layer that evicts nothing."""

    def __init__(self, place: LayerPlace, masks: MaskReader) -> None:
        super().__init__(place, masks, parse_budget(1.0), AllPolicy(), DEFAULT_EVICTION_INTERVAL)


class PairLayer(WholeLayer):
    """A layer of a pair: the second one if `first` is the layer before it."""

    can_fix = False

    store: PairStore

    def __init__(self, place: LayerPlace, masks: MaskReader, merger: Merger, first: "PairLayer | None") -> None:
        self.merger, self.first = merger, first
        super().__init__(place, masks)

    def _new_store(self) -> SlotStore:
        return PairStore(self.merger, None if self.first is None else self.first.store)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.first is not None:
            layout, other = self.layout_of(key_states, value_states), self.first.layout
            if layout._replace(batch_size=other.batch_size, device=other.device) != other:
                raise ValueError(
                    f"Layers {self.first.place.layer_idx} and {self.place.layer_idx} would be merged, but one has "
                    f"{other}, the other {layout}. Give a higher `start_layer`, or use DynamicCache."
                )
        super().lazy_initialization(key_states, value_states)

    def pack(self) -> None:
        self.store.pack()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: list[int] | None = None) -> None:
        super()._map_rows(function, rows)
        if rows is not None:
            self.store.trim()

    def loses_tokens(self, seen: Tokens) -> bool:
        return not self.state.is_dense or any(map(self.merger.num_merged, seen.row_lengths))

    def require_croppable(self, tokens_to_remove: int) -> None:
        if self.is_initialized and not self.is_croppable and -tokens_to_remove > self.pending.num_columns:
            raise NotImplementedError(
                f"`crop({tokens_to_remove})`: layer {self.place.layer_idx} has merged tokens with another layer, and "
                "that cannot be undone. Call `cache.activate_past_recording()` before the tokens that may be taken "
                "back are seen."
            )
        super().require_croppable(tokens_to_remove)


def pairs_from(start_layer: int, is_full: list[bool]) -> dict[int, int]:
    """
    By second layer, the first one of each pair: neighbours from `start_layer` on that both have full attention.

    Args:
        is_full (`list[bool]`): For each layer of the model, whether it has full attention.
    """
    pairs: dict[int, int] = {}
    for index in range(start_layer + 1, len(is_full)):
        if is_full[index - 1] and is_full[index] and index - 1 not in pairs:
            pairs[index] = index - 1
    return pairs


class MiniCache(CompressedCache):
    """
    Keeps all tokens. From the middle of the model on, two neighbouring layers share their directions (MiniCache,
    https://arxiv.org/abs/2405.14366).

    Of `tokens` tokens `n = (tokens - residual_length) // block_length * block_length` are merged. A pair of layers
    holds `batch * kv_heads * n * itemsize * (2 * head_dim * (1 + outliers) + 4)` bytes for them instead of `batch *
    kv_heads * n * itemsize * 4 * head_dim`, `batch * kv_heads * n * 2 * outliers` more, and 8 for each token of a
    row. A forward pass restores them for one layer at a time.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        start_layer (`int`, *optional*): The first layer that may share, by default the one in the middle. Lower ones
            save more memory, and change more. Layers whose neighbour has another kind of attention, or none left to
            share with, stay whole.
        interpolation (`float`, defaults to 0.6): Where the shared direction is: 0 is that of the first layer of a
            pair, 1 that of the second.
        outliers (`float`, defaults to 0.05): The share of tokens that are not merged in a head: those whose directions
            differ most. Larger values take more memory. With 1.0 nothing is merged.
        residual_length (`int`, defaults to 128): How many of the latest tokens stay as they are, and up to
            `block_length - 1` more. Larger values take more memory.
        block_length (`int`, defaults to 100): How many tokens are merged at once, at most 256. `outliers` is a share
            of each block.

    Raises:
        ValueError: For an argument outside its range, or a model that cannot be compressed or has no two neighbouring
            layers of full attention from `start_layer` on. At the first forward pass for a pair of layers whose keys
            have different shapes.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import MiniCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4))
    >>> cache = MiniCache(model.config, residual_length=32)
    >>> tokens = model.generate(torch.arange(240)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.pairs, cache.num_kept_tokens(), cache.memory()["cpu"]["keys"] < 247 * 64 * 4 * 3.5
    ([(2, 3)], [247, 247, 247, 247], True)

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        start_layer: int | None = None,
        interpolation: float = 0.6,
        outliers: float = 0.05,
        residual_length: int = 128,
        block_length: int = 100,
    ) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        interpolation = read_number("interpolation", interpolation, "[0, 1]")
        outliers = read_number("outliers", outliers, "[0, 1]")
        residual_length = read_count("residual_length", residual_length, least=1)
        if (block_length := read_count("block_length", block_length, least=1)) > MAX_BLOCK_LENGTH:
            raise ValueError(f"`block_length={block_length}` must be at most {MAX_BLOCK_LENGTH}.")
        is_full = [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]
        start = len(is_full) // 2 if start_layer is None else read_count("start_layer", start_layer, least=0)
        first_of = pairs_from(start, is_full)
        if any(is_full) and not first_of:
            possible = [index for index in range(len(is_full) - 1) if all(is_full[index : index + 2])]
            way_out = f"Give at most {possible[-1]}, or use another cache." if possible else "Use another cache."
            raise ValueError(
                f"`start_layer={start}`: from there on no two neighbouring layers of the {len(is_full)} have full "
                f"attention, so none can share. {way_out}"
            )
        merger = Merger(interpolation, round(outliers * block_length), block_length, residual_length)
        firsts: dict[int, PairLayer] = {}

        def build_layer(place: LayerPlace, masks: MaskReader) -> WholeLayer:
            index = place.layer_idx
            if index in first_of:
                return PairLayer(place, masks, merger, firsts[first_of[index]])
            if index in first_of.values():
                firsts[index] = PairLayer(place, masks, merger, None)
                return firsts[index]
            return WholeLayer(place, masks)

        settings = {"start_layer": start, "interpolation": interpolation, "outliers": outliers}
        settings |= {"residual_length": residual_length, "block_length": block_length}
        super().__init__(config, build_layer, settings)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of layers that share, by their indices in the model."""
        return [
            (layer.first.place.layer_idx, layer.place.layer_idx)
            for layer in self.compressed_layers
            if isinstance(layer, PairLayer) and layer.first is not None
        ]
