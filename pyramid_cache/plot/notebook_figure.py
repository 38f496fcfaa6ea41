"""The figures that the functions of `pyramid_cache.plot` return."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that notebooks show without `pyplot`, which would keep it alive and might open a window."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
