"""The results of the demo: a record for JSON, tables and a conclusion for the terminal, and a picture."""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.image import AxesImage
from rich.text import Text

from pyramid_cache.lab.demo.answers import PromptRun, TextRun
from pyramid_cache.lab.demo.planted_numbers import Prompts, SharedText, num_right
from pyramid_cache.lab.loaded_model import LoadedModel, where
from pyramid_cache.lab.machine import busy_note, describe_end
from pyramid_cache.lab.registry import BASELINE, find_entry
from pyramid_cache.lab.terminal import print_table, report_console
from pyramid_cache.plot.figure import COLORS, DPI, draw_map, new_figure


BASELINE_COLOR = "#8a8a8a"
FACT_COLOR = "#c2185b"
END_COLOR = "#e69f00"
COLUMNS = {
    "cache, budget": "{label:<}",
    "held": "{held_bytes_mib:,.1f} MiB",
    "share": "{share_of_full:.1%}",
    "reading\nseconds": "{prefill_seconds:.1f}",
    "decode\ntokens/s": "{decode_tokens_per_second:.1f}",
    "speed": "{decode_ratio:.2f}×",
    "reading \nseconds": "{reading_seconds:.1f}",
    "seconds\nper answer": "{answer_seconds:.2f}",
    "right": "[{color}]{right_of:^}[/]",
    "first answer": "{answer:<}",
}


def as_record(
    at_once: list[PromptRun],
    later: list[TextRun],
    loaded: LoadedModel,
    prompts: Prompts,
    shared: SharedText,
    options: argparse.Namespace,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, with ratios to the baseline, which comes first, and on what."""
    return {
        "rows": [prompt_row(run, at_once[0], prompts) for run in at_once],
        "later": [text_row(run, later[0], shared) for run in later],
        "settings": {
            "model": loaded.name,
            **where(loaded.model),
            "num_parameters": loaded.model.num_parameters(),
            "attn_implementation": loaded.model.config._attn_implementation,
            **{name: vars(options)[name] for name in "prompt_tokens max_new_tokens batch_size seed".split()},
            "text_tokens": shared.input_ids.shape[1],
            "numbers": prompts.numbers,
            "later_numbers": shared.numbers,
        },
        **describe_end(machine),
    }


def common_row(run: PromptRun | TextRun, baseline: PromptRun | TextRun, numbers: list[str]) -> dict[str, Any]:
    """What rows of both parts have."""
    return {
        "cache": run.contender.name,
        "label": run.contender.label,
        "held_bytes": run.held_bytes,
        "share_of_full": run.held_bytes / baseline.held_bytes,
        "num_right": num_right(run.answers, numbers),
        "num_answers": len(numbers),
        "answers": run.answers,
    }


def prompt_row(run: PromptRun, baseline: PromptRun, prompts: Prompts) -> dict[str, Any]:
    """One cache's row of the first part. Tokens per second are those of all prompts together, in a median step."""
    return common_row(run, baseline, prompts.numbers) | {
        "prefill_seconds": run.prefill_seconds,
        "prefill_ratio": run.prefill_seconds / baseline.prefill_seconds,
        "decode_tokens_per_second": len(prompts.numbers) / run.step_seconds,
        "decode_ratio": baseline.step_seconds / run.step_seconds,
    }


def text_row(run: TextRun, baseline: TextRun, shared: SharedText) -> dict[str, Any]:
    """One cache's row of the second part."""
    return common_row(run, baseline, shared.numbers) | {
        "reading_seconds": run.reading_seconds,
        "answer_seconds": run.answer_seconds,
    }


def show(record: dict[str, Any], fact: str) -> None:
    """Prints the tables, and what they say."""
    console, settings = report_console(), record["settings"]
    console.print("{model} · {dtype} on {device}".format_map(settings), style="bold", markup=False)
    console.print(
        "\n1. Prompts of {prompt_tokens:,} tokens, the question at the end, {batch_size} at a time".format_map(
            settings
        ),
        style="bold",
    )
    console.print(f"planted in the first one: {fact}", markup=False)
    print_table(console, COLUMNS, list(map(shown_row, record["rows"])))
    console.print(
        f"\n2. A text of {settings['text_tokens']:,} tokens, read once, and {len(settings['later_numbers'])} "
        "questions later",
        style="bold",
    )
    print_table(console, COLUMNS, list(map(shown_row, record["later"])))
    console.print(f"\n{conclusion(record)}", markup=False)
    note = f"Speed is that of a median step, beside {find_entry(BASELINE).label} in this run. "
    note += "Bytes are those of the answer, too."
    console.print(Text(note + busy_note(record["machine"]), style="dim"))


def shown_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what its cells show of answers."""
    words = row["answers"][0].split() or [""]
    return row | {
        "right_of": f"{row['num_right']} of {row['num_answers']}",
        "color": "green" if row["num_right"] >= row["num_answers"] - spare(row) else "red",
        "answer": words[0],
    }


def conclusion(record: dict[str, Any]) -> str:
    """What to conclude: the smallest cache of each part that answers as the baseline does, or almost."""
    (full, *rows), (_, *later) = record["rows"], record["later"]
    sentences = []
    if not full["num_right"]:
        return "The full cache answers none: raise --max-new-tokens, or take another model."
    if found := smallest(full, rows):
        sentences.append(
            f"With the question in the prompt, {found['label']} answers {found['num_right']} of "
            f"{found['num_answers']} from {found['share_of_full']:.0%} of the bytes, and writes "
            f"{found['decode_ratio']:.1f} times the tokens per second."
        )
    if found := smallest(record["later"][0], later):
        sentences.append(
            f"Compressed before the questions are known, {found['label']} answers {found['num_right']} of "
            f"{found['num_answers']} from {found['share_of_full']:.0%}."
        )
    return " ".join(sentences) or "At these budgets no cache answers as the full one does: give larger ones."


def smallest(full: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the fewest bytes of those that answer as the full cache does, or almost; None without any."""
    good = [row for row in rows if row["num_right"] >= max(full["num_right"] - spare(row), 1)]
    return min(good, key=lambda row: row["held_bytes"], default=None)


def spare(row: dict[str, Any]) -> int:
    """How many answers may be missed: one of four or more, or of three later ones."""
    return int(row["num_answers"] > 2)


def draw(record: dict[str, Any], runs: list[PromptRun], prompts: Prompts, path: Path) -> None:
    """Draws what each cache of the first part holds and how fast it is, and which positions."""
    maps = runs[1:]
    heights = [0.4 + 0.42 * len(runs), 1.15 * len(maps)] if maps else [2]
    figure = new_figure(sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_bars(parts[0], record["rows"])
    if maps:
        draw_maps(parts[1], maps, prompts)
    figure.savefig(path, dpi=DPI)


def draw_bars(figure: SubFigure, rows: list[dict[str, Any]]) -> None:
    """Bars of bytes and of speed, a cache a line."""
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['label']}\n{row['num_right']} of {row['num_answers']} right" for row in rows]
    colors = [BASELINE_COLOR, *(COLORS[index % len(COLORS)] for index in range(len(rows) - 1))]
    for axes, name, form, title in (
        (left, "share_of_full", "{:.0%}", "bytes held"),
        (right, "decode_ratio", "{:.2f}×", "tokens per second while answering"),
    ):
        values = [row[name] for row in rows]
        bars = axes.barh(range(len(rows)), values, color=colors)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize="small")
        axes.set(title=title, xticks=[], xlim=(0, 1.18 * max(values)))
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    left.set_yticks(range(len(rows)), labels, fontsize="small")
    left.invert_yaxis()


