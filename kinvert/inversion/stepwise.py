r"""The inverse of a one-step sampler: from the image up, one equation a step.

Step i of a Plan is a map `x_{i+1} = F_i(x_i)`. Given `x_{i+1}`, `F_i(u) = x_{i+1}` is solved for the noisier state u,
from the cleanest step to the noisiest. For the Euler step of an exact denoiser, `F(u) = r u + (1 - r) D(u)` with
`r = sigma_next / sigma`, D' = Cov[x0 | x] / sigma^2 is symmetric and positive semi-definite: F is the gradient of a
strongly convex function, and the solution exists and is unique. A learned denoiser, and guidance, void that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kinvert import linalg
from kinvert.coefficients import lagrange
from kinvert.denoisers import Guided
from kinvert.engine import advance, stage_sigmas
from kinvert.inversion.continuation import Continuation
from kinvert.inversion.solvers import Anderson, Equation, NewtonKrylov, Root, Select, Solver, StepEquation, gmres
from kinvert.inversion.trajectory import StepSweeps, equations
from kinvert.noise import white
from kinvert.plan import Plan, Step
from kinvert.tensors import rms

LEAST_CHANGE = NewtonKrylov(krylov=60, forcing=1e-9, max_iterations=30, halvings=10, least_change=True)
"""For a step to sigma = 0, `x' = D(x)`, which many states may solve: each iteration finds the whole change anew."""


@dataclass(eq=False)
class Trajectory:
    """States at every level of a run upwards, noisiest first, the residual rms of every step, and what it cost."""

    states: list[Tensor]
    residuals: Tensor
    evaluations: Tensor


def invert_steps(
    plan: Plan,
    select: Select,
    x: Tensor,
    tolerance: Callable[[Step], Tensor],
    solver: Solver,
    budget: Tensor,
    starts: list[Tensor] | None = None,
    eps: float | None = None,
) -> Trajectory:
    """Solve every step of a one-step Plan for the state before it, from the last step to the first.

    Args:
        plan: deterministic and without memory.
        select: the denoiser of some samples.
        x: the state at `plan.sigmas[-1]`, shape (batch, *event).
        tolerance: rms of the residual that is good enough for a step, shape (batch,).
        solver: root finder for each step.
        budget: evaluations that each sample may spend on the run, shape (batch,).
        starts: states to start from at every level but the last (those of an earlier, similar trajectory).
        eps: relative precision of the denoiser; None: that of x's dtype.
    """
    states: list[Tensor] = [x]
    said: list[tuple[float, Tensor]] = []  # ln(sigma / sigma_0) of the states solved last, and D there
    levels = levels_of(plan, x)
    residuals: list[Tensor] = []
    evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for step in reversed(plan.steps):
        cost = len(step.stages)
        left = budget - evaluations - step.index * cost  # the steps to come need one residual each
        alone = replace(plan, steps=(step,), sigmas=(step.sigma, step.sigma_next))
        function = step_map(step, select, levels[step.index])
        equation = StepEquation(alone, select, function, states[0], tolerance(step), left)
        equation.eps = eps or equation.eps
        if step.sigma_next == 0:
            start = states[0]
        elif starts:
            start = starts[step.index]
        else:
            start = forecast(equation, said, plan.sigmas[0]) if said else first_guess(equation)
        root = (solver if step.sigma_next else LEAST_CHANGE).solve(equation, start)
        denoised = equation.mean(root.u) if equation.said is None else equation.said
        said = [(math.log(step.sigma / plan.sigmas[0]), denoised), *said[:2]]
        states.insert(0, root.u)
        residuals.insert(0, root.residual)
        evaluations += equation.evaluations
    return Trajectory(states, torch.stack(residuals), evaluations)


def levels_of(plan: Plan, x: Tensor) -> tuple[Tensor, ...]:
    """The noise levels of every step's evaluations, shape (stages, batch) each: one upload for the whole run."""
    every = stage_sigmas(plan.stage_levels, x)
    return every.split([len(step.stages) for step in plan.steps])


