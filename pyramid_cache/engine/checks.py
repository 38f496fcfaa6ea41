"""What a layer checks of the calls of a model and of users, with every text. It asks before anything is counted."""

from typing import TYPE_CHECKING, NoReturn

import torch

from pyramid_cache.engine.arguments import check_implementation
from pyramid_cache.engine.attention import AttentionCall, is_asked_for
from pyramid_cache.engine.tokens import Tokens
from pyramid_cache.ops.registration import needs_gradients


if TYPE_CHECKING:
    from pyramid_cache.engine.cache import CompressedCache
    from pyramid_cache.engine.evicting import EvictingLayer
    from pyramid_cache.engine.held import StoredLayer
    from pyramid_cache.engine.layer import CompressedLayer
    from pyramid_cache.engine.ranks import HeadRanks


WAY_WITHOUT_HIDDEN = (
    "call `cache.reset()` and give `generate` the whole history with this mask, or read each row with its own cache."
)


# `update`.


def check_attended(layer: "CompressedLayer") -> None:
    """Raises if the attention function never got the keys that `update` returned."""
    if layer.arrival is not None:
        raise RuntimeError(
            f"The attention of layer {layer.place.layer_idx} did not go through the attention interface of "
            "transformers, so the cache never saw its queries. Load the model with attn_implementation='sdpa', "
            "'eager' or 'flash_attention_2'; a model that supports none of them through the interface needs "
            "DynamicCache. After an interrupted forward pass, call `cache.reset()`."
        )


def check_fit(layer: "CompressedLayer", key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises if new keys and values do not fit those that the layer holds."""
    held, given = layer.layout, layer.layout_of(key, value)
    if given == held:
        return
    if given.batch_size != held.batch_size:
        repeats, rest = divmod(given.batch_size, held.batch_size)
        way_on = f"To go on from each row {repeats} times, call `cache.batch_repeat_interleave({repeats})` first. "
        raise ValueError(
            f"The cache holds {held.batch_size} rows, but the model was given {given.batch_size}. "
            f"{'' if rest else way_on}Use a new cache for another batch, or call `cache.reset()`."
        )
    raise ValueError(
        f"The cache holds {held}, but was given {given} by layer {layer.place.layer_idx}. Use a new cache for another "
        "model, or call `cache.reset()`."
    )


def check_fixed(layer: "CompressedLayer", key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises if new keys and values do not fit, or need gradients, which do not pass through steps of fixed shapes."""
    check_fit(layer, key, value)
    if torch.is_autocast_enabled(key.device.type):
        raise NotImplementedError(
            "Steps of fixed shapes do not run under autocast. Cast the model instead (`model.to(torch.bfloat16)`), or "
            "leave `cache.step()` out."
        )
    if needs_gradients(key, value):
        raise NotImplementedError(
            "Gradients do not pass through steps of fixed shapes. Call the model under `torch.no_grad()`, or leave "
            "`cache.step()` out."
        )


def refuse_steps(cache: "CompressedCache", max_length: int | None) -> NoReturn:
    """Raises the reason why steps cannot have fixed shapes."""
    if not cache.can_compile:
        raise NotImplementedError(
            "Steps cannot have fixed shapes: the model has layers without eviction (such as sliding windows) or an "
            "encoder, or its layers are on several devices or offloaded, or slots are quantised, or keys are thin, or "
            "layers share, or tokens may be taken back. Leave `cache.step()` out; compile without `fullgraph=True`, "
            "or not at all."
        )
    if max_length is None:
        raise ValueError(
            "A budget that holds everything needs room for the whole sequence: call `cache.step(max_length=...)` with "
            "the tokens of the prompt and the answer, or give the cache a smaller budget."
        )
    raise NotImplementedError(
        f"Steps cannot have fixed shapes: the sequence has reached `max_length={max_length}`, the host has no room "
        "for it (ShadowKVCache), a row has no token yet, or a mask has hidden tokens that were seen. Leave "
        "`cache.step()` out, or change `max_length`."
    )


# `attend`.


def check_protected(layer: "EvictingLayer", row_lengths: list[int]) -> None:
    """Raises unless every layer of the cache may keep the protected tokens of rows of these lengths."""
    place, protected = layer.place, layer.state.row_protected
    if not layer.protect or place.depth:  # one layer speaks for all
        return
    if not protected:
        raise ValueError(
            f"`protect` has positions for {len(layer.protect)} rows, but the model was given {layer.batch_size}. Give "
            "one list for each row of the batch, or one for all."
        )
    for row, (number, length) in enumerate(zip(protected, row_lengths, strict=True)):
        if layer.budget.is_unlimited or not length:
            continue
        kept = [
            max(layer.policy.num_tokens(length, layer.token_budget, depth, place.num_layers), 1)
            for depth in range(place.num_layers)
        ]
        if (least := min(kept)) < number:
            kind = "" if place.num_layers == place.model_depth else " of those that evict"
            raise ValueError(
                f"Layer {kept.index(least)}{kind} keeps {least} of the {length} tokens of row {row}, but {number} are "
                f"protected. Raise `budget` until this layer keeps at least {number}, or protect fewer tokens "
                "(`protect`)."
            )


def check_module(layer: "CompressedLayer", module: torch.nn.Module) -> None:
    """Raises if a layer that no attention module has filled so far cannot serve this one."""
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"{type(module).__name__} attends in both directions: it has no past that a KV cache could hold."
        )
    config = getattr(module, "config", None)
    depth = layer.place.model_depth if config is None else config.get_text_config(decoder=True).num_hidden_layers
    if depth != layer.place.model_depth:
        raise ValueError(
            f"The cache was built for {layer.place.model_depth} layers, but the model has {depth}. Build the cache "
            "from the config of the model that it is used with."
        )
    if layer.expected_weights is not None:
        layer.expected_weights.require_same(module)


