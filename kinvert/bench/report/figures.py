"""Draw figures of records, for a paper: each is a function of records that returns a matplotlib figure.

A figure has a panel for each model and question, and what shows curves has a small plot for each method in it. A method
has one colour everywhere. Bands and thin lines are the intervals of the medians (`kinvert.bench.report.intervals`). The
settings that the curves of a panel do not vary over are held at one combination of values, the one with the most to
show; the title names it. Give fewer records to choose another.

Errors are amplitudes relative to the original, `10^(NMSE / 20)`, the median over the samples of all seeds.

Needs matplotlib: `pip install 'kinvert[cli]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("figures need matplotlib, which is not here: pip install 'kinvert[cli]'") from error
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from safetensors.numpy import load_file
from torch import from_numpy

from kinvert.bench.report import plots
from kinvert.bench.report.intervals import of_records
from kinvert.bench.report.multiples import Axis, Curve, multiples
from kinvert.bench.report.plots import Key, Looks, NothingToDrawError, Panel
from kinvert.bench.report.tables import median, text
from kinvert.bench.results import Record
from kinvert.plot.axes import REFERENCE, Drawing, density, normal_curve
from kinvert.plot.page import Page
from kinvert.showing.thumbnails import round_up

__all__ = [
    "FIGURES",
    "NothingToDrawError",
    "distance_against_steps",
    "distance_to_truth",
    "draw",
    "encode",
    "error_against_cfg",
    "error_against_evaluations",
    "error_against_steps",
    "error_along_trajectory",
    "latents",
    "pareto",
    "precision_floors",
    "reconstructions",
]


def error_against_steps(records: Sequence[Record]) -> Figure:
    """Error of the round trip against the number of steps, both logarithmic, with the slope beside the name.

    The slope is fitted by least squares to the points between round-off and an error of a half, where there are three.
    It tells how fast the two directions come to undo each other, which can be faster than either nears the ODE. Points
    whose samples came back to within a tolerance are left out: they show the tolerance.
    """
    return _convergence(records, lambda group: group[0]["cell"]["steps"], "steps", at_points=True)


def error_against_evaluations(records: Sequence[Record]) -> Figure:
    """Error of the round trip against the denoiser evaluations of both directions together: at equal cost."""
    return _convergence(records, plots.cost, "denoiser evaluations per sample, up and down")


def distance_against_steps(records: Sequence[Record]) -> Figure:
    """Distance from the true ODE against the number of steps: the slope beside the name is the order of the sampler.

    Of a recovery it is the distance of the image that is sampled, of a reconstruction that of the latent over sigma.
    """

    def curve(panel: Panel, key: Key, group: list[Record]) -> Curve:
        points = plots.by_value(group, "steps")
        y = [plots.bounded(_middle(point, "distance_to_ode")) for point in points.values()]
        ends = [of_records(point, "distance_to_ode") or (math.nan, math.nan) for point in points.values()]
        slope = plots.order(list(points), y, panel.held["dtype"])
        return Curve(list(points), y, *_bounds(ends), _word(slope, "order"))

    true = [record for record in records if "distance_to_ode" in record["metrics"]]
    return multiples(
        plots.panels(true, "steps", most=1000), curve, Axis("steps", at_points=True), "distance from the ODE"
    )


def _convergence(
    records: Sequence[Record], cost_of: Callable[[list[Record]], float], x_label: str, *, at_points: bool = False
) -> Figure:
    def curve(panel: Panel, key: Key, group: list[Record]) -> Curve:
        points = list(plots.by_value(group, "steps").values())
        x, y = [cost_of(point) for point in points], [plots.error(point) for point in points]
        fitted = [math.nan if plots.is_solved(point) else e for point, e in zip(points, y, strict=True)]
        slope = plots.order(x, fitted, panel.held["dtype"])
        return Curve(x, y, *_bounds(map(plots.error_ends, points)), _word(slope, "slope"))

    found = plots.panels(records, "steps", most=1000)
    return multiples(found, curve, Axis(x_label, at_points=at_points), "relative error")


def _bounds(ends: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends."""
    low, high = zip(*ends, strict=True)
    return list(low), list(high)


def _word(slope: float, name: str) -> str:
    return "" if math.isnan(slope) else f" ({name} {slope:.1f})"


