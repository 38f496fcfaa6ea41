"""
One rank of `test_tensor_parallel.py`, started by `torchrun`: each cache with a model that ranks share, beside the same
model in one process. Writes a line of JSON for each cache: the largest difference of logits, whether tokens and kept
positions are the same, and how many collectives there were in steps that evict nothing and for each eviction.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from caches import CACHE_CASES, CacheCase
from models import build_model, left_pad, random_rows
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyramid_cache import SnapKVCache
from pyramid_cache.engine import ranks


NUM_NEW = 60


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


@torch.no_grad()
def run(model: PreTrainedModel, case: CacheCase) -> tuple[torch.Tensor, Any]:
    """Logits `(batch, steps, vocabulary)` of greedy decoding, and the cache."""
    ids, mask = left_pad(random_rows((40, 29), seed=2))
    cache, logits = case.build(model), []
    for _ in range(NUM_NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        logits.append(output.full_tensor() if hasattr(output, "full_tensor") else output)
        ids = logits[-1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(logits, dim=1), cache


def kept(cache: Any, index: int, num_ranks: int) -> list[list[list[int]]]:
    """The positions that all heads of a layer hold, those of all ranks if there are several."""
    held = cache.positions(index).tolist()
    every: list[Any] = [held]
    if num_ranks > 1:
        every = [None] * num_ranks
        distributed.all_gather_object(every, held)
    return [
        [sorted(each for each in head if each >= 0) for part in every for head in part[row]]
        for row in range(len(held))
    ]


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    whole = build_model("llama")
    if rank == 0:
        whole.save_pretrained(folder / "model")
    distributed.barrier()
    split = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto").eval()
    counted = Counted()
    for case in CACHE_CASES:
        line: dict[str, Any] = {"cache": case.name}
        try:
            (wanted, one), (found, cache) = run(whole, case), run(split, case)
            layers = range(len(cache.layers))
            line |= {
                "difference": (wanted - found).abs().max().item(),
                "same_tokens": bool((wanted.argmax(dim=-1) == found.argmax(dim=-1)).all()),
                "same_positions": all(kept(cache, index, num_ranks) == kept(one, index, 1) for index in layers),
                "collectives": counted.count,
            }
        except NotImplementedError as error:
            line["refused"] = str(error)
        counted.count = 0
        if rank == 0:
            with (folder / "found.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        distributed.barrier()
    check_files(split, folder, rank, num_ranks)
    distributed.destroy_process_group()


@torch.no_grad()
def check_files(split: PreTrainedModel, folder: Path, rank: int, num_ranks: int) -> None:
    """A rank's file is for that rank."""
    ids, cache = random_rows((40,))[0][None], SnapKVCache(split.config, 12)
    split(ids, past_key_values=cache)
    cache.save(folder / f"{rank}.safetensors")
    distributed.barrier()
    own, other = (
        SnapKVCache.load(folder / f"{each}.safetensors", split.config) for each in (rank, (rank + 1) % num_ranks)
    )
    later = ids[:, :1]
    assert torch.equal(split(later, past_key_values=own).logits, split(later, past_key_values=cache).logits)
    try:
        split(later, past_key_values=other)
    except ValueError as error:
        assert f"saved by rank {(rank + 1) % num_ranks} of {num_ranks}, but this is rank {rank}" in str(error)
    else:
        raise AssertionError("another rank's file was taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
