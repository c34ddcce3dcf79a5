r"""Root finders for `F(u) = y`, one equation a sample, in one batch.

Every sample has its own equation, its own tolerance and its own end: a sample that is solved costs no further
evaluations, and no sample's result depends on its neighbours. With the residual `f(u) = y - F(u)`:

* `Picard`: `u <- u + f(u)`, the fixed-point iteration of the published inversions. It converges where
  `|I - F'| < 1`;
* `Damped`: `u <- u + tau f(u)` with tau halved whenever the residual grows. For the Euler step of an exact denoiser F
  is the gradient of a strongly convex function, and it converges for `0 < tau < 2 / lmax(F')`;
* `Anderson`: the same iteration, extrapolated over the last `window` steps so that the combined residual is least;
* `NewtonKrylov`: `u <- u + alpha d` with `F'(u) d = f(u)` solved by GMRES on directional derivatives, which are finite
  differences, and alpha halved until the residual falls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.denoisers import Denoiser
from kinvert.plan import Plan
from kinvert.tensors import per_sample, rms, wide_dtype

Select = Callable[[Tensor], Denoiser]
"""The denoiser of some samples of the batch: `select(index)` with index of shape (n,)."""


class Equation:
    """`F(u) = y` for a batch, which counts the evaluations of every sample.

    Attributes:
        function: `(u, index) -> F(u)` for the samples `index`, u of shape (len(index), *event).
        value: y, shape (batch, *event).
        tolerance: rms of the residual below which a sample is solved, shape (batch,).
        budget: evaluations that a sample may spend; it ends where they are used up.
        cost: evaluations of one call of `function` (and of one directional derivative).
        eps: relative precision of `function`, which finite differences are made for; y's dtype's unless it is set.
        evaluations: counted per sample, shape (batch,).
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        value: Tensor,
        tolerance: Tensor,
        budget: Tensor,
        cost: int = 1,
    ) -> None:
        self.function, self.value, self.tolerance, self.budget = function, value, tolerance, budget
        self.cost = cost
        self.eps = torch.finfo(value.dtype).eps
        self.size = rms(value).maximum(tolerance)  # never 0
        self.evaluations = torch.zeros(len(value), dtype=torch.int64, device=value.device)

    def part(self, index: Tensor, function: Callable[[Tensor, Tensor], Tensor] | None = None) -> Equation:
        """The equations of the samples `index` alone, or another function for them, with what is left of the budget."""
        whole = function or self.function
        left = self.budget[index] - self.evaluations[index]
        part = Equation(
            lambda u, inner: whole(u, index[inner]), self.value[index], self.tolerance[index], left, self.cost
        )
        part.eps = self.eps
        return part

    def open(self, index: Tensor, residual: Tensor) -> Tensor:
        """Those of `index` that are neither solved nor out of budget; residual of all samples."""
        return index[self.open_rows(index, residual[index])]

    def open_rows(self, index: Tensor, residual: Tensor) -> Tensor:
        """Their places in `index`, whose residuals are given: the one thing that the host must read to go on."""
        return self.is_open(index, residual).nonzero()[:, 0]

    def is_open(self, index: Tensor, residual: Tensor) -> Tensor:
        """Which of `index`, whose residuals are given."""
        return (residual > self.tolerance[index]) & (self.affords(index) >= 1)

    def affords(self, index: Tensor) -> Tensor:
        """How often the function may still be called for the samples `index`."""
        return (self.budget[index] - self.evaluations[index]).div(self.cost, rounding_mode="floor")

    def residual(self, u: Tensor, index: Tensor) -> Tensor:
        """`f(u) = y - F(u)` of the samples `index`."""
        self.evaluations[index] += self.cost
        return self.value[index] - self.function(u, index)

    def derivative(self, u: Tensor, f: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """`F'(u) v` by a finite difference, given `f = f(u)`: one evaluation, and the denoiser stays a black box."""
        length = rms(v)
        size = rms(u).maximum(self.size[index]) * self.eps**0.5 / torch.where(length > 0, length, 1.0)
        size = per_sample(size, u)
        return (f - self.residual(u + size * v, index)) / size


@dataclass(eq=False)
class Root:
    """The best iterate of every sample and its residual rms, shapes (batch, *event) and (batch,)."""

    u: Tensor
    residual: Tensor

    def keep(self, index: Tensor, u: Tensor, residual: Tensor) -> Tensor:
        """Take over what is better; returns which of `index` improved."""
        best = self.residual[index]
        better = residual < best
        self.put(index, torch.where(per_sample(better, u), u, self.u[index]), torch.where(better, residual, best))
        return better

    def put(self, index: Tensor, u: Tensor, residual: Tensor) -> None:
        """Replace those of `index`."""
        self.u[index], self.residual[index] = u, residual


class StepEquation(Equation):
    """One step of a sampler, from sigma to r sigma: `r u + (1 - r) mean(D) = y`, whose parts are known.

    Attributes:
        plan: of that step alone.
        select: the denoiser of some samples.
        forecast: what its evaluations are expected to return, shape (batch, evaluations, *event); without one they
            start where the step from `start` has them.
        said: what the first of them, which is that of u, returned at the best iterate; None if the solver cannot tell.
    """

    def __init__(
        self,
        plan: Plan,
        select: Select,
        function: Callable[[Tensor, Tensor], Tensor],
        value: Tensor,
        tolerance: Tensor,
        budget: Tensor,
    ) -> None:
        super().__init__(function, value, tolerance, budget, plan.evaluations)
        self.plan, self.select, self.r = plan, select, plan.sigmas[1] / plan.sigmas[0]
        self.forecast: Tensor | None = None
        self.said: Tensor | None = None

    def mean(self, u: Tensor) -> Tensor:
        """The mean of what the evaluations return, if u is the solution."""
        return (self.value - self.r * u) / (1.0 - self.r)


class Solver(ABC):
    """A root finder: frozen settings and one method."""

    @abstractmethod
    def solve(self, equation: Equation, start: Tensor) -> Root:
        """The best iterates from `start`, shape (batch, *event); solved where `residual <= equation.tolerance`."""


@dataclass(frozen=True)
class Anderson(Solver):
    r"""Anderson acceleration of `u <- u + tau f(u)`; `window=0` is the plain damped iteration.

    With the differences dU, dF of the last iterates and residuals, `gamma` minimises `|f - dF gamma|` and
    `u' = u + tau f - (dU + tau dF) gamma`. When a residual exceeds `growth` times the best, the sample goes back to its
    best iterate, forgets its history and halves its tau.

    The host reads one thing of the device, which samples are still open, every `check_every` iterations; those that are
    not leave the batch. A sample takes `2 window + 6` tensors of x's size.

    Of all iterates the best whose residual is known is returned; with `last` the one that the last evaluation led to,
    as publications do, along with the residual of the one before, since its own would take another evaluation.

    Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Walker and Ni (2011).
    """

    window: int = 6
    tau: float = 1.0
    max_iterations: int = 60
    growth: float = 4.0
    check_every: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        check_count_field(self, "window", 0)
        check_count_field(self, "max_iterations")
        check_count_field(self, "check_every")

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        root = Root(start.clone(), start.new_full((len(start),), math.inf))
        rows, index = _Rows.of(start, self), torch.arange(len(start), device=start.device)
        for k in range(1, self.max_iterations + 1):
            f = equation.residual(rows.u.reshape(-1, *start.shape[1:]), index).flatten(1)
            self._iterate(rows, f)
            if k % self.check_every and k < self.max_iterations:
                continue
            u, size = (rows.u, rms(f).nan_to_num(math.inf, math.inf)) if self.last else (rows.best, rows.least)
            root.put(index, u.reshape(-1, *start.shape[1:]), size)
            going = equation.open_rows(index, size)
            if not len(going):
                break
            if len(going) < len(index):
                rows, index = rows.take(going), index[going]
        return root

    def _iterate(self, rows: _Rows, f: Tensor) -> None:
        """From the residual at the last iterate to the next one, for all rows alike."""
        size, u = rms(f).nan_to_num(math.inf, math.inf), rows.u
        better = (size < rows.least)[:, None]
        rows.best = torch.where(better, u, rows.best)
        rows.least = size.minimum(rows.least)
        failed = (size > self.growth * rows.least)[:, None]
        step = rows.tau * f
        if self.window:
            pair = rows.fresh & ~failed
            for name, difference in (("dU", u - rows.last_u), ("dF", f - rows.last_f)):
                new, old = torch.where(pair, difference, 0.0)[:, None], getattr(rows, name)[:, :-1]
                setattr(rows, name, torch.where(failed[:, None], 0.0, torch.cat([new, old], 1)))
            rows.last_u, rows.last_f, rows.fresh = u, f, ~failed
            step = step - self._extrapolate(rows.dU, rows.dF, f, rows.tau)
        rows.u = torch.where(failed, rows.best, u + step)
        rows.tau = torch.where(failed, rows.tau / 2, rows.tau)

    @staticmethod
    def _extrapolate(dU: Tensor, dF: Tensor, f: Tensor, tau: Tensor) -> Tensor:
        """`(dU + tau dF) gamma` with gamma the regularised least-squares solution; zero rows are unused slots."""
        dtype = f.dtype
        dU, dF, f, tau = (a.to(wide_dtype(dtype)) for a in (dU, dF, f, tau))
        scale = dF.norm(dim=2).clamp(min=torch.finfo(f.dtype).tiny)
        unit = dF / scale[:, :, None]
        gram, ridge = linalg.gram(unit, unit), 10 * torch.finfo(f.dtype).eps
        gamma = linalg.solve(linalg.ridged(gram, ridge), linalg.gram(unit, f[:, None]))[:, :, 0].to(f.dtype) / scale
        gamma = torch.where(dF.abs().amax(2) > 0, gamma, 0.0)
        return linalg.combine(gamma[:, None], dU + tau[:, :, None] * dF)[:, 0].to(dtype)


@dataclass(eq=False)
class _Rows:
    """The open samples of Anderson's method, one a row.

    Attributes:
        u, last_u, last_f: this iterate, the last one and its residual, shape (n, m).
        best, least: the best iterate and the rms of its residual, shapes (n, m) and (n,).
        dU, dF: differences of the last iterates and residuals, newest first, shape (n, window, m).
        tau, fresh: the damping; whether the last residual may be used for a difference. Shape (n, 1).
    """

    u: Tensor
    last_u: Tensor
    last_f: Tensor
    best: Tensor
    least: Tensor
    dU: Tensor  # noqa: N815 - as in the docstring of Anderson
    dF: Tensor  # noqa: N815
    tau: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, start: Tensor, solver: Anderson) -> _Rows:
        u = start.flatten(1)
        n, m = u.shape
        dU, dF = u.new_zeros(2, n, solver.window, m)
        tau, fresh = u.new_full((n, 1), solver.tau), torch.zeros(n, 1, dtype=torch.bool, device=u.device)
        return cls(u, torch.zeros_like(u), torch.zeros_like(u), u, u.new_full((n,), math.inf), dU, dF, tau, fresh)

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))


