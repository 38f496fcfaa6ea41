"""
KVSharer of Yang et al., 2024: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing
(https://arxiv.org/abs/2410.18517).

Some layers hold nothing and attend to the keys and values of a layer below them. Which ones is found beforehand, by
`pyramid-cache profile MODEL --sharing N` (`pyramid_cache.lab.profile.sharing`): pairs of layers are tried in turn,
those whose caches differ most first. The later layer of a pair uses the cache of the earlier one, in the prompt, too.
"""

import json
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.caches.minicache.cache import WholeLayer
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import Arrival
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import MaskReader


FORMAT = "pyramid_cache profile"
VERSION = 1
ANEW = "Make one with `pyramid-cache profile MODEL --sharing N --out FILE`."

Sharing = Mapping[int, int] | Sequence[Sequence[int]] | str | os.PathLike[str]


class BorrowedStore(SlotStore):
    """Counts tokens. Their keys and values are those of the store `lender`, which has stored them before."""

    def __init__(self, lender: SlotStore) -> None:
        self.lender = lender
        super().__init__()

    @property
    def is_saved(self) -> bool:  # type: ignore[override]
        return self.lender.is_saved

    @is_saved.setter
    def is_saved(self, is_saved: bool) -> None:
        # The queries of either layer may need gradients.
        self.lender.is_saved |= is_saved

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.state.length += key.shape[2]

    def attended(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lender.attended()


class LendingLayer(WholeLayer):
    """A layer that holds its tokens, in order of arrival. So `crop` takes any of them back without a record."""

    can_fix = False

    def activate_past_recording(self) -> None:
        """Nothing: no token is ever lost."""


class BorrowingLayer(LendingLayer):
    """A layer that attends to the keys and values of `lender`, and holds none."""

    def __init__(self, place: LayerPlace, masks: MaskReader, lender: LendingLayer) -> None:
        self.lender = lender
        super().__init__(place, masks)

    def _new_store(self) -> SlotStore:
        return BorrowedStore(self.lender.store)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.lender.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.lender.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        layout, lent = self.layout_of(key_states, value_states), self.lender.layout
        if layout._replace(batch_size=lent.batch_size, device=lent.device) != lent:
            raise ValueError(
                f"Layer {self.place.layer_idx} would use the cache of layer {self.lender.place.layer_idx}, but it has "
                f"{layout}, and that one {lent}. Leave the pair out of `sharing`."
            )
        super().lazy_initialization(key_states, value_states)

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        keys, values, arrival = super()._store(key, value)
        return keys.to(key.device), values.to(value.device), arrival

    def import_state(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        lent = {"keys": self.lender.store.in_use("keys"), "values": self.lender.store.in_use("values")}
        super().import_state(numbers, tensors | lent)
        self.state.keys = self.state.values = None


class KVSharerCache(CompressedCache):
    """
    Keeps all tokens, in some of the layers. The others use the keys and values of a layer below them (KVSharer,
    https://arxiv.org/abs/2410.18517).

    With `shared` layers that use those of others, the cache holds `(layers - shared) / layers` of the bytes of
    `DynamicCache`, and 8 for each token of a padded row.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        sharing (`dict`, `Sequence`, `str` or `os.PathLike`): By the index of each layer that holds nothing, the index
            of the one whose keys and values it uses: `{7: 2, 8: 2}`, or pairs of them. Or the path of a profile that
            `pyramid-cache profile MODEL --sharing N --out FILE` wrote. More layers take less memory and lose quality.

    Raises:
        ValueError: `sharing` is none of these; a layer is not one of full attention of the model, uses one above it,
            or one that holds nothing itself; the profile is damaged, or of another model; or a model that cannot be
            compressed. At the first forward pass for two layers whose keys have different shapes.
        FileNotFoundError: There is no such profile.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVSharerCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4))
    >>> cache = KVSharerCache(model.config, {3: 1})
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.sharing, cache.num_kept_tokens()
    ({3: 1}, [47, 47, 47, 47])

    ```
    """

    def __init__(self, config: PreTrainedConfig | PreTrainedModel, sharing: Sharing) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        self.sharing = read_sharing(sharing, config)
        lenders: dict[int, LendingLayer] = {}

        def build_layer(place: LayerPlace, masks: MaskReader) -> LendingLayer:
            index = place.layer_idx
            if index not in self.sharing:
                lenders[index] = LendingLayer(place, masks)
                return lenders[index]
            return BorrowingLayer(place, masks, self._lender(lenders, index))

        super().__init__(config, build_layer, {"sharing": sorted(self.sharing.items())})
        for index in self.sharing:
            if not isinstance(self.layers[index], BorrowingLayer):
                refuse_foreign(index)

    def _lender(self, lenders: dict[int, LendingLayer], index: int) -> LendingLayer:
        lender = self.sharing[index]
        return lenders[lender] if lender in lenders else refuse_foreign(lender)


def refuse_foreign(index: int) -> Any:
    """Raises ValueError for a layer that cannot share."""
    raise ValueError(f"`sharing` names layer {index}, which has no full attention. Leave it out.")


def read_sharing(sharing: Any, config: PreTrainedConfig) -> dict[int, int]:
    """By layer that holds nothing, the one that it uses. Raises as `KVSharerCache` does."""
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    pairs = read_profile(sharing, config) if isinstance(sharing, str | os.PathLike) else sharing
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else pairs
    if not isinstance(pairs, list | tuple) or not all(is_pair(pair) for pair in pairs):
        raise ValueError(f"`sharing={sharing!r}` must map layers to layers, as {{7: 2}}, or be the path of a profile.")
    found = {int(layer): int(lender) for layer, lender in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"`sharing={sharing!r}` names a layer twice.")
    for layer, lender in found.items():
        if not 0 <= lender < layer < num_layers:
            raise ValueError(
                f"`sharing`: layer {layer} cannot use the cache of layer {lender}. It must be one below it, of the "
                f"{num_layers} layers of the model, which count from 0."
            )
        if lender in found:
            raise ValueError(
                f"`sharing`: layer {layer} would use the cache of layer {lender}, which holds nothing: it uses that "
                f"of layer {found[lender]}. Name that one."
            )
    return found


def is_pair(pair: Any) -> bool:
    """Whether something is two numbers of layers."""
    is_sequence = isinstance(pair, list | tuple) and len(pair) == 2
    return is_sequence and all(isinstance(each, Integral) and not isinstance(each, bool) for each in pair)


def read_profile(path: str | os.PathLike[str], config: PreTrainedConfig) -> list[list[int]]:
    """The pairs of layers in a profile. Raises ValueError unless it is one of this model."""
    with open(path, encoding="utf-8") as file:
        try:
            record = json.load(file)
        except ValueError as error:
            raise ValueError(f"{os.fsdecode(path)} is no JSON file ({error}). {ANEW}") from error
    is_profile = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    if not is_profile or "sharing" not in record:
        raise ValueError(f"{os.fsdecode(path)} is no profile of layers that share (version {VERSION}). {ANEW}")
    try:
        measured, pairs = record["architecture"], [[row["layer"], row["uses"]] for row in record["sharing"]]
        given = architecture_of(config)
        differences = [
            f"`{name}` {measured.get(name)!r} instead of {given.get(name)!r}"
            for name in given | measured
            if measured.get(name) != given.get(name)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fsdecode(path)} is damaged ({error!r}). {ANEW}") from error
    if differences:
        raise ValueError(f"{os.fsdecode(path)} is of another model, which has {', '.join(differences)}. {ANEW}")
    return pairs
