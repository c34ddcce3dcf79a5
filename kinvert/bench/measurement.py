r"""Measure one cell: run it, compute its metrics, and return a record of plain numbers and a few images.

With `S` the sampler and `M` the method, a cell asks one of two questions, or another of `kinvert.bench.questions`,
which begins as one of them:

* *reconstruction*: an image x, the latent `z = M(x)`, and `S(z)` against x;
* *recovery*: a latent z, the image `x = S(z)`, and `M(x)` against z.

All run between the largest and the smallest level of a schedule, which is above 0, so that every method starts and
ends at the same levels. Errors of a reconstruction are errors of the image. Errors of a recovery are errors of the
latent, divided by the largest sigma; so are all statistics of latents.

If the denoiser of a problem is exact, the probability-flow ODE gives the true latent, and `kinvert.reference` splits
the distance to it into round-off, solver and discretisation. A recovery has a true image instead: the ODE's, from the
latent down.
"""

from __future__ import annotations

import platform
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

import kinvert as ki
from kinvert import metrics
from kinvert.bench.answers import bit_metrics, density_metrics, true_edit, uniqueness
from kinvert.bench.grid import Cell
from kinvert.bench.methods import Counted, MethodResult, Setup, apply_method, generate, restore, sees_states
from kinvert.bench.problems import Problem, is_built_in, make_problem, on_device
from kinvert.bench.questions import QUESTIONS, Attack
from kinvert.editing import change_class
from kinvert.fidelity import is_image
from kinvert.jobs import computing_with
from kinvert.models import EmbeddedDenoiser, classifier
from kinvert.noise import derived_seed
from kinvert.reference import ErrorSplit, solve_ode
from kinvert.tensors import rms
from kinvert.torch_settings import changes, default_settings, loading, read_settings, tell_once

__all__ = ["CellRun", "isolated", "measure", "problem_of", "run_cell", "setup_of", "versions"]

KEPT = 4  # samples whose arrays are kept
SSIM_WINDOW = 11  # pixels: on images that are smaller than its window, SSIM is not the published measure
EDGES = np.linspace(-5.0, 5.0, 51)  # of the histogram of latent / sigma


