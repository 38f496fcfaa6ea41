"""What the ops should cost at most, on the machines and at the shapes that the targets are set for."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """
    A bound on a figure of the rows with these settings.

    Args:
        figure (`str`): Key in the row.
        limit (`float`): What the figure may be at most, or must be at least if `is_least`.
        text (`str`): How it reads.
    """

    device: str
    op: str
    length: int
    figure: str
    limit: float
    text: str
    is_least: bool = False
    dtype: str | None = None

    def applies_to(self, device: str, row: dict[str, Any]) -> bool:
        return (
            (device, row["op"], row["length"]) == (self.device, self.op, self.length)
            and self.dtype in (None, row["dtype"])
            and (row["heads"], row["kv_heads"], row["head_dim"], row["batch_size"], row["window"])
            == TARGET_SHAPES[device]
            and row[self.figure] is not None
        )

    def is_met(self, row: dict[str, Any]) -> bool:
        return row[self.figure] >= self.limit if self.is_least else row[self.figure] <= self.limit


# Heads, KV heads, head_dim, batch size and window. Those of CUDA are set for H100 and H200.
TARGET_SHAPES = {"cpu": (9, 3, 64, 1, 64), "cuda": (32, 8, 128, 1, 64)}
TARGETS = (
    Target("cpu", "window_scores", 8192, "overhead_percent", 10, "at most 10 %"),
    Target("cpu", "all_row_scores", 8192, "ratio_to_attention", 2.2, "at most 2.2× attention", dtype="float32"),
    Target("cuda", "window_scores", 32768, "overhead_percent", 2, "at most 2 %", dtype="bfloat16"),
    Target("cuda", "all_row_scores", 32768, "overhead_percent", 60, "at most 60 %", dtype="bfloat16"),
    # Of decoding, what the device does, replayed from a CUDA graph: launches from Python depend on the host.
    Target(
        *("cuda", "decode_scores", 131072, "graph_bandwidth_fraction", 0.7, "at least 0.7 of the bandwidth of copies"),
        is_least=True,
        dtype="bfloat16",
    ),
    Target(
        *("cuda", "decode_scores", 131072, "graph_ratio_to_attention", 1.1, "at most 1.1× attention"),
        dtype="bfloat16",
    ),
)


def targets_of(device: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of a row, and whether it does it."""
    return [
        {
            "figure": target.figure,
            "value": row[target.figure],
            "limit": target.limit,
            "text": target.text,
            "is_met": target.is_met(row),
        }
        for target in TARGETS
        if target.applies_to(device, row)
    ]
