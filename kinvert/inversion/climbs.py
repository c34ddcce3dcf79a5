r"""Climbs: the cheap way up, for few evaluations. Each climb solves every step a little, and a run down checks it.

A step from sigma to r sigma takes `u` to `F(u) = r u + (1 - r) D` and is to reach y. Of every evaluation the pair
`(u, F(u))` is kept: whatever y becomes in a later climb, `y - F(u)` is its residual. The pairs of a step give Anderson's
extrapolation to the next iterate, and so does the run down that checks a climb: it is one more pair for each step, for
nothing. What a climb leaves is corrected by the next one, which starts where all pairs together point to.

The first climb has no pairs. Its guesses are chosen among three forecasts of D, by which of them came closest one step
before: no change of the noise (as in DDIM inversion), D as one step before, and its linear extrapolation.

Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965); Walker and Ni, Anderson Acceleration for
Fixed-Point Iterations (2011), for the extrapolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.engine import Progress, run
from kinvert.inversion.forecasts import Forecasts
from kinvert.inversion.problem import Problem, Reason
from kinvert.inversion.solvers.anderson import extrapolated
from kinvert.inversion.steps import Trajectory, fair_share, levels_of, step_problem
from kinvert.inversion.task import Task
from kinvert.tensors import per_sample, rms

__all__ = ["CLIMBS", "climb", "climb_once", "cost_of"]

CLIMBS = (1, 1, 2, 3, 5, 8)
"""Evaluations of a step in each climb."""

PAIRS = 3  # that are kept of each step
GROWTH = 4.0  # a pair whose residual is so many times the best one's says little about the neighbourhood


def cost_of(climbs: int) -> int:
    """Return how many runs the first climbs cost, with the runs down that check them."""
    return sum(CLIMBS[:climbs]) + climbs


@dataclass(eq=False)
class _Pairs:
    """What is known of the map of one step: its last evaluations, for some samples.

    Attributes:
        u, image: inputs and what the step makes of them, shape (n, count, m), newest first; a sample that was not
            evaluated has its last pair twice.
        tau: damping of each sample's iteration, shape (n,).
    """

    u: Tensor
    image: Tensor
    tau: Tensor

    @classmethod
    def of(cls, u: Tensor) -> _Pairs:
        n = len(u)
        empty = u.new_empty(n, 0, u[0].numel())
        return cls(empty, empty, u.new_ones(n))

    def take(self, rows: Tensor) -> _Pairs:
        return _Pairs(self.u[rows], self.image[rows], self.tau[rows])

    @property
    def count(self) -> int:
        return self.u.shape[1]

    def denoised(self, problem: Problem) -> Tensor | None:
        """Return the mean of D at the newest pair, shape of y; None if there is no pair."""
        if not self.count:
            return None
        r = problem.couplings.r
        return ((self.image[:, 0] - r * self.u[:, 0]) / (1.0 - r)).reshape(problem.value.shape)

    def residuals(self, y: Tensor) -> Tensor:
        """Return the rms of `y - F(u)` of every pair, shape (n, count); infinite if it is not finite."""
        f = y.flatten(1)[:, None] - self.image
        return f.square().mean(2).sqrt().nan_to_num(math.inf, math.inf)

    def add(self, rows: Tensor, u: Tensor, image: Tensor, y: Tensor) -> None:
        """Take a new pair of the samples `rows`; where the residual grew too much, the damping is halved."""
        if self.count:
            new = rms(y[rows] - image).nan_to_num(math.inf, math.inf)
            worse = new > GROWTH * self.residuals(y)[rows].amin(1)
            self.tau[rows] = torch.where(worse, self.tau[rows] / 2, self.tau[rows])
        for name, value in (("u", u), ("image", image)):
            stack: Tensor = getattr(self, name)
            front = stack[:, :1].clone() if stack.shape[1] else value.new_zeros(len(self.tau), 1, value[0].numel())
            front[rows, 0] = value.flatten(1)
            setattr(self, name, torch.cat([front, stack[:, : PAIRS - 1]], 1))

    def propose(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return where to evaluate next for the value y, and the least residual of the pairs."""
        f, sizes = y.flatten(1)[:, None] - self.image, self.residuals(y)
        least, place = sizes.min(1)
        everyone = torch.arange(len(y), device=y.device)
        u, best = self.u[everyone, place], f[everyone, place]
        near = (sizes <= GROWTH * least[:, None])[:, :, None]
        dU, dF = (torch.where(near, part - one[:, None], 0.0) for part, one in ((self.u, u), (f, best)))
        tau = self.tau[:, None]
        moved = u + tau * best - extrapolated(dU, dF, best, tau)
        moved = torch.where(moved.isfinite().all(1, keepdim=True), moved, u)
        return moved.reshape(y.shape), least