def measure(cell: Cell) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure a cell.

    Returns:
        The record, and the tensors that go with it: "image", "latent" and "restored", the first few samples, float32.
        They are there for images only. If the library refuses the cell, the record's "error" says why.
    """
    names = ("inversion_evaluations", "sampling_evaluations", "converged", "trajectory", "residuals", "latent", "error")
    with isolated(cell):
        record = {"key": cell.key, "cell": cell.settings, "metrics": {}, "versions": versions(), **dict.fromkeys(names)}
        try:
            problem = problem_of(cell.model, cell.count, cell.seed, cell.dtype, cell.device)
            settings = read_settings()
            run = run_cell(cell, problem)
            values = _metrics(cell, problem, run)
            _refuse_changes(settings)
        except (ValueError, TypeError, NotImplementedError) as error:  # the last is torch's, for a dtype
            return record | {"error": str(error)}, {}
    record |= {
        "metrics": values,
        "inversion_evaluations": run.found.evaluations,
        "sampling_evaluations": run.sampling_evaluations,
        "converged": run.found.converged,
        "trajectory": _trajectory(cell.question, run),
        "residuals": _residuals(run),
        "latent": _distribution(run),
    }
    kept = {"image": run.image, "latent": run.latent, "restored": run.result}
    arrays = {name: value[:KEPT].float().cpu().contiguous() for name, value in kept.items()}
    return record, arrays if run.image.ndim == 4 else {}


def _refuse_changes(before: dict[str, Any]) -> None:
    """Raise ValueError if the measurement changed settings of torch: it may have done so for the first cell only."""
    if found := changes(before, read_settings()):
        raise ValueError(
            f"the model changed settings of torch while it computed ({'; '.join(found)}), so that its numbers may "
            "depend on what was computed before; set them back after each evaluation, or leave them alone"
        )


@contextmanager
def isolated(cell: Cell) -> Iterator[None]:
    """Isolate a measurement: torch's default settings, seeded random numbers, no gradients, no warnings, and threads.

    A model that comes with kinvert is computed with one thread. What kinvert's warnings say is in the results.

    Warns:
        RuntimeWarning: this process has other settings of torch than the defaults.
    """
    before = read_settings()
    with warnings.catch_warnings(), default_settings() as inside, torch.no_grad():
        if found := changes(inside, before):
            tell_once(
                f"results are computed with the default settings of torch, not with those here ({'; '.join(found)})"
            )
        warnings.filterwarnings("ignore", "(?!.*settings of torch)", RuntimeWarning)
        warnings.filterwarnings("ignore", ".torch.jit.script")  # torch's own, at the first forward-mode derivative
        with computing_with(1 if is_built_in(cell.model) else None), _seeded("bench", cell.seed):
            yield


@contextmanager
def _seeded(purpose: str, seed: int) -> Iterator[None]:
    """Seed all random numbers in the `with` block: not the stream that the images and latents come from."""
    states, start = (random.getstate(), np.random.get_state()), derived_seed(purpose, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def versions() -> dict[str, str]:
    """Return what the numbers may depend on besides the cell: versions, the machine, and torch's threads now."""
    return {
        "kinvert": ki.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


# -- running a cell ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class CellRun:
    """Everything that happened in a cell.

    Attributes:
        setup: what the method was given.
        found: what it found.
        image: the image that was inverted.
        latent: the latent that was found (reconstruction) or started from (recovery).
        result: what to compare with `image` (reconstruction) or `latent` (recovery).
        sampling_evaluations: denoiser evaluations of the sampler, per sample.
        up, down: states by noise level on the way up and on the way down, as far as the method showed them.
    """

    setup: Setup
    found: MethodResult
    image: Tensor
    latent: Tensor
    result: Tensor
    sampling_evaluations: list[int]
    up: dict[float, Tensor]
    down: dict[float, Tensor]


def run_cell(cell: Cell, problem: Problem) -> CellRun:
    """Run the sampler and the method of a cell, in the order that its question asks for.

    Raises:
        ValueError, TypeError: the library refuses the combination; the latent is not finite.
    """
    run = (_reconstruct if QUESTIONS[cell.question].start == "image" else _recover)(cell, problem)
    if bad := int((~torch.isfinite(run.found.latent)).sum()):
        raise ValueError(f"the latent has {bad} NaN or infinite values of {run.latent.numel()}")
    return run


@lru_cache(maxsize=4)
def problem_of(model: str, count: int, seed: int, dtype: str, device: str = "cpu") -> Problem:
    """Return the problem of a cell, and keep it for the next cells: it does not depend on the cell that needs it.

    Settings of torch that its module makes when it is imported, or its function, are set back, with a RuntimeWarning.
    """
    with loading(model), _seeded("bench problem", seed):
        problem = make_problem(model, count, seed, getattr(torch, dtype))
    return problem if device == "cpu" else on_device(problem, device)


def setup_of(cell: Cell, problem: Problem) -> Setup:
    """Return what a method is given in a cell."""
    sigmas = ki.schedule(cell.schedule, cell.steps + 1, problem.levels)
    positive = tuple(sigma for sigma in sigmas.tolist() if sigma > 0)
    question = "reconstruction" if QUESTIONS[cell.question].start == "image" else "recovery"
    return Setup(Counted(problem.denoiser), positive, cell.rule, _guidance(cell, problem), question, cell.seed)


def _guidance(cell: Cell, problem: Problem) -> dict[str, Any]:
    return {"cfg": cell.cfg, "positive": problem.positive, "negative": problem.negative}


def _reconstruct(cell: Cell, problem: Problem) -> CellRun:
    setup, image = setup_of(cell, problem), problem.images
    down = replace(setup, states={})
    if cell.question == "edit":
        setup, down = _edit_setups(setup, problem)
    elif cell.question == "density" and not problem.exact:  # the images are not yet states at the smallest level
        image = image + _starting_latent(cell, image, setup.sigmas[-1])
    found = apply_method(cell.method, setup, image)
    result, spent = restore(down, found)
    up, down_states = setup.states | {setup.sigmas[0]: found.latent}, down.states | {setup.sigmas[-1]: result}
    return CellRun(setup, found, image, found.latent, result, spent, up, down_states)


def _edit_setups(setup: Setup, problem: Problem) -> tuple[Setup, Setup]:
    """Return the way up, without guidance, and the way down, towards the target."""
    if problem.target is None or problem.truth is None:
        raise ValueError(
            "an edit is compared with the true answer, and this problem has none; give Problem(..., target=..., "
            "truth=...), or leave the question out"
        )
    source = {**setup.guidance, "cfg": 1.0}
    return replace(setup, guidance=source), replace(
        setup, guidance={**setup.guidance, "positive": problem.target}, states={}
    )


def _recover(cell: Cell, problem: Problem) -> CellRun:
    down, question = setup_of(cell, problem), QUESTIONS[cell.question]
    latent = _starting_latent(cell, problem.images, down.sigmas[0])
    image, memory, spent = generate(down, latent)
    setup = replace(down, memory=memory, states={})
    if question.is_blind:
        setup = _blind(cell, problem)
    if question.attack is not None:
        image = _attacked(question.attack, image, problem)
    found = apply_method(cell.method, setup, image)
    up, down_states = setup.states | {setup.sigmas[0]: found.latent}, down.states | {setup.sigmas[-1]: image}
    return CellRun(setup, found, image, latent, found.latent, spent, up, down_states)


def _blind(cell: Cell, problem: Problem) -> Setup:
    """Return what a method is given that knows nothing of how an image was made.

    It takes no conditioning (that of the unconditional branch, if there is one), no guidance, three steps for four of
    the sampler's, and "dpmpp_2m", or "euler" if the image was made by "dpmpp_2m".
    """
    sampler = "euler" if cell.sampler == "dpmpp_2m" else "dpmpp_2m"
    guess = replace(cell, sampler=sampler, options=(), steps=max(1, 3 * cell.steps // 4), cfg=1.0)
    none = problem.negative if problem.negative is not None else problem.positive
    return setup_of(guess, replace(problem, positive=none, negative=None))


def _attacked(attack: Attack, image: Tensor, problem: Problem) -> Tensor:
    """Return what is left of images after an attack.

    Raises:
        ValueError: they are no images with values from -1 to 1.
    """
    if not is_image(image, 2) or image.shape[1] not in (1, 3) or problem.data_range != 2:
        raise ValueError(
            "attacks are for images of one or three channels with values from -1 to 1, which the images of this "
            f"problem are not: shape {tuple(image.shape)}, data_range {problem.data_range:g}"
        )
    return attack(image)


def _starting_latent(cell: Cell, images: Tensor, sigma: float) -> Tensor:
    """Draw the latent that a recovery starts from, like `images`; it is the same noise in every dtype."""
    noise = torch.randn(
        images.shape, generator=torch.Generator().manual_seed(cell.seed), dtype=torch.float64, device="cpu"
    )
    return (sigma * noise).to(images)


# -- the parts of a record ---------------------------------------------------------------------------------------------
def _metrics(cell: Cell, problem: Problem, run: CellRun) -> dict[str, list[float]]:
    """Compute all metrics of a cell, one value for each sample."""
    values = _answer(cell, problem, run)
    values |= metrics.latent_metrics(run.found.latent, run.setup.sigmas[0], run.image)
    if cell.question == "reconstruction" and _is_judged(problem.denoiser):
        values |= _edit_metrics(problem.denoiser, problem.positive["label"], run)
    if not is_image(run.image, SSIM_WINDOW):
        values = {name: value for name, value in values.items() if name not in ("ssim", "edit_ssim")}
    if problem.exact and cell.question in ("reconstruction", "recovery"):
        values |= _distances_to_truth(cell, run)
    return {name: value.tolist() for name, value in values.items()}


def _answer(cell: Cell, problem: Problem, run: CellRun) -> dict[str, Tensor]:
    """Compute the metrics that a question is about."""
    if cell.question == "reconstruction":
        return metrics.reconstruction_metrics(run.result.double(), run.image.double(), problem.data_range)
    if cell.question == "density":
        return density_metrics(cell.method, run.setup, problem, run.image, run.found)
    if cell.question == "edit" and problem.truth is not None:
        return true_edit(run.result, run.image, problem.truth)
    sigma = run.setup.sigmas[0]
    pair = run.result.double() / sigma, run.latent.double() / sigma
    values = {"mse": metrics.mse(*pair), "nmse_db": metrics.nmse(*pair), "max_error": metrics.max_error(*pair)}
    values |= bit_metrics(*pair)
    return values | (uniqueness(run.setup, run.image, run.latent) if cell.question == "uniqueness" else {})


def _is_judged(denoiser: Any) -> TypeGuard[EmbeddedDenoiser]:
    """Return whether a classifier can tell how an edit went."""
    return isinstance(denoiser, EmbeddedDenoiser) and denoiser.name in classifier.NAMES


def _edit_metrics(denoiser: EmbeddedDenoiser, label: Tensor, run: CellRun) -> dict[str, Tensor]:
    """Sample the latents, with their noises, with the next class instead of the image's, and measure the edit."""
    target, noises = (label + 1) % denoiser.num_classes, run.found.noises
    changed = change_class(
        denoiser, run.found.latent, run.image, target, run.setup.sigmas,
        sampler=run.found.sampler or run.setup.sampler,
        cfg=run.setup.guidance["cfg"], noise=ki.noise.replay(noises) if noises else None,
    )  # fmt: skip
    return changed.measured


def _trajectory(question: str, run: CellRun) -> dict[str, list[float]] | None:
    """Compute how far the states on the way up and down are apart at each level, the median over the samples."""
    levels = [sigma for sigma in run.setup.sigmas if sigma in run.up and sigma in run.down]
    if question not in ("reconstruction", "recovery"):  # the two ways are not each other's reverse
        return None
    if len(levels) <= 2 or not sees_states(run.setup):  # the ends are always there
        return None
    error = [float(rms(run.up[sigma].double() - run.down[sigma].double()).median()) for sigma in levels]
    return {"sigma": levels, "error": error}


def _residuals(run: CellRun) -> dict[str, list[float]] | None:
    """Return what each step left unsolved, by its upper noise level, the median over the samples."""
    left = run.found.residuals
    if left is None:
        return None
    return {"sigma": list(run.setup.sigmas[:-1]), "error": left.double().median(1).values.tolist()}


def _distribution(run: CellRun) -> dict[str, Any]:
    """Compute the histogram of latent / sigma over all samples, and for images the spectrum.

    The outermost bins hold the tails.
    """
    z = run.found.latent.double().cpu() / run.setup.sigmas[0]
    counts, _ = np.histogram(z.clamp(EDGES[0], EDGES[-1]).numpy(), EDGES)
    spectrum = None
    if z.ndim == 4 and min(z.shape[2:]) >= 4:
        frequency, power = metrics.radial_spectrum(z)
        spectrum = {"frequency": frequency.tolist(), "power": power.mean(0).tolist()}
    return {"histogram": {"edges": EDGES.tolist(), "counts": counts.tolist()}, "spectrum": spectrum}


# -- the truth, where the denoiser is exact ----------------------------------------------------------------------------
def _distances_to_truth(cell: Cell, run: CellRun) -> dict[str, Tensor]:
    """Compute `distance_to_ode` and, for reconstructions, its three parts, each of shape (batch,).

    Samplers that draw noise have no true latent. For a sample whose exact inverse was not found, solver and
    discretisation are NaN.
    """
    plan, (high, low) = run.setup.plan, (run.setup.sigmas[0], run.setup.sigmas[-1])
    if plan is None or plan.is_stochastic:
        return {}
    kept = ("model", "cfg", "dtype", "seed", "count", "device")
    ode_cell = Cell(**{name: getattr(cell, name) for name in kept})
    if cell.question == "recovery":
        return {"distance_to_ode": rms(run.image.double() - _solve_down(ode_cell, high, low))}
    ode, (exact, known) = _solve_up(ode_cell, low, high), _exact_inverse(replace(cell, method="invert"))
    latent = run.latent.double()
    fine = latent if cell.dtype == "float64" else _fine_latent(cell)
    split = ErrorSplit.of(latent, fine, exact, ode, known)
    distances = {
        "distance_to_ode": split.total,
        "discretisation": split.discretisation.where(known, torch.nan),
        "solver": split.solver.where(known, torch.nan),
        "round_off": split.round_off,
    }
    return {name: value / high for name, value in distances.items()}


def _wide_problem(cell: Cell) -> Problem:
    """Return the problem in float64, with images that are rounded to the cell's dtype."""
    narrow = problem_of(cell.model, cell.count, cell.seed, cell.dtype, cell.device)
    return replace(problem_of(cell.model, cell.count, cell.seed, "float64", cell.device), images=narrow.images.double())


# The ODE and the exact inverse are the same for many cells. `ode_cell` has the settings that the ODE depends on.
@lru_cache(maxsize=8)
def _solve_up(ode_cell: Cell, low: float, high: float) -> Tensor:
    """Solve the ODE from the images up to the latents."""
    problem = _wide_problem(ode_cell)
    return solve_ode(problem.denoiser, problem.images, low, high, **_guidance(ode_cell, problem))


@lru_cache(maxsize=8)
def _solve_down(ode_cell: Cell, high: float, low: float) -> Tensor:
    """Solve the ODE from the latents of a recovery down to images."""
    problem = _wide_problem(ode_cell)
    narrow = problem_of(ode_cell.model, ode_cell.count, ode_cell.seed, ode_cell.dtype, ode_cell.device)
    latent = _starting_latent(ode_cell, narrow.images, high)
    return solve_ode(problem.denoiser, latent, high, low, **_guidance(ode_cell, problem))


@lru_cache(maxsize=8)
def _exact_inverse(cell: Cell) -> tuple[Tensor, Tensor]:
    """Return the sampler's exact inverse in float64, and for which samples it was found."""
    problem = _wide_problem(cell)
    setup = setup_of(cell, problem)
    found = ki.invert(setup.denoiser, problem.images, setup.sigmas, sampler=setup.sampler, **setup.guidance)
    return found.latent, found.converged


def _fine_latent(cell: Cell) -> Tensor:
    """Return the latent that the cell's method finds in float64."""
    problem = _wide_problem(cell)
    return apply_method(cell.method, setup_of(cell, problem), problem.images).latent
