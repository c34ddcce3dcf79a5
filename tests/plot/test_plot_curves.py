"""The data in the curves of `ki.plot`, and what cannot be drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import kinvert as ki

pytest.importorskip("matplotlib")

SIGMAS = (10.0, 3.0, 1.0, 0.2)
DENOISER = ki.denoisers.Gaussian(0.2, 0.5)
X = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
FOUND = ki.invert(DENOISER, X, SIGMAS, sampler="heun")


def lines(figure: Any, panel: int = 0) -> dict[str, list[float]]:
    """The heights of each curve by its label."""
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in figure.axes[panel].get_lines()}


def test_the_worst_residual_of_each_step_is_drawn() -> None:
    figure = ki.plot.convergence(FOUND)
    drawn = lines(figure)
    worst = FOUND.residuals.clamp(min=1e-17).amax(1)
    assert drawn["worst sample"] == pytest.approx(worst.tolist())
    assert drawn["allowed error of the image"] == [float(FOUND.allowed.min())] * 2
    assert [float(x) for x in figure.axes[0].get_lines()[-2].get_xdata()] == list(SIGMAS[:-1])


def test_one_inversion_has_a_line_for_each_sample() -> None:
    drawn = ki.plot.convergence(FOUND).axes[0].get_lines()[:3]
    got = torch.tensor([[float(y) for y in line.get_ydata()] for line in drawn])
    torch.testing.assert_close(got.T.double(), FOUND.residuals.clamp(min=1e-17).double(), rtol=1e-6, atol=0)


def test_contraction_leaves_gaps_where_it_is_not_known() -> None:
    holes = torch.tensor([[0.5, math.nan, 2.0], [math.nan] * 3, [0.1, 0.2, 0.3]])
    figure = ki.plot.contraction({"a": replace(FOUND, contraction=holes), "b": FOUND})
    assert lines(figure)["a"] == pytest.approx([2.0, math.nan, 0.3], nan_ok=True)
    assert lines(figure)["above 1 a fixed-point iteration does not converge"] == [1.0, 1.0]


def test_schedules_are_drawn_as_they_are() -> None:
    named = ki.Schedule(torch.tensor([4.0, 1.0, 0.0]), "mine")
    figure = ki.plot.schedules(named)
    assert lines(figure)["mine"] == pytest.approx([4.0, 1.0, math.nan], nan_ok=True)
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_ylabel() == "noise level σ"


def test_flow_times_have_a_linear_axis() -> None:
    times = ki.schedule("simple", 4, ki.levels.flow(3.0))
    figure = ki.plot.schedules({"times": times})
    assert lines(figure)["times"] == times.tolist()
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[0].get_ylabel() == "flow time"
    with pytest.raises(ValueError, match=r"sigmas has flow times \(times\) and sigmas"):
        ki.plot.schedules({"times": times, "sigmas": SIGMAS})


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "lms"])
def test_the_coefficients_are_those_of_the_plan(name: str) -> None:
    plan = ki.compile_plan(name, SIGMAS)
    figure = ki.plot.coefficients(plan)
    panels = {ax.get_title(): lines(figure, k) for k, ax in enumerate(figure.axes)}
    for i, step in enumerate(plan.steps):
        assert {s: c[i] for s, c in panels["x'"].items() if c[i]} == {str(s): c for s, c in step.x}
        for k, stage in enumerate(step.stages):
            panel = panels.get(f"state at which D{k} is evaluated")
            assert panel or stage.input.alias()
            assert not panel or {s: c[i] for s, c in panel.items() if c[i]} == {str(s): c for s, c in stage.input}


def test_a_name_has_one_look_in_every_figure() -> None:
    from kinvert.bench.report.plots import Looks, Panel
    from kinvert.plot.style import METHOD_COLOURS

    two = ki.invert(DENOISER, X, SIGMAS, sampler="euler")
    for figure in (ki.plot.convergence({"heun": FOUND}), ki.plot.contraction({"euler": two, "heun": FOUND})):
        drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
        assert drawn["heun"].get_color() == "#D55E00" and drawn["heun"].get_marker() == "s"
        assert "euler" not in drawn or drawn["euler"].get_color() == "#0072B2"
    drawn = {line.get_label(): line for line in ki.plot.convergence({"invert": FOUND}).axes[0].get_lines()}
    assert drawn["invert"].get_color() == METHOD_COLOURS["invert"]
    for others in ([], ["euler", "lms"]):
        curves: Any = {("unsample", name): [] for name in ("heun", *others)}
        style = Looks.of([Panel("m", "q", {}, curves, 0)]).style(("unsample", "heun"))
        assert style["color"] == METHOD_COLOURS["unsample"] and style["marker"] == "s"


def test_methods_have_their_colours_and_other_names_one_that_is_free() -> None:
    from kinvert.plot.style import METHOD_COLOURS, looks_of

    names = ["euler", "heun", "mine", *list(METHOD_COLOURS)[:6]]
    looks = looks_of(names)
    assert list(looks) == names
    assert all(looks[name]["color"] == METHOD_COLOURS[name] for name in names[3:])
    assert len({looks[name]["color"] for name in names}) == len({looks[name]["marker"] for name in names}) == len(names)


def test_figures_need_no_pyplot() -> None:
    from matplotlib import _pylab_helpers

    figure = ki.plot.convergence(FOUND)
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not _pylab_helpers.Gcf.figs


@pytest.mark.parametrize(
    ("draw", "error", "words"),
    [
        (lambda: ki.plot.convergence({}), ValueError, "found must have at least one entry"),
        (lambda: ki.plot.convergence({"a": X}), TypeError, r"found\['a'\] must be an Inversion, got Tensor of shape"),
        (lambda: ki.plot.convergence(replace(FOUND, residuals=X[0, 0, :1])), ValueError, "no residuals of its 3 steps"),
        (lambda: ki.plot.contraction(replace(FOUND, contraction=None)), ValueError, "found has no contraction"),
        (lambda: ki.plot.schedules([1.0, 2.0, 1.0]), ValueError, "sigmas must be"),
        (lambda: ki.plot.coefficients("heun"), TypeError, r"ki.compile_plan\(sampler, sigmas\)"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_drawn_says_why(draw: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        draw()
