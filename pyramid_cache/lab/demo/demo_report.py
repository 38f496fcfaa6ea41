"""What the demo found out: a record for JSON, and a table and a chart for the terminal."""

import argparse
import itertools
import statistics
from typing import Any

from rich.table import Table
from rich.text import Text

from pyramid_cache.lab.demo.planted_number import Prompts
from pyramid_cache.lab.demo.timed_answers import BASELINE, CACHES, Result
from pyramid_cache.lab.loaded_model import LoadedModel
from pyramid_cache.lab.machine import busy_note, describe_versions, load_average
from pyramid_cache.lab.terminal import report_console


BLOCKS = " ▁▂▃▄▅▆▇█"
CHART_HEIGHT = 3
CHART_MAX_COLUMNS = 64
ANSWER_WORDS = 20


def as_record(
    results: list[Result], loaded: LoadedModel, prompts: Prompts, options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """
    Everything that was measured, and on what, as JSON takes it.

    Args:
        options (`argparse.Namespace`): Of the command.
        machine (`dict`): From `describe_machine`, asked before the measurement.

    Returns:
        `dict`: "rows", one per cache, with times as medians over the repeats and ratios to the baseline; "settings";
        "machine"; "versions".
    """
    baseline = next(result for result in results if result.cache == BASELINE)
    return {
        "rows": [as_row(result, baseline, prompts, options.max_new_tokens) for result in results],
        "settings": {
            "model": loaded.name,
            "num_parameters": loaded.model.num_parameters(),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "attn_implementation": loaded.model.config._attn_implementation,
            "prompt_tokens": prompts.num_tokens,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "budget": options.budget,
            "seed": options.seed,
            "repeats": options.repeats,
            "numbers": prompts.numbers,
        },
        "machine": machine | {"load_average_after": load_average()},
        "versions": describe_versions("pyramid_cache", "torch", "transformers"),
    }


def as_row(result: Result, baseline: Result, prompts: Prompts, max_new_tokens: int) -> dict[str, Any]:
    """One cache's row. Tokens per second are those of all rows of the batch together."""
    prefill = statistics.median(result.prefill_seconds)
    num_decoded = (max_new_tokens - 1) * len(prompts.numbers)
    speeds = [num_decoded / seconds for seconds in result.decode_seconds]
    baseline_speed = num_decoded / statistics.median(baseline.decode_seconds)
    speed = num_decoded / statistics.median(result.decode_seconds)
    recalled = [number in answer for number, answer in zip(prompts.numbers, result.answers, strict=True)]
    return {
        "cache": result.cache,
        "label": CACHES[result.cache],
        "held_bytes": result.held_bytes,
        "share_of_full": result.held_bytes / baseline.held_bytes,
        "kept_tokens": result.kept_tokens,
        "prefill_seconds": prefill,
        "prefill_ratio": prefill / statistics.median(baseline.prefill_seconds),
        "decode_tokens_per_second": speed,
        "decode_ratio": speed / baseline_speed,
        "recalled": all(recalled),
        "recalled_share": sum(recalled) / len(recalled),
        "answer": result.answers[0],
        "answers": result.answers,
        "prefill_seconds_by_repeat": result.prefill_seconds,
        "decode_tokens_per_second_by_repeat": speeds,
    }


def show(record: dict[str, Any], fact: str) -> None:
    """Prints the table and the chart."""
    console = report_console()
    settings = record["settings"]
    console.print(
        f"{settings['model']} · {settings['dtype']} on {settings['device']} · {settings['batch_size']} × "
        f"{settings['prompt_tokens']:,} prompt tokens · {settings['max_new_tokens']} new ones · "
        f"budget {settings['budget']}",
        style="bold",
        markup=False,
    )
    console.print(f"planted in the middle: {' '.join(fact.split())}\n", markup=False)
    console.print(table(record))
    console.print(Text(footnote(record), style="dim"))
    console.print(f"\n{chart(record['rows'])}", markup=False, soft_wrap=True)


def table(record: dict[str, Any]) -> Table:
    """One row per cache."""
    result = Table(header_style="bold")
    result.add_column("cache", no_wrap=True)
    for header in (
        "tokens kept\nper layer",
        "bytes held",
        "share\nof full",
        "prefill\nseconds",
        "ratio",
        "decode\ntokens/s",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("ratio", justify="right", no_wrap=True)
    result.add_column("recalled", justify="center", no_wrap=True)
    result.add_column("answer", overflow="fold")
    for row in record["rows"]:
        low, high = min(row["kept_tokens"]), max(row["kept_tokens"])
        num_rows = len(row["answers"])
        recalled = "yes" if row["recalled"] else "no"
        if num_rows > 1:
            recalled = f"{round(row['recalled_share'] * num_rows)} of {num_rows}"
        result.add_row(
            row["label"],
            f"{low:,}" if low == high else f"{low:,}–{high:,}",
            f"{row['held_bytes'] / 2**20:,.1f} MiB",
            f"{row['share_of_full']:.1%}",
            f"{row['prefill_seconds']:.2f}",
            f"{row['prefill_ratio']:.2f}×",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_ratio']:.2f}×",
            Text(recalled, style="green" if row["recalled"] else "red"),
            Text(first_words(row["answer"])),
        )
    return result


def first_words(answer: str) -> str:
    """The beginning of an answer, on one line."""
    words = answer.split()
    return " ".join(words[:ANSWER_WORDS]) + (" …" if len(words) > ANSWER_WORDS else "")


def footnote(record: dict[str, Any]) -> str:
    """What the ratios mean, and how far they can be trusted."""
    repeats = record["settings"]["repeats"]
    note = f"Ratios are to {CACHES[BASELINE]} in the same run: of seconds for the prefill, of speed for decoding."
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
    num_layers = len(rows[0]["kept_tokens"])
    lines = [f"tokens kept per layer, first to last of {num_layers} (a full bar is {full:,})"]
    label_width = max(len(row["label"]) for row in rows)
    for row in rows:
        drawn = bars(row["kept_tokens"], full, CHART_HEIGHT, CHART_MAX_COLUMNS)
        lines += [f"{row['label'] if not index else '':<{label_width}}  {line}" for index, line in enumerate(drawn)]
    return "\n".join(lines)


def bars(values: list[int], full: int, height: int, max_columns: int) -> list[str]:
    """Draws one bar per value, or per mean of neighbouring values where there are more than `max_columns`."""
    num_columns = min(len(values), max_columns)
    edges = [round(column * len(values) / num_columns) for column in range(num_columns + 1)]
    means = [statistics.mean(values[low:high]) for low, high in itertools.pairwise(edges)]
    steps = len(BLOCKS) - 1
    # Of something that is kept at least the thinnest bar is shown.
    filled = [max(round(mean / full * height * steps), 1 if mean else 0) for mean in means]
    return [
        "".join(BLOCKS[min(max(bar - level * steps, 0), steps)] for bar in filled) for level in reversed(range(height))
    ]
