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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.analysis import amplification
from kinvert.checks import check_callback
from kinvert.denoisers import Denoiser, Masked, guide
from kinvert.engine import Callback, Memory, check_state, run, run_state
from kinvert.forms import State
from kinvert.inputs import check_values, is_integer, is_number
from kinvert.inversion.continuation import Continuation
from kinvert.inversion.result import Inversion, rms
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.solvers import Anderson, Damped, Equation, NewtonKrylov, Picard, Select, Solver
from kinvert.inversion.stepwise import (
    Auto,
    Trajectory,
    contraction,
    invert_steps,
    levels_of,
    smallest_singular_value,
    step_map,
)
from kinvert.inversion.trajectory import Sweeps
from kinvert.plan import Plan, Step, as_schedule, compile_plan
from kinvert.rules import DPMpp2SAncestral, Euler, Heun, Rule
from kinvert.rules import sampler as resolve_sampler
from kinvert.rules.names import unknown
from kinvert.sampling import batch_parts, with_bar

METHODS: dict[str, Callable[[], Solver | Sweeps]] = {
    "auto": Auto,
    "anderson": Anderson,
    "damped": Damped,
    "continuation": Continuation,
    "newton": NewtonKrylov,
    "picard": Picard,
    "sweeps": Sweeps,
}
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
    cfg: float = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    max_batch: int | None = None,
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
            samplers need, whatever it says.
        last_step: what to do where the schedule ends in 0. "error" refuses; "least_change" looks for the state x that
            the denoiser maps to the image, `D(x, sigma) = image`, near the image where there are many. An image that
            is not in the range of D has none; the nearest result is returned and not called converged.
        tol: rms of `sample(latent) - x` to reach, absolute; by default 1e-9 in float64 and 1e-5 in float32.
        max_evals: denoiser evaluations that one sample may cost, the check included; None sets no limit.
        mask: 1 = invert, 0 = keep x, as in `unsample`; nothing between, at the resolution of x.
        callback: called after each step of the run that checks the result (for a multistep sampler, of one more run).
        progress: show a progress bar of that run.
        max_batch: the most samples that are inverted at once, one part of the batch after the other (each with its own
            check for `callback`). It bounds the memory, which is per sample, in tensors of x's size: the states of the
            run, and `2 window + 6` for Anderson's method, `2 krylov + 4` for Newton's, `2 window + 4` for every
            evaluation that sweeps solve for, of a step or of the run.

    Returns:
        An `Inversion`. Where a sample could not be inverted, its `converged` is false, its latent the best one found
        and `restored` the nearest image that was reached; a RuntimeWarning says so, with the step and the smallest
        singular value of its derivative there. For an algebraically reversible sampler `memory` belongs to the latent,
        and a RuntimeWarning comes before the run where rounding must be expected to grow beyond the tolerance.

    Raises:
        ValueError: a sampler that draws noise, has no Plan or forgets x in some step, with what to use instead; any
            other input that cannot work.
        TypeError: as in `sample`.
    """
    x = check_image(x)
    check_callback(callback)
    solver = method if isinstance(method, (Solver, Sweeps)) else _method(method)
    if last_step not in LAST_STEPS:
        raise ValueError(unknown("last_step", last_step, LAST_STEPS))
    plan = compile_plan(resolve_sampler(sampler), falling(sigmas))
    check_invertible(plan, last_step)
    goal = tolerance(tol, x)
    limit = _limit(max_evals, plan)
    bound: Any = guide(denoiser, cfg, positive, negative, pair=plan.is_guided)
    if mask is not None:
        bound = Masked(bound, mask, x)
        _check_hard(bound.mask)
    if progress:
        callback = with_bar(callback, f"check {plan.rule.name}", len(plan.steps), plan.sigmas[-1])
    parts = []
    for index in batch_parts(x, max_batch):
        job = _Job(plan, bound.select(index, len(x)), x[index], goal, limit, callback, index)
        parts.append(_invert(job, solver))
    return Inversion.join(parts)


def _invert(job: _Job, solver: Solver | Sweeps) -> Inversion:
    if job.plan.auxiliary:
        return _undo(job)
    if job.plan.is_multistep or isinstance(solver, Sweeps):
        return _whole_run(job, solver if isinstance(solver, Sweeps) else Sweeps())
    return _step_by_step(job, solver)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is to be inverted, to which accuracy; the samples of x are `samples` of the batch that was given."""

    plan: Plan
    denoiser: Any
    x: Tensor
    goal: float
    limit: int
    callback: Callback | None
    samples: Tensor

    @property
    def budget(self) -> Tensor:
        """Evaluations that each sample may spend on its equations; the check and the contraction come on top."""
        rest = self.limit - 2 * self.plan.evaluations - 2 * len(self.plan.steps[-1].stages)
        return torch.full((len(self.x),), rest, dtype=torch.int64, device=self.x.device)

    def select(self, index: Tensor) -> Denoiser:
        """The denoiser of some samples."""
        return self.denoiser.select(index, len(self.x))

    def again(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """What the sampler makes of a latent of the whole batch."""
        plan = self.plan.closed if memory else self.plan
        return run_state(plan, self.denoiser, {"x": latent, **(memory or {})}, callback=self.callback)["x"]

    def error(self, restored: Tensor) -> Tensor:
        """Root mean square of the round trip."""
        return rms(restored - self.x).nan_to_num(torch.inf)

    def result(self, found: Trajectory, restored: Tensor, notes: list[str], **more: Any) -> Inversion:
        """The inversion, and a warning where it did not come out."""
        if notes:
            warnings.warn(f"invert({self.plan.rule.name}): {'; '.join(notes)}", RuntimeWarning, stacklevel=6)
        error = self.error(restored)
        return Inversion(
            latent=found.states[0],
            residuals=found.residuals,
            converged=error <= self.goal,
            evaluations=found.evaluations,
            round_trip_error=error,
            tolerance=self.goal,
            sigmas=self.plan.sigmas,
            restored=restored,
            warnings=tuple(notes),
            **more,
        )


def _undo(job: _Job) -> Inversion:
    """Undo an algebraically reversible sampler in closed form."""
    plan, x = job.plan, job.x
    # Two digits of each sample's size will do; where one is broken, that is no matter of rounding.
    sizes = {float(f"{size:.1e}") for size in rms(x).nan_to_num(0.0, 0.0).tolist()}
    # Around one image the data are narrower than as a whole: a tenth predicts what was measured of trained networks.
    growths = {size: max(amplification(plan, std=0.1 * size)) for size in sizes}
    growth = max(growths.values())
    rounding = max(each * torch.finfo(x.dtype).eps * size for size, each in growths.items())
    notes = []
    if rounding > job.goal:
        notes.append(
            f"{plan.rule.name} magnifies rounding about {growth:.2g} times on this schedule: expect errors of "
            f"{rounding:.2g} in {x.dtype}, more than the tolerance {job.goal:.2g}; use a higher precision or fewer "
            "steps"
        )
        warnings.warn(notes[0], RuntimeWarning, stacklevel=5)
    undone = invert_reversible(plan, job.denoiser, x)
    restored = job.again(undone.latent, undone.memory)
    error = job.error(restored)
    lost = (error > job.goal).nonzero()[:, 0].tolist()
    notes += [f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}" for i in lost]
    spent = torch.full_like(job.budget, undone.evaluations + plan.closed.evaluations)
    none = x.new_zeros(1, len(x))  # nothing was solved, so nothing is left over
    found = Trajectory([undone.latent], none, spent)
    checking = plan.closed.evaluations
    return job.result(found, restored, notes, checking=checking, memory=undone.memory, amplification=growth)


def _step_by_step(job: _Job, solver: Solver) -> Inversion:
    """Solve each step; for samples whose steps' errors add up to more than the goal, again and more exactly."""
    plan, x = job.plan, job.x
    # The errors of the steps add up like random ones, and most are below what is allowed.
    share = min(0.45, 1.5 * len(plan.steps) ** -0.5)
    allowed = _allowed(job, share, lambda sigma: max(1.0, sigma)).repeat(1, len(x))  # and mostly shrink as sigma does
    found = invert_steps(plan, job.select, x, lambda step: allowed[step.index], solver, job.budget)
    restored = job.again(found.states[0])
    found.evaluations += plan.evaluations
    residuals = found.residuals.clone()  # of the last attempt
    for _ in range(3):
        solved, error = (residuals <= allowed).all(0), job.error(restored)
        finer = (allowed * (0.1 * job.goal / error).clamp(max=0.1)).maximum(_allowed(job, 0.0))
        affordable = job.budget - found.evaluations > 4 * plan.evaluations
        again = solved & (error > job.goal) & (finer < allowed).any(0) & affordable
        index = again.nonzero()[:, 0]
        if not len(index):
            break
        allowed[:, index] = finer[:, index]
        residuals[:, index] = _solve_again(job, solver, found, restored, allowed, index)
    factors = contraction(plan, job.select, found.states)
    cost = plan.evaluations + 2 * len(plan.steps[-1].stages)
    found.evaluations += cost
    checking = plan.evaluations + cost
    return job.result(found, restored, _verdicts(job, found, restored), checking=checking, contraction=factors)


def _solve_again(
    job: _Job, solver: Solver, found: Trajectory, restored: Tensor, allowed: Tensor, index: Tensor
) -> Tensor:
    """Solve the steps of the samples `index` again, from where they are; what is better takes its place.

    Returns the residuals of the steps, better or not.
    """
    plan, x, part = job.plan, job.x[index], _restrict(job.select, index)
    left, starts = (job.budget - found.evaluations)[index], [state[index] for state in found.states]
    again = invert_steps(plan, part, x, lambda step: allowed[step.index, index], solver, left, starts)
    again.evaluations += plan.evaluations
    images = run(plan, part(torch.arange(len(index), device=x.device)), again.states[0])
    better = rms(images - x).nan_to_num(torch.inf) <= job.error(restored)[index]
    restored[index[better]] = images[better]
    _merge(found, again, index, better)
    return again.residuals


def _allowed(job: _Job, share: float, growth: Callable[[float], float] = lambda sigma: 1.0) -> Tensor:
    """The rms of the residual that is good enough, per step, shape (steps, 1): a share of the goal, above rounding."""
    eps = torch.finfo(job.x.dtype).eps
    allowed = [max(share * job.goal * growth(step.sigma_next), eps * step.sigma) for step in job.plan.steps]
    return torch.tensor(allowed, dtype=job.x.dtype, device=job.x.device)[:, None]


def _verdicts(job: _Job, found: Trajectory, restored: Tensor) -> list[str]:
    """What is to be said of the samples that were not inverted step by step."""
    error, allowed, notes = job.error(restored), _allowed(job, 1.0), []
    for i in (error > job.goal).nonzero()[:, 0].tolist():
        index = torch.tensor([i], device=job.x.device)
        step = job.plan.steps[int((found.residuals[:, i] / allowed[:, 0]).argmax())]
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
    """Sweep over all evaluations; for what that leaves, go through one invertible base sampler after the other."""
    plan, x = job.plan, job.x
    latent, restored, spent = x.clone(), torch.full_like(x, torch.nan), torch.zeros_like(job.budget)
    error = x.new_full((len(x),), torch.finfo(x.dtype).max)
    if plan.sigmas[-1] > 0:  # a step to 0 forgets x
        solved = sweeps.solve(plan, job.select, x, job.goal, int(job.budget[0]))
        latent, restored, error = solved.latent, solved.restored, torch.tensor(solved.errors).to(x)
        spent = torch.tensor(solved.evaluations, device=x.device)
    for base in [compile_plan(rule, plan.sigmas) for rule in BASES]:
        able = job.budget - spent >= _Through.least(plan, base)
        index = ((error > job.goal) & error.isfinite() & able).nonzero()[:, 0]
        if not len(index):  # an error is infinite only where the denoiser fails
            continue
        through = _Through(job, base, index, spent[index])
        Anderson(window=12, max_iterations=40).solve(through, x[index])
        spent[index] = through.evaluations
        better = through.best < error[index]
        where = index[better]
        latent[where], restored[where], error[where] = (
            part[better] for part in (through.latent, through.restored, through.best)
        )
    if job.callback is not None:
        restored = job.again(latent)
        spent += plan.evaluations
    notes = []
    for i in (error > job.goal).nonzero()[:, 0].tolist():
        index = torch.tensor([i], device=x.device)
        note = f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}, solved as a whole run"
        again = _run_map(plan, _restrict(job.select, index))
        value = _least_stretch(job, again, latent[index], x[index], plan.evaluations, spent[i : i + 1])
        if value is not None:
            note += (
                f"; the smallest singular value of its derivative is {value:.2g}, without a denoiser it would be "
                f"{plan.sigmas[-1] / plan.sigmas[0]:.2g}"
            )
        notes.append(note)
    checking = plan.evaluations * (2 if job.callback else 1)
    return job.result(Trajectory([latent], error[None], spent), restored, notes, checking=checking)


