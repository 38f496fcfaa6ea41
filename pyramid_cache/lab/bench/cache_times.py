"""What a cache costs in a model, beside DynamicCache: reading a prompt, steps of plain `generate`, and bytes."""

import argparse
import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from pyramid_cache import ShadowKVCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.machine import free_memory
from pyramid_cache.lab.registry import BASELINE, BudgetLike, Contender, Workload, find_entry
from pyramid_cache.lab.timed_generation import generate as generate_timed
from pyramid_cache.lab.timed_generation import layer_tensors, storage_bytes
from pyramid_cache.lab.weights import ProgressCallback


WARM_UP_STEPS = 2
# Enough for most caches to evict, so that their kernels are compiled before anything is timed.
WARM_UP_TOKENS = {"cpu": 256, "cuda": 4096}
PROFILED_STEPS = 4
# What no cache gets of a device when its largest batch is sought: logits, activations of a step, and workspaces.
HEADROOM_BYTES = 3 << 29
TORCH_STAGES = {"aten::linear": "linear layers", "aten::scaled_dot_product_attention": "attention"}
# The share of the free host memory that caches may take: a machine with more page-locked memory is unusable.
HOST_SHARE = 0.6
# On CUDA `generate` would compile steps of some caches. `decode_times` measures those.
generate = functools.partial(generate_timed, disable_compile=True)


def contenders_of(names: Iterable[str], budgets: Iterable[BudgetLike]) -> list[Contender]:
    """The baseline, every named cache of this library at each budget, and those of transformers once."""
    found = []
    for entry in map(find_entry, dict.fromkeys((BASELINE, *names))):
        if not entry.has_budget:
            found.append(Contender(entry))
            continue
        found += [Contender(entry, budget) for budget in budgets]
    return found


@dataclass
class Measured:
    """One cache with prompts of one length and one number of rows."""

    cache: str
    label: str
    length: int
    batch_size: int
    prefill_rows: int = 0  # the rows that were read; others are copies
    prefill_seconds: list[float] = field(default_factory=list)  # by round
    step_seconds: list[float] = field(default_factory=list)  # by round, medians of its decode steps
    device_bytes: int = 0  # held at the end
    host_bytes: int = 0
    prefill_peak_bytes: int | None = None  # of a CUDA device, without the model
    decode_peak_bytes: int | None = None
    is_largest_batch: bool = False
    bound: str | None = None  # the memory that limits the largest batch
    stages: dict[str, float] = field(default_factory=dict)  # the shares of ops in the time of steps
    fetched_bytes: float | None = None  # read from the host per step, by all rows together
    failure: str | None = None


@dataclass
class Reading:
    """What reading `num_rows` rows took. The cache has seen all tokens of `ids`, `(rows, tokens)`, but the last."""

    cache: Cache
    ids: torch.Tensor
    num_rows: int
    seconds: float
    peak_bytes: int | None

    def set_rows(self, batch_size: int) -> None:
        """As many rows as are asked for, all of them copies of the first."""
        if batch_size != len(self.ids):
            self.cache.batch_select_indices(torch.zeros(batch_size, dtype=torch.long, device=self.ids.device))
            self.ids = self.ids[:1].expand(batch_size, -1)


