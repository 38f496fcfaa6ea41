"""What all figures have in common: colours, axes, and maps over positions."""

import io
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/): people with any colour vision can tell them apart. Their
# yellow is left out because it is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
OTHER_LAYERS_COLOR = "#b5b5b5"
# A map is over seven inches wide, of nine. It has no more columns than that has pixels at `DPI`; the columns of a
# longer one are means of neighbours, so that none is lost.
MAX_CELLS = 1024
DPI = 150


def new_figure(height: float) -> "Figure":
    """
    An empty figure, nine inches wide. Notebooks show it without `pyplot`, which would keep it alive and might open a
    window.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "Figures need the package `matplotlib`; run: pip install 'pyramid_cache[plot]'", name=error.name
        ) from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return NotebookFigure(figsize=(9, height), dpi=DPI, layout="constrained")


def tidy(axes: "Axes") -> None:
    """Removes the lines above and to the right, and counts layers or positions in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_map(axes: "Axes", values: torch.Tensor, **settings: Any) -> "AxesImage":
    """
    Draws rows of values over positions, with the first row on top.

    Args:
        values (`torch.Tensor`): `(rows, positions)` float32. NaN is grey.
        settings: Of `Axes.imshow`, and `bad`, another colour for NaN.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    num_rows, num_positions = values.shape
    rows_per_cell, positions_per_cell = cell_size(num_rows), cell_size(num_positions)
    cells = shrink(shrink(values, positions_per_cell).T, rows_per_cell).T
    image = axes.imshow(
        cells.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps[settings.pop("cmap", "Blues")].with_extremes(bad=settings.pop("bad", OTHER_LAYERS_COLOR)),
        extent=(0, cells.shape[1] * positions_per_cell, cells.shape[0] * rows_per_cell - 0.5, -0.5),
        **settings,
    )
    # The last cells may stand for fewer rows and positions than the others.
    axes.set(xlim=(0, num_positions), ylim=(num_rows - 0.5, -0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def position_label(num_positions: int) -> str:
    """The label of the axis of positions of a map."""
    size = cell_size(num_positions)
    return "position" if size == 1 else f"position (means of {size} neighbours)"


def cell_size(length: int) -> int:
    """How many rows or positions share a cell of a map."""
    return max(-(-length // MAX_CELLS), 1)


def shrink(values: torch.Tensor, cell_size: int) -> torch.Tensor:
    """
    `(rows, columns)` to `(rows, cells)`: the means of `cell_size` neighbouring columns; the last cell may have fewer.
    NaN is left out of a mean, and the mean of nothing but NaN is NaN.
    """
    missing = -values.shape[1] % cell_size
    padded = torch.nn.functional.pad(values, (0, missing), value=torch.nan)
    return padded.unflatten(1, (-1, cell_size)).nanmean(dim=2)
