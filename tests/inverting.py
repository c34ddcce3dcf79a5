"""What the tests of inversion share: images, schedules, and problems for root finders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide
from kinvert.inversion import Guess, Problem
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.steps import levels_of, step_problem
from kinvert.inversion.task import UNLIMITED, Task

MIXTURE = mixture()
UNBOUNDED = 10**6
"""A budget that no search of these tests spends."""


def schedule(steps: int) -> Tensor:
    """So many steps from sigma 10 to 0.1."""
    return ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]


def images(count: int = 6) -> Tensor:
    """Six values each, float64."""
    return 0.8 * noise_like((count, 6), seed=5)


def problem_of(function: Callable[[Tensor, Tensor], Tensor], y: Tensor, tolerance: float = 1e-12) -> Problem:
    """Return the problem `function(u, index) = y`."""
    return Problem(function, y, y.new_full((len(y),), tolerance), torch.full((len(y),), UNBOUNDED))


def problem_of_step(
    sampler: str, sigma: float, sigma_next: float, y: Tensor, denoiser: Any = MIXTURE, tolerance: float = 1e-12
) -> Problem:
    """Return the problem of one step of a sampler that ends at y."""
    plan, bound = ki.compile_plan(sampler, [sigma, sigma_next]), guide(denoiser, batch=len(y))
    budget = torch.full((len(y),), UNBOUNDED)
    return step_problem(plan, plan.steps[0], bound, y, levels_of(plan, y)[0], y.new_full((len(y),), tolerance), budget)


def task_of(
    plan: ki.Plan, x: Tensor, tol: float, denoiser: Any = MIXTURE, limit: int = UNLIMITED, **options: Any
) -> Task:
    """Return the task to invert the run of a Plan that ends at x."""
    return Task(
        plan, FewBatches(guide(denoiser, batch=len(x)), len(x)), x, tol, limit, None, torch.arange(len(x)), **options
    )


def guess_of_run(plan: ki.Plan, x: Tensor) -> Guess:
    """Return the guess of a run whose evaluations all return x."""
    return Guess(x, x[:, None].expand(-1, plan.evaluations, *x.shape[1:]))