@dataclass
class Bench:
    """Measures caches in a model with the options of `bench caches`. `note` gets all rows whenever one has changed."""

    model: PreTrainedModel
    tokens: torch.Tensor
    options: argparse.Namespace
    progress: ProgressCallback
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    facts: ClassVar[dict[str, Any]] = {}  # more of the record

    def __post_init__(self) -> None:
        model, tokens, options, self.device = self.model, self.tokens, self.options, self.model.device
        self.contenders = contenders_of(options.caches, options.budgets)
        self.batch_sizes = sorted(options.batch_sizes)
        self.measured: dict[tuple[str, int, int], Measured] = {}
        # What comes behind a prompt: at each batch size the warm-up, the timed steps and the first and last token.
        runs = len(options.batch_sizes) + options.largest_batch
        self.num_later = runs * (WARM_UP_STEPS + options.new_tokens + 2) + PROFILED_STEPS + 2
        check_lengths(model, tokens, max(options.lengths), self.num_later)
        for length, contender in itertools.product(options.lengths, self.contenders):
            self._new_cache(contender, length, self.batch_sizes[0])

    def _new_cache(self, contender: Contender, length: int, batch_size: int) -> Cache:
        return contender.build(self.model, Workload(length, batch_size, self.num_later))

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Measures all, and returns the rows; see `as_row`."""
        warm_up = min(WARM_UP_TOKENS.get(self.device.type, 256), *self.options.lengths)
        for contender in self.contenders:
            self.progress(f"{contender.label}: warming up", 0, None)
            self._decode(self._read(contender, warm_up, self.batch_sizes[0]), num_steps=1)
        rows: list[dict[str, Any]] = []
        for length, rounds_left in itertools.product(self.options.lengths, reversed(range(self.options.rounds))):
            for contender in self.contenders:
                self._measure(contender, length, is_last=rounds_left == 0)
                rows = [as_row(measured, self._baseline_of(measured)) for measured in self.measured.values()]
                self.note(rows)
        return rows

    def _baseline_of(self, measured: Measured) -> Measured | None:
        """The baseline with the same prompts and rows; for a largest batch, the largest batch of the baseline."""
        for other in self.measured.values():
            is_alike = other.is_largest_batch if measured.is_largest_batch else other.batch_size == measured.batch_size
            if (other.cache, other.length, other.failure) == (BASELINE, measured.length, None) and is_alike:
                return other
        return None

    def _measure(self, contender: Contender, length: int, is_last: bool) -> None:
        """One cache with prompts of one length, at all batch sizes."""
        copies_rows = contender.entry.copies_rows
        is_copied = self.options.prefill_rows == "one" and copies_rows
        reading = None
        try:
            for batch_size in self.batch_sizes:
                if reading is None or not is_copied:
                    reading = None  # before the next one fills the memory
                    self.progress(f"{contender.label}: reading {length:,} tokens", 0, None)
                    reading = self._read(contender, length, batch_size, 1 if is_copied else batch_size)
                self._note_decoding(contender, reading, length, batch_size, is_last)
            if is_last and self.options.largest_batch and copies_rows:
                unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
                free = free_memory(self.device) + unused, free_memory(torch.device("cpu")) or 0
                cache = reading.cache
                batch_size, bound = largest_batch(split_bytes(cache), batch_size, len(cache.layers), *free)
                if batch_size > len(reading.ids):
                    self._note_decoding(contender, reading, length, batch_size, is_last)
                measured = self.measured[contender.name, length, batch_size]
                measured.is_largest_batch, measured.bound = True, bound
        except torch.OutOfMemoryError as error:
            key = contender.name, length, batch_size
            reason = str(error).splitlines()[0]
            self.measured[key] = Measured(contender.name, contender.label, length, batch_size, failure=reason)

    def _read(self, contender: Contender, length: int, batch_size: int, num_rows: int | None = None) -> Reading:
        """Reads a prompt with `num_rows` rows, for decoding with `batch_size` rows."""
        cache = self._new_cache(contender, length, batch_size)
        ids = self.tokens[:length].to(self.device).expand(num_rows or batch_size, -1)
        before = self._start_peak()
        sequences, stopwatch = generate(self.model, ids, cache, 1)
        return Reading(cache, sequences, len(ids), stopwatch.prefill_seconds, self._peak(before))

    def _decode(self, reading: Reading, num_steps: int) -> list[float]:
        """Decodes by `generate`; returns the seconds of so many steps behind the warm-up."""
        num_steps += WARM_UP_STEPS
        reading.ids, stopwatch = generate(self.model, reading.ids, reading.cache, num_steps + 1)
        return [later - earlier for earlier, later in itertools.pairwise(stopwatch.stamps[1 + WARM_UP_STEPS :])]

    def _note_decoding(
        self, contender: Contender, reading: Reading, length: int, batch_size: int, is_last: bool
    ) -> None:
        """Decodes, and notes what decoding and reading took."""
        cache = reading.cache
        reading.set_rows(batch_size)
        self.progress(f"{contender.label}: {length:,} tokens, {batch_size} rows", 0, None)
        key = contender.name, length, batch_size
        measured = self.measured.setdefault(key, Measured(contender.name, contender.label, length, batch_size))
        held_before = self._start_peak() - split_bytes(cache)[0]
        measured.step_seconds.append(statistics.median(self._decode(reading, self.options.new_tokens)))
        measured.decode_peak_bytes = self._peak(held_before)
        measured.prefill_seconds.append(reading.seconds)
        measured.prefill_rows, measured.prefill_peak_bytes = reading.num_rows, reading.peak_bytes
        measured.device_bytes, measured.host_bytes = split_bytes(cache)
        if is_last and self.options.stages:
            counter = FetchCounter(cache)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            with profile(activities=activities) as profiler:
                reading.ids, _ = generate(self.model, reading.ids, cache, PROFILED_STEPS + 1, counter)
            measured.stages = stage_shares(profiler.key_averages(), self.device.type)
            measured.fetched_bytes = counter.bytes_per_step

    def _start_peak(self) -> int:
        """Starts to look for the most bytes on a CUDA device; returns what is allocated at the start."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else None


def check_lengths(model: PreTrainedModel, tokens: torch.Tensor, longest: int, num_later: int) -> None:
    """Raises ValueError if the longest prompt and what comes behind it are too long for the tokens or the model."""
    final = longest + num_later
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or final
    if longest > len(tokens):
        raise ValueError(f"--lengths {longest} exceeds the {len(tokens):,} tokens that there are to read.")
    if final > limit:
        problem = f"--lengths {longest} and the generated tokens are {final:,}"
        raise ValueError(f"{problem}, but the model was made for {limit:,}.")


