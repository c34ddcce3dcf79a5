r"""Fixed-point iterations on `F(u) = y`, plain, damped and accelerated.

With the residual `f(u) = y - F(u)`:

* `Picard`: `u <- u + f(u)`, the fixed-point iteration of the published inversions. It converges if `|I - F'| < 1`;
* `Damped`: `u <- u + tau f(u)` with tau halved whenever the residual grows. For the Euler step of an exact denoiser F
  is the gradient of a strongly convex function, and it converges for `0 < tau < 2 / lmax(F')`;
* `Anderson`: the same iteration, extrapolated over the last `window` steps so that the combined residual is least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.solvers.base import Solver
from kinvert.tensors import rms, wide_dtype

__all__ = ["Anderson", "Damped", "Picard", "extrapolated"]


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

    Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Walker and Ni,
    Anderson Acceleration for Fixed-Point Iterations (2011).
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

    @property
    def is_published(self) -> bool:
        """Tell whether it is `Picard`."""
        return self.window == 0 and math.isinf(self.growth)

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        start, search = guess.u, Search(problem, guess.u)
        rows, index = _Rows.of(start, self), search.everyone
        # A sample makes one call in every iteration: after so many its budget is spent.
        ends = set(search.affords(index).tolist()) if self.check_every > 1 else set[int]()
        for k in range(1, self.max_iterations + 1):
            f = search.evaluate(rows.u.reshape(-1, *start.shape[1:]), index).flatten(1)
            self._iterate(rows, f)
            if k % self.check_every and k < self.max_iterations and k not in ends:
                continue
            u, size = (rows.u, rms(f).nan_to_num(math.inf, math.inf)) if self.last else (rows.best, rows.least)
            search.put(index, u.reshape(-1, *start.shape[1:]), size)
            going = search.open_rows(index, size)
            if not len(going):
                break
            if len(going) < len(index):
                rows, index = rows.take(going), index[going]
        return search.root()

    def _iterate(self, rows: _Rows, f: Tensor) -> None:
        """Go from the residual at the last iterate to the next iterate, for all rows alike."""
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
            step = step - extrapolated(rows.dU, rows.dF, f, rows.tau)
        rows.u = torch.where(failed, rows.best, u + step)
        rows.tau = torch.where(failed, rows.tau / 2, rows.tau)


def extrapolated(dU: Tensor, dF: Tensor, f: Tensor, tau: Tensor) -> Tensor:
    """Return `(dU + tau dF) gamma`, gamma the regularised least-squares solution; zero rows are unused slots."""
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
    """Return the published fixed-point iteration `u <- u + f(u)`, without damping and without a way back.

    It returns its best iterate, and with `last` the one after the last evaluation, as published.

    Source: Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion Inversion (2023), arXiv
    2309.04907; Garibi et al., ReNoise: Real Image Inversion Through Iterative Noising (2024), arXiv 2403.14602.
    """
    return Anderson(window=0, tau=1.0, max_iterations=max_iterations, growth=math.inf, last=last)


def Damped(tau: float = 1.0, max_iterations: int = 200, last: bool = False) -> Anderson:  # noqa: N802
    """Return the damped iteration `u <- u + tau f(u)`: if f grows, tau is halved and the best iterate is taken again.

    Source: Hong et al., On Exact Inversion of DPM-Solvers (2023), arXiv 2311.18387, with a fixed schedule of tau there.
    """
    return Anderson(window=0, tau=tau, max_iterations=max_iterations, growth=1.0, last=last)