def draw_maps(figure: SubFigure, runs: list[PromptRun], prompts: Prompts) -> None:
    """A map of the positions that each cache holds of the first prompt."""
    every = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, run in zip(every, runs, strict=True):
        image = draw_positions(axes, run.positions, prompts.fact_spans[0], prompts.num_tokens)
        axes.set_title(f"{run.contender.label}: positions held of the first prompt", fontsize="small", loc="left")
        axes.set_ylabel("layer", fontsize="small")
        axes.locator_params(axis="y", nbins=4)
    every[-1].set_xlabel("position (red: the planted number; dotted line: where the answer begins)", fontsize="small")
    figure.colorbar(image, ax=every.tolist(), ticks=[0, 1], pad=0.01, aspect=30, label="share of the heads")


def draw_positions(axes: Axes, shares: torch.Tensor, fact_span: tuple[int, int], num_tokens: int) -> AxesImage:
    """Draws shares of the KV heads that hold each position, `(layers, positions)`, the fact, and the prompt's end."""
    image = draw_map(axes, shares, vmin=0, vmax=1)
    # Above the map, so that the bar hides nothing of what is kept there.
    axes.plot(fact_span, [-1, -1], color=FACT_COLOR, linewidth=4, clip_on=False, solid_capstyle="butt")
    axes.axvline(num_tokens, color=END_COLOR, linewidth=0.9, linestyle=":")
    return image