def largest_batch(
    held: tuple[int, int], batch_size: int, num_layers: int, device_free: int, host_free: int
) -> tuple[int, str]:
    """The rows for which there is memory, and what limits them: "device" or "host". `held` is of `split_bytes`."""
    device_bytes, host_bytes = held
    # While rows are copied, one layer is there twice.
    copies = 1 + 1 / num_layers
    device_rows = int((device_free + device_bytes - HEADROOM_BYTES) / (device_bytes / batch_size * copies))
    if not host_bytes:
        return max(device_rows, 1), "device"
    host_rows = int((HOST_SHARE * host_free + host_bytes) / (host_bytes / batch_size * copies))
    return max(min(device_rows, host_rows), 1), "device" if device_rows <= host_rows else "host"


class FetchCounter:
    """Counts the bytes of the values that ShadowKVCache reads from the host: of chunks that a step did not find."""

    def __init__(self, cache: Cache) -> None:
        layers = cache.compressed_layers if isinstance(cache, ShadowKVCache) else []
        self.layers = [layer for layer in layers if layer.state.held_chunks is not None]
        self.held: list[torch.Tensor] = []
        self.num_bytes: list[int] = []

    def __call__(self, done: int) -> None:
        """To be called after each step. The first step is what the second is compared with."""
        held = [layer.state.held_chunks.clone() for layer in self.layers]
        if self.held:
            self.num_bytes.append(0)
        for layer, earlier, later in zip(self.layers, self.held, held, strict=False):
            num_tokens = int(((earlier != later) & (later >= 0)).sum()) * layer.settings.chunk_size
            self.num_bytes[-1] += num_tokens * layer.shadow.values.tensor[0, 0, 0].nbytes
        self.held = held

    @property
    def bytes_per_step(self) -> float | None:
        """None for a cache that reads nothing from the host."""
        return statistics.mean(self.num_bytes) if self.num_bytes else None


def stage_shares(events: Iterable[Any], device_type: str) -> dict[str, float]:
    """Shares of ops in a torch profiler's averages. On CUDA kernels that run at once count twice."""
    totals: Counter[str] = Counter()
    whole = 0.0
    is_cuda = device_type == "cuda"
    for event in events:
        if not is_cuda:
            whole += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            whole += event.self_device_time_total
        # Other ops are parts of these, or belong to the rest.
        stage = TORCH_STAGES.get(event.key, event.key.removeprefix("pyramid_cache::"))
        if event.device_type == DeviceType.CPU and stage != event.key:
            totals[stage] += event.device_time_total if is_cuda else event.cpu_time_total
    shares = {stage: totals[stage] / whole for stage in sorted(totals) if whole}
    return shares | {"other": 1 - sum(shares.values())} if whole else {}


def split_bytes(cache: Cache) -> tuple[int, int]:
    """The bytes that a cache holds on its device and on the host."""
    if isinstance(cache, CompressedCache):
        held = {device: sum(roles.values()) for device, roles in cache.memory().items()}
        host = held.pop("host", 0)
        return sum(held.values()), host
    tensors = list(layer_tensors(cache))
    host = 0
    if len({tensor.device.type for tensor in tensors}) > 1:
        host = storage_bytes(tensor for tensor in tensors if tensor.is_cpu)
    return storage_bytes(tensors) - host, host


def as_row(measured: Measured, baseline: Measured | None) -> dict[str, Any]:
    """The fields of `Measured`, and ratios of its medians, tokens per second and bytes to the baseline's."""
    names = ("tokens_per_second", "prefill_ratio", "prefill_ratio_range", "step_ratio", "step_ratio_range")
    row = asdict(measured) | dict.fromkeys((*names, "tokens_ratio", "bytes_ratio"))
    if measured.failure is not None or not measured.step_seconds:
        return row
    row["tokens_per_second"] = measured.batch_size / statistics.median(measured.step_seconds)
    if baseline is None:
        return row
    if baseline.prefill_rows == measured.prefill_rows:
        row["prefill_ratio"], row["prefill_ratio_range"] = ratio_of(measured.prefill_seconds, baseline.prefill_seconds)
    if baseline.batch_size == measured.batch_size:
        row["step_ratio"], row["step_ratio_range"] = ratio_of(measured.step_seconds, baseline.step_seconds)
    row["tokens_ratio"] = row["tokens_per_second"] / (baseline.batch_size / statistics.median(baseline.step_seconds))
    row["bytes_ratio"] = measured.device_bytes / measured.batch_size / (baseline.device_bytes / baseline.batch_size)
    return row


def ratio_of(seconds: list[float], baseline: list[float]) -> tuple[float, list[float]]:
    """The ratio of the medians, and the least and the greatest ratio of a round."""
    by_round = [one / other for one, other in zip(seconds, baseline, strict=False)]
    return statistics.median(seconds) / statistics.median(baseline), [min(by_round), max(by_round)]
