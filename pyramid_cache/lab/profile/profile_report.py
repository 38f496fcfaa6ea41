"""A profile as tables for the terminal and as a picture."""

from pathlib import Path
from typing import Any

from rich.text import Text

from pyramid_cache.lab.profile.activations import LEAST_MAGNITUDE, LEAST_RATIO
from pyramid_cache.lab.terminal import print_table, report_console


MAX_TOKEN_ROWS = 24
MAGNITUDE_COLORS = {"largest token": "#1f5fa8", "second": "#5b9bd0", "third": "#a9cbe8"}
CLASS_COLORS = {"uniform": "#d1652a", "local": "#3b8f5a", "concentrated": "#1f5fa8"}
# Columns of tables, for `print_table`.
LAYER_COLUMNS = {
    "layer": "{layer}",
    "class": "{kind:<}",
    "sinks": "{sink_share:.1%}",
    "local": "{local_share:.1%}",
    "support": "{support:.1%}",
    "keys and\nvalues": "{num_by_keys_and_values}",
    "hidden\nstates": "{num_by_hidden_states}",
    "both": "{num_by_both}",
    "largest\noutput": "{largest[0]:,.0f}",
    "median": "{median:.2f}",
}
EXTENT = {"largest value": "{largest:<,.0f}", "layers": "{first_layer:<} to {last_layer}"}
DIMENSION_COLUMNS = {"dimension": "{dimension:<}", "tokens": "{num_tokens:<}"} | EXTENT
TOKEN_COLUMNS = {"text": "{text:<}", "position": "{position:<}", "token": "{token:<}", "dimensions": "{shown:<}"}
TOKEN_COLUMNS |= EXTENT
SHARING_COLUMNS = {"layer": "{layer}", "uses": "{uses}", "distance": "{distance:.2f}", "cosine": "{similarity:.3f}"}


def show(record: dict[str, Any]) -> None:
    """Prints the tables, and then what was found in a sentence."""
    console = report_console()
    massive = record["massive"]
    console.print(title_of(record["settings"]), style="bold", markup=False)
    print_table(console, LAYER_COLUMNS, [row | record["outputs"][row["layer"]] for row in record["layers"]])
    print_table(console, DIMENSION_COLUMNS, massive["dimensions"])
    tokens = [
        row | {"token": repr(row["token"]), "shown": ", ".join(map(str, row["dimensions"]))}
        for row in massive["tokens"]
    ]
    print_table(console, TOKEN_COLUMNS, tokens[:MAX_TOKEN_ROWS], folds=["dimensions"])
    if len(tokens) > MAX_TOKEN_ROWS:
        console.print(f"and {len(tokens) - MAX_TOKEN_ROWS} more tokens")
    console.print(Text(summary(record), style="dim"))


def show_sharing(record: dict[str, Any]) -> None:
    """Prints which layers use the cache of another one, in the order in which they were found."""
    console, rows = report_console(), record["sharing"]
    console.print(title_of(record["settings"]), style="bold", markup=False)
    print_table(console, SHARING_COLUMNS, rows)
    pairs = ", ".join(f"{row['layer']}: {row['uses']}" for row in sorted(rows, key=lambda row: row["layer"]))
    text = f"KVSharerCache(model.config, {{{pairs}}}). Distance: between the mean caches of the pair that was tried. "
    text += (
        "Cosine: of the last hidden states with the full cache and with this layer and those above it in the table."
    )
    console.print(Text(text, style="dim"))


def title_of(settings: dict[str, Any]) -> str:
    texts = f"{settings['num_texts']} texts of {settings['num_tokens']:,} tokens"
    return f"{settings['model']} · {settings['dtype']} · {texts}"


def summary(record: dict[str, Any]) -> str:
    """What was found in a sentence, and what the columns mean."""
    settings, massive = record["settings"], record["massive"]
    what = f"(beyond {LEAST_MAGNITUDE:,.0f} and {LEAST_RATIO:,.0f} times the median)"
    found = f"No activation is massive {what}: the first tokens stand in for massive ones."
    if massive["layers"] is not None:
        num_texts = len({row["text"] for row in massive["tokens"]})
        found = "Massive activations {} in the outputs of layers {} to {}, ".format(what, *massive["layers"])
        found += f"in {num_texts} of {settings['num_texts']} texts."
    return (
        f"{found} Sinks: the share of attention that the last queries give to massive tokens. Local: the share that "
        f"they give to the last {settings['window']} tokens. Support: the share of all tokens that gets 0.95 of their "
        "attention. Keys and values, hidden states, both: the massive tokens that each detector finds in the input of "
        "the layer, over all texts. Largest output, median: magnitudes in the output of the layer."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the largest magnitudes of each layer's output, and below the shares of attention and the support."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    magnitudes, shares = figure.subplots(2, 1, sharex=True)
    for axes, draw_part, rows in ((magnitudes, draw_magnitudes, "outputs"), (shares, draw_shares, "layers")):
        draw_part(axes, record[rows])
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title_of(record["settings"]))
    figure.savefig(path, dpi=110)


def draw_magnitudes(axes: Any, outputs: list[dict[str, Any]]) -> None:
    """Magnitudes on a logarithmic scale."""
    layers = [row["layer"] for row in outputs]
    ranks = zip(*(row["largest"] for row in outputs), strict=True)
    for magnitudes, (label, color) in zip(ranks, MAGNITUDE_COLORS.items(), strict=False):
        axes.plot(layers, magnitudes, color=color, marker=".", label=label)
    axes.plot(layers, [row["median"] for row in outputs], color="#8a8a8a", label="median of all")
    limits = [max(LEAST_MAGNITUDE, LEAST_RATIO * row["median"]) for row in outputs]
    axes.plot(layers, limits, color="#c2185b", linestyle="--", label="massive from here on")
    axes.set(yscale="log", ylabel="magnitude in the output", title="massive activations")
    axes.legend(frameon=False, fontsize="small", ncols=2)


def draw_shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Shares of attention as stacked bars, and the support of each layer as a point in the colour of its class."""
    layers = [row["layer"] for row in rows]
    sinks, local = [row["sink_share"] for row in rows], [row["local_share"] for row in rows]
    axes.bar(layers, sinks, color="#c9c9c9", label="attention to massive tokens")
    axes.bar(layers, local, bottom=sinks, color="#e8d9b0", label="to the last tokens")
    for kind, color in CLASS_COLORS.items():
        if points := [(row["layer"], row["support"]) for row in rows if row["kind"] == kind]:
            axes.scatter(*zip(*points, strict=True), color=color, zorder=3, label=f"support, {kind}")
    # The room above 1 is for the legend.
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.3), title="where the last queries look")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