def Picard(max_iterations: int = 60, last: bool = False) -> Anderson:  # noqa: N802 - a solver by its published name
    """The published fixed-point iteration `u <- u + f(u)`, without damping and without a way back.

    It returns its best iterate, and with `last` the one after the last evaluation, as published.

    Source: Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion Inversion (2023), arXiv
    2309.04907; Garibi et al., ReNoise (2024), arXiv 2403.14602.
    """
    return Anderson(window=0, tau=1.0, max_iterations=max_iterations, growth=math.inf, last=last)


def Damped(tau: float = 1.0, max_iterations: int = 200, last: bool = False) -> Anderson:  # noqa: N802
    """The damped iteration `u <- u + tau f(u)`; tau is halved, and the best iterate returned to, when f grows.

    Source: Hong et al., On Exact Inversion of DPM-Solvers (2023), arXiv 2311.18387, with a fixed schedule of tau there.
    """
    return Anderson(window=0, tau=tau, max_iterations=max_iterations, growth=1.0, last=last)


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    r"""Newton's method with matrix-free GMRES and a backtracking line search, every sample on its own.

    A step solves `F'(u) d = f` to the relative accuracy `forcing` (or `krylov` directional derivatives), then takes
    `u + alpha d` with the first alpha of 1, 1/2, 1/4, ... for which the residual falls. A sample without such an alpha
    ends at its best iterate.

    With `least_change` the linear equations are solved for the least distance from y instead of from u: of several
    solutions, where F' is singular, one that is locally nearest to y. `u + d = y + e` with e the least-norm solution
    of `F'(u) e = f + F'(u) (u - y)`, which GMRES finds where F' is symmetric, as it is for an exact denoiser, and else
    nearly.

    Source: Knoll and Keyes, Jacobian-free Newton-Krylov Methods (2004).
    """

    krylov: int = 20
    forcing: float = 0.05
    max_iterations: int = 12
    halvings: int = 6
    least_change: bool = False

    def __post_init__(self) -> None:
        check_count_field(self, "krylov")
        check_count_field(self, "max_iterations")

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        batch, shape = len(start), start.shape[1:]
        index = torch.arange(batch, device=start.device)
        f = equation.residual(start, index)
        root = Root(start.clone(), rms(f).nan_to_num(math.inf, math.inf))
        residual = f.clone()

        def able(index: Tensor) -> Tensor:  # a product and the line search take a call each, the anchor one more
            least = 2 + self.least_change
            return index[
                (equation.is_open(index, root.residual[index]) & (equation.affords(index) >= least)).nonzero()[:, 0]
            ]

        active = able(index)
        for _ in range(self.max_iterations):
            if not len(active):
                break
            here = active

            def apply(v: Tensor, todo: Tensor, here: Tensor = here) -> Tensor:
                part = here[todo]
                return equation.derivative(root.u[part], residual[part], v.reshape(-1, *shape), part).flatten(1)

            moved, right = (root.u[active] - equation.value[active]).flatten(1), residual[active].flatten(1)
            anchored = self.least_change and bool(moved.any())
            if anchored:
                right = right + apply(moved, torch.arange(len(active), device=right.device))
            # One call is left for the line search.
            direction, _ = gmres(apply, right, self.krylov, self.forcing, equation.affords(active) - 1)
            direction = (direction - moved if anchored else direction).reshape(-1, *shape)
            moved = line_search(equation, root, residual, active, direction, self.halvings)
            active = able(active[moved])
        return root


