r"""The two questions, asked of one cell. With `S` the sampler and `M` the method:

* *reconstruction*: an image x, the latent `z = M(x)`, and `S(z)` against x;
* *recovery*: a latent z, the image `x = S(z)`, and `M(x)` against z.

Both run between the largest and the smallest level of a schedule, which is above 0, so that every method starts and
ends where it says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

import kinvert as ki
from kinvert.bench.grid import Cell
from kinvert.bench.methods import Counted, Found, Job, find, generate, restore
from kinvert.bench.problems import Problem, is_built_in, make_problem
from kinvert.bench.tasks import computing_with
from kinvert.checks import is_integer
from kinvert.noise import derived_seed


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that happened in a cell.

    Attributes:
        job: what the method was given.
        found: what it found.
        image: the image that was inverted.
        latent: the latent that was found (reconstruction) or started from (recovery).
        result: what to compare with `image` (reconstruction) or `latent` (recovery).
        sampling_evaluations: denoiser evaluations per sample of S.
        up, down: states by noise level, on the way up and on the way down, as far as they were seen.
    """

    job: Job
    found: Found
    image: Tensor
    latent: Tensor
    result: Tensor
    sampling_evaluations: list[int]
    up: dict[float, Tensor]
    down: dict[float, Tensor]


def answer(cell: Cell, problem: Problem) -> Run:
    """Ask a cell's question.

    Raises:
        ValueError, TypeError: what the library refuses; a latent that is not finite.
    """
    run = (_reconstruct if cell.question == "reconstruction" else _recover)(cell, problem)
    if bad := int((~torch.isfinite(run.found.latent)).sum()):
        raise ValueError(f"the latent has {bad} NaN or infinite values of {run.latent.numel()}")
    return run


@contextmanager
def alone(cell: Cell) -> Iterator[None]:
    """Random numbers from the cell's seed, no gradients, one thread for a model that comes with kinvert, and no
    warnings: what kinvert's say is in the results.
    """
    threads = computing_with(1 if is_built_in(cell.model) else None)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), threads:
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.filterwarnings("ignore", ".torch.jit.script")  # torch's own, at the first forward-mode derivative
        torch.manual_seed(derived_seed("bench", cell.seed))  # not the stream that the images and latents come from
        yield


def check_threads(threads: int | None, cells: Iterable[Cell]) -> None:
    """Refuse a number of threads that no cell would be computed with.

    Raises:
        ValueError: that is no number of threads; models that all come with kinvert.
    """
    if threads is None:
        return
    if not is_integer(threads) or threads < 1:
        raise ValueError(f"threads must be a positive int, or None to leave torch's, got {threads!r}")
    models = sorted({cell.model for cell in cells})
    if models and all(is_built_in(model) for model in models):
        raise ValueError(
            f"threads is for models of your own, got {threads} for {', '.join(models)}; what comes with kinvert is "
            "computed with one thread, so that records are equal to the byte: leave threads out"
        )


def job_of(cell: Cell, problem: Problem) -> Job:
    """What a method is given in a cell."""
    guidance = {"cfg": cell.cfg, "positive": problem.positive, "negative": problem.negative}
    sigmas = ki.schedule(cell.schedule, cell.steps + 1, problem.levels)
    positive = tuple(sigma for sigma in sigmas.tolist() if sigma > 0)
    return Job(Counted(problem.denoiser), positive, cell.rule, guidance, cell.question, cell.seed)


@lru_cache(maxsize=4)
def problem_of(model: str, count: int, seed: int, dtype: str) -> Problem:
    """The problem of a cell, kept for the next ones."""
    return make_problem(model, count, seed, getattr(torch, dtype))


def _reconstruct(cell: Cell, problem: Problem) -> Run:
    job, image = job_of(cell, problem), problem.images
    found = find(cell.method, job, image)
    down = replace(job, states={})
    result, spent = restore(down, found)
    up, down_states = job.states | {job.sigmas[0]: found.latent}, down.states | {job.sigmas[-1]: result}
    return Run(job, found, image, found.latent, result, spent, up, down_states)


def _recover(cell: Cell, problem: Problem) -> Run:
    down = job_of(cell, problem)
    generator = torch.Generator().manual_seed(cell.seed)  # float64: the same noise in every dtype
    noise = torch.randn(problem.images.shape, generator=generator, dtype=torch.float64)
    latent = (down.sigmas[0] * noise).to(problem.images)
    image, memory, spent = generate(down, latent)
    job = replace(down, memory=memory, states={})
    found = find(cell.method, job, image)
    up, down_states = job.states | {job.sigmas[0]: found.latent}, down.states | {job.sigmas[-1]: image}
    return Run(job, found, image, latent, found.latent, spent, up, down_states)
