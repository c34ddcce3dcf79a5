"""Curves of results: residuals, contraction, schedules, and the coefficients of a Plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from kinvert.checks import describe
from kinvert.coordinates import coordinates_of
from kinvert.forms import Form
from kinvert.inversion import Inversion
from kinvert.loading import Schedule
from kinvert.plan import Plan, Step, as_schedule
from kinvert.plot.style import GREY, bounded, looks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["coefficients", "contraction", "convergence", "named", "schedules"]

T = TypeVar("T")
MOST = 64  # samples that get a line of their own


def named(shown: Mapping[str, T] | T, what: str) -> dict[str, T]:
    """Return what is drawn by name; a single thing has the name "".

    Raises:
        ValueError: a mapping of nothing.
    """
    if not isinstance(shown, Mapping):
        return {"": shown}
    if not shown:
        raise ValueError(f"there is nothing to draw: {what} must have at least one entry")
    return {str(name): value for name, value in shown.items()}


def convergence(found: Inversion | Mapping[str, Inversion]) -> Figure:
    """Draw the residual that each step was left with, against the noise level at which the step starts.

    A curve is the worst sample of an inversion; thin grey lines are its samples, if there is one inversion alone. The
    dashed line is the error that the image may have, `found.allowed`, the smallest one; a residual above it may still
    be small enough, if the steps that follow shrink it. Values outside of 1e-17 to 100
    are drawn at these ends, and NaN is a gap.

    Args:
        found: an inversion, or inversions by name.

    Raises:
        TypeError: something else.
        ValueError: a run that was solved as a whole has no residuals of steps.
        ModuleNotFoundError: matplotlib is missing.
    """
    chosen = _inversions(found)
    for name, one in chosen.items():
        if len(one.residuals) != len(one.sigmas) - 1:
            raise ValueError(
                f"found{_of(name)} has no residuals of its {len(one.sigmas) - 1} steps: the run was solved as a whole; "
                "print(found) has its error"
            )
    allowed = min(float(one.allowed.min()) for one in chosen.values())
    values = {name: one.residuals for name, one in chosen.items()}
    return _by_step(chosen, values, "residual of a step (rms)", allowed, "allowed error of the image")


def contraction(found: Inversion | Mapping[str, Inversion]) -> Figure:
    """Draw by which factor the published fixed-point iteration would change an error, step by step.

    A curve is the worst sample of an inversion, see `Inversion.contraction`. Above the dashed line, at 1, the iteration
    does not converge. Steps without an estimate are gaps.

    Args:
        found: an inversion, or inversions by name.

    Raises:
        TypeError: something else.
        ValueError: the contraction was not measured.
        ModuleNotFoundError: matplotlib is missing.
    """
    chosen, values = _inversions(found), {}
    for name, one in chosen.items():
        if one.contraction is None or bool(one.contraction.isnan().all()):
            raise ValueError(
                f"found{_of(name)} has no contraction: ki.invert measures it for steps that are solved one by one, "
                "with check=True and enough evaluations"
            )
        values[name] = one.contraction
    return _by_step(chosen, values, "contraction factor", 1.0, "above 1 a fixed-point iteration does not converge")


def schedules(sigmas: Tensor | Sequence[float] | Schedule | Mapping[str, Any]) -> Figure:
    """Draw the noise levels of schedules against their place.

    Levels are on a logarithmic axis, on which a last level of 0 has no place; flow times on a linear one.

    Args:
        sigmas: a schedule, as `ki.schedule` returns it or as a `ki.Schedule`, or schedules by name.

    Raises:
        TypeError, ValueError: something that is no schedule; sigmas and flow times together.
        ModuleNotFoundError: matplotlib is missing.
    """
    levels, units = dict[str, tuple[float, ...]](), dict[str, str]()
    for name, one in named(sigmas, "sigmas").items():
        label = name or (one.name or "" if isinstance(one, Schedule) else "")
        values = one.sigmas if isinstance(one, Schedule) else one
        levels[label], units[label] = as_schedule(values), coordinates_of(values) or "ve"
    flow = _unit("sigmas", units) == "flow"
    from kinvert.plot.axes import count_axis, panels

    with panels(1) as (figure, (ax,)):
        for label, looks in looks_of(levels).items():
            shown = levels[label] if flow else [value or math.nan for value in levels[label]]
            _curve(ax, range(len(shown)), shown, looks, label)
        count_axis(ax, "place in the schedule")
        ax.set_ylabel(_label(flow))
        if not flow:
            ax.set_yscale("log")
        _legend(figure, ax)
    return figure


def coefficients(plan: Plan) -> Figure:
    """Draw the coefficients of a Plan against the step: a panel for each row, a curve for each symbol of it.

    The symbols are those of `print(plan)`: x and the remembered values of the old state, D0, D1, ... for what the
    denoiser returns, U0, ... for its unconditional part, n0, ... for noise. Rows that only copy a value are left out.

    Args:
        plan: the Plan, `ki.compile_plan(sampler, sigmas)`.

    Raises:
        TypeError: no Plan.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {describe(plan)}; pass ki.compile_plan(sampler, sigmas)")
    rows = [_rows(step) for step in plan.steps]
    names = dict.fromkeys(name for row in rows for name in row)
    chosen = [name for name in names if any(name in row and row[name].alias() is None for row in rows)]
    from kinvert.plot.axes import count_axis, panels

    with panels(len(chosen) or 1) as (figure, axes):
        symbols = dict.fromkeys(symbol for name in chosen for row in rows if name in row for symbol, _ in row[name])
        looks = looks_of(map(str, symbols))
        for ax, name in zip(axes, chosen, strict=False):
            used = {symbol for row in rows if name in row for symbol, _ in row[name]}
            for symbol in [symbol for symbol in symbols if symbol in used]:
                values = [row[name][symbol] if name in row else math.nan for row in rows]
                _curve(ax, range(len(rows)), values, looks[str(symbol)], str(symbol))
            count_axis(ax, "step")
            ax.set(title=name, ylabel="coefficient")
        _legend(figure, *axes)
    return figure


