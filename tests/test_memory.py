"""What the caches really hold, at rest, during the prefill, and what a decode step allocates."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from caches import CACHE_CASES, QUICK_CASES, CacheCase, parametrize_cases
from models import build_model, drive, random_rows, random_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import H2OCache, StreamingLLMCache


PROMPT_LENGTH = 2048
HEAD_DIM = 64
KV_HEADS = 2

# Keys and values of one layer for the whole prompt, float32, one row.
LAYER_BYTES = 2 * PROMPT_LENGTH * KV_HEADS * HEAD_DIM * 4

# One of each kind of layer, and of each way to read a prompt.
every_cache = parametrize_cases(QUICK_CASES)


def build(case: CacheCase, model: PreTrainedModel, length: int) -> Cache:
    """A cache that keeps a quarter of a prompt of this length."""
    budget = length // 4 if case.cache_class is StreamingLLMCache else 0.25
    return case.make(model, {**case.large, "budget": budget})


def reachable_tensors(root: object) -> Iterator[torch.Tensor]:
    """
    Every tensor that can be reached from an object through attributes, slots, containers and closures. Models are not
    entered: a cache may know its model, whose weights are not the cache's.
    """
    pending, seen = [root], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (torch.nn.Module, type, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
            pending.extend(vars(item).values())
        elif isinstance(item, dict):
            pending.extend([*item.keys(), *item.values()])
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        else:
            pending.extend(getattr(item, "__dict__", {}).values())
            for base in type(item).__mro__:
                slots = getattr(base, "__slots__", ())
                for slot in (slots,) if isinstance(slots, str) else slots:
                    pending.append(getattr(item, slot, None))
            for cell in getattr(item, "__closure__", None) or ():
                pending.append(cell.cell_contents)


def storages(root: object) -> dict[int, int]:
    """Address and bytes of every distinct storage reachable from an object."""
    all_of_them = (tensor.untyped_storage() for tensor in reachable_tensors(root))
    return {storage.data_ptr(): storage.nbytes() for storage in all_of_them if storage.nbytes()}


def held_bytes(root: object) -> int:
    """Bytes of all distinct storages reachable from an object."""
    return sum(storages(root).values())


def wide_model(num_layers: int) -> PreTrainedModel:
    """A narrow Llama with heads of a usual size, so that bookkeeping weighs what it does in real models."""
    return build_model(
        "llama", num_hidden_layers=num_layers, head_dim=HEAD_DIM, num_attention_heads=4, num_key_value_heads=KV_HEADS
    )


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, length: int = PROMPT_LENGTH) -> None:
    """Feed one prompt of one row."""
    model(random_tokens(1, length), past_key_values=cache, logits_to_keep=1)


def large_tensors(model: PreTrainedModel) -> int:
    """Living tensors, wherever they are, whose storage could hold the whole prompt's keys of a layer."""
    gc.collect()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    count = 0
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # not `isinstance`, which wakes lazy objects that are no tensors
            continue
        try:
            storage = item.untyped_storage()
            num_bytes = storage.nbytes()
            if isinstance(num_bytes, torch.SymInt):
                continue  # a tensor of unknown size, which a compiler left behind
            count += num_bytes >= LAYER_BYTES // 2 and storage.data_ptr() not in weights
        except (RuntimeError, NotImplementedError):
            continue  # a fake or batched tensor that a compiler left behind: it has no storage
    return count


@every_cache
def test_a_quarter_of_the_prompt_holds_a_quarter_of_the_bytes(case: CacheCase) -> None:
    """Nothing keeps the rest alive: no living tensor, wherever it is, is as large as the keys of a layer's prompt."""
    model = wide_model(num_layers=2)
    already = large_tensors(model)
    whole = DynamicCache(config=model.config)
    prefill(model, whole)
    assert held_bytes(whole) == 2 * LAYER_BYTES and large_tensors(model) == already + 4
    del whole
    cache = build(case, model, PROMPT_LENGTH)
    prefill(model, cache)
    assert large_tensors(model) == already
    held = held_bytes(cache)
    assert 0.2 * 2 * LAYER_BYTES < held <= 0.26 * 2 * LAYER_BYTES
    memory = cache.memory()
    assert sum(sum(roles.values()) for roles in memory.values()) == cache.nbytes == held
    (roles,) = memory.values()
    assert set(roles) == {"keys", "values", "bookkeeping"}
    for role in ("keys", "values"):
        assert 0.24 * LAYER_BYTES < roles[role] <= 0.26 * LAYER_BYTES
    with torch.no_grad():
        model(random_tokens(1, 1), past_key_values=cache)
    assert large_tensors(model) == already
    assert cache.get_seq_length() == PROMPT_LENGTH + 1
    cache = build(case, model, 257)
    drive(model, cache, random_rows((257, 200)), random_tokens(2, 40))
    assert sum(sum(roles.values()) for roles in cache.memory().values()) == held_bytes(cache) == cache.nbytes


