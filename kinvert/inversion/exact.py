r"""`invert`: the latent that this sampler, on this schedule, maps to this image.

Check the input, choose a route and a root finder (`routes`), solve, and certify by sampling the latent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_callback, check_choice, check_decreasing, check_values, is_integer
from kinvert.coordinates import settle
from kinvert.denoisers import BoundDenoiser, Cfg, Denoiser, Masked, guide, step_cfg
from kinvert.engine import Callback, check_state, drawn_noises
from kinvert.forms import State
from kinvert.inversion.back import WayBack
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.certificate import certify
from kinvert.inversion.result import Inversion
from kinvert.inversion.routes import choose
from kinvert.inversion.solvers import Solver
from kinvert.inversion.task import Task, default_runs
from kinvert.inversion.verdict import ROWS, check_guidance, check_rows, rounding_note, tolerance
from kinvert.inversion.watching import Watcher, looking_on
from kinvert.moments import check_flow_spread
from kinvert.noise import Noise
from kinvert.parts import batch_parts
from kinvert.plan import Plan, as_schedule, compile_plan
from kinvert.rules import Rule
from kinvert.rules.base import switched_off
from kinvert.sampling import without_graph
from kinvert.telling import warn_user

__all__ = ["check_image", "check_invertible", "falling", "invert"]

LAST_STEPS = ("error", "least_change")


@without_graph("found.differentiable(denoiser, x), which gives the latent its exact gradient")
def invert(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str | Solver = "auto",
    last_step: str = "error",
    tol: float | None = None,
    max_evals: int | None = None,
    check: bool = True,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    watch: Watcher | None = None,
    progress: bool = False,
    max_batch: int | None = None,
    fixed_batch: bool = False,
) -> Inversion:
    """Find the latent that a sampler maps to an image, to a tolerance, and check it.

    Args:
        denoiser, cfg, positive, negative: as in `sample`. The denoiser is a black box: it is called, never
            differentiated. The latent has no graph; `found.differentiable(denoiser, x)` gives it its exact gradient.
        x: image, shape (batch, *event): the state at `sigmas[-1]`.
        sigmas: the decreasing sampling schedule. It must end above 0, e.g. `sigmas[:-1]`: the step to 0 returns the
            denoised image and forgets x. See `last_step`.
        sampler: a deterministic sampler, by name or as a rule; or a reversible one with noise, such as "rex_sde".
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
        max_evals: denoiser evaluations that one sample may cost, the check included; at least two runs, or one without
            the check, and 4. With "auto" no sample comes out worse for more of them: attempts are made in an order that
            does not depend on the limit, as many as there are evaluations for, and the best is returned. None allows
            128 runs; for an event of at most 1,024 values 256 runs and 4 for each value, for the last resort.
        check: sample the latent again. Without it `round_trip_error` is NaN, nothing is called converged, and every
            reason is UNCHECKED.
        mask: 1 = invert, 0 = keep x, as in `unsample`; nothing between, at the resolution of x.
        noise: for a reversible sampler that draws noise, the source of its run, as in `sample`: an image has another
            latent for each noise. All of it is drawn before the run, and kept as `noises`. `ki.noise.brownian(seed)`
            and `white(seed)` give a run of the sampler the same; a function of your own is asked in the run's order.
        callback: called after each step of the run that checks the result (for a multistep sampler, of one more run).
            It stops nothing: an exception passes through, as in `sample`.
        watch: called with a `Solving` after each evaluation, plain numbers for which no device is asked. It stops the
            inversion with `raise ki.Stop`: the best so far is returned, and samples that are not inverted have the
            reason STOPPED. Steps not solved yet then take the evaluations of a first guess, the check a run, and the
            plain run up and down two more for samples that were not inverted. The first Ctrl-C does the same, with a
            RuntimeWarning, the second raises KeyboardInterrupt.
        progress: show bars of the solving and of the run that checks.
        max_batch: the most samples that are inverted at once, one part of the batch after the other (each with its own
            check for `callback`). It bounds the memory, which is per sample: at most 8 tensors of x's size for every
            evaluation of the run, of 20 or more and for events of 16,000 values or more, while sweeps suffice. See
            "Inversion" on the page on performance for the other methods, and `Sweeps` for its two numbers.
        fixed_batch: call the denoiser with one batch size only, `max_batch` or else that of x, as CUDA graphs, TensorRT
            engines and pipelines of a fixed size need. By default the batch becomes a half, a quarter, ... of itself
            while samples finish. In both cases it is filled up with copies of one of its samples, which no sample's
            `evaluations` count.

    Returns:
        An `Inversion`; `found.sample(denoiser)` is the way back. If a sample could not be inverted, its `converged` is
        false, `reasons` says why, and its latent is the best one found: with a limit of at least 13 runs never worse
        than that of `unsample` without an offset ("picard" alone is run as published). `restored` is the nearest image
        that was reached. A RuntimeWarning names the step, with the smallest singular value of its derivative there, or
        the noise of the network that ends the search. States in half precision are solved for in float32, and rounded
        once. For an algebraically reversible sampler `memory` belongs to the latent, and a RuntimeWarning comes before
        the run if rounding is expected to grow beyond the tolerance.

    Raises:
        ValueError: a sampler that draws noise (a reversible one if no `noise` is given), has no Plan or forgets x in
            some step, with what to use instead; noise for a sampler that draws none; a method that would not be used
            for this sampler, with those that would; a denoiser that mixes the samples of its batch (the first two of a
            batch take four evaluations, which find out); any other input that cannot work.
        TypeError: as in `sample`.
    """
    x = check_image(x)
    check_callback(callback)
    check_callback(watch, "watch(solving) after each evaluation")
    check_choice("last_step", last_step, LAST_STEPS)
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    plan = compile_plan(rule, falling(schedule))
    check_invertible(plan, last_step, noise)
    check_flow_spread(plan, coordinates)
    route, solver = choose(method, plan)
    network: torch.dtype = getattr(denoiser, "network_dtype", None) or x.dtype
    goal = tolerance(tol, x, network=network)
    runs = 1 if not check else 3 if callback is not None and route.scope == "run" else 2
    limit = _limit(max_evals, plan, x[0].numel(), runs)
    scales = step_cfg(cfg, schedule)
    guided = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=len(x), coordinates=coordinates)
    check_guidance(guided, x, plan.sigmas, "invert")
    bound: BoundDenoiser = guided
    region = None
    if mask is not None:
        bound = masked = Masked(bound, mask, x, coordinates=coordinates)
        _check_hard(masked.mask)
        region = masked.mask.expand_as(x)
    before = rounding_note(tol, goal, x, network)
    indices = batch_parts(x, max_batch)
    rows = max_batch or max(1, min(64, 2**16 // x[0].numel()))  # of a Jacobian, whose columns are one sample's
    largest = max_batch if fixed_batch and max_batch else len(indices[0])
    noises = drawn_noises(plan.closed, noise, x)
    asked = _check_rows(bound, x, plan, largest if fixed_batch else None)
    back = WayBack(plan.rule, plan.sigmas, coordinates, cfg, positive, negative, None if mask is None else region, x)
    parts = []
    with looking_on(plan, route.scope, limit, callback, watch, progress) as (eye, checking):
        for number, index in enumerate(indices):
            eye.begin(number, len(indices), len(index))
            part = FewBatches(bound.take(index), largest, fixed_batch, eye, 0 if fixed_batch else rows)
            inside = None if region is None else region[index]
            task = Task(
                plan, part, x[index], goal, limit, checking, index, inside, network=network, watch=eye,
                limited=max_evals is not None, check=check, noises=tuple(n[index] for n in noises),
            )  # fmt: skip
            found = route.solve(task, solver)
            if found.failures:
                warn_user(f"invert({plan.rule.name}): {'; '.join(found.failures)}")
            parts.append(certify(plan, task.x, goal, found, back, inside))
    whole = Inversion.join(parts)
    return replace(whole, evaluations=whole.evaluations + asked, row_checks=asked, warnings=(*before, *whole.warnings))


def _check_rows(bound: BoundDenoiser, x: Tensor, plan: Plan, fixed: int | None) -> Tensor:
    """Find out whether the denoiser mixes the rows of its batch; return the evaluations of each sample."""
    if fixed == 1:  # no two rows are ever evaluated together
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return check_rows(FewBatches(bound, fixed or 2, fixed=True), x, plan.sigmas)


def _check_hard(mask: Tensor) -> None:
    """Raise ValueError for a soft mask: between 0 and 1 `sample` mixes in noise that depends on the latent."""
    soft = mask[(mask != 0) & (mask != 1)]
    if soft.numel():
        raise ValueError(
            f"mask must be 0 or 1 everywhere to invert a run with it, got {soft.numel()} values between, such as "
            f"{float(soft[0]):.3g}, as x sees it; give a hard mask of x's own resolution, e.g. (mask > 0.5)"
        )


def check_image(x: Any) -> Tensor:
    """Return the image as a plain tensor; raise TypeError or ValueError if there is nothing in it to solve for."""
    x = check_state(x)
    check_values("x", x, "an inversion is made of them")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must have shape (batch, *event) with values in each event, got {tuple(x.shape)}")
    return x


def falling(sigmas: Any) -> tuple[float, ...]:
    """Return the schedule as floats; raise ValueError if it rises."""
    schedule = as_schedule(sigmas)
    check_decreasing("sigmas", schedule)
    return schedule


def check_invertible(plan: Plan, last_step: str | None = None, noise: Noise | None = None) -> None:
    """Raise ValueError if the run of a Plan cannot be inverted, or not with this noise."""
    name = plan.rule.name
    quiet = switched_off(plan.rule)
    fix = f"ki.sampler({name!r}, {quiet})" if quiet else "a deterministic sampler such as 'heun'"
    if noise is not None and not plan.is_stochastic:
        raise ValueError(f"noise is for samplers that draw noise, and {name} draws none here; leave it out")
    if plan.is_stochastic and plan.auxiliary and noise is None:
        raise ValueError(
            f"cannot invert {name} without noise: it draws noise {plan.draws} times, and an image has another latent "
            "for each noise; give the source of the run, e.g. noise=ki.noise.white(seed)"
        )
    if plan.is_stochastic and not plan.auxiliary:
        raise ValueError(
            f"cannot invert {name}: it draws noise {plan.draws} times, so an image has a latent only together with its "
            f"noises; use extract_noise, or {fix}, or a reversible sampler such as 'rex_sde' with given noise"
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


def _limit(max_evals: int | None, plan: Plan, values: int, runs: int) -> int:
    """Return what a sample of so many values may cost, without the evaluations of `check_rows`; at least `runs`."""
    if max_evals is None:
        return plan.evaluations * default_runs(values)
    least = runs * plan.evaluations + ROWS
    if not is_integer(max_evals) or max_evals < least:
        parts = ("a run up", "a run up, one down to check it", "a run up, two down")[runs - 1]
        fix = "" if runs == 1 else "; check=False leaves out the run down"
        raise ValueError(
            f"max_evals must be an int of at least {least}, {parts} and {ROWS} more, got {max_evals!r}{fix}"
        )
    return int(max_evals) - ROWS
