"""Butcher tableaus check themselves; the rule of a tableau."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from problems import schedules
from rule_runs import assert_same, run

import kinvert as ki
from kinvert.rules import (
    RungeKutta,
    Tableau,
)
from kinvert.rules.tableau import trees


def test_rooted_trees() -> None:
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", ["midpoint", "ralston", "rk3", "bogacki_shampine", "rk4", "dormand_prince"])
def test_tableau_order_is_not_higher(name: str) -> None:
    tableau = ki.SAMPLERS[name].defaults["tableau"]
    assert tableau.name == name
    with pytest.raises(ValueError, match="does not have order"):
        Tableau(name, tableau.order + 1, tableau.a, tableau.b)
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
