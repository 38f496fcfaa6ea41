"""
What a decode step takes, compiled and not, beside DynamicCache, compiled StaticCache, and copies of as many bytes.

Steps are those of plain `generate`, which compiles them where the cache allows it.
"""

import argparse
import gc
import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel

from pyramid_cache.lab.bench.cache_times import Reading, check_lengths, contenders_of, ratio_of, split_bytes
from pyramid_cache.lab.bench.op_times import copy_bandwidth
from pyramid_cache.lab.registry import BASELINE, Contender, Workload
from pyramid_cache.lab.timed_generation import Stopwatch, generate, storage_bytes
from pyramid_cache.lab.weights import ProgressCallback


# Untimed steps of each run. They compile, record CUDA graphs, and evict once: caches evict every 32 tokens at most.
WARM_UP_STEPS = 40
# The device is waited for at both ends of a block, and not within.
BLOCK_STEPS = 16
WAYS = ("eager", "compiled")
BACKEND = "inductor"
COMPILE_MODES = {"cpu": "default", "cuda": "reduce-overhead"}
# Beyond so many graphs of a model torch compiles no more. Each cache has one at each length and number of rows.
MOST_GRAPHS = 256
# Where torch says why it runs a graph without CUDA graphs: the name of this log differs between versions.
SKIP_LOGS = [f"torch._inductor.cudagraph_utils.__{name}" for name in ("cudagraphs", "perf_hints")]


class Way(NamedTuple):
    """A cache, and whether its steps are compiled."""

    contender: Contender
    is_compiled: bool


@dataclass
class Decoded:
    """Steps of one cache, compiled or not, with prompts of one length and one number of rows."""

    cache: str
    label: str
    is_compiled: bool
    length: int
    batch_size: int
    step_seconds: list[float] = field(default_factory=list)  # by round, means over its timed steps
    block_seconds: list[float] = field(default_factory=list)  # means over the steps of each block, of all rounds
    device_bytes: int = 0  # held by the cache at the end
    host_bytes: int = 0
    num_graphs: int = 0  # compiled in all rounds
    num_late_graphs: int = 0  # of these, those that were compiled while steps were timed
    compile_seconds: float = 0.0  # what the untimed steps took more than as many timed ones, of all rounds
    num_skips: int = 0  # graphs that run without CUDA graphs, where these were asked for
    skip_reasons: list[str] = field(default_factory=list)
    failure: str | None = None

    @property
    def key(self) -> tuple[str, bool, int, int]:
        return self.cache, self.is_compiled, self.length, self.batch_size


class BlockClock(Stopwatch):
    """Notes the time, and how many graphs there are, at both ends of the untimed steps and after each block."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self.num_graphs: list[int] = []
        # Steps after which the time is noted. Those of the first token's logits are none.
        timed = range(WARM_UP_STEPS, WARM_UP_STEPS + num_steps, BLOCK_STEPS)
        self.borders = [0, *timed, WARM_UP_STEPS + num_steps]
        self.num_done = 0
        super().__init__(device, lambda done: None)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.num_done in self.borders:
            self.note()
            self.num_graphs.append(counters["stats"]["unique_graphs"])
        self.num_done += 1
        return scores

    @property
    def warm_up_seconds(self) -> float:
        return self.stamps[2] - self.stamps[1]

    @property
    def step_seconds(self) -> float:
        return (self.stamps[-1] - self.stamps[2]) / (self.borders[-1] - self.borders[1])

    @property
    def block_seconds(self) -> list[float]:
        blocks = zip(itertools.pairwise(self.stamps[2:]), itertools.pairwise(self.borders[1:]), strict=True)
        return [(end - start) / (last - first) for (start, end), (first, last) in blocks]


class SkipReasons(logging.Handler):
    """While entered, collects why graphs run without CUDA graphs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage().strip())

    def __enter__(self) -> "SkipReasons":
        for name in SKIP_LOGS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for name in SKIP_LOGS:
            logging.getLogger(name).removeHandler(self)


