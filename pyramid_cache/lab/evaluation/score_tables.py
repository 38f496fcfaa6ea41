"""What the caches lost, as tables: for the terminal and for a Markdown file."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pyramid_cache.lab.registry import BASELINE
from pyramid_cache.lab.terminal import report_console


# Tasks and protocols that a table for the terminal has room for side by side.
TABLE_COLUMNS = 3
SCORES = {"exact_match": "exact match", "token_accuracy": "token accuracy", "log_likelihood": "log-likelihood"}


def show(record: dict[str, Any]) -> None:
    """Prints the table."""
    console = report_console()
    console.print(title_of(record, " · "), style="bold", markup=False)
    columns = list(groups(record["rows"]).values())
    for start in range(0, len(columns), TABLE_COLUMNS):
        console.print(table(sum(columns[start : start + TABLE_COLUMNS], [])))
    console.print(Text(footnote(record), style="dim"))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per budget and cache, one column per task and protocol."""
    columns = groups(rows)
    by_place = {(row["task"], row["protocol"], row["budget"], row["cache"]): row for row in rows}
    result = Table(header_style="bold")
    result.add_column("cache", no_wrap=True)
    result.add_column("budget", justify="right", no_wrap=True)
    for task, protocol in columns:
        shown = "perplexity" if "perplexity" in columns[task, protocol][0] else "exact token loglik"
        result.add_column(f"{task}\n{protocol} first\n{shown}", justify="right", no_wrap=True)
    labels = {(row["budget"], row["cache"]): row["label"] for row in rows}
    for budget, places in itertools.groupby(sorted(labels, key=lambda place: -place[0]), key=lambda place: place[0]):
        result.add_section()
        for _, cache in places:
            found = [by_place.get((*column, budget, cache)) for column in columns]
            result.add_row(labels[budget, cache], "" if cache == BASELINE else f"{budget:g}", *map(measures, found))
    return result


def markdown(record: dict[str, Any]) -> str:
    """The tables for a text file: one per task and protocol, a row per cache, a column per budget."""
    rows = record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"# {title_of(record, ', ')}", "", footnote(record, "in brackets"), "", f"`{record['command']}`", ""]
    lines += [f"{record['machine']['processor']}; {versions}.", ""]
    budgets = sorted({row["budget"] for row in rows if row["cache"] != BASELINE}, reverse=True)
    for (task, protocol), here in groups(rows).items():
        full = next(row for row in here if row["cache"] == BASELINE)
        lines += [f"## {task}, {protocol} first", "", f"{full['label']}: {measures(full, ' / ')}", ""]
        lines.append(as_line("cache", [f"{budget:g}" for budget in budgets]))
        lines.append("|---" * (len(budgets) + 1) + "|")
        found = {(row["label"], row["budget"]): row for row in here}
        for label in dict.fromkeys(row["label"] for row in here if row is not full):
            lines.append(as_line(label, [measures(found.get((label, budget)), " / ") for budget in budgets]))
        lines.append("")
    return "\n".join(lines)


def as_line(name: str, cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {name} | {' | '.join(cells)} |"


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by task and protocol, in the order in which they come."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["protocol"]), []).append(row)
    return found


def title_of(record: dict[str, Any], separator: str) -> str:
    """The names of the models that were evaluated, and where."""
    settings = record["settings"]
    models = " and ".join(settings[key] for key in ("model", "recall_model") if key in settings)
    return f"{models}{separator}{settings['dtype']} on {settings['device']}"


def scores_of(row: dict[str, Any]) -> dict[str, str]:
    """What a task is measured by: the keys of its rows, and what columns are called."""
    return {"perplexity": "perplexity"} if "perplexity" in row else SCORES


def figures(row: dict[str, Any]) -> list[str]:
    """What a task is measured by, in two decimals."""
    return [f"{row[score]:.2f}" for score in scores_of(row)]


def turns(row: dict[str, Any]) -> str:
    """The token accuracy of each turn of a conversation; empty for other tasks."""
    return " ".join(f"{accuracy:.2f}" for accuracy in row.get("token_accuracy_by_turn", ()))


def measures(row: dict[str, Any] | None, separator: str = "  ") -> str:
    """The figures of a row, in columns or, with another separator, with the turns. Empty if it was not measured."""
    if row is None:
        return ""
    if separator.isspace():
        return separator.join(figure.rjust(6 if place == 2 else 0) for place, figure in enumerate(figures(row)))
    return separator.join(figures(row)) + (f" ({turns(row)})" if turns(row) else "")


def footnote(record: dict[str, Any], place_of_turns: str | None = None) -> str:
    """What the columns mean, and where the token accuracies of turns are, if they are shown."""
    rows = record["rows"]
    counts = {row["task"]: row["num_cases"] for row in rows}
    cases = ", ".join(f"{count} of {task}" for task, count in counts.items())
    note = (
        "Exact match, token accuracy and log-likelihood per token of the right answer; means over the same cases for "
        f"each cache ({cases}). Context first: the context is compressed before a question is known. Question first: "
        "context and question are compressed together; the first token of an answer follows from a full reading then, "
        "so that answers of one token are not measured. Of an answer of several values, token accuracy is the share "
        "of them that is found. The budget is a fraction of what is read."
    )
    if any("perplexity" in row for row in rows):
        note += " Of continuations the perplexity is shown instead."
    if place_of_turns is not None and any("token_accuracy_by_turn" in row for row in rows):
        note += f" Of conversations, the token accuracy of each turn is {place_of_turns}."
    return note
