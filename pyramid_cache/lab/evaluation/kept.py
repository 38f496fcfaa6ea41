"""Which positions of an example context each cache keeps."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.kept import kept_positions
from pyramid_cache.lab.evaluation.evaluator import Evaluation, len_behind
from pyramid_cache.lab.evaluation.lines import append_line, read_lines
from pyramid_cache.lab.evaluation.reading import Reader, Reading
from pyramid_cache.lab.evaluation.tasks import Context


POSITIONS_FILE = "positions.jsonl"
# Of a map of positions, which a picture shows in as many dots.
MAX_COLUMNS = 256
DECIMALS = 2


@dataclass(frozen=True)
class KeptPositions:
    """
    What a cache held of the first context of a task when it had read it.

    Attributes:
        num_tokens (`int`): The length of the context.
        shares (`list[list[float]]`): Per layer the share of the KV heads that held each position, means over neighbours
            where there are more than `MAX_COLUMNS`.
    """

    task: str
    cache: str
    budget: float
    num_tokens: int
    shares: list[list[float]]


def parse_kept(fields: dict[str, Any]) -> KeptPositions:
    """Reads what a cache kept from JSON; raises ValueError or TypeError if it is none."""
    kept = KeptPositions(**fields)
    torch.tensor(kept.shares, dtype=torch.float32)
    return kept


def measure_kept_positions(
    evaluation: Evaluation, context: Context, folder: Path, announce: Callable[[str], None]
) -> list[KeptPositions]:
    """
    What each cache at each budget keeps of a context, which is the first of its task.

    Args:
        folder (`Path`): What is measured is written there at once, and not measured again.
        announce (`Callable`): Told of a broken last line of an earlier run.

    Returns:
        `list[KeptPositions]`: One per cache and budget, in the order of the evaluation.
    """
    path = folder / POSITIONS_FILE
    found: dict[tuple[str, str, float], KeptPositions] = {}
    if path.exists():
        for kept in read_lines(path, parse_kept, True, announce):
            found[kept.task, kept.cache, kept.budget] = kept
    wanted = [(context.task, *setting) for setting in itertools.product(evaluation.caches, evaluation.budgets)]
    missing = [place for place in wanted if place not in found]
    if missing:
        ids = torch.tensor([context.ids], device=evaluation.model.device)
        needs_reading = any(evaluation.caches[name].reading == "dense" for _, name, _ in missing)
        reading = Reader(evaluation.model, ids).context if needs_reading else None
        num_later = len_behind(context)
        for place in missing:
            cache = read_context(evaluation, *place[1:], ids, reading, num_later)
            shares = kept_positions(cache, ids.shape[1])
            if ids.shape[1] > MAX_COLUMNS:
                shares = torch.nn.functional.adaptive_avg_pool1d(shares, MAX_COLUMNS)
            rounded = [[round(share, DECIMALS) for share in layer] for layer in shares.tolist()]
            found[place] = KeptPositions(*place, ids.shape[1], rounded)
            append_line(path, asdict(found[place]))
    return [found[place] for place in wanted]


@torch.no_grad()
def read_context(
    evaluation: Evaluation, name: str, budget: float, ids: torch.Tensor, reading: Reading | None, num_later: int
) -> CompressedCache:
    """A cache that has read a context `(1, tokens)` in its own way."""
    cache = evaluation.caches[name].build(evaluation.model, budget, ids.shape[1], num_later)
    if evaluation.caches[name].reading == "dense":
        assert reading is not None
        cache.replay(reading.layers)
    else:
        evaluation.model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    return cache
