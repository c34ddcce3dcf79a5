r"""Distance to the true latent, for problems whose denoiser is exact.

With `O` the solution of the probability-flow ODE from the image up (`kinvert.reference`), z the latent that a method
finds, Z the one that it finds in float64, and E the sampler's exact inverse in float64,

    z - O = (z - Z) + (Z - E) + (E - O):      round-off, solver, discretisation.

All are root mean squares per sample, divided by the largest sigma. A recovery has a true image instead: the ODE's,
from the latent down.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.bench.grid import Cell
from kinvert.bench.methods import find
from kinvert.bench.problems import Problem
from kinvert.bench.questions import Run, job_of, problem_of
from kinvert.reference import solve_ode
from kinvert.tensors import rms


def truth(cell: Cell, run: Run) -> dict[str, Tensor]:
    """`distance_to_ode`; of reconstructions with deterministic samplers also its three parts, each of shape (batch,).

    Where the exact inverse was not found, solver and discretisation are NaN.
    """
    plan, (high, low) = run.job.plan, (run.job.sigmas[0], run.job.sigmas[-1])
    if plan is None or plan.is_stochastic:
        return {}
    if cell.question == "recovery":
        ode = _solve(_bare(cell), high, low, upwards=False)
        return {"distance_to_ode": rms(run.image.double() - ode)}
    ode, (exact, known) = _solve(_bare(cell), high, low, upwards=True), _exact_inverse(replace(cell, method="invert"))
    latent = run.latent.double()
    fine = latent if cell.dtype == "float64" else _fine_latent(cell)
    distances = {
        "distance_to_ode": rms(latent - ode),
        "discretisation": rms(exact - ode).where(known, torch.nan),
        "solver": rms(fine - exact).where(known, torch.nan),
        "round_off": rms(latent - fine),
    }
    return {name: value / high for name, value in distances.items()}


def _bare(cell: Cell) -> Cell:
    """The cell as far as the ODE depends on it."""
    return Cell(model=cell.model, cfg=cell.cfg, dtype=cell.dtype, seed=cell.seed, count=cell.count)


def _wide(cell: Cell) -> Problem:
    """The problem in float64, with the images as the cell's dtype has them."""
    images = problem_of(cell.model, cell.count, cell.seed, cell.dtype).images
    return replace(problem_of(cell.model, cell.count, cell.seed, "float64"), images=images.double())


@lru_cache(maxsize=8)
def _solve(cell: Cell, high: float, low: float, *, upwards: bool) -> Tensor:
    problem = _wide(cell)
    guidance: dict[str, Any] = {"cfg": cell.cfg, "positive": problem.positive, "negative": problem.negative}
    if upwards:
        return solve_ode(problem.denoiser, problem.images, low, high, **guidance)
    noise = torch.randn(problem.images.shape, generator=torch.Generator().manual_seed(cell.seed), dtype=torch.float64)
    latent = (high * noise).to(getattr(torch, cell.dtype))
    return solve_ode(problem.denoiser, latent, high, low, **guidance)


@lru_cache(maxsize=8)
def _exact_inverse(cell: Cell) -> tuple[Tensor, Tensor]:
    """The sampler's exact inverse in float64, and for which samples it was found."""
    problem = _wide(cell)
    job = job_of(cell, problem)
    found = ki.invert(job.denoiser, problem.images, job.sigmas, sampler=job.sampler, **job.guidance)
    return found.latent, found.converged


def _fine_latent(cell: Cell) -> Tensor:
    """What the cell's method finds in float64."""
    problem = _wide(cell)
    return find(cell.method, job_of(cell, problem), problem.images).latent
