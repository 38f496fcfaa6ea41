"""What all figures have in common: colours, axes, and maps over positions."""

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which people with any colour vision tell apart; the yellow one
# is left out, too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
OTHER_LAYERS_COLOR = "#b5b5b5"
# A map has no more columns than a figure has pixels for it, at `DPI`: of nine inches, over seven are the map's. Those of a
# longer one are means of neighbours, so that none is lost.
MAX_CELLS = 1024
DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """
    An empty figure of a size in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from pyramid_cache.plot.notebook_figure import NotebookFigure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "Figures need the package `matplotlib`; run: pip install 'pyramid_cache[plot]'", name=error.name
        ) from error
    return NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")


def tidy(axes: "Axes") -> None:
    """Leaves out the lines above and to the right, and has layers counted in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_map(axes: "Axes", values: torch.Tensor, **settings: Any) -> "AxesImage":
    """
    Draws rows of values over positions, the first row on top; what is NaN is grey.

    Args:
        values (`torch.Tensor`): `(rows, positions)` float32.
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
    # The last cells may be of fewer.
    axes.set(xlim=(0, num_positions), ylim=(num_rows - 0.5, -0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def position_label(num_positions: int) -> str:
    """What the axis of a map's positions is called."""
    size = cell_size(num_positions)
    return "position" if size == 1 else f"position (means of {size} neighbours)"


def cell_size(length: int) -> int:
    """How many rows or positions share a cell of a map."""
    return max(-(-length // MAX_CELLS), 1)


def shrink(values: torch.Tensor, cell_size: int) -> torch.Tensor:
    """
    `(rows, columns)` to the means of as many neighbouring columns each, the last of those that are left. NaN does not count; of
    nothing but NaN the mean is NaN.
    """
    missing = -values.shape[1] % cell_size
    padded = torch.nn.functional.pad(values, (0, missing), value=torch.nan)
    return padded.unflatten(1, (-1, cell_size)).nanmean(dim=2)
