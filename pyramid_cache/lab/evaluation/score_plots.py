"""The pictures of an evaluation: scores by budgets and bytes, where in a context answers are lost, what is kept."""

import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pyramid_cache.lab.evaluation.answers import Answer, KeptPositions
from pyramid_cache.lab.evaluation.score_tables import groups
from pyramid_cache.lab.registry import BASELINE, CACHES, TRANSFORMERS, find_entry


# Eight colours that differ for colour-blind eyes as well; caches beyond them get dashes and a marker of their own.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#5c4033")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "d", "h", "*", "8", "o", "s")
BASELINE_COLOR = "#6e6e6e"
FACT_COLOR = "#c2185b"
SHARE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
NUM_DEPTHS = 5
MAP_SETTINGS: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "vmin": 0, "vmax": 1}
DPI = 110


@dataclass(frozen=True)
class Plot:
    """A picture, the same whenever it is drawn: its file without a suffix, and the section of a report it is in."""

    name: str
    section: str
    title: str
    png: bytes


def draw_all(rows: Sequence[dict[str, Any]], answers: Sequence[Answer], kept: Sequence[KeptPositions]) -> list[Plot]:
    """Draws the rows of `as_row`, the answers of the same cases, and what caches keep of an example context."""
    plots: list[Plot] = []
    # Defaults, whatever the matplotlibrc of the user says: the same figures are the same picture.
    with style.context("default"):
        for (task, protocol), here in groups(rows).items():
            section = f"{task}, {protocol} first"
            title = f"{section}: scores against the budget and against the bytes kept"
            plots.append(Plot(f"score-{task}-{protocol}", section, title, draw_scores(here)))
        # Several values have one score, which is at none of their depths.
        known = [answer for answer in answers if len(answer.depths) == 1]
        families: dict[tuple[str, str], list[Answer]] = {}
        for answer in known:  # by task without the length at the end of its name
            families.setdefault((re.sub(r"-\d+$", "", answer.task), answer.protocol), []).append(answer)
        for (family, protocol), shown in families.items():
            title = f"{family}, {protocol} first: token accuracy by depth of the answer and length of the context"
            plots.append(Plot(f"depth-{family}-{protocol}", "Where answers stand", title, draw_depths(shown)))
        if kept:
            title = f"{kept[0].task}: positions of its first context that each cache keeps"
            plots.append(Plot(f"positions-{kept[0].task}", "What is kept", title, draw_positions(kept, answers)))
    return plots


