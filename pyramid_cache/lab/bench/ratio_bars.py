"""The picture of what caches cost: prefill, decode steps and bytes beside DynamicCache."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


# Key of the ratio, title.
PANELS = (
    ("prefill_ratio", "reading the prompt"),
    ("tokens_ratio", "tokens per second"),
    ("bytes_ratio", "bytes on the device, a row"),
)


def draw(record: dict[str, Any], path: Path) -> None:
    """
    Draws the ratios of each cache to DynamicCache, one bar for each length and batch.

    Args:
        record (`dict`): Of `bench caches`.
        path (`Path`): Where the PNG goes.
    """
    rows = [row for row in record["rows"] if row["failure"] is None]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = list(dict.fromkeys((row["length"], row["batch_size"]) for row in rows))
    figure = Figure(figsize=(12, 2.0 + 0.3 * len(labels) * max(len(cells), 2) / 2), layout="constrained")
    height = 0.8 / len(cells)
    for axis, (key, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for index, (length, batch_size) in enumerate(cells):
            found = {
                row["label"]: row[key] for row in rows if (row["length"], row["batch_size"]) == (length, batch_size)
            }
            places = [place + (index + 0.5) * height - 0.4 for place, label in enumerate(labels) if found.get(label)]
            values = [found[label] for label in labels if found.get(label)]
            axis.barh(places, values, height, label=f"{length:,} tokens, batch {batch_size}")
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="ratio to DynamicCache", yticks=range(len(labels)), yticklabels=labels)
        axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.suptitle(f"{record['model']}, {record['device']}", fontsize="medium")
    figure.savefig(path, dpi=120)
