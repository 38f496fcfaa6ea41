"""Runs of `model.generate` with each cache, timed up to the first token and from there on."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pyramid_cache import H2OCache, PyramidCache, ShadowKVCache, StreamingLLMCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.budget import bytes_to_tokens, parse_budget
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.kept import kept_positions, kept_tokens
from pyramid_cache.lab.demo.planted_number import Prompts
from pyramid_cache.lab.loaded_model import LoadedModel
from pyramid_cache.lab.weights import ProgressCallback


BudgetLike = float | int | str

# The names of `--caches`, each with what the report calls it.
CACHES = {
    "dynamic": "DynamicCache",
    "pyramid": "PyramidCache(model)",
    "pyramid-config": "PyramidCache(config)",
    "h2o": "H2OCache",
    "streaming": "StreamingLLMCache",
    "shadow": "ShadowKVCache",
}
BASELINE = "dynamic"
WARM_UP_NEW_TOKENS = 4
WARM_UP_PROMPT_TOKENS = 512


@dataclass
class Result:
    """
    What one cache did with the prompts.

    Attributes:
        cache (`str`): Its name in `CACHES`.
        prefill_seconds, decode_seconds (`list[float]`): One of each per repeat.
        held_bytes (`int`): What the cache held at the end.
        kept_tokens (`list[int]`): Tokens held per layer at the end.
        kept_positions (`torch.Tensor`): `(layers, positions)`, the share of the KV heads that hold each position of
            the first row at the end.
        answers (`list[str]`): One per row.
    """

    cache: str
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    held_bytes: int = 0
    kept_tokens: list[int] = field(default_factory=list)
    kept_positions: torch.Tensor | None = None
    answers: list[str] = field(default_factory=list)


class Stopwatch(LogitsProcessor):
    """Notes when the logits of each token were there."""

    def __init__(self, device: torch.device, on_token: Callable[[int], None]) -> None:
        self.device = device
        self.on_token = on_token
        self.stamps = [self.now()]

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.stamps.append(self.now())
        self.on_token(len(self.stamps) - 1)
        return scores

    @property
    def prefill_seconds(self) -> float:
        """From the start to the logits of the first token."""
        return self.stamps[1] - self.stamps[0]

    @property
    def decode_seconds(self) -> float:
        """From the logits of the first token to those of the last."""
        return self.stamps[-1] - self.stamps[1]


def measure_caches(
    loaded: LoadedModel,
    prompts: Prompts,
    names: list[str],
    budget: BudgetLike,
    max_new_tokens: int,
    repeats: int,
    progress: ProgressCallback,
) -> list[Result]:
    """
    Measures each cache on the same prompts. In each round all caches take their turn, so that whatever else the
    machine does in a minute falls on all of them alike. Before the first round each cache runs once unmeasured.

    Args:
        names (`list[str]`): Names in `CACHES`; the baseline is put in front if it is missing.
        budget: Of every cache but the baseline; see `build_cache`.
    """
    names = names if BASELINE in names else [BASELINE, *names]
    model, input_ids = loaded.model, prompts.input_ids.to(loaded.model.device)

    def new_cache(name: str) -> Cache:
        return build_cache(name, model, budget, *input_ids.shape)

    for name in names:  # a budget that a cache refuses is refused before anything runs
        new_cache(name)
    for name in names:
        progress(f"{CACHES[name]}: warming up", 0, None)
        # On a CPU a piece of the prompt will do; other devices choose their kernels by the shapes.
        piece = input_ids[:, :WARM_UP_PROMPT_TOKENS] if model.device.type == "cpu" else input_ids
        # A budget can be too small for the piece only; if it is for the prompt too, the measured run says so.
        with contextlib.suppress(ValueError):
            generate(model, piece, new_cache(name), WARM_UP_NEW_TOKENS)
    results = [Result(name) for name in names]
    for repeat in range(repeats):
        for result in results:
            description = f"{CACHES[result.cache]}{f', round {repeat + 1} of {repeats}' if repeats > 1 else ''}"
            progress(f"{description}: reading {prompts.num_tokens:,} tokens", 0, None)
            cache = new_cache(result.cache)
            sequences, stopwatch = generate(
                model,
                input_ids,
                cache,
                max_new_tokens,
                lambda done, text=description: progress(f"{text}: answering", done, max_new_tokens),
            )
            result.prefill_seconds.append(stopwatch.prefill_seconds)
            result.decode_seconds.append(stopwatch.decode_seconds)
            if repeat == 0:
                result.answers = [loaded.answer(row) for row in sequences[:, prompts.num_tokens :].tolist()]
                result.held_bytes = held_bytes(cache)
                result.kept_tokens = kept_tokens(cache)
                result.kept_positions = kept_positions(cache, sequences.shape[1] - 1)
            del cache  # before the next one fills the memory
    return results


def build_cache(name: str, model: PreTrainedModel, budget: BudgetLike, batch_size: int, prompt_tokens: int) -> Cache:
    """
    Builds a cache by its name in `CACHES`.

    Args:
        budget: A fraction of the prompt, tokens per layer, or bytes such as "256MiB". StreamingLLMCache, whose window
            is given in tokens, gets as many as that comes to for prompts of this shape; ShadowKVCache attends to as many,
            its outliers and latest tokens included, and keeps all.
    """
    if name == "dynamic":
        return DynamicCache(config=model.config)
    if name == "pyramid":
        return PyramidCache(model, budget=budget)
    if name == "pyramid-config":
        return PyramidCache(model.config, budget=budget)
    if name == "h2o":
        return H2OCache(model.config, budget=budget)
    num_tokens = tokens_of_budget(budget, model, batch_size, prompt_tokens)
    if name == "streaming":
        return StreamingLLMCache(model.config, budget=num_tokens)
    cache = ShadowKVCache(model.config, budget=1)
    num_others = cache.compressed_layers[0].num_tokens_to_keep(prompt_tokens)
    return ShadowKVCache(model.config, budget=max(num_tokens - num_others, 1))


def tokens_of_budget(budget: BudgetLike, model: PreTrainedModel, batch_size: int, prompt_tokens: int) -> int:
    """The tokens per layer that a budget comes to for prompts of a given shape."""
    parsed = parse_budget(budget)
    if parsed.kind != "bytes":
        return parsed.num_tokens(prompt_tokens)
    config = model.config.get_text_config(decoder=True)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * num_kv_heads * head_dim * model.dtype.itemsize
    return bytes_to_tokens(parsed.amount, config.num_hidden_layers, batch_size, bytes_per_token, num_spare_slots=0)


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, Stopwatch]:
    """
    Decodes greedily with a cache.

    Args:
        input_ids (`torch.Tensor`): `(batch, prompt_tokens)`, without padding.

    Returns:
        The sequences, `(batch, prompt_tokens + max_new_tokens)`, and when their tokens were there.
    """
    stopwatch = Stopwatch(model.device, on_token)
    sequences = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([stopwatch]),
    )
    return sequences, stopwatch


def held_bytes(cache: Cache) -> int:
    """The bytes that a cache holds; of transformers' own, those of the storages of its layers' tensors."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return storage_bytes(layer_tensors(cache))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of what tensors lie in, each storage once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def layer_tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """The tensors of a cache's layers; of one that wraps others, as quantized ones do, those."""
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                yield from unwrapped(value)


def unwrapped(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a tensor consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from unwrapped(getattr(tensor, name))
