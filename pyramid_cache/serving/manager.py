"""Continuous batching whose requests are compressed."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import cache as paged_cache
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.policy_cache import PolicyCache
from pyramid_cache.engine.quantized_store import QuantizedStore
from pyramid_cache.serving.paged import CompressedAllocator, CompressedPagedCache


_building = threading.Lock()


@contextlib.contextmanager
def compressed(model: PreTrainedModel, cache: PolicyCache) -> Iterator[None]:
    """
    Within it, continuous batching of `model` compresses each request as `cache` would: `model.generate_batch`,
    `model.continuous_batching_context_manager`, and managers of `model.init_continuous_batching`.

    A request holds its prompt until this has been read. Then it keeps what `cache` keeps, and frees its other blocks
    for other requests. Its tokens are those of `model.generate(..., past_key_values=cache)` alone.

    Args:
        model (`PreTrainedModel`): Any model that transformers can batch, all of whose layers have full attention.
        cache (`PolicyCache`): An empty cache, of which each request gets a copy. A budget in bytes is for one request.

    Raises:
        ValueError: `cache` has seen tokens, or is no cache that evicts by scores.
        NotImplementedError: Its heads or layers keep different numbers of tokens, or change them in another way than
            requests allow; the model has layers of other kinds, RoPE that depends on the batch, or a softcap.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import SnapKVCache
    >>> from pyramid_cache.serving import compressed

    >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> with compressed(model, SnapKVCache(model.config, budget=16, window_size=8)):
    ...     outputs = model.generate_batch([list(range(3, 50)), list(range(9))], max_new_tokens=8)
    >>> [len(output.generated_tokens) for output in outputs.values()]
    [8, 8]

    ```
    """
    model = getattr(model, "get_base_model", lambda: model)()  # of PEFT, which hands calls on to it
    cache = copy.deepcopy(cache)
    check_template(model, cache)
    name = "init_continuous_batching"
    if name in vars(model):
        raise ValueError("`compressed` is active for this model already. Leave one of the two out.")
    setattr(model, name, CompressedInit(model, cache))
    try:
        yield
    finally:
        delattr(model, name)
        if isinstance(getattr(model, "_cached_continuous_batching_manager", None), CompressedManager):
            cast(Any, model).destroy_cached_continuous_batching_manager()


class CompressedInit:
    """What a model has in the place of its `init_continuous_batching`. A copy of the model gets its own back."""

    def __init__(self, model: PreTrainedModel, cache: PolicyCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, *args: Any, **kwargs: Any) -> "CompressedManager":
        return init_continuous_batching(self.model, self.cache, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return partial(cast(Any, type(self.model)).init_continuous_batching, memo[id(self.model)])


def init_continuous_batching(
    model: PreTrainedModel,
    template: PolicyCache,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> "CompressedManager":
    """`ContinuousMixin.init_continuous_batching` of a model whose requests are compressed."""
    known = getattr(model, "_cached_continuous_batching_manager", None)
    if isinstance(known, CompressedManager):
        known.switch_to_cb_friendly_attn(cast(Any, model), known.continuous_batching_config.auto_switch_to_flash)
        return known
    if isinstance(known, ContinuousBatchingManager):
        raise ValueError(
            "The model keeps a manager of requests that are not compressed (`persistent_manager=True`). Call "
            "`model.destroy_cached_continuous_batching_manager()` first."
        )
    generation = copy.copy(generation_config or model.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = -1
    given = continuous_batching_config or getattr(generation, "continuous_batching_config", None)
    batching = copy.copy(given or ContinuousBatchingConfig())
    check_batching(batching)
    batching.use_async_batching, batching.use_cuda_graph, batching.allow_block_sharing = False, False, False
    return CompressedManager(template, model, generation, batching, workload_hints)


class CompressedManager(ContinuousBatchingManager):
    """transformers' manager of requests, which are compressed."""

    def __init__(self, template: PolicyCache, *args: Any) -> None:
        self.template = template
        super().__init__(*args)
        self.begun_layer = begun_layer(cast(Any, self.model), template)
        if self.distributed_helper.tp_size > 1:
            raise NotImplementedError(
                "Requests of a model that several processes share (tensor parallelism) are not compressed. Load the "
                "model on one device, or leave `compressed` out."
            )

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """A prompt that the cache or the blocks refuse gives an output with an `error`, as all that fails here."""
        try:
            self.check_prompt(len(input_ids), max_new_tokens)
        except ValueError as error:
            if request_id is None:
                with self._request_lock:
                    request_id, self._request_counter = f"req_{self._request_counter}", self._request_counter + 1
            children = [f"{request_id}__child#{index}" for index in range(self.num_return_sequences - 1)]
            for each in (request_id, *children):
                self.output_router.fail_and_deliver(RequestState(each, list(input_ids)), error)
            return request_id
        return super().add_request(input_ids, request_id, max_new_tokens, *args, **kwargs)

    def check_prompt(self, length: int, max_new_tokens: int | None) -> None:
        """Raises ValueError for a request that would end all others: one without tokens, or beyond all blocks."""
        least = 2 if self.num_return_sequences > 1 else 1
        if length < least:
            raise ValueError(f"A prompt of {length} tokens: a request needs {least} or more.")
        config, layer = self.continuous_batching_config, self.begun_layer
        layer.check_lengths([length])
        num_new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        whole = length + (num_new or 1) - 1  # the last token is not stored
        kept = whole if layer.budget.is_unlimited else layer.num_tokens_to_keep(length) + layer.eviction_interval
        num_blocks = -(-max(length, min(whole, kept)) // config.page_size)
        if config.num_blocks is not None and num_blocks > config.num_blocks:
            raise ValueError(
                f"A prompt of {length:,} tokens and its answer take {num_blocks:,} blocks of {config.page_size} "
                f"tokens, but there are {config.num_blocks:,}. Raise `num_blocks`."
            )

    def _create_batch_processor(self) -> Any:
        build = only_here(partial(CompressedPagedCache, self.template), continuous_api.PagedAttentionCache)
        known = paged_cache.ATTN_TYPE_TO_ALLOCATOR
        allocators = known | {"full_attention": only_here(CompressedAllocator, known["full_attention"])}
        with _building, replaced(continuous_api, "PagedAttentionCache", build):
            with replaced(paged_cache, "ATTN_TYPE_TO_ALLOCATOR", allocators):
                return super()._create_batch_processor()


def only_here(build: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """What `build` makes in this thread, and `original` in others, whose requests are not compressed."""
    thread = threading.get_ident()
    return lambda *args, **kwargs: (build if threading.get_ident() == thread else original)(*args, **kwargs)


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A name of a module that refers to something else for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def check_template(model: PreTrainedModel, cache: PolicyCache) -> None:
    """Raises unless requests can be compressed as the cache says."""
    if not isinstance(cache, PolicyCache):
        given = f"the class {cache.__name__}" if isinstance(cache, type) else f"a {type(cache).__name__}"
        raise ValueError(
            f"`cache` is {given}, which requests cannot have. Give a cache that evicts by scores, such as "
            "`SnapKVCache(model.config, budget=1024)`."
        )
    if cache.get_seq_length():
        raise ValueError("`cache` has seen tokens. Give an empty one: each request gets a copy of it.")
    name = type(cache).__name__
    if not all(type(layer) is EvictingLayer for layer in cache.layers):
        raise NotImplementedError(
            f"{type(model).__name__} has layers with a sliding window or without attention, or {name} treats some "
            "layers in another way. Requests are compressed where all layers have full attention."
        )
    config = model.config.get_text_config()
    if config.num_hidden_layers != len(cache.layers):
        raise ValueError(
            f"`cache` was built for {len(cache.layers)} layers, but the model has {config.num_hidden_layers}. Build "
            "it from the config of the model."
        )
    ropes = str(getattr(config, "rope_parameters", None) or "")
    for rope_type in ("longrope", "dynamic"):
        if f"'{rope_type}'" in ropes:
            raise NotImplementedError(
                f"RoPE of type {rope_type!r} depends on the longest request of a batch, which would change the "
                "answers of others. Call `model.generate` with this model."
            )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(
            "transformers leaves out `attn_logit_softcapping` in continuous batching. Call `model.generate` with this "
            "model, or set it to None."
        )
    if cache.waits:
        raise NotImplementedError(
            f"{name} reads the prompt a second time, which requests do not allow. Use a cache that scores tokens as "
            "it reads them, such as SnapKVCache."
        )
    if isinstance(store := cache.layers[0].store, QuantizedStore):
        raise NotImplementedError(
            f"{name} holds older tokens in another form ({store.quantizer.option}), but blocks hold keys and values. "
            "Leave it out, or use another cache."
        )
    layer, depths = begun_layer(model, cache), range(len(cache.layers))
    differs = any(
        len({cache.policy.num_tokens(length, layer.token_budget, depth, len(depths)) for depth in depths}) > 1
        for length in (1, 10, 100, 1_000, 10_000, 100_000)
    )
    if layer.ranking != "head":
        raise NotImplementedError(
            f"Heads of {name} keep different numbers of tokens (`ranking={layer.ranking!r}`), but those of a request "
            f'share blocks. Give {name} `ranking="head"`, or use another cache, such as SnapKVCache.'
        )
    if differs or cache.policy.divides_budget:
        raise NotImplementedError(
            f"Layers of {name} keep different numbers of tokens, but those of a request share blocks. Use a cache "
            "whose layers keep equal numbers, such as SnapKVCache."
        )


def begun_layer(model: PreTrainedModel, cache: PolicyCache) -> EvictingLayer:
    """A layer that knows shapes, and so its budget and its protected tokens. ValueError if the budget is too small."""
    layer, config = copy.deepcopy(cache.layers[0]), model.config.get_text_config()
    shape = 1, find_num_key_value_heads(config), 1, find_head_dim(config)
    layer.lazy_initialization(*[torch.zeros(shape, dtype=model.dtype)] * 2)
    return layer


def check_batching(config: ContinuousBatchingConfig) -> None:
    """Raises for what compressed requests cannot do."""
    wanted = {
        "use_async_batching": config.use_async_batching,
        "use_cuda_graph": any(config.cuda_graph_booleans),
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
        "cpu_offload_space": config.cpu_offload_space != 0.0,
    }
    for name, value in wanted.items():
        if value:
            raise NotImplementedError(
                f"`{name}` does not work with compressed requests, which evict between forward passes. Leave it out."
                + (" Requests that have to wait are put aside anyway." if name == "cpu_offload_space" else "")
            )
