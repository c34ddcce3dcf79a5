r"""What a root finder is given and what it returns: `F(u) = y`, one equation per sample, solved in one batch.

Nobody writes to a `Problem`. A solver keeps its books in a `Search` of its own and returns a `Root`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from kinvert.denoisers import BoundDenoiser
from kinvert.engine import run
from kinvert.inversion.couplings import Couplings, couplings
from kinvert.inversion.watching import Watch
from kinvert.plan import Plan
from kinvert.showing.brief import brief_repr
from kinvert.tensors import per_sample, rms

__all__ = ["Guess", "Judge", "Problem", "Reason", "Root", "Search"]


NEAR = 3.0
"""A residual of so many floors may be noise."""


class Reason(IntEnum):
    """Why the search for a latent ended, per sample.

    Attributes:
        CONVERGED: the tolerance is reached.
        BUDGET: no evaluations were left, or too few for another attempt.
        PRECISION: what is left is rounding, of the state or of the network; only a wider dtype helps.
        FOLD: the derivative is nearly singular, and no state nearby comes closer to the image.
        NOT_FINITE: the denoiser, or the state, is NaN or infinite.
        STALLED: the solvers gave up for another reason.
        APPROXIMATE: the method is not exact, and ended as published.
        STOPPED: the user asked to stop, by Ctrl-C or in `watch`.
        UNCHECKED: the latent was not sampled again, as asked for with `check=False`.
    """

    CONVERGED = 0
    BUDGET = 1
    PRECISION = 2
    FOLD = 3
    NOT_FINITE = 4
    STALLED = 5
    APPROXIMATE = 6
    STOPPED = 7
    UNCHECKED = 8


@dataclass(frozen=True, eq=False)
class Judge:
    """How the root of a whole run is judged: by the image that the run makes of it.

    Attributes:
        size: unit of an error, shape (batch,).
        share: root of the share of the values that count, 1 without a mask; shape (batch,).
        enough: rms error at which the search ends, shape (batch,).
        region: 1 where a value counts, of the image's shape; None counts all.
    """

    size: Tensor
    share: Tensor
    enough: Tensor
    region: Tensor | None = None

    def error(self, residual: Tensor, index: Tensor) -> Tensor:
        """Return the rms of the residuals of the samples `index` in the region; infinite if not finite."""
        return rms(residual, None if self.region is None else self.region[index]).nan_to_num(math.inf, math.inf)

    def take(self, index: Tensor) -> Judge:
        """Return the judge of the samples `index`."""
        region = None if self.region is None else self.region[index]
        return Judge(self.size[index], self.share[index], self.enough[index], region)


@dataclass(frozen=True, eq=False)
class Problem:
    """`F(u) = y` for a batch. Solvers read it and never write to it.

    Attributes:
        function: `(u, index) -> F(u)` for the samples `index`, u of shape (len(index), *event).
        value: y, shape (batch, *event).
        tolerance: rms of the residual at which a sample is solved, shape (batch,).
        budget: evaluations that a sample may spend, shape (batch,).
        cost: evaluations of one call of `function`.
        eps: relative precision of `function`, which finite differences are made for; None takes y's dtype's.
        plan: the Plan that F runs, one step or many, if F is one; sweeps need it.
        denoiser: the denoiser of the batch that F calls; sweeps call it themselves.
        judge: how the roots of a whole run are judged; None judges all values by `tolerance`.
        floor: rms residual that the noise of F alone leaves, shape (batch,); None if no noise is known. A sample is
            solved as well as F allows if its residual is below the floor, or near it and no longer falls.
        watch: who is told how the search goes, and whether it is to stop.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    value: Tensor
    tolerance: Tensor
    budget: Tensor
    cost: int = 1
    eps: float | None = None
    plan: Plan | None = field(default=None, repr=False)
    denoiser: BoundDenoiser | None = field(default=None, repr=False)
    judge: Judge | None = field(default=None, repr=False)
    floor: Tensor | None = field(default=None, repr=False)
    watch: Watch = field(default_factory=Watch, repr=False)

    __repr__ = brief_repr

    def call(self, u: Tensor, index: Tensor) -> tuple[Tensor, int | Tensor]:
        """Return F(u) of the samples `index`, and the evaluations that it took of each."""
        return self.function(u, index), self.cost

    def take(self, index: Tensor, spent: Tensor) -> Problem:
        """Return the problem of the samples `index` alone, with what `spent`, shape (batch,), leaves of the budget."""
        return replace(
            self,
            function=lambda u, inner: self.function(u, index[inner]),
            value=self.value[index],
            tolerance=self.tolerance[index],
            budget=(self.budget - spent)[index],
            denoiser=None if self.denoiser is None else self.denoiser.take(index),
            judge=None if self.judge is None else self.judge.take(index),
            floor=None if self.floor is None else self.floor[index],
        )

    @cached_property
    def couplings(self) -> Couplings:
        """Return how the evaluations of the Plan depend on each other.

        Raises:
            ValueError: F is not known to run a Plan.
        """
        if self.plan is None:
            raise ValueError("the problem does not tell the Plan that its function runs; sweeps need one")
        return couplings(self.plan)

    @property
    def precision(self) -> float:
        """Return the relative precision of `function`."""
        return self.eps or torch.finfo(self.value.dtype).eps

    def denoised(self, u: Tensor) -> Tensor | None:
        """Return the mean of what the evaluations of a step return if u is its solution.

        A step from sigma to r sigma is `r u + (1 - r) mean(D) = y`. None if F is not a single step.
        """
        if self.plan is None or len(self.plan.steps) != 1:
            return None
        r = self.plan.sigmas[-1] / self.plan.sigmas[0]
        return (self.value - r * u) / (1.0 - r)


