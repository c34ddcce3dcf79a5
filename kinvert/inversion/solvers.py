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
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.inversion.result import rms


class Equation:
    """`F(u) = y` for a batch, which counts the evaluations of every sample.

    Attributes:
        function: `(u, index) -> F(u)` for the samples `index`, u of shape (len(index), *event).
        value: y, shape (batch, *event).
        tolerance: rms of the residual below which a sample is solved, shape (batch,).
        budget: evaluations that a sample may spend; it ends where they are used up.
        cost: evaluations of one call of `function` (and of one directional derivative).
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
        self.evaluations = torch.zeros(len(value), dtype=torch.int64, device=value.device)

    def part(self, index: Tensor, function: Callable[[Tensor, Tensor], Tensor] | None = None) -> Equation:
        """The equations of the samples `index` alone, or another function for them, with what is left of the budget."""
        whole = function or self.function
        left = self.budget[index] - self.evaluations[index]
        return Equation(
            lambda u, inner: whole(u, index[inner]), self.value[index], self.tolerance[index], left, self.cost
        )

    def open(self, index: Tensor, residual: Tensor) -> Tensor:
        """Those of `index` that are neither solved nor out of budget."""
        return index[(residual[index] > self.tolerance[index]) & (self.evaluations[index] < self.budget[index])]

    def residual(self, u: Tensor, index: Tensor) -> Tensor:
        """`f(u) = y - F(u)` of the samples `index`."""
        self.evaluations[index] += self.cost
        return self.value[index] - self.function(u, index)

    def derivative(self, u: Tensor, f: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """`F'(u) v` by a finite difference, given `f = f(u)`: one evaluation, and the denoiser stays a black box."""
        size = rms(u).clamp(min=1e-3) * torch.finfo(u.dtype).eps ** 0.5 / rms(v).clamp(min=torch.finfo(u.dtype).tiny)
        size = size.reshape(-1, *(1,) * (u.ndim - 1))
        return (f - self.residual(u + size * v, index)) / size


@dataclass(eq=False)
class Root:
    """The best iterate of every sample and its residual rms, shapes (batch, *event) and (batch,)."""

    u: Tensor
    residual: Tensor

    def keep(self, index: Tensor, u: Tensor, residual: Tensor) -> Tensor:
        """Take over what is better; returns which of `index` improved."""
        better = residual < self.residual[index]
        where = index[better]
        self.u[where] = u[better]
        self.residual[where] = residual[better]
        return better


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

    Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Walker and Ni (2011).
    """

    window: int = 6
    tau: float = 1.0
    max_iterations: int = 60
    growth: float = 4.0

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        batch, shape = len(start), start.shape[1:]
        u = start.reshape(batch, -1).clone()
        root = Root(start.clone(), torch.full((batch,), math.inf, dtype=u.dtype, device=u.device))
        tau = torch.full((batch, 1), self.tau, dtype=u.dtype, device=u.device)
        iterates, residuals = u.new_zeros(batch, self.window, u.shape[1]), u.new_zeros(batch, self.window, u.shape[1])
        filled = torch.zeros(batch, dtype=torch.int64, device=u.device)
        last_u, last_f = torch.zeros_like(u), torch.zeros_like(u)
        active = torch.arange(batch, device=u.device)
        for k in range(self.max_iterations):
            f = equation.residual(u[active].reshape(-1, *shape), active).reshape(len(active), -1)
            size = rms(f).nan_to_num(math.inf, math.inf)
            root.keep(active, u[active].reshape(-1, *shape), size)
            todo = torch.isin(active, equation.open(active, root.residual))
            active, f, size = active[todo], f[todo], size[todo]
            if not len(active):
                break
            failed = size > self.growth * root.residual[active]
            back = active[failed]
            u[back] = root.u.reshape(batch, -1)[back]
            tau[back] /= 2
            filled[back] = -1  # the next residual is the first of a new history
            good, f = active[~failed], f[~failed]
            if self.window:
                fresh = filled[good] >= 0
                if k:
                    grown = good[fresh]
                    slot = (filled[grown] % self.window)[:, None, None].expand(-1, 1, u.shape[1])
                    iterates[grown] = iterates[grown].scatter(1, slot, (u[grown] - last_u[grown])[:, None])
                    residuals[grown] = residuals[grown].scatter(1, slot, (f[fresh] - last_f[grown])[:, None])
                    filled[grown] += 1
                filled[good[~fresh]] = 0
                iterates[good[~fresh]] = 0
                residuals[good[~fresh]] = 0
            last_u[good], last_f[good] = u[good], f
            step = tau[good] * f
            if self.window and k:
                step = step - self._extrapolate(iterates[good], residuals[good], f, tau[good])
            u[good] = u[good] + step
        return root

    @staticmethod
    def _extrapolate(dU: Tensor, dF: Tensor, f: Tensor, tau: Tensor) -> Tensor:
        """`(dU + tau dF) gamma` with gamma the regularised least-squares solution; zero rows are unused slots."""
        dtype = f.dtype
        dU, dF, f, tau = (a.to(torch.promote_types(dtype, torch.float32)) for a in (dU, dF, f, tau))
        scale = dF.norm(dim=2).clamp(min=torch.finfo(f.dtype).tiny)
        unit = dF / scale[:, :, None]
        gram = unit @ unit.mT
        ridge = 10 * torch.finfo(f.dtype).eps * torch.eye(gram.shape[1], dtype=f.dtype, device=f.device)
        gamma = torch.linalg.solve(gram + ridge, (unit @ f[:, :, None]))[:, :, 0] / scale
        gamma = torch.where(dF.abs().amax(2) > 0, gamma, 0.0)
        return (gamma[:, None] @ (dU + tau[:, :, None] * dF))[:, 0].to(dtype)


