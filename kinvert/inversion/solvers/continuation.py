r"""Roots past folds: follow a curve of solutions from a trivial equation to the given one.

Guidance and learned denoisers fold the step `F`: F' becomes singular, Newton's method and every fixed-point iteration
stall there, and the solution that is near the image ends. Another one exists. Where the network's output is bounded
(a last normalisation sees to that), `D(x) = c x + bounded` with 0 <= c <= 1, guided or not, and Euler's step is
`F(u) = a u + bounded` with a = r + (1 - r) c > 0; so are other one-step samplers wherever their own a is positive. Such
a map is onto: it is homotopic to `a u` through maps of the same kind, and its degree is 1. The homotopy finds a
solution: with

    H(u, t) = (1 - t) (u - u0) + t (F(u) - y)

the curve `H = 0` through (u0, 0) is smooth for almost every u0, stays bounded, meets t = 0 nowhere else, and therefore
ends in a solution of `F(u) = y` at t = 1. On its way t goes up and down: in (u, t) a fold is a bend like any other.

Source: Chow, Mallet-Paret and Yorke, Finding Zeroes of Maps: Homotopy Methods That Are Constructive with Probability
One (1978); Allgower and Georg, Numerical Continuation Methods (1990).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from kinvert.checks import check_count_field
from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.solvers.base import Solver
from kinvert.inversion.solvers.newton import NewtonKrylov, Operator, gmres
from kinvert.tensors import rms

__all__ = ["Continuation", "Curve", "chord"]


@dataclass(frozen=True)
class Continuation(Solver):
    """Pseudo-arclength continuation of `(1 - t) (u - start) + t (F(u) - y) = 0` from t = 0 to 1, then Newton's method.

    From a point of the curve a step of some length along the tangent is corrected by Newton's method in the plane
    normal to the tangent, to `accuracy` (u in units of the start's rms or y's, as every length here). The length is
    halved where that fails or the curve bends too much, and grows by half where it is easy. A sample whose curve has
    not ended after `max_points` steps is left at the iterate with the least residual.
    """

    krylov: int = 40
    forcing: float = 0.05
    accuracy: float = 1e-4
    length: float = 0.1
    longest: float = 0.5
    max_points: int = 300
    newton: NewtonKrylov = field(default_factory=lambda: NewtonKrylov(krylov=60, max_iterations=20))

    def __post_init__(self) -> None:
        check_count_field(self, "krylov")
        check_count_field(self, "max_points")

    def finer(self) -> Continuation:
        """Return the same solver, closer to the curve."""
        return replace(self, accuracy=self.accuracy / 10)

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        search = Search(problem, guess.u)
        curve, everyone = Curve(self, search, guess.u), search.everyone
        here = torch.cat([curve.start / curve.scale, torch.zeros_like(curve.scale)], 1)
        curve.value(here, everyone)  # the start is the best iterate so far
        active = everyone[search.affords(everyone) >= 3]  # what a tangent costs at least
        tangent = torch.zeros_like(here)
        tangent[:, -1] = 1.0
        tangent[active] = curve.tangent(here[active], tangent[active], active)
        length = torch.full_like(curve.scale, self.length)
        for _ in range(self.max_points):
            active = search.open(active)
            active = active[(length[active, 0] > 1e-6 * self.length) & (search.affords(active) >= 2)]
            if not len(active):
                break
            last, border = here[active], tangent[active]
            ahead, good = curve.advance(last, border, length, active)
            arrived = good & (ahead[:, -1] >= 1)
            curve.finish(last[arrived], ahead[arrived], active[arrived])
            going = good & ~arrived & (search.affords(active) >= 3)
            here[active[going]] = ahead[going]
            tangent[active[going]] = curve.tangent(ahead[going], chord(last, ahead)[going], active[going])
            active = active[going | ~good]
        return search.root(least=3)  # a point and the next tangent


class Curve:
    """The curve H(z) = 0 of every sample, z = (u / scale, t) of shape (n, m + 1), so that a unit of u has rms 1."""

    def __init__(self, settings: Continuation, search: Search, start: Tensor) -> None:
        self.settings, self.search, self.shape = settings, search, start.shape[1:]
        self.start = start.reshape(len(start), -1)
        size = rms(start).maximum(search.size)
        self.scale = size[:, None] * math.sqrt(self.start.shape[1])

    def point(self, z: Tensor, index: Tensor) -> Tensor:
        """Return u of shape (n, *event)."""
        return (z[:, :-1] * self.scale[index]).reshape(-1, *self.shape)

    def value(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H and dH/dt in units of the scale, and y - F(u)."""
        u, t = self.point(z, index), z[:, -1:]
        residual = self.search.evaluate(u, index)
        self.search.keep(index, u, rms(residual).nan_to_num(math.inf, math.inf))
        moved, f = u.flatten(1) - self.start[index], -residual.flatten(1)
        return ((1 - t) * moved + t * f) / self.scale[index], (f - moved) / self.scale[index], residual

    def bordered(self, z: Tensor, slope: Tensor, f: Tensor, border: Tensor, index: Tensor) -> Operator:
        """Return `(v, s) -> (H_u v + H_t s, border . (v, s))`, regular at folds too; slope is H_t, f is y - F."""

        def apply(v: Tensor, todo: Tensor) -> Tensor:
            part, t = index[todo], z[todo, -1:]
            direction = v[:, :-1].reshape(-1, *self.shape)
            along = self.search.differentiate(self.point(z[todo], part), f[todo], direction, part).flatten(1)
            rows = (1 - t) * v[:, :-1] + t * along + slope[todo] * v[:, -1:]
            return torch.cat([rows, (border[todo] * v).sum(1, keepdim=True)], 1)

        return apply

    def tangent(self, z: Tensor, border: Tensor, index: Tensor) -> Tensor:
        """Return the unit tangent, which is near `border`: `(H_u, H_t; border) tangent ~ (0; 1)`."""
        if not len(index):
            return z
        _, slope, f = self.value(z, index)
        apply = self.bordered(z, slope, f, border, index)
        left = -apply(border, torch.arange(len(index), device=index.device))
        left[:, -1] += 1
        affords = partial(self.search.affords, index)
        tangent = border + gmres(apply, left, self.settings.krylov, 2 * self.settings.forcing, affords)[0]
        return tangent / tangent.norm(dim=1, keepdim=True)

    def correct(self, z: Tensor, border: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Go onto the curve by Newton's method, normal to `border`; return z and the iterations, -1 if it failed."""
        z = z.clone()
        count = torch.full_like(index, -1)
        before = torch.full_like(z[:, 0], math.inf)
        todo = torch.arange(len(index), device=index.device)
        for iteration in range(6):
            todo = todo[self.search.affords(index[todo]) >= 2]
            if not len(todo):
                break
            h, slope, f = self.value(z[todo], index[todo])
            size = h.norm(dim=1)
            there = size <= self.settings.accuracy
            count[todo[there]] = iteration
            on = ~there & (size < 0.7 * before[todo])
            before[todo] = size
            todo, h, slope, f = todo[on], h[on], slope[on], f[on]
            if not len(todo):
                break
            apply = self.bordered(z[todo], slope, f, border[todo], index[todo])
            left = torch.cat([-h, torch.zeros_like(h[:, :1])], 1)
            affords = partial(self.search.affords, index[todo])
            z[todo] += gmres(apply, left, self.settings.krylov, self.settings.forcing, affords)[0]
        return z, count

    def advance(self, last: Tensor, border: Tensor, length: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next points and which of them are good; `length`, of all samples, is adapted in place."""
        ahead, corrections = self.correct(last + length[index] * border, border, index)
        good = (corrections >= 0) & ((chord(last, ahead) * border).sum(1) > 0.7)
        length[index[~good]] /= 2
        easy = index[good & (corrections <= 3)]
        length[easy] = (1.5 * length[easy]).clamp(max=self.settings.longest)
        return ahead, good

    def finish(self, before: Tensor, after: Tensor, index: Tensor) -> None:
        """Solve F itself by Newton's method, from where the chord between two points of the curve meets t = 1."""
        able = self.search.affords(index) >= 1
        before, after, index = before[able], after[able], index[able]
        if not len(index):
            return
        crossing = torch.lerp(before, after, (1 - before[:, -1:]) / (after[:, -1:] - before[:, -1:]))
        part = self.search.problem.take(index, self.search.evaluations)
        found = self.settings.newton.solve(part, Guess(self.point(crossing, index)))
        self.search.evaluations[index] += found.evaluations
        self.search.keep(index, found.u, found.residual)


def chord(last: Tensor, ahead: Tensor) -> Tensor:
    """Return the direction from one point of each curve to the next."""
    change = ahead - last
    return change / change.norm(dim=1, keepdim=True)
