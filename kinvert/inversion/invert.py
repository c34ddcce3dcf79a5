r"""`invert`: the latent that this sampler, on this schedule, maps to this image.

One-step rules are inverted step by step (`stepwise`). A multistep rule needs values at noisier states that are still
unknown, so its run is solved as a whole. With S the run of the sampler, and E the run of Euler's method on the same
schedule, whose inverse is had step by step (another one-step sampler where Euler's does not do), z is sought with
`S(E^{-1}(z)) = image`, by Anderson's acceleration of `z <- z + image - S(E^{-1}(z))`. S is nearly singular, since it
contracts whole regions of noise to one image, but so is E, and `S E^{-1}` is close to the identity. S enters as a
black box. Algebraically reversible rules are undone in closed form (`reversible`).

Every result is judged by sampling it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser, Masked, guide
from kinvert.engine import Callback, Memory, check_state, run, run_state
from kinvert.inversion.result import Inversion, rms
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.solvers import Anderson, Damped, Equation, NewtonKrylov, Picard, Solver
from kinvert.inversion.stepwise import Auto, Select, Trajectory, invert_steps
from kinvert.plan import Plan, Step, as_schedule, compile_plan
from kinvert.rules import DPMpp2SAncestral, Euler, Heun, Rule
from kinvert.rules import sampler as resolve_sampler
from kinvert.rules.base import one_of
from kinvert.sampling import with_bar

METHODS: dict[str, Callable[[], Solver]] = {
    "auto": Auto,
    "anderson": Anderson,
    "damped": Damped,
    "newton": NewtonKrylov,
    "picard": Picard,
}
# Invertible step by step, in the order in which a whole run is tried through them: Euler is the cheapest, the others
# are closer to a sampler of order 2.
BASES = (Euler(), Heun(), DPMpp2SAncestral(eta=0.0))
UNLIMITED = 2**62


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str | Solver = "auto",
    tol: float | None = None,
    max_evals: int | None = None,
    cfg: float = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Inversion:
    """Find the latent that a deterministic sampler maps to an image, to a tolerance, and check it.

    Args:
        denoiser, cfg, positive, negative: as in `sample`. Forward-mode derivatives are taken of it by the method
            "newton", and by "auto" where nothing else helps.
        x: image, shape (batch, *event): the state at `sigmas[-1]`.
        sigmas: the decreasing sampling schedule. It must end above 0, e.g. `sigmas[:-1]`: the step to 0 returns the
            denoised image and forgets x.
        sampler: a deterministic sampler, by name or as a rule.
        method: root finder: "auto", "anderson", "newton", "damped", "picard" (the published fixed point) or a
            `Solver`. Multistep samplers are solved as a whole run by Anderson's method, whatever it says.
        tol: rms of `sample(latent) - x` to reach, absolute; by default 1e-9 in float64 and 1e-5 in float32.
        max_evals: denoiser evaluations that one sample may cost, the check included; None sets no limit.
        mask: 1 = invert, 0 = keep x, as in `unsample`.
        callback: called after each step of the run that checks the result.
        progress: show a progress bar of that run.

    Returns:
        An `Inversion`. Where a sample could not be inverted, its `converged` is false and its latent the best one
        found; a RuntimeWarning says so. For an algebraically reversible sampler `memory` belongs to the latent.

    Raises:
        ValueError: a sampler that draws noise, has no Plan or forgets x in some step, with what to use instead; any
            other input that cannot work.
        TypeError: as in `sample`.
    """
    check_state(x)
    solver = method if isinstance(method, Solver) else _method(method)
    plan = compile_plan(resolve_sampler(sampler), _falling(sigmas))
    _check_invertible(plan)
    goal = _tolerance(tol, x)
    bound: Any = guide(denoiser, cfg, positive, negative, pair=plan.is_guided)
    bound = bound if mask is None else Masked(bound, mask, x)
    budget = torch.full((len(x),), _budget(max_evals, plan), dtype=torch.int64, device=x.device)
    if plan.auxiliary:
        undone = invert_reversible(plan, bound, x)
        none = x.new_zeros(1, len(x))  # nothing was solved, so nothing is left over
        found = Trajectory([undone.latent], none, torch.full_like(budget, undone.evaluations))
        return _certify(plan.closed, bound, x, found, goal, callback, progress, undone.memory)
    solve = _whole_run if plan.is_multistep else _step_by_step
    found = solve(plan, lambda index: bound.select(index, len(x)), x, goal, solver, budget)
    return _certify(plan, bound, x, found, goal, callback, progress, {})


def _step_by_step(plan: Plan, select: Select, x: Tensor, goal: float, solver: Solver, budget: Tensor) -> Trajectory:
    """Solve each step; "auto" starts again for samples that did not come out.

    Where a step has several solutions, one solver may take one from which the next step has none, and another not.
    """
    found, error = _refined(plan, select, x, goal, solver, budget)
    for other in (Picard(), Anderson(window=2, tau=0.5)) if isinstance(solver, Auto) else ():
        index = ((error > goal) & (budget - found.evaluations > 4 * plan.evaluations)).nonzero()[:, 0]
        if not len(index):
            break
        left = (budget - found.evaluations)[index]
        again, again_error = _refined(plan, _restrict(select, index), x[index], goal, other, left)
        found.evaluations[index] += again.evaluations
        better = again_error < error[index]
        again.evaluations.zero_()  # they are counted
        _merge(found, again, index, better)
        error[index[better]] = again_error[better]
    return found


def _refined(
    plan: Plan, select: Select, x: Tensor, goal: float, solver: Solver, budget: Tensor
) -> tuple[Trajectory, Tensor]:
    """Solve each step; for samples whose steps' errors add up to more than the goal, again and more exactly."""
    found: Trajectory | None = None
    errors = x.new_full((len(x),), torch.inf)
    index = torch.arange(len(x), device=x.device)
    for share in (0.3, 0.03, 0.003):

        def tolerance(step: Step, share: float = share, count: int = len(index)) -> Tensor:
            floor = torch.finfo(x.dtype).eps * step.sigma
            return x.new_full((count,), max(share * goal * max(1.0, step.sigma_next), floor))

        part, left = _restrict(select, index), budget[index]
        starts = None
        if found is not None:
            starts, left = [state[index] for state in found.states], left - found.evaluations[index]
        again = invert_steps(plan, part, x[index], tolerance, solver, left, starts)
        again.evaluations += plan.evaluations  # of the check that follows
        everyone = torch.arange(len(index), device=x.device)
        error = rms(run(plan, part(everyone), again.states[0]) - x[index]).nan_to_num(torch.inf)
        found = again if found is None else _merge(found, again, index, error < errors[index])
        errors[index] = torch.minimum(error, errors[index])
        solved_steps = (again.residuals <= torch.stack([tolerance(step) for step in plan.steps])).all(0)
        affordable = budget[index] - found.evaluations[index] > 4 * plan.evaluations
        index = index[solved_steps & (error > goal) & affordable]
        if not len(index):
            break
    assert found is not None
    return found, errors


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