def check_ranks(layer: "CompressedLayer", ranks: "HeadRanks | None") -> None:
    """Raises unless the layer can hold its part of heads that several ranks share."""
    rank, num_ranks = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    state = layer.state
    if any(state.row_lengths) and (state.rank, state.num_ranks) != (rank, num_ranks):  # it comes from a file
        raise ValueError(
            f"The cache was saved by rank {state.rank} of {state.num_ranks}, but this is rank {rank} of {num_ranks}. "
            "Load the file of the same rank, of a run with as many ranks."
        )
    if ranks is not None and layer.needs_whole_layers:
        raise NotImplementedError(
            f"The model is split over {num_ranks} ranks (tensor parallelism), and this cache compares all heads of a "
            "layer. Use one that does not, such as SnapKVCache, LayerDefensiveKVCache or TOVACache."
        )


def check_call(layer: "CompressedLayer", call: AttentionCall, num_new: int) -> None:
    """Raises if the layer cannot attend in the place of the model's attention function."""
    if call.num_queries != num_new:
        raise RuntimeError(
            f"Layer {layer.place.layer_idx} was given {num_new} tokens and asked for {call.num_queries} queries: the "
            "model's attention calls `update` in a way that pyramid_cache does not know. Use DynamicCache for this "
            "model."
        )
    owner = layer.module
    if owner is not None and owner is not call.module:
        raise ValueError(
            "The cache was filled by another model. Use a new cache for each model, or call `cache.reset()` before it "
            "changes hands."
        )
    implementation = getattr(getattr(call.module, "config", None), "_attn_implementation", None)
    if implementation != "paged|eager" or call.mask is None:  # which gets a mask in continuous batching alone
        check_implementation(implementation)
    if call.kwargs.get("position_bias") is not None:
        raise NotImplementedError("Attention with a learned position bias is not supported. Use DynamicCache.")
    if call.kwargs.get("dropout") and not layer.state.is_dense:
        raise NotImplementedError("Attention dropout is not supported once tokens are evicted. Call `model.eval()`.")