def _run_map(plan: Plan, select: Select) -> Callable[[Tensor, Tensor], Tensor]:
    """`(u, index) -> S(u)`."""
    return lambda u, index: run(plan, select(index), u)


class _Through(Equation):
    """`S(E^{-1}(z)) = image`. Each inverse starts from the last one and is as exact as it needs to be."""

    def __init__(self, job: _Job, base: Plan, index: Tensor, spent: Tensor) -> None:
        self.plan, self.base, self.select = job.plan, base, _restrict(job.select, index)
        x = job.x[index]
        goal = x.new_full((len(x),), job.goal)
        super().__init__(self.down_again, x, goal, job.budget[index], self.least(job.plan, base))
        self.evaluations = spent.clone()
        self.latent, self.restored, self.best = x.clone(), x.clone(), x.new_full((len(x),), torch.inf)
        self.accuracy = x.new_full((len(x),), 1e-3)
        self.warm: list[Tensor] | None = None

    @staticmethod
    def least(plan: Plan, base: Plan) -> int:
        """What a call costs at least: a run up, from a first guess, and one down."""
        return base.evaluations + 1 + plan.evaluations

    def residual(self, u: Tensor, index: Tensor) -> Tensor:
        """`image - S(E^{-1}(u))`, which counts what it costs itself."""
        return self.value[index] - self.function(u, index)

    def down_again(self, z: Tensor, index: Tensor) -> Tensor:
        """`S(E^{-1}(z))`."""
        part = _restrict(self.select, index)

        def tolerance(step: Step) -> Tensor:
            return self.accuracy[index] * max(1.0, step.sigma_next)

        starts = self.warm and [state[index] for state in self.warm]
        left = self.budget[index] - self.evaluations[index] - self.plan.evaluations
        path = invert_steps(self.base, part, z, tolerance, Anderson(max_iterations=25), left, starts)
        if self.warm is None:  # the first call is for all samples
            self.warm = [state.clone() for state in path.states]
        for kept, state in zip(self.warm, path.states, strict=True):
            kept[index] = state
        out = run(self.plan, part(torch.arange(len(index), device=z.device)), path.states[0])
        self.evaluations[index] += path.evaluations + self.plan.evaluations
        size = rms(out - self.value[index]).nan_to_num(torch.inf)
        better = size < self.best[index]
        self.best[index[better]] = size[better]
        self.latent[index[better]], self.restored[index[better]] = path.states[0][better], out[better]
        self.accuracy[index] = (0.004 * size).clamp(max=1e-3)
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
    fix = f"ki.sampler({name!r}, eta=0)" if getattr(plan.rule, "eta", 0.0) else "a deterministic sampler such as 'heun'"
    if plan.is_stochastic:
        raise ValueError(
            f"cannot invert {name}: it draws noise {plan.draws} times, so an image has a latent only together with its "
            f"noises; use extract_noise, or {fix}"
        )
    if all(step.x.alias() == State("x") for step in plan.steps):  # sa_solver discards its last, here its only, step
        raise ValueError(
            f"cannot invert {name} from sigma {plan.sigmas[0]:g} to {plan.sigmas[-1]:g}: its run leaves x as it is; "
            "give a longer schedule, or keep_last=True to a sampler that discards its last step"
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


def _method(name: object) -> Solver | Sweeps:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{unknown('method', name, METHODS)}, or a Solver")
    return METHODS[name]()


def tolerance(tol: float | None, x: Tensor) -> float:
    """What a round trip may miss, root mean square, to be called exact: `tol`, or what x's dtype allows."""
    if tol is None:
        return {torch.float64: 1e-9, torch.float32: 1e-5}.get(x.dtype, 8 * torch.finfo(x.dtype).eps)
    if not is_number(tol) or not 0 < tol < float("inf"):
        raise ValueError(f"tol must be a positive number, the rms of the round-trip error, got {tol!r}")
    return float(tol)


def _limit(max_evals: int | None, plan: Plan) -> int:
    if max_evals is None:
        return UNLIMITED
    least = 5 * plan.evaluations
    if not is_integer(max_evals) or max_evals < least:
        raise ValueError(f"max_evals must be an int of at least {least}, five runs of the sampler, got {max_evals!r}")
    return int(max_evals)
