r"""Tableaus of exponential Runge-Kutta methods, whose coefficients are combinations of `phi_j(-c h)`.

A tableau checks itself. The method is applied to `x' = D(x, t) - x`; with `z = -h` every coefficient is a power series
in z, and so is the weight of every elementary differential of the exact solution. A rooted tree has leaves of two
kinds, a change of x and a change of t, and

    Phi_k(x) = c_k phi_1(c_k z),  Phi_k(t) = c_k,  Phi_k([u_1, ..., u_m]) = sum_l a_kl(z) prod_i Phi_l(u_i),
    E_s(x) = s phi_1(s z),        E_s(t) = s,      E_s([u_1, ..., u_m]) = int_0^s e^{(s - r) z} prod_i E_r(u_i) dr.

The method has order p if `Phi` of the step and `E_1` agree up to `z^(p - n)` for each tree with n nodes up to p.

Source: Hochbruck and Ostermann, Exponential Integrators (2010), Acta Numerica 19; the conditions are those of
Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I (1993), chapter II, with a linear part.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kinvert.rules.tableau import Tree, trees

__all__ = ["Phi", "PhiTableau", "Row", "Term"]

Phi = Callable[[int, float], float]
"""The function `p(j, c) = phi_j(-c h)` of a step."""
Row = tuple[float, tuple[float, ...]]
"""The place `c` of a stage in the step, and its coefficients `(a_1, a_2, ...)`."""
Term = tuple[Fraction, int, Fraction]
"""`(w, j, c)` for `w phi_j(-c h)`; a coefficient is a sum of terms."""
Series = list[float]
"""The coefficients of a power series in z."""

TIME: Tree = ("t",)
"""A leaf for a change of t; the leaf `()` is a change of x."""
EXACT = 1e-12
"""Series of floats that agree to this are equal; those of another order differ by 1e-3 and more."""
_TERM = re.compile(r"([+-]?)\s*(\d+(?:/\d+)?)?\s*p(\d)(?:\((\d+(?:/\d+)?)\))?")


@dataclass(frozen=True)
class PhiTableau:
    """An exponential Runge-Kutta method, given as text.

    `1/2: | 1: 2 p1 | 1: 4 p2 - 8 p3, 4 p3 - p2` has stages at 1/2 and 1, and the weights last. A row is the place c and
    after it the coefficients of `D_1, D_2, ...`, separated by commas; that of `D_0` is not listed, since each row sums
    to `c phi_1(-c h)`. `p2` is `phi_2(-h)`, and `p2(1/2)` is `phi_2(-h / 2)`.

    Attributes:
        name: name of the method.
        order: order of the method; checked.
        rows: the rows, separated by `|`, from the second stage on.

    Raises:
        ValueError: text that is no tableau, rows of the wrong length, or a tableau that does not have the stated order.
    """

    name: str
    order: int
    rows: str

    def __post_init__(self) -> None:
        if [len(row) for _, row in self.stages] != list(range(len(self.stages))) or self.stages[-1][0] != 1:
            raise ValueError(
                f"{self.name}: the rows must have lengths 0 to {len(self.stages) - 1}, without D_0, and the last c be 1"
            )
        for nodes in range(1, self.order + 1):
            length = self.order - nodes + 1
            for tree in sorted({leaves for bare in trees(nodes) for leaves in _coloured(bare)}, key=repr):
                got, wanted = self._weights(tree, length)[-1], _exact(tree, length)
                if max(map(abs, map(operator.sub, got, wanted))) > EXACT:
                    raise ValueError(
                        f"{self.name} does not have order {self.order}: the series of the tree {tree} in z is "
                        f"{_text(got)} and must be {_text(wanted)}; check the rows, or state a lower order"
                    )

    @functools.cached_property
    def stages(self) -> tuple[tuple[Fraction, tuple[tuple[Term, ...], ...]], ...]:
        """The rows `(c, (a_1, a_2, ...))`, read from the text."""
        stages = []
        for row in self.rows.split("|"):
            c, _, coefficients = row.partition(":")
            listed = coefficients.split(",") if coefficients.strip() else []
            stages.append((Fraction(c.strip()), tuple(map(_terms, listed))))
        return tuple(stages)

    def at(self, p: Phi) -> tuple[Row, ...]:
        """Return the rows of a step with `p(j, c) = phi_j(-c h)`, the weights last."""
        return tuple(
            (float(c), tuple(sum(float(w) * p(j, float(place)) for w, j, place in terms) for terms in row))
            for c, row in self.stages
        )

    def _weights(self, tree: Tree, length: int) -> list[Series]:
        """Return the series of a tree for each stage after the first, and last for the step."""
        if tree == TIME:
            return [_phi_series(0, 0.0, length, float(c)) for c, _ in self.stages]
        if not tree:
            return [_phi_series(1, float(c), length, float(c)) for c, _ in self.stages]
        products = [
            _product(weights, length) for weights in zip(*(self._weights(u, length) for u in tree), strict=True)
        ]
        return [
            _sum([_product([_of_terms(a, length), products[k]], length) for k, a in enumerate(row)], length)
            for _, row in self.stages
        ]


def _terms(text: str) -> tuple[Term, ...]:
    """Read a sum of terms, or `0`."""
    found = _TERM.findall(text)
    if _TERM.sub("", text).strip() != ("" if found else "0"):
        raise ValueError(f"a coefficient must be a sum such as '2 p2(1/2) - 1/4 p3', got {text.strip()!r}")
    return tuple((Fraction(f"{sign}{w or 1}"), int(j), Fraction(c or 1)) for sign, w, j, c in found)


def _coloured(tree: Tree) -> list[Tree]:
    """Return the tree with each of its leaves as a change of x or of t; the root is neither."""
    children = [[subtree, TIME] if not subtree else _coloured(subtree) for subtree in tree]
    return [tuple(sorted(picked, key=repr)) for picked in itertools.product(*children)]


def _exact(tree: Tree, length: int) -> Series:
    """Return `e_k` of `E_s = sum_k e_k s^(n + k) z^k` for a tree of n nodes, which is the series of `E_1`."""
    if tree == TIME:
        return _phi_series(0, 0.0, length)
    product, power = _product([_exact(subtree, length) for subtree in tree], length), _nodes(tree) - 1
    return [
        sum(product[k] * math.factorial(power + k) / math.factorial(power + i + 1) for k in range(i + 1))
        for i in range(length)
    ]


def _nodes(tree: Tree) -> int:
    return 1 if tree == TIME else 1 + sum(map(_nodes, tree))


def _phi_series(j: int, c: float, length: int, weight: float = 1.0) -> Series:
    """Return the series of `weight phi_j(c z)`; that of `phi_0(0)` is 1."""
    return [weight * c**k / math.factorial(k + j) for k in range(length)]


def _of_terms(terms: Sequence[Term], length: int) -> Series:
    return _sum([_phi_series(j, float(c), length, float(w)) for w, j, c in terms], length)


def _product(series: Sequence[Series], length: int) -> Series:
    """Return the product of power series, cut off; 1 for none."""
    one = _phi_series(0, 0.0, length)
    return functools.reduce(
        lambda a, b: [sum(a[k] * b[i - k] for k in range(i + 1)) for i in range(length)], series, one
    )


def _sum(series: Sequence[Series], length: int) -> Series:
    return [sum(column) for column in zip([0.0] * length, *series, strict=True)]


def _text(series: Series) -> str:
    return "(" + ", ".join(str(Fraction(value).limit_denominator(100_000)) for value in series) + ")"
