"""Small multiples: one small plot for each method, with the same axes, and the curves of all others in grey behind.

A panel with one method has a plot for each sampler instead. Bands are the intervals of the medians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter

from kinvert.bench.report import plots
from kinvert.bench.report.plots import Key, Looks, NothingToDrawError, Panel
from kinvert.bench.results import Record

__all__ = ["ACROSS", "Axis", "Curve", "multiples"]

ACROSS = 4  # small plots in a row
MOST_PLOTS, MOST_CURVES = 12, 6  # in a panel, in a plot: those with the lowest errors
PLOT, LINE, HEAD = 1.25, 0.125, 0.62  # inches: heights of a plot, of a line of its legend, of what stands around


@dataclass(frozen=True)
class Curve:
    """A curve: its points, the ends of their intervals (NaN if there is none), and a word for its label."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    word: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its label, whether it is logarithmic, and the values that are marked (None: 1, 2, 5)."""

    label: str
    is_log: bool = True
    ticks: Sequence[float] | None = None


def multiples(
    found: Sequence[Panel], curve_of: Callable[[Panel, Key, list[Record]], Curve], x: Axis, y_label: str
) -> Figure:
    """Make a figure of panels, one under the other, each of small plots.

    Args:
        found: the panels, with all their curves.
        curve_of: makes a curve of a panel, its key and its records.
        x: the horizontal axis; the vertical one is logarithmic.
        y_label: what the vertical axis shows.

    Raises:
        NothingToDrawError: there are no panels.
    """
    if not found:
        raise NothingToDrawError("no record has what this figure shows")
    drawn = [
        (_kept(panel), {key: curve_of(panel, key, group) for key, group in panel.curves.items()}) for panel in found
    ]
    looks = Looks.of(found)
    heights = [_height(panel) for panel, _ in drawn]
    result = Figure(figsize=(plots.PAGE, sum(heights)))
    parts = result.subfigures(len(found), 1, squeeze=False, height_ratios=heights).flat
    for (panel, curves), part in zip(drawn, parts, strict=True):
        _panel(panel, curves, part, looks, x)
        part.suptitle(plots.title(panel, looks), fontsize=8, x=0.02, ha="left")
        part.supxlabel(x.label, fontsize=8)
        part.supylabel(y_label, fontsize=8)
    ConstrainedLayoutEngine().execute(result)
    return result


def _plots(panel: Panel) -> dict[str, list[Key]]:
    """Return the curves of each small plot, by its title: by method, or by sampler if there is one method."""
    by = 0 if len({method for method, _ in panel.curves}) > 1 else 1
    found: dict[str, list[Key]] = {}
    for key in panel.curves:
        found.setdefault(key[by], []).append(key)
    return found


def _kept(panel: Panel) -> Panel:
    """Keep as many plots and curves as can be read."""
    kept = [key for keys in list(_plots(panel).values())[:MOST_PLOTS] for key in keys[:MOST_CURVES]]
    left_out = panel.left_out + len(panel.curves) - len(kept)
    curves = {key: panel.curves[key] for key in panel.curves if key in kept}
    return Panel(panel.model, panel.question, panel.held, curves, left_out)


def _height(panel: Panel) -> float:
    return HEAD + sum(PLOT + LINE * lines for lines in _legend_lines(panel))


def _legend_lines(panel: Panel) -> list[int]:
    """Return the lines of the longest legend in each row of plots."""
    lines = [len(keys) if _has_legends(panel) else 0 for keys in _plots(panel).values()]
    return [max(lines[k : k + ACROSS]) for k in range(0, len(lines), ACROSS)]


def _has_legends(panel: Panel) -> bool:
    return any(len(keys) > 1 for keys in _plots(panel).values())


def _panel(panel: Panel, curves: dict[Key, Curve], part: SubFigure, looks: Looks, x: Axis) -> None:
    """Draw the small plots of a panel."""
    small = _plots(panel)
    ratios = [PLOT + LINE * lines for lines in _legend_lines(panel)]
    axes = part.subplots(
        len(ratios), ACROSS, sharex=True, sharey=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    for ax, (name, keys) in zip(axes.flat, small.items(), strict=False):
        for other, curve in curves.items():
            if other not in keys:
                ax.plot(curve.x, curve.y, color="#d0d0d0", linewidth=0.6, zorder=1)
        words = [_curve(ax, key, curves[key], looks) for key in keys]
        alone = "" if _has_legends(panel) else words[0]
        ax.set_title(f"{name}{alone}", loc="left", fontsize=7, color=looks.style(keys[0])["color"], pad=3)
        if _has_legends(panel):
            ax.legend(
                loc="upper left", bbox_to_anchor=(-0.05, -0.12 if len(ratios) > 1 else -0.16), fontsize=6,
                borderaxespad=0.0, handlelength=2.4, labelspacing=0.2,
            )  # fmt: skip
    last = axes.flat[0]
    last.set_yscale("log")
    plots.log_ticks(last.yaxis, most=6)
    _mark(last, x, [value for key in panel.curves for value in curves[key].x])
    for k, ax in enumerate(axes.flat):
        if k >= len(small):
            ax.remove()
        elif k + ACROSS >= len(small):
            ax.tick_params(labelbottom=True)


def _curve(ax: Axes, key: Key, curve: Curve, looks: Looks) -> str:
    """Draw a curve with its band, and return the word for its label."""
    style = looks.style(key, markersize=3.0)
    if style["marker"] == "*":
        style["markersize"] = 4.0
    if len(curve.x) > 10:
        style["markevery"] = max(1, len(curve.x) // 6)
    ax.plot(curve.x, curve.y, label=key[1] + curve.word, zorder=3, **style)
    ax.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0, zorder=2)
    return curve.word


def _mark(ax: Axes, x: Axis, values: Sequence[float]) -> None:
    """Set the scale and the marks of the horizontal axis."""
    if not x.is_log:
        return
    if x.ticks is not None:
        plots.count_ticks(ax, x.ticks)
        return
    ax.set_xscale("log")
    known = [value for value in values if not math.isnan(value)]
    decades = float(np.log10(max(known) / min(known))) if known else 0.0
    if decades < 1.6:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.2 else (1, 3)))
        ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