def check_step(layer: "CompressedLayer", call: AttentionCall) -> None:
    """Raises if a decode step's mask or position ids do not go on with the tokens that were seen."""
    if torch.compiler.is_compiling():  # which cannot read tensors
        return
    given = call.kwargs
    if ("dropout" in given and given["dropout"]) or ("position_bias" in given and given["position_bias"] is not None):
        check_call(layer, call, 1)
    lengths, num_seen = layer.state.row_lengths, layer.state.num_seen + 1
    expected = [length + 1 for length in lengths]
    if layer.place.depth == 0 and layer.state.has_traces:
        check_traces(layer, expected)
    shown = [num_seen] * len(lengths) if call.mask is None else expected
    if call.query.device.type == "cpu":  # reading tensors on an accelerator would wait for it at every token
        check_position_ids(layer, call, lengths)
        if call.mask is not None:
            shown = layer.masks.count(call.mask, len(lengths), num_seen)
    if shown != expected:
        problem = f"The attention mask shows {shown} tokens per row"
        if call.mask is None:
            problem = f"There is no attention mask, which would hide nothing of the {num_seen - 1} columns seen so far"
        raise ValueError(
            f"{problem}, but {lengths} tokens have been seen before this one. Pass a mask that covers the tokens in "
            "the cache and the new one, and hides padding only."
        )


def hides_tokens(layer: "CompressedLayer", call: AttentionCall) -> bool:
    """Whether the mask of one new token hides tokens that a layer without evictions has seen; known on a CPU only."""
    lengths, is_on_cpu = layer.state.row_lengths, call.query.device.type == "cpu"
    if torch.compiler.is_compiling() or call.mask is None or not is_on_cpu or not layer.state.is_dense:
        return False
    return sum(layer.masks.count(call.mask, len(lengths), layer.state.num_seen + 1)) < sum(lengths) + len(lengths)


def check_position_ids(
    layer: "CompressedLayer", call: AttentionCall, row_lengths: list[int], seen: Tokens | None = None
) -> None:
    """
    Raises if the position ids of new tokens are lower than those of tokens seen before: the model was given a sequence
    from its start again. Higher ids are allowed, since the ids of some models count padding. `row_lengths` does not
    count the new tokens, `seen` does. Without it, new columns of a row are tokens if their position ids rise by one.
    """
    position_ids, num_new = call.kwargs.get("position_ids"), call.num_queries
    if layer.place.depth or position_ids is None or not any(row_lengths):  # one layer speaks for all
        return
    if position_ids.shape[1:] != (num_new,):
        return
    ends = torch.cat([position_ids[:, :1], position_ids[:, -1:]], dim=1).expand(len(row_lengths), -1).tolist()
    if seen is not None:
        lengths = seen.row_lengths
    else:
        rises = [last - first == num_new - 1 for first, last in ends]
        lengths = [length + num_new if each else 0 for each, length in zip(rises, row_lengths, strict=True)]
    if any(last < length - 1 for (_, last), length in zip(ends, lengths, strict=True)):
        raise ValueError(
            f"`position_ids` end at {[last for _, last in ends]}, but the cache has seen {row_lengths} tokens: it is "
            "fed a sequence from its start again. Give `generate` the whole history with new tokens at its end, and "
            "neither `use_cache=False` nor an assistant with a cache in use; or call `cache.reset()` for another "
            "sequence."
        )


