"""A sequence of root finders, and the one that `invert` takes by default for single steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kinvert.inversion.noise_floor import measure_noise
from kinvert.inversion.problem import Guess, Problem, Reason, Root, Search
from kinvert.inversion.solvers.anderson import Anderson
from kinvert.inversion.solvers.base import Solver
from kinvert.inversion.solvers.continuation import Continuation
from kinvert.inversion.solvers.levenberg import LevenbergMarquardt
from kinvert.inversion.solvers.newton import NewtonKrylov
from kinvert.inversion.solvers.sweeps import StepSweeps
from kinvert.tensors import per_sample

__all__ = ["Attempt", "Auto", "Sequence"]


@dataclass(frozen=True)
class Attempt:
    """A solver, and where it starts: at the best iterate so far, at the guess, or at y.

    One part in `keeps` of the limit that is left is kept for those after it; None keeps nothing.
    """

    solver: Solver
    start: Literal["best", "guess", "value"] = "best"
    keeps: int | None = None


@dataclass(frozen=True)
class Sequence(Solver):
    """Solvers one after the other, each for the samples that those before it left."""

    attempts: tuple[Attempt, ...]

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        search, denoised, todo = Search(problem, guess.u), None, None
        ended = torch.full_like(search.evaluations, int(Reason.STALLED))
        for k, attempt in enumerate(self.attempts):
            index = search.everyone if todo is None else self._left(search, todo, first=k == 1)
            if not len(index):
                break
            whole = todo is None  # the first solver takes all samples: nothing to cut
            part = problem if whole else problem.take(index, search.evaluations)
            if attempt.keeps is not None:
                part = replace(part, budget=part.budget - part.budget.div(attempt.keeps, rounding_mode="floor"))
            starts = {"best": Guess(search.u), "guess": guess, "value": Guess(problem.value)}
            start = guess if whole and attempt.start == "best" else starts[attempt.start]
            found = attempt.solver.solve(part, start if whole else start.take(index))
            search.evaluations[index] += found.evaluations
            ended[index] = found.reason
            better = search.keep(index, found.u, found.residual)
            if whole:
                denoised = found.denoised
            elif denoised is not None:  # from here on, what the solution of a step implies
                implied = problem.denoised(search.u)
                if implied is not None:
                    known = torch.where(per_sample(better, implied), implied[index], denoised[index])
                    denoised = denoised.index_copy(0, index, known)
            todo = index
        root = search.root(denoised)
        poor = (root.reason == Reason.STALLED) & (ended == Reason.BUDGET)  # too poor for a step of the last solver
        return replace(root, reason=torch.where(poor, int(Reason.BUDGET), root.reason))

    @staticmethod
    def _left(search: Search, todo: Tensor, first: bool) -> Tensor:
        """Return the samples that are open, without those whose residual is the noise of F: no solver improves them.

        The noise is measured if the first solver leaves something that the known noise does not explain.
        """
        index = _far(search, search.open(todo))
        if not first or not len(index):
            return index
        able = index[(search.affords(index) >= 6).nonzero()[:, 0]]
        floor = torch.zeros_like(search.residual) if search.floor is None else search.floor.clone()
        if len(able):
            floor[able] = floor[able].maximum(measure_noise(search, able))
        search.floor = floor
        return _far(search, search.open(index))


def _far(search: Search, index: Tensor) -> Tensor:
    """Return those of `index` whose best iterates are not near the noise of F."""
    near = search.is_near_floor(index, search.residual[index])
    return index if near is None else index[(~near).nonzero()[:, 0]]


@dataclass(frozen=True)
class Auto(Solver):
    """Sweeps first; what they leave is tried by Anderson, by Newton from the best iterate, then by continuation.

    Sweeps are left out for a step whose evaluations depend on each other too much: where the rows of |C|, which bounds
    the factor of the fixed-point iteration for an exact denoiser (`couplings`), add up to more than `coupling`.

    Continuation ends in a solution wherever the network is bounded (see `Continuation`), if there is time to follow its
    curve. For small events the first curve and the last resort keep one part in `keeps` of what is left for those after
    them, a third and a half, so that one that does not end leaves something. The second continuation follows another
    curve, from the given value instead of the guess, and more closely.
    """

    coupling: float = 2.0
    keeps: tuple[int, int] = (3, 2)
    sweeps: StepSweeps = field(default_factory=StepSweeps)
    anderson: Anderson = field(default_factory=lambda: Anderson(window=10, max_iterations=40))
    newton: NewtonKrylov = field(default_factory=NewtonKrylov)
    continuation: Continuation = field(default_factory=Continuation)
    last: LevenbergMarquardt = field(default_factory=LevenbergMarquardt)

    def sequence(self, problem: Problem) -> Sequence:
        """Return the solvers for a problem."""
        sweeps = problem.plan is not None and problem.couplings.coupling <= self.coupling
        is_small = problem.value[0].numel() <= self.last.max_values
        curve, last = self.keeps if is_small else (None, None)
        return Sequence(
            (
                *([Attempt(self.sweeps, "guess")] if sweeps else []),
                Attempt(self.anderson),
                Attempt(self.newton),
                Attempt(self.continuation, "guess", curve),
                *([Attempt(self.last, keeps=last)] if is_small else []),
                Attempt(self.continuation.finer(), "value"),
            )
        )

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`."""
        return self.sequence(problem).solve(problem, guess)
