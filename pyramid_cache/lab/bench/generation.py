"""
What a cache costs in a model: reading a prompt, decode steps of plain `generate`, and bytes, beside DynamicCache on the same
tokens in the same run.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from pyramid_cache import ShadowKVCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.bench.contenders import BASELINE, TRANSFORMERS, Contender, Workload
from pyramid_cache.lab.bench.op_rows import free_memory
from pyramid_cache.lab.demo.timed_answers import generate, layer_tensors, storage_bytes
from pyramid_cache.lab.weights import ProgressCallback


WARM_UP_STEPS = 2
# Enough for most caches to evict, so that their kernels are compiled before anything is timed.
WARM_UP_TOKENS = {"cpu": 256, "cuda": 4096}
PROFILED_STEPS = 4
# What no cache gets of a device when its largest batch is sought: logits, activations of a step, and workspaces.
HEADROOM_BYTES = 3 << 29
# Of the host's memory that is free: page-locked memory that goes beyond makes a machine unusable.
HOST_SHARE = 0.6


@dataclass(frozen=True)
class Settings:
    """
    Args:
        lengths (`list[int]`): Tokens of prompts.
        batch_sizes (`list[int]`): Rows that are decoded, ascending.
        new_tokens (`int`): Decode steps that are timed.
        rounds (`int`): How often all caches take their turn.
        prefill_rows (`str`): "batch": the prompt is read with all rows. "one": with one row, which is copied then, by caches
            that can.
        finds_largest_batch (`bool`): Whether the largest batch that fits is decoded as well, on CUDA.
        shows_stages (`bool`): Whether steps are profiled, beside those that are timed.
    """

    lengths: list[int]
    batch_sizes: list[int]
    new_tokens: int = 16
    rounds: int = 2
    prefill_rows: str = "batch"
    finds_largest_batch: bool = False
    shows_stages: bool = False


@dataclass
class Measured:
    """
    One cache with prompts of one length and so many rows.

    Attributes:
        prefill_rows (`int`): Rows that were read.
        prefill_seconds (`list[float]`): Of each round; the same where rows were copied from one reading.
        step_seconds (`list[float]`): Median of the decode steps of each round.
        device_bytes, host_bytes (`int`): What the cache holds at the end, by where it lies.
        prefill_peak_bytes, decode_peak_bytes (`int`, *optional*): The most that was allocated on a CUDA device, without the
            model.
        is_largest_batch (`bool`): Whether the batch is the largest that fits by the bytes of a row.
        bound (`str`, *optional*): What the largest batch is bounded by, "device" or "host".
        stages (`dict[str, float]`): Share of the time of steps by op.
        fetched_bytes (`float`, *optional*): What ShadowKVCache read from the host per step, all rows together.
        failure (`str`, *optional*): Why there are no figures.
    """

    cache: str
    label: str
    length: int
    batch_size: int
    prefill_rows: int = 0
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    device_bytes: int = 0
    host_bytes: int = 0
    prefill_peak_bytes: int | None = None
    decode_peak_bytes: int | None = None
    is_largest_batch: bool = False
    bound: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    fetched_bytes: float | None = None
    failure: str | None = None


class Bench:
    """
    Measures caches in a model.

    Args:
        model (`PreTrainedModel`): What reads and decodes.
        tokens (`torch.Tensor`): `(tokens,)`, of which prompts are the first.
        contenders (`list[Contender]`): The baseline is put in front if it is missing.
        note (`Callable`): Gets all rows whenever there is a new one.

    Raises:
        ValueError: A prompt is longer than the tokens, or than what the model was made for; a cache refuses its budget.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        contenders: list[Contender],
        settings: Settings,
        progress: ProgressCallback,
        note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        names = [contender.name for contender in contenders]
        self.contenders = contenders if BASELINE in names else [TRANSFORMERS[BASELINE], *contenders]
        self.progress, self.note = progress, note
        self.measured: dict[tuple[str, int, int], Measured] = {}
        self.device = model.device
        longest = max(settings.lengths)
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or longest
        if longest > len(tokens):
            raise ValueError(f"--lengths {longest} exceeds the {len(tokens):,} tokens that there are to read.")
        if self._longest(longest) > limit:
            raise ValueError(
                f"--lengths {longest} and what is generated are {self._longest(longest):,} tokens, but the model was made for "
                f"{limit:,}."
            )
        for length in settings.lengths:
            for contender in self.contenders:
                contender.build(model, self._workload(length, settings.batch_sizes[0]))

    def _longest(self, length: int) -> int:
        """Tokens of a row at the end of a measurement."""
        steps_of_a_run = WARM_UP_STEPS + self.settings.new_tokens + 2
        runs = len(self.settings.batch_sizes) + self.settings.finds_largest_batch
        return length + runs * steps_of_a_run + PROFILED_STEPS + 2

    def _workload(self, length: int, batch_size: int) -> Workload:
        return Workload(length, batch_size, self._longest(length))

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Measures all, and returns the rows; see `as_row`."""
        warm_up = min(WARM_UP_TOKENS.get(self.device.type, 256), *self.settings.lengths)
        for contender in self.contenders:
            self.progress(f"{contender.label}: warming up", 0, None)
            cache, ids, _ = self._read(contender, warm_up, self.settings.batch_sizes[0])
            self._decode(cache, ids)
            del cache
        for length in self.settings.lengths:
            for round_index in range(self.settings.rounds):
                for contender in self.contenders:
                    self._measure(contender, length, round_index)
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """What is known so far."""
        return [as_row(measured, self._baseline_of(measured)) for measured in self.measured.values()]

    def _baseline_of(self, measured: Measured) -> Measured | None:
        """The baseline with the same prompts and rows; of a largest batch, its own largest one."""
        for other in self.measured.values():
            if other.cache == BASELINE and other.length == measured.length and other.failure is None:
                if other.batch_size == measured.batch_size and not measured.is_largest_batch:
                    return other
                if other.is_largest_batch and measured.is_largest_batch:
                    return other
        return None

    def _measure(self, contender: Contender, length: int, round_index: int) -> None:
        """One cache with prompts of one length, at all batch sizes."""
        is_last = round_index == self.settings.rounds - 1
        try:
            cache, ids, prefill = None, None, None
            for batch_size in self.settings.batch_sizes:
                is_copied = self.settings.prefill_rows == "one" and contender.copies_rows
                if cache is None or not is_copied:
                    cache = None  # before the next one fills the memory
                    self.progress(f"{contender.label}: reading {length:,} tokens", 0, None)
                    num_rows = 1 if is_copied else batch_size
                    cache, ids, prefill = self._read(contender, length, num_rows, batch_size)
                cache, ids = self._with_rows(cache, ids, batch_size)
                ids = self._note_decoding(contender, cache, ids, length, prefill, is_last)
            if is_last and self.settings.finds_largest_batch and contender.copies_rows:
                batch_size, bound = self._largest_batch(cache, len(ids))
                if batch_size > len(ids):
                    cache, ids = self._with_rows(cache, ids, batch_size)
                    self._note_decoding(contender, cache, ids, length, prefill, is_last)
                measured = self.measured[contender.name, length, batch_size]
                measured.is_largest_batch, measured.bound = True, bound
        except torch.OutOfMemoryError as error:
            key = contender.name, length, batch_size
            reason = str(error).splitlines()[0]
            self.measured[key] = Measured(contender.name, contender.label, length, batch_size, failure=reason)
        self.note(self.rows())

    def _read(
        self, contender: Contender, length: int, num_rows: int, batch_size: int | None = None
    ) -> tuple[Cache, torch.Tensor, tuple[int, float, int | None]]:
        """
        Reads a prompt.

        Returns:
            The cache; the sequences `(rows, length + 1)`, whose last token it has not seen; and rows, seconds and peak bytes.
        """
        cache = contender.build(self.model, self._workload(length, batch_size or num_rows))
        ids = self.tokens[:length].to(self.device).expand(num_rows, -1)
        self._reset_peak()
        before = self._allocated()
        start = self._now()
        logits = self.model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
        seconds = self._now() - start
        peak = self._peak(before)
        return cache, torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1), (num_rows, seconds, peak)

    def _with_rows(self, cache: Cache, ids: torch.Tensor, batch_size: int) -> tuple[Cache, torch.Tensor]:
        """As many rows as are asked for, all copies of the first."""
        if batch_size != len(ids):
            rows = torch.zeros(batch_size, dtype=torch.long, device=self.device)
            cache.batch_select_indices(rows)
            ids = ids[:1].expand(batch_size, -1)
        return cache, ids

    def _decode(
        self, cache: Cache, ids: torch.Tensor, on_token: Callable[[int], None] = lambda done: None
    ) -> tuple[torch.Tensor, list[float]]:
        """Decodes by `generate`; returns the sequences, and the seconds of the steps that are not warm-up."""
        num_steps = WARM_UP_STEPS + self.settings.new_tokens
        sequences, stopwatch = generate(self.model, ids, cache, num_steps + 1, on_token)
        stamps = stopwatch.stamps[1 + WARM_UP_STEPS :]
        return sequences, [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)]

    def _note_decoding(
        self,
        contender: Contender,
        cache: Cache,
        ids: torch.Tensor,
        length: int,
        prefill: tuple[int, float, int | None],
        is_last: bool,
    ) -> torch.Tensor:
        """Decodes, and notes what that and reading took; returns the sequences."""
        batch_size = len(ids)
        self.progress(f"{contender.label}: {length:,} tokens, {batch_size} rows", 0, None)
        key = contender.name, length, batch_size
        measured = self.measured.setdefault(key, Measured(contender.name, contender.label, length, batch_size))
        self._reset_peak()
        held_before = self._allocated() - sum(split_bytes(cache)[:1])
        ids, seconds = self._decode(cache, ids)
        measured.prefill_rows, prefill_seconds, measured.prefill_peak_bytes = prefill
        measured.prefill_seconds.append(prefill_seconds)
        measured.step_seconds.append(statistics.median(seconds))
        measured.decode_peak_bytes = self._peak(held_before)
        measured.device_bytes, measured.host_bytes = split_bytes(cache)
        if is_last and self.settings.shows_stages:
            ids, measured.stages, measured.fetched_bytes = self._profile(cache, ids)
        return ids

    def _profile(self, cache: Cache, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, float], float | None]:
        """The sequences after a few steps more; the share of each op in their time; what they fetched."""
        counter = FetchCounter(cache)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            sequences, _ = generate(self.model, ids, cache, PROFILED_STEPS + 1, counter)
        return sequences, stage_shares(profiler.key_averages(), self.device.type), counter.bytes_per_step

    def _largest_batch(self, cache: Cache, batch_size: int) -> tuple[int, str]:
        """The rows for which there is memory, and what bounds them."""
        device_bytes, host_bytes = (held / batch_size for held in split_bytes(cache))
        free = free_memory(self.device) + torch.cuda.memory_reserved(self.device) - self._allocated()
        num_layers = len(cache.layers)
        # While rows are copied, one layer is there twice.
        device_rows = int((free + device_bytes * batch_size - HEADROOM_BYTES) / (device_bytes * (1 + 1 / num_layers)))
        if not host_bytes:
            return max(device_rows, 1), "device"
        host_free = free_memory(torch.device("cpu")) or 0
        host_rows = int((HOST_SHARE * host_free + host_bytes * batch_size) / (host_bytes * (1 + 1 / num_layers)))
        return max(min(device_rows, host_rows), 1), "device" if device_rows <= host_rows else "host"

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _peak(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else None


class FetchCounter:
    """Counts the bytes of the values that ShadowKVCache reads from the host: of chunks that a step did not find."""

    def __init__(self, cache: Cache) -> None:
        is_shadow = isinstance(cache, ShadowKVCache)
        self.layers = (
            [layer for layer in cache.compressed_layers if layer.held_chunks is not None] if is_shadow else []
        )
        self.held: list[torch.Tensor] = []
        self.num_bytes, self.num_steps = 0, 0

    def __call__(self, done: int) -> None:
        """To be called after each step."""
        held = [layer.held_chunks.clone() for layer in self.layers]
        for layer, earlier, later in zip(self.layers, self.held, held, strict=False):
            num_chunks = int(((earlier != later) & (later >= 0)).sum())
            self.num_bytes += (
                num_chunks * layer.chunk_size * layer.host_values.shape[3] * layer.host_values.element_size()
            )
        self.num_steps += bool(self.held)
        self.held = held

    @property
    def bytes_per_step(self) -> float | None:
        """None of a cache that reads nothing from the host."""
        return self.num_bytes / self.num_steps if self.num_steps else None


def stage_shares(events: Iterable[Any], device_type: str) -> dict[str, float]:
    """
    What steps take their time for: the ops of this library by name, attention of torch, linear layers, and all else.

    Args:
        events (`Iterable`): The averages of a torch profiler.
        device_type (`str`): "cuda": shares of the time of the device, in which what runs at once counts twice. Else of the CPU's.
    """
    totals: dict[str, float] = {}
    whole = 0.0
    for event in events:
        if device_type == "cuda":
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                whole += event.self_device_time_total
            seconds = event.device_time_total
        else:
            whole += event.self_cpu_time_total
            seconds = event.cpu_time_total
        if event.device_type == DeviceType.CPU and (stage := stage_of(event.key)):
            totals[stage] = totals.get(stage, 0.0) + seconds
    if not whole:
        return {}
    shares = {stage: seconds / whole for stage, seconds in sorted(totals.items())}
    return shares | {"other": 1 - sum(shares.values())}


def stage_of(op: str) -> str | None:
    """The stage that an op of torch is, None for one that is part of another or of none."""
    if op.startswith("pyramid_cache::"):
        return op.removeprefix("pyramid_cache::")
    return {"aten::linear": "linear layers", "aten::scaled_dot_product_attention": "attention"}.get(op)


def split_bytes(cache: Cache) -> tuple[int, int]:
    """The bytes that a cache holds on its device and on the host."""
    if isinstance(cache, CompressedCache):
        held = {device: sum(roles.values()) for device, roles in cache.memory().items()}
        host = held.pop("host", 0)
        return sum(held.values()), host
    tensors = list(layer_tensors(cache))
    total = storage_bytes(tensors)
    if len({tensor.device.type for tensor in tensors}) < 2:
        return total, 0
    host = storage_bytes(tensor for tensor in tensors if tensor.is_cpu)
    return total - host, host


def as_row(measured: Measured, baseline: Measured | None) -> dict[str, Any]:
    """
    The figures of one cache with prompts of one length and so many rows.

    Returns:
        `dict`: What `Measured` has, and "prefill_ratio" and "step_ratio" to the baseline, of medians over the rounds, each with
            the least and the greatest of any round; "tokens_per_second" of all rows; "tokens_ratio", also between batches of
            different size where both are the largest that fit; "bytes_ratio" of what lies on the device, per row.
    """
    row = asdict(measured)
    names = ("tokens_per_second", "prefill_ratio", "prefill_ratio_range", "step_ratio", "step_ratio_range")
    row |= dict.fromkeys((*names, "tokens_ratio", "bytes_ratio"))
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