def _middle(group: Sequence[Record], name: str) -> float:
    return median([value for record in group for value in record["metrics"].get(name) or ()])


def error_against_cfg(records: Sequence[Record]) -> Figure:
    """Error against the scale of classifier-free guidance, which both directions use."""

    def curve(panel: Panel, key: Key, group: list[Record]) -> Curve:
        points = plots.by_value(group, "cfg")
        y = [plots.error(point) for point in points.values()]
        return Curve(list(points), y, *_bounds(map(plots.error_ends, points.values())))

    return multiples(
        plots.panels(records, "cfg", most=1000), curve, Axis("guidance scale", is_log=False), "relative error"
    )


def error_along_trajectory(records: Sequence[Record]) -> Figure:
    """How far the states on the way up and on the way down are apart at each noise level, root mean square.

    The level where the second way starts is left out: both have the same state there.
    """

    def curve(panel: Panel, key: Key, group: list[Record]) -> Curve:
        paths = [record["trajectory"] for record in group]
        x = paths[0]["sigma"]
        y = [plots.bounded(median([path["error"][i] for path in paths])) for i in range(len(x))]
        start = 0 if panel.question == "reconstruction" else len(x) - 1
        y[start] = math.nan if all(path["error"][start] == 0 for path in paths) else y[start]
        return Curve(x, y, [math.nan] * len(x), [math.nan] * len(x))  # a record has the medians of its samples alone

    found = plots.panels((record for record in records if record["trajectory"]), most=1000)
    return multiples(found, curve, Axis("noise level σ"), "rms distance")


def precision_floors(records: Sequence[Record]) -> Figure:
    """Error in each number format; the dotted lines are the formats' unit round-off."""

    def draw(panel: Panel, fig: SubFigure, looks: Looks) -> list[Line2D]:
        ax = fig.subplots()
        groups = {looks.label(key): plots.by_value(group, "dtype") for key, group in panel.curves.items()}
        values = {
            label: {name: plots.error(group[name]) if name in group else math.nan for name in formats}
            for label, group in groups.items()
        }
        ends = {label: {n: plots.error_ends(g) for n, g in group.items()} for label, group in groups.items()}
        for name, marker in zip(formats, plots.MARKERS, strict=False):
            ax.axvline(plots.EPS[name], color=plots.GREY, linewidth=0.8, linestyle=":", zorder=0)
            ax.plot(
                plots.EPS[name], 1.0, marker, color=plots.GREY, markersize=3, transform=ax.get_xaxis_transform(),
                clip_on=False,
            )  # fmt: skip
        return plots.dots(ax, values, ends, [looks.style(key)["color"] for key in panel.curves], "relative error")

    found = plots.panels(records, "dtype")
    used = {record["cell"]["dtype"] for panel in found for group in panel.curves.values() for record in group}
    formats = [name for name in plots.EPS if name in used]
    return plots.figure(found, draw, height=_row_height, labels_of=lambda *_: formats)


def distance_to_truth(records: Sequence[Record]) -> Figure:
    """Distance of the latent from that of the true ODE, and its parts that are not 0, relative to the noise level."""
    parts = {"distance_to_ode": "all", "discretisation": "discretisation", "solver": "solver", "round_off": "round-off"}

    def draw(panel: Panel, fig: SubFigure, looks: Looks) -> list[Line2D]:
        groups = {looks.label(key): group for key, group in panel.curves.items()}
        values = {
            label: {shown: _middle(group, name) or math.nan for name, shown in parts.items()}
            for label, group in groups.items()
        }
        ends = {
            label: {shown: of_records(group, name) or (math.nan, math.nan) for name, shown in parts.items()}
            for label, group in groups.items()
        }
        ax = fig.subplots()
        return plots.dots(ax, values, ends, [looks.style(key)["color"] for key in panel.curves], "distance / σ")

    split = [record for record in records if set(parts) <= set(record["metrics"])]
    found = plots.panels(split)
    return plots.figure(found, draw, height=_row_height, labels_of=lambda *_: list(parts.values()))


