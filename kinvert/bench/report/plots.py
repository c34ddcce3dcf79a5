"""The parts that figures are made of: a style, panels of comparable records, curves, dots and legends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kinvert.bench.report.intervals import of_records
from kinvert.bench.report.rows import distinct, evaluations, median, sampler_name, settings
from kinvert.bench.results import Record
from kinvert.plot.axes import Drawing, error_axis, line, log_ticks
from kinvert.plot.style import (
    COLOURS,
    COLUMN,
    GREY,
    HIGHEST,
    LOWEST,
    MARKERS,
    PAGE,
    PALE,
    STYLE,
    bounded,
    free,
    look,
    method_colours,
    preferred,
)

__all__ = [
    "COLOURS",
    "COLUMN",
    "EPS",
    "GREY",
    "HIGHEST",
    "LOWEST",
    "MARKERS",
    "MOST",
    "PAGE",
    "PALE",
    "STYLE",
    "Draw",
    "Key",
    "Looks",
    "NothingToDrawError",
    "Panel",
    "bounded",
    "by_value",
    "cost",
    "cost_ticks",
    "count_ticks",
    "dots",
    "error",
    "error_axis",
    "error_ends",
    "figure",
    "front",
    "is_solved",
    "line",
    "log_ticks",
    "order",
    "panels",
    "title",
]

MOST = 10  # curves or rows in a panel, as many as there are colours
HELD = ("schedule", "steps", "cfg", "dtype")
Key = tuple[str, str]


class NothingToDrawError(ValueError):
    """No record has the data that a figure shows."""


@dataclass(frozen=True)
class Panel:
    """Records of one model and question that differ in method, sampler, seed and the free settings alone.

    Attributes:
        model, question: of all records.
        held: the other settings that they have in common.
        curves: records by (method, sampler), the lowest error first.
        left_out: how many curves more there are.
    """

    model: str
    question: str
    held: dict[str, Any]
    curves: dict[Key, list[Record]]
    left_out: int


def panels(records: Iterable[Record], *free: str, points: int = 2, most: int = MOST) -> list[Panel]:
    """Make a panel for each model and question, with the combination of other settings that has the most to show.

    Args:
        records: the records; those that failed are left out.
        free: settings that may differ within a curve.
        points: number of different values of the free settings that a curve must have to be shown.
        most: number of curves to keep, those with the lowest errors.
    """
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in distinct(records):
        cell = record["cell"]
        others = repr({name: settings(record)[name] for name in HELD if name not in free})
        groups.setdefault((cell["model"], cell["question"]), {}).setdefault(others, []).append(record)
    found = []
    for (model, question), combinations in sorted(groups.items()):
        shown = [_curves(group, free, points) for _, group in sorted(combinations.items())]
        best = max(shown, key=_worth)
        if best:
            common = settings(next(iter(best.values()))[0])
            kept = dict(list(best.items())[:most])
            held = {name: common[name] for name in HELD if name not in free}
            found.append(Panel(model, question, held, kept, len(best) - len(kept)))
    return found


def error(records: Sequence[Record]) -> float:
    """Compute the median amplitude of the error relative to the original, in the range that is drawn.

    Returns:
        NaN if there are no records.
    """
    value = median([decibels for record in records for decibels in record["metrics"].get("nmse_db", ())])
    return bounded(10 ** (min(value, 1000.0) / 20))


def error_ends(records: Sequence[Record]) -> tuple[float, float]:
    """Compute the interval of `error`; NaN if there is none."""
    low, high = of_records(records, "nmse_db") or (math.nan, math.nan)
    return tuple(bounded(10 ** (min(value, 1000.0) / 20)) for value in (low, high))  # type: ignore[return-value]


def is_solved(records: Sequence[Record]) -> bool:
    """Tell whether most samples came back to within a tolerance, so that their error says nothing but the tolerance."""
    claims = [claim for record in records for claim in record["converged"] or ()]
    return 2 * sum(claims) > len(claims)


def by_value(group: Sequence[Record], name: str) -> dict[Any, list[Record]]:
    """Group the records of a curve by a setting, in the order of its values."""
    values = sorted({record["cell"][name] for record in group})
    return {value: [record for record in group if record["cell"][name] == value] for value in values}


def cost(group: Sequence[Record]) -> float:
    """Compute the median of the denoiser evaluations per sample, up and down together."""
    return median([spent for record in group for spent in evaluations(record)])


@dataclass(frozen=True)
class Looks:
    """The looks of curves: a method has one colour in all figures, a sampler one marker and dashes in a figure."""

    colours: dict[str, str]
    markers: dict[str, int]

    @classmethod
    def of(cls, found: Sequence[Panel]) -> Looks:
        """Give each sampler its preferred number, or the next that no sampler beside it in a panel has.

        The most frequent sampler chooses first.
        """
        beside = [{sampler for _, sampler in panel.curves} for panel in found]
        often = Counter(name for names in beside for name in names)
        numbers: dict[str, int] = {}
        for name, _ in sorted(often.items(), key=lambda item: (-item[1], item[0])):
            taken = {numbers.get(other) for names in beside if name in names for other in names}
            numbers[name] = free(preferred(name), taken)
        return cls(method_colours(method for panel in found for method, _ in panel.curves), numbers)

    def label(self, key: Key) -> str:
        """Return the words that tell a curve from the others of the figure."""
        parts = (key[1] if len(self.markers) > 1 else "", key[0] if len(self.colours) > 1 else "")
        return ", ".join(filter(None, parts)) or key[1]

    def style(self, key: Key, **other: Any) -> dict[str, Any]:
        """Return the arguments of `plot` for a curve, with the caller's own added."""
        return look(self.markers[key[1]]) | {"color": self.colours[key[0]]} | other

    def common(self) -> list[str]:
        """Return what all curves have in common, for a title."""
        return [next(iter(names)) for names in (self.colours, self.markers) if len(names) == 1]

    def legend(self, panel: Panel) -> list[Line2D]:
        """Return a line for each method in its colour, and one for each sampler with its marker in grey."""
        methods = dict.fromkeys(method for method, _ in panel.curves)
        samplers = dict.fromkeys(sampler for _, sampler in panel.curves)
        coloured = [Line2D([], [], label=m, color=self.colours[m], linewidth=4.0) for m in methods]
        marked = [
            Line2D([], [], label=name, **self.style((next(iter(methods)), name), color=GREY, linestyle=""))
            for name in samplers
        ]
        return coloured * (len(methods) > 1) + marked * (len(samplers) > 1) or marked