def _whole_run(plan: Plan, select: Select, x: Tensor, goal: float, solver: Solver, budget: Tensor) -> Trajectory:
    """Solve through one invertible base sampler after the other, each for the samples that the others left."""
    latent, best = x.clone(), x.new_full((len(x),), torch.inf)
    spent = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for base in BASES:
        index = ((best > goal) & (spent < budget)).nonzero()[:, 0]
        if not len(index):
            break
        through = _Through(
            plan, compile_plan(base, plan.sigmas), _restrict(select, index), x[index], (budget - spent)[index]
        )
        equation = Equation(through, x[index], x.new_full((len(index),), goal), (budget - spent)[index], cost=0)
        Anderson(window=12, max_iterations=40).solve(equation, x[index])
        spent[index] += through.spent
        better = through.best < best[index]
        latent[index[better]], best[index[better]] = through.latent[better], through.best[better]
    return Trajectory([latent], best[None], spent)


class _Through:
    """`(z, index) -> S(E^{-1}(z))`. Each inverse starts from the last one and is as exact as it needs to be."""

    def __init__(self, plan: Plan, base: Plan, select: Select, x: Tensor, budget: Tensor) -> None:
        self.plan, self.base, self.select, self.x, self.budget = plan, base, select, x, budget
        self.latent, self.best = x.clone(), x.new_full((len(x),), torch.inf)
        self.spent = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.accuracy = x.new_full((len(x),), 1e-3)
        self.warm: list[Tensor] | None = None

    def __call__(self, z: Tensor, index: Tensor) -> Tensor:
        part = _restrict(self.select, index)

        def tolerance(step: Step) -> Tensor:
            return self.accuracy[index] * max(1.0, step.sigma_next)

        starts = self.warm and [state[index] for state in self.warm]
        left = self.budget[index] - self.spent[index]
        path = invert_steps(self.base, part, z, tolerance, Anderson(max_iterations=25), left, starts)
        if self.warm is None:  # the first call is for all samples
            self.warm = [state.clone() for state in path.states]
        for kept, state in zip(self.warm, path.states, strict=True):
            kept[index] = state
        out = run(self.plan, part(torch.arange(len(index), device=z.device)), path.states[0])
        self.spent[index] += path.evaluations + self.plan.evaluations
        size = rms(out - self.x[index]).nan_to_num(torch.inf)
        better = size < self.best[index]
        self.latent[index[better]], self.best[index[better]] = path.states[0][better], size[better]
        self.accuracy[index] = (0.004 * size).clamp(max=1e-3)
        return out


