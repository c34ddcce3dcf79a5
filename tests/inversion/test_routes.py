"""Which route and which root finder an inversion takes."""

from __future__ import annotations

import pytest
from inverting import MIXTURE, images, schedule

import kinvert as ki
from kinvert.inversion import (
    METHODS,
    Anderson,
    Auto,
    RunLevenbergMarquardt,
    Sweeps,
)
from kinvert.inversion.closed_form import ClosedForm
from kinvert.inversion.routes import Route, choose
from kinvert.inversion.step_by_step import StepByStep
from kinvert.inversion.whole_run import WholeRun


def route_of(plan: ki.Plan, solver: ki.inversion.Solver) -> Route:
    """The table, in other words."""
    if plan.auxiliary:
        return ClosedForm()
    return WholeRun() if plan.is_multistep or isinstance(solver, Sweeps) else StepByStep()


@pytest.mark.parametrize("name", [name for name in ki.SAMPLERS if name != "dpm_adaptive"])
def test_a_method_is_used_or_refused(name: str) -> None:
    """Over the registry: what is accepted for a Plan is what solves it, and the refusal lists what is accepted."""
    plan = ki.compile_plan(name, schedule(4))
    solvers = {
        **{key: make() for key, make in METHODS.items()},
        "mine": Anderson(window=2),
        "my sweeps": Sweeps(window=3),
    }
    if plan.auxiliary:
        solvers["auto"], used = Auto(), {"auto"}
    elif plan.is_multistep:
        solvers |= {"auto": Sweeps(), "levenberg": RunLevenbergMarquardt()}
        used = {"auto", "sweeps", "my sweeps", "levenberg"}
    else:
        used = set(solvers)
    for key, solver in solvers.items():
        for method in (solver, *([key] if key in METHODS else [])):
            if key in used:
                assert choose(method, plan) == (route_of(plan, solver), solver)
                continue
            with pytest.raises(ValueError, match=rf"method must be .*'auto'.* for {name}, got .*"):
                choose(method, plan)


def test_the_method_that_is_refused_is_named() -> None:
    refused = [("dpmpp_2m", "picard", "'auto', 'sweeps', 'levenberg' or a Solver of runs for dpmpp_2m, got 'picard'")]
    refused += [("o_belm", "sweeps", "'auto' for o_belm, got 'sweeps': its steps are undone in closed form")]
    for sampler, method, message in refused:
        with pytest.raises(ValueError, match=message):
            ki.invert(MIXTURE, images(), schedule(6), sampler=sampler, method=method)
    with pytest.raises(ValueError, match="got Anderson"):
        ki.invert(MIXTURE, images(), schedule(6), sampler="lms", method=Anderson(window=2))
