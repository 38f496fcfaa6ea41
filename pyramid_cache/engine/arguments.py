"""Checks of what callers hand to a cache. Each function raises ValueError for a bad argument."""

import operator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pyramid_cache.engine.architectures import reason_against


def as_tokens_to_remove(number: int) -> int:
    """The argument of `crop` as an int. Raises unless it is a negative integer or 0."""
    result = None if isinstance(number, bool) else as_int(number)
    if result is None or result > 0:
        raise ValueError(f"`crop({number!r})`: give the number of tokens to remove as a negative integer, or 0.")
    return result


def as_row_indices(indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    The int64 indices of the rows that indices or a bool mask choose, of a cache with `num_rows` (-1: not known).
    Raises if there are none, or no such rows. Indices on an accelerator are not read: beam search would wait for it.
    """
    try:
        rows = indices if isinstance(indices, torch.Tensor) else torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"Rows are chosen by a 1-D tensor of integers, not by {indices!r}.") from None
    if rows.dim() == 1 and rows.dtype == torch.bool:
        if num_rows not in (-1, rows.shape[0]):
            raise ValueError(f"A mask over {rows.shape[0]} rows was given to a cache of {num_rows} rows.")
        rows = rows.nonzero().flatten()
    if rows.dim() == 1 and not rows.shape[0]:
        raise ValueError(f"{indices!r} chooses no row. Use a new cache, or call `cache.reset()`, for another batch.")
    if rows.dim() != 1 or rows.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"Rows are chosen by a 1-D tensor of integers, not by one of shape {tuple(rows.shape)} and {rows.dtype}."
        )
    if num_rows != -1 and rows.device.type == "cpu" and not ((rows >= -num_rows) & (rows < num_rows)).all():
        raise ValueError(f"{rows.tolist()} cannot be chosen from a cache of {num_rows} rows.")
    return rows.long()


def as_repeats(number: int) -> int:
    """The argument of `batch_repeat_interleave` as an int. Raises unless it is a positive integer."""
    result = as_int(number)
    if result is None or result < 1:
        problem = f"`batch_repeat_interleave({number!r})`"
        raise ValueError(f"{problem}: give how often to repeat each row, a positive integer.")
    return result


def as_int(number: Any) -> int | None:
    """An integer of whatever kind, None for something else."""
    try:
        return operator.index(number)
    except TypeError:
        return None


def check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Raises unless these are keys and values of the same new tokens."""
    for states in (key_states, value_states):
        if not isinstance(states, torch.Tensor) or not states.is_floating_point():
            given = states.dtype if isinstance(states, torch.Tensor) else f"a {type(states).__name__}"
            raise ValueError(f"Keys and values must be tensors of real numbers, but {given} was given.")
    shapes = tuple(key_states.shape), tuple(value_states.shape)
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:3] != shapes[1][:3] or 0 in (*shapes[0], *shapes[1]):
        raise ValueError(
            f"Keys of shape {shapes[0]} and values of shape {shapes[1]} are not (batch, kv_heads, tokens, head_dim) "
            "of the same tokens, one at least."
        )
    if key_states.device != value_states.device:
        raise ValueError(f"Keys are on {key_states.device}, values on {value_states.device}.")


def check_decoder_config(config: PreTrainedConfig) -> None:
    """Raises unless `config` is that of a decoder (ValueError) whose attention is served (NotImplementedError)."""
    if not isinstance(config, PreTrainedConfig):
        given = f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"
        raise ValueError(f"`config` must be the config of a model (`model.config`), but is {given}.")
    text_config = config.get_text_config(decoder=True)
    if not isinstance(getattr(text_config, "num_hidden_layers", None), int):
        raise ValueError(f"A model of type {config.model_type!r} has no decoder layers, and so no KV cache.")
    # The architectures with a masked language model are encoders, unless they were told to be decoders.
    is_decoder = config.is_encoder_decoder or getattr(text_config, "is_decoder", False)
    if text_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise ValueError(
            f"A model of type {config.model_type!r} is an encoder: it attends in both directions and has no KV cache."
        )
    check_implementation(text_config._attn_implementation)
    reason = reason_against(text_config)
    if reason is not None:
        raise NotImplementedError(
            f"A model of type {config.model_type!r} cannot be compressed: {reason}. Use DynamicCache for it."
        )


def check_implementation(implementation: str | None) -> None:
    """Raises NotImplementedError unless it is an attention function whose logits and masks are known."""
    if implementation not in (None, "eager", "sdpa") and "flash" not in implementation:
        raise NotImplementedError(
            f"attn_implementation={implementation!r} is not known to pyramid_cache, which must attend and make masks "
            "in its place. Load the model with 'sdpa', 'eager' or 'flash_attention_2'."
        )
