"""What figures are drawn with: a figure that a notebook shows by itself, curves, and logarithmic axes.

Needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np

try:
    from matplotlib import rc_context
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("figures need matplotlib, which is not here: pip install 'kinvert[cli]'") from error
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from kinvert.plot.style import GREY, PAGE, STYLE

__all__ = ["REFERENCE", "Drawing", "count_axis", "density", "error_axis", "line", "log_ticks", "normal_curve", "panels"]

REFERENCE: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 1.0, "zorder": 5}
"""The looks of a line that curves are compared with."""


class Drawing(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


@contextmanager
def panels(count: int, height: float = 2.6) -> Iterator[tuple[Drawing, list[Axes]]]:
    """Make a figure with axes to fill, two in a row, in the style of all figures."""
    columns = min(2, count)
    rows = -(-count // columns)
    with rc_context(STYLE):
        figure = Drawing(figsize=(PAGE, height * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes[count:]:
            ax.remove()
        yield figure, axes[:count]


def line(ax: Axes, x: Any, y: Any, style: dict[str, Any], label: str) -> Line2D:
    """Draw a curve; a point that is NaN is left out."""
    (drawn,) = ax.plot(x, y, label=label, **style)
    return drawn


def error_axis(ax: Axes, label: str = "relative error") -> None:
    """Make the y-axis logarithmic, for errors."""
    ax.set(yscale="log", ylabel=label)
    log_ticks(ax.yaxis)


def density(ax: Axes, counts: ArrayLike, edges: ArrayLike, style: dict[str, Any], label: str) -> Line2D:
    """Draw a histogram as an outline of its density, with bins twice as wide if there are few values."""
    heights, ends = np.asarray(counts, dtype=float), np.asarray(edges)
    if heights.sum() < 4000 and len(heights) % 2 == 0:
        ends, heights = ends[::2], heights.reshape(-1, 2).sum(1)
    heights = np.maximum(heights / heights.sum() / np.diff(ends), 1e-9)
    ax.stairs(heights, ends, baseline=None, color=style["color"], linestyle=style["linestyle"], linewidth=1)
    return Line2D([], [], label=label, **style)


def normal_curve(ax: Axes, low: float, high: float) -> None:
    """Draw the density of noise of unit variance in grey, and finish the axes of densities."""
    z = np.linspace(low, high, 201)
    ax.plot(z, np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), **REFERENCE)
    ax.set(yscale="log", ylim=(5e-4, None), xlabel="latent / σ", ylabel="density")
    log_ticks(ax.yaxis, most=6)


def count_axis(ax: Axes, label: str) -> None:
    """Label the x-axis at whole numbers."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_ticks(axis: Any, most: int = 8) -> None:
    """Label powers of ten; on an axis of less than two decades, 1, 2 and 5 times powers of ten."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=most))
        axis.set_major_formatter("{x:g}")
    else:
        axis.set_major_locator(LogLocator(numticks=most))
        axis.set_minor_locator(NullLocator())
