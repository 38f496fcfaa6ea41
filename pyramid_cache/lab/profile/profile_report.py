"""A profile as tables for the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from pyramid_cache.lab.terminal import report_console


MAX_TOKEN_ROWS = 24


def show(record: dict[str, Any]) -> None:
    """Prints what was found, the tables first."""
    console = report_console()
    settings, massive = record["settings"], record["massive"]
    console.print(
        f"{settings['model']} · {settings['dtype']} · {settings['num_texts']} texts of {settings['num_tokens']:,} tokens",
        style="bold",
        markup=False,
    )
    console.print(layers_table(record["layers"], record["outputs"]))
    if massive["tokens"]:
        console.print(dimensions_table(massive["dimensions"]))
        console.print(tokens_table(massive["tokens"]))
    console.print(Text(summary(record), style="dim"))


def layers_table(layers: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> Table:
    """One row per layer with full attention; its own columns, and those of its output."""
    result = Table(header_style="bold")
    headers = ["layer", "class", "sinks", "local", "support", "keys and\nvalues", "hidden\nstates", "both"]
    headers += ["largest\noutput", "median"]
    for header in headers:
        result.add_column(header, justify="left" if header == "class" else "right", no_wrap=True)
    for layer in layers:
        output = outputs[layer["layer"]]
        result.add_row(
            str(layer["layer"]),
            layer["kind"],
            *(f"{layer[name]:.1%}" for name in ("sink_share", "local_share", "support")),
            *(str(layer[f"num_by_{name}"]) for name in ("keys_and_values", "hidden_states", "both")),
            f"{output['largest'][0]:,.0f}",
            f"{output['median']:.2f}",
        )
    return result


def dimensions_table(dimensions: list[dict[str, Any]]) -> Table:
    """One row per dimension with massive activations, the largest first."""
    result = Table("dimension", "largest value", "tokens", "layers", header_style="bold")
    for row in dimensions:
        result.add_row(str(row["dimension"]), f"{row['largest']:,.0f}", str(row["num_tokens"]), layers_of(row))
    return result


def tokens_table(tokens: list[dict[str, Any]]) -> Table:
    """One row per token with massive activations."""
    result = Table("text", "position", "token", "largest value", "dimensions", "layers", header_style="bold")
    for row in tokens[:MAX_TOKEN_ROWS]:
        result.add_row(
            str(row["text"]),
            str(row["position"]),
            Text(repr(row["token"])),
            f"{row['largest']:,.0f}",
            ", ".join(map(str, row["dimensions"])),
            layers_of(row),
        )
    if len(tokens) > MAX_TOKEN_ROWS:
        result.caption = f"and {len(tokens) - MAX_TOKEN_ROWS} more"
    return result


def layers_of(row: dict[str, Any]) -> str:
    """The layers whose outputs are massive."""
    return f"{row['first_layer']} to {row['last_layer']}"


def summary(record: dict[str, Any]) -> str:
    """What was found in a sentence, and what the columns mean."""
    massive = record["massive"]
    if massive["layers"] is None:
        found = "No activation is massive (beyond 100 and 1,000 times the median): the first tokens stand in for them."
    else:
        first, last = massive["layers"]
        num_texts = len({row["text"] for row in massive["tokens"]})
        found = (
            f"Massive activations (beyond 100 and 1,000 times the median) in the outputs of layers {first} to {last}, in "
            f"{num_texts} of {record['settings']['num_texts']} texts."
        )
    return (
        f"{found} Sinks, local: the share of attention that massive tokens and the last {record['settings']['window']} tokens get "
        "from the last queries. Support: the share of all tokens that gets 0.95 of it. Keys and values, hidden states, both: "
        "massive tokens over all texts as each tells them of what comes into the layer, where the largest values are of what "
        "comes out."
    )
