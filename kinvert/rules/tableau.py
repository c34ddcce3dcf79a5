r"""Explicit Runge-Kutta methods in sigma for the probability-flow ODE, each given by its Butcher tableau.

With `h = sigma_next - sigma`, stage k is at noise level `sigma + c_k h`:
`x_k = x + h sum_{l<k} a_kl d_l`, `d_k = (x_k - D(x_k, sigma_k)) / sigma_k`, and `x' = x + h sum_k b_k d_k`.

A tableau checks itself: it has order p if and only if `sum_i b_i Phi_i(t) = 1 / gamma(t)` for every rooted tree t with
up to p nodes (Butcher). A tree is the tuple of its subtrees; `Phi_i(t) = prod_{u in t} sum_j a_ij Phi_j(u)` and
`gamma(t) = |t| prod_{u in t} gamma(u)`.

A method is *effectively symmetric* to order m if a step and the step back, `Phi_{-h}(Phi_h(x))`, give x up to
`O(h^{m+1})`. The two are one tableau with twice the stages, whose sums must be 0 for every tree with up to m nodes. Up
and down with the sampler then misses by `h^m`, while the order p says how far each run is from the ODE.

Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I (1993), chapter II; effective symmetry:
Shmelev, Ebrahimi-Fard, Tapia and Salvi, Explicit and Effectively Symmetric Runge-Kutta Methods (2025), arXiv
2507.21006.
"""

from __future__ import annotations

import functools
import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, slope, weighted_sum

__all__ = ["LawsonRungeKutta", "RungeKutta", "Tableau", "Tree", "trees"]

Number = TypeVar("Number", Fraction, float)
Tree = tuple[Any, ...]
"""A rooted tree: the tuple of its subtrees."""
ROUNDING = Fraction(1, 10**14)
"""How far a sum may be off: coefficients that are not rational are doubles."""


@functools.cache
def trees(nodes: int) -> set[Tree]:
    """Return all rooted trees with so many nodes, by adding a leaf at each node of the smaller trees."""
    return {()} if nodes == 1 else {bigger for tree in trees(nodes - 1) for bigger in _with_a_leaf(tree)}


