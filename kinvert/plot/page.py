"""A figure whose parts are placed in inches: rows of pictures with words beside them.

Needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kinvert.plot.style import GREY, INK, PALE
from kinvert.showing.thumbnails import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["SPACE", "TILE", "Page"]

TILE, SPACE = 0.56, 0.05  # inches: the side of an image, and the space to the next


class Page:
    """A figure whose parts are placed in inches from the top left corner.

    Args:
        width, height: of the page.
        part: draw into this part of a figure, which has that size; None makes a figure.
    """

    def __init__(self, width: float, height: float, part: SubFigure | None = None) -> None:
        from kinvert.plot.axes import Drawing  # here, because matplotlib takes half as long to import as torch

        self.figure: Figure | SubFigure = part or Drawing(figsize=(width, height), facecolor="white")
        self.width, self.height = width, height

    @property
    def whole(self) -> Figure:
        """The figure, also of a part."""
        return self.figure.figure

    def text(self, left: float, top: float, words: str, **style: Any) -> None:
        """Write a line, centred at the height `top`."""
        looks: dict[str, Any] = {"fontsize": 10, "color": INK, "va": "center"} | style
        self.figure.text(left / self.width, 1 - top / self.height, words, **looks)

    def axes(self, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        """Place axes."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, **options)

    def image(self, left: float, top: float, width: float, height: float, **image: Any) -> None:
        """Draw an array, with the options of matplotlib's `imshow`."""
        ax = self.axes(left, top, width, height, xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color=PALE, linewidth=0.6)
        ax.imshow(**image, aspect="auto", interpolation="nearest")

    def tiles(
        self,
        left: float,
        top: float,
        images: Tensor,
        limit: float | None = None,
        cmap: str = "gray_r",
        side: float = TILE,
        space: float = SPACE,
    ) -> str:
        """Draw a row of images, as `pictures` shows them; the colours of `cmap` are for images of one channel.

        Args:
            left, top: the corner of the first.
            images: shape (count, channels, H, W), all of which are drawn.
            limit: the colours go from -limit to limit; None as in `pictures`.
            cmap: colours of one channel.
            side: of an image, the longer one.
            space: between two images.

        Returns:
            What is shown of them.
        """
        drawn = pictures(images, limit, most=len(images))
        height, width = (side * size / max(images.shape[2:]) for size in images.shape[2:])
        for k, pixels in enumerate(drawn.pixels):
            colours = {"cmap": cmap, "vmin": 0, "vmax": 255} if pixels.shape[-1] == 1 else {}
            content = pixels[..., 0] if colours else pixels
            self.image(left + k * (side + space), top, width, height, X=content, **colours)
        return drawn.note(cmap)

    def scale(self, left: float, top: float, cmap: str, low: str, high: str) -> None:
        """Draw a bar of the colours between two labelled ends."""
        self.image(left, top, 1.4, 0.11, X=np.linspace(-1, 1, 256)[None], cmap=cmap)
        self.text(left, top + 0.23, low, color=GREY)
        self.text(left + 1.4, top + 0.23, high, ha="right", color=GREY)
