"""
One request of a batch. Its keys and values are in the pages of a paged cache; here is what a cache knows of them.

A request has a layer of a `PolicyCache` for each layer of the model. Between two forward passes the layers have no
keys and values. They get them from the pages when they attend, and give back what they have changed. So a request
keeps what `generate` keeps with the same cache.
"""

import copy
from dataclasses import replace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.policy_cache import PolicyCache


class Pages:
    """The keys and values of one layer of the model, `(rows, kv_heads, head_dim)` each, and the rows of a request."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        self.keys, self.values, self.rows = keys, values, rows

    def read(self, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(1, kv_heads, num_slots, head_dim)` of the first slots. Those without a row hold any."""
        rows = self.rows[:num_slots]
        if len(rows) < num_slots:
            rows = torch.nn.functional.pad(rows, (0, num_slots - len(rows)))
        keys, values = (pages.index_select(0, rows).transpose(0, 1)[None] for pages in (self.keys, self.values))
        return keys, values

    def write(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts keys and values `(1, kv_heads, slots, head_dim)` into the slots from `first` on."""
        rows = self.rows[first : first + key.shape[2]]
        for pages, new in ((self.keys, key), (self.values, value)):
            pages.index_copy_(0, rows, new[0].transpose(0, 1))

    def write_one(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes one slot of each head, `(kv_heads or 1,)`, out of `(1, kv_heads, slots, head_dim)` into its row."""
        heads = torch.arange(keys.shape[1], device=keys.device)
        slots = slots.expand(len(heads))
        for pages, held in ((self.keys, keys), (self.values, values)):
            pages[self.rows[slots], heads] = held[0, heads, slots]


class Request:
    """The compressed tokens of a request. `cache` is an empty `PolicyCache`, of which each request has a copy."""

    def __init__(self, cache: PolicyCache) -> None:
        shared = (cache.frequencies, cache.masks, cache.policy)
        self.layers: list[EvictingLayer] = copy.deepcopy(cache.layers, {id(each): each for each in shared})
        # How many queries of a prompt its scores need, and those of the chunks read so far, by layer.
        self.num_queries = queries_needed(self.layers[0])
        self.queries: dict[int, torch.Tensor] = {}
        # Whether the prompt has been read, and the tokens that stayed are in the first slots.
        self.is_compressed = False
        # The keys and values of all layers, while the request waits without pages.
        self.parked: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.waits = False

    def fork(self) -> "Request":
        """A copy, for another answer to the same prompt, which has not been read to its end."""
        other = copy.copy(self)
        other.layers, other.queries = copy.deepcopy(self.layers), dict(self.queries)
        return other

    @property
    def num_slots(self) -> int:
        """How many slots hold the tokens, of each layer."""
        numbers = {layer.state.length for layer in self.layers}
        if len(numbers) > 1:
            raise RuntimeError(f"Layers of a request hold different numbers of tokens: {sorted(numbers)}.")
        return numbers.pop()

    @property
    def num_seen(self) -> int:
        """How many tokens a compressed request has seen."""
        return self.layers[0].state.num_seen

    # Forward passes.

    def attend(
        self, call: AttentionCall, layer_idx: int, num_seen: int, ends_prompt: bool, pages: Pages
    ) -> torch.Tensor:
        """
        Attention of new tokens, and the eviction that follows.

        Args:
            call (`AttentionCall`): With the queries, keys and values of these tokens alone.
            num_seen (`int`): How many tokens came before.
            ends_prompt (`bool`): Whether they are the last tokens of the prompt.
            pages (`Pages`): Where the request has its tokens.

        Returns:
            `torch.Tensor`: The output `(1, num_queries, heads, value_dim)`.
        """
        if self.is_compressed:
            return self._step(call, self.layers[layer_idx], pages)
        pages.write(num_seen, call.key, call.value)
        if not ends_prompt:
            self._remember_queries(layer_idx, call.query)
            key, value = pages.read(num_seen + call.num_queries)
            return replace(call, key=key, value=value, mask=chunk_mask(call, key.shape[2])).run()[0]
        return self._end_prompt(call, layer_idx, pages, num_seen + call.num_queries)

    def _remember_queries(self, layer_idx: int, query: torch.Tensor) -> torch.Tensor:
        """The queries that scores need, of this chunk and those before it."""
        if layer_idx in self.queries:
            query = torch.cat([self.queries[layer_idx], query], dim=2)
        self.queries[layer_idx] = query[:, :, -self.num_queries :] if self.num_queries else query
        return self.queries[layer_idx]

    def _end_prompt(self, call: AttentionCall, layer_idx: int, pages: Pages, length: int) -> torch.Tensor:
        """The last chunk, with the queries before it that scores need, as if all these had come at once."""
        layer, num_new = self.layers[layer_idx], call.num_queries
        query, key, value = call.query, call.key, call.value
        if num_new < length:
            earlier = self._remember_queries(layer_idx, query) if layer_idx in self.queries else query
            query = earlier if earlier.shape[2] > num_new else query
            key, value = pages.read(length)
            if (start := length - query.shape[2]) > 0:
                begin(layer, key[:, :, :start], value[:, :, :start])
            key, value = key[:, :, start:], value[:, :, start:]
        self.queries.pop(layer_idx, None)
        key, value = layer.update(key, value)
        call = replace(call, query=query, key=key, value=value)
        output = layer.attend(replace(call, mask=chunk_mask(call, length)))[0]
        state = layer.state
        if not state.is_dense:
            pages.write(0, *layer.store.attended())
        state.keys = state.values = None
        return output[:, -num_new:]

    def _step(self, call: AttentionCall, layer: EvictingLayer, pages: Pages) -> torch.Tensor:
        """A decode step."""
        state, store = layer.state, layer.store
        # As many slots as what else is known of the tokens has.
        sizes = [tensor.shape[2] for tensor in state.tensors("slot").values()]
        state.keys, state.values = pages.read(sizes[0] if sizes else state.length + 1)
        length, free, was_dense = state.length, state.free_slots, state.is_dense
        store.append(call.key, call.value)
        keys, values = store.attended()
        output = layer._attend_next(replace(call, key=keys, value=values, mask=None))[0]
        has_moved = was_dense != state.is_dense or state.length != length + (free is None)
        if has_moved or layer.policy.repositions:
            pages.write(0, *store.attended())
        else:
            slots = torch.tensor([length], device=keys.device) if free is None else free[0, :, 0]
            pages.write_one(slots, state.keys, state.values)
        state.keys = state.values = None
        return output

    # Waiting without pages.

    def park(self, pages: list[Pages]) -> None:
        """Takes the tokens of all layers out of their pages."""
        self.parked = [each.read(self.num_slots) for each in pages]

    def unpark(self, pages: list[Pages]) -> None:
        """Puts them into pages again."""
        for each, (keys, values) in zip(pages, self.parked or [], strict=True):
            each.write(0, keys, values)
        self.parked, self.waits = None, False


def begin(layer: EvictingLayer, key: torch.Tensor, value: torch.Tensor) -> None:
    """Gives an empty layer the first tokens of a prompt, whose queries no score needs."""
    layer.lazy_initialization(key, value)
    layer.store.append(key, value)
    state = layer.state
    state.num_seen = key.shape[2]
    state.row_lengths, state.row_held = [state.num_seen], [state.num_seen]
    state.next_position = layer.store.per_row(state.row_lengths)


def queries_needed(layer: EvictingLayer) -> int:
    """How many of the last queries of a prompt a layer needs, at least 2; 0 for all of them."""
    policy, own = layer.policy, type(layer.policy)
    watches = own.observe is not Policy.observe or own.num_queries is not Policy.num_queries
    sees_all = policy.window_size is None or watches or layer.compactor is not None
    return 0 if sees_all else max(policy.window_size or 0, 2)


def chunk_mask(call: AttentionCall, num_keys: int) -> torch.Tensor | None:
    """The causal mask of the last queries over all keys, in the form that the attention function takes."""
    if is_flash_attention_requested(call.module.config):
        return None
    if call.function is sdpa_attention_forward and call.num_queries == num_keys:
        return None
    is_visible = torch.ones(call.num_queries, num_keys, dtype=torch.bool, device=call.query.device)
    is_visible = is_visible.tril(num_keys - call.num_queries)[None, None]
    if call.function is sdpa_attention_forward:
        return is_visible
    mask = torch.zeros(is_visible.shape, dtype=call.query.dtype, device=call.query.device)
    return mask.masked_fill(~is_visible, torch.finfo(mask.dtype).min)
