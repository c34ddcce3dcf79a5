"""The inverse of a run whose steps remember nothing: attempts, step by step, and what is said of those that fail."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kinvert.devices import has_float64
from kinvert.inversion.job import UNLIMITED, Job, least_stretch, restrict
from kinvert.inversion.plain import Recorded, rising
from kinvert.inversion.result import Inversion
from kinvert.inversion.solvers import Anderson, Solver
from kinvert.inversion.stepwise import Trajectory, contraction, invert_steps, levels_of, step_map
from kinvert.inversion.verdict import ROWS
from kinvert.plan import Plan


def step_by_step(job: Job, solver: Solver) -> Inversion:
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
        factors[:, able] = contraction(plan, restrict(job.select, able), states, job.eps)
        found.evaluations[able] += cost
    checking = plan.evaluations + cost * bool(len(able))
    more = {"contraction": factors if len(able) else None}
    return job.result(found, restored, _verdicts(job, found, restored), checking=checking, **more)


def _attempts(job: Job, solver: Solver) -> list[int]:
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


def _plain(job: Job, up: Plan | None) -> tuple[Trajectory, Tensor]:
    """What plain unsampling finds, on the way that the sampler takes from there, and where it ends."""
    assert up is not None
    plan, x = job.plan, job.wide
    plain = Recorded.of(up, plan, job.denoiser, job.x, job.callback)
    residuals = x.new_zeros(len(plan.steps), len(x))
    residuals[-1] = job.error(plain.restored)  # every other step goes where the next one starts
    spent = torch.full((len(x),), plain.evaluations, dtype=torch.int64, device=x.device)
    return Trajectory(plain.trajectory(plan, x), residuals, spent), plain.restored.to(x.dtype)


def _attempt(job: Job, solver: Solver, most: int) -> tuple[Trajectory, Tensor]:
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
    job: Job, solver: Solver, found: Trajectory, restored: Tensor, allowed: Tensor, index: Tensor, left: Tensor
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


def _allowed(job: Job, share: float) -> Tensor:
    """The rms of the residual that is good enough, shape (steps, batch): a share of the aim, above rounding.

    What a step misses shrinks as sigma does.
    """
    eps = torch.finfo(job.wide.dtype).eps
    rows = [(share * job.aim * job.unit(step.sigma_next)).clamp(min=eps * step.sigma) for step in job.plan.steps]
    return torch.stack(rows)


def _verdicts(job: Job, found: Trajectory, restored: Tensor) -> list[str]:
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
        function = step_map(step, restrict(job.select, index), levels)
        value = least_stretch(job, function, u, y, len(step.stages), found.evaluations[i : i + 1])
        if value is not None:
            note += f", where the smallest singular value of the step's derivative is {value:.2g}"
        notes.append(note)
    return notes


def _merge(whole: Trajectory, part: Trajectory, index: Tensor, better: Tensor) -> Trajectory:
    """Put the samples `index` that are better in their places; their evaluations count in any case."""
    places = index[better]
    for kept, state in zip(whole.states, part.states, strict=True):
        kept[places] = state[better]
    whole.residuals[:, places] = part.residuals[:, better]
    whole.evaluations[index] += part.evaluations
    return whole


def _is_published(solver: Solver) -> bool:
    """Whether it is `Picard`, which is run for comparison, as it was published, and nothing is put in its place."""
    return isinstance(solver, Anderson) and solver.window == 0 and math.isinf(solver.growth)
