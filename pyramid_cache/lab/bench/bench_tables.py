"""What was measured as tables for the terminal."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyramid_cache.lab.machine import busy_note
from pyramid_cache.lab.terminal import report_console


def show_ops(record: dict[str, Any]) -> None:
    """Prints the rows of `bench ops`."""
    console = report_console()
    versions = record["versions"]
    console.print(
        f"{record['device']} · {record['threads']} threads · torch {versions['torch']} · copies "
        f"{record['copy_bytes_per_second'] / 1e9:,.0f} GB/s, read and written",
        style="bold",
        markup=False,
    )
    print_ops(console, record["rows"])
    console.print(Text(footnote(record), style="dim"))


def print_ops(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints rows and, where there are any, targets."""
    console.print(ops_table(rows))
    targets = targets_table(rows)
    if targets is not None:
        console.print(targets)


def ops_table(rows: list[dict[str, Any]]) -> Table:
    """One row per op and shape; columns for graphs where there are any."""
    has_graphs = any(row["graph_seconds"] is not None for row in rows)
    headers = [
        "length",
        "dtype",
        "attention\nms",
        "+ scores\nms",
        "ratio",
        "overhead",
        "spread",
        "moved\nMiB",
        "of copy",
    ]
    if has_graphs:
        headers += ["in a graph\n+ scores ms", "ratio", "of copy"]
    result = Table(header_style="bold")
    result.add_column("op", no_wrap=True)
    for header in headers:
        result.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row["op"],
            f"{row['length']:,}",
            row["dtype"],
            milliseconds(row["attention_seconds"]),
            milliseconds(row["with_scores_seconds"]),
            f"{row['ratio_to_attention']:.2f}×",
            f"{row['overhead_percent']:+.1f} %",
            f"{row['spread']:.0%}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['bandwidth_fraction']:.1%}",
        ]
        if has_graphs:
            cells += graph_cells(row)
        result.add_row(*cells)
    return result


def graph_cells(row: dict[str, Any]) -> list[str]:
    """The figures of a CUDA graph, empty for what is recorded in none."""
    if row["graph_seconds"] is None:
        return ["", "", ""]
    return [
        milliseconds(row["graph_seconds"]),
        f"{row['graph_ratio_to_attention']:.2f}×",
        f"{row['graph_bandwidth_fraction']:.1%}",
    ]


def targets_table(rows: list[dict[str, Any]]) -> Table | None:
    """What is asked of the rows, beside what was measured; None where nothing is asked of them."""
    asked = [(row, target) for row in rows for target in row["targets"]]
    if not asked:
        return None
    result = Table("op", "length", "dtype", "figure", "measured", "target", "", header_style="bold")
    for row, target in asked:
        result.add_row(
            *(
                row["op"],
                f"{row['length']:,}",
                row["dtype"],
                target["figure"],
                f"{target['value']:.3g}",
                target["text"],
            ),
            Text("met", style="green") if target["is_met"] else Text("missed", style="red"),
        )
    return result


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def footnote(record: dict[str, Any]) -> str:
    """What the columns mean, and how far they can be trusted."""
    rounds = [row["rounds"] for row in record["rows"]]
    note = (
        f"Medians of {min(rounds)} to {max(rounds)} rounds, in which attention alone and attention with scores take turns; "
        "ratios are of these medians. The spread is of the times of whichever varies more. What is moved is queries, keys, "
        "values, log-sum-exps, scores and output once each."
    )
    if any(row["recomputes_lse"] for row in record["rows"]):
        note += " Where no attention gives its log-sum-exps, those of the rows that score are computed beside it."
    return note + busy_note(record["machine"])


def show_caches(record: dict[str, Any]) -> None:
    """Prints the rows of `bench caches`."""
    console = report_console()
    versions = record["versions"]
    console.print(
        f"{record['model']} · {record['device']} · {record['threads']} threads · torch {versions['torch']} · transformers "
        f"{versions['transformers']}",
        style="bold",
        markup=False,
    )
    print_caches(console, record["rows"])
    note = (
        "Medians over rounds, in which all caches take their turn; ratios are to DynamicCache in the same run, with those of "
        "single rounds in brackets. Prefill is of the rows that were read; bytes are what a row holds at the end."
    )
    console.print(Text(note + busy_note(record["machine"]), style="dim"))


