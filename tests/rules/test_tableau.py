"""Butcher tableaus check themselves; the rule of a tableau."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from problems import mixture, noise_like, order_slope, schedules
from rule_runs import assert_same, run

import kinvert as ki
from kinvert.rules import (
    LawsonRungeKutta,
    RungeKutta,
    Tableau,
)
from kinvert.rules.tableau import trees
from kinvert.rules.tables import TABLEAUS


def test_rooted_trees() -> None:
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", [tableau.name for tableau in TABLEAUS])
def test_tableau_order_is_not_higher(name: str) -> None:
    tableau = ki.SAMPLERS[name].defaults["tableau"]
    assert tableau.name == name
    with pytest.raises(ValueError, match="does not have order"):
        Tableau(name, tableau.order + 1, tableau.a, tableau.b)
    with pytest.raises(ValueError, match="not effectively symmetric to order.*state a lower symmetry"):
        Tableau(name, tableau.order, tableau.a, tableau.b, tableau.symmetry + 1)
    rule = ki.sampler(name)
    assert (rule.name, rule.ode_order) == (name, tableau.order)
    plan = ki.compile_plan(rule, [3.0, 1.0, 0.0])
    assert [len(step.stages) for step in plan.steps] == [len(tableau.b), 1]


def test_bad_tableaus() -> None:
    with pytest.raises(ValueError, match="sum_i b_i Phi_i is 2/3 and must be 1"):
        Tableau.parse("wrong", 1, "1/2", "1/3 1/3")
    with pytest.raises(ValueError, match="lengths 0 to 1"):
        Tableau.parse("wrong", 1, "1/2 | 1 1", "1/2 1/2")
    with pytest.raises(TypeError, match="must be a Tableau"):
        ki.sampler("rk4", tableau="rk4")


@given(sigmas=schedules())
@settings(max_examples=10, deadline=None)
def test_heun_is_a_tableau(sigmas: list[float]) -> None:
    heun = RungeKutta(Tableau.parse("heun", 2, "1", "1/2 1/2"))
    assert_same(run(heun, sigmas), run("heun", sigmas))


@pytest.mark.parametrize(
    ("name", "steps"), [("midpoint", (40, 80, 160)), ("ees_25", (20, 40, 80)), ("ees_27", (40, 80, 160))]
)
def test_round_trips_fall_at_the_order_of_the_symmetry(name: str, steps: tuple[int, ...]) -> None:
    """Up and down with the same sampler, nothing solved: EES(2, 5) and EES(2, 7) miss by h^5 and h^7."""
    denoiser, x = mixture(), noise_like((8, 6), seed=2)
    errors = []
    for n in steps:
        sigmas = ki.schedules.exponential(n + 1, 0.1, 10.0)[:-1]
        up = ki.unsample(denoiser, x, sigmas, sampler=name, sigma_offset=0.0)
        errors.append(float((ki.sample(denoiser, up, sigmas, sampler=name) - x).norm()))
    expected = ki.SAMPLERS[name].defaults["tableau"].symmetry
    assert expected - 0.3 < order_slope(errors, list(steps)) < expected + 0.8


@given(sigmas=schedules())
@settings(max_examples=10, deadline=None)
def test_euler_in_one_over_sigma_is_euler(sigmas: list[float]) -> None:
    assert_same(run(LawsonRungeKutta(Tableau.parse("euler", 1, "", "1")), sigmas), run("euler", sigmas))


def test_lawson_methods_have_the_order_of_their_tableau() -> None:
    """rk4 in 1 / sigma: to the solution of the ODE, and x = m for D = m, which Lawson's own spacing does not keep."""
    denoiser, x, steps = mixture(), 10 * noise_like((8, 6), seed=2), [40, 80, 160]
    grids = [ki.schedules.exponential(n + 1, 0.1, 10.0)[:-1] for n in (*steps, 1000)]
    exact = ki.run(ki.compile_plan("dormand_prince", grids[-1]), denoiser, x)
    rule = LawsonRungeKutta(TABLEAUS[4])
    errors = [float((ki.run(ki.compile_plan(rule, grid), denoiser, x) - exact).norm()) for grid in grids[:-1]]
    assert rule.name == "rk4_x0" and 3.7 < order_slope(errors, steps) < 4.5
    still = ki.run(
        ki.compile_plan(rule, grids[0]), lambda y, _: 0 * y + 2.0, torch.full((1, 6), 2.0, dtype=torch.float64)
    )
    torch.testing.assert_close(still, torch.full((1, 6), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(("sweeps", "symmetry"), [(2, 3), (3, 5), (4, 5), (5, 7)])
def test_sweeps_of_the_implicit_midpoint_rule_are_less_symmetric_than_ees(sweeps: int, symmetry: int) -> None:
    """The table of the page on the architecture: a sweep is a stage at the middle, from the slope of the one before."""
    half, none = Fraction(1, 2), Fraction(0)
    rows = ((), *((none,) * k + (half,) for k in range(sweeps)))
    weights = (none,) * sweeps + (Fraction(1),)
    assert Tableau("sweeps", 2, rows, weights, symmetry).symmetry == symmetry
    with pytest.raises(ValueError, match="not effectively symmetric"):
        Tableau("sweeps", 2, rows, weights, symmetry + 1)
