"""
One rank of `test_tensor_parallel.py`, started by `torchrun`: caches with a model that ranks share, beside the same
model in one process. Writes a line of JSON for each scenario and cache: the largest difference of logits, whether
tokens and kept positions are the same, and how many collectives each forward pass took; or the error.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from caches import CACHE_CASES, CacheCase
from models import build_model, left_pad, random_rows
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from pyramid_cache.engine import ranks


NUM_NEW = 60


@dataclass(frozen=True)
class Scenario:
    """A tiny model, the plan by which ranks share it (by default its own), and the caches: all by default."""

    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, str] | None = None
    caches: tuple[str, ...] = tuple(case.short_name for case in CACHE_CASES)


FEW = ("snapkv", "adakv", "layer-defensive", "pyramid", "tova")
MLP = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
QUERIES = {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise"}
KEYS = {"layers.*.self_attn.k_proj": "colwise", "layers.*.self_attn.v_proj": "colwise"}
HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
SCENARIOS = {
    "every cache": Scenario(),
    "a head for each rank": Scenario(settings=HEADS, caches=FEW),
    "more ranks than heads": Scenario(caches=("dynamic", "snapkv", "tova")),
    "whole attention": Scenario(plan=MLP, caches=("adakv", "layer-defensive", "tova", "shadow")),
    "split queries": Scenario(settings=HEADS, plan=QUERIES, caches=("dynamic", *FEW[:3])),
    "split keys": Scenario(settings=HEADS, plan=KEYS, caches=("dynamic", *FEW[:3])),
    "gathered heads": Scenario("phi3", HEADS, caches=("adakv", "pyramid", "critical", "shadow")),
    "normalised heads": Scenario("olmo2", HEADS, caches=("tova", "critical")),
}


class Counted:
    """Counts collectives of the package."""

    def __init__(self) -> None:
        self.count = 0
        for name in ("all_reduce", "all_gather"):
            setattr(self, name, getattr(distributed, name))
            setattr(ranks.distributed, name, self.counting(name))

    def counting(self, name: str) -> Any:
        original = getattr(self, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            self.count += sys._getframe(1).f_code.co_filename == ranks.__file__
            return original(*args, **kwargs)

        return count


def build(name: str, model: PreTrainedModel) -> Any:
    """A cache of the table, or transformers' own."""
    cases: dict[str, CacheCase] = {case.short_name: case for case in CACHE_CASES}
    return cases[name].build(model) if name in cases else DynamicCache(config=model.config)


@torch.no_grad()
def run(model: PreTrainedModel, name: str, counted: Counted) -> tuple[torch.Tensor, Any, list[tuple[int, int]]]:
    """
    Logits `(batch, steps, vocabulary)` of greedy decoding, and the cache. And of each forward pass, how many
    collectives it took, and how many layers evicted.
    """
    ids, mask = left_pad(random_rows((40, 29), seed=2))
    cache, logits, passes = build(name, model), [], []
    layers = [layer for layer in cache.layers if hasattr(layer, "store")]
    for _ in range(NUM_NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        num_new, counted.count = int(mask[:, -ids.shape[1] :].sum()), 0
        before = [sum(layer.state.row_held) for layer in layers]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        after = [sum(layer.state.row_held) for layer in layers]
        num_evicting = sum(held < earlier + num_new for held, earlier in zip(after, before, strict=True))
        passes.append((counted.count, num_evicting))
        logits.append(output.full_tensor() if hasattr(output, "full_tensor") else output)
        ids = logits[-1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(logits, dim=1), cache, passes


def kept(cache: Any, index: int) -> list[list[list[int]]]:
    """The positions that all heads of a layer hold, those of all ranks that share them."""
    held = cache.positions(index).tolist()
    every: list[Any] = [held]
    if cache.layers[index].store.ranks is not None:
        every = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, held)
    return [
        [sorted(each for each in head if each >= 0) for part in every for head in part[row]]
        for row in range(len(held))
    ]


def compare(whole: PreTrainedModel, split: PreTrainedModel, name: str, counted: Counted) -> dict[str, Any]:
    """What a model that ranks share says with a cache, beside what the whole model says."""
    wanted, one, _ = run(whole, name, counted)
    try:
        found, cache, passes = run(split, name, counted)
    except (NotImplementedError, RuntimeError) as error:  # the first is a kind of the second
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "difference": (wanted - found).abs().max().item(),
        "same_tokens": bool((wanted.argmax(dim=-1) == found.argmax(dim=-1)).all()),
        "same_positions": all(kept(cache, index) == kept(one, index) for index in range(len(cache.layers))),
        "collectives": passes,
    }


def main(folder: Path, names: list[str]) -> None:
    distributed.init_process_group("gloo")
    rank, counted = distributed.get_rank(), Counted()
    for place, (name, scenario) in enumerate((name, SCENARIOS[name]) for name in names):
        # transformers 5.17 splits vocabularies evenly.
        whole, path = build_model(scenario.family, vocab_size=104, **scenario.settings), folder / f"model{place}"
        if rank == 0:
            whole.save_pretrained(path)
        distributed.barrier()
        config = AutoConfig.from_pretrained(path)
        if scenario.plan is not None:
            config.base_model_tp_plan = scenario.plan
        split = AutoModelForCausalLM.from_pretrained(path, config=config, tp_plan="auto").eval()
        for cache_name in scenario.caches:
            line = {"scenario": name, "cache": cache_name, **compare(whole, split, cache_name, counted)}
            if rank == 0:
                with (folder / "found.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            distributed.barrier()
        if name in ("every cache", "a head for each rank"):
            check_files(split, path, rank, distributed.get_world_size())
    distributed.destroy_process_group()


@torch.no_grad()
def check_files(split: PreTrainedModel, folder: Path, rank: int, num_ranks: int) -> None:
    """A rank's file is for that rank. Heads that compete go on competing."""
    ids = random_rows((40,))[0][None]
    other = (rank + 1) % num_ranks
    for name in ("snapkv", "adakv"):
        cache = build(name, split)
        split(ids, past_key_values=cache)
        cache.save(folder / f"{name}{rank}.safetensors")
        distributed.barrier()
        own, foreign = (type(cache).load(folder / f"{name}{each}.safetensors", split.config) for each in (rank, other))
        for step in range(8):
            later = ids[:, step : step + 1]
            found, wanted = (split(later, past_key_values=each).logits for each in (own, cache))
            assert torch.equal(found, wanted)
        try:
            split(later, past_key_values=foreign)
        except ValueError as error:
            assert f"saved by rank {other} of {num_ranks}, but this is rank {rank}" in str(error)
        else:
            raise AssertionError("another rank's file was taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