@dataclass(frozen=True, eq=False)
class Guess:
    """Where a search starts.

    Attributes:
        u: the first iterate, shape (batch, *event).
        denoised: what the evaluations of the Plan are expected to return, shape (batch, evaluations, *event), or twice
            as many rows, D and U in turn, for guided pairs; None if nothing is known.
        inputs: what these evaluations saw, if it is known, shape (batch, evaluations, *event). No solver needs it.
        reached: if `denoised` was recorded in a run from u, where that ended: F(u).
    """

    u: Tensor
    denoised: Tensor | None = None
    inputs: Tensor | None = None
    reached: Tensor | None = None

    __repr__ = brief_repr

    def take(self, index: Tensor) -> Guess:
        """Return the guess of the samples `index`."""
        parts = (self.u, self.denoised, self.inputs, self.reached)
        return Guess(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Root:
    """What a solver returns.

    Attributes:
        u: the best iterate, shape (batch, *event).
        residual: its rms, shape (batch,).
        evaluations: spent on each sample, int64, shape (batch,).
        denoised: D at `u`, shape (batch, *event); None if the solver does not know it.
        reason: a `Reason` for each sample, int64, shape (batch,).
        reached: F(u), shape (batch, *event); None if the solver did not keep it.
        floor: rms residual that the noise of F leaves, shape (batch,), 0 if F is exact; None if nobody measured it.
    """

    u: Tensor
    residual: Tensor
    evaluations: Tensor
    denoised: Tensor | None
    reason: Tensor
    reached: Tensor | None = None
    floor: Tensor | None = None

    __repr__ = brief_repr


class Search:
    """The books of one call of a solver: the best iterate of every sample, and what it has spent.

    Attributes:
        u, residual: the best iterate so far and the rms of its residual, shapes (batch, *event) and (batch,).
        evaluations: spent so far, shape (batch,).
    """

    def __init__(self, problem: Problem, start: Tensor) -> None:
        self.problem, self.everyone = problem, torch.arange(len(start), device=start.device)
        self.u, self.residual = start.clone(), start.new_full((len(start),), math.inf)
        self.evaluations = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        self.size = rms(problem.value).maximum(problem.tolerance)  # never 0
        self.floor = problem.floor

    def call(self, u: Tensor, index: Tensor) -> Tensor:
        """Return F(u) of the samples `index`, and count what it costs."""
        value, spent = self.problem.call(u, index)
        self.evaluations[index] += spent
        return value

    def call_rows(self, u: Tensor, row: Tensor) -> Tensor:
        """Return F of many states u, shape (n, *event), of one sample `row`, shape (1,), and count what they cost.

        A denoiser that the problem knows gets them in batches.
        """
        plan, denoiser = self.problem.plan, self.problem.denoiser
        if plan is None or denoiser is None:
            return torch.cat([self.call(state, row) for state in u.split(1)])
        self.evaluations[row] += len(u) * self.problem.cost
        return run(plan, denoiser.take(row.expand(len(u))), u)

    def evaluate(self, u: Tensor, index: Tensor) -> Tensor:
        """Return the residual `f(u) = y - F(u)` of the samples `index`, and count what it costs."""
        return self.problem.value[index] - self.call(u, index)

    def differentiate(self, u: Tensor, f: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """Return `F'(u) v` by a finite difference, given `f = f(u)`: one call, and the denoiser stays a black box."""
        length = rms(v)
        size = rms(u).maximum(self.size[index]) * self.problem.precision**0.5 / torch.where(length > 0, length, 1.0)
        size = per_sample(size, u)
        return (f - self.evaluate(u + size * v, index)) / size

    def affords(self, index: Tensor) -> Tensor:
        """Return how often F may still be called for the samples `index`; not at all if the search is to stop."""
        left = self.problem.budget[index] - self.evaluations[index]
        if self.problem.watch.stopped:
            return torch.zeros_like(left)
        return left.div(self.problem.cost, rounding_mode="floor")

    def is_open(self, index: Tensor, residual: Tensor) -> Tensor:
        """Tell which of the samples `index`, with these residuals, are unsolved and within budget."""
        enough = self.problem.tolerance[index]
        if self.floor is not None:
            enough = enough.maximum(self.floor[index])
        return (residual > enough) & (self.affords(index) >= 1)

    def is_near_floor(self, index: Tensor, residual: Tensor) -> Tensor | None:
        """Tell which of the samples `index`, with these residuals, are near the noise of F; None if none is known."""
        return None if self.floor is None else residual <= NEAR * self.floor[index]

    def open_rows(self, index: Tensor, residual: Tensor) -> Tensor:
        """Return the positions in `index` that are unsolved and within budget. It reads the device."""
        return self.problem.watch.rows(self.is_open(index, residual), residual)

    def open(self, index: Tensor) -> Tensor:
        """Return those of `index` whose best iterates do not solve them, and that are within budget."""
        return index[self.open_rows(index, self.residual[index])]

    def keep(self, index: Tensor, u: Tensor, residual: Tensor) -> Tensor:
        """Take over the iterates that are better, and tell which of `index` they are."""
        best = self.residual[index]
        better = residual < best
        self.put(index, torch.where(per_sample(better, u), u, self.u[index]), torch.where(better, residual, best))
        return better

    def put(self, index: Tensor, u: Tensor, residual: Tensor) -> None:
        """Replace the best iterates of the samples `index`."""
        self.u[index], self.residual[index] = u, residual

    def root(self, denoised: Tensor | None = None, reached: Tensor | None = None, least: int = 1) -> Root:
        """Return the best iterates, with the reason why each search ended; a next step would take `least` calls."""
        poor = self.affords(self.everyone) < least
        short = Reason.STOPPED if self.problem.watch.stopped else Reason.BUDGET
        reason = torch.where(poor, int(short), int(Reason.STALLED))
        reason = torch.where(self.residual.isfinite(), reason, int(Reason.NOT_FINITE))
        if self.floor is not None:
            near = (self.residual <= NEAR * self.floor) & (self.floor > 0)
            reason = torch.where(near, int(Reason.PRECISION), reason)
        enough = self.problem.tolerance if self.problem.judge is None else self.problem.judge.enough
        reason = torch.where(self.residual <= enough, int(Reason.CONVERGED), reason)
        return Root(self.u, self.residual, self.evaluations, denoised, reason, reached, self.floor)