def style_of(cache: str) -> dict[str, Any]:
    """Colour, line and marker, which a cache has in all pictures."""
    rank = [*CACHES, *TRANSFORMERS].index(find_entry(cache).row)
    dashes = LINE_STYLES[rank // len(COLORS) % len(LINE_STYLES)]
    return {"color": COLORS[rank % len(COLORS)], "linestyle": dashes, "marker": MARKERS[rank % len(MARKERS)]}


def as_png(figure: Figure) -> bytes:
    """The picture, with nothing in its file about when and with what it was drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_scores(rows: Sequence[dict[str, Any]]) -> bytes:
    """Exact match and log-likelihood, or perplexity, of one task and protocol, by the budget and the bytes kept."""
    scores = {"exact_match": "exact match", "log_likelihood": "log-likelihood per token"}
    scores = {"perplexity": "perplexity"} if "perplexity" in rows[0] else scores
    figure = Figure(figsize=(11, 7.5 if len(scores) > 1 else 4.5), layout="constrained")
    grid = figure.subplots(len(scores), 2, sharex="col", sharey="row", squeeze=False)
    budgets = sorted({row["budget"] for row in rows if row["cache"] != BASELINE})
    for axes, (score, label) in zip(grid, scores.items(), strict=True):
        for axis, place in zip(axes, ("budget", "held_share"), strict=True):
            draw_lines(axis, rows, place, score)
        axes[0].set_ylabel(label)
    if "exact_match" in scores:
        grid[0, 0].set_ylim(-0.03, 1.03)
    shares = [row["held_share"] for row in rows]
    ticks = [tick for tick in SHARE_TICKS if min(shares) / 1.3 <= tick <= max(shares) * 1.3]
    labels = ("budget, a fraction of the prompt", "bytes kept, a share of the full cache's")
    # Budgets differ by factors.
    for axis, label, marks in zip(grid[-1], labels, (budgets, ticks), strict=True):
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small", handlelength=3.2)
    return as_png(figure)


def draw_lines(axis: Axes, rows: Sequence[dict[str, Any]], place: str, score: str) -> None:
    """One line per cache through its budgets."""
    edge: dict[str, Any] = {"linewidth": 1.4, "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.4}
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["budget"])
        values, label = [row[score] for row in own], find_entry(cache).label
        if cache == BASELINE:
            axis.axhline(values[0], color=BASELINE_COLOR, linewidth=1.2, linestyle=(0, (6, 3)), label=label)
        else:
            axis.plot([row[place] for row in own], values, **style_of(cache), **edge, label=label)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_maps(
    places: Sequence[tuple[str, float]],
    size: tuple[float, float],
    draw: Callable[[Axes, tuple[str, float]], AxesImage],
    labels: tuple[str, str, str],
) -> bytes:
    """A row of maps per cache and a column per budget. Sizes are inches of a map; labels are of x, y and colours."""
    caches = list(dict.fromkeys(cache for cache, _ in places))
    budgets = list(dict.fromkeys(budget for cache, budget in places if cache != BASELINE)) or [1.0]
    width, height = size
    figure_size = (width * len(budgets) + 1.2, (height + 0.32) * len(caches) + 0.7)
    figure = Figure(figsize=figure_size, layout="constrained")
    grid = figure.subplots(len(caches), len(budgets), squeeze=False)
    image, drawn = None, []
    for cache, axes in zip(caches, grid, strict=True):
        for column, (budget, axis) in enumerate(zip(budgets, axes, strict=True)):
            place = (BASELINE, 1.0) if cache == BASELINE else (cache, budget)
            if place not in places or (cache == BASELINE and column > 0):
                axis.set_axis_off()
                continue
            title = find_entry(cache).label + ("" if cache == BASELINE else f", {budget:g}")
            axis.set_title(textwrap.fill(title, int(13 * width)), fontsize="small", loc="left", pad=3)
            axis.tick_params(labelsize="small", length=2)
            image = draw(axis, place)
            drawn.append(axis)
    figure.supxlabel(labels[0], fontsize="small")
    figure.supylabel(labels[1], fontsize="small")
    # A share of the height: titles of maps need the same room in every figure.
    pad = 0.2 / figure.get_figheight()
    bar = figure.colorbar(image, ax=drawn, location="top", shrink=0.4, aspect=30, pad=pad)
    bar.ax.tick_params(labelsize="small")
    bar.set_label(labels[2], fontsize="small")
    return as_png(figure)


def depth_means(answers: Sequence[Answer]) -> tuple[list[int], dict[tuple[str, float], list[list[float]]]]:
    """Lengths of contexts; by cache and budget a row per fifth of the depth, with a mean or NaN per length."""
    lengths = sorted({answer.length for answer in answers})
    cells: dict[tuple[str, float], list[list[list[float]]]] = {}
    for answer in answers:
        depth = min(int(answer.depths[0] * NUM_DEPTHS), NUM_DEPTHS - 1)
        rows = cells.setdefault((answer.cache, answer.budget), [[[] for _ in lengths] for _ in range(NUM_DEPTHS)])
        rows[depth][lengths.index(answer.length)].append(answer.token_accuracy)
    means = {
        place: [[statistics.fmean(cell) if cell else math.nan for cell in row] for row in rows]
        for place, rows in cells.items()
    }
    return lengths, means


def draw_depths(answers: Sequence[Answer]) -> bytes:
    """Mean token accuracy by the depth of the answer and the length of its context, per cache and budget."""
    lengths, means = depth_means(answers)
    # From dark for what is lost to light for what is found; grey where there was no question.
    colors = matplotlib.colormaps["cividis"].with_extremes(bad="#d9d9d9")

    def draw(axis: Axes, place: tuple[str, float]) -> AxesImage:
        image = axis.imshow(means[place], cmap=colors, **MAP_SETTINGS)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks([-0.5, NUM_DEPTHS / 2 - 0.5, NUM_DEPTHS - 0.5], ["0 %", "50 %", "100 %"])
        for depth, row in enumerate(means[place] if len(lengths) <= 6 else ()):
            for length, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value < 0.55 else "black"
                    axis.text(length, depth, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=color)
        return image

    labels = ("tokens of the context", "depth of the answer", "token accuracy")
    return draw_maps(list(means), (max(2.9, 0.5 * len(lengths)), 1.05), draw, labels)


def draw_positions(kept: Sequence[KeptPositions], answers: Sequence[Answer]) -> bytes:
    """Layer × position, per cache and budget; marks where the answers to the questions about the context stand."""
    maps = {(one.cache, one.budget): one for one in kept}
    asked = [answer for answer in answers if (answer.task, answer.context) == (kept[0].task, 0)]
    facts = [depth * kept[0].num_tokens for depth in sorted({depth for answer in asked for depth in answer.depths})]

    def draw(axis: Axes, place: tuple[str, float]) -> AxesImage:
        shares = maps[place].shares
        extent = (0, maps[place].num_tokens, len(shares) - 0.5, -0.5)
        image = axis.imshow(shares, cmap="Blues", extent=extent, **MAP_SETTINGS)
        if facts:
            # Below the map, so that they hide nothing of what is kept there.
            below: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False, "linestyle": ""}
            axis.plot(facts, [-0.04] * len(facts), color=FACT_COLOR, marker="^", markersize=3, **below)
        axis.set_yticks(sorted({0, len(shares) - 1}))
        return image

    legend = " (red: answers to its questions)" if facts else ""
    labels = (f"position in the context{legend}", "layer", "share of the KV heads that keep it")
    return draw_maps(list(maps), (3.6, 0.95), draw, labels)
