"""Models whose heads several processes share: what they keep and say is what one process keeps and says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
# What evicts by each head's own scores asks other ranks for nothing. The others ask at evictions: each layer once or
# twice, and where values are compared between heads twice more.
ALONE = "H2O SnapKV CriticalKV PyramidKV KeyDiff Knorm ExpectedAttention KVMerger RKV Scissorhands".split()
NUM_LAYERS, NUM_STEPS = 3, 60


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    """Each cache, with a padded batch, 60 tokens: logits, tokens, and positions of all heads. And files of ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    done = subprocess.run([*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["cache"]: line for line in map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())}
    assert [name for name, line in found.items() if "refused" in line] == ["ShadowKVCache(config)"]
    for name, line in found.items():
        if "refused" in line:
            continue
        assert line["difference"] < 1e-4 and line["same_tokens"] and line["same_positions"], line
        if name.partition("Cache")[0] in ALONE:
            assert line["collectives"] == 0, line
        assert line["collectives"] <= 4 * NUM_LAYERS * (NUM_STEPS // 3 + 1), line
