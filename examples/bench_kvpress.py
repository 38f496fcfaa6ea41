"""Measure what NVIDIA's kvpress takes to read a prompt and to decode, beside DynamicCache in its own environment.

    pyramid-cache bench caches --lengths 4096 --batch-sizes 1,4 --save-tokens tokens.json
    kvpress-env/bin/python examples/bench_kvpress.py --tokens tokens.json --model MODEL --out times.json

The environment is that of `evaluate_kvpress.py`, and this script knows nothing of `pyramid_cache` either. Each press
runs as its README says, `with press(model): model.generate(...)`, on the first tokens of the file; the times are those
of the logits of each token, and ratios are to DynamicCache in the same round, so that they can be set beside those of
`bench caches`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evaluate_kvpress import PRESSES
from kvpress.presses.base_press import BasePress
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)


FULL = "DynamicCache"
# ObservedAttention needs attention as a matrix, which sdpa does not give. KVzip takes the last tokens
# that the model read for its context; after `generate` that is one token.
MEASURED: dict[str, Callable[[float], BasePress | None]] = {FULL: lambda ratio: None} | {
    name: build for name, build in PRESSES.items() if name not in ("ObservedAttention", "KVzip", "KVzip+")
}
WARM_UP_STEPS = 2


class Stopwatch(LogitsProcessor):
    """Notes when the logits of each token were there."""

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.stamps.append(time.perf_counter())
        return scores


@torch.no_grad()
def measure(model: PreTrainedModel, press: BasePress | None, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Seconds of the prompt, of the median step behind the first ones, and the bytes that are held at the end."""
    cache, stopwatch = DynamicCache(), Stopwatch()
    with nullcontext() if press is None else press(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1 + WARM_UP_STEPS + new_tokens,
            logits_processor=LogitsProcessorList([stopwatch]),
        )
    stamps = stopwatch.stamps
    steps = [later - earlier for earlier, later in zip(stamps[1:], stamps[2:], strict=False)]
    storages = {tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)}
    return {
        "prefill_seconds": stamps[1] - stamps[0],
        "step_seconds": statistics.median(steps[WARM_UP_STEPS:]),
        "bytes": sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
    }


def as_row(name: str, length: int, batch_size: int, rounds: list[dict], full: list[dict]) -> dict[str, Any]:
    """Medians over rounds, and their ratios to those of DynamicCache."""
    row: dict[str, Any] = {"press": name, "length": length, "batch_size": batch_size, "rounds": rounds}
    for key in ("prefill_seconds", "step_seconds", "bytes"):
        row[key] = statistics.median(measured[key] for measured in rounds)
        row[f"{key}_ratio"] = row[key] / statistics.median(measured[key] for measured in full)
    return row


def main() -> None:
    """Measure all presses in turn, round by round, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="what `bench caches --save-tokens` wrote")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--budget", type=float, default=0.25, help="share of the prompt that is kept")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the record")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    tokens = torch.tensor(json.loads(options.tokens.read_text()))
    presses = {name: build(1 - options.budget) for name, build in MEASURED.items()}
    for press in presses.values():
        measure(model, press, tokens[None, :256], options.new_tokens)
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    settings = vars(options) | {name: Path(vars(options)[name]).name for name in ("tokens", "model", "out")}
    rows: list[dict[str, Any]] = []
    record = {"rows": rows, "settings": settings, "threads": torch.get_num_threads(), "versions": versions}
    print(f"| press | tokens | rows | prefill s | ratio | step ms | ratio | bytes ratio |\n{'|---' * 8}|")
    for length in options.lengths:
        for batch_size in options.batch_sizes:
            ids = tokens[:length].expand(batch_size, -1)
            found: dict[str, list] = {name: [] for name in presses}
            for _ in range(options.rounds):
                for name, press in presses.items():
                    found[name].append(measure(model, press, ids, options.new_tokens))
            for name, rounds in found.items():
                row = as_row(name, length, batch_size, rounds, found[FULL])
                rows.append(row)
                print(
                    f"| {name} | {length:,} | {batch_size} "
                    f"| {row['prefill_seconds']:.2f} | {row['prefill_seconds_ratio']:.2f} "
                    f"| {row['step_seconds'] * 1e3:.1f} | {row['step_seconds_ratio']:.2f} "
                    f"| {row['bytes_ratio']:.2f} |",
                    flush=True,
                )
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
