"""Models whose heads several processes share: what they keep and say is what one process keeps and says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from caches import CACHE_CASES


WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
# How many collectives a layer takes for an eviction; 0 for all other caches. The scores are exchanged once; where
# values are weighed, their means and the attention near the window before that. Massive tokens are found in two steps.
FOR_EVICTION = {"pyramid-config": 1, "pyramid": 1, "tova": 1, "adakv": 1, "kvzip-plus": 1, "matching": 1}
FOR_EVICTION |= {"massive": 2, "defensive": 3, "layer-defensive": 3}
# The sparsity of a layer is known once, at the end of a prompt.
FOR_PROMPT = {"vl": 1}
# Ranks add numbers up in another order, and a key that lies between two codes may then take the other one.
QUANTIZING = {case.short_name for case in CACHE_CASES if case.quantizes and "thin_keys" not in case.tight}
EVICTING = {case.short_name for case in CACHE_CASES if case.evicts}
NUM_LAYERS = 3


def run_ranks(num_ranks: int, folder: Path, *scenarios: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the worker found, by scenario and cache."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    command += [str(WORKER), str(folder), *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / "found.jsonl").read_text().splitlines())
    return {(line["scenario"], line["cache"]): line for line in lines}


def assert_same(line: dict[str, Any], is_split: bool = True) -> None:
    """Logits, tokens and positions of one process, and as many collectives as the table says."""
    tolerance = 5e-3 if line["cache"] in QUANTIZING else 1e-4
    assert line["difference"] < tolerance and line["same_tokens"] and line["same_positions"], line
    passes, of_eviction = line["collectives"], FOR_EVICTION.get(line["cache"], 0)
    for index, (count, num_evicting) in enumerate(passes):
        of_layer = of_eviction if index else FOR_PROMPT.get(line["cache"], of_eviction)
        assert count == of_layer * num_evicting * is_split, (index, line)
    least = 2 * NUM_LAYERS if line["cache"] in EVICTING else 0  # after the prompt, and in steps
    assert sum(num_evicting for _, num_evicting in passes) >= least, line


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    """Each cache, with a padded batch, 60 tokens: logits, tokens, and positions of all heads. And files of ranks."""
    for (_, name), line in run_ranks(2, tmp_path, "every cache").items():
        if name == "shadow":
            assert line["error"].startswith("NotImplementedError: The model is split over 2 ranks")
        else:
            assert_same(line)


@pytest.mark.slow
def test_four_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    """One KV head each; or all heads, where attention is not split, or where the model gathers what was split."""
    whole = ("whole attention", "gathered heads", "normalised heads")
    for (scenario, name), line in run_ranks(4, tmp_path, "a head for each rank", *whole).items():
        if scenario in whole[1:] and name == "critical":
            assert line["error"].startswith("NotImplementedError: ") and "Use a cache that does" in line["error"]
        else:
            assert_same(line, is_split=scenario not in whole)


@pytest.mark.slow
def test_heads_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    """Plans that split queries or keys alone, and too few KV heads, which transformers' own cache does not survive."""
    split = ("split queries", "split keys")
    for (scenario, name), line in run_ranks(4, tmp_path, "more ranks than heads", *split).items():
        if name == "dynamic" or scenario not in split:
            assert line["error"].startswith("RuntimeError: "), line
        else:
            assert line["error"].startswith("NotImplementedError: "), line
