r"""Climbs: the cheap way up, for few evaluations. Each climb solves every step a little, and a run down checks it.

A step from sigma to r sigma takes `u` to `F(u) = r u + (1 - r) D`, and F(u) is to be y. The last pairs `(u, F(u))` of
each step are kept: for any other y of a later climb, `y - F(u)` is the residual of u. Anderson's extrapolation of the
pairs is the next iterate. The run down that checks a climb gives one more pair of each step at no cost. So each climb
corrects what the climb before it left.

A climb starts each step at the forecast that came closest one step before; see `Forecasts`. It leaves a step that is
`GAIN` times as exact as the best image so far, so that hard steps may take more than easy ones.

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
from kinvert.inversion.plain import Recorded
from kinvert.inversion.problem import Problem
from kinvert.inversion.solvers.anderson import extrapolated
from kinvert.inversion.steps import Trajectory, fair_share, levels_of, step_problem
from kinvert.inversion.task import Task
from kinvert.plan import Plan
from kinvert.tensors import per_sample, rms

__all__ = ["CLIMBS", "affordable", "climb", "climb_once"]

PLAIN = 0
CLIMBS = (1, 1, 2, 3, PLAIN, 7, 6)
"""The most evaluations of a step in each climb; PLAIN is the plain run up, another candidate.

A sampler of higher order runs up well by itself: if its steps have several evaluations, the plain run comes first.
"""

PAIRS = 3  # that are kept of each step
GAIN = 0.01  # a climb solves each step to this part of the least error of the climbs before it
GROWTH = 4.0  # a pair whose residual is so many times the best one's says little about the neighbourhood


def affordable(plan: Plan, runs: int) -> tuple[tuple[int, ...], int]:
    """Return the climbs that so many runs are enough for, the first ones of `CLIMBS`, and what they cost in runs."""
    order: tuple[int, ...] = CLIMBS
    if len(plan.steps[0].stages) > 1:
        order = (PLAIN, *(most for most in CLIMBS if most != PLAIN))
    climbs, cost = list[int](), 0
    for most in order:
        if cost + max(most, 1) + 1 > runs:
            break
        climbs, cost = [*climbs, most], cost + max(most, 1) + 1
    return tuple(climbs), cost


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
        aim: how exactly the steps are solved, in parts of the image's size, shape (n,).
    """

    def __init__(self, task: Task) -> None:
        self.task, self.index = task, torch.arange(len(task.x), device=task.x.device)
        self.pairs = [_Pairs.of(task.wide) for _ in task.plan.steps]
        self.aim = torch.full_like(task.judge.size, task.eps)

    def keep(self, rows: Tensor) -> None:
        """Go on with some samples only."""
        self.task, self.index = self.task.take(rows), self.index[rows]
        self.pairs, self.aim = [pairs.take(rows) for pairs in self.pairs], self.aim[rows]

    def up(self, most: int) -> tuple[Tensor, Tensor]:
        """Climb with at most `most` evaluations a step; return the latents and the evaluations of each sample."""
        task, plan, y = self.task, self.task.plan, self.task.wide
        spent = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        budget = torch.full_like(spent, most * plan.evaluations)
        levels, forecasts = levels_of(plan, y), Forecasts(task.judge.size, plan.sigmas[0])
        for step in reversed(plan.steps):
            allowed = self.aim * task.unit(step.sigma_next)
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
        self.learn(states, restored)
        return states, restored

    def learn(self, states: list[Tensor], restored: Tensor) -> None:
        """Take the states that a run down passed, and where it ended: what each step makes of its state is the next."""
        if self.task.x.dtype == self.task.wide.dtype:  # or else rounding parts a state from what the step made of it
            everyone = torch.arange(len(restored), device=restored.device)
            for pairs, u, image in zip(self.pairs, states, [*states[1:], restored], strict=True):
                pairs.add(everyone, u, image, image)


def _iterate(problem: Problem, pairs: _Pairs, forecasts: Forecasts, recorded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Improve the state before a step until the budget is spent; return it and the evaluations of each sample."""
    y, cost = problem.value, problem.cost
    spent = torch.zeros_like(problem.budget)
    proposed, least = pairs.propose(y) if pairs.count else (None, y.new_full((len(y),), math.inf))
    u = forecasts.guess(problem, proposed, recorded)
    if proposed is not None:
        u = torch.where(per_sample(least <= problem.tolerance, u), proposed, u)
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


def climb(task: Task, up: Plan, climbs: tuple[int, ...]) -> tuple[Trajectory, Tensor]:
    """Climb so many times; return the trajectories of the best latents, and where they end.

    A sample stops climbing when its round trip is within the tolerance. The states are those of the run down from the
    latent, so that all that it misses is the last step's.

    Args:
        task: the samples.
        up: the plain run upwards.
        climbs: the first ones of `CLIMBS`.
    """
    climber, x = _Climber(task), task.wide
    spent = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    states, restored, error = list[Tensor](), torch.full_like(x, math.nan), torch.full_like(task.judge.size, math.inf)
    used: Tensor | int
    for most in climbs:
        one, index = climber.task, climber.index
        if most == PLAIN:
            plain = Recorded.of(up, task.plan, one.denoiser, one.x, keep="inputs")
            path, image, used = plain.trajectory(task.plan, one.wide)[:-1], plain.restored.to(x.dtype), up.evaluations
            climber.learn(path, image)
        else:
            latent, used = climber.up(most)
            path, image = climber.down(latent)
        spent[index] += used + task.plan.evaluations
        new = one.error(image)
        better = new < error[index]
        states = states or [state.clone() for state in path]
        for kept, state in zip([*states, restored], [*path, image], strict=True):
            kept[index] = torch.where(per_sample(better, state), state, kept[index])
        error[index] = torch.where(better, new, error[index])
        rows = one.is_lost(error[index]).nonzero()[:, 0]
        if not len(rows) or task.watch.stopped:
            break
        if len(rows) < len(index):
            climber.keep(rows)
        climber.aim = (GAIN * error[climber.index] / climber.task.judge.size).clamp(one.eps, GAIN)
    residuals = x.new_zeros(len(task.plan.steps), len(x))
    residuals[-1] = error
    return Trajectory([*states, x], residuals, spent), restored
