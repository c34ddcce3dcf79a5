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

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kinvert.analysis import amplification
from kinvert.checks import check_callback
from kinvert.coordinates import settle
from kinvert.denoisers import Cfg, Denoiser, Masked, guide, step_cfg
from kinvert.devices import has_float64
from kinvert.engine import Callback, Memory, check_state, run, run_state
from kinvert.forms import State
from kinvert.inputs import check_values, is_integer
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.choice import choose
from kinvert.inversion.plain import Recorded, rising
from kinvert.inversion.result import Inversion, rms
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.solvers import Anderson, Equation, Select, Solver
from kinvert.inversion.stepwise import (
    Trajectory,
    contraction,
    invert_steps,
    levels_of,
    smallest_singular_value,
    step_map,
)
from kinvert.inversion.trajectory import Judge, Sweeps
from kinvert.inversion.verdict import ROWS, Widened, check_rows, image_size, rounding_note, tolerance
from kinvert.moments import check_flow_spread
from kinvert.plan import Plan, Step, as_schedule, compile_plan
from kinvert.rules import DPMpp2SAncestral, Euler, Heun, Rule
from kinvert.rules.flow import unwrapped
from kinvert.rules.names import unknown
from kinvert.sampling import batch_parts, with_bar

# Invertible step by step, in the order in which a whole run is tried through them: Euler is the cheapest, the others
# are closer to a sampler of order 2.
BASES = (Euler(), Heun(), DPMpp2SAncestral(eta=0.0))
LAST_STEPS = ("error", "least_change")
UNLIMITED = 2**62


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
            in float16, 0.0625 in bfloat16).
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
    goal = tolerance(tol, x)
    limit = _limit(max_evals, plan)
    bound: Any = guide(denoiser, step_cfg(cfg, schedule), positive, negative, pair=plan.is_guided)
    if mask is not None:
        bound = Masked(bound, mask, x, coordinates=coordinates)
        _check_hard(bound.mask)
    region = None if mask is None else bound.mask.expand_as(x)
    notes = rounding_note(goal, x)
    if progress:
        callback = with_bar(callback, f"check {plan.rule.name}", len(plan.steps), plan.sigmas[-1])
    indices = batch_parts(x, max_batch)
    largest = max_batch if fixed_batch and max_batch else len(indices[0])
    rows = FewBatches(bound, largest, fixed=True) if fixed_batch else bound
    asked = check_rows(rows, x[:1] if fixed_batch and largest == 1 else x, plan.sigmas)
    parts = []
    for index in indices:
        part = FewBatches(bound.select(index, len(x)), largest, fixed_batch)
        inside = None if region is None else region[index]
        job = _Job(plan, part, x[index], goal, limit, callback, index, inside)
        parts.append(_invert(job, solver))
    found = Inversion.join(parts)
    return replace(
        found, evaluations=found.evaluations + asked, row_checks=asked, warnings=(*notes, *found.warnings)
    )


