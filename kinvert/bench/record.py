"""A cell becomes a record of plain numbers, and a few images.

Errors of a reconstruction are of the image; those of a recovery are of the latent, divided by the largest sigma. So are
all statistics of latents.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kinvert as ki
from kinvert import metrics
from kinvert.bench.editing import change_class
from kinvert.bench.grid import Cell
from kinvert.bench.methods import sees_states
from kinvert.bench.problems import Problem
from kinvert.bench.questions import Run, alone, answer, problem_of
from kinvert.bench.truth import truth
from kinvert.models import EmbeddedDenoiser
from kinvert.tensors import rms

KEPT = 4  # samples of which the arrays are kept
EDGES = np.linspace(-5.0, 5.0, 51)  # of the histogram of latent / sigma


def measure(cell: Cell) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure a cell.

    Returns:
        The record, and the tensors that go with it ("image", "latent" and "restored", the first few, float32; none
        where they are no images). What the library refuses is in the record's "error".
    """
    names = ("inversion_evaluations", "sampling_evaluations", "converged", "trajectory", "residuals", "latent", "error")
    with alone(cell):
        record = {"key": cell.key, "cell": cell.settings, "metrics": {}, "versions": versions(), **dict.fromkeys(names)}
        try:
            problem = problem_of(cell.model, cell.count, cell.seed, cell.dtype)
            run = answer(cell, problem)
            figures = _metrics(cell, problem, run)
        except (ValueError, TypeError, NotImplementedError) as error:  # the last is torch's, of a dtype
            return record | {"error": str(error)}, {}
    record |= {
        "metrics": figures,
        "inversion_evaluations": run.found.evaluations,
        "sampling_evaluations": run.sampling_evaluations,
        "converged": run.found.converged,
        "trajectory": _trajectory(run),
        "residuals": _residuals(run),
        "latent": _distribution(run),
    }
    kept = {"image": run.image, "latent": run.latent, "restored": run.result}
    arrays = {name: value[:KEPT].float().cpu().contiguous() for name, value in kept.items()}
    return record, arrays if run.image.ndim == 4 else {}


def versions() -> dict[str, str]:
    """What the numbers may depend on besides the cell: `threads` are torch's, now."""
    return {
        "kinvert": ki.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def _metrics(cell: Cell, problem: Problem, run: Run) -> dict[str, list[float]]:
    sigma = run.job.sigmas[0]
    if cell.question == "reconstruction":
        values = metrics.reconstruction_metrics(run.result.double(), run.image.double(), problem.data_range)
    else:
        pair = run.result.double() / sigma, run.latent.double() / sigma
        values = {"mse": metrics.mse(*pair), "nmse_db": metrics.nmse(*pair), "max_error": metrics.max_error(*pair)}
    values |= metrics.latent_metrics(run.found.latent, sigma, run.image)
    if cell.question == "reconstruction" and isinstance(problem.denoiser, EmbeddedDenoiser):
        values |= _edit(problem.denoiser, problem.positive["label"], run)
    if problem.exact:
        values |= truth(cell, run)
    return {name: value.tolist() for name, value in values.items()}


def _edit(denoiser: EmbeddedDenoiser, label: Tensor, run: Run) -> dict[str, Tensor]:
    """The latents are sampled with the next class instead of the image's, their noises as they were found."""
    target, noises = (label + 1) % denoiser.num_classes, run.found.noises
    changed = change_class(
        denoiser, run.found.latent, run.image, target, run.job.sigmas,
        sampler=run.found.sampler or run.job.sampler,
        cfg=run.job.guidance["cfg"], noise=ki.noise.replay(noises) if noises else None,
    )  # fmt: skip
    return changed.measured


def _trajectory(run: Run) -> dict[str, list[float]] | None:
    """How far the states on the way up and on the way down are apart, by noise level; the median over the samples."""
    levels = [sigma for sigma in run.job.sigmas if sigma in run.up and sigma in run.down]
    if len(levels) <= 2 or not sees_states(run.job):  # the ends are always there
        return None
    error = [float(rms(run.up[sigma].double() - run.down[sigma].double()).median()) for sigma in levels]
    return {"sigma": levels, "error": error}


def _residuals(run: Run) -> dict[str, list[float]] | None:
    """What each step left unsolved, by its upper noise level; the median over the samples."""
    left = run.found.residuals
    if left is None:
        return None
    return {"sigma": list(run.job.sigmas[:-1]), "error": left.double().median(1).values.tolist()}


def _distribution(run: Run) -> dict[str, Any]:
    """Histogram of latent / sigma over all samples, the tails in the outermost bins; and its spectrum, of images."""
    z = run.found.latent.double().cpu() / run.job.sigmas[0]
    counts, _ = np.histogram(z.clamp(EDGES[0], EDGES[-1]).numpy(), EDGES)
    spectrum = None
    if z.ndim == 4 and min(z.shape[2:]) >= 4:
        frequency, power = metrics.radial_spectrum(z)
        spectrum = {"frequency": frequency.tolist(), "power": power.mean(0).tolist()}
    return {"histogram": {"edges": EDGES.tolist(), "counts": counts.tolist()}, "spectrum": spectrum}