def read_tokens(layer: "CompressedLayer", call: AttentionCall) -> tuple[Tokens, bool]:
    """
    The columns that all rows have seen, the new ones included, as the mask shows them; and whether it now hides
    tokens that it showed before. Raises if they do not go on with those that the layer has seen.
    """
    num_new = call.num_queries
    num_earlier, expected = layer.get_seq_length(), layer.num_seen_per_row
    num_rows, device = call.query.shape[0], call.query.device
    try:
        tokens = layer.masks.read(call.mask, num_rows, num_new, num_earlier + num_new, device)
    except ValueError:  # a mask may be short because the sequence was restarted: report that instead
        check_position_ids(layer, call, expected)
        raise
    earlier = [num_earlier] * num_rows
    if tokens.has_gaps:
        earlier = (tokens.positions[:, 0, :num_earlier] >= 0).sum(dim=-1).tolist()
    if not tokens.ends_in_padding:
        check_position_ids(layer, call, expected, tokens)
    hides_some = earlier != expected
    if hides_some:
        if not may_hide(layer, tokens.positions[..., :num_earlier], earlier):
            raise ValueError(
                f"The attention mask shows {earlier} earlier tokens per row, but {expected} have been seen. Pass a "
                "mask that covers the tokens in the cache as it did when they were new. It may hide padding behind an "
                "answer that ended first only while the budget holds everything and nothing is recorded. Otherwise "
                f"{WAY_WITHOUT_HIDDEN}"
            )
    if hides_some or layer.state.has_traces:
        check_traces(layer, tokens.row_lengths)
    return tokens, hides_some


def may_hide(layer: "CompressedLayer", shown: torch.Tensor, earlier: list[int]) -> bool:
    """
    Whether a mask may show fewer tokens than earlier ones: it hides the last tokens of some rows, as padding that
    `generate` has put behind an answer, and no layer of the cache has evicted any. It shows these positions
    `(batch, 1, columns)`, which are those of so many `earlier` tokens of each row.
    """
    if layer.pending.is_on or not layer.state.is_dense or not layer.has_room(layer.state.row_lengths):
        return False
    held = layer.store.column_tokens(shown.shape[-1]).positions
    return torch.equal(held.masked_fill(held >= layer.store.per_row(earlier), -1), shown.to(held.device))


def check_traces(layer: "CompressedLayer", row_lengths: list[int]) -> None:
    """Raises if a layer of the cache may evict from rows of these lengths, and hidden tokens have a part in it."""
    if not layer.has_room(row_lengths):
        raise ValueError(
            "The cache has to evict, or to choose channels, and tokens that the attention mask hides since the last "
            "turn, such as padding behind an answer that ended first, or that `crop` has taken back, would have a "
            "part in the choice. "
            f"Therefore {WAY_WITHOUT_HIDDEN}"
        )


def check_left_padding(tokens: Tokens, need: str) -> None:
    """Raises if a row ends in padding, which would be taken for a gap."""
    if tokens.ends_in_padding:
        raise NotImplementedError(
            f"Some rows of the batch are padded on the right, and the cache {need}. Pad on the left "
            "(tokenizer.padding_side = 'left'), as `generate` asks for anyway."
        )


def check_scores(layer: "EvictingLayer", scores: torch.Tensor | None, key: torch.Tensor) -> None:
    """Raises unless a policy's scores have one number for each token."""
    if scores is None:
        raise ValueError(
            f"`{type(layer.policy).__name__}.score` returned None. It must return a tensor. `view.attention` is None "
            "unless the policy has a `window_size`."
        )
    is_shared = layer.policy.heads_share_tokens
    expected = (key.shape[0], 1 if is_shared else key.shape[1], key.shape[2])
    if scores.shape != expected:
        raise ValueError(
            f"`{type(layer.policy).__name__}.score` returned {tuple(scores.shape)} instead of {expected}: (batch, "
            f"{'1, since heads share tokens' if is_shared else 'kv_heads'}, tokens)."
        )


