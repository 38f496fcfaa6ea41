"""The report as one page of HTML that needs nothing from elsewhere: tables, pictures, settings and versions."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pyramid_cache.lab.evaluation.caches import BASELINE
from pyramid_cache.lab.evaluation.score_plots import Plot
from pyramid_cache.lab.evaluation.score_tables import footnote, models_of


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1e; --dim: #5f6368; --line: #d9dce1; --head: #f3f4f6; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e6e6e6; --dim: #a0a4ab; --line: #383c43; --head: #22252b; --link: #8cc5ea; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; }
.dim { color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th { font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
.sorts th:first-child { position: sticky; left: 0; background: var(--back); }
.sorts thead th:first-child { background: var(--head); }
thead th { background: var(--head); padding: 0; }
thead button { all: unset; box-sizing: border-box; width: 100%; padding: .35rem .75rem; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.notes th { color: var(--dim); text-align: left; vertical-align: top; }
.notes td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.full td, .full th { font-weight: 600; }
figure { margin: 1.5rem 0; }
figcaption { margin-bottom: .5rem; }
img { display: block; min-width: 40rem; max-width: 100%; height: auto; background: #fff; }
code { font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td, thead button { padding-left: .4rem; padding-right: .4rem; }
  .sorts th:first-child { white-space: normal; min-width: 6.5rem; max-width: 8rem; }
  .sorts thead th { white-space: normal; vertical-align: bottom; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const value = row => row.cells[head.cellIndex].textContent;
    const isText = isNaN(value(body.rows[0])), sorted = head.getAttribute("aria-sort");
    const rising = sorted ? sorted === "descending" : isText;
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const order = (a, b) => isText ? value(a).localeCompare(value(b)) : value(a) - value(b);
    body.append(...[...body.rows].sort((a, b) => rising ? order(a, b) : order(b, a)));
  });
}
"""

# Keys of rows, and what columns are called.
SCORES = {"exact_match": "exact match", "token_accuracy": "token accuracy", "log_likelihood": "log-likelihood"}


def page(record: dict[str, Any], plots: Sequence[Plot]) -> str:
    """
    The report.

    Args:
        record (`dict`): Of the command: rows, settings, command, machine and versions. What differs between two runs of the
            same command on the same machine, such as its load, is not shown.
        plots (`Sequence[Plot]`): Become part of the page.

    Returns:
        `str`: HTML5.
    """
    settings = record["settings"]
    title = f"{models_of(settings)}, {settings['dtype']} on {settings['device']}"
    sections: dict[str, list[str]] = {}
    for (task, protocol), rows in groups(record["rows"]):
        sections[f"{task}, {protocol} first"] = [table(rows)]
    for plot in plots:
        sections.setdefault(plot.section, []).append(picture(plot))
    sections["Settings and versions"] = [notes(facts(record))]
    links = "".join(
        f'<li><a href="#part-{number}">{escape(heading)}</a></li>' for number, heading in enumerate(sections)
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="dim">{escape(footnote(record, "in a column of its own"))}</p>']
    parts += [f"<p><code>{escape(record['command'])}</code></p>", f'<nav aria-label="Contents"><ul>{links}</ul></nav>']
    for number, (heading, content) in enumerate(sections.items()):
        parts += [f'<h2 id="part-{number}">{escape(heading)}</h2>', *content]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    """A value as text that is safe between tags and in attributes."""
    return html.escape(str(value), quote=True)


def breakable(name: str) -> str:
    """The name of a class, which may break before a capital where the page is narrow."""
    return re.sub(r"(?<=[a-z])(?=[A-Z(])", "<wbr>", escape(name))


def groups(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[tuple[str, str], list[dict[str, Any]]]]:
    """Rows by task and protocol, in the order in which they come."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["protocol"]), []).append(row)
    return found.items()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table that sorts by the column whose head is pressed: one row per cache and budget."""
    scores = {"perplexity": "perplexity"} if "perplexity" in rows[0] else SCORES
    has_turns = "token_accuracy_by_turn" in rows[0]
    columns = ["cache", "budget", *scores.values(), "bytes kept", "questions", *(["by turn"] if has_turns else [])]
    head = "".join(f'<th scope="col"><button type="button">{escape(column)}</button></th>' for column in columns)
    lines = []
    for row in rows:
        figures = [f"{row[score]:.2f}" for score in (*scores, "held_share")]
        cells = [f"{row['budget']:g}", *figures, str(row["num_cases"])]
        if has_turns:
            cells.append(" ".join(f"{accuracy:.2f}" for accuracy in row["token_accuracy_by_turn"]))
        marked = ' class="full"' if row["cache"] == BASELINE else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{marked}><th scope="row">{breakable(row["label"])}</th>{data}</tr>')
    body = "\n".join(lines)
    return f'<div class="wide"><table class="sorts">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def picture(plot: Plot) -> str:
    """A picture within the page."""
    data = base64.b64encode(plot.png).decode("ascii")
    caption = escape(plot.title)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f'<figure>\n<figcaption>{caption}</figcaption>\n<div class="wide">{image}</div>\n</figure>'


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """Settings, machine and versions that are the same for the same command on the same machine."""
    machine = {name: record["machine"].get(name) for name in ("processor", "accelerator", "system")}
    return record["settings"] | machine | record["versions"]


def notes(values: dict[str, Any]) -> str:
    """A table of names and values, without those that are not set."""
    lines = [
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(value)}</td></tr>'
        for name, value in values.items()
        if value is not None
    ]
    return '<table class="notes">\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table>"