Operator = Callable[[Tensor, Tensor], Tensor]
"""`(v, todo) -> A v` for the rows `todo` of a batch of linear equations, v of shape (len(todo), m)."""


def gmres(
    apply: Operator, b: Tensor, krylov: int, forcing: float, affords: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` with `A x = b` per row to the relative accuracy `forcing`, from 0, with at most `krylov` products a row.

    affords: as many products may be made for each row, shape (rows,); x is 0 where there are none.

    Returns:
        x, shape (rows, m), and the images under A of the orthonormal basis that was built, shape (rows, products, m). A
        row takes `2 krylov + 4` tensors of its size.

    Source: Saad and Schultz, GMRES: A Generalized Minimal Residual Algorithm for Nonsymmetric Linear Systems (1986).
    """
    dtype, (n, m) = b.dtype, b.shape
    b = b.to(wide_dtype(dtype))  # the small systems are not solved in half precision
    finfo = torch.finfo(b.dtype)
    size, x = b.norm(dim=1), torch.zeros_like(b)
    most = min(krylov, m)
    basis, images = b.new_zeros(n, most + 1, m), b.new_zeros(n, most, m)
    basis[:, 0] = b / size[:, None].clamp(min=finfo.tiny)
    affords = torch.full((n,), most, device=b.device) if affords is None else affords
    todo = (affords > 0).nonzero()[:, 0]  # a row that is good enough costs no further products
    image = images[:, :0]
    for j in range(most if len(todo) else 0):
        images[todo, j] = apply(basis[todo, j].to(dtype), todo).to(b.dtype)
        spanned, image = basis[:, : j + 1], images[:, : j + 1]
        # The projected problem is small: least squares on the images of the orthonormal basis.
        gram = linalg.gram(image, image)
        ridge = finfo.eps * gram.diagonal(dim1=1, dim2=2).amax(1)
        weights = linalg.solve(linalg.ridged(gram, ridge), linalg.gram(image, b[:, None])).mT
        x[todo] = linalg.combine(weights, spanned)[todo, 0]
        left = (b - linalg.combine(weights, image)[:, 0]).norm(dim=1)
        going = (left[todo] > forcing * size[todo]) & (affords[todo] > j + 1)
        todo = todo[going.nonzero()[:, 0]]  # the one read of a product
        if not len(todo):
            break
        new = images[:, j : j + 1]
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            new = new - linalg.combine(linalg.gram(new, spanned), spanned)
        basis[:, j + 1] = new[:, 0] / new[:, 0].norm(dim=1, keepdim=True).clamp(min=finfo.tiny)
    return x.to(dtype), image


def line_search(
    equation: Equation, root: Root, residual: Tensor, active: Tensor, direction: Tensor, halvings: int
) -> Tensor:
    """Move every sample along its direction as far as the residual falls; returns which of `active` moved."""
    origin, waiting = root.u[active], torch.arange(len(active), device=active.device)
    moved = torch.zeros(len(active), dtype=torch.bool, device=active.device)
    for halving in range(halvings + 1):
        trial = origin[waiting] + direction[waiting] * 0.5**halving
        f = equation.residual(trial, active[waiting])
        better = root.keep(active[waiting], trial, rms(f).nan_to_num(math.inf, math.inf))
        residual[active[waiting]] = torch.where(per_sample(better, f), f, residual[active[waiting]])
        moved[waiting] |= better
        waiting = waiting[(~better & (equation.affords(active[waiting]) >= 1)).nonzero()[:, 0]]
        if not len(waiting):
            break
    return moved
