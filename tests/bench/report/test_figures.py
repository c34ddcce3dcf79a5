"""Figures of records: the points, the legends, and that equal records give equal files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchrecords import INF, NAN, everything, record

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kinvert[cli]'")

from kinvert.bench.report import figures, plots
from kinvert.plot.style import METHOD_COLOURS


def axes_of(figure: Any) -> list[Any]:
    return [ax for part in figure.subfigs for ax in part.axes]


def titles_of(figure: Any) -> list[str]:
    return [ax.get_title(loc="left") for ax in axes_of(figure)]


def legend_of(part: Any) -> list[str]:
    return [text.get_text() for text in part.legends[0].get_texts() if text.get_text().strip()]


def curves_of(ax: Any) -> list[Any]:
    """The curves of a small plot in front, without the grey ones behind."""
    return [line for line in ax.lines if line.get_zorder() == 3]


def test_convergence_figure_has_points_bands_and_slopes() -> None:
    found = [record(sampler=s, steps=n, count=8) for s in ("euler", "heun") for n in (10, 20, 40, 80)]
    figure = figures.draw("error-steps", found)
    assert titles_of(figure) == ["heun (slope 2.0)", "euler (slope 1.0)"]
    ax = axes_of(figure)[1]
    (euler,) = curves_of(ax)
    assert list(euler.get_xdata()) == [10, 20, 40, 80] and len(ax.lines) == 2  # heun is behind it
    # The median of eight values a decibel apart is half a decibel below the relative error.
    expected = np.array([2.0 / n * 10 ** (-0.5 / 20) for n in (10, 20, 40, 80)])
    np.testing.assert_allclose(euler.get_ydata(), expected)
    (band,) = ax.collections
    ends = band.get_paths()[0].vertices
    np.testing.assert_allclose(sorted({*ends[:, 0]}), [10, 20, 40, 80])
    for x, y in zip((10, 20, 40, 80), expected, strict=True):  # two and a half decibels to both sides
        at = ends[ends[:, 0] == x, 1]
        np.testing.assert_allclose([at.min(), at.max()], [y * 10**-0.125, y * 10**0.125])
    evaluations = figures.draw("error-evaluations", found)
    assert list(curves_of(axes_of(evaluations)[0])[0].get_xdata()) == [20, 40, 80, 160]
    assert titles_of(evaluations) == titles_of(figure)


def test_no_slope_is_fitted_on_a_tolerance() -> None:
    """Errors that fall by chance between two steps, of samples that came back to within the tolerance."""
    found = [record(method=m, steps=n, relative=1e-5 / n) for m in ("invert", "invert_3") for n in (10, 20, 40, 80)]
    assert titles_of(figures.draw("error-steps", found)) == ["invert", "invert_3 (slope 1.0)"]
    for one in found:
        one["metrics"]["distance_to_ode"] = [7.0 * one["cell"]["steps"] ** -2.0] * 4
    assert titles_of(figures.draw("order", found)) == ["invert (order 2.0)", "invert_3 (order 2.0)"]


def test_order_figure_has_the_order_in_its_titles() -> None:
    found = [record(sampler="heun", steps=n, question="recovery") for n in (10, 20, 40)]
    for one in found:
        one["metrics"]["distance_to_ode"] = [7.0 * one["cell"]["steps"] ** -3.0] * 4
    figure = figures.draw("order", found)
    assert titles_of(figure) == ["heun (order 3.0)"]
    np.testing.assert_allclose(curves_of(axes_of(figure)[0])[0].get_ydata(), [7.0 * n**-3.0 for n in (10, 20, 40)])


def test_a_plot_for_each_method_and_for_each_of_its_many_samplers() -> None:
    steps = (10, 20)
    found = [record(method="invert", sampler=s, steps=n) for s in ("euler", "heun") for n in steps]
    found += [record(sampler=f"s{k}", steps=n, relative=0.1 * k) for k in range(1, 5) for n in steps]
    figure = figures.draw("error-steps", found)
    assert titles_of(figure) == ["invert", *(f"unsample\ns{k}" for k in range(1, 5))]
    first, *others = axes_of(figure)
    assert sorted(text.get_text() for text in first.get_legend().get_texts()) == ["euler", "heun"]
    assert [len(curves_of(ax)) for ax in (first, *others)] == [2, 1, 1, 1, 1]
    assert {line.get_color() for line in curves_of(first)} == {METHOD_COLOURS["invert"]}
    assert {line.get_color() for ax in others for line in curves_of(ax)} == {METHOD_COLOURS["unsample"]}
    many = [record(sampler=f"s{k}", steps=n, relative=0.01 * k) for k in range(1, 21) for n in steps]
    figure = figures.draw("error-steps", many)
    assert titles_of(figure) == [f"s{k}" for k in range(1, 13)]
    assert figure.subfigs[0].get_suptitle().endswith("best 12 of 20")


@pytest.mark.parametrize(("question", "start"), [("reconstruction", 0), ("recovery", -1)])
def test_the_state_that_both_ways_share_is_left_out(question: str, start: int) -> None:
    one = record(question=question)
    one["trajectory"] = {"sigma": [4.0, 2.0, 1.0], "error": [0.1, 0.0, 0.2]}
    one["trajectory"]["error"][start] = 0.0
    (line,) = curves_of(axes_of(figures.draw("trajectory", [one]))[0])
    assert [k for k in range(3) if math.isnan(line.get_ydata()[k])] == [range(3)[start]]
    assert line.get_ydata()[1] == plots.LOWEST
    one["trajectory"]["error"][start] = 0.3  # what should not be is drawn
    (line,) = curves_of(axes_of(figures.draw("trajectory", [one]))[0])
    assert not any(map(math.isnan, line.get_ydata()))


def test_few_small_plots_take_a_column() -> None:
    found = [record(method=m, cfg=w) for m in ("invert", "unsample", "picard") for w in (1.0, 2.0)]
    widths = [figures.draw("error-cfg", found[:count]).get_size_inches()[0] for count in (2, 4, 6)]
    assert widths == [plots.COLUMN, plots.COLUMN, plots.PAGE]


@pytest.mark.parametrize("name", ["error-steps", "pareto", "error-cfg", "trajectory", "precision", "truth"])
def test_a_method_has_one_colour_in_all_figures(name: str, tmp_path: Path) -> None:
    figure = figures.draw(name, everything(tmp_path))
    found = {line.get_color() for ax in axes_of(figure) for line in ax.lines}
    greys = {plots.GREY, "#d0d0d0"}
    assert found - greys <= {METHOD_COLOURS["unsample"], METHOD_COLOURS["invert"]}
    assert METHOD_COLOURS["unsample"] in found


def test_pareto_front_is_over_all_curves() -> None:
    cheap = [record(sampler="cheap", relative=0.9, steps=2)]
    found = cheap + [record(sampler=f"s{k}", relative=10.0 ** -(k + 1), steps=20 + k) for k in range(12)]
    dominated = [record(sampler=f"d{k}", relative=0.5, steps=100 + k) for k in range(5)]
    figure = figures.draw("pareto", found + dominated)
    # All that are on the front, though these are more than ten; no others.
    assert legend_of(figure.subfigs[0]) == [*(f"s{k}" for k in range(11, -1, -1)), "cheap"]
    assert figure.subfigs[0].get_suptitle().endswith("best 13 of 18")
    (step,) = [ax for ax in axes_of(figure)[0].lines if ax.get_drawstyle() == "steps-post"]
    assert list(step.get_xdata()) == [4, *(40 + 2 * k for k in range(12))]


def test_zero_and_infinite_errors_are_drawn_at_the_edge() -> None:
    found = [record(steps=n, relative=e) for n, e in ((10, INF), (20, 1e-3), (40, 0.0))]
    found.append(record(steps=80, relative=NAN))
    line = axes_of(figures.draw("error-steps", found))[0].lines[0]
    np.testing.assert_allclose(line.get_ydata()[[0, 2]], [plots.HIGHEST, plots.LOWEST])
    assert math.isnan(line.get_ydata()[3])
    for name in ("error-steps", "pareto"):
        figures.encode(figures.draw(name, found), "svg")


def test_precision_and_truth_have_a_row_for_each_curve(tmp_path: Path) -> None:
    found = everything(tmp_path)
    precision = axes_of(figures.draw("precision", found))[0]
    assert [t.get_text() for t in precision.get_yticklabels()] == ["invert", "unsample"]
    assert [t.get_color() for t in precision.get_yticklabels()] == [
        METHOD_COLOURS["invert"], METHOD_COLOURS["unsample"],
    ]  # fmt: skip
    truth = axes_of(figures.draw("truth", found))[0]
    assert legend_of(figures.draw("truth", found).subfigs[0]) == ["all", "discretisation", "solver", "round-off"]
    round_off = [line for line in truth.lines if line.get_marker() == plots.MARKERS[3]]
    assert round_off and all(math.isnan(line.get_xdata()[0]) for line in round_off)  # a part of 0 is not drawn


def test_latents_are_densities() -> None:
    found = [record(seed=s) for s in (0, 1)]
    figure = figures.draw("latents", found)
    (values, edges, _) = axes_of(figure)[0].patches[0].get_data()
    assert (values * np.diff(edges)).sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(axes_of(figure)[1].lines[0].get_ydata(), [1.1, 0.9, 1.0, 1.2])
    found[0]["latent"]["spectrum"] = found[1]["latent"]["spectrum"] = None
    assert len(axes_of(figures.draw("latents", found))) == 1


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_the_same_twice_or_not_at_all(name: str, tmp_path: Path) -> None:
    found = everything(tmp_path)
    first, second = (figures.draw(name, found) for _ in range(2))
    svg = figures.encode(first, "svg")
    assert svg == figures.encode(second, "svg") and b"<dc:date>" not in svg and b"http://www.w3.org" in svg
    png = figures.encode(first, "png")
    assert png.startswith(b"\x89PNG") and png == figures.encode(second, "png")
    width, height = first.get_size_inches()
    assert width in (plots.COLUMN, plots.PAGE) and 1 < height < 14
    for nothing in ([], [record(error="no")]):
        with pytest.raises(figures.NothingToDrawError):
            figures.draw(name, nothing)


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.encode(figures.draw("error-cfg", everything(tmp_path)), "svg")
    assert dict(matplotlib.rcParams) == before


def test_of_many_curves_the_best_and_the_worst_are_kept() -> None:
    found = [record(sampler=f"s{k:02}", relative=10.0 ** -(k / 2)) for k in range(20)]
    (panel,) = plots.panels(found, most=1000)
    kept = [sampler for _, sampler in figures._thinned(panel).curves]
    everything = [sampler for _, sampler in panel.curves]
    assert len(kept) == 8 and (kept[0], kept[-1]) == (everything[0], everything[-1])
    assert figures._thinned(panel, most=30).curves == panel.curves