Draw = Callable[[Panel, SubFigure, Looks], Sequence[Line2D]]


def figure(
    found: Sequence[Panel],
    draw: Draw,
    *,
    height: Callable[[Panel], float] = lambda _: 2.3,
    labels_of: Callable[[Panel, Looks], Sequence[str]] | None = None,
) -> Figure:
    """Make a figure of panels, each with a title, its drawing, and a legend of the lines that `draw` returns.

    Args:
        found: the panels; one panel takes a column of a paper, more panels stand two to a row.
        draw: fills a subfigure.
        height: height of a panel without its legend, in inches.
        labels_of: returns the labels of the lines, if the lines are not the curves.

    Raises:
        NothingToDrawError: there are no panels.
    """
    if not found:
        raise NothingToDrawError("no record has what this figure shows")
    looks, columns = Looks.of(found), min(2, len(found))
    labels = [labels_of(panel, looks) if labels_of else [looks.label(key) for key in panel.curves] for panel in found]
    longest = max(len(label) for names in labels for label in names)
    across = max(1, int(COLUMN / (0.5 + 0.052 * longest)))
    lines = [-(-len(names) // across) for names in labels]
    lines = [max(lines[k - k % columns : k - k % columns + columns]) for k in range(len(found))]  # equal in a row
    rows = [max(map(height, found[k : k + columns])) + 0.13 * lines[k] for k in range(0, len(found), columns)]
    result = Drawing(figsize=(COLUMN if columns == 1 else PAGE, sum(rows)))
    parts = result.subfigures(len(rows), columns, squeeze=False, height_ratios=rows).flat
    for panel, part, room in zip(found, parts, lines, strict=False):
        handles = [*draw(panel, part, looks)]
        handles += [Line2D([], [], linestyle="", label=" ")] * (room * across - len(handles))
        part.suptitle(title(panel, looks), fontsize=8, x=0.02, ha="left")
        part.legend(handles=handles, loc="outside lower center", ncols=across)
    ConstrainedLayoutEngine().execute(result)  # once and for all, not for each file
    return result


def title(panel: Panel, looks: Looks) -> str:
    """Return what a panel shows, in two lines."""
    words = {"steps": "{} steps", "cfg": "cfg {:g}"}
    held = [words.get(name, "{}").format(value) for name, value in panel.held.items()]
    if panel.left_out:
        held.append(f"best {len(panel.curves)} of {len(panel.curves) + panel.left_out}")
    return f"{panel.model}: {panel.question}\n" + ", ".join([*looks.common(), *held])


def dots(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    ends: dict[str, dict[str, tuple[float, float]]],
    colours: Sequence[str],
    x_label: str,
) -> list[Line2D]:
    """Draw a row of marks for each label, on a logarithmic axis, with a marker for each name in a row.

    A row has the colour of its method; a thin line through a mark is its interval. The first name is a ring, so that
    marks under it can be seen.
    """
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    for place, (label, colour) in enumerate(zip(rows, colours, strict=True)):
        for k, name in enumerate(names):
            value = bounded(rows[label].get(name, math.nan))
            line(ax, [value], [place], _mark(k) | {"color": colour}, "")
            low, high = map(bounded, ends[label].get(name, (math.nan, math.nan)))
            ax.plot([low, high], [place, place], color=colour, linewidth=1.0, zorder=1)
    ax.set_yticks(range(len(rows)), list(rows))
    for shown, colour in zip(ax.get_yticklabels(), colours, strict=True):
        shown.set_color(colour)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xscale="log", xlabel=x_label)
    ax.grid(axis="x", visible=False)
    ax.tick_params(axis="y", length=0)
    log_ticks(ax.xaxis, most=5)
    return [Line2D([], [], label=name, color=GREY, **_mark(k)) for k, name in enumerate(names)]


def _mark(k: int) -> dict[str, Any]:
    style = {"marker": MARKERS[k], "linestyle": "", "markersize": 4.0}
    return style | {"markersize": 6.5, "markerfacecolor": "none", "markeredgewidth": 1.0} if k == 0 else style


def count_ticks(ax: Axes, values: Iterable[float]) -> None:
    """Make the x-axis logarithmic, for counts, with labels at the values that stand far enough apart."""
    first, *others = sorted(values)
    kept, apart = [first], max(1.3, (max(others, default=first) / first) ** 0.1)
    for value in others:
        if value >= apart * kept[-1]:
            kept.append(value)
    ax.set_xscale("log")
    ax.set_xticks(kept, [f"{value:.0f}" for value in kept])
    ax.xaxis.set_minor_locator(NullLocator())


def cost_ticks(ax: Axes, values: Sequence[float], at_points: bool = False) -> None:
    """Make the x-axis logarithmic, with labels at 1, 2, 5 times powers of ten, or at the values if they are near."""
    known = [value for value in values if not math.isnan(value)]
    if known and (at_points or max(known) < 5 * min(known)):
        count_ticks(ax, known)
    else:
        ax.set_xscale("log")
        log_ticks(ax.xaxis, most=6)


def order(steps: Sequence[float], errors: Sequence[float], dtype: str) -> float:
    """Fit the slope of -ln error over ln steps, by least squares, to the errors between round-off and one half.

    Only the first errors that fall are taken: where an error is not below the one before, another floor is reached.

    Returns:
        NaN if there are fewer than three such points.
    """
    points: list[tuple[float, float]] = []
    for n, e in zip(steps, errors, strict=True):
        if 1e3 * EPS[dtype] < e < 0.5:
            if points and e >= points[-1][1]:
                break
            points.append((n, e))
    if len(points) < 3:
        return math.nan
    x, y = np.log(np.array(points)).T
    return -float(np.polyfit(x, y, 1)[0])


EPS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit round-off."""


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both cost and error, sorted by cost."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


# -- parts -------------------------------------------------------------------------------------------------------------
def _curves(group: Sequence[Record], free: Sequence[str], points: int) -> dict[Key, list[Record]]:
    curves: dict[Key, list[Record]] = {}
    for record in group:
        curves.setdefault((record["cell"]["method"], sampler_name(record["cell"])), []).append(record)
    if free:
        values = {key: {tuple(r["cell"][name] for name in free) for r in found} for key, found in curves.items()}
        curves = {key: found for key, found in curves.items() if len(values[key]) >= points}
    return dict(sorted(curves.items(), key=lambda curve: (_place(error(curve[1])), curve[0])))


def _worth(curves: dict[Key, list[Record]]) -> tuple[int, int]:
    """Rate how much there is to show: the number of records, then the number of steps."""
    found = [record for group in curves.values() for record in group]
    return len(found), max((record["cell"]["steps"] for record in found), default=0)


def _place(value: float) -> float:
    return math.inf if math.isnan(value) else value