@dataclass
class DecodeBench:
    """Measures steps with the options of `bench decode`. `note` gets all rows whenever one has changed."""

    model: PreTrainedModel
    tokens: torch.Tensor
    options: argparse.Namespace
    progress: ProgressCallback
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None

    def __post_init__(self) -> None:
        model, options, self.device = self.model, self.options, self.model.device
        self.num_later = WARM_UP_STEPS + options.new_tokens + 2
        check_lengths(model, self.tokens, max(options.lengths), self.num_later)
        mode = options.compile_mode or COMPILE_MODES.get(self.device.type, "default")
        config: Any = CompileConfig(backend=BACKEND, mode=mode, fullgraph=True, dynamic=False)
        config._compile_all_devices = True  # a CPU as well
        self.compile_config: Any = config
        # Every cache is built once, so that a budget that it refuses is refused before anything runs.
        cells = list(itertools.product(options.lengths, sorted(options.batch_sizes)))
        self.ways = {cell: list(self._ways_of(*cell)) for cell in cells}
        self.measured: dict[tuple[str, bool, int, int], Decoded] = {}
        self.progress("Copying", 0, None)
        self.bandwidth, self.weight_bytes = copy_bandwidth(self.device), weight_bytes(model)
        self.facts = {"copy_bytes_per_second": self.bandwidth, "weight_bytes": self.weight_bytes, "compile_mode": mode}
        self.facts |= {"warm_up_steps": WARM_UP_STEPS, "block_steps": BLOCK_STEPS}

    def _ways_of(self, length: int, batch_size: int) -> Iterator[Way]:
        """DynamicCache, which `generate` never compiles; StaticCache compiled; the others as `--ways` says."""
        for contender in contenders_of(self.options.caches, self.options.budgets):
            compiles = can_compile(self._new_cache(contender, length, batch_size)) and contender.name != BASELINE
            wanted = self.options.ways if contender.entry.has_budget else ["compiled"]
            yield from (Way(contender, way == "compiled") for way in (wanted if compiles else ["eager"]))

    def _new_cache(self, contender: Contender, length: int, batch_size: int) -> Cache:
        return contender.build(self.model, Workload(length, batch_size, self.num_later))

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes over complete rows of an earlier run with the same model, so that they are not measured again."""
        wanted = {(way.contender.name, way.is_compiled, *cell) for cell, ways in self.ways.items() for way in ways}
        for row in rows:
            decoded = Decoded(**{own.name: row[own.name] for own in fields(Decoded)})
            is_complete = decoded.failure is None and len(decoded.step_seconds) == self.options.rounds
            if is_complete and decoded.key in wanted:
                self.measured[decoded.key] = decoded

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Measures all, and returns the rows; see `_row`."""
        rows = self._rows()
        self.note(rows)
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS):
            for cell, ways in self.ways.items():
                missing = [way for way in ways if (way.contender.name, way.is_compiled, *cell) not in self.measured]
                for index, way in itertools.product(range(self.options.rounds), missing):
                    if self.options.rounds == 1 or (index, way) == (0, missing[0]):
                        torch.compiler.reset()  # graphs of other caches hold memory
                    self._measure(way, *cell)
                    rows = self._rows()
                    self.note(rows)
        return rows

    def _measure(self, way: Way, length: int, batch_size: int) -> None:
        """One round of one cache; a failure is noted, and costs no other cache its turn."""
        contender = way.contender
        decoded = Decoded(contender.name, contender.label, way.is_compiled, length, batch_size)
        decoded = self.measured.setdefault(decoded.key, decoded)
        if decoded.failure is not None:
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        name = f"{contender.label}, {WAYS[way.is_compiled]}"
        try:
            self.progress(f"{name}: reading {length:,} tokens", 0, None)
            reading = self._read(contender, length, batch_size)
            self.progress(f"{name}: {length:,} tokens, {batch_size} rows", 0, None)
            self._decode(reading, decoded)
        except Exception as error:
            # Whatever a compiler raises. The other rows of a long run are worth more than a traceback.
            decoded.failure = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"

    def _read(self, contender: Contender, length: int, batch_size: int) -> Reading:
        """One row reads the prompt, and is copied. Without a way to copy rows, DynamicCache reads in its place."""
        cache = self._new_cache(contender, length, batch_size)
        reader: Any = cache if contender.entry.copies_rows else DynamicCache()
        ids, stopwatch = generate(
            self.model, self.tokens[None, :length].to(self.device), reader, 1, disable_compile=True
        )
        reading = Reading(cache, ids, 1, stopwatch.prefill_seconds, None)
        if reader is cache:
            reading.set_rows(batch_size)
            return reading
        for index, layer in enumerate(reader.layers):
            keys, values = (states.expand(batch_size, -1, -1, -1) for states in (layer.keys, layer.values))
            cache.update(keys, values, index)
        reading.ids = ids.expand(batch_size, -1)
        return reading

    def _decode(self, reading: Reading, decoded: Decoded) -> None:
        """Decodes in one call of `generate`, and notes what that took."""
        num_steps, before = self.options.new_tokens, counters["stats"]["unique_graphs"]
        skips_before = counters["inductor"]["cudagraph_skips"]
        clock = BlockClock(self.device, num_steps)
        settings = {"compile_config": self.compile_config, "disable_compile": False} if decoded.is_compiled else {}
        with SkipReasons() as skips:
            num_tokens = WARM_UP_STEPS + num_steps + 1
            generate(self.model, reading.ids, reading.cache, num_tokens, stopwatch=clock, **settings)
        decoded.step_seconds.append(clock.step_seconds)
        decoded.block_seconds += clock.block_seconds
        decoded.device_bytes, decoded.host_bytes = split_bytes(reading.cache)
        decoded.num_graphs += clock.num_graphs[-1] - before
        decoded.num_late_graphs += clock.num_graphs[-1] - clock.num_graphs[1]
        if decoded.is_compiled:
            decoded.compile_seconds += max(clock.warm_up_seconds - WARM_UP_STEPS * clock.step_seconds, 0.0)
        decoded.num_skips += counters["inductor"]["cudagraph_skips"] - skips_before
        decoded.skip_reasons = list(dict.fromkeys(decoded.skip_reasons + skips.reasons))

    def _rows(self) -> list[dict[str, Any]]:
        found = self.measured
        return [
            as_row(
                decoded,
                found.get((BASELINE, False, *decoded.key[2:])),
                found.get(("static", True, *decoded.key[2:])),
                self.weight_bytes + decoded.device_bytes,
                self.bandwidth,
            )
            for decoded in found.values()
        ]


