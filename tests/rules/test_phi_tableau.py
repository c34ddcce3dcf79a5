"""Exponential tableaus check themselves; their rule runs, and is what its limits say."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from problems import schedules
from rule_runs import assert_same, run

import kinvert as ki
from kinvert.coefficients import phi
from kinvert.rules import PhiRungeKutta, PhiTableau, Tableau
from kinvert.rules.tables import HOCHBRUCK_OSTERMANN, KROGSTAD, PHI_TABLEAUS

ALL = (*PHI_TABLEAUS, KROGSTAD, HOCHBRUCK_OSTERMANN)


@pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
def test_the_order_is_not_higher(tableau: PhiTableau) -> None:
    assert ki.sampler(tableau.name).ode_order == tableau.order
    with pytest.raises(ValueError, match=f"does not have order {tableau.order + 1}: the series of the tree"):
        PhiTableau(tableau.name, tableau.order + 1, tableau.rows)


@pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
def test_at_h_0_it_is_a_runge_kutta_method_of_the_same_order(tableau: PhiTableau) -> None:
    """phi_j(0) = 1 / j!, and D_0 has the rest of each row; the old check of order, in fractions."""
    rows = [
        (c, [Fraction(value).limit_denominator(1000) for value in row])
        for c, row in ((Fraction(c).limit_denominator(1000), row) for c, row in tableau.at(lambda j, _: phi(j, 0.0)))
    ]
    whole = [(c - sum(row), *row) for c, row in rows]
    Tableau(tableau.name, tableau.order, ((), *map(tuple, whole[:-1])), tuple(whole[-1]))


def test_etdrk4_as_published() -> None:
    """Cox and Matthews (2002), equations 26 to 29, for c = -1: the weights of the first stage are what is left."""
    h, c = 0.7, -1.0
    e, e2 = math.exp(c * h), math.exp(c * h / 2)
    cube = h**2 * c**3
    first = (-4 - h * c + e * (4 - 3 * h * c + h**2 * c**2)) / cube
    middle = 2 * (2 + h * c + e * (-2 + h * c)) / cube
    last = (-4 - 3 * h * c - h**2 * c**2 + e * (4 - h * c)) / cube
    *stages, (_, b) = PHI_TABLEAUS[1].at(lambda j, at: phi(j, -at * h))
    assert [h * w for w in b] == pytest.approx([middle, middle, last], rel=1e-12)
    assert (e - 1) / c - h * sum(b) == pytest.approx(first, rel=1e-11)
    assert h * stages[1][1][0] == h * stages[2][1][1] / 2 == pytest.approx((e2 - 1) / c, rel=1e-12)


@given(sigmas=schedules())
@settings(max_examples=10, deadline=None)
def test_etd2rk_is_a_tableau(sigmas: list[float]) -> None:
    assert_same(run(PhiRungeKutta(PhiTableau("etd2rk", 2, "1: | 1: p2")), sigmas), run("exp_heun_2_x0", sigmas))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1/2: | 1: p2, p3", "rows must have lengths 0 to 1, without D_0"),
        ("1/2: | 1/2: p2", "the last c be 1"),
        ("1/2: | 1: q2", "a coefficient must be a sum such as .* got 'q2'"),
        ("1/2: | 1: 2", "a coefficient must be a sum"),
        ("1/2: | 1: p2", r"does not have order 2: .*is \(1/4\) and must be \(1/2\)"),
    ],
)
def test_bad_rows_are_named(rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhiTableau("wrong", 2, rows)


def test_the_rule_wants_a_tableau() -> None:
    with pytest.raises(TypeError, match="must be a PhiTableau"):
        ki.sampler("etdrk3", tableau="etdrk3")
