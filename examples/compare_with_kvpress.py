"""Set the figures of caches beside those of kvpress's methods of the same name, on the same cases.

    pyramid-cache eval --out answers
    pyramid-cache eval --tasks needles-8-1024,needles-1-4096 --save-cases cases.json
    kvpress-env/bin/python examples/evaluate_kvpress.py --cases cases.json --model MODEL --out kvpress.json
    python examples/compare_with_kvpress.py answers/results.json kvpress.json

kvpress has its own environment: see `evaluate_kvpress.py`. Its presses without a cache of the same name stand alone.
`--bytes` adds to each cell the bytes that keys and values take, as a share of the full cache's.
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
    "CriticalKV(SnapKV)": "critical",
    "CriticalAdaKV(SnapKV)": "critical-ada",
    "KVzip": "kvzip",
    "KVzip+": "kvzip-plus",
    "TOVA": "tova",
    "KeyDiff": "keydiff",
    "Knorm": "knorm",
    "ExpectedAttention": "expected-attention",
    "StreamingLLM": "streaming",
    "ObservedAttention": "h2o",
}
MEASURES = ("exact_match", "token_accuracy", "log_likelihood")


def figures(row: dict[str, Any], with_bytes: bool) -> str:
    """Exact match, token accuracy and log-likelihood of the right answers, and the share of bytes, as one cell."""
    cell = [row[measure] for measure in MEASURES]
    if with_bytes:
        cell.append(row["held_share"] if "held_share" in row else row["bytes_fraction"])
    return " / ".join(f"{figure:.2f}" for figure in cell)


def tables(rows: list[dict[str, Any]], presses: list[dict[str, Any]], with_bytes: bool = False) -> list[str]:
    """Lines of Markdown: a table per task and protocol, a row per method and library that has it."""
    ours = {(row["task"], row["protocol"], row["cache"], row["budget"]): row for row in rows}
    lines = []
    budgets = sorted({row["budget"] for row in presses if row["budget"] < 1}, reverse=True)
    for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in presses):
        theirs = {
            (row["press"], row["budget"]): row for row in presses if (row["task"], row["protocol"]) == (task, protocol)
        }
        found = []
        for press in dict.fromkeys((*SAME_NAMED, *(press for press, budget in theirs if budget < 1))):
            own = [ours.get((task, protocol, SAME_NAMED.get(press), budget)) for budget in budgets]
            other = [theirs.get((press, budget)) for budget in budgets]
            if None in other:
                continue
            if None not in own:
                cells = " | ".join(figures(row, with_bytes) for row in own)
                found.append(f"| {own[0]['label']} | pyramid_cache | {cells} |")
            found.append(f"| {press} | kvpress | " + " | ".join(figures(row, with_bytes) for row in other) + " |")
        if found:
            header = "| method | of | " + " | ".join(f"{budget:g}" for budget in budgets) + " |"
            lines += [f"## {task}, {protocol} first", "", header, "|---" * (len(budgets) + 2) + "|", *found, ""]
    return lines


def main() -> None:
    """Read both records and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of `pyramid-cache eval --out`")
    parser.add_argument("kvpress", type=Path, nargs="+", help="what evaluate_kvpress.py wrote")
    parser.add_argument("--bytes", action="store_true", help="show shares of bytes as well")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())["rows"]
    presses = [row for path in arguments.kvpress for row in json.loads(path.read_text())["summary"]]
    print("\n".join(tables(rows, presses, arguments.bytes)))


if __name__ == "__main__":
    main()