def as_row(
    decoded: Decoded, baseline: Decoded | None, static: Decoded | None, num_bytes: int, bandwidth: float
) -> dict[str, Any]:
    """
    The fields of `Decoded`, tokens per second, and ratios to the steps of DynamicCache and of compiled StaticCache.
    The floor is the time that copies take for the bytes that a step reads: weights, and what the cache holds.
    """
    names = ("tokens_per_second", "step_ratio", "step_ratio_range", "static_ratio", "static_ratio_range")
    row = asdict(decoded) | dict.fromkeys((*names, "floor_bytes", "floor_fraction"))
    if decoded.failure is not None or not decoded.step_seconds:
        return row
    seconds = statistics.median(decoded.step_seconds)
    row["tokens_per_second"] = decoded.batch_size / seconds
    for name, other in (("step_ratio", baseline), ("static_ratio", static)):
        if other is not None and other.failure is None and other.step_seconds:
            row[name], row[f"{name}_range"] = ratio_of(decoded.step_seconds, other.step_seconds)
    if not decoded.host_bytes:  # else a step reads some of the bytes only
        row["floor_bytes"], row["floor_fraction"] = num_bytes, num_bytes / bandwidth / seconds
    return row


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes of the weights that a step reads: all but an embedding table that is not the output layer too."""
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_shared = output is not None and output.weight is table
    return storage_bytes(weight for weight in model.parameters() if is_shared or weight is not table)


def can_compile(cache: Cache) -> bool:
    """Whether `generate` may compile steps with this cache."""
    return getattr(cache, "can_compile", cache.is_compileable)