def step_map(step: Step, select: Select, levels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`(u, index) -> F(u)` of one deterministic step without memory, with its own of `levels_of`."""

    def run(u: Tensor, index: Tensor) -> Tensor:
        state, _ = advance(step, select(index), {"x": u}, _no_noise, levels[:, : len(index)])
        return state["x"]

    return run


def first_guess(equation: StepEquation) -> Tensor:
    """Where to start from without a forecast: an Euler step up, `u = y + (1 - r) / r (y - D(y, sigma))`.

    It is DDIM inversion as published, D at the noisy level. Where r is small it would overshoot, so r is taken at least
    1/4.
    """
    y, r = equation.value, max(equation.r, 0.25)
    equation.evaluations += 1
    sigma = stage_sigmas([equation.plan.sigmas[0]], y)[0]
    out = equation.select(torch.arange(len(y), device=y.device))(y, sigma)
    denoised = out.denoised if isinstance(out, Guided) else out
    start = y + (1.0 - r) / r * (y - denoised)
    equation.forecast = equation.mean(start)[:, None].repeat_interleave(equation.cost, 1)
    return start


def forecast(equation: StepEquation, said: list[tuple[float, Tensor]], unit: float) -> Tensor:
    """Where the steps solved so far lead to, without an evaluation.

    What the denoiser says changes slowly from state to state: the polynomial in ln(sigma) through D at the last states
    that were solved tells what the evaluations of this step are expected to return, and that leads to a u. The unit
    of sigma is the one in which `said` is.
    """
    places, values = zip(*said, strict=True)
    levels = [math.log(stage.sigma / unit) for stage in equation.plan.steps[0].stages]
    expected = [_sum([lagrange(places, j, level) for j in range(len(said))], values) for level in levels]
    equation.forecast = torch.stack(expected, 1)
    mean = _sum(equations(equation.plan).weights.tolist(), expected)
    return (equation.value - (1.0 - equation.r) * mean) / equation.r


def _sum(weights: list[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total.add_(value, alpha=weight)
    return total


def contraction(plan: Plan, select: Select, states: list[Tensor], eps: float | None = None) -> Tensor:
    """Estimates of `|I - F'|` at the states of a trajectory, per step and sample; shape (steps, batch).

    It is the factor by which a step of the published fixed-point iteration `u <- u + y - F(u)` changes an error: below
    1 it converges. Power iteration: three steps at the cleanest state, one at every other, from the direction found
    at the state before, one evaluation of F each. `F(u + d) - y` stands for `F' d`, as the states solve the steps.
    `eps` is the relative precision of the denoiser.
    """
    everyone, levels = torch.arange(len(states[0]), device=states[0].device), levels_of(plan, states[0])
    direction = white(0).bind(states[0][:1])(1.0, 0.0).expand_as(states[0])  # whatever the others in the batch are
    factors: list[Tensor] = []
    for step in reversed(plan.steps):
        u, y, function = states[step.index], states[step.index + 1], step_map(step, select, levels[step.index])
        for _ in range(1 if factors else 3):
            shape = (-1, *(1,) * (u.ndim - 1))
            size = rms(u).clamp(min=step.sigma) * (eps or torch.finfo(u.dtype).eps) ** (1 / 3) / rms(direction)
            probe = direction * size.reshape(shape)
            direction = probe - (function(u + probe, everyone) - y)
            factor = rms(direction) / rms(probe)
        factors.insert(0, factor)
    return torch.stack(factors)


def smallest_singular_value(equation: Equation, u: Tensor, products: int) -> float:
    """An upper bound of the least singular value of F' at u, where the equation is that of one sample.

    It is the least stretch `|F' v| / |v|` over the Krylov space of the residual, the value itself once that space is
    the whole one. Near 0, F folds there, and no state nearby comes closer to y. NaN where F is not finite.
    """
    index = torch.zeros(1, dtype=torch.int64, device=u.device)
    f = equation.residual(u, index)

    def apply(v: Tensor, todo: Tensor) -> Tensor:
        return equation.derivative(u, f, v.reshape(u.shape), todo).flatten(1)

    images = gmres(apply, f.flatten(1), products, 0.0)[1]
    return linalg.singular_values(images[0])[-1] if images.isfinite().all() else math.nan


@dataclass(frozen=True)
class Auto(Solver):
    """Sweeps first; what they leave is tried by Anderson, by Newton from the best iterate, then by continuation.

    Sweeps are left out for a step whose evaluations depend on each other too much: where the rows of |C|, which bounds
    the factor of the fixed-point iteration for an exact denoiser (`trajectory`), add up to more than `coupling`.

    Continuation ends in a solution wherever the network is bounded (see `continuation`); the second attempt follows
    another curve, from the given value instead of the start, and more closely.
    """

    coupling: float = 2.0
    sweeps: StepSweeps = field(default_factory=StepSweeps)
    anderson: Anderson = field(default_factory=lambda: Anderson(window=10, max_iterations=40))
    newton: NewtonKrylov = field(default_factory=NewtonKrylov)
    continuation: Continuation = field(default_factory=Continuation)

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        root = Root(start.clone(), start.new_full((len(start),), math.inf))
        if isinstance(equation, StepEquation) and equations(equation.plan).coupling <= self.coupling:
            root = self.sweeps.solve(equation, start)
        attempts = (
            (self.anderson, root.u),
            (self.newton, root.u),
            (self.continuation, start),
            (self.continuation.finer(), equation.value),
        )
        for solver, origin in attempts:
            index = equation.open(torch.arange(len(start), device=start.device), root.residual)
            if not len(index):
                break
            part = equation.part(index)
            found = solver.solve(part, origin[index])
            equation.evaluations[index] += part.evaluations
            better = index[root.keep(index, found.u, found.residual)]
            if isinstance(equation, StepEquation) and equation.said is not None:
                equation.said[better] = equation.mean(root.u)[better]
        return root


def _no_noise(sigma_from: float, sigma_to: float) -> Tensor:
    raise AssertionError("a deterministic plan draws no noise")
