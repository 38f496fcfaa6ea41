"""The results of the demo: a record for JSON, a table and a chart for the terminal, and a picture."""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.text import Text

from pyramid_cache.lab.demo.planted_number import Prompts
from pyramid_cache.lab.demo.timed_answers import Result
from pyramid_cache.lab.loaded_model import LoadedModel, where
from pyramid_cache.lab.machine import busy_note, describe_end
from pyramid_cache.lab.registry import BASELINE, find_entry
from pyramid_cache.lab.terminal import print_table, report_console
from pyramid_cache.plot.figure import COLORS, DPI, draw_map


BLOCKS = " ▁▂▃▄▅▆▇█"
CHART_HEIGHT = 3
CHART_MAX_COLUMNS = 64
ANSWER_WORDS = 20
BASELINE_COLOR = "#8a8a8a"
FACT_COLOR = "#c2185b"
# For `print_table`, which strips titles: two are the same word.
COLUMNS = {
    "cache": "{label:<}",
    "tokens kept\nper layer": "{kept}",
    "bytes held": "{held_bytes_mib:,.1f} MiB",
    "share\nof full": "{share_of_full:.1%}",
    "prefill\nseconds": "{prefill_seconds:.2f}",
    "ratio": "{prefill_ratio:.2f}×",
    "decode\ntokens/s": "{decode_tokens_per_second:.1f}",
    " ratio": "{decode_ratio:.2f}×",
    "recalled": "[{color}]{shown:^}[/]",
    "answer": "{answer:<}",
}


