r"""The inverse of a one-step sampler: from the image up, one equation per step.

Step i of a Plan is a map `x_{i+1} = F_i(x_i)`. Given `x_{i+1}`, `F_i(u) = x_{i+1}` is solved for the noisier state u,
from the cleanest step to the noisiest. For the Euler step of an exact denoiser, `F(u) = r u + (1 - r) D(u)` with
`r = sigma_next / sigma`, D' = Cov[x0 | x] / sigma^2 is symmetric and positive semi-definite: F is the gradient of a
strongly convex function, and the solution exists and is unique. A learned denoiser, and guidance, void that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinvert.coefficients import lagrange
from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine import advance, stage_sigmas
from kinvert.inversion.problem import Guess, Problem, Reason
from kinvert.inversion.solvers import NewtonKrylov, Solver
from kinvert.inversion.watching import Watch
from kinvert.noise import white
from kinvert.plan import Plan, Step
from kinvert.showing.brief import brief_repr
from kinvert.tensors import per_sample, rms

__all__ = [
    "LEAST_CHANGE",
    "Trajectory",
    "contraction",
    "fair_share",
    "forecast",
    "invert_steps",
    "levels_of",
    "raised",
    "step_problem",
]

ENOUGH = 12
"""Calls of a step that solve it if it is no fold."""

CREDIBLE = 0.02
"""Noise of D, in parts of its rms, up to which a network may be rounded: what looks like more is a fold."""

LEAST_CHANGE = NewtonKrylov(krylov=60, forcing=1e-9, max_iterations=30, halvings=10, least_change=True)
"""For a step to sigma = 0, `x' = D(x)`, which many states may solve: each iteration finds the whole change anew."""


@dataclass(eq=False)
class Trajectory:
    """States at every level of a run upwards, and how each step was solved.

    Attributes:
        states: noisiest first, each of shape (batch, *event); the last is the image.
        residuals: rms of `step(state) - next state`, shape (steps, batch).
        evaluations: spent on each sample, int64, shape (batch,).
        reasons: a `Reason` for each step and sample, int64, shape (steps, batch); None if no step was solved by itself.
        noise: what the denoiser's answers are uncertain by, in parts of their rms, as far as a search met it; 0 if none
            did, shape (batch,).
    """

    states: list[Tensor]
    residuals: Tensor
    evaluations: Tensor
    reasons: Tensor | None = None
    noise: Tensor | None = None

    __repr__ = brief_repr


def invert_steps(
    plan: Plan,
    denoiser: BoundDenoiser,
    x: Tensor,
    tolerance: Callable[[Step], Tensor],
    solver: Solver,
    budget: Tensor,
    starts: list[Tensor] | None = None,
    eps: float | None = None,
    watch: Watch | None = None,
) -> Trajectory:
    """Solve every step of a one-step Plan for the state before it, from the last step to the first.

    Args:
        plan: deterministic and without memory.
        denoiser: of the batch.
        x: the state at `plan.sigmas[-1]`, shape (batch, *event).
        tolerance: rms of the residual that is good enough for a step, shape (batch,).
        solver: root finder for each step.
        budget: evaluations that each sample may spend on the run, shape (batch,).
        starts: states to start from at every level but the last (those of an earlier, similar trajectory).
        eps: relative precision of the denoiser; None takes x's dtype's.
        watch: who is told how it goes, and whether it is to stop: a step then takes the evaluations of its guess only.
    """
    watch = watch or Watch()
    states: list[Tensor] = [x]
    known: list[tuple[float, Tensor]] = []  # ln(sigma / sigma_0) of the states solved last, and D there
    levels = levels_of(plan, x)
    residuals: list[Tensor] = []
    reasons: list[Tensor] = []
    evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    noise, unit = torch.zeros_like(rms(x)), rms(x)
    for step in reversed(plan.steps):
        left = fair_share(budget - evaluations, step)
        problem = step_problem(plan, step, denoiser, states[0], levels[step.index], tolerance(step), left, eps)
        if step.sigma_next == 0:
            guess, spent = Guess(states[0]), 0
        elif starts:
            guess, spent = Guess(starts[step.index]), 0
        elif known:
            guess, spent = forecast(problem, known, plan.sigmas[0]), 0
        else:
            guess, spent = raised(problem, denoiser), 1
        r = step.sigma_next / step.sigma
        problem = replace(problem, budget=left - spent, floor=(1.0 - r) * noise * unit, watch=watch)
        watch.note(solved=len(states) - 1, rounds=0, open=len(x))
        root = (solver if step.sigma_next else LEAST_CHANGE).solve(problem, guess)
        denoised = problem.denoised(root.u) if root.denoised is None else root.denoised
        if denoised is not None:
            known = [(math.log(step.sigma / plan.sigmas[0]), denoised), *known[:2]]
            unit = rms(denoised).clamp(min=torch.finfo(x.dtype).tiny)
        if root.floor is not None:
            met = root.floor / ((1.0 - r) * unit).clamp(min=torch.finfo(x.dtype).tiny)
            noise = torch.where(met <= CREDIBLE, noise.maximum(met), noise)
            stalled = (met > CREDIBLE) & (root.reason == Reason.PRECISION)
            root = replace(root, reason=torch.where(stalled, int(Reason.STALLED), root.reason))
        states.insert(0, root.u)
        residuals.insert(0, root.residual)
        reasons.insert(0, root.reason)
        evaluations += root.evaluations + spent
    watch.note(solved=len(plan.steps), open=0)
    return Trajectory(states, torch.stack(residuals), evaluations, torch.stack(reasons), noise)


def fair_share(left: Tensor, step: Step) -> Tensor:
    """Return what a step may spend of `left`, the evaluations that it and all noisier steps have together.

    It is twice the mean, since the noisier steps often take less, or more if each of them keeps `ENOUGH` calls. One
    evaluation of each of them is left in any case. What a step does not spend, others may.
    """
    cost = len(step.stages)
    mean = left.div(step.index + 1, rounding_mode="floor").clamp(max=2**60)
    return (2 * mean).maximum(left - ENOUGH * cost * step.index).minimum(left - step.index * cost)


def levels_of(plan: Plan, x: Tensor) -> tuple[Tensor, ...]:
    """Return the noise levels of every step's evaluations, shape (stages, batch) each, in one upload for the run."""
    every = stage_sigmas(plan.stage_levels, x)
    return every.split([len(step.stages) for step in plan.steps])


