"""What continuous batching does with a number of blocks, whose requests are compressed and whose are not."""

import argparse
import contextlib
import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from pyramid_cache.lab.registry import Contender, Workload


def requests_of(tokens: torch.Tensor, num_requests: int, length: int) -> list[list[int]]:
    """Prompts from all parts of a text `(tokens,)`, which overlap where it is too short."""
    if len(tokens) < length:
        raise ValueError(f"Prompts of {length:,} tokens are longer than the text of {len(tokens):,}.")
    step = (len(tokens) - length) // max(num_requests - 1, 1)
    return [tokens[start * step : start * step + length].tolist() for start in range(num_requests)]


def check(model: PreTrainedModel, contender: Contender, length: int) -> None:
    """Raises unless requests can have the cache, for prompts of this length."""
    from pyramid_cache.serving.manager import check_template

    if contender.entry.has_budget:
        cache: Any = contender.build(model, Workload(length))
        check_template(model, cache)


def serve(
    model: PreTrainedModel, contender: Contender, prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """
    A row: `seconds` in all, `most_in_flight` and `mean_in_flight` requests that held blocks in a forward pass,
    `num_waits` of requests that lost their blocks, and `tokens_per_second`, read and generated.
    """
    from pyramid_cache.serving import compressed

    length = max(map(len, prompts))
    context: Any = contextlib.nullcontext()
    if contender.entry.has_budget:
        cache: Any = contender.build(model, Workload(length))
        context = compressed(model, cache)
    generation = GenerationConfig(do_sample=False, max_new_tokens=options.new_tokens, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        num_blocks=options.blocks, page_size=options.page_size, max_batch_tokens=options.max_batch_tokens
    )
    in_flight: list[int] = []
    with context:
        build: Any = model.init_continuous_batching
        manager = build(generation, config)
        manager.batch_processor = processor = manager._create_batch_processor()
        manager.add_requests(prompts)
        (allocator,) = processor.cache.cache_allocators.values()
        start = time.perf_counter()
        while processor.prepare_next_batch():
            manager._generation_step()
            in_flight.append(len(allocator.block_table))
            processor.update_batch()
        seconds = time.perf_counter() - start
    outputs = [manager.get_result() for _ in prompts]
    num_tokens = sum(len(each.prompt_ids) + len(each.generated_tokens) for each in outputs)
    return {
        "cache": contender.name,
        "label": contender.label if contender.entry.has_budget else "as they are",
        "seconds": seconds,
        "most_in_flight": max(in_flight),
        "mean_in_flight": sum(in_flight) / len(in_flight),
        "num_passes": len(in_flight),
        "tokens_per_second": num_tokens / seconds,
        "errors": sorted({each.error for each in outputs if each.error}),
    }
