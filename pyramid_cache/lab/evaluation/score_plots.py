"""The pictures of an evaluation: scores against budgets and bytes, where in a context answers are lost, and what is kept of one."""

import io
import math
import re
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramid_cache.lab.evaluation.answers import Answer
from pyramid_cache.lab.evaluation.caches import BASELINE, BASELINE_LABEL, CACHES
from pyramid_cache.lab.evaluation.kept import KeptPositions


# Eight colours that differ for colour-blind eyes as well; caches beyond them get dashes and a marker of their own.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#5c4033")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "d", "h", "*", "8", "o", "s")
BASELINE_COLOR = "#6e6e6e"
FACT_COLOR = "#c2185b"
SHARE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
NUM_DEPTHS = 5
DPI = 110


@dataclass(frozen=True)
class Plot:
    """
    A picture.

    Attributes:
        name (`str`): Of its file, without a suffix.
        section (`str`): Of a report, where it belongs.
        title (`str`): What it shows.
        png (`bytes`): The picture, the same whenever it is drawn.
    """

    name: str
    section: str
    title: str
    png: bytes


def draw_all(rows: Sequence[dict[str, Any]], answers: Sequence[Answer], kept: Sequence[KeptPositions]) -> list[Plot]:
    """
    Draws what there is to draw.

    Args:
        rows (`Sequence[dict]`): Of `report.as_row`.
        answers (`Sequence[Answer]`): Of the same cases.
        kept (`Sequence[KeptPositions]`): Of an example context; none where no cache was evaluated.
    """
    plots: list[Plot] = []
    # Defaults, whatever the matplotlibrc of the user says: the same figures are the same picture.
    with style.context("default"):
        for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in rows):
            here = [row for row in rows if (row["task"], row["protocol"]) == (task, protocol)]
            section = f"{task}, {protocol} first"
            title = f"{section}: scores against the budget and against the bytes kept"
            plots.append(Plot(f"score-{task}-{protocol}", section, title, draw_scores(here)))
        # Several values have one score, which is at none of their depths.
        known = [answer for answer in answers if len(answer.depths) == 1]
        for family, protocol in dict.fromkeys((family_of(answer), answer.protocol) for answer in known):
            shown = [answer for answer in known if (family_of(answer), answer.protocol) == (family, protocol)]
            title = f"{family}, {protocol} first: token accuracy by depth of the answer and length of the context"
            plots.append(Plot(f"depth-{family}-{protocol}", "Where answers stand", title, draw_depths(shown)))
        if kept:
            title = f"{kept[0].task}: positions of its first context that each cache keeps"
            plots.append(Plot(f"positions-{kept[0].task}", "What is kept", title, draw_positions(kept, answers)))
    return [replace(plot, name=name) for name, plot in zip(file_names(plots), plots, strict=True)]


def file_names(plots: Sequence[Plot]) -> Iterator[str]:
    """Names that are names of files everywhere, no two alike."""
    used: set[str] = set()
    for plot in plots:
        name = base = re.sub(r"[^A-Za-z0-9.-]+", "_", plot.name)
        number = 1
        while name.lower() in used:
            number += 1
            name = f"{base}-{number}"
        used.add(name.lower())
        yield name


def family_of(answer: Answer) -> str:
    """The task without the length at the end of its name: tasks that differ in nothing else are one picture."""
    return re.sub(r"-\d+$", "", answer.task)


def label_of(cache: str) -> str:
    """What tables call a cache."""
    return BASELINE_LABEL if cache == BASELINE else CACHES[cache].label