def latents(records: Sequence[Record]) -> Figure:
    """Distribution and radial spectrum of latent / σ, for the best sampler of each method; grey dashes: noise."""

    def draw(panel: Panel, fig: SubFigure, looks: Looks) -> list[Line2D]:
        axes = fig.subplots(2 if _spectra(panel) else 1, 1, squeeze=False)[:, 0]
        lines = []
        for key, group in panel.curves.items():
            histograms = [record["latent"]["histogram"] for record in group]
            counts, edges = np.sum([found["counts"] for found in histograms], axis=0), histograms[0]["edges"]
            lines.append(density(axes[0], counts, edges, looks.style(key), looks.label(key)))
        normal_curve(axes[0], edges[0], edges[-1])
        for key, (frequency, power) in _spectra(panel).items():
            plots.line(axes[1], frequency, power, looks.style(key), "")
            axes[1].set(yscale="log", xlabel="frequency (cycles per pixel)", ylabel="power")
        if len(axes) > 1:
            axes[1].axhline(1.0, **REFERENCE)
            plots.log_ticks(axes[1].yaxis, most=6)
        return lines

    found = plots.panels((record for record in records if record["latent"]), most=1000)
    best = []
    for panel in found:  # curves come with the lowest error first
        first = {key[0]: key for key in reversed(panel.curves)}
        curves = {key: group for key, group in panel.curves.items() if key in first.values()}
        best.append(replace(panel, curves=curves, left_out=0))
    best.sort(key=lambda panel: not _spectra(panel))
    return plots.figure(best, draw, height=lambda panel: 3.9 if _spectra(panel) else 2.3)


def _spectra(panel: Panel) -> dict[Key, tuple[Any, Any]]:
    """Return frequencies and median power of the curves that have spectra."""
    found = {}
    for key, group in panel.curves.items():
        spectra = [record["latent"]["spectrum"] for record in group if record["latent"]["spectrum"]]
        if spectra:
            found[key] = spectra[0]["frequency"], np.median([spectrum["power"] for spectrum in spectra], axis=0)
    return found


def pareto(records: Sequence[Record]) -> Figure:
    """Error against evaluations, the best curves and all that are on the Pareto front, which is the grey line."""

    def draw(panel: Panel, fig: SubFigure, looks: Looks) -> list[Line2D]:
        ax, points = fig.subplots(), _points(panel)
        for key, found in points:
            style = looks.style(key, linestyle="", markersize=4.5)
            plots.line(ax, [x for x, _, _ in found], [y for _, y, _ in found], style, "")
            for x, _, ends in found:
                ax.plot([x, x], ends, color=style["color"], linewidth=0.8, zorder=1)
        every = [(x, y) for _, found in points for x, y, _ in found]
        ax.step(*zip(*plots.front(every), strict=True), where="post", color=plots.GREY, linewidth=0.8, zorder=1)
        plots.error_axis(ax)
        ax.set_xlabel("denoiser evaluations per sample, up and down")
        plots.cost_ticks(ax, [x for x, _ in every])
        return looks.legend(panel)

    kept_panels = []
    for panel in plots.panels(records, "steps", points=1, most=1000):
        points = {key: {(x, y) for x, y, _ in found} for key, found in _points(panel)}
        best = set(plots.front(point for found in points.values() for point in found))
        leading = [key for key, found in points.items() if best & found]
        kept = {*leading, *[key for key in points if key not in leading][: max(0, plots.MOST - len(leading))]}
        if kept:
            curves = {key: group for key, group in panel.curves.items() if key in kept}
            kept_panels.append(replace(panel, curves=curves, left_out=len(panel.curves) - len(kept)))
    return plots.figure(
        kept_panels, draw, labels_of=lambda panel, looks: [str(line.get_label()) for line in looks.legend(panel)]
    )


Point = tuple[float, float, tuple[float, float]]


def _points(panel: Panel) -> list[tuple[Key, list[Point]]]:
    """Return cost, error and its interval, of every curve at every number of steps, if the error is known."""
    found = []
    for key, group in panel.curves.items():
        points = [
            (plots.cost(point), plots.error(point), plots.error_ends(point))
            for point in plots.by_value(group, "steps").values()
        ]
        found.append((key, [point for point in points if not math.isnan(point[1])]))
    return [(key, points) for key, points in found if points]


TILE, GAP, TEXT, BLOCK = 0.335, 0.03, 1.55, 1.62  # inches: an image, the space to the next, the labels, four images