def as_record(
    results: list[Result], loaded: LoadedModel, prompts: Prompts, options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, with times as medians over the repeats and ratios to the baseline, and on what."""
    baseline = next(result for result in results if result.entry.name == BASELINE)
    return {
        "rows": [as_row(result, baseline, prompts, options.max_new_tokens) for result in results],
        "settings": {
            "model": loaded.name,
            **where(loaded.model),
            "num_parameters": loaded.model.num_parameters(),
            "attn_implementation": loaded.model.config._attn_implementation,
            **{name: vars(options)[name] for name in "prompt_tokens max_new_tokens batch_size seed repeats".split()},
            "budget": options.budgets,
            "numbers": prompts.numbers,
        },
        **describe_end(machine),
    }


def as_row(result: Result, baseline: Result, prompts: Prompts, max_new_tokens: int) -> dict[str, Any]:
    """One cache's row. Tokens per second are those of all rows of the batch together."""
    num_decoded = (max_new_tokens - 1) * len(prompts.numbers)
    prefill, full_prefill = (statistics.median(each.prefill_seconds) for each in (result, baseline))
    speed, full_speed = (num_decoded / statistics.median(each.decode_seconds) for each in (result, baseline))
    recalled = [number in answer for number, answer in zip(prompts.numbers, result.answers, strict=True)]
    return {
        "cache": result.entry.name,
        "label": result.entry.label,
        "held_bytes": result.held_bytes,
        "share_of_full": result.held_bytes / baseline.held_bytes,
        "kept_tokens": result.kept_tokens,
        "prefill_seconds": prefill,
        "prefill_ratio": prefill / full_prefill,
        "decode_tokens_per_second": speed,
        "decode_ratio": speed / full_speed,
        "recalled": all(recalled),
        "recalled_share": sum(recalled) / len(recalled),
        "answer": result.answers[0],
        "answers": result.answers,
        "prefill_seconds_by_repeat": result.prefill_seconds,
        "decode_tokens_per_second_by_repeat": [num_decoded / seconds for seconds in result.decode_seconds],
    }


def show(record: dict[str, Any], fact: str) -> None:
    """Prints the table and the chart."""
    console = report_console()
    title = "{model} · {dtype} on {device} · {batch_size} × {prompt_tokens:,} prompt tokens · "
    title += "{max_new_tokens} new ones · budget {budget}"
    console.print(title.format_map(record["settings"]), style="bold", markup=False)
    console.print(f"planted in the middle: {' '.join(fact.split())}\n", markup=False)
    print_table(console, COLUMNS, list(map(shown_row, record["rows"])), folds=["answer"])
    console.print(Text(footnote(record), style="dim"))
    console.print(f"\n{chart(record['rows'])}", markup=False, soft_wrap=True)


def shown_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what its cells show of lists and texts."""
    low, high, num_rows = min(row["kept_tokens"]), max(row["kept_tokens"]), len(row["answers"])
    yes_or_no, words = "yes" if row["recalled"] else "no", row["answer"].split()
    return row | {
        "kept": f"{low:,}" if low == high else f"{low:,}–{high:,}",
        "shown": f"{round(row['recalled_share'] * num_rows)} of {num_rows}" if num_rows > 1 else yes_or_no,
        "color": "green" if row["recalled"] else "red",
        "answer": " ".join(words[:ANSWER_WORDS]) + " …" * (len(words) > ANSWER_WORDS),
    }


def footnote(record: dict[str, Any]) -> str:
    """What the ratios mean, and how far they can be trusted."""
    repeats = record["settings"]["repeats"]
    baseline = find_entry(BASELINE).label
    note = f"Ratios are to {baseline} in the same run: of seconds for the prefill, of speed for decoding."
    note += busy_note(record["machine"])
    if repeats == 1:
        return f"{note} One round; --repeats 5 gives medians."
    spreads = [
        (max(times) - min(times)) / statistics.median(times)
        for row in record["rows"]
        for times in (row["prefill_seconds_by_repeat"], row["decode_tokens_per_second_by_repeat"])
    ]
    return f"{note} Medians of {repeats} rounds, which spread by at most {max(spreads):.0%}."


def chart(rows: list[dict[str, Any]]) -> str:
    """Bars of the tokens that each cache keeps per layer, from the first layer to the last."""
    full = max(max(row["kept_tokens"]) for row in rows)
    lines = [f"tokens kept per layer, first to last of {len(rows[0]['kept_tokens'])} (a full bar is {full:,})"]
    width = max(len(row["label"]) for row in rows)
    for row in rows:
        drawn = enumerate(bars(row["kept_tokens"], full, CHART_HEIGHT, CHART_MAX_COLUMNS))
        lines += [f"{'' if index else row['label']:<{width}}  {line}" for index, line in drawn]
    return "\n".join(lines)


def bars(values: list[int], full: int, height: int, max_columns: int) -> list[str]:
    """Draws one bar per value, or per mean of neighbouring values where there are more than `max_columns`."""
    num_columns = min(len(values), max_columns)
    edges = [round(column * len(values) / num_columns) for column in range(num_columns + 1)]
    means = [statistics.mean(values[low:high]) for low, high in itertools.pairwise(edges)]
    steps = len(BLOCKS) - 1
    # A layer that keeps anything has at least the thinnest bar.
    filled = [max(round(mean / full * height * steps), 1 if mean else 0) for mean in means]
    return [
        "".join(BLOCKS[min(max(bar - level * steps, 0), steps)] for bar in filled) for level in reversed(range(height))
    ]


def draw(results: list[Result], prompts: Prompts, path: Path) -> None:
    """Draws the tokens that each cache keeps per layer and, for all but the baseline, a map of the positions kept."""
    maps = [result for result in results if result.entry.name != BASELINE]
    figure = Figure(figsize=(10, 3.2 + 1.9 * len(maps)), layout="constrained")
    axes = figure.subplots(1 + len(maps), 1, squeeze=False, height_ratios=[1.5] + [1] * len(maps))[:, 0]
    # Every second line is dashed: where two coincide, the dashes of the upper one show the lower one.
    styles = zip(itertools.cycle(COLORS), itertools.cycle(("-", "--")))  # noqa: B905
    for result in results:
        color, style = (BASELINE_COLOR, "-") if result.entry.name == BASELINE else next(styles)
        label = result.entry.label
        axes[0].plot(result.kept_tokens, drawstyle="steps-mid", color=color, linestyle=style, label=label)
    axes[0].set(title="tokens kept per layer", xlabel="layer", ylabel="tokens", ylim=(0, None))
    axes[0].legend(frameon=False, ncols=3, fontsize="small", loc="lower left")
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, result in zip(axes[1:], maps, strict=True):
        image = draw_positions(axis, result.kept_positions, prompts)
        axis.set(title=f"{result.entry.label}: positions held", ylabel="layer")
    if maps:
        axes[-1].set_xlabel("position in the sequence (red bar: the planted fact; dotted line: the end of the prompt)")
        figure.colorbar(image, ax=axes[1:].tolist(), label="share of the KV heads that hold it", shrink=0.6)
    figure.savefig(path, dpi=DPI)


def draw_positions(axes: Axes, shares: torch.Tensor, prompts: Prompts) -> AxesImage:
    """Draws shares of the KV heads that hold each position, `(layers, positions)`, the fact, and the prompt's end."""
    image = draw_map(axes, shares, vmin=0, vmax=1)
    # Above the map, so that the bar hides nothing of what is kept there.
    axes.plot(prompts.fact_spans[0], [-1, -1], color=FACT_COLOR, linewidth=4, clip_on=False, solid_capstyle="butt")
    axes.axvline(prompts.num_tokens, color="black", linewidth=0.7, linestyle=":")
    return image
