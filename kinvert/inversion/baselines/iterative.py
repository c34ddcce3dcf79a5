"""Inversions that iterate on one equation a step: AIDI, ReNoise, and exact inversion of DPM-Solver++."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_count, check_positive, plain
from kinvert.denoisers import Denoiser, Guidance, guide
from kinvert.denoisers.buffers import call_to_keep
from kinvert.engine import stage_sigmas
from kinvert.forms import State
from kinvert.inversion.baselines.common import (
    Conditioning,
    certified,
    checked_plan,
    ddim_up,
    in_ve,
)
from kinvert.inversion.problem import Guess, Problem, Root, Search
from kinvert.inversion.result import Inversion
from kinvert.inversion.solvers import Anderson, Damped, Solver
from kinvert.inversion.steps import invert_steps
from kinvert.inversion.verdict import image_size, tolerance
from kinvert.plan import Plan, Step, compile_plan
from kinvert.rules import DPMpp2M, Euler, Rule
from kinvert.sampling import sample
from kinvert.tensors import rms

__all__ = ["Averaged", "aidi", "dpm_solver_inversion", "renoise"]


@in_ve
def aidi(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    iterations: int = 10,
    window: int = 0,
) -> Inversion:
    """AIDI: the fixed-point iteration `u <- x_b + (a - b) d(u, a)`, plain or accelerated.

    It starts at `ddim_inversion(at="noisy")`, and ends at the iterate that its last evaluation leads to, better or
    worse; it ends early where the residual is below the tolerance of `converged`. `residuals` are those of the iterate
    before, the last that are known. The publication's guidance, blended by attention maps, is left out.

    Args:
        iterations: evaluations a step after the first.
        window: differences that Anderson's acceleration uses (AIDI_A); 0 for the plain iteration.

    Source: Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion Inversion (2023), arXiv
    2309.04907.
    """
    iterations = check_count("iterations", iterations)
    window = check_count("window", window, 0)
    solver = Anderson(window=window, max_iterations=iterations, growth=math.inf, last=True)
    return _solved(denoiser, x, sigmas, Euler(), solver, cfg, positive, negative)


@in_ve
def renoise(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    iterations: int = 9,
    average: int = 2,
) -> Inversion:
    """ReNoise: the fixed-point iteration, and the mean of its last noise predictions in the end.

    The mean of iterates damps an oscillation; where the iteration converges it is no gain. Left out are the gradient
    steps that regularise the noise, and the noise correction, which makes any inversion exact by storing its error
    (`direct_inversion`). The released code averages other predictions, the first five, in its first step. `residuals`
    are those of the last iterate that was evaluated; the mean's own would take another evaluation.

    Args:
        iterations: evaluations a step after the first.
        average: how many of the last predictions the mean is of.

    Source: Garibi et al., ReNoise: Real Image Inversion Through Iterative Noising (2024), arXiv 2403.14602.
    """
    iterations = check_count("iterations", iterations)
    average = check_count("average", average)
    if average > iterations:
        raise ValueError(f"average must be at most iterations, {iterations}, got {average}")
    return _solved(denoiser, x, sigmas, Euler(), Averaged(iterations, average), cfg, positive, negative)


@dataclass(frozen=True)
class Averaged(Solver):
    """The fixed-point iteration `u <- u + f(u)`, `iterations` times, and the mean of the last `average` iterates."""

    iterations: int
    average: int

    def solve(self, problem: Problem, guess: Guess) -> Root:
        """See `Solver`; the tolerance plays no part."""
        search, iterates = Search(problem, guess.u), [guess.u]
        for _ in range(self.iterations):
            iterates.append(iterates[-1] + search.evaluate(iterates[-1], search.everyone))
        mean = torch.stack(iterates[-self.average :]).mean(0)
        search.put(search.everyone, mean, rms(iterates[-1] - iterates[-2]))
        return search.root()


@in_ve
def dpm_solver_inversion(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    order: Literal[1, 2] = 1,
    tau: float = 0.5,
    iterations: int = 100,
    substeps: int = 10,
) -> Inversion:
    r"""Exact inversion of DPM-Solver++, order 1 (DDIM) or 2 (2M): the forward step method `u <- u - tau (F(u) - x_b)`.

    The iterate that the last evaluation leads to is taken, and `residuals` are those of the one before. For order 2 the
    step also needs `D - D_prev`, which is taken from a fine DDIM inversion over this interval and the one above and
    kept fixed: `dpmpp_2m` is then inverted approximately, for any number of iterations. tau is halved when the residual
    grows; the released code has a fixed schedule that depends on the step, stops at a sum of squares of 1e-3, and
    returns what it has after 500 iterations without a word. Gradient descent, its other solver, is left out.

    Args:
        order: 1 for the sampler `euler`, 2 for `dpmpp_2m`.
        tau: length of the first step, above 0.
        iterations: evaluations that a step's equation may take.
        substeps: steps of the fine inversion in each interval, for order 2.

    Source: Hong et al., On Exact Inversion of DPM-Solvers (2023), arXiv 2311.18387, Algorithms 1 and 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (the sampler euler) or 2 (dpmpp_2m), got {order!r}")
    iterations = check_count("iterations", iterations)
    substeps = check_count("substeps", substeps)
    tau = check_positive("tau", tau)
    rule: Rule = Euler() if order == 1 else DPMpp2M()
    return _solved(
        denoiser, x, sigmas, rule, Damped(float(tau), iterations, last=True), cfg, positive, negative, substeps
    )