def print_caches(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints rows, and stages where there are any."""
    console.print(caches_table(rows))
    if any(row["stages"] for row in rows):
        console.print(stages_table(rows))


def caches_table(rows: list[dict[str, Any]]) -> Table:
    """One row per cache, length and batch; what failed says why."""
    headers = [
        *("length", "rows", "prefill\ns", "ratio", "step\nms", "ratio", "tokens/s", "ratio"),
        *("device\nMiB a row", "ratio", "host\nMiB a row", "peak\nMiB"),
    ]
    has_peaks = any(row["decode_peak_bytes"] is not None for row in rows)
    result = Table(header_style="bold")
    result.add_column("cache")
    for header in headers if has_peaks else headers[:-1]:
        result.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row["label"],
            f"{row['length']:,}",
            f"{row['batch_size']}{' (largest)' if row['is_largest_batch'] else ''}",
        ]
        if row["failure"] is not None:
            result.add_row(*cells, "failed:", row["failure"])
            continue
        cells += [
            f"{statistics.median(row['prefill_seconds']):.2f}",
            ratio_cell(row["prefill_ratio"], row["prefill_ratio_range"]),
            milliseconds(statistics.median(row["step_seconds"])),
            ratio_cell(row["step_ratio"], row["step_ratio_range"]),
            f"{row['tokens_per_second']:.1f}",
            ratio_cell(row["tokens_ratio"]),
            f"{row['device_bytes'] / row['batch_size'] / 2**20:,.1f}",
            ratio_cell(row["bytes_ratio"]),
            f"{row['host_bytes'] / row['batch_size'] / 2**20:,.1f}" if row["host_bytes"] else "",
        ]
        if has_peaks:
            cells.append(f"{max(row['prefill_peak_bytes'], row['decode_peak_bytes']) / 2**20:,.0f}")
        result.add_row(*cells)
    return result


def ratio_cell(ratio: float | None, extremes: list[float] | None = None) -> str:
    """A ratio, and its least and greatest value where they differ; empty where there is none."""
    if ratio is None:
        return ""
    text = f"{ratio:.2f}×"
    if extremes is None or f"{extremes[0]:.2f}" == f"{extremes[1]:.2f}":
        return text
    return f"{text} ({extremes[0]:.2f}-{extremes[1]:.2f})"


def stages_table(rows: list[dict[str, Any]]) -> Table:
    """The share of each op in the time of steps, the greatest first, and what they read from the host."""
    headers = ("cache", "length", "rows", "what steps take their time for", "from the host\nMiB a step")
    result = Table(*headers, header_style="bold")
    for row in rows:
        if row["stages"]:
            shares = sorted(row["stages"].items(), key=lambda item: (item[0] == "other", -item[1]))
            fetched = "" if row["fetched_bytes"] is None else f"{row['fetched_bytes'] / 2**20:,.2f}"
            text = ", ".join(f"{stage} {share:.0%}" for stage, share in shares)
            result.add_row(row["label"], f"{row['length']:,}", str(row["batch_size"]), text, fetched)
    return result


def show_suite(record: dict[str, Any]) -> None:
    """Prints the figures of the suite: its parts, and of each what it measured."""
    console = report_console()
    versions = record["versions"]
    console.print(
        f"{record['device']} · driver {record['driver']} · torch {versions['torch']} · triton {versions['triton']}",
        style="bold",
        markup=False,
    )
    parts = Table("part", "seconds", "outcome", header_style="bold")
    for name, part in record["parts"].items():
        outcome = "; ".join(part["failures"]) or "passed"
        parts.add_row(name, f"{part['wall_seconds']:.0f}", Text(outcome, style="red" if part["failures"] else "green"))
    console.print(parts)
    results = {name: part["result"] for name, part in record["parts"].items()}
    if tests := results.get("tests"):
        counts = {
            outcome: list(tests["outcomes"].values()).count(outcome) for outcome in ("passed", "failed", "skipped")
        }
        console.print("tests marked `cuda`: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if rows := results.get("ops", {}).get("rows"):
        print_ops(console, rows)
    for run in results.get("caches", {}).get("runs", []):
        print_caches(console, run["rows"])
    for name in ("blocks", "oracle", "gather"):
        if rows := results.get(name, {}).get("rows"):
            console.print(plain_table(name, rows))


def plain_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as they are; empty where a row has no such key."""
    headers = list(dict.fromkeys(key for row in rows for key in row))
    result = Table(*headers, title=title, header_style="bold", title_justify="left")
    for row in rows:
        cells = [row.get(key, "") for key in headers]
        result.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return result
