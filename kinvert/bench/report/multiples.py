"""Small multiples: one small plot for each method, with the same axes, and the curves of all others in grey behind.

A method with many samplers has a plot for each of them. Bands are the intervals of the medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from kinvert.bench.report import plots
from kinvert.bench.report.plots import Key, Looks, NothingToDrawError, Panel
from kinvert.bench.results import Record
from kinvert.plot.axes import Drawing

__all__ = ["ACROSS", "Axis", "Curve", "multiples"]

ACROSS = 4  # small plots in a row of a page; a column of a paper has half of them
MOST_PLOTS = 12  # in a panel: those with the lowest errors
MOST_CURVES = 3  # of a method in one plot; a method with more has a plot for each
PLOT, LINE, HEAD = 1.35, 0.13, 0.6  # inches: heights of a plot, of a line of its legend or title, of what is around


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
    """What an axis shows: its label, whether it is logarithmic, and whether the values of the points are marked."""

    label: str
    is_log: bool = True
    at_points: bool = False


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
    across = ACROSS if any(len(_plots(panel)) > ACROSS // 2 for panel, _ in drawn) else ACROSS // 2
    heights = [HEAD + sum(_row_heights(panel, across)) for panel, _ in drawn]
    result = Drawing(figsize=(plots.PAGE if across == ACROSS else plots.COLUMN, sum(heights)))
    parts = result.subfigures(len(found), 1, squeeze=False, height_ratios=heights).flat
    for (panel, curves), part in zip(drawn, parts, strict=True):
        _panel(panel, curves, part, looks, x, across)
        part.suptitle(plots.title(panel, Looks.of([panel])), fontsize=8, x=0.02, ha="left")
        part.supxlabel(x.label, fontsize=8, x=0.36 / across, ha="left")
        part.supylabel(y_label, fontsize=8)
    ConstrainedLayoutEngine().execute(result)
    return result


def _plots(panel: Panel) -> dict[str, list[Key]]:
    """Return the curves of each small plot, by its title: a method, or a method and one of its many samplers."""
    methods: dict[str, list[Key]] = {}
    for key in panel.curves:
        methods.setdefault(key[0], []).append(key)
    found: dict[str, list[Key]] = {}
    for method, keys in methods.items():
        if len(methods) > 1 and len(keys) <= MOST_CURVES:
            found[method] = keys
        else:
            found |= {f"{method}\n{key[1]}" if len(methods) > 1 else key[1]: [key] for key in keys}
    return found


def _kept(panel: Panel) -> Panel:
    """Keep as many plots as can be read."""
    kept = [key for keys in list(_plots(panel).values())[:MOST_PLOTS] for key in keys]
    left_out = panel.left_out + len(panel.curves) - len(kept)
    curves = {key: panel.curves[key] for key in panel.curves if key in kept}
    return Panel(panel.model, panel.question, panel.held, curves, left_out)


def _row_heights(panel: Panel, across: int) -> list[float]:
    """Return the height of each row of plots, with the longest legend and title in it."""
    small = _plots(panel)
    lines = [name.count("\n") + (len(keys) if _has_legend(panel, keys) else 0) for name, keys in small.items()]
    return [PLOT + LINE * max(lines[k : k + across]) for k in range(0, len(lines), across)]


def _has_legend(panel: Panel, keys: Sequence[Key]) -> bool:
    """Tell whether a plot has to name its samplers: there are several in the panel, and the title has none."""
    several = len({sampler for _, sampler in panel.curves}) > 1
    return several and keys in [keys for name, keys in _plots(panel).items() if name == keys[0][0]]


def _panel(panel: Panel, curves: dict[Key, Curve], part: SubFigure, looks: Looks, x: Axis, across: int) -> None:
    """Draw the small plots of a panel."""
    small, heights = _plots(panel), _row_heights(panel, across)
    axes = part.subplots(len(heights), across, sharex=True, sharey=True, squeeze=False, height_ratios=heights)
    for ax, (name, keys) in zip(axes.flat, small.items(), strict=False):
        for other in (other for other in panel.curves if other not in keys):
            ax.plot(curves[other].x, curves[other].y, color="#d0d0d0", linewidth=0.6, zorder=1)
        words = [_curve(ax, key, curves[key], looks) for key in keys]
        named = not _has_legend(panel, keys)
        ax.set_title(
            name + (words[0] if named else ""), loc="left", fontsize=7, color=looks.style(keys[0])["color"], pad=3
        )
        if not named:
            ax.legend(loc="upper left", bbox_to_anchor=(-0.08, -0.2), fontsize=6, borderaxespad=0, labelspacing=0.2)
        ax.tick_params(labelbottom=True)
    first = axes.flat[0]
    first.set_yscale("log")
    plots.log_ticks(first.yaxis, most=6)
    if x.is_log:
        plots.cost_ticks(first, [value for key in panel.curves for value in curves[key].x], x.at_points)
    for ax in axes.flat[len(small) :]:
        ax.remove()


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
