"""Set the figures of caches beside those of kvpress's methods of the same name, on the same cases.

    pyramid-cache eval --out answers
    pyramid-cache eval --tasks needles-8-1024,needles-1-4096 --save-cases cases.json
    kvpress-env/bin/python examples/evaluate_kvpress.py --cases cases.json --model MODEL --out kvpress.json
    python examples/compare_with_kvpress.py answers/results.json kvpress.json

kvpress has its own environment: see `evaluate_kvpress.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any


# kvpress has no H2O; ObservedAttention is its method that sums the attention of all queries. It reads prompts in full.
SAME_NAMED = {
    "SnapKV": "snapkv",
    "PyramidKV": "pyramidkv",
    "AdaKV(SnapKV)": "adakv",
    "TOVA": "tova",
    "KeyDiff": "keydiff",
    "Knorm": "knorm",
    "ExpectedAttention": "expected-attention",
    "StreamingLLM": "streaming",
    "ObservedAttention": "h2o",
}
MEASURES = ("exact_match", "token_accuracy", "log_likelihood")


def figures(row: dict[str, Any]) -> str:
    """Exact match, token accuracy and log-likelihood of the right answers, as one cell."""
    return " / ".join(f"{row[measure]:.2f}" for measure in MEASURES)


def tables(rows: list[dict[str, Any]], presses: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a table per task and protocol, two rows per method."""
    ours = {(row["task"], row["protocol"], row["cache"], row["budget"]): row for row in rows}
    lines = []
    budgets = sorted({row["budget"] for row in presses if row["budget"] < 1}, reverse=True)
    for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in presses):
        theirs = {
            (row["press"], row["budget"]): row for row in presses if (row["task"], row["protocol"]) == (task, protocol)
        }
        found = []
        for press, cache in SAME_NAMED.items():
            own = [ours.get((task, protocol, cache, budget)) for budget in budgets]
            other = [theirs.get((press, budget)) for budget in budgets]
            if None not in own and None not in other:
                found.append(f"| {own[0]['label']} | pyramid_cache | " + " | ".join(map(figures, own)) + " |")
                found.append(f"| {press} | kvpress | " + " | ".join(map(figures, other)) + " |")
        if found:
            header = "| method | of | " + " | ".join(f"{budget:g}" for budget in budgets) + " |"
            lines += [f"## {task}, {protocol} first", "", header, "|---" * (len(budgets) + 2) + "|", *found, ""]
    return lines


def main() -> None:
    """Read both records and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of `pyramid-cache eval --out`")
    parser.add_argument("kvpress", type=Path, nargs="+", help="what evaluate_kvpress.py wrote")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())["rows"]
    presses = [row for path in arguments.kvpress for row in json.loads(path.read_text())["summary"]]
    print("\n".join(tables(rows, presses)))


if __name__ == "__main__":
    main()