class _Climber:
    """The climbs of some samples.

    Attributes:
        task, index: the task of the samples that still climb, and their places in the first one.
        pairs: of every step.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.index = task, torch.arange(len(task.x), device=task.x.device)
        self.pairs = [_Pairs.of(task.wide) for _ in task.plan.steps]

    def keep(self, rows: Tensor) -> None:
        """Go on with some samples only."""
        self.task, self.index = self.task.take(rows), self.index[rows]
        self.pairs = [pairs.take(rows) for pairs in self.pairs]

    def up(self, most: int) -> tuple[Tensor, Tensor]:
        """Climb with at most `most` evaluations a step; return the latents and the evaluations of each sample."""
        task, plan, y = self.task, self.task.plan, self.task.wide
        spent = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        budget = torch.full_like(spent, most * plan.evaluations)
        levels, forecasts = levels_of(plan, y), Forecasts(task.judge.size)
        for step in reversed(plan.steps):
            allowed = task.eps * task.unit(step.sigma_next)
            left = fair_share(budget - spent, step)
            problem = step_problem(plan, step, task.solving, y, levels[step.index], allowed, left, task.eps)
            task.watch.note(solved=len(plan.steps) - 1 - step.index, open=len(y))
            pairs = self.pairs[step.index]
            recorded = pairs.denoised(problem)
            u, used = _iterate(problem, pairs, forecasts, recorded)
            forecasts.learn(problem, u, recorded)
            spent, y = spent + used, u
        return y, spent

    def down(self, latent: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the sampler on the latents; return the states that it passes, and where it ends. The pairs learn it."""
        task, states = self.task, list[Tensor]()
        watched = task.callback

        def record(progress: Progress) -> None:
            states.append(progress.x.to(task.wide.dtype, copy=True))
            if watched is not None:
                watched(progress)

        restored = run(task.plan, task.denoiser, latent.to(task.x.dtype), callback=record).to(task.wide.dtype)
        path = [*states, restored]
        if task.x.dtype == task.wide.dtype:  # or else rounding parts a state from what the step made of it
            everyone = torch.arange(len(latent), device=latent.device)
            for step, pairs in zip(task.plan.steps, self.pairs, strict=True):
                pairs.add(everyone, path[step.index], path[step.index + 1], path[step.index + 1])
        return path[:-1], restored


def _iterate(
    problem: Problem, pairs: _Pairs, forecasts: Forecasts, recorded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Improve the state before a step until the budget is spent; return it and the evaluations of each sample."""
    y, cost = problem.value, problem.cost
    spent = torch.zeros_like(problem.budget)
    u = forecasts.guess(problem, pairs.propose(y)[0] if pairs.count else None, recorded)
    least = pairs.residuals(y).amin(1) if pairs.count else y.new_full((len(y),), math.inf)
    while not problem.watch.stopped:
        rows = ((problem.budget - spent >= cost) & (least > problem.tolerance)).nonzero()[:, 0]
        if not len(rows):
            break
        pairs.add(rows, u[rows], problem.function(u[rows], rows), y)
        spent[rows] += cost
        moved, least = pairs.propose(y)
        u[rows] = moved[rows]
    return u, spent


def climb_once(task: Task, most: int) -> tuple[Tensor, Tensor]:
    """Climb once, unchecked, with at most `most` evaluations a step; return the latents and what each cost."""
    return _Climber(task).up(most)


def climb(task: Task, climbs: int) -> tuple[Trajectory, Tensor]:
    """Climb up to so many times; return the trajectories of the best latents, and where they end.

    A sample stops climbing when its round trip is within the tolerance. The states are those of the run down from the
    latent, so that all that it misses is the last step's.
    """
    climber, x = _Climber(task), task.wide
    spent = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    states, restored, error = list[Tensor](), x.clone(), torch.full_like(task.judge.size, math.inf)
    for most in CLIMBS[:climbs]:
        latent, used = climber.up(most)
        path, image = climber.down(latent)
        index = climber.index
        spent[index] += used + task.plan.evaluations
        new = climber.task.error(image)
        better = new < error[index]
        states = states or [state.clone() for state in path]
        for kept, state in zip([*states, restored], [*path, image], strict=True):
            kept[index] = torch.where(per_sample(better, state), state, kept[index])
        error[index] = torch.where(better, new, error[index])
        rows = climber.task.is_lost(error[index]).nonzero()[:, 0]
        if not len(rows) or task.watch.stopped:
            break
        if len(rows) < len(index):
            climber.keep(rows)
    residuals = x.new_zeros(len(task.plan.steps), len(x))
    residuals[-1] = error
    reasons = torch.full(residuals.shape, int(Reason.CONVERGED), device=x.device)
    reasons[-1] = torch.where(task.is_lost(error), int(Reason.BUDGET), int(Reason.CONVERGED))
    return Trajectory([*states, x], residuals, spent, reasons), restored
