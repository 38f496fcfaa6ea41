"""The base of all caches: builds a layer for each decoder layer of a config, and answers what users ask about the whole."""

from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pyramid_cache.engine import attention
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace, as_tokens_to_remove
from pyramid_cache.engine.tokens import MaskReader


class CompressedCache(Cache):
    """
    A cache whose full-attention layers evict. Sliding-window and linear-attention layers of hybrid models keep
    transformers' own layers, which are bounded already.

    Args:
        config (`PreTrainedConfig`): Of the model, as for `DynamicCache`.
        build_layer (`Callable`): Called with the place of each full-attention layer and the mask reader that all share.

    Raises:
        ValueError: `config` is no config of a decoder, or has no layer that could be compressed.
    """

    def __init__(
        self, config: PreTrainedConfig, build_layer: Callable[[LayerPlace, MaskReader], CompressedLayer]
    ) -> None:
        check_decoder_config(config)
        attention.install()
        self.masks = MaskReader()
        layers = list(DynamicCache(config=config).layers)
        # An exact type: layers of other kinds that derive from DynamicLayer have their own way to store.
        compressed = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not compressed:
            raise ValueError(
                f"A model of type {config.model_type!r} has no full-attention layer in this configuration, so there is "
                "nothing to compress: its cache is bounded already. Use DynamicCache."
            )
        for depth, index in enumerate(compressed):
            place = LayerPlace(index, depth, len(compressed), len(layers))
            layers[index] = build_layer(place, self.masks)
        super().__init__(layers=layers)
        self._was_passed_to_generate = False

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that evict, in the order of the model."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The cache was built for {len(self.layers)} layers, but the model has a layer {layer_idx}. Build the cache "
                "from the config of the model that it is used with."
            )
        # A layer that never got its queries is noticed by the next layer of the same forward pass.
        for layer in self.layers[max(layer_idx - 1, 0) : layer_idx]:
            if isinstance(layer, CompressedLayer):
                layer.require_attended()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, in all layers or in none; see `CompressedLayer.crop`."""
        tokens_to_remove = as_tokens_to_remove(tokens_to_remove)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                layer.require_croppable(tokens_to_remove)
            elif layer.is_sliding and not layer.record_past and layer.get_seq_length() >= layer.sliding_window:
                raise NotImplementedError(
                    f"`crop({tokens_to_remove})`: layer {index} has dropped tokens from its sliding window since, and that cannot "
                    "be undone. Call `cache.activate_past_recording()` before the tokens that may be taken back are seen."
                )
        super().crop(tokens_to_remove)

    @property
    def _is_user_defined(self) -> bool:
        """Set by `generate` whenever it starts with this cache: a recording that an earlier one left on ends there."""
        return self._was_passed_to_generate

    @_is_user_defined.setter
    def _is_user_defined(self, is_user_defined: bool) -> None:
        self._was_passed_to_generate = is_user_defined
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False

    def reset(self) -> None:
        """Forgets everything, so that the cache can be used for another sequence, batch or model."""
        self.masks.forget()
        super().reset()

    @property
    def batch_size(self) -> int:
        """The rows held, or -1 before the first forward pass."""
        initialized = [layer for layer in self.compressed_layers if layer.is_initialized]
        return initialized[0].batch_size if initialized else -1

    def positions(self, layer_idx: int) -> torch.Tensor:
        """
        What a layer holds.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, slots)` int64, the position of the token in each slot, counted among its
            row's tokens without padding; -1 for a slot that holds none.

        Raises:
            ValueError: The layer is not one that evicts, or holds nothing yet.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"There is no layer {layer_idx}: the cache has {len(self.layers)} layers.")
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            raise ValueError(
                f"Layer {layer_idx} is a {type(layer).__name__} of transformers, which evicts on its own."
            )
        if not layer.is_initialized:
            raise ValueError(f"Layer {layer_idx} holds nothing yet: run the model with the cache first.")
        return layer.held_positions()

    def num_kept_tokens(self) -> list[int]:
        """How many tokens each layer that evicts holds; of a batch, in the row that holds most."""
        return [max(layer.num_held_per_row, default=0) for layer in self.compressed_layers]

    def memory(self) -> dict[str, dict[str, int]]:
        """
        The bytes that the cache holds: the sum of the storages of its tensors.

        Returns:
            `dict[str, dict[str, int]]`: By device, then by role: "keys", "values" and "bookkeeping" (positions, scores).
        """
        held: dict[str, dict[str, int]] = {}
        storages: set[int] = set()
        for name, tensor in self._held_tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() in storages or storage.nbytes() == 0:
                continue
            storages.add(storage.data_ptr())
            roles = held.setdefault(str(tensor.device), {"keys": 0, "values": 0, "bookkeeping": 0})
            role = name.split()[0]
            roles[role if role in roles else "bookkeeping"] += storage.nbytes()
        return held

    @property
    def nbytes(self) -> int:
        """The bytes that the cache holds on all devices."""
        return sum(sum(roles.values()) for roles in self.memory().values())

    def _held_tensors(self) -> list[tuple[str, torch.Tensor]]:
        tensors = [("bookkeeping", tensor) for tensor in self.masks.held_tensors()]
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                tensors += layer.held_tensors().items()
            else:
                tensors += [(name, value) for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]
        return tensors

    def summary(self) -> str:
        """A table of what each layer holds."""
        lines = [f"{type(self).__name__}: {self.get_seq_length()} tokens seen, {self.nbytes:,} bytes held"]
        lines.append(f"{'layer':>5}  {'kind':<24}{'kept per row':>16}{'bytes':>16}")
        for index, layer in enumerate(self.layers):
            kept = "-"
            if isinstance(layer, CompressedLayer):
                held = layer.num_held_per_row
                low, high = min(held, default=0), max(held, default=0)
                kept = str(low) if low == high else f"{low}-{high}"
            tensors = layer.held_tensors().values() if isinstance(layer, CompressedLayer) else vars(layer).values()
            num_bytes = sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
            lines.append(f"{index:>5}  {type(layer).__name__:<24}{kept:>16}{num_bytes:>16,}")
        return "\n".join(lines)


def check_decoder_config(config: PreTrainedConfig) -> None:
    """Raises unless `config` is of a model that generates from a KV cache of its own."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"`config` must be the config of a model (`model.config`), but is a {type(config).__name__}.")
    if config.is_encoder_decoder:
        raise ValueError(
            f"A model of type {config.model_type!r} is an encoder-decoder; only decoder-only models are supported. Use "
            "EncoderDecoderCache."
        )
    text_config = config.get_text_config(decoder=True)
    # The architectures with a masked language model are encoders, unless they were told to be decoders.
    if text_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text_config, "is_decoder", False):
        raise ValueError(
            f"A model of type {config.model_type!r} is an encoder: it attends in both directions and has no KV cache."
        )
