"""The picture of a profile: magnitudes over layers, and where each layer looks."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyramid_cache.engine.massive import LEAST_MAGNITUDE, LEAST_RATIO


MAGNITUDE_COLORS = ("#1f5fa8", "#5b9bd0", "#a9cbe8")
CLASS_COLORS = {"uniform": "#d1652a", "local": "#3b8f5a", "concentrated": "#1f5fa8"}


def draw(record: dict[str, Any], path: Path) -> None:
    """
    Draws the largest magnitudes of each layer's output beside what makes one massive, and below the shares of attention
    and the support of each layer.

    Args:
        record (`dict`): Of `pyramid_cache.lab.profile.profile_command.as_record`.
        path (`Path`): Where the picture goes.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    magnitudes, shares = figure.subplots(2, 1, sharex=True)
    draw_magnitudes(magnitudes, record["outputs"])
    draw_shares(shares, record["layers"])
    settings = record["settings"]
    figure.suptitle(f"{settings['model']}, {settings['num_texts']} texts of {settings['num_tokens']:,} tokens")
    figure.savefig(path, dpi=110)


def draw_magnitudes(axis: Any, outputs: list[dict[str, Any]]) -> None:
    """Magnitudes on a logarithmic scale."""
    layers = [row["layer"] for row in outputs]
    for rank, color in enumerate(MAGNITUDE_COLORS):
        if rank < len(outputs[0]["largest"]):
            label = ("largest token", "second", "third")[rank]
            axis.plot(layers, [row["largest"][rank] for row in outputs], color=color, marker=".", label=label)
    axis.plot(layers, [row["median"] for row in outputs], color="#8a8a8a", label="median of all")
    limits = [max(LEAST_MAGNITUDE, LEAST_RATIO * row["median"]) for row in outputs]
    axis.plot(layers, limits, color="#c2185b", linestyle="--", label="massive from here on")
    axis.set(yscale="log", ylabel="magnitude in the output", title="massive activations")
    axis.legend(frameon=False, fontsize="small", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def draw_shares(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Shares of attention as stacked bars, and the support of each layer as a point in the colour of its class."""
    layers = [row["layer"] for row in rows]
    sinks, local = [row["sink_share"] for row in rows], [row["local_share"] for row in rows]
    axis.bar(layers, sinks, color="#c9c9c9", label="attention to massive tokens")
    axis.bar(layers, local, bottom=sinks, color="#e8d9b0", label="to the last tokens")
    for kind, color in CLASS_COLORS.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            points = [row["support"] for row in own]
            axis.scatter([row["layer"] for row in own], points, color=color, zorder=3, label=f"support, {kind}")
    # The room above 1 is for the legend.
    axis.set(xlabel="layer", ylabel="share", ylim=(0, 1.3), title="where the last queries look")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)
