"""One picture of several records: exact match against the bytes held, and which caches nothing surpasses."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pyramid_cache.engine.files import replacing
from pyramid_cache.lab.evaluation.score_plots import (
    BASELINE_COLOR,
    COLORS,
    LINE_STYLES,
    MARKERS,
    SHARE_TICKS,
    as_png,
)
from pyramid_cache.lab.evaluation.score_tables import groups
from pyramid_cache.lab.registry import BASELINE, find_entry


Row = dict[str, Any]

GREY = "#9a9a9a"
# The same question has the same score on another machine, but for rounding.
MOST_DIFFERENCE = 0.01
# Points between the lines of labels.
LABEL_HEIGHT = 10.5


def read_rows(paths: Sequence[Path], task: str, protocol: str) -> list[Row]:
    """
    The rows of one task and protocol in records of `--json` or `--out`, the full cache first. Of a cache at a budget
    the last record counts. Caches that the library no longer has are left out.

    Raises:
        ValueError: For a file that is no such record, has no rows of the task, or is not of the same cases as the
            first one.
    """
    found: dict[tuple[str, float], Row] = {}
    first: tuple[Row, Row] | None = None
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            rows, settings = groups(record["rows"]).get((task, protocol), []), record["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of `pyramid-cache eval` ({error}).") from error
        full = next((row for row in rows if row["cache"] == BASELINE), None)
        if full is None:
            raise ValueError(f"{path} has no rows of {task}, {protocol} first.")
        first = first or (full, settings)
        if not are_same_cases(first, (full, settings)):
            raise ValueError(f"{path} is not of the same cases as {paths[0]}. Draw them apart.")
        found |= {(row["cache"], row["budget"]): row for row in rows if row["cache"] == BASELINE or is_known(row)}
    return list(found.values())


def is_known(row: Row) -> bool:
    """Whether the library has the cache of a row."""
    try:
        return bool(find_entry(row["cache"]))
    except ValueError:
        return False


def are_same_cases(one: tuple[Row, Row], other: tuple[Row, Row]) -> bool:
    """Whether two rows of the full cache, each with the settings of its record, are of the same questions."""
    if any(one[1].get(name) != other[1].get(name) for name in ("model", "dtype", "seed")):
        return False
    likelihoods = [row["cases"]["log_likelihood"] for row, _ in (one, other)]
    return len(likelihoods[0]) == len(likelihoods[1]) and all(
        abs(first - second) <= MOST_DIFFERENCE for first, second in zip(*likelihoods, strict=True)
    )


def frontier_of(rows: Iterable[Row]) -> list[Row]:
    """Those that no other surpasses: with a better exact match in as few bytes, or one as good in fewer."""
    best: list[Row] = []
    # Bookkeeping is no advantage: shares are compared to a thousandth.
    for row in sorted(rows, key=lambda row: (round(row["held_share"], 3), -row["exact_match"])):
        if row["exact_match"] > max((other["exact_match"] for other in best), default=0):
            best.append(row)
    return best


def draw_frontier(rows: Sequence[Row], title: str = "") -> bytes:
    """
    A PNG of exact match by bytes held. A line goes through the budgets of each cache; dots are filled where tokens are
    quantised. Caches of the frontier are labelled, others are grey.
    """
    with style.context("default"):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axis = figure.subplots()
        own = [row for row in rows if row["cache"] != BASELINE]
        full = next(row for row in rows if row["cache"] == BASELINE)
        best = frontier_of(own)
        names = list(dict.fromkeys(row["cache"] for row in best))
        set_axes(axis, rows)
        axis.axhline(full["exact_match"], color=BASELINE_COLOR, linewidth=1.2, linestyle=(0, (6, 3)))
        axis.text(0.01, full["exact_match"] + 0.012, full["label"], transform=axis.get_yaxis_transform(), fontsize=8.5)
        others = [name for name in dict.fromkeys(row["cache"] for row in own) if name not in names]
        for rank, name in enumerate(others):
            dashes = LINE_STYLES[rank // len(MARKERS) % len(LINE_STYLES)]
            look: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": dashes, "markersize": 4}
            draw_line(axis, name, own, look | {"marker": MARKERS[rank % len(MARKERS)], "zorder": 1})
        for rank, name in enumerate(names):
            look = {"color": COLORS[rank % len(COLORS)], "linewidth": 1.8, "marker": "o", "markersize": 6.5}
            draw_line(axis, name, own, look | {"linestyle": LINE_STYLES[rank // len(COLORS)], "zorder": 3})
        label_frontier(axis, figure, best, names)
        if others:
            shown: list[Any] = [each[: len(others)] for each in axis.get_legend_handles_labels()]
            look = {"frameon": False, "fontsize": 7.5, "title_fontsize": 8, "handlelength": 2.6, "alignment": "left"}
            figure.legend(*shown, loc="outside right upper", title="other caches", **look)
        axis.set_title(title, loc="left", fontsize=10)
        return as_png(figure)


def set_axes(axis: Axes, rows: Sequence[Row]) -> None:
    """Scales, ticks and names."""
    shares = [row["held_share"] for row in rows]
    axis.set_xscale("log")
    # Labels of the frontier stand on its left.
    axis.set_xlim(min(shares) / 5, max(*shares, 1) * 1.12)
    axis.set_ylim(-0.03, 1.0)
    ticks = [tick for tick in SHARE_TICKS if min(shares) / 1.3 <= tick <= max(shares) * 1.3]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("bytes held when the question is asked, a share of DynamicCache's · filled: quantised")
    axis.set_ylabel("exact match")
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_line(axis: Axes, name: str, rows: Sequence[Row], look: dict[str, Any]) -> None:
    """A cache through its budgets."""
    entry = find_entry(name)
    own = sorted((row for row in rows if row["cache"] == name), key=lambda row: row["held_share"])
    face = look["color"] if entry.quantizes else "white"
    shares, scores = [row["held_share"] for row in own], [row["exact_match"] for row in own]
    axis.plot(shares, scores, markerfacecolor=face, label=entry.label, **look)


def label_frontier(axis: Axes, figure: Figure, best: Sequence[Row], names: Sequence[str]) -> None:
    """Names each cache of the frontier beside the best of its points there. Labels that would overlap move down."""
    tops = {row["cache"]: row for row in best}
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    lowest = float("inf")
    for name in sorted(names, key=lambda name: -tops[name]["exact_match"]):
        row = tops[name]
        height = axis.transData.transform((row["held_share"], row["exact_match"]))[1] * points
        wanted = height + 3
        place = min(wanted, lowest - LABEL_HEIGHT)
        lowest = place
        is_moved = place < wanted
        axis.annotate(
            find_entry(name).label,
            (row["held_share"], row["exact_match"]),
            xytext=(-8, place - height),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=COLORS[names.index(name) % len(COLORS)],
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": GREY} if is_moved else None,
            zorder=4,
        )


def write_picture(records: Sequence[Path], task: str, protocol: str, path: Path) -> None:
    """Draws the rows of one task and protocol in records. ValueError as `read_rows` raises it."""
    rows = read_rows(records, task, protocol)
    settings = json.loads(records[0].read_text(encoding="utf-8"))["settings"]
    model = settings["recall_model" if task.startswith("recall-") else "model"]
    title = f"{task}, {protocol} first: {rows[0]['num_cases']} questions to {model}"
    with replacing(str(path.resolve())) as temporary_path:
        Path(temporary_path).write_bytes(draw_frontier(rows, title))
