"""
The base of all caches. It builds a cache layer for each decoder layer and answers questions about the whole cache.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from pyramid_cache.engine import attention, checks
from pyramid_cache.engine.architectures import CACHE_ARGUMENT, shared_layers
from pyramid_cache.engine.arguments import as_repeats, as_row_indices, as_tokens_to_remove, check_decoder_config
from pyramid_cache.engine.beside import StatesBeside, with_states
from pyramid_cache.engine.files import CacheType, load_cache, save_cache
from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.engine.foreign import COMPRESSIBLE, is_linear, require_bounded, require_croppable, select_rows
from pyramid_cache.engine.generation import modes_of
from pyramid_cache.engine.graph_steps import GraphSteps
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import CompressedLayer, OutsideOfGraph
from pyramid_cache.engine.memory import memory_of, summary_of
from pyramid_cache.engine.rope import SharedFrequencies
from pyramid_cache.engine.tokens import MaskReader


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyramid_cache.plot.text import KeptText


class CompressedCache(Cache):
    """
    A cache whose full-attention layers evict. Sliding-window and linear-attention layers of hybrid models keep
    transformers' own layers, which are bounded already. So do full-attention layers whose keys later layers share.
    They stay whole.

    Args:
        config (`PreTrainedConfig`): The config of the model, as for `DynamicCache`.
        build_layer (`Callable`): Makes the cache layer of a full-attention layer from its `LayerPlace` and from the
            `MaskReader` that all layers share.
        settings (`dict`, *optional*): The other arguments of the constructor by name, with which `load` calls it. A
            cache without them cannot be saved.

    Raises:
        ValueError: `config` is no config of a decoder, or has no layer that could be compressed.
        NotImplementedError: The attention of this architecture cannot be served.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        build_layer: Callable[[LayerPlace, MaskReader], CompressedLayer],
        settings: dict[str, Any] | None = None,
        masks: MaskReader | None = None,
    ) -> None:
        check_decoder_config(config)
        self.settings = settings
        self.architecture = architecture_of(config)
        attention.install()
        self.masks = MaskReader() if masks is None else masks
        self.frequencies = SharedFrequencies()
        layers = list(DynamicCache(config=config).layers)
        require_bounded(config.model_type, layers)
        decoder_config = config.get_text_config(decoder=True)
        shared, depth = shared_layers(decoder_config), decoder_config.num_hidden_layers
        full = [index for index, layer in enumerate(layers) if type(layer) in COMPRESSIBLE]
        compressed = [index for index in full if index not in shared]
        if full and not compressed:
            raise NotImplementedError(
                f"A model of type {config.model_type!r} cannot be compressed in this configuration: its later layers "
                f"attend to the keys of its only full-attention layer, {full[0]}. Use DynamicCache."
            )
        if not compressed:
            raise ValueError(
                f"A model of type {config.model_type!r} has no full-attention layer in this configuration, so there "
                "is nothing to compress: its cache is bounded already. Use DynamicCache."
            )
        for rank, index in enumerate(compressed):
            layer = build_layer(LayerPlace(index, rank, len(compressed), depth), self.masks)
            layer.frequencies = self.frequencies
            replaced = layers[index]
            if isinstance(replaced, LinearAttentionLayer):
                layer = with_states(layer, replaced.number_of_states)
            layers[index] = layer
        self._unused_layers = {
            index: copy.deepcopy(layer) for index, layer in enumerate(layers) if not isinstance(layer, CompressedLayer)
        }
        super().__init__(layers=layers)
        self._by_index = {index: layer for index, layer in enumerate(layers) if isinstance(layer, CompressedLayer)}
        self._is_beside_encoder = config.is_encoder_decoder
        # Linear-attention layers are not told of tokens through `update`.
        with_attention = [index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        self._first, self._last = with_attention[0], with_attention[-1]
        # How many tokens had been seen when layers with states were given the last ones.
        self._seen_by_states: dict[int, int] = {}

        # The steps of fixed shapes, once `step` has followed a forward pass.
        self._graph: GraphSteps | None = None
        self._modes: tuple | None = None
        # Whether `generate` may compile: it asks `is_compileable` before it reads the prompt.
        self.offers_to_compile = False

    layers: list[Any]

    @property
    def compressed_layers(self) -> list[Any]:
        """The layers that evict, each a `CompressedLayer`, in the order of the model."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._graph is not None and key_states.shape[2] == 1:
            return self._graph.update(key_states, value_states, layer_idx)
        if torch.compiler.is_dynamo_compiling():
            return self._update_outside(key_states, value_states, layer_idx)
        self.release()
        layer = self._by_index[layer_idx] if type(layer_idx) is int and layer_idx in self._by_index else None
        if layer_idx == self._first:
            self._modes = modes_of(key_states.device.type) if type(key_states) is torch.Tensor else None
        if layer is not None and layer.knows(key_states, value_states, self._modes) and not self.offloading:
            # The first layer asks whether the last one has seen as much: then no forward pass broke off.
            last = self.layers[self._last]
            if layer_idx != self._first or layer.get_seq_length() == last.get_seq_length():
                return layer.update_known(key_states, value_states)
        if not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"The cache was built for {len(self.layers)} layers, but the model has a layer {layer_idx!r}. Build "
                "the cache from the config of the model that it is used with."
            )
        if self._is_beside_encoder and self.get_seq_length(layer_idx) > self.get_seq_length(len(self.layers) - 1):
            raise ValueError(
                f"Layer {layer_idx} was handed keys of the encoder: an encoder-decoder needs a second cache for them. "
                f"Pass `{CACHE_ARGUMENT}=EncoderDecoderCache(cache, DynamicCache())` instead."
            )
        if layer_idx == self._first:
            self.require_whole()
        # A layer that never got its queries is noticed by the next layer of the same forward pass.
        for layer in self.layers[max(layer_idx - 1, 0) : layer_idx]:
            if isinstance(layer, CompressedLayer):
                checks.check_attended(layer)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    # Layers with states ask for them once in each forward pass: from transformers 5.24 on in this way,
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        if state_idx == 0:
            self._note_states(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    # and before in this one.
    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is not None and not hasattr(Cache, "get_conv_state"):
            self._note_states(layer_idx)
        return super().has_previous_state(layer_idx, state_idx)

    def _note_states(self, layer_idx: int) -> None:
        """
        Raises if a layer with states was given tokens that attention has not seen: it cannot tell how many it has.
        """
        num_seen = self.get_seq_length(self._first)
        if self._seen_by_states.get(layer_idx) == num_seen:
            raise RuntimeError(
                f"An earlier forward pass broke off, and the states of layer {layer_idx} have taken its tokens up. "
                "Call `cache.reset()`, then read the whole sequence again."
            )
        self._seen_by_states[layer_idx] = num_seen

    @torch.compiler.disable(
        reason="call `cache.step()` after each forward pass, that of the prompt included: see docs/compile.md"
    )
    def _update_outside(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` outside of a graph, whose attention is left as well."""
        keys, values = self.update(*arguments)
        keys.cache_layer = OutsideOfGraph(keys.cache_layer)  # type: ignore[attr-defined]
        return keys, values

    def require_whole(self) -> None:
        """
        Raises if a forward pass broke off: its first layers have seen tokens that the others have not.

        Raises:
            RuntimeError: A forward pass broke off. Only `reset` helps.
        """
        lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        pending = [layer.place.layer_idx for layer in self.compressed_layers if layer.arrival is not None]
        if len(self.layers) == 1:  # no later layer of the same forward pass has asked this
            checks.check_attended(self.compressed_layers[0])
        if pending or any(length != lengths[0] for length in lengths):
            where = f" in the attention of layer {pending[0]}" if pending else ""
            error = (
                f"An earlier forward pass broke off{where}, and the layers of the cache have seen {lengths} tokens. "
                "Call `cache.reset()`, then read the whole sequence again."
            )
            if not pending and not lengths[-1]:
                filled = (isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0 for layer in self.layers)
                num_run = 1 + max(index for index, is_filled in enumerate(filled) if is_filled)
                error += (
                    f" If the model runs {num_run} layers, set `model.config.num_hidden_layers = {num_run}` first."
                )
            raise RuntimeError(error)

    # Steps of fixed shapes, for `torch.compile`.

    @property
    def can_compile(self) -> bool:
        """
        Whether decode steps can be compiled: all layers evict, on one device of one process, and no token may be taken
        back.
        """
        layers = self.layers
        return (
            len(self._by_index) == len(layers)
            and not self._is_beside_encoder
            and not self.offloading
            and all(layer.can_fix and not layer.record_past and layer.store.ranks is None for layer in layers)
            and len({layer.device for layer in layers if layer.is_initialized}) <= 1
        )

    @property
    def is_compileable(self) -> bool:
        """Whether the next step has fixed shapes, as while a compiled `generate` runs. See `can_compile`."""
        return self._graph is not None or self.offers_to_compile

    def step(self, max_length: int | None = None) -> None:
        """
        Gives the next forward pass fixed shapes, if it is of one token in each row, so that a compiled model runs it
        in one graph. Call this after each forward pass if you compile the model yourself; a compiled `generate` does.

        Such a forward pass takes its tokens as they come: its attention mask and position ids are not checked. Other
        calls of the cache, and forward passes of several tokens, end it.

        Args:
            max_length (`int`, *optional*): How many tokens a row may become long, padding included. A cache whose
                budget is 1.0 needs to know. Beyond it shapes are not fixed.

        Raises:
            RuntimeError: The last forward pass broke off.
            NotImplementedError: Steps of this cache cannot have fixed shapes.
            ValueError: A budget of 1.0 without `max_length`.
        """
        if self.is_initialized and not self.advance(max_length):
            checks.refuse_steps(self, max_length)

    def advance(self, max_length: int | None) -> bool:
        """Does what `step` does, if it can. Returns whether it could."""
        graph = self._graph
        if graph is not None and not graph.is_counted:
            if not graph.count():
                self.release()
            return True
        if graph is None and self.can_compile:
            self.require_whole()
            layers = self._by_index
            if all(layer.may_fix(max_length) and layer.takes_steps for layer in layers.values()):
                self._graph = GraphSteps(layers, self.get_seq_length(), max_length)
        return self._graph is not None

    @property
    def is_counted(self) -> bool:
        """Whether `step` followed the last forward pass of fixed shapes."""
        return self._graph is None or self._graph.is_counted

    def release(self) -> None:
        """Ends the steps of fixed shapes."""
        if self._graph is not None:
            self._graph.require_counted()
            graph, self._graph = self._graph, None
            graph.release()

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens the layer has seen, padding included; in a graph a tensor."""
        if self._graph is not None and torch.compiler.is_compiling():
            return self._graph.num_seen
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length of the mask, and its offset."""
        if self._graph is not None and query_length == 1:
            return self._graph.by_layer[layer_idx].num_slots, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes back the last `-tokens_to_remove` tokens, in all layers or in none. Recorded tokens that stay are then
        stored and scored, and the evictions that waited happen. If tokens go that were scored, the cache holds what
        its budget allows, and refuses to evict afterwards.

        Raises:
            ValueError: A positive number, or more tokens than the cache has seen.
            NotImplementedError: Tokens that were not recorded have been evicted since.
        """
        tokens_to_remove = as_tokens_to_remove(tokens_to_remove)
        self.release()
        self.require_whole()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                layer.require_croppable(tokens_to_remove)
            else:
                require_croppable(index, layer, tokens_to_remove)
        self._seen_by_states.clear()
        for layer in self.layers:
            if not is_linear(layer) or (layer.record_past and layer.is_conv_states_initialized[0]):
                layer.crop(tokens_to_remove)

    def compress(self) -> None:
        """
        Evicts now the tokens whose eviction waits, so that each layer holds no more than its budget.

        A prompt, or a later turn, is compressed as soon as it is read. Generated tokens wait for the next
        `eviction_interval`, and recorded ones for `crop`. Call this before a cache is saved, or copied for several
        questions: it is then as small as it gets. Which tokens a fraction counts depends on the `ranking`; see
        `PolicyCache`.

        Raises:
            RuntimeError: The last forward pass broke off.
        """
        self.release()
        self.require_whole()
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            self.crop(0)
        for layer in self.compressed_layers:
            layer.store.leave_inference_mode()
            layer.compress()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the rows for beam search."""
        self.release()
        super().reorder_cache(as_row_indices(beam_idx, self.batch_size))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices` `(rows,)`, in that order, or those where a bool mask is True."""
        self.release()
        rows = as_row_indices(indices, self.batch_size)
        for layer in self.layers:
            select_rows(layer, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, copies side by side."""
        self.release()
        repeats = as_repeats(repeats)
        rows = torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats)
        for layer in self.layers:
            if is_linear(layer):
                select_rows(layer, rows)
            else:
                layer.batch_repeat_interleave(repeats)

    def __setattr__(self, name: str, value: object) -> None:
        # `generate` sets this attribute on each cache that it is given, which ends a recording that an earlier call
        # left on. It is no property: `generate`, given the class by mistake, would overwrite that for all caches.
        super().__setattr__(name, value)
        if name == "_is_user_defined":
            self.require_whole()
            recording = [layer for layer in self.layers if getattr(layer, "record_past", False)]
            if recording:
                self.crop(0)
            for layer in recording:
                layer.record_past = False

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen tokens."""
        return all(layer.is_initialized for layer in self.compressed_layers)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, None]]:
        """The keys and values of each layer, as `DynamicCache` gives them, as long as nothing has been evicted."""
        self.release()
        if not all(layer.state.is_dense for layer in self.compressed_layers):
            raise AttributeError("A cache that has evicted tokens is not iterable. See `cache.positions`.")
        for layer in self.layers:
            num_held = layer.state.length if isinstance(layer, CompressedLayer) else None
            held = (None if states is None else states[..., :num_held, :] for states in (layer.keys, layer.values))
            yield (*held, getattr(layer, "_sliding_window_tensor", None))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.is_initialized:
            raise TypeError(
                "A cache that holds tokens cannot be pickled, which `torch.save` does as well. Use `cache.save(path)`."
            )
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> "CompressedCache":
        self.release()
        twin = type(self).__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedCache":
        self.release()
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin

    @property
    def is_croppable(self) -> bool:
        """Whether transformers may crop this cache, as it does when it finds out late that it should have stopped."""
        return not self._is_beside_encoder and super().is_croppable

    def activate_past_recording(self) -> None:
        """
        Puts the tokens of the next forward passes aside, so that `crop` can take them back. Nothing is evicted until
        the next `crop`.
        """
        if self._is_beside_encoder:
            raise NotImplementedError(
                "Assisted generation and prompt lookup take tokens back, which transformers' EncoderDecoderCache "
                "does with DynamicCache only. Use `EncoderDecoderCache(DynamicCache(), DynamicCache())` with them."
            )
        self.release()
        if any(isinstance(layer, StatesBeside) for layer in self.layers):
            raise NotImplementedError(
                "Assisted generation and prompt lookup take tokens back, which layers with a state-space part cannot "
                "do: their states have taken the tokens up. Generate without them."
            )
        super().activate_past_recording()

    def reset(self) -> None:
        """Forgets everything, so that the cache can be used for another sequence, batch or model."""
        self._graph = None
        self._seen_by_states.clear()
        self.masks.forget()
        self.frequencies.forget()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                layer.reset()
            else:  # transformers' own would keep the length of what they held
                self.layers[index] = copy.deepcopy(self._unused_layers[index])

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Writes the cache to a file. A cache that `load` makes of it goes on as this one would, in another process too:

            cache.save("novel.safetensors")
            cache = PyramidCache.load("novel.safetensors", model)

        The file is in safetensors format. It is written beside `path` and then takes its place, so that an interrupted
        save leaves an older file as it was. Unused slots are not saved.

        Args:
            path (`str` or `os.PathLike`): The file to write; an existing file is replaced.

        Raises:
            ValueError: The cache holds nothing yet, a forward pass is not finished, or `crop` may still take tokens
                back.
            NotImplementedError: The model has layers that are neither full, sliding-window nor linear attention.
        """
        self.release()
        save_cache(self, path)

    @classmethod
    def load(
        cls: type[CacheType],
        path: str | os.PathLike[str],
        config: PreTrainedConfig | PreTrainedModel,
        *,
        device: torch.device | str | int | None = None,
    ) -> CacheType:
        """
        Reads a cache that `save` wrote.

        A file that was truncated or made by another model gives an error and no cache. The weights of the model are
        compared by samples, at once if the model is given and at its first forward pass with the cache otherwise.
        Numbers within tensors are taken as they are: load only files that you trust.

        Args:
            path (`str` or `os.PathLike`): The file.
            config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model, as the constructor takes it.
            device (`torch.device`, *optional*): Where the cache belongs. By default where the model's layers are if
                the model is given, else the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no file of this cache, is damaged, or was made by another model.
            NotImplementedError: The constructor does not take the model; it may take its config.
        """
        return cls._load(path, config, device)

    @classmethod
    def _load(
        cls: type[CacheType],
        path: str | os.PathLike[str],
        config: PreTrainedConfig | PreTrainedModel,
        device: torch.device | str | int | None,
        **changed: Any,
    ) -> CacheType:
        """See `load`; `changed` are settings that take the place of those in the file."""
        check_decoder_config(config.config if isinstance(config, PreTrainedModel) else config)
        return load_cache(cls, path, config, device, changed)

    @property
    def batch_size(self) -> int:
        """The rows held, or -1 before the first forward pass."""
        initialized = [layer for layer in self.compressed_layers if layer.is_initialized]
        return initialized[0].batch_size if initialized else -1

    def positions(self, layer_idx: int) -> torch.Tensor:
        """
        The positions of the tokens that a layer holds.

        Returns:
            `torch.Tensor`: `(batch, kv_heads, slots)` int64: for each slot the rank of its token among the tokens of
            its row, padding not counted; -1 for an empty slot.

        Raises:
            ValueError: The layer does not evict, or holds nothing yet.
        """
        if not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"There is no layer {layer_idx!r}: the cache has {len(self.layers)} layers.")
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            raise ValueError(
                f"Layer {layer_idx} is a {type(layer).__name__} of transformers, which evicts on its own."
            )
        if not layer.is_initialized:
            raise ValueError(f"Layer {layer_idx} holds nothing yet: run the model with the cache first.")
        return layer.held_positions()

    def num_kept_tokens(self) -> list[int]:
        """
        How many tokens each layer that evicts holds per KV head: the largest number among the rows of the batch. Where
        heads keep different numbers, it is the mean over the heads.
        """
        return [max(layer.num_held_per_row, default=0) for layer in self.compressed_layers]

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors that the cache refers to beside those of its layers."""
        return [*self.masks.held_tensors(), *([] if self._graph is None else [self._graph.num_seen])]

    def memory(self) -> dict[str, dict[str, int]]:
        """
        The bytes that the cache holds: the sum of the storages of its tensors.

        Returns:
            `dict[str, dict[str, int]]`: By device, then by role: "keys", "values" and "bookkeeping" (positions,
                scores, states of linear attention). Tensors that a cache has moved to the host are under "host",
                even if the device is the CPU.
        """
        return memory_of(self)

    @property
    def nbytes(self) -> int:
        """The bytes that the cache holds on all devices."""
        return sum(sum(roles.values()) for roles in self.memory().values())

    def summary(self) -> str:
        """A table of what each layer holds: tokens per KV head, as `num_kept_tokens` counts them, and bytes."""
        return summary_of(self)

    def plot(self, row: int = 0) -> "Figure":
        """
        Draws how many tokens each layer holds, and which positions of a row they have. `pyramid_cache.plot` draws each
        of the two alone, and more. Of tokens that the cache brings back, those count that the last step attended to.

        Args:
            row (`int`, defaults to 0): The row of the batch.

        Returns:
            `matplotlib.figure.Figure`: A notebook shows it; `figure.savefig("kept.png")` writes it to a file.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: The cache holds nothing yet, or has no such row.
            RuntimeError: The last forward pass broke off.
        """
        from pyramid_cache.plot.kept import plot_cache

        return plot_cache(self, row)

    def show(
        self,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: torch.Tensor,
        row: int = 0,
        attention_mask: torch.Tensor | None = None,
    ) -> "KeptText":
        """
        The text of a row. The colour of a token says how many of the layers that evict hold it in at least one KV
        head. A notebook shows HTML with tooltips; `print` gives plain text. Of tokens that the cache brings back,
        those count that the last step attended to.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
            input_ids (`torch.Tensor`): `(batch, tokens)`, or `(tokens,)` of a single row: the first tokens that the
                cache has seen, such as the prompt, or the sequences that `generate` returned.
            row (`int`, defaults to 0): The row of the batch.
            attention_mask (`torch.Tensor`, *optional*): `(batch, tokens)`, as the model was given it. Columns behind
                its last one are tokens. Without a mask, the padding of a row is taken to be in front of it.

        Raises:
            ValueError: The cache holds nothing yet or has no such row, or `input_ids` or the mask do not fit what it
                has seen.
            RuntimeError: The last forward pass broke off.
        """
        from pyramid_cache.plot.text import read_kept_text

        return read_kept_text(self, tokenizer, input_ids, row, attention_mask)


def config_and_model(source: Any) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """
    A config and None for a config. For a model, its config and the model, out of any wrapper (PEFT, `torch.compile`).
    """
    modules = source.modules() if isinstance(source, torch.nn.Module) else ()
    model = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    return (source, None) if model is None else (model.config, model)
