r"""The last resort for small events: least squares with the whole derivative.

The methods before it see `F'` in a few directions. Where `F'` is nearly singular in one direction they stall, and so
does a curve that bends too sharply there. An event of m values has a derivative of m columns; where that is affordable,

    (J^T J + lambda I) d = J^T f,    f = y - F(u),    J = F'(u),

goes downhill from everywhere, with lambda large, and like Newton's method near a root, with lambda small. It may end in
a valley that is no root: the bottom of a fold that the image lies just beyond. Roots beyond the fold have valleys of
their own, which other starts lead to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.checks import check_count_field
from kinvert.devices import widest
from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.solvers.base import Solver
from kinvert.noise import white
from kinvert.tensors import rms

__all__ = ["LevenbergMarquardt", "RunLevenbergMarquardt", "jacobian", "secant"]


@dataclass(frozen=True)
class LevenbergMarquardt(Solver):
    r"""Levenberg's and Marquardt's method with the full Jacobian, from the guess, then from `starts` states around it.

    A Jacobian is m finite differences, m the number of values of an event, evaluated in batches; between two of them it
    is kept, and each step corrects it along its own direction (Broyden). It is measured again if a step that it
    proposes does not come closer. lambda follows from how well the last step was predicted (Nielsen). A start is given
    up if the residual has not halved after `patience` steps. The states around the guess are as far from it as noise of
    the level of u. Samples are solved one by one; events of more than `max_values` values are left as they are.

    Memory: three matrices of m x m in float64, 400 MB for 4,096 values.

    Source: Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters (1963); Broyden, A Class of
    Methods for Solving Nonlinear Simultaneous Equations (1965); Nielsen, Damping Parameter in Marquardt's Method
    (1999).
    """

    starts: int = 8
    max_iterations: int = 100
    patience: int = 10
    damping: float = 1e-3
    max_values: int = 4096

    def __post_init__(self) -> None:
        check_count_field(self, "starts", 0)
        check_count_field(self, "max_iterations")
        check_count_field(self, "patience")
        check_count_field(self, "max_values")

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        search, y = Search(problem, guess.u), problem.value
        values = guess.u[0].numel()
        f = search.evaluate(guess.u, search.everyone)
        search.keep(search.everyone, guess.u, rms(f).nan_to_num(torch.inf, torch.inf))
        reached = y - f
        for row in search.everyone.split(1) if values <= self.max_values else ():
            u, residual = guess.u[row], f[row]
            for k in range(self.starts + 1):
                if not len(search.open(row)) or int(search.affords(row)) < values + 3:
                    break
                if k:
                    u = guess.u[row] + _spread(problem) * white(k).bind(u)(1.0, 0.0)
                    residual = self._take(search, row, u, reached)
                if residual.isfinite().all():
                    self._descend(search, row, u, residual, reached)
        return search.root(reached=reached, least=values + 3)

    def _descend(self, search: Search, row: Tensor, u: Tensor, f: Tensor, reached: Tensor) -> None:
        """Go downhill from u, shape (1, *event), until the sample is solved, spent or at the bottom of a valley."""
        model: Tensor | None = None
        size = before = float(rms(f))
        damping, growth, fresh = 0.0, 2.0, False
        for k in range(1, self.max_iterations + 1):
            if not len(search.open(row)) or int(search.affords(row)) < (u[0].numel() + 2 if model is None else 1):
                return
            if model is None:
                model, fresh = jacobian(search, row, u), True
            normal = (model.mT @ model)[None]
            largest = float(normal[0].diagonal().max())
            damping = max(damping or self.damping * largest, torch.finfo(model.dtype).eps * largest)
            right = f.flatten().to(model.dtype)
            step = linalg.solve(linalg.ridged(normal, damping), (model.mT @ right)[None, :, None])[0, :, 0]
            ahead = u + step.to(u.dtype).reshape(u.shape)
            trial = self._take(search, row, ahead, reached)
            new, left = float(rms(trial)), float((right - model @ step).square().mean().sqrt())
            gain = (size**2 - new**2) / max(size**2 - left**2, torch.finfo(model.dtype).tiny)
            if trial.isfinite().all():
                model = secant(model, (ahead - u).flatten(), (f - trial).flatten())
            if gain > 0:
                u, f, size, growth = ahead, trial, new, 2.0
                damping *= max(1 / 3, 1 - (2 * gain - 1) ** 3)
            elif fresh:
                damping, growth = damping * growth, 2 * growth
            if not fresh and not gain > 0.25:
                model = None
            fresh = fresh and not gain > 0
            if k % self.patience == 0:
                if not size <= before / 2:
                    return
                before = size

    @staticmethod
    def _take(search: Search, row: Tensor, u: Tensor, reached: Tensor) -> Tensor:
        """Return the residual at u, and keep u if it is the best so far."""
        f = search.evaluate(u, row)
        if bool(search.keep(row, u, rms(f).nan_to_num(torch.inf, torch.inf))):
            reached[row] = search.problem.value[row] - f
        return f


@dataclass(frozen=True)
class RunLevenbergMarquardt(LevenbergMarquardt):
    """The same for the run as a whole: a column of the Jacobian is a run."""

    scope: ClassVar[str] = "run"


def _spread(problem: Problem) -> float:
    """Return how far apart starts are: as noise of the level of u."""
    return problem.plan.sigmas[0] if problem.plan is not None else float(rms(problem.value).max())


def jacobian(search: Search, row: Tensor, u: Tensor) -> Tensor:
    """Return `F'(u)` of one sample by finite differences, shape (m, m), in the widest dtype; it takes m + 1 calls.

    Args:
        search: whose problem F is of.
        row: the sample, shape (1,).
        u: the state, shape (1, *event).
    """
    m = u[0].numel()
    length = float(rms(u).maximum(search.size[row])) * search.problem.precision**0.5
    wide = widest(u.device)
    columns = torch.cat([torch.zeros_like(u.flatten(1)), torch.eye(m, dtype=u.dtype, device=u.device)])
    states = u + length * columns.reshape(-1, *u.shape[1:])
    values = search.call_rows(states, row).flatten(1).to(wide)
    steps = (states - u).flatten(1)[1:].diagonal().to(wide)  # as they are after rounding
    return ((values[1:] - values[:1]) / steps[:, None]).mT


def secant(model: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Return the matrix nearest to `model` that maps `step` to `change`."""
    step, change = step.to(model.dtype), change.to(model.dtype)
    square = (step * step).sum()
    if not square > 0:
        return model
    return model + torch.outer(change - model @ step, step) / square
