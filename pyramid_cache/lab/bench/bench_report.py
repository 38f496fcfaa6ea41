"""What `pyramid-cache bench` shows: tables for the terminal, and a picture of the caches beside DynamicCache."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pyramid_cache.lab.machine import busy_note
from pyramid_cache.lab.terminal import print_table, report_console


# Columns of tables, for `print_table`.
OPS_TABLE = {
    "op": "{op:<}",
    "length": "{length:,}",
    "dtype": "{dtype}",
    "attention\nms": "{attention_seconds_ms:,.3f}",
    "+ scores\nms": "{with_scores_seconds_ms:,.3f}",
    "ratio": "{ratio_to_attention:.2f}×",
    "overhead": "{overhead_percent:+.1f} %",
    "spread": "{spread:.0%}",
    "moved\nMiB": "{bytes_mib:,.1f}",
    "of copy": "{bandwidth_fraction:.1%}",
    "in a graph\n+ scores ms": "{graph_seconds_ms:,.3f}",
    "graph\nratio": "{graph_ratio_to_attention:.2f}×",
    "graph\nof copy": "{graph_bandwidth_fraction:.1%}",
}
CACHES_TABLE = {
    "cache": "{label:<}",
    "length": "{length:,}",
    "rows": "{size}",
    "prefill\ns": "{prefill:.2f}",
    "prefill\nratio": "{prefill_ratio:.2f}×{prefill_range}",
    "step\nms": "{step_ms:,.3f}",
    "step\nratio": "{step_ratio:.2f}×{step_range}",
    "tokens/s": "{tokens_per_second:.1f}",
    "rate\nratio": "{tokens_ratio:.2f}×",
    "device\nMiB a row": "{device_mib:,.1f}",
    "bytes\nratio": "{bytes_ratio:.2f}×",
    "host\nMiB a row": "{host_mib:,.1f}",
    "peak\nMiB": "{peak_mib:,.0f}",
}
DECODE_TABLE = {
    "cache": "{label:<}",
    "steps": "{way:<}",
    "length": "{length:,}",
    "rows": "{batch_size}",
    "step\nms": "{step_ms:,.3f}",
    "Dynamic\nratio": "{step_ratio:.2f}×{step_range}",
    "Static\nratio": "{static_ratio:.2f}×",
    "tokens/s": "{tokens_per_second:,.1f}",
    "read\nMiB": "{floor_bytes_mib:,.1f}",
    "share of\nfloor": "{floor_fraction:.1%}",
    "graphs": "{graphs:d}",
    "compile\ns": "{compile_time:.1f}",
    "skipped\ngraphs": "{skips:d}",
}
STAGES_TABLE = {
    **{header: CACHES_TABLE[header] for header in ("cache", "length", "rows")},
    "from the host\nMiB a step": "{fetched_bytes_mib:,.2f}",
    "what steps take their time for": "{shares:<}",
}
HOST_TABLE = {
    "cache": "{label:<}",
    "Python\ncalls": "{calls:,.1f}",
    "\nmore": "{more_calls:+,.1f}",
    "torch\nops": "{ops:,.1f}",
    "\nmore ": "{more_ops:+,.1f}",
    "\nviews": "{views:,.1f}",
    "\nmore  ": "{more_views:+,.1f}",
    "\nwaits": "{waits:,.2f}",
    "\nmore   ": "{more_waits:+,.2f}",
}
SERVING_TABLE = {
    "requests": "{label:<}",
    "most in\nflight": "{most_in_flight:,}",
    "\nratio": "{most_in_flight_ratio:.2f}x",
    "mean in\nflight": "{mean_in_flight:,.1f}",
    "forward\npasses": "{num_passes:,}",
    "\nseconds": "{seconds:,.0f}",
    "tokens\nper second": "{tokens_per_second:,.0f}",
    "\nratio ": "{tokens_per_second_ratio:.2f}x",
}
FOLDS = ("op", "requests", "cache", "what steps take their time for")
HOST_NOTE = (
    "Of the whole model, divided by its layers; more than DynamicCache. Calls are those of Python functions and of "
    "functions in C. An op of pyramid_cache counts as one. Waits ask tensors for numbers; with caches of this library "
    "one a step is a check that only the CPU makes."
)
PANELS = {"prefill_ratio": "reading the prompt", "tokens_ratio": "tokens per second", "bytes_ratio": "bytes of a row"}


def print_heading(console: Console, record: dict[str, Any], *facts: str) -> None:
    """Prints what the figures of a record are figures of."""
    versions = [f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "triton")]
    console.print(" · ".join((record["device"], f"{record['threads']} threads", *versions, *facts)), style="bold")


def show(record: dict[str, Any]) -> None:
    """Prints a record of `bench caches`, `bench decode`, `bench ops`, `bench host` or `bench serving`."""
    console, rows = report_console(), record["rows"]
    copies = f"copies {record.get('copy_bytes_per_second', 0) / 1e9:,.0f} GB/s, read and written"
    if "compile_mode" in record:
        print_heading(console, record, record["model"], copies, f"compiled in mode {record['compile_mode']}")
        print_decoding(console, rows)
        note = (
            "Means over the timed steps, evictions included, and medians of these over rounds. "
            f"{record['warm_up_steps']} steps before them, and compilation, are not timed. Ratios are those of times, "
            "to DynamicCache and to compiled StaticCache. The floor is the time of copies for the bytes that a step "
            "reads: weights, and what the cache holds."
        )
    elif "num_blocks" in record:
        print_heading(
            console, record, record["model"], f"{record['num_blocks']:,} blocks of {record['page_size']} tokens"
        )
        print_table(console, SERVING_TABLE, rows, FOLDS)
        for row in rows:
            for error in row["errors"]:
                console.print(f"{row['label']}: {error}", style="red", markup=False)
        note = (
            "Requests in flight hold blocks in a forward pass. Tokens are those read and generated. Ratios are to the "
            "requests as they are."
        )
    elif "model" in record:
        print_heading(console, record, record["model"])
        print_caches(console, rows)
        note = (
            "Medians over rounds, in which all caches take their turn. Ratios are to DynamicCache in the same run; "
            "brackets have those of single rounds. Prefill is the time of the rows that were read. Bytes are what a "
            "row holds at the end."
        )
    elif "counts" in record:
        print_heading(console, record, record["counts"])
        print_table(console, HOST_TABLE, rows, FOLDS)
        console.print(Text(HOST_NOTE, style="dim"))
        return
    else:
        print_heading(console, record, copies)
        print_table(console, OPS_TABLE, rows, FOLDS)
        rounds = [row["rounds"] for row in rows]
        note = (
            f"Medians of {min(rounds)} to {max(rounds)} rounds, in which attention alone and attention with scores "
            "take turns. Ratios are of these medians. The spread is that of whichever varies more. Moved bytes are "
            "queries, keys, values, log-sum-exps, scores and output once each."
        )
        if any(row["recomputes_lse"] for row in rows):
            note += " Where attention gives no log-sum-exps, those of scored rows are computed beside it."
    console.print(Text(note + busy_note(record["machine"]), style="dim"))


def print_caches(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints a row per cache, length and batch, the reasons of those that failed, and stages where there are any."""
    found = []
    for row in rows:
        size = f"{row['batch_size']}{' (largest)' if row['is_largest_batch'] else ''}"
        if row["failure"] is not None:
            place = f"{row['label']}, {row['length']:,} tokens, {size} rows"
            console.print(f"{place} failed: {row['failure']}", style="red", markup=False)
            continue
        shares = sorted(row["stages"].items(), key=lambda item: (item[0] == "other", -item[1]))
        peaks = [row[name] for name in ("prefill_peak_bytes", "decode_peak_bytes") if row[name] is not None]
        cells = {
            "size": size,
            "prefill": statistics.median(row["prefill_seconds"]),
            "prefill_range": range_text(row["prefill_ratio_range"]),
            "step": statistics.median(row["step_seconds"]),
            "step_range": range_text(row["step_ratio_range"]),
            "device": row["device_bytes"] / row["batch_size"],
            "host": row["host_bytes"] / row["batch_size"] or None,
            "peak": max(peaks, default=None),
            "shares": ", ".join(f"{stage} {share:.0%}" for stage, share in shares),
        }
        found.append(row | cells)
    print_table(console, CACHES_TABLE, found, FOLDS)
    print_table(console, STAGES_TABLE, [row for row in found if row["stages"]], FOLDS)