# -- parts -------------------------------------------------------------------------------------------------------------
def _rows(step: Step) -> dict[str, Form]:
    """Return the rows of a step by what they make."""
    inputs = {f"state at which D{k} is evaluated": stage.input for k, stage in enumerate(step.stages)}
    return inputs | {f"{name}'": form for name, form in (("x", step.x), *step.memory)}


def _inversions(found: Inversion | Mapping[str, Inversion]) -> dict[str, Inversion]:
    chosen = named(found, "found")
    for name, one in chosen.items():
        if not isinstance(one, Inversion):
            raise TypeError(
                f"found{_of(name)} must be an Inversion, got {describe(one)}; pass what ki.invert or "
                "ki.extract_noise returns"
            )
    return chosen


def _by_step(
    chosen: Mapping[str, Inversion], values: Mapping[str, Tensor], label: str, limit: float, limit_is: str
) -> Figure:
    """Draw the largest of the values, (steps, batch), of each inversion against the level where a step starts."""
    units = {name: one.back.coordinates if one.back else "ve" for name, one in chosen.items()}
    flow = _unit("found", units) == "flow"
    from kinvert.plot.axes import REFERENCE, error_axis, panels

    with panels(1) as (figure, (ax,)):
        for name, looks in looks_of(chosen).items():
            x, every = chosen[name].sigmas[:-1], values[name].detach().double().cpu()
            samples = every.shape[1] if len(chosen) == 1 else 1
            for k in range(min(samples, MOST) if samples > 1 else 0):
                thin = {"color": GREY, "linewidth": 0.5, "alpha": 0.6}
                _curve(ax, x, _bounded(every[:, k].tolist()), thin, "each sample" if k == 0 else "_")
            worst = every.nan_to_num(-math.inf, math.inf).amax(1)
            known = worst.where(worst > -math.inf, math.nan).tolist()
            _curve(ax, x, _bounded(known), looks, name or "worst sample")
        ax.axhline(limit, label=limit_is, **REFERENCE)
        ax.set(xscale="log", xlabel=f"{_label(flow)} at the start of a step")
        error_axis(ax, label)
        _legend(figure, ax)
    return figure


def _curve(ax: Axes, x: Iterable[float], y: Iterable[float], looks: dict[str, Any], label: str) -> Line2D:
    from kinvert.plot.axes import line

    return line(ax, list(x), list(y), looks, label)


def _legend(figure: Figure, *axes: Axes) -> None:
    """Put a legend below the axes, with each label once; none for a curve without a name."""
    lines = {str(line.get_label()): line for ax in axes for line in ax.get_lines()}
    shown = [line for label, line in lines.items() if label and not label.startswith("_")]
    if shown:
        figure.legend(handles=shown, loc="outside lower center", ncols=min(4, len(shown)))


def _unit(what: str, units: Mapping[str, str]) -> str:
    """Return the coordinates that all levels have.

    Raises:
        ValueError: some are flow times and some are not.
    """
    kinds = set(units.values())
    if len(kinds) > 1:
        flow = ", ".join(name for name, unit in units.items() if unit == "flow")
        raise ValueError(f"{what} has flow times ({flow}) and sigmas, which have no common axis; draw them apart")
    return kinds.pop()


def _label(flow: bool) -> str:
    return "flow time" if flow else "noise level σ"


def _of(name: str) -> str:
    return f"[{name!r}]" if name else ""


def _bounded(values: Iterable[float]) -> list[float]:
    return [bounded(value) for value in values]
