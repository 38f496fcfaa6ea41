"""docs/speed.md has the figures of the records in docs/results."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from pages import DOCS, rewrite

from pyramid_cache.lab.bench.bench_command import SUITES, add_caches_options, parse


PAGE = DOCS / "speed.md"
COMMAND = "python tests/lab/test_speed_page.py --write"
# What a table is of: the record behind a marker in the page.
MARKED = re.compile(r"<!-- times: (\S+) -->\n.*?<!-- end of times -->", re.DOTALL)


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `bench caches`, or of examples/bench_kvpress.py under the same names."""
    if "kvpress" not in record["versions"]:
        return record["rows"]
    names = {"label": "press", "prefill_ratio": "prefill_seconds_ratio"}
    return [
        row | {name: row[key] for name, key in names.items()} | {"tokens_ratio": 1 / row["step_seconds_ratio"]}
        for row in record["rows"]
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per cache: at each length the time of one row's prompt, tokens/s by rows and bytes of one row."""
    lengths, batch_sizes = (sorted({row[name] for row in rows}) for name in ("length", "batch_size"))
    tokens = f"tokens/s, {' / '.join(map(str, batch_sizes))} row{'s' * (batch_sizes[-1] > 1)}"
    titles = [title for length in lengths for title in (f"{length:,}: read", tokens, "bytes")]
    lines = [f"| cache | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    found = {(row["label"], row["length"], row["batch_size"]): row for row in rows}
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for length in lengths:
            own = [found[label, length, batch_size] for batch_size in batch_sizes]
            rates = " / ".join(f"{row['tokens_ratio']:.2f}" for row in own)
            cells += [f"{own[0]['prefill_ratio']:.2f}", rates, f"{own[0]['bytes_ratio']:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_times(page: str) -> str:
    """A page whose tables are those of the records."""

    def marked(match: re.Match[str]) -> str:
        record = json.loads((DOCS / "results" / match[1]).read_text())
        return f"<!-- times: {match[1]} -->\n\n{table(rows_of(record))}\n\n<!-- end of times -->"

    return MARKED.sub(marked, page)


def test_tables_are_those_of_the_records() -> None:
    page = PAGE.read_text()
    assert len(MARKED.findall(page)) == 2
    assert with_times(page) == page, f"{PAGE.name} is not what the records have. Run `{COMMAND}`."


def test_the_record_is_of_the_suite() -> None:
    name = MARKED.findall(PAGE.read_text())[0]
    record = json.loads((DOCS / "results" / name).read_text())
    suite = parse(add_caches_options, SUITES["cpu"][0])
    assert f"--lengths {','.join(map(str, suite.lengths))} " in record["command"]
    measured = {(row["cache"].partition(":")[0], row["length"], row["batch_size"]) for row in record["rows"]}
    assert measured == set(itertools.product(suite.caches, suite.lengths, suite.batch_sizes))


if __name__ == "__main__":
    rewrite([PAGE], with_times)