def step_problem(
    plan: Plan,
    step: Step,
    denoiser: BoundDenoiser,
    value: Tensor,
    levels: Tensor,
    tolerance: Tensor,
    budget: Tensor,
    eps: float | None = None,
) -> Problem:
    """Return the problem of one deterministic step without memory: which u does it take to `value`?

    Args:
        plan, step: the Plan, and the step of it.
        denoiser: of the batch.
        value: the state after the step, shape (batch, *event).
        levels: the step's own of `levels_of`.
        tolerance, budget, eps: see `Problem`.
    """

    def run(u: Tensor, index: Tensor) -> Tensor:
        rows = denoiser if len(index) == len(value) else denoiser.take(index)
        state, _ = advance(step, rows, {"x": u}, _no_noise, levels[:, : len(index)])
        return state["x"]

    alone = replace(plan, steps=(step,), sigmas=(step.sigma, step.sigma_next))
    return Problem(run, value, tolerance, budget, len(step.stages), eps, alone, denoiser)


def raised(problem: Problem, denoiser: BoundDenoiser) -> Guess:
    """Guess by an Euler step up, `u = y + (1 - r) / r (y - D(y, sigma))`; it takes one evaluation.

    It is DDIM inversion as published, D at the noisy level. If r is small it would overshoot, so r is taken at least
    1/4.
    """
    system, y = problem.couplings, problem.value
    r = max(system.r, 0.25)
    out = denoiser(y, stage_sigmas([system.noisiest], y)[0].clone())
    denoised = out.denoised if isinstance(out, Guided) else out
    start = y + (1.0 - r) / r * (y - denoised)
    mean = problem.denoised(start)
    return Guess(start, None if mean is None else mean[:, None].repeat_interleave(problem.cost, 1))


def forecast(problem: Problem, known: list[tuple[float, Tensor]], unit: float) -> Guess:
    """Guess by where the steps solved so far lead to, without an evaluation.

    D varies slowly along a run. It is extrapolated in ln(sigma / unit) through the last three solved states, to what
    the evaluations of this step will return; the step's linear part is then solved for u.
    """
    system, (places, values) = problem.couplings, zip(*known, strict=True)
    levels = [math.log(level / unit) for level in system.levels]
    expected = [_sum([lagrange(places, j, level) for j in range(len(known))], values) for level in levels]
    mean = _sum(system.weights.tolist(), expected)
    return Guess((problem.value - (1.0 - system.r) * mean) / system.r, torch.stack(expected, 1))


def _sum(weights: list[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total.add_(value, alpha=weight)
    return total


def contraction(plan: Plan, denoiser: BoundDenoiser, states: list[Tensor], eps: Tensor | None = None) -> Tensor:
    """Estimate `|I - F'|` at the states of a trajectory, per step and sample; shape (steps, batch).

    It is the factor by which a step of the published fixed-point iteration `u <- u + y - F(u)` changes an error: below
    1 it converges. Power iteration: three steps at the cleanest state, one at every other, from the direction found
    at the state before, one evaluation of F each. `F(u + d) - y` stands for `F' d`, as the states solve the steps.
    `eps`, shape (batch,), is the relative precision of the denoiser.
    """
    everyone, levels = torch.arange(len(states[0]), device=states[0].device), levels_of(plan, states[0])
    direction = white(0).bind(states[0][:1])(1.0, 0.0).expand_as(states[0])  # the same for every sample
    unlimited, factors = torch.full_like(everyone, 2**62), list[Tensor]()
    relative = (torch.finfo(states[0].dtype).eps if eps is None else eps) ** (1 / 3)
    for step in reversed(plan.steps):
        u, y = states[step.index], states[step.index + 1]
        problem = step_problem(plan, step, denoiser, y, levels[step.index], rms(y), unlimited)
        for _ in range(1 if factors else 3):
            size = rms(u).clamp(min=step.sigma) * relative / rms(direction)
            probe = direction * per_sample(size, u)
            direction = probe - (problem.function(u + probe, everyone) - y)
            factor = rms(direction) / rms(probe)
        factors.insert(0, factor)
    return torch.stack(factors)


def _no_noise(sigma_from: float, sigma_to: float) -> Tensor:
    raise AssertionError("a deterministic plan draws no noise")