def print_decoding(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints a row per cache and way, what failed, graphs that came too late, and those without CUDA graphs."""
    found = []
    for row in rows:
        way = "compiled" if row["is_compiled"] else "eager"
        place = f"{row['label']}, {way}, {row['length']:,} tokens, {row['batch_size']} rows"
        if row["failure"] is not None:
            console.print(f"{place} failed: {row['failure']}", style="red", markup=False)
            continue
        if row["num_late_graphs"]:
            text = f"{place}: {row['num_late_graphs']} of the graphs were compiled while steps were timed"
            console.print(text, style="red", markup=False)
        for reason in row["skip_reasons"]:
            console.print(f"{place}: {reason}", style="yellow", markup=False)
        cells = {
            "way": way,
            "step": statistics.median(row["step_seconds"]),
            "step_range": range_text(row["step_ratio_range"]),
            "graphs": row["num_graphs"] if row["is_compiled"] else None,
            "compile_time": row["compile_seconds"] if row["is_compiled"] else None,
            "skips": row["num_skips"] or None,
        }
        found.append(row | cells)
    print_table(console, DECODE_TABLE, found, FOLDS)


def range_text(extremes: list[float] | None) -> str:
    """The least and greatest ratio of a round where they differ."""
    least, greatest = (f"{ratio:.2f}" for ratio in extremes or (1, 1))
    return "" if least == greatest else f" ({least}-{greatest})"


def show_suite(record: dict[str, Any]) -> None:
    """Prints a record of `bench --suite gpu`: the outcome of each part, and what it measured."""
    console = report_console()
    print_heading(console, record, f"driver {record['driver']}")
    for name, part in record["parts"].items():
        result, outcome = part["result"], "; ".join(part["failures"]) or "passed"
        style = "red" if part["failures"] else "green"
        console.print(f"{name}, {part['wall_seconds']:.0f} s: {outcome}", style=style, markup=False)
        rows = result.get("rows", [])
        if name == "tests":
            outcomes = list(result["outcomes"].values())
            counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "error", "skipped")]
            console.print("tests marked `cuda`: " + ", ".join(counts))
        elif name == "ops":
            print_table(console, OPS_TABLE, rows, FOLDS)
        elif name == "decode":  # later runs repeat what their ratios are to
            every = [row for run in result.get("runs", []) for row in run["rows"]]
            keys = ("cache", "is_compiled", "length", "batch_size")
            print_decoding(console, list({tuple(row[key] for key in keys): row for row in every}.values()))
        elif name in ("shadow", "pyramid"):
            print_caches(console, rows)
        else:
            rows = [
                {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
                for row in rows
            ]
            print_table(console, {key: f"{{{key}:>}}" for key in (rows or [{}])[0]}, rows)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the ratios of each cache in a record of `bench caches`, one bar for each length and batch."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["failure"] is None]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = list(dict.fromkeys((row["length"], row["batch_size"]) for row in rows))
    figure = Figure(figsize=(12, 2.0 + 0.3 * len(labels) * max(len(cells), 2) / 2), layout="constrained")
    height = 0.8 / len(cells)
    for axis, (key, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for index, (length, batch_size) in enumerate(cells):
            own = [row for row in rows if (row["length"], row["batch_size"]) == (length, batch_size) and row[key]]
            places = [labels.index(row["label"]) + (index + 0.5) * height - 0.4 for row in own]
            label = f"{length:,} tokens, batch {batch_size}"
            axis.barh(places, [row[key] for row in own], height, label=label)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="ratio to DynamicCache", yticks=range(len(labels)), yticklabels=labels)
        axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.suptitle(f"{record['model']}, {record['device']}", fontsize="medium")
    figure.savefig(path, dpi=120)