def style_of(cache: str) -> dict[str, Any]:
    """Colour, line and marker, which a cache has in all pictures."""
    rank = list(CACHES).index(cache)
    dashes = LINE_STYLES[rank // len(COLORS) % len(LINE_STYLES)]
    return {"color": COLORS[rank % len(COLORS)], "linestyle": dashes, "marker": MARKERS[rank % len(MARKERS)]}


def as_png(figure: Figure) -> bytes:
    """The picture, with nothing in its file about when and with what it was drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


# Scores.


def draw_scores(rows: Sequence[dict[str, Any]]) -> bytes:
    """Exact match and log-likelihood, or perplexity, of one task and protocol, against the budget and against the bytes kept."""
    scores = (("exact_match", "exact match"), ("log_likelihood", "log-likelihood per token"))
    if "perplexity" in rows[0]:
        scores = (("perplexity", "perplexity"),)
    figure = Figure(figsize=(11, 7.5 if len(scores) > 1 else 4.5), layout="constrained")
    grid = figure.subplots(len(scores), 2, sharex="col", sharey="row", squeeze=False)
    budgets = sorted({row["budget"] for row in rows if row["cache"] != BASELINE})
    for axes, (score, label) in zip(grid, scores, strict=True):
        for axis, place in zip(axes, ("budget", "held_share"), strict=True):
            draw_lines(axis, rows, place, score)
        axes[0].set_ylabel(label)
    if scores[0][0] == "exact_match":
        grid[0, 0].set_ylim(-0.03, 1.03)
    grid[-1, 0].set_xlabel("budget, a fraction of the prompt")
    grid[-1, 1].set_xlabel("bytes kept, a share of the full cache's")
    # Budgets differ by factors. Each is a tick; bytes have those of the scale's own choice.
    for axis in grid[-1]:
        axis.set_xscale("log")
        axis.minorticks_off()
    grid[-1, 0].set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    shares = [row["held_share"] for row in rows]
    ticks = [tick for tick in SHARE_TICKS if min(shares) / 1.3 <= tick <= max(shares) * 1.3]
    grid[-1, 1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small", handlelength=3.2)
    return as_png(figure)


def draw_lines(axis: Axes, rows: Sequence[dict[str, Any]], place: str, score: str) -> None:
    """One line per cache through its budgets."""
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["budget"])
        values = [row[score] for row in own]
        if cache == BASELINE:
            axis.axhline(values[0], color=BASELINE_COLOR, linewidth=1.2, linestyle=(0, (6, 3)), label=BASELINE_LABEL)
            continue
        axis.plot(
            [row[place] for row in own],
            values,
            **style_of(cache),
            linewidth=1.4,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            label=label_of(cache),
        )
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# Maps, one per cache and budget.


def map_grid(
    places: Sequence[tuple[str, float]], width: float, height: float
) -> tuple[Figure, dict[tuple[str, float], Axes]]:
    """
    A figure with a row per cache and a column per budget.

    Args:
        places (`Sequence[tuple[str, float]]`): Caches with budgets. The full cache has a row with one map, if it is among them.
        width, height (`float`): Of each map, in inches.
    """
    caches = list(dict.fromkeys(cache for cache, _ in places))
    budgets = list(dict.fromkeys(budget for cache, budget in places if cache != BASELINE)) or [1.0]
    size = (width * len(budgets) + 1.2, (height + 0.32) * len(caches) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(caches), len(budgets), squeeze=False)
    found = {}
    for cache, axes in zip(caches, grid, strict=True):
        for column, (budget, axis) in enumerate(zip(budgets, axes, strict=True)):
            place = (BASELINE, 1.0) if cache == BASELINE else (cache, budget)
            if place not in places or (cache == BASELINE and column > 0):
                axis.set_axis_off()
                continue
            title = label_of(cache) if cache == BASELINE else f"{label_of(cache)}, {budget:g}"
            axis.set_title(textwrap.fill(title, int(13 * width)), fontsize="small", loc="left", pad=3)
            axis.tick_params(labelsize="small", length=2)
            found[place] = axis
    return figure, found


def color_bar(figure: Figure, image: Any, axes: Sequence[Axes], label: str) -> None:
    """What the colours of all maps mean, above them."""
    # A share of the height: titles of maps need the same room in every figure.
    pad = 0.2 / figure.get_figheight()
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.4, aspect=30, pad=pad)
    bar.ax.tick_params(labelsize="small")
    bar.set_label(label, fontsize="small")


def depth_means(answers: Sequence[Answer]) -> tuple[list[int], dict[tuple[str, float], list[list[float]]]]:
    """
    Mean token accuracy by depth and length.

    Returns:
        The lengths of contexts that there are, and for each cache with its budget a row per fifth of the depth, in it a mean per
        length; NaN where there was no question.
    """
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
    """Mean token accuracy by the depth of the answer in its context and the length of the context, per cache and budget."""
    lengths, means = depth_means(answers)
    figure, axes = map_grid(list(means), width=max(2.9, 0.5 * len(lengths)), height=1.05)
    image = None
    for place, axis in axes.items():
        image = axis.imshow(means[place], aspect="auto", cmap=depth_colors(), vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks([-0.5, NUM_DEPTHS / 2 - 0.5, NUM_DEPTHS - 0.5], ["0 %", "50 %", "100 %"])
        if len(lengths) <= 6:
            write_values(axis, means[place])
    figure.supxlabel("tokens of the context", fontsize="small")
    figure.supylabel("depth of the answer", fontsize="small")
    color_bar(figure, image, list(axes.values()), "token accuracy")
    return as_png(figure)


def depth_colors() -> "matplotlib.colors.Colormap":
    """From dark for what is lost to light for what is found; grey where there was no question."""
    return matplotlib.colormaps["cividis"].with_extremes(bad="#d9d9d9")


def write_values(axis: Axes, means: Sequence[Sequence[float]]) -> None:
    """The values of a map in its cells."""
    for depth, row in enumerate(means):
        for length, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value < 0.55 else "black"
                axis.text(length, depth, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=color)


def draw_positions(kept: Sequence[KeptPositions], answers: Sequence[Answer]) -> bytes:
    """Layer × position, per cache and budget; marks where the answers to the questions about the context stand."""
    maps = {(one.cache, one.budget): one for one in kept}
    depths = {
        depth for answer in answers if (answer.task, answer.context) == (kept[0].task, 0) for depth in answer.depths
    }
    places = [depth * kept[0].num_tokens for depth in sorted(depths)]
    figure, axes = map_grid(list(maps), width=3.6, height=0.95)
    image = None
    for place, axis in axes.items():
        num_layers, num_tokens = len(maps[place].shares), maps[place].num_tokens
        extent = (0, num_tokens, num_layers - 0.5, -0.5)
        image = axis.imshow(
            maps[place].shares, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1, extent=extent
        )
        if places:
            # Below the map, so that they hide nothing of what is kept there.
            axis.plot(
                places,
                [-0.04] * len(places),
                transform=axis.get_xaxis_transform(),
                color=FACT_COLOR,
                marker="^",
                markersize=3,
                linestyle="",
                clip_on=False,
            )
        axis.set_yticks(sorted({0, num_layers - 1}))
    legend = " (red: answers to its questions)" if places else ""
    figure.supxlabel(f"position in the context{legend}", fontsize="small")
    figure.supylabel("layer", fontsize="small")
    color_bar(figure, image, list(axes.values()), "share of the KV heads that keep it")
    return as_png(figure)