def reconstructions(records: Sequence[Record]) -> Figure:
    """Images, their latents, what was sampled back, and the difference, for records whose arrays are there.

    `record["arrays"]` is the path of a safetensors file with `image`, `latent` and `restored`, (count, channels, H, W);
    channels are shown as `kinvert.showing.thumbnails` says. Latents are scaled to three standard deviations,
    differences to the limit behind them.
    """
    shown = [record for record in records if record.get("arrays") and record["cell"]["question"] == "reconstruction"]
    found = [_thinned(panel) for panel in plots.panels(shown, most=1000)]
    if not found:
        raise NothingToDrawError("no record has arrays of images")
    looks, heights = Looks.of(found), [0.75 + (1 + len(panel.curves)) * (TILE + 2 * GAP) for panel in found]
    result = Drawing(figsize=(plots.PAGE, sum(heights)))
    parts = result.subfigures(len(found), 1, squeeze=False, height_ratios=heights).flat
    for panel, part, height in zip(found, parts, heights, strict=True):
        part.text(0.05 / plots.PAGE, 1 - 0.05 / height, plots.title(panel, looks), fontsize=8, va="top")
        _strips(panel, part, height)
    return result


def _thinned(panel: Panel, most: int = 8) -> Panel:
    """Keep evenly spaced curves, from the lowest error to the highest."""
    keys = list(panel.curves)
    kept = (
        sorted({round(k * (len(keys) - 1) / (most - 1)) for k in range(most)}) if len(keys) > most else range(len(keys))
    )
    return replace(panel, curves={keys[k]: panel.curves[keys[k]] for k in kept}, left_out=0)


def _strips(panel: Panel, fig: SubFigure, height: float) -> None:
    page = Page(plots.PAGE, height, fig)

    def top(row: float) -> float:
        return 0.6 + row * (TILE + 2 * GAP)

    def words(left: float, row: float, label: str, **style: Any) -> None:
        page.text(left, top(row + 0.5), label, **{"fontsize": 7} | style)

    def tiles(block: int, row: int, images: np.ndarray, limit: float, colours: str) -> None:
        page.tiles(TEXT + block * BLOCK, top(row), from_numpy(images[:4]), limit, colours, TILE, GAP)

    for block, name in enumerate(("latent", "sampled back", "difference")):
        words(TEXT + block * BLOCK, -0.8, name)
    words(0.05, 0, "original")
    for row, ((method, sampler), group) in enumerate(panel.curves.items(), 1):
        arrays = load_file(group[0]["arrays"])
        image, latent, restored = (arrays[name] for name in ("image", "latent", "restored"))
        if row == 1:
            tiles(1, 0, image, 1.0, "gray_r")
        limit = round_up(float(np.quantile(np.abs(restored - image), 0.99)))
        decibels = text(median(group[0]["metrics"]["nmse_db"]), ".0f")
        words(0.05, row, f"{sampler}\n{method}, {decibels} dB")
        tiles(0, row, latent, 3 * float(latent.std()) or 1.0, "gray")
        tiles(1, row, restored, 1.0, "gray_r")
        tiles(2, row, restored - image, limit, "RdBu_r")
        scale = f"{limit:g}" if limit >= 0.01 else text(limit, ".0e")
        words(TEXT + 3 * BLOCK - 0.12, row, f"±{scale}", color=plots.GREY)


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "error-steps": error_against_steps,
    "error-evaluations": error_against_evaluations,
    "order": distance_against_steps,
    "pareto": pareto,
    "error-cfg": error_against_cfg,
    "trajectory": error_along_trajectory,
    "precision": precision_floors,
    "truth": distance_to_truth,
    "latents": latents,
    "reconstructions": reconstructions,
}
"""Name -> function, in the order of a report."""


def draw(name: str, records: Sequence[Record]) -> Figure:
    """Draw the figure of that name in `FIGURES`, in the style that all figures share.

    Raises:
        NothingToDrawError: no record has the data that it shows.
    """
    with matplotlib.rc_context(plots.STYLE):
        return FIGURES[name](records)


def encode(drawn: Figure, suffix: str) -> bytes:
    """Return a figure as the bytes of an "svg" or "png" file (300 dpi); equal figures give equal bytes."""
    buffer = BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    with matplotlib.rc_context(plots.STYLE):
        drawn.savefig(buffer, format=suffix, dpi=300, metadata=metadata)
    return buffer.getvalue()


# -- parts -------------------------------------------------------------------------------------------------------------
def _row_height(panel: Panel) -> float:
    return 0.95 + 0.165 * len(panel.curves)