def _with_a_leaf(tree: Tree) -> set[Tree]:
    """Return the trees that have one leaf more than `tree`."""
    at_root: set[Tree] = {tuple(sorted((*tree, ())))}
    return at_root | {
        tuple(sorted((*tree[:i], bigger, *tree[i + 1 :])))
        for i, subtree in enumerate(tree)
        for bigger in _with_a_leaf(subtree)
    }


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _gamma(tree: Tree) -> int:
    return _size(tree) * math.prod(map(_gamma, tree))


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau in fractions; `parse` reads one from text.

    Attributes:
        name: name of the method.
        order: order of the method; checked.
        a: the rows below the diagonal, one for each stage, of lengths 0, 1, 2, ... A coefficient that is not rational
            is the fraction of a double, `Fraction(math.sqrt(2))`.
        b: the weights of the stages.
        symmetry: order to which the method is effectively symmetric; checked. 0 states nothing.

    Raises:
        ValueError: rows of the wrong length, or a tableau that does not have the stated order or symmetry.
    """

    name: str
    order: int
    a: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]
    symmetry: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        if [len(row) for row in self.a] != list(range(len(self.b))):
            raise ValueError(f"{self.name}: the rows of a must have lengths 0 to {len(self.b) - 1}, one for each b")
        for tree in (tree for nodes in range(1, self.order + 1) for tree in trees(nodes)):
            got, wanted = _dot(self.b, _phi(self.a, tree)), Fraction(1, _gamma(tree))
            if abs(got - wanted) > ROUNDING:
                raise ValueError(
                    f"{self.name} does not have order {self.order}: sum_i b_i Phi_i is {got} and must be {wanted} for "
                    f"the tree {tree}; check a and b, or state a lower order"
                )
        a, b = self._there_and_back()
        for tree in (tree for nodes in range(1, self.symmetry + 1) for tree in trees(nodes)):
            if abs(left := _dot(b, _phi(a, tree))) > ROUNDING:
                raise ValueError(
                    f"{self.name} is not effectively symmetric to order {self.symmetry}: for a step and the step back "
                    f"sum_i b_i Phi_i is {left:.3g} and must be 0 for the tree {tree}; state a lower symmetry"
                )

    @classmethod
    def parse(cls, name: str, order: int, a: str, b: str, symmetry: int = 0) -> Tableau:
        """Read a tableau from text: numbers separated by spaces, rows of `a` (from the second stage on) by `|`."""
        rows = ((), *(tuple(map(Fraction, row.split())) for row in a.split("|") if row.strip()))
        return cls(name, order, rows, tuple(map(Fraction, b.split())), symmetry)

    @functools.cached_property
    def c(self) -> tuple[Fraction, ...]:
        """The nodes, `c_k = sum_l a_kl`."""
        return tuple(sum(row, Fraction(0)) for row in self.a)

    @functools.cached_property
    def stages(self) -> tuple[tuple[float, tuple[float, ...]], ...]:
        """The rows `(c_k, (a_k1, ...))` of the stages after the first, and last `(1, b)`, as floats."""
        rows = zip((*self.c[1:], 1), (*self.a[1:], self.b), strict=True)
        return tuple((float(c), tuple(map(float, row))) for c, row in rows)

    def _there_and_back(self) -> tuple[list[list[float]], list[float]]:
        """Return the tableau of a step and the step back, as floats."""
        rows, b = [list(map(float, row)) for row in self.a], list(map(float, self.b))
        return [*rows, *([*b, *(-a for a in row)] for row in rows)], [*b, *(-w for w in b)]


def _phi(a: Sequence[Sequence[Number]], tree: Tree) -> list[Number]:
    """Return `Phi_i(tree)` for every stage of the tableau."""
    subtrees = [_phi(a, subtree) for subtree in tree]
    return [math.prod((_dot(row, phi) for phi in subtrees), start=1) for row in a]  # type: ignore[misc]


def _dot(weights: Sequence[Number], values: Sequence[Number]) -> Number:
    return sum(w * value for w, value in zip(weights, values, strict=False))  # type: ignore[return-value]


@dataclass(frozen=True)
class _OfTableau(Rule, ABC):
    """What the methods of a Butcher tableau share: its name and its order."""

    tableau: Tableau

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, Tableau):
            own = type(self).__name__
            raise TypeError(f"{own}: tableau must be a Tableau, e.g. from Tableau.parse, got {self.tableau!r}")

    @property
    def ode_order(self) -> int:
        """The order of the tableau."""
        return self.tableau.order


@dataclass(frozen=True)
class RungeKutta(_OfTableau):
    r"""An explicit Runge-Kutta method in sigma: `x_k = x + h sum_l a_kl d_l`, `x' = x + h sum_k b_k d_k`.

    `h = sigma_next - sigma`, `d_k = (x_k - D(x_k, sigma_k)) / sigma_k` at `sigma_k = sigma + c_k h`. It has the order
    of its tableau, and each stage is one evaluation a step. A step to sigma = 0, where the slope is undefined, is an
    Euler step. A tableau of your own runs as `RungeKutta(Tableau.parse(name, order, a, b))`. With
    `Tableau.parse("heun", 2, "1", "1/2 1/2")` it is `heun`.

    `ees_25` and `ees_27` are explicit and effectively symmetric: of order 2 as samplers, but up and down they miss by
    `h^5` and `h^7`, where `rk4` and `dormand_prince` miss by `h^5` and the others by `h^3`.

    Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I (1993), chapter II; Shmelev,
    Ebrahimi-Fard, Tapia and Salvi, Explicit and Effectively Symmetric Runge-Kutta Methods (2025), arXiv 2507.21006.
    """

    @property
    def name(self) -> str:
        """The name of the tableau."""
        return self.named or self.tableau.name

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return denoised
        slopes = [slope(s.x, denoised, s.sigma)]
        width = s.sigma_next - s.sigma
        *stages, (_, b) = self.tableau.stages
        for c, row in stages:
            sigma = (1.0 - c) * s.sigma + c * s.sigma_next
            x = weighted_sum(s.x, [a * width for a in row], slopes)
            slopes.append(slope(x, s.denoise(x, sigma), sigma))
        return weighted_sum(s.x, [a * width for a in b], slopes)


@dataclass(frozen=True)
class LawsonRungeKutta(_OfTableau):
    r"""An explicit Runge-Kutta method for `y = x / sigma` in `g = 1 / sigma`, where the ODE is `dy/dg = D`.

    `y_k = y + h sum_l a_kl D_l` at `g_k = g + c_k h`, `h = 1 / sigma_next - 1 / sigma`, and `y' = y + h sum_k b_k D_k`.
    The factor is that of Lawson, `e^lambda` with `lambda = -log sigma`; the stages are spaced in the factor itself, so
    that a D that is m everywhere keeps x = m. With the tableau of Euler's method it is `euler`. Its order is that of
    the tableau; a step to sigma = 0 returns D.

    Source: Lawson, Generalized Runge-Kutta Processes for Stable Systems with Large Lipschitz Constants (1967), SIAM J.
    Numer. Anal. 4; Blasingame and Liu, Rex: A Family of Reversible Exponential (Stochastic) Runge-Kutta Solvers (2025),
    arXiv 2502.08834, for the form in 1 / sigma.
    """

    @property
    def name(self) -> str:
        """The name of the tableau, with an ending."""
        return self.named or f"{self.tableau.name}_x0"

    def step(self, s: StepBuilder) -> Form:
        denoised = [s.denoise(s.x, s.sigma)]
        if s.sigma_next == 0:
            return denoised[0]
        width = 1.0 / s.sigma_next - 1.0 / s.sigma
        *stages, (_, b) = self.tableau.stages
        for c, row in stages:
            sigma = 1.0 / ((1.0 - c) / s.sigma + c / s.sigma_next)
            x = weighted_sum(sigma / s.sigma * s.x, [sigma * width * a for a in row], denoised)
            denoised.append(s.denoise(x, sigma))
        return weighted_sum(s.sigma_next / s.sigma * s.x, [s.sigma_next * width * a for a in b], denoised)
