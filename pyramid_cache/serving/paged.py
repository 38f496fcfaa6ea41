"""
transformers' paged cache with compressed requests.

The allocator counts the tokens that a request holds where transformers' own counts those that it has seen. The cache
hands the keys of each forward pass to a `BatchLayer`, whose `attend` serves one request after the other.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.generation.continuous_batching.requests import RequestState

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.policy_cache import PolicyCache
from pyramid_cache.serving.request import Pages, Request


class CompressedAllocator(FullAttentionCacheAllocator):
    """Blocks for compressed requests, whose numbers follow the tokens that they hold."""

    supports_block_sharing = False
    supports_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: dict[str, Request] = {}

    def num_held(self, request_id: str, past_length: int) -> int:
        """How many slots a request uses that has seen `past_length` tokens."""
        request = self.requests.get(request_id)
        return request.num_slots if request is not None and request.is_compressed else past_length

    def pages_of(self, request_id: str) -> list[Pages]:
        """The pages of a request, layer by layer."""
        table = torch.tensor(self.block_table[request_id], device=self.cache_tensor.device)
        offsets = torch.arange(self.tokens_per_page, device=table.device)
        rows = (table[:, None] * self.block_physical_stride + offsets).flatten()
        return [Pages(*self._kv_token_views[layer_idx], rows) for layer_idx in self.layer_indices]

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        return super().needs_new_blocks(request_id, self.num_held(request_id, past_length), query_length)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        super().allocate_cache_to_request(request_id, self.num_held(request_id, past_length), query_length)
        request = self.requests.get(request_id)
        if request is not None and request.parked is not None:
            request.unpark(self.pages_of(request_id))

    def free_behind(self, request_id: str) -> None:
        """Frees the blocks that a request no longer needs."""
        table = self.block_table[request_id]
        num_blocks = self._compute_blocks_needed(0, self.requests[request_id].num_slots, 0)
        self.pool.free_blocks(self.index, [block for block in table[num_blocks:] if self.ledger.release(block, True)])
        del table[num_blocks:]

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """
        Frees the blocks of a request. With `no_cache`, it has to wait and goes on later: its tokens are put aside. It
        is then freed a second time, before it waits.
        """
        request = self.requests.get(request_id)
        if request is not None and no_cache and request.is_compressed:
            if request.parked is None:
                request.park(self.pages_of(request_id))
            request.waits = False
        elif request is not None and request.parked is not None and not request.waits:
            request.waits = True
        else:
            self.requests.pop(request_id, None)
        super().free_blocks(request_id, no_cache)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        if source_request_id in self.requests:
            self.requests[dest_request_id] = self.requests[source_request_id].fork()
        return super().fork_blocks(source_request_id, dest_request_id, past_length)

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """What the mask covers: the new tokens. Requests have masks of their own."""
        return query_length


@dataclass
class BatchedTokens:
    """The new tokens of one request in a forward pass, in the order of the batch."""

    request_id: str
    num_seen: int
    num_new: int
    ends_prompt: bool
    pages: list[Pages] | None = None


class CompressedPagedCache(PagedAttentionCache):
    """A paged cache whose requests are compressed as the empty `PolicyCache` says that they are copies of."""

    def __init__(self, template: PolicyCache, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.template = template
        self.allocator = cast(CompressedAllocator, self.cache_allocators["full_attention"])
        # Requests that waited are found like prefixes that are known.
        self.use_prefix_sharing = True
        # Indices and masks do not depend on what is held: each request reads its own pages.
        self.read_cache_limit, self.max_tokens_read = 0, 1
        self.states: dict[str, RequestState] = {}
        self.batch: list[BatchedTokens] = []
        self.is_batch_read = False

    # What the scheduler asks.

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        self.states[state.request_id], self.is_batch_read = state, True  # the next batch is being made
        return super().can_store_request_tokens(state, request_len, dry_run)

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many tokens of a request are known since it had to wait."""
        request = self.allocator.requests.get(request_id)
        return 0 if request is None or request.parked is None else request.num_seen

    def count_new_complete_blocks(self, state: RequestState, request_len: int) -> dict[str, int]:
        return {}

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        super().free_blocks(request_id, no_cache)
        if request_id not in self.allocator.requests:
            self.states.pop(request_id, None)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        super().free_all_requests(clear_ledgers)
        self.allocator.requests.clear()  # those that wait have no blocks
        self.states.clear()

    # Forward passes.

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        if self.is_batch_read:
            self.batch, self.is_batch_read = [], False
        ends_prompt = not self.states[request_id].remaining_prefill_tokens
        self.batch.append(BatchedTokens(request_id, past_length, query_length, ends_prompt))
        write_index[0].extend([self.allocator.write_trash_index] * query_length)

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the keys over to `BatchLayer.attend`, which stores them."""
        key_states = key_states[:]
        key_states.cache_layer = BatchLayer(self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states


@dataclass
class BatchLayer:
    """One layer of the model in a forward pass over several requests."""

    cache: CompressedPagedCache
    layer_idx: int

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        """Attends for all requests, the tokens of which are one behind the other in the call."""
        allocator, outputs, start = self.cache.allocator, [], 0
        kwargs = {name: value for name, value in call.kwargs.items() if name not in PagedAttentionArgs.__annotations__}
        depth = allocator.layer_indices.index(self.layer_idx)
        for each in self.cache.batch:
            request = allocator.requests.get(each.request_id)
            if request is None:
                request = allocator.requests[each.request_id] = Request(self.cache.template)
            if each.pages is None:
                each.pages = allocator.pages_of(each.request_id)
            new = slice(start, start + each.num_new)
            query, key, value = (states[:, :, new] for states in (call.query, call.key, call.value))
            own = replace(call, query=query, key=key, value=value, mask=None, kwargs=kwargs)
            outputs.append(request.attend(own, depth, each.num_seen, each.ends_prompt, each.pages[depth]))
            start += each.num_new
            if each.ends_prompt and depth == len(allocator.layer_indices) - 1:
                request.is_compressed = True
                allocator.free_behind(each.request_id)
        return torch.cat(outputs, dim=1), None