def _certify(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    found: Trajectory,
    goal: float,
    callback: Callback | None,
    progress: bool,
    memory: Memory,
) -> Inversion:
    """Sample the latent again, and say what came out."""
    latent = found.states[0]
    if progress:
        callback = with_bar(callback, f"check {plan.rule.name}", len(plan.steps), plan.sigmas[-1])
    error = rms(run_state(plan, denoiser, {"x": latent, **memory}, callback=callback)["x"] - x)
    converged = error <= goal
    notes = []
    for i in (~converged).nonzero()[:, 0].tolist():
        where = f"the whole run, residual {found.residuals[0, i]:.2g}"
        if len(found.residuals) == len(plan.steps) and not plan.is_multistep:
            worst = int(found.residuals[:, i].argmax())
            step = plan.steps[worst]
            where = f"step {worst} (sigma {step.sigma:.4g} -> {step.sigma_next:.4g})"
            where += f", residual {found.residuals[worst, i]:.2g}"
        notes.append(f"sample {i} not inverted: round-trip error {error[i]:.2g}; worst is {where}")
    if notes:
        warnings.warn(f"invert({plan.rule.name}): {'; '.join(notes)}", RuntimeWarning, stacklevel=4)
    return Inversion(
        latent=latent,
        residuals=found.residuals,
        converged=converged,
        evaluations=found.evaluations + plan.evaluations,
        round_trip_error=error,
        tolerance=goal,
        sigmas=plan.sigmas,
        memory=memory,
        warnings=tuple(notes),
    )


def _falling(sigmas: Any) -> tuple[float, ...]:
    schedule = as_schedule(sigmas)
    if schedule[0] < schedule[-1]:
        raise ValueError("sigmas must be the decreasing sampling schedule, got a rising one; use sigmas.flip(0)")
    return schedule


def _check_invertible(plan: Plan) -> None:
    name = plan.rule.name
    fix = f"ki.sampler({name!r}, eta=0)" if getattr(plan.rule, "eta", 0.0) else "a deterministic sampler such as 'heun'"
    if plan.is_stochastic:
        raise ValueError(
            f"cannot invert {name}: it draws noise {plan.draws} times, so an image has a latent only together with its "
            f"noises; use extract_noise, or {fix}"
        )
    for step in plan.steps:
        if step.forgets_x:
            hint = "stop at sigma_min > 0, e.g. sigmas[:-1]" if step.sigma_next == 0 else f"use {fix}"
            raise ValueError(
                f"cannot invert the step of {name} from sigma {step.sigma:g} to {step.sigma_next:g}: x has "
                f"coefficient 0 there; {hint}"
            )


def _method(name: object) -> Solver:
    if name not in METHODS:
        raise ValueError(f"method must be a Solver or {one_of(name, METHODS)}")
    return METHODS[str(name)]()


def _tolerance(tol: float | None, x: Tensor) -> float:
    if tol is None:
        return {torch.float64: 1e-9, torch.float32: 1e-5}.get(x.dtype, 8 * torch.finfo(x.dtype).eps)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < float("inf"):
        raise ValueError(f"tol must be a positive number, the rms of the round-trip error, got {tol!r}")
    return float(tol)


def _budget(max_evals: int | None, plan: Plan) -> int:
    if max_evals is None:
        return UNLIMITED
    least = 5 * plan.evaluations
    if isinstance(max_evals, bool) or not isinstance(max_evals, int) or max_evals < least:
        raise ValueError(f"max_evals must be an int of at least {least}, five runs of the sampler, got {max_evals!r}")
    return max_evals - 2 * plan.evaluations  # the checks
