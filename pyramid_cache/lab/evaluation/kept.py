"""Which positions of an example context each cache keeps."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyramid_cache.engine.kept import kept_positions
from pyramid_cache.lab.evaluation.cells import append_line, read_lines
from pyramid_cache.lab.evaluation.evaluator import Evaluation, len_behind
from pyramid_cache.lab.evaluation.reading import Reader
from pyramid_cache.lab.evaluation.tasks import Context


POSITIONS_FILE = "positions.jsonl"
# A picture has room for so many dots side by side.
MAX_COLUMNS = 256
DECIMALS = 2


@dataclass(frozen=True)
class KeptPositions:
    """
    What a cache held of the first context of a task, of `num_tokens` tokens, when it had read it.

    Attributes:
        shares (`list[list[float]]`): Per layer the share of the KV heads that held each position, means over
            neighbours where there are more than `MAX_COLUMNS`.
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
    What each cache at each budget keeps of a context, which is the first of its task. What is measured is written to
    the folder at once, and not measured again.
    """
    path = folder / POSITIONS_FILE
    known = read_lines(path, parse_kept, True, announce) if path.exists() else ()
    found = {(kept.task, kept.cache, kept.budget): kept for kept in known}
    wanted = [(context.task, *setting) for setting in itertools.product(evaluation.caches, evaluation.budgets)]
    missing = [place for place in wanted if place not in found]
    if missing:
        num_tokens = len(context.ids)
        reading = Reader(evaluation.model, torch.tensor([context.ids], device=evaluation.model.device)).context
        for place in missing:
            cache, _ = evaluation.read(place[1:], [context.ids], reading, len_behind(context.threads))
            shares = kept_positions(cache, num_tokens)
            if num_tokens > MAX_COLUMNS:
                shares = torch.nn.functional.adaptive_avg_pool1d(shares, MAX_COLUMNS)
            rounded = [[round(share, DECIMALS) for share in layer] for layer in shares.tolist()]
            found[place] = KeptPositions(*place, num_tokens, rounded)
            append_line(path, asdict(found[place]))
    return [found[place] for place in wanted]
