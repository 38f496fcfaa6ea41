"""
Pruning of hidden states between layers while a prompt is read (PyramidInfer): the only file that hooks a model.

The decoder layers of a model get a pre-hook and a post-hook once. Both do nothing unless the layer is called with a
cache that prunes hidden states and was built from this very model. Before a layer runs, the pre-hook gathers the
hidden states of the tokens that the cache layer below has kept, their position embeddings, position ids and mask.
Tokens keep their positions. Rows are aligned on the right, so that the last token stays last. After the layer, the
post-hook returns hidden states to their columns, with NaN in those of dropped tokens: between layers, some models add
features of an image to the tokens that stand for it (DeepStack of Qwen3-VL).
"""

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from pyramid_cache.engine.attention import is_asked_for
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens, causal_mask


# The arguments of decoder layers that can be pruned, or have no token dimension.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
KNOWN_ARGUMENTS = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", *CACHE_ARGUMENTS}


class PrunedPrefill(MaskReader):
    """
    The reader of masks of one cache, which knows what columns of the prompt the running layer computes.

    Args:
        model (`PreTrainedModel`): The model whose hidden states are pruned. Only a weak reference is kept.
        depth (`float`): The share of its layers that compute the whole prompt.

    Raises:
        NotImplementedError: The decoder has no list of layers.
    """

    def __init__(self, model: PreTrainedModel, depth: float) -> None:
        super().__init__()
        decoder = hook_decoder(model)
        self.decoder: weakref.ref[Any] = weakref.ref(decoder)
        self.first_pruned = int(depth * len(decoder.layers))  # type: ignore[arg-type]
        self.finish()

    def finish(self) -> None:
        """The prompt has been read."""
        self.columns: torch.Tensor | None = None
        # What the running layer computes; None unless a prompt is being read whose hidden states are pruned.
        self.tokens: Tokens | None = None
        # Whether the first layer has been entered, which only the hooks tell.
        self.is_entered = False

    def read(
        self,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        num_queries: int,
        num_keys: int,
        device: torch.device,
    ) -> Tokens:
        """The tokens that the running layer computes; otherwise as `MaskReader.read`."""
        if num_queries == num_keys and not self.is_entered:
            raise ValueError(
                "The cache was built from another model than it is used with, so hidden states cannot be pruned. "
                "Build it from this model, or from its config."
            )
        if self.columns is not None:
            return self.tokens
        return super().read(attention_mask, batch_size, num_queries, num_keys, device)

    def index_of(self, layer: nn.Module) -> int | None:
        """The index of a decoder layer; None if it belongs to another model, such as a copy of this one."""
        decoder = self.decoder()
        layers = () if decoder is None else decoder.layers
        return next((index for index, other in enumerate(layers) if other is layer), None)

    def _move_to(self, device: torch.device) -> None:
        """Moves the state to the device of the hidden states."""
        self.tokens = self.tokens.to(device)
        self.columns = None if self.columns is None else self.columns.to(device)

    def prune(self, kept: torch.Tensor) -> None:
        """
        The next layer computes the tokens that a layer has kept.

        Args:
            kept (`torch.Tensor`): `(batch, 1, kept)` int32, their positions; -1 behind the last of a shorter row.
        """
        self._move_to(kept.device)
        kept = kept.sort(dim=-1).values  # -1 first: rows end in their last token
        indices = torch.searchsorted(self.tokens.positions.contiguous(), kept).masked_fill(kept < 0, -1)
        positions = gather_tokens(self.tokens.positions, indices).masked_fill(indices < 0, -1)
        row_present = (indices >= 0).sum(dim=-1).flatten().tolist()
        if self.columns is not None:
            indices = gather_tokens(self.columns, indices).masked_fill(indices < 0, -1)
        self.columns = indices
        self.tokens = Tokens(positions, self.tokens.row_lengths, row_present, self.tokens.num_seen)

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_seen, hidden_size)`: hidden states in their own columns, NaN in those of dropped tokens."""
        self._move_to(hidden_states.device)
        batch_size, _, hidden_size = hidden_states.shape
        num_seen = self.tokens.num_seen
        # One more column takes the padding.
        result = hidden_states.new_full((batch_size, num_seen + 1, hidden_size), float("nan"))
        columns = torch.where(self.columns >= 0, self.columns, num_seen)[:, 0, :, None].expand_as(hidden_states)
        return result.scatter(1, columns, hidden_states)[:, :num_seen]


def hook_decoder(model: PreTrainedModel) -> nn.Module:
    """Installs the hooks on a model's decoder layers, once, and returns the decoder."""
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder, whose hidden states cannot be pruned: layers attend to "
            "the encoder too. Build the cache from `model.config`: each decoder layer then prunes its own keys and "
            "values."
        )
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NotImplementedError(
            f"{type(model).__name__} has no `get_decoder().layers` whose hidden states could be pruned. Build the "
            "cache from `model.config`: each layer then prunes its own keys and values."
        )
    for layer in layers:
        # Looked up on the layer itself: copies of a model, and models that were saved and loaded, bring their hooks
        # along.
        if _before_layer not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
            layer.register_forward_hook(_after_layer, with_kwargs=True)
    return decoder


def _cache_of(arguments: dict[str, Any]) -> Any:
    """The cache that a decoder layer is called with, by whatever name."""
    for name in CACHE_ARGUMENTS:
        if name in arguments and arguments[name] is not None:
            return arguments[name]
    return None


def _state_of(arguments: dict[str, Any]) -> PrunedPrefill | None:
    """The state of the cache that a decoder layer is called with, if that cache prunes hidden states."""
    state = getattr(_cache_of(arguments), "masks", None)
    return state if isinstance(state, PrunedPrefill) else None


def _read_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any, int | None]:
    """The arguments of a call by name, the state of its cache, and the index of the layer if hidden states go."""
    arguments = dict(inspect.signature(layer.forward).bind_partial(*args).arguments) | kwargs
    state = _state_of(arguments)
    return arguments, state, None if state is None else state.index_of(layer)


def _has_nothing_to_prune(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a layer is surely not called to read a prompt. Compilers trace this, and break the graph otherwise."""
    if args[1:]:
        return False
    cache = _cache_of(kwargs)
    state = getattr(cache, "masks", None)
    if type(state) is not PrunedPrefill:
        return True
    # In a graph numbers that change are not read.
    return state.tokens is None and (cache.is_compileable or cache.layers[0].state.num_seen > 0)


def _before_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    return None if _has_nothing_to_prune(args, kwargs) else _enter_layer(layer, args, kwargs)


@torch.compiler.disable
def _enter_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    arguments, state, index = _read_call(layer, args, kwargs)
    if index is None:
        return None
    cache, hidden_states = _cache_of(arguments), arguments["hidden_states"]
    if index == 0:
        state.finish()
        state.is_entered = True
        # Tokens that may be taken back are read in full: nothing is known to be dropped before `crop`.
        if cache.get_seq_length() == 0 and not cache.layers[0].record_past:
            if is_asked_for("hidden_states"):
                raise NotImplementedError(
                    "`output_hidden_states=True`: a cache built from the model drops hidden states between layers. "
                    "Build it from `model.config`."
                )
            batch_size, num_columns = hidden_states.shape[:2]
            check_arguments(layer, arguments, num_columns)
            mask = arguments.get("attention_mask")
            state.tokens = state.read(mask, batch_size, num_columns, num_columns, hidden_states.device)
        return None
    if state.columns is None:
        return None
    # On several devices some hooks have moved the hidden states to the layer by now, and some do it later.
    state._move_to(hidden_states.device)
    num_columns = state.columns.shape[-1]
    try:  # what an earlier layer has returned, whole or pruned, may come back
        check_arguments(layer, arguments, hidden_states.shape[1], num_columns)
    except NotImplementedError:
        cache.reset()  # it was empty before this prompt
        raise
    hidden_states = gather_tokens(hidden_states[:, None], state.columns)[:, 0]
    # Padding is masked, but NaN would come through.
    arguments["hidden_states"] = hidden_states.masked_fill(state.columns[:, 0, :, None] < 0, 0)
    implementation = state.decoder().config._attn_implementation
    key_mask = state.tokens.positions >= 0 if state.tokens.has_gaps else None
    like = hidden_states.dtype, hidden_states.device
    arguments["attention_mask"] = causal_mask(implementation, key_mask, num_columns, num_columns, *like)
    for name in ("position_ids", "position_embeddings"):
        if arguments.get(name) is not None:
            arguments[name] = tree_map(lambda part: gather_rows(part, state.columns), arguments[name])
    return (), arguments


def _after_layer(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor | tuple
) -> torch.Tensor | tuple | None:
    return None if _has_nothing_to_prune(args, kwargs) else _leave_layer(layer, args, kwargs, output)


@torch.compiler.disable
def _leave_layer(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor | tuple
) -> torch.Tensor | tuple | None:
    arguments, state, index = _read_call(layer, args, kwargs)
    if index is None or state.tokens is None:
        return None
    hidden_states = output[0] if isinstance(output, tuple) else output
    if state.columns is not None:
        hidden_states = state.restore(hidden_states)
    cache = _cache_of(arguments)
    held = cache.layers[index].state
    is_whole = held.is_dense or held.row_held == state.tokens.row_present
    if index + 1 == len(cache.layers):
        state.finish()
    elif not is_whole and index + 1 >= state.first_pruned:
        state.prune(held.positions)
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def check_arguments(layer: nn.Module, arguments: dict[str, Any], num_columns: int, num_pruned: int = -1) -> None:
    """Raises if an argument of a decoder layer has a token dimension and this file cannot prune it."""
    if arguments["hidden_states"].dim() != 3:
        raise NotImplementedError(
            f"{type(layer).__name__} is called with hidden states of shape {tuple(arguments['hidden_states'].shape)} "
            "instead of (batch, tokens, hidden_size). Build the cache from `model.config`."
        )
    for name, value in arguments.items():
        if name in KNOWN_ARGUMENTS:
            continue
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and {num_columns, num_pruned} & {*tensor.shape}:
                raise NotImplementedError(
                    f"{type(layer).__name__} is called with `{name}` of shape {tuple(tensor.shape)}, which is not "
                    "known how to prune along with hidden states. Build the cache from `model.config`."
                )
    for tensor in tree_leaves(arguments.get("position_embeddings")):
        if tensor is not None and (tensor.dim() != 3 or tensor.shape[1] != num_columns):
            raise NotImplementedError(
                f"{type(layer).__name__} is called with position embeddings of shape {tuple(tensor.shape)} instead of "
                f"(batch, {num_columns}, rotary_dim). Build the cache from `model.config`."
            )


def gather_rows(value: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    The columns of position ids `(batch or 1, tokens)` or position embeddings `(batch or 1, tokens, rotary_dim)`.

    Args:
        columns (`torch.Tensor`): `(batch, 1, kept)`. An index of -1 gives the first column, which is masked.
    """
    value = value.expand(columns.shape[0], *value.shape[1:])
    return gather_tokens(value[:, None], columns.to(value.device))[:, 0]
