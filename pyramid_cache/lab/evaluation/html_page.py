"""The report as one page of HTML that needs nothing from elsewhere: tables, pictures, settings and versions."""

import base64
import html
import re
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from pyramid_cache.lab.evaluation.score_plots import Plot
from pyramid_cache.lab.evaluation.score_tables import figures, footnote, groups, scores_of, title_of, turns
from pyramid_cache.lab.registry import BASELINE


def page(record: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The report as HTML5, without what differs between two runs of a command on a machine, such as its load."""
    title = title_of(record, ", ")
    sections: dict[str, list[str]] = {}
    for (task, protocol), rows in groups(record["rows"]).items():
        sections[f"{task}, {protocol} first"] = [table(rows)]
    for plot in plots:
        source, caption = base64.b64encode(plot.png).decode("ascii"), escape(plot.title)
        image = f'<div class="wide"><img src="data:image/png;base64,{source}" alt="{caption}"></div>'
        figure = f"<figure>\n<figcaption>{caption}</figcaption>\n{image}\n</figure>"
        sections.setdefault(plot.section, []).append(figure)
    sections["Settings and versions"] = [notes(record)]
    items = [f'<li><a href="#part-{number}">{escape(name)}</a></li>' for number, name in enumerate(sections)]
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="dim">{escape(footnote(record, "in a column of its own"))}</p>']
    parts.append(f"<p><code>{escape(record['command'])}</code></p>")
    parts.append(f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>')
    for number, (heading, content) in enumerate(sections.items()):
        parts += [f'<h2 id="part-{number}">{escape(heading)}</h2>', *content]
    template = resources.files("pyramid_cache.lab").joinpath("data/report.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(parts))


def escape(value: object) -> str:
    """A value as text that is safe between tags and in attributes."""
    return html.escape(str(value), quote=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table that sorts by the column whose head is pressed: one row per cache and budget."""
    by_turn = ["by turn"] if turns(rows[0]) else []
    columns = ["cache", "budget", *scores_of(rows[0]).values(), "bytes kept", "questions", *by_turn]
    head = "".join(f'<th scope="col"><button type="button">{escape(column)}</button></th>' for column in columns)
    lines = []
    for row in rows:
        cells = [f"{row['budget']:g}", *figures(row), f"{row['held_share']:.2f}", str(row["num_cases"])]
        cells += [turns(row) for _ in by_turn]
        marked = ' class="full"' if row["cache"] == BASELINE else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        # The name of a class may break before a capital where the page is narrow.
        label = re.sub(r"(?<=[a-z])(?=[A-Z(])", "<wbr>", escape(row["label"]))
        lines.append(f'<tr{marked}><th scope="row">{label}</th>{data}</tr>')
    lines = ['<div class="wide"><table class="sorts">', f"<thead><tr>{head}</tr></thead>", "<tbody>", *lines]
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def notes(record: dict[str, Any]) -> str:
    """A table of settings, machine and versions that are set, and are the same for the same command on a machine."""
    machine = {name: record["machine"].get(name) for name in ("processor", "accelerator", "system")}
    values = record["settings"] | machine | record["versions"]
    pairs = [(escape(name.replace("_", " ")), escape(value)) for name, value in values.items() if value is not None]
    lines = (f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in pairs)
    return "\n".join(['<table class="notes">', "<tbody>", *lines, "</tbody>", "</table>"])
