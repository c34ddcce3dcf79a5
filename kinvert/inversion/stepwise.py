r"""The inverse of a one-step sampler: from the image up, one equation a step.

Step i of a Plan is a map `x_{i+1} = F_i(x_i)`. Given `x_{i+1}`, `F_i(u) = x_{i+1}` is solved for the noisier state u,
from the cleanest step to the noisiest. For the Euler step of an exact denoiser, `F(u) = r u + (1 - r) D(u)` with
`r = sigma_next / sigma`, D' = Cov[x0 | x] / sigma^2 is symmetric and positive semi-definite: F is the gradient of a
strongly convex function, and the solution exists and is unique. A learned denoiser, and guidance, void that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser, Guided
from kinvert.engine import advance, stage_sigmas
from kinvert.inversion.solvers import Anderson, Equation, NewtonKrylov, Root, Solver
from kinvert.plan import Plan, Step

Select = Callable[[Tensor], Denoiser]
"""The denoiser of some samples of the batch: `select(index)` with index of shape (n,)."""


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
    """
    states: list[Tensor] = [x]
    residuals: list[Tensor] = []
    evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for step in reversed(plan.steps):
        cost = len(step.stages)
        left = budget - evaluations - step.index * (cost + 1)  # the steps to come need a start and one residual each
        equation = Equation(step_map(step, select, x), states[0], tolerance(step), left, cost)
        root = solver.solve(equation, starts[step.index] if starts else first_guess(step, select, equation))
        states.insert(0, root.u)
        residuals.insert(0, root.residual)
        evaluations += equation.evaluations
    return Trajectory(states, torch.stack(residuals), evaluations)


def step_map(step: Step, select: Select, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`(u, index) -> F(u)` of one deterministic step without memory."""
    levels = stage_sigmas([stage.sigma for stage in step.stages], like)

    def run(u: Tensor, index: Tensor) -> Tensor:
        state, _ = advance(step, select(index), {"x": u}, _no_noise, levels[:, : len(index)])
        return state["x"]

    return run


def first_guess(step: Step, select: Select, equation: Equation) -> Tensor:
    """An Euler step up with D at the noisy level: `y + (1 - r) / r (y - D(y, sigma))`, r = sigma_next / sigma.

    It is DDIM inversion as published. Where r is small it would overshoot, so r is taken at least 1/4.
    """
    y, r = equation.value, max(step.sigma_next / step.sigma, 0.25)
    equation.evaluations += 1
    out = select(torch.arange(len(y), device=y.device))(y, stage_sigmas([step.sigma], y)[0])
    denoised = out.denoised if isinstance(out, Guided) else out
    return y + (1.0 - r) / r * (y - denoised)


@dataclass(frozen=True)
class Auto(Solver):
    """Anderson first; what it leaves is tried by Newton from the best iterate, then along a homotopy.

    The homotopy solves `(1 - s) u + s F(u) = y` for s up to 1: an Euler step whose end moves from its start to
    sigma_next. What is left then has no solution that could be found; the best iterate is returned.
    """

    anderson: Anderson = field(default_factory=lambda: Anderson(max_iterations=40))
    newton: NewtonKrylov = field(default_factory=NewtonKrylov)
    path: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.0)

    def solve(self, equation: Equation, start: Tensor) -> Root:
        """See `Solver`."""
        root = self.anderson.solve(equation, start)
        for attempt in (self.newton.solve, self._homotopy):
            index = equation.open(torch.arange(len(start), device=start.device), root.residual)
            if not len(index):
                break
            part = equation.part(index)
            found = attempt(part, root.u[index])
            equation.evaluations[index] += part.evaluations
            root.keep(index, found.u, found.residual)
        return root

    def _homotopy(self, equation: Equation, start: Tensor) -> Root:
        everyone = torch.arange(len(start), device=start.device)
        u, root = equation.value, Root(start, torch.full_like(equation.tolerance, torch.inf))
        for s in self.path:

            def blended(v: Tensor, index: Tensor, s: float = s) -> Tensor:
                return (1.0 - s) * v + s * equation.function(v, index)

            part = equation.part(everyone, blended)
            root = self.newton.solve(part, self.anderson.solve(part, u).u)
            equation.evaluations += part.evaluations
            u = root.u
        return root


def _no_noise(sigma_from: float, sigma_to: float) -> Tensor:
    raise AssertionError("a deterministic plan draws no noise")