def check_own_slots(layer: "EvictingLayer", key: torch.Tensor) -> None:
    """Raises unless what a policy remembers of each token has a place for each."""
    heads = (1,) if layer.policy.heads_share_tokens else (1, key.shape[1])
    for name in set(layer.state.own_slots) - {"bias"}:
        tensor = getattr(layer.state, name)
        if tensor is not None and tuple(tensor.shape[:3]) not in [(key.shape[0], num, key.shape[2]) for num in heads]:
            raise ValueError(
                f"`{type(layer.policy).__name__}.observe` left `{name}` with the shape {tuple(tensor.shape)}. It must "
                f"be ({key.shape[0]}, {' or '.join(map(str, heads))}, {key.shape[2]}): (batch, kv_heads or 1, tokens)."
            )


def check_attentions() -> None:
    """Raises if the running forward pass collects attention weights, of which those of evicted tokens are missing."""
    if is_asked_for("attentions"):
        raise NotImplementedError(
            "`output_attentions=True`: attention weights over a cache that evicts have no columns for what was "
            "evicted. Use DynamicCache, or a budget that holds the whole sequence."
        )


def check_rotary(layer: "EvictingLayer") -> None:
    """Raises if a policy may not ask how keys are rotated, or nobody can tell: only a module that runs shows it."""
    if not layer.needs_rotary:
        raise ValueError(
            f"`{type(layer.policy).__name__}` asks its view for `rotary`, but does not say that it needs it. Set its "
            "`needs_rotary = True`."
        )
    if layer.module is None:
        raise RuntimeError(
            "How the model rotates keys is known once it has run with this cache. Give it the next tokens before you "
            "call `compress`."
        )


# `get_mask_sizes`, `crop`, files.


def check_new_tokens(num_new: int, num_seen: int) -> None:
    """Raises if a forward pass would have no tokens."""
    if num_new == 0:
        raise ValueError(
            f"There are no new tokens: the cache has seen {num_seen}, and `generate` takes its prompt for the whole "
            "history. Give `generate` the history with new tokens at its end, or new tokens and an attention mask "
            "over everything seen. For another prompt, use a new cache."
        )


def check_crop(layer: "CompressedLayer", tokens_to_remove: int) -> None:
    """Raises unless `crop(tokens_to_remove)` is possible."""
    check_attended(layer)
    num_columns, num_seen = -tokens_to_remove, layer.get_seq_length()
    if num_columns > num_seen:
        raise ValueError(f"`crop({tokens_to_remove})`: only {num_seen} tokens have been seen.")
    if num_columns > layer.pending.num_columns and not layer.is_croppable:
        raise NotImplementedError(
            f"`crop({tokens_to_remove})`: layer {layer.place.layer_idx} has evicted tokens since, or quantised "
            "them, or thinned their keys, and that cannot be undone. Call `cache.activate_past_recording()` before "
            "the tokens that may be taken back are seen."
        )
    if num_columns and layer.pending.ends_in_padding_without(num_columns):
        raise NotImplementedError(
            f"`crop({tokens_to_remove})` would take all tokens of a row and leave padding in front of them. Take back "
            "more or less."
        )
    if layer.pending.chunks and not any(layer.state.row_lengths):
        chunk, *later = layer.pending.chunks
        num_taken = min(max(num_columns - sum(each.num_columns for each in later), 0), chunk.num_columns)
        layer.check_lengths(chunk.seen.without_last(num_taken).row_lengths)
    check_settleable(layer)


def check_settleable(layer: "CompressedLayer") -> None:
    """Raises if recorded tokens need the attention module for their eviction, and the model is gone."""
    if layer.pending.chunks and layer.module is None:
        raise RuntimeError(
            "The model that filled the cache is gone, so what it recorded cannot be evicted any more. Call "
            "`cache.reset()`."
        )


def check_savable(layer: "StoredLayer") -> None:
    """Raises if a file cannot hold the layer's keys and values."""
    if layer.is_initialized and layer.layout.dtype != layer.layout.value_dtype:
        raise NotImplementedError(
            f"The cache was filled under autocast: keys are {layer.layout.dtype}, values {layer.layout.value_dtype}, "
            "and a file holds one dtype. Cast the model instead (`model.to(torch.bfloat16)`) to save its caches."
        )