def Picard(max_iterations: int = 60) -> Anderson:  # noqa: N802 - a solver by its published name
    """The published fixed-point iteration `u <- u + f(u)`, without damping and without a way back.

    Source: Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion Inversion (2023), arXiv
    2309.04907; Garibi et al., ReNoise (2024), arXiv 2403.14602.
    """
    return Anderson(window=0, tau=1.0, max_iterations=max_iterations, growth=math.inf)


def Damped(tau: float = 1.0, max_iterations: int = 200) -> Anderson:  # noqa: N802
    """The damped iteration `u <- u + tau f(u)`; tau is halved, and the best iterate returned to, when f grows.

    Source: Hong et al., On Exact Inversion of DPM-Solvers (2023), arXiv 2311.18387, with a fixed schedule of tau there.
    """
    return Anderson(window=0, tau=tau, max_iterations=max_iterations, growth=1.0)


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

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        batch, shape = len(start), start.shape[1:]
        index = torch.arange(batch, device=start.device)
        f = equation.residual(start, index)
        root = Root(start.clone(), rms(f).nan_to_num(math.inf, math.inf))
        residual = f.clone()
        active = index
        for _ in range(self.max_iterations):
            active = equation.open(active, root.residual)
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
            direction, _ = gmres(apply, right, self.krylov, self.forcing)
            direction = (direction - moved if anchored else direction).reshape(-1, *shape)
            active = line_search(equation, root, residual, active, direction, self.halvings)
        return root


Operator = Callable[[Tensor, Tensor], Tensor]
"""`(v, todo) -> A v` for the rows `todo` of a batch of linear equations, v of shape (len(todo), m)."""


def gmres(apply: Operator, b: Tensor, krylov: int, forcing: float) -> tuple[Tensor, Tensor]:
    """`x` with `A x = b` per row to the relative accuracy `forcing`, from 0, with at most `krylov` products a row.

    Returns:
        x, shape (rows, m), and the images under A of the orthonormal basis that was built, shape (rows, m, products).

    Source: Saad and Schultz, GMRES: A Generalized Minimal Residual Algorithm for Nonsymmetric Linear Systems (1986).
    """
    dtype = b.dtype
    b = b.to(torch.promote_types(dtype, torch.float32))  # the small systems are not solved in half precision
    size = b.norm(dim=1)
    basis = [b / size[:, None].clamp(min=torch.finfo(b.dtype).tiny)]
    images: list[Tensor] = []
    x = torch.zeros_like(b)
    todo = torch.arange(len(b), device=b.device)  # a row that is good enough costs no further products
    for _ in range(min(krylov, b.shape[1])):
        image = torch.zeros_like(b)
        image[todo] = apply(basis[-1][todo].to(dtype), todo).to(b.dtype)
        images.append(image)
        stacked = torch.stack(images, dim=2)
        # The projected problem is small: least squares on the images of the orthonormal basis.
        gram = stacked.mT @ stacked
        ridge = torch.finfo(b.dtype).eps * gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        eye = torch.eye(gram.shape[1], dtype=b.dtype, device=b.device)
        weights = torch.linalg.solve(gram + ridge * eye, stacked.mT @ b[:, :, None])
        x[todo] = (torch.stack(basis, dim=2) @ weights)[todo, :, 0]
        left = (b - (stacked @ weights)[:, :, 0]).norm(dim=1)
        todo = todo[left[todo] > forcing * size[todo]]
        if not len(todo):
            break
        new = image
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            for v in basis:
                new = new - (new * v).sum(1, keepdim=True) * v
        basis.append(new / new.norm(dim=1, keepdim=True).clamp(min=torch.finfo(b.dtype).tiny))
    return x.to(dtype), torch.stack(images, dim=2)


def line_search(
    equation: Equation, root: Root, residual: Tensor, active: Tensor, direction: Tensor, halvings: int
) -> Tensor:
    """Move every sample along its direction as far as the residual falls; returns those that moved."""
    origin, waiting = root.u[active], torch.arange(len(active), device=active.device)
    moved = torch.zeros(len(active), dtype=torch.bool, device=active.device)
    for halving in range(halvings + 1):
        trial = origin[waiting] + direction[waiting] * 0.5**halving
        f = equation.residual(trial, active[waiting])
        better = root.keep(active[waiting], trial, rms(f).nan_to_num(math.inf, math.inf))
        residual[active[waiting[better]]] = f[better]
        moved[waiting[better]] = True
        waiting = waiting[~better]
        if not len(waiting):
            break
    return active[moved]
