r"""`invert`: the latent that this sampler, on this schedule, maps to this image.

One-step rules are inverted step by step (`stepwise`). A multistep rule needs values at noisier states that are still
unknown, so its run is solved as a whole (`trajectory`). What that leaves is tried with the sampler as a black box: with
S its run, and E the run of Euler's method on the same schedule, whose inverse is had step by step (another one-step
sampler where Euler's does not do), z is sought with `S(E^{-1}(z)) = image`, by Anderson's acceleration of
`z <- z + image - S(E^{-1}(z))`. S is nearly singular, since it contracts whole regions of noise to one image, but so is
E, and `S E^{-1}` is close to the identity. Algebraically reversible rules are undone in closed form (`reversible`).

Every result is judged by sampling it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kinvert.analysis import amplification
from kinvert.checks import check_callback, check_values, is_integer
from kinvert.coordinates import settle
from kinvert.denoisers import Cfg, Denoiser, Masked, guide, step_cfg
from kinvert.engine import Callback, check_state
from kinvert.forms import State
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.choice import choose
from kinvert.inversion.job import UNLIMITED, Job
from kinvert.inversion.result import Inversion
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.solvers import Solver
from kinvert.inversion.step_by_step import step_by_step
from kinvert.inversion.stepwise import (
    Trajectory,
)
from kinvert.inversion.trajectory import Sweeps
from kinvert.inversion.verdict import ROWS, check_rows, rounding_note, tolerance
from kinvert.inversion.whole_run import whole_run
from kinvert.moments import check_flow_spread
from kinvert.parts import batch_parts
from kinvert.plan import Plan, as_schedule, compile_plan
from kinvert.ready import with_bar
from kinvert.rules import Rule
from kinvert.rules.names import unknown

LAST_STEPS = ("error", "least_change")


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str | Solver | Sweeps = "auto",
    last_step: str = "error",
    tol: float | None = None,
    max_evals: int | None = None,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
    fixed_batch: bool = False,
) -> Inversion:
    """Find the latent that a deterministic sampler maps to an image, to a tolerance, and check it.

    Args:
        denoiser, cfg, positive, negative: as in `sample`. The denoiser is a black box: it is called, never
            differentiated.
        x: image, shape (batch, *event): the state at `sigmas[-1]`.
        sigmas: the decreasing sampling schedule. It must end above 0, e.g. `sigmas[:-1]`: the step to 0 returns the
            denoised image and forgets x. See `last_step`.
        sampler: a deterministic sampler, by name or as a rule.
        method: root finder: "auto", "anderson", "newton", "continuation", "damped", "picard" (the published fixed
            point) or a `Solver`, for the steps one by one; "sweeps" or `Sweeps` for the run as a whole, which multistep
            samplers need. Reversible samplers are undone in closed form, by "auto" alone.
        last_step: what to do where the schedule ends in 0. "error" refuses; "least_change" looks for the state x that
            the denoiser maps to the image, `D(x, sigma) = image`, near the image where there are many. An image that
            is not in the range of D has none; the nearest result is returned and not called converged.
        tol: rms of `sample(latent) - x` to reach, in parts of the size of each image, `max(rms(x), sigmas[-1])`, both
            over the processed region; by default 1e-9 in float64, 1e-5 in float32 and 8 eps in half precision (0.0078
            in float16, 0.0625 in bfloat16). Where an adapter (`from_eps`, ...) calls its network in a coarser dtype,
            that dtype's default is taken, with a RuntimeWarning.
        max_evals: denoiser evaluations that one sample may cost, the check included; None sets no limit. With more of
            them no sample comes out worse: attempts of 2, 5, 11, ... runs are made, as many as there are evaluations
            for, and the best is returned.
        mask: 1 = invert, 0 = keep x, as in `unsample`; nothing between, at the resolution of x.
        callback: called after each step of the run that checks the result (for a multistep sampler, of one more run).
        progress: show a progress bar of that run.
        max_batch: the most samples that are inverted at once, one part of the batch after the other (each with its own
            check for `callback`). It bounds the memory, which is per sample, in tensors of x's size: the states of the
            run, and `2 window + 6` for Anderson's method, `2 krylov + 4` for Newton's, `2 window + 4` for every
            evaluation that sweeps solve for, of a step or of the run.
        fixed_batch: call the denoiser with one batch size only, `max_batch` or else that of x, as CUDA graphs, TensorRT
            engines and pipelines of a fixed size need. By default the batch becomes a half, a quarter, ... of itself
            while samples finish. In both cases it is filled up with copies of one of its samples, which no sample's
            `evaluations` count.

    Returns:
        An `Inversion`. Where a sample could not be inverted, its `converged` is false, its latent the best one found,
        never worse than that of `unsample` without an offset ("picard" alone is run as published), and `restored` the
        nearest image that was reached; a RuntimeWarning says so, with the step and the smallest singular value of its
        derivative there. States in half precision are solved for in float32, and rounded once. For an algebraically
        reversible sampler `memory` belongs to the latent, and a RuntimeWarning comes before the run where rounding
        must be expected to grow beyond the tolerance.

    Raises:
        ValueError: a sampler that draws noise, has no Plan or forgets x in some step, with what to use instead; a
            method that would not be used for this sampler, with those that would; a denoiser that mixes the samples of
            its batch (the first two of a batch take four evaluations, which find out); any other input that cannot
            work.
        TypeError: as in `sample`.
    """
    x = check_image(x)
    check_callback(callback)
    if last_step not in LAST_STEPS:
        raise ValueError(unknown("last_step", last_step, LAST_STEPS))
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, falling(schedule))
    check_invertible(plan, last_step)
    check_flow_spread(plan, coordinates)
    solver = choose(method, plan)
    network: torch.dtype = getattr(denoiser, "network_dtype", None) or x.dtype
    goal = tolerance(tol, x, network=network)
    limit = _limit(max_evals, plan)
    bound: Any = guide(denoiser, step_cfg(cfg, schedule), positive, negative, pair=plan.is_guided)
    if mask is not None:
        bound = Masked(bound, mask, x, coordinates=coordinates)
        _check_hard(bound.mask)
    region = None if mask is None else bound.mask.expand_as(x)
    notes = rounding_note(tol, goal, x, network)
    if progress:
        callback = with_bar(callback, f"check {plan.rule.name}", len(plan.steps), plan.sigmas[-1])
    indices = batch_parts(x, max_batch)
    largest = max_batch if fixed_batch and max_batch else len(indices[0])
    rows = FewBatches(bound, largest if fixed_batch else 2, fixed=True)
    asked = check_rows(rows, x[:1] if fixed_batch and largest == 1 else x, plan.sigmas)
    parts = []
    for index in indices:
        part = FewBatches(bound.select(index, len(x)), largest, fixed_batch)
        inside = None if region is None else region[index]
        job = Job(plan, part, x[index], goal, limit, callback, index, inside, network=network)
        parts.append(_invert(job, solver))
    found = Inversion.join(parts)
    return replace(found, evaluations=found.evaluations + asked, row_checks=asked, warnings=(*notes, *found.warnings))


def _invert(job: Job, solver: Solver | Sweeps) -> Inversion:
    if job.plan.auxiliary:
        return _undo(job)
    if job.plan.is_multistep or isinstance(solver, Sweeps):
        return whole_run(job, solver if isinstance(solver, Sweeps) else Sweeps())
    return step_by_step(job, solver)


def _undo(job: Job) -> Inversion:
    """Undo an algebraically reversible sampler in closed form."""
    plan, x = job.plan, job.wide
    # Two digits of each sample's size, in units of a noise level, will do.
    sizes = {float(f"{size:.1e}") for size in (job.judge.size / plan.sigmas[0]).tolist()}
    # Around one image the data are narrower than as a whole: a tenth predicts what was measured of trained networks.
    growth = max(max(amplification(plan, std=0.1 * size * plan.sigmas[0])) for size in sizes)
    rounding = growth * job.eps
    notes = []
    if rounding > job.tol:
        notes.append(
            f"{plan.rule.name} magnifies rounding about {growth:.2g} times on this schedule: expect errors of "
            f"{rounding:.2g} of the image's size in {job.x.dtype}, more than the tolerance {job.tol:.2g}; use a higher "
            "precision or fewer steps"
        )
        warnings.warn(notes[0], RuntimeWarning, stacklevel=5)
    everyone = torch.arange(len(x), device=x.device)
    undone = invert_reversible(plan, job.select(everyone), x)
    restored = job.again(undone.latent, undone.memory)
    error = job.error(restored)
    lost = (error > job.tol * job.judge.size).nonzero()[:, 0].tolist()
    notes += [f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}" for i in lost]
    spent = torch.full_like(everyone, undone.evaluations + plan.closed.evaluations)
    none = x.new_zeros(1, len(x))  # nothing was solved, so nothing is left over
    found = Trajectory([undone.latent], none, spent)
    checking = plan.closed.evaluations
    memory = {name: value.to(job.x.dtype) for name, value in undone.memory.items()}
    return job.result(found, restored, notes, checking=checking, memory=memory, amplification=growth)


def _check_hard(mask: Tensor) -> None:
    """Raise ValueError for a soft mask: between 0 and 1 `sample` mixes in noise that depends on the latent."""
    soft = mask[(mask != 0) & (mask != 1)]
    if soft.numel():
        raise ValueError(
            f"mask must be 0 or 1 everywhere to invert a run with it, got {soft.numel()} values between, such as "
            f"{float(soft[0]):.3g}, as x sees it; give a hard mask of x's own resolution, e.g. (mask > 0.5)"
        )


def check_image(x: Any) -> Tensor:
    """The image `x` as a plain tensor; TypeError or ValueError where it has no event, or no values, to solve for."""
    x = check_state(x)
    check_values("x", x, "an inversion is made of them")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must have shape (batch, *event) with values in each event, got {tuple(x.shape)}")
    return x


def falling(sigmas: Any) -> tuple[float, ...]:
    """The schedule as floats; ValueError where it rises."""
    schedule = as_schedule(sigmas)
    if schedule[0] < schedule[-1]:
        raise ValueError("sigmas must be the decreasing sampling schedule, got a rising one; use sigmas.flip(0)")
    return schedule


def check_invertible(plan: Plan, last_step: str | None = None) -> None:
    """Raise ValueError where the run of a Plan cannot be inverted."""
    name = plan.rule.name
    fix = (
        f"ki.sampler({name!r}, eta=0)" if "eta" in plan.rule.noise_options else "a deterministic sampler such as 'heun'"
    )
    if plan.is_stochastic:
        raise ValueError(
            f"cannot invert {name}: it draws noise {plan.draws} times, so an image has a latent only together with its "
            f"noises; use extract_noise, or {fix}"
        )
    if all(step.x.alias() == State("x") for step in plan.steps):  # its last, here its only, step is discarded
        raise ValueError(
            f"cannot invert {name} from sigma {plan.sigmas[0]:g} to {plan.sigmas[-1]:g}: its run leaves x as it is; "
            "give a longer schedule, or leave out keep_last=False, which discards the last step"
        )
    for step in plan.steps:
        if step.forgets_x and not (step.sigma_next == 0 and last_step == "least_change"):
            hint = f"use {fix}"
            if step.sigma_next == 0:
                hint = "stop at sigma_min > 0, e.g. sigmas[:-1]"
                hint += ', or ask for last_step="least_change"' if last_step else ""
            raise ValueError(
                f"cannot invert the step of {name} from sigma {step.sigma:g} to {step.sigma_next:g}: x has "
                f"coefficient 0 there; {hint}"
            )


def _limit(max_evals: int | None, plan: Plan) -> int:
    """What a sample may cost, but for the evaluations of `check_rows`."""
    if max_evals is None:
        return UNLIMITED
    least = 2 * plan.evaluations + 1 + ROWS
    if not is_integer(max_evals) or max_evals < least:
        raise ValueError(
            f"max_evals must be an int of at least {least}, a run up, one down to check it and {1 + ROWS} more, "
            f"got {max_evals!r}"
        )
    return int(max_evals) - ROWS