@torch.no_grad()
def _solved(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    rule: Rule,
    solver: Solver,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
    substeps: int = 1,
) -> Inversion:
    """Solve the Euler step at every level, from the image up; for 2M, of the state less the step's other terms."""
    plan, bound = checked_plan(x, rule, sigmas), guide(denoiser, cfg, positive, negative, batch=len(x))
    x = plain(x)

    def enough(step: Step) -> Tensor:
        """Return the share of a step in the run's tolerance, since errors add up; never less than rounding."""
        share = tolerance(None, x) / len(plan.steps) * size.clamp(min=step.sigma_next)
        return share.clamp(min=torch.finfo(x.dtype).eps * step.sigma)

    state, size = x, image_size(x, plan.sigmas)
    residuals: list[Tensor] = []
    evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    unlimited = torch.full_like(evaluations, torch.iinfo(torch.int64).max)
    for step in reversed(plan.steps):
        if step.x[State("D[-1]")]:  # of 2M, but its first step
            higher, start, cost = _second_order(plan, step, bound, state, substeps)
            target = state - higher
        else:
            target, start, cost = state, ddim_up(bound, state, step.sigma_next, step.sigma), 1
        euler = compile_plan(Euler(), (step.sigma, step.sigma_next))
        path = invert_steps(euler, bound, target, enough, solver, unlimited, [start])
        state = path.states[0]
        residuals.insert(0, path.residuals[0])
        evaluations += path.evaluations + cost
    return certified(plan, x, state, sample(bound, state, plan.sigmas, sampler=rule), evaluations, residuals)


def _second_order(plan: Plan, step: Step, denoiser: Guidance, x: Tensor, substeps: int) -> tuple[Tensor, Tensor, int]:
    """Return the term of 2M in `D - D_prev`, estimated from x at `step.sigma_next`; the state above; the cost."""
    levels = step.sigma_next, step.sigma, plan.sigmas[step.index - 1]
    states, denoised = [x], []
    for low, high in itertools.pairwise(levels):
        states.append(ddim_up(denoiser, states[-1], *np.geomspace(low, high, substeps + 1).tolist()))
        out: Any = call_to_keep(denoiser, states[-1], stage_sigmas([high], x)[0].clone())
        denoised.append(out)
    weight = -step.x[State("D[-1]")]
    return weight * (denoised[0] - denoised[1]), states[1], 2 * (substeps + 1)