def _invert(job: _Job, solver: Solver | Sweeps) -> Inversion:
    if job.plan.auxiliary:
        return _undo(job)
    if job.plan.is_multistep or isinstance(solver, Sweeps):
        return _whole_run(job, solver if isinstance(solver, Sweeps) else Sweeps())
    return _step_by_step(job, solver)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is to be inverted, to which accuracy; the samples of x are `samples` of the batch that was given.

    Equations are solved in the dtype of `wide`, float32 where x is in half precision, and what comes out is judged in
    x's: by `error`, where `region` is 1.
    """

    plan: Plan
    denoiser: Any
    x: Tensor
    tol: float
    limit: int
    callback: Callback | None
    samples: Tensor
    region: Tensor | None = None
    states: torch.dtype = torch.float32

    @cached_property
    def wide(self) -> Tensor:
        """The image in the dtype of the equations."""
        return self.x.to(torch.promote_types(self.x.dtype, self.states))

    @property
    def is_half(self) -> bool:
        """Whether a round trip is mostly rounding, so that the plain run may be as good."""
        return self.x.dtype.itemsize < 4

    @property
    def eps(self) -> float:
        """The relative precision of x, and of what the denoiser is shown."""
        return torch.finfo(self.x.dtype).eps

    @property
    def aim(self) -> float:
        """The relative accuracy of the equations: no better than x can hold, but in half precision no worse."""
        return self.eps if self.is_half else max(self.tol, self.eps)

    @cached_property
    def judge(self) -> Judge:
        """What is asked of a round trip: in half precision, where it is rounding, that the equations are solved."""
        size = image_size(self.x, self.plan.sigmas, self.region)
        share = torch.ones_like(size)
        if self.region is not None:
            share = self.region.flatten(1).to(size).mean(1).sqrt()
            share = torch.where(share > 0, share, 1.0)
        enough = torch.full_like(size, torch.inf) if self.is_half else max(self.tol, self.eps) * size
        return Judge(size, share, enough, self.error, self.down)

    def lost(self, error: Tensor) -> Tensor:
        """Which samples a better candidate is wanted for."""
        return error > max(self.tol, self.eps) * self.judge.size

    def unit(self, sigma: float) -> Tensor:
        """What an rms over all values is in units of, at a noise level; shape (batch,)."""
        return self.judge.size.clamp(min=sigma) * self.judge.share

    def select(self, index: Tensor) -> Denoiser:
        """The denoiser of some samples, for states like `wide`."""
        denoiser: Denoiser = self.denoiser.select(index, len(self.x))
        return denoiser if self.x.dtype == self.wide.dtype else Widened(denoiser, self.x.dtype)

    def part(self, index: Tensor) -> _Job:
        """The same for some samples."""
        region = None if self.region is None else self.region[index]
        denoiser = self.denoiser.select(index, len(self.x))
        x, samples = self.x[index], self.samples[index]
        return replace(self, denoiser=denoiser, x=x, samples=samples, region=region, callback=None)

    def again(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """What the sampler makes of a latent of the whole batch."""
        plan = self.plan.closed if memory else self.plan
        state = {"x": latent, **(memory or {})}
        state = {name: value.to(self.x.dtype) for name, value in state.items()}
        return run_state(plan, self.denoiser, state, callback=self.callback)["x"]

    def down(self, latent: Tensor, index: Tensor) -> Tensor:
        """What the sampler makes of the latents of some samples, like `wide`."""
        return run(self.plan, self.denoiser.select(index, len(self.x)), latent.to(self.x.dtype)).to(latent.dtype)

    def error(self, restored: Tensor, index: Tensor | None = None) -> Tensor:
        """Root mean square of the round trip, of some samples or all."""
        x, region = (part if index is None or part is None else part[index] for part in (self.wide, self.region))
        assert x is not None
        return rms(restored.to(x.dtype) - x, region).nan_to_num(torch.inf)

    def result(self, found: Trajectory, restored: Tensor, notes: list[str], **more: Any) -> Inversion:
        """The inversion, and a warning where it did not come out."""
        if notes:
            warnings.warn(f"invert({self.plan.rule.name}): {'; '.join(notes)}", RuntimeWarning, stacklevel=6)
        error, allowed = self.error(restored), self.tol * self.judge.size
        return Inversion(
            latent=found.states[0].to(self.x.dtype),
            residuals=found.residuals,
            converged=error <= allowed,
            evaluations=found.evaluations,
            round_trip_error=error,
            tolerance=self.tol,
            allowed=allowed,
            sigmas=self.plan.sigmas,
            restored=restored.to(self.x.dtype),
            warnings=tuple(notes),
            **more,
        )


def _undo(job: _Job) -> Inversion:
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


def _step_by_step(job: _Job, solver: Solver) -> Inversion:
    """The attempts, the largest first; for samples that none of them inverts the plain run too."""
    plan, x, found, restored = job.plan, job.wide, None, torch.empty(0)
    up = None if _is_published(solver) else rising(plan)
    for attempt in [*_attempts(job, solver), None]:
        index = torch.arange(len(x), device=x.device)
        if found is not None:
            keep_trying = job.lost(job.error(restored))
            index = index[keep_trying | (attempt is None and job.is_half)]
        if not len(index) or (attempt is None and up is None):
            continue
        one = job.part(index) if found is not None else job
        trial, images = _plain(one, up) if attempt is None else _attempt(one, solver, attempt)
        if found is None:
            found, restored = trial, images
            continue
        better = one.error(images) < one.error(restored[index])
        restored[index[better]] = images[better]
        _merge(found, trial, index, better)
    assert found is not None
    cost = plan.evaluations + 2 * len(plan.steps[-1].stages)
    able = torch.arange(len(x), device=x.device)
    if job.limit < UNLIMITED:
        able = able[job.limit - found.evaluations >= cost]
    factors = x.new_full((len(plan.steps), len(x)), torch.nan)
    if len(able):
        states = [state[able] for state in found.states]
        factors[:, able] = contraction(plan, _restrict(job.select, able), states, job.eps)
        found.evaluations[able] += cost
    checking = plan.evaluations + cost * bool(len(able))
    more = {"contraction": factors if len(able) else None}
    return job.result(found, restored, _verdicts(job, found, restored), checking=checking, **more)


def _attempts(job: _Job, solver: Solver) -> list[int]:
    """How many evaluations each attempt may spend on its equations, the largest first; one run more to check it.

    They do not depend on the limit, which says how many of them there are: what a smaller limit returns is among what a
    larger one has the choice of.
    """
    once = job.plan.evaluations
    if job.limit == UNLIMITED:
        return [UNLIMITED]
    if _is_published(solver):  # one attempt, and the contraction
        return [max(job.limit - 2 * once - 2 * len(job.plan.steps[-1].stages), once + 1)]
    sizes, left = [max(2 * once - ROWS, once + 1)], job.limit - 2 * once  # one run up and one down
    while sum(sizes) + len(sizes) * once <= left:
        sizes.append(2 * sizes[-1] + once)
    return sizes[-2::-1] if rising(job.plan) else sizes[-2::-1] or [once + 1]


def _plain(job: _Job, up: Plan | None) -> tuple[Trajectory, Tensor]:
    """What plain unsampling finds, on the way that the sampler takes from there, and where it ends."""
    assert up is not None
    plan, x = job.plan, job.wide
    plain = Recorded.of(up, plan, job.denoiser, job.x, job.callback)
    residuals = x.new_zeros(len(plan.steps), len(x))
    residuals[-1] = job.error(plain.restored)  # every other step goes where the next one starts
    spent = torch.full((len(x),), plain.evaluations, dtype=torch.int64, device=x.device)
    return Trajectory(plain.trajectory(plan, x), residuals, spent), plain.restored.to(x.dtype)


def _attempt(job: _Job, solver: Solver, most: int) -> tuple[Trajectory, Tensor]:
    """Solve each step; for samples whose steps' errors add up to more than will do, again and more exactly.

    Returns the trajectory and what the sampler makes of its latent. It costs at most `most` evaluations of each sample,
    and one run.
    """
    plan, x = job.plan, job.wide
    # The errors of the steps add up like random ones, and most are below what is allowed.
    share = min(0.45, 1.5 * len(plan.steps) ** -0.5)
    allowed = _allowed(job, share)
    budget = torch.full((len(x),), most, dtype=torch.int64, device=x.device)
    found = invert_steps(plan, job.select, x, lambda step: allowed[step.index], solver, budget, eps=job.eps)
    restored = job.again(found.states[0]).to(x.dtype)
    found.evaluations += plan.evaluations
    residuals = found.residuals.clone()  # of the last attempt
    for _ in range(3):
        solved, error = (residuals <= allowed).all(0), job.error(restored)
        finer = (allowed * (0.1 * job.judge.enough / error).clamp(max=0.1)).maximum(job.eps * job.unit(0.0))
        affordable = budget - found.evaluations > 3 * plan.evaluations
        again = solved & (error > job.judge.enough) & (finer < allowed).any(0) & affordable
        index = again.nonzero()[:, 0]
        if not len(index):
            break
        allowed[:, index] = finer[:, index]
        left = (budget - found.evaluations)[index]
        residuals[:, index] = _solve_again(job.part(index), solver, found, restored, allowed[:, index], index, left)
    return found, restored


def _solve_again(
    job: _Job, solver: Solver, found: Trajectory, restored: Tensor, allowed: Tensor, index: Tensor, left: Tensor
) -> Tensor:
    """Solve the steps of the samples `index` again, from where they are; what is better takes its place.

    The states are in float64 where they can be: at high noise the rounding of float32 is too much for an image on the
    edge between two modes of the data. Returns the residuals of the steps, better or not.
    """
    plan, x, narrow = job.plan, job.wide, job.wide.dtype
    if job.x.dtype == torch.float32 and has_float64(x.device):
        job = replace(job, states=torch.float64)
        x = job.wide
    allowed, starts = allowed.to(x), [state[index].to(x) for state in found.states]
    path = invert_steps(plan, job.select, x, lambda step: allowed[step.index], solver, left, starts, eps=job.eps)
    states, residuals = [state.to(narrow) for state in path.states], path.residuals.to(narrow)
    again = Trajectory(states, residuals, path.evaluations + plan.evaluations)
    images = job.down(states[0], torch.arange(len(index), device=x.device))
    better = job.error(images) <= job.error(restored[index])
    restored[index[better]] = images[better]
    _merge(found, again, index, better)
    return residuals


def _allowed(job: _Job, share: float) -> Tensor:
    """The rms of the residual that is good enough, shape (steps, batch): a share of the aim, above rounding.

    What a step misses shrinks as sigma does.
    """
    eps = torch.finfo(job.wide.dtype).eps
    rows = [(share * job.aim * job.unit(step.sigma_next)).clamp(min=eps * step.sigma) for step in job.plan.steps]
    return torch.stack(rows)


def _verdicts(job: _Job, found: Trajectory, restored: Tensor) -> list[str]:
    """What is to be said of the samples that were not inverted step by step."""
    error, allowed, notes, x = job.error(restored), _allowed(job, 1.0), [], job.wide
    for i in (error > job.tol * job.judge.size).nonzero()[:, 0].tolist():
        index = torch.tensor([i], device=x.device)
        step = job.plan.steps[int((found.residuals[:, i] / allowed[:, i]).argmax())]
        y, u = found.states[step.index + 1][index], found.states[step.index][index]
        note = (
            f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}; worst is step {step.index} (sigma "
            f"{step.sigma:.4g} -> {step.sigma_next:.4g}), residual {found.residuals[step.index, i]:.2g}"
        )
        levels = levels_of(job.plan, y)[step.index]
        function = step_map(step, _restrict(job.select, index), levels)
        value = _least_stretch(job, function, u, y, len(step.stages), found.evaluations[i : i + 1])
        if value is not None:
            note += f", where the smallest singular value of the step's derivative is {value:.2g}"
        notes.append(note)
    return notes


def _least_stretch(
    job: _Job, function: Callable[[Tensor, Tensor], Tensor], u: Tensor, y: Tensor, cost: int, spent: Tensor
) -> float | None:
    """The smallest singular value of a function's derivative at one sample's u; None where that cannot be had."""
    products = min(60, (job.limit - int(spent)) // cost - 1)
    if products <= 5:
        return None
    equation = Equation(function, y, rms(y), torch.zeros_like(spent), cost)
    equation.eps = job.eps
    value = smallest_singular_value(equation, u, products)
    spent += equation.evaluations
    return None if math.isnan(value) else value


def _merge(whole: Trajectory, part: Trajectory, index: Tensor, better: Tensor) -> Trajectory:
    """Put the samples `index` that are better in their places; their evaluations count in any case."""
    places = index[better]
    for kept, state in zip(whole.states, part.states, strict=True):
        kept[places] = state[better]
    whole.residuals[:, places] = part.residuals[:, better]
    whole.evaluations[index] += part.evaluations
    return whole


def _restrict(select: Select, index: Tensor) -> Select:
    return lambda inner: select(index[inner])


def _whole_run(job: _Job, sweeps: Sweeps) -> Inversion:
    """Sweep over all evaluations; for what that leaves, go through one invertible base sampler after the other.

    With a limit the plain run comes first, and the sweeps start from it; without one it comes last.
    """
    plan, x, up, once = job.plan, job.wide, rising(job.plan), job.plan.evaluations
    latent, restored, spent = x.clone(), torch.full_like(x, torch.nan), torch.zeros(len(x), dtype=torch.int64)
    error, spent = x.new_full((len(x),), torch.finfo(x.dtype).max), spent.to(x.device)
    unsolved = torch.ones_like(spent, dtype=torch.bool)
    budget = job.limit - once * (job.callback is not None)
    if plan.sigmas[-1] > 0:  # a step to 0 forgets x
        plain = Recorded.of(up, plan, job.denoiser, job.x) if up and job.limit < UNLIMITED else None
        solved = sweeps.solve(plan, job.select, x, job.aim, budget, job.judge, plain)
        latent, restored, error = solved.latent, solved.restored, torch.tensor(solved.errors).to(x)
        spent = torch.tensor(solved.evaluations, device=x.device)
        if job.is_half:  # what is left of solved equations is rounding
            unsolved = torch.tensor(solved.residuals, device=x.device) > job.aim
    for base in [compile_plan(rule, plan.sigmas) for rule in BASES]:
        able = budget - spent >= _Through.least(job, base)
        index = (job.lost(error) & unsolved & error.isfinite() & able).nonzero()[:, 0]
        if not len(index):  # an error is infinite only where the denoiser fails
            continue
        through = _Through(job, base, index, budget - spent[index])
        Anderson(window=12, max_iterations=40).solve(through, x[index])
        spent[index] += through.evaluations
        better = through.best < error[index]
        where = index[better]
        latent[where], restored[where], error[where] = (
            part[better] for part in (through.latent, through.restored, through.best)
        )
    index = (job.lost(error) | job.is_half).nonzero()[:, 0]
    if up and job.limit == UNLIMITED and len(index):
        one = job.part(index)
        plain = Recorded.of(up, plan, one.denoiser, one.x)
        better, images = one.error(plain.restored) < error[index], plain.restored.to(x.dtype)
        latent[index[better]], restored[index[better]] = plain.latent.to(x.dtype)[better], images[better]
        error, spent[index] = job.error(restored), spent[index] + plain.evaluations
    if job.callback is not None:
        restored = job.again(latent)
        spent += once
    notes = []
    for i in (error > job.tol * job.judge.size).nonzero()[:, 0].tolist():
        index = torch.tensor([i], device=x.device)
        note = f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}, solved as a whole run"
        again = _run_map(plan, _restrict(job.select, index))
        value = _least_stretch(job, again, latent[index], x[index], once, spent[i : i + 1])
        if value is not None:
            note += (
                f"; the smallest singular value of its derivative is {value:.2g}, without a denoiser it would be "
                f"{plan.sigmas[-1] / plan.sigmas[0]:.2g}"
            )
        notes.append(note)
    checking = once * (2 if job.callback else 1)
    return job.result(Trajectory([latent], error[None], spent), restored, notes, checking=checking)


def _run_map(plan: Plan, select: Select) -> Callable[[Tensor, Tensor], Tensor]:
    """`(u, index) -> S(u)`."""
    return lambda u, index: run(plan, select(index), u)


class _Through(Equation):
    """`S(E^{-1}(z)) = image`. Each inverse starts from the last one and is as exact as it needs to be."""

    def __init__(self, job: _Job, base: Plan, index: Tensor, budget: Tensor) -> None:
        self.job = job.part(index)
        x, judge = self.job.wide, self.job.judge
        enough = max(job.tol, job.eps) * judge.size * judge.share
        super().__init__(self.down_again, x, enough, budget, self.least(job, base))
        self.base, self.most = base, self._most(job, base)
        self.latent, self.restored, self.best = x.clone(), x.clone(), x.new_full((len(x),), torch.inf)
        self.accuracy = x.new_full((len(x),), 1e-3)
        self.warm: list[Tensor] | None = None

    @staticmethod
    def _most(job: _Job, base: Plan) -> int | None:
        """What an inverse may cost where there is a limit, whatever it is: a larger one makes the same calls, and more.

        None: what is left.
        """
        limited = job.limit < UNLIMITED and job.plan.sigmas[-1] > 0
        return 8 * base.evaluations if limited else None

    @classmethod
    def least(cls, job: _Job, base: Plan) -> int:
        """What a call costs at least: a run up, from a first guess, and one down."""
        return (cls._most(job, base) or base.evaluations + 1) + job.plan.evaluations

    def residual(self, u: Tensor, index: Tensor) -> Tensor:
        """`image - S(E^{-1}(u))`, which counts what it costs itself."""
        return self.value[index] - self.function(u, index)

    def down_again(self, z: Tensor, index: Tensor) -> Tensor:
        """`S(E^{-1}(z))`."""
        job, plan = self.job, self.job.plan

        def tolerance(step: Step) -> Tensor:
            return self.accuracy[index] * job.unit(step.sigma_next)[index]

        starts = self.warm and [state[index] for state in self.warm]
        left = self.budget[index] - self.evaluations[index] - plan.evaluations
        left = left if self.most is None else left.clamp(max=self.most)
        solver = Anderson(max_iterations=25)
        path = invert_steps(self.base, _restrict(job.select, index), z, tolerance, solver, left, starts, job.eps)
        if self.warm is None:  # the first call is for all samples
            self.warm = [state.clone() for state in path.states]
        for kept, state in zip(self.warm, path.states, strict=True):
            kept[index] = state
        out, error = job.judge.verify(path.states[0], index)
        self.evaluations[index] += path.evaluations + plan.evaluations
        better = error < self.best[index]
        self.best[index[better]] = error[better]
        self.latent[index[better]], self.restored[index[better]] = path.states[0][better], out[better]
        self.accuracy[index] = (0.004 * error / job.judge.size[index]).clamp(max=1e-3)
        return out


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
    has_eta = getattr(unwrapped(plan.rule), "eta", 0.0)
    fix = f"ki.sampler({name!r}, eta=0)" if has_eta else "a deterministic sampler such as 'heun'"
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


def _is_published(solver: Solver) -> bool:
    """Whether it is `Picard`, which is run for comparison, as it was published, and nothing is put in its place."""
    return isinstance(solver, Anderson) and solver.window == 0 and math.isinf(solver.growth)


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