@every_cache
def test_prefill_holds_one_whole_layer_at_a_time(case: CacheCase) -> None:
    """Looked at after every attention and after every layer, the cache holds the end's bytes and one full layer."""
    model, length = wide_model(4), 1024
    cache = build(case, model, length)
    samples: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: samples.append(held_bytes(cache)))
        layer.register_forward_hook(lambda *_: samples.append(held_bytes(cache)))
    prefill(model, cache, length)
    layer_bytes = LAYER_BYTES * length // PROMPT_LENGTH
    assert len(samples) == 8 and max(samples) <= held_bytes(cache) + layer_bytes
    # After a layer is done, what it holds is pruned already, not when the whole prompt is through.
    assert samples[1] <= 0.8 * layer_bytes


class LargeResults(TorchDispatchMode):
    """
    Collects every operation that returns a tensor of at least so many elements in memory of its own, which is not that
    of `known` objects: caches and lists of tensors, as they are before the watch.
    """

    def __init__(self, num_elements: int, *known: object) -> None:
        super().__init__()
        self.num_elements = num_elements
        # Kept alive, so that none of their addresses is given to a new tensor.
        self.known = [tensor.untyped_storage() for tensor in reachable_tensors(known)]
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        known = {storage.data_ptr() for storage in self.known}
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and item.numel() >= self.num_elements:
                self.found += [str(func)] if item.untyped_storage().data_ptr() not in known else []
        return result


# Every row's cache is far larger than any weight's product, so that nothing else in a step is of its size.
DECODE_SLOTS = 300
DECODING = [case for case in CACHE_CASES if case.is_bounded and (case in QUICK_CASES or case.short_name == "knorm")]


@pytest.mark.parametrize("lengths", [(320, 320), (320, 310)], ids=["equal", "padded"])
@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_the_same_memory_serves_every_step(case: CacheCase, lengths: tuple[int, ...]) -> None:
    """And a step makes nothing of the size of the cache, but where it gathers what stays into the same slots."""
    model = build_model("llama", head_dim=32)
    growing = DynamicCache(config=model.config)
    prefill(model, growing, 320)
    with torch.no_grad(), LargeResults(growing.layers[0].keys.numel(), growing, list(model.parameters())) as watch:
        model(random_tokens(1, 1), past_key_values=growing)
    assert len(watch.found) >= 6  # what the watch must see: keys and values of three layers
    cache = case.cache_class(model.config, **{**case.tight, "budget": DECODE_SLOTS})
    held: list[dict[int, int]] = []
    drive(model, cache, random_rows(lengths), random_tokens(2, 24), lambda step: held.append(storages(cache)))
    # Bookkeeping (a few numbers a row, the mask's columns) may move; what each head has for each slot may not.
    per_slot = 4 * 2 * 2 * DECODE_SLOTS
    seen = [{address: size for address, size in each.items() if size >= per_slot} for each in held]
    assert len(seen[8]) >= 6  # keys and values of three layers
    assert all(later == seen[8] for later in seen[9:])
    # All that grows is the reading of the mask, which itself grows by a column a step.
    growth = sum(held[-1].values()) - sum(held[8].values())
    assert growth <= (0 if lengths[0] == lengths[1] else 2 * 4 * 16) + 64
    if "eviction_interval" in case.tight:
        return
    keys = cache.layers[0].keys
    assert keys.shape[0] == 2 and keys.shape[2] >= DECODE_SLOTS
    mask = torch.ones(2, 345, dtype=torch.long)
    mask[1, : lengths[0] - lengths[1]] = 0
    arguments = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1} if lengths[1] < 320 else {}
    with torch.no_grad(), LargeResults(keys.numel() // 2, cache, list(model.parameters())) as watch:
        model(random_tokens(2, 1), past_key_values=cache, **arguments)
    assert watch.operations > 50 and not watch.found


def test_h2o_prefill_never_makes_a_square_matrix() -> None:
    """All queries' attention is summed by key without ever holding a probability for each pair of tokens."""
    length, model = 2048, wide_model(num_layers=1)
    cache = H2OCache(model.config, budget=0.25)
    with LargeResults(length * length) as watch:
        prefill(model, cache, length)
    assert watch.operations > 20 and not watch.found
