r"""The registered tableaus of Runge-Kutta and exponential Runge-Kutta methods, as data. Each checks its own order."""

from __future__ import annotations

import math
from fractions import Fraction

from kinvert.rules.phi_tableau import PhiTableau
from kinvert.rules.tableau import Tableau

__all__ = ["HOCHBRUCK_OSTERMANN", "KROGSTAD", "PHI_TABLEAUS", "TABLEAUS", "ees_27"]


def ees_27() -> Tableau:
    """Return EES(2, 7), whose coefficients hold the square root of 2."""
    r = math.sqrt(2)
    a = (
        (),
        ((2 - r) / 3,),
        ((r - 4) / 24, (4 + r) / 8),
        ((145 * r - 176) / 168, 3 * (8 - 5 * r) / 56, 3 * (3 - r) / 7),
    )
    b = ((5 - 3 * r) / 14, (3 + r) / 14, 3 * (2 * r - 1) / 14, (9 - 4 * r) / 14)
    return Tableau("ees_27", 2, tuple(tuple(map(Fraction, row)) for row in a), tuple(map(Fraction, b)), 7)


TABLEAUS = (
    Tableau.parse("midpoint", 2, "1/2", "0 1", symmetry=3),
    Tableau.parse("ralston", 2, "2/3", "1/4 3/4", symmetry=3),
    Tableau.parse("rk3", 3, "1/2 | -1 2", "1/6 2/3 1/6", symmetry=3),
    Tableau.parse("bogacki_shampine", 3, "1/2 | 0 3/4", "2/9 1/3 4/9", symmetry=3),
    Tableau.parse("rk4", 4, "1/2 | 0 1/2 | 0 0 1", "1/6 1/3 1/3 1/6", symmetry=5),
    Tableau.parse("rk38", 4, "1/3 | -1/3 1 | 1 -1 1", "1/8 3/8 3/8 1/8", symmetry=5),
    Tableau.parse(
        "dormand_prince",
        5,
        "1/5 | 3/40 9/40 | 44/45 -56/15 32/9 | 19372/6561 -25360/2187 64448/6561 -212/729 "
        "| 9017/3168 -355/33 46732/5247 49/176 -5103/18656",
        "35/384 0 500/1113 125/192 -2187/6784 11/84",
        symmetry=5,
    ),
    Tableau.parse("ees_25", 2, "1/3 | -5/48 15/16", "1/10 1/2 2/5", symmetry=5),
    ees_27(),
)
"""The registered methods: the midpoint rule, Ralston (1962) of order 2, Kutta (1901) of orders 3 and 4 (`rk3`, `rk4`
and the 3/8 rule), Bogacki and Shampine (1989), Dormand and Prince (1980). These two are the propagating formula,
without the error estimate. `ees_25` and `ees_27` are EES(2, 5; 1/10) and EES(2, 7; (5 - 3 sqrt(2)) / 14)."""

KROGSTAD = PhiTableau("res_4s_krogstad", 4, "1/2: | 1/2: p2(1/2) | 1: 0, 2 p2 | 1: 2 p2 - 4 p3, 2 p2 - 4 p3, 4 p3 - p2")
HOCHBRUCK_OSTERMANN = PhiTableau(
    "res_5s_hochbruck-ostermann",
    4,
    "1/2: | 1/2: p2(1/2) | 1: p2, p2 | 1/2: 1/2 p2(1/2) - p3 + 1/4 p2 - 1/2 p3(1/2), "
    "1/2 p2(1/2) - p3 + 1/4 p2 - 1/2 p3(1/2), p3 - 1/4 p2(1/2) - 1/4 p2 + 1/2 p3(1/2) "
    "| 1: 0, 0, 4 p3 - p2, 4 p2 - 8 p3",
)
PHI_TABLEAUS = (
    PhiTableau("etdrk3", 3, "1/2: | 1: 2 p1 | 1: 4 p2 - 8 p3, 4 p3 - p2"),
    PhiTableau("etdrk4", 4, "1/2: | 1/2: 1/2 p1(1/2) | 1: 0, p1(1/2) | 1: 2 p2 - 4 p3, 2 p2 - 4 p3, 4 p3 - p2"),
    PhiTableau("strehmel_weiner", 4, "1/2: | 1/2: 1/2 p2(1/2) | 1: -2 p2, 4 p2 | 1: 0, 4 p2 - 8 p3, 4 p3 - p2"),
)
"""The registered exponential methods that have no class of their own."""
