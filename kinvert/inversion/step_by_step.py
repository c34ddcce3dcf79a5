"""The route of runs whose steps remember nothing: one equation per step, from the image up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kinvert.devices import has_float64
from kinvert.inversion.certificate import Found
from kinvert.inversion.climbs import affordable, climb, climb_once
from kinvert.inversion.noise_floor import NOISY
from kinvert.inversion.plain import Recorded, rising
from kinvert.inversion.problem import Reason
from kinvert.inversion.solvers import (
    Anderson,
    Auto,
    Continuation,
    Damped,
    LevenbergMarquardt,
    NewtonKrylov,
    Picard,
    Solver,
)
from kinvert.inversion.steps import Trajectory, contraction, invert_steps, levels_of, step_problem
from kinvert.inversion.task import RUNS, UNLIMITED, Task, measure_fold
from kinvert.plan import Plan

__all__ = ["StepByStep"]


@dataclass(frozen=True)
class _Attempt:
    """One thing to try.

    Attributes:
        make: returns trajectories of a task, and where they end.
        cost: the most evaluations that it takes of a sample.
        is_search: whether it solves for a latent; a user who stops the search still gets the plain run.
    """

    make: Callable[[Task], tuple[Trajectory, Tensor]]
    cost: int
    is_search: bool = True


@dataclass(frozen=True)
class StepByStep:
    """Solve each step for the state before it; then sample the latent, and solve finer if the steps' errors add up.

    Attributes:
        share, most: the tolerance of a step, in parts of the run's: `min(most, share / sqrt(steps))`. Errors of N steps
            add up like independent ones, about sqrt(N), and most steps end below their tolerance.
        retries, finer: how often a sample whose steps are solved and whose round trip misses is solved again, and the
            factor by which the tolerances of its steps shrink, at least.
        reserve: runs that must be affordable for that.
        folded: a step folds if the least singular value of its derivative is below this part of what it would be
            without a denoiser.
        rounded: residuals up to so many roundings of the state are rounding.
        smallest: size of the smallest attempt to solve the steps one after the other, in runs; others are three, nine,
            ... times as large. Less is for `climb`.
    """

    methods: ClassVar[dict[str, Callable[[], Solver]]] = {
        "auto": Auto,
        "anderson": Anderson,
        "damped": Damped,
        "continuation": Continuation,
        "levenberg": LevenbergMarquardt,
        "newton": NewtonKrylov,
        "picard": Picard,
    }
    scope: ClassVar[str] = "step"

    share: float = 1.5
    most: float = 0.45
    retries: int = 3
    finer: float = 0.1
    reserve: int = 3
    folded: float = 0.1
    rounded: float = 8.0
    smallest: int = 24

    def accepts(self, plan: Plan) -> bool:
        """Tell whether every step of the Plan is a map of x alone."""
        return not plan.auxiliary and not plan.is_multistep

    def solve(self, task: Task, solver: Solver) -> Found:
        """Make the attempts one after the other, each for the samples that those before it did not invert.

        Their order and sizes do not depend on the limit, only how many there are; see `_attempts`.
        """
        if not task.check:
            return self._unchecked(task, solver)
        asked: Tensor | int = 0
        if not task.limited or 2 * task.limit >= RUNS * task.plan.evaluations:  # or else no climb is to miss two
            task, asked = task.steadied()
        plan, x = task.plan, task.wide
        first, *others = self._attempts(task, solver)
        found, restored = first.make(task)
        for attempt in others:
            wanted = task.is_lost(task.error(restored))
            wanted = wanted & ~_is_settled(found) if attempt.is_search else wanted | task.is_half
            wanted = wanted & (task.limit - found.evaluations >= attempt.cost)
            index = wanted.nonzero()[:, 0]
            if len(index) and not (task.watch.stopped and attempt.is_search):
                trial, images = attempt.make(task.take(index))
                self._take_better(task, found, restored, index, trial, images)
        cost = plan.evaluations + 2 * len(plan.steps[-1].stages)  # of the contraction
        able = torch.arange(len(x), device=x.device)
        able = able[task.limit - found.evaluations >= cost]
        if task.watch.stopped:
            able = able[:0]
        factors = x.new_full((len(plan.steps), len(x)), torch.nan)
        if len(able):
            states = [state[able] for state in found.states]
            rows = task.solving if len(able) == len(x) else task.solving.take(able)
            noise = torch.zeros_like(task.judge.size) if found.noise is None else found.noise
            factors[:, able] = contraction(plan, rows, states, noise.clamp(min=task.eps)[able])
            found.evaluations[able] += cost
        found.evaluations += asked
        reasons, notes = self._explain(task, found, restored)
        return Found(
            latent=found.states[0],
            restored=restored,
            evaluations=found.evaluations,
            checking=plan.evaluations + cost * bool(len(able)),
            residuals=found.residuals,
            reasons=reasons,
            failures=notes,
            contraction=factors if len(able) else None,
            floor=None if found.noise is None else found.noise * task.judge.size,
        )

    def _unchecked(self, task: Task, solver: Solver) -> Found:
        """Find latents that nobody checks, in one attempt."""
        plan, once = task.plan, task.plan.evaluations
        if solver == Auto() and task.limit < self.smallest * once and plan.sigmas[-1] > 0:
            latent, spent = climb_once(task, task.limit // once)
            return Found(latent, None, spent, 0)
        allowed = _allowed(task, min(self.most, self.share * len(plan.steps) ** -0.5))
        budget = torch.full_like(task.problem.budget, task.limit)
        found = invert_steps(
            plan, task.solving, task.wide, lambda step: allowed[step.index], solver, budget, None, task.eps, task.watch
        )
        return Found(found.states[0], None, found.evaluations, 0, residuals=found.residuals)

    def _attempts(self, task: Task, solver: Solver) -> list[_Attempt]:
        """Return what is tried, one after the other, on the samples that are still lost.

        The sizes do not depend on the limit, only how many of them there are: what a smaller limit returns is among
        what a larger one has the choice of.
        """
        once, runs = task.plan.evaluations, task.limit // task.plan.evaluations

        def solved(size: int) -> _Attempt:
            return _Attempt(lambda some: self._attempt(some, solver, size), size + once)

        if solver.is_published:  # one attempt, and the contraction
            return [solved(max(task.limit - 2 * once - 2 * len(task.plan.steps[-1].stages), once + 1))]
        up = rising(task.plan)
        plain = [] if up is None else [_Attempt(lambda some: _plain(some, up), 2 * once, is_search=False)]
        if solver != Auto() or up is None:
            rest = 3 * once if runs >= 4 and plain else once
            return [solved(task.limit - rest), *plain]
        climbs, cost = affordable(task.plan, runs)
        sizes, left, size = list[int](), runs - affordable(task.plan, UNLIMITED)[1], self.smallest
        while size + 1 <= left:
            sizes, left, size = [size, *sizes], left - size - 1, 3 * size
        full = [solved(size * once) for size in sizes]
        plain = plain if full or task.is_half else []  # samples that noise keeps from the climbs have it too
        return [*full, _Attempt(lambda some: climb(some, up, climbs), cost * once), *plain]

    def _attempt(self, task: Task, solver: Solver, most: int) -> tuple[Trajectory, Tensor]:
        """Solve each step; solve again, and finer, for samples whose steps' errors add up to too much.

        Returns the trajectory and what the sampler makes of its latent. It costs at most `most` evaluations of each
        sample, and one run.
        """
        plan, x, enough = task.plan, task.wide, task.judge.enough
        allowed = _allowed(task, min(self.most, self.share * len(plan.steps) ** -0.5))
        budget = torch.full((len(x),), most, dtype=torch.int64, device=x.device)
        found = invert_steps(
            plan, task.solving, x, lambda step: allowed[step.index], solver, budget, None, task.eps, task.watch
        )
        restored = task.sample(found.states[0]).to(x.dtype)
        found.evaluations += plan.evaluations
        residuals = found.residuals.clone()  # of the last attempt
        for _ in range(self.retries):
            solved, error = (residuals <= allowed).all(0), task.error(restored)
            factor = (self.finer * enough / error).clamp(max=self.finer)
            finer = (allowed * factor).maximum(task.eps * task.unit(0.0))
            affordable = budget - found.evaluations > self.reserve * plan.evaluations
            again = solved & (error > enough) & (finer < allowed).any(0) & affordable
            index = again.nonzero()[:, 0]
            if not len(index) or task.watch.stopped:
                break
            allowed[:, index] = finer[:, index]
            trial, images = _solve_again(
                task.take(index).steady(), solver, found, allowed[:, index], index, (budget - found.evaluations)[index]
            )
            residuals[:, index] = trial.residuals
            self._take_better(task, found, restored, index, trial, images, equal=True)
        return found, restored

    @staticmethod
    def _take_better(
        task: Task, found: Trajectory, restored: Tensor, index: Tensor, trial: Trajectory, images: Tensor,
        equal: bool = False,
    ) -> None:  # fmt: skip
        """Put what is better of a trial of the samples `index` in its places; its evaluations count in any case."""
        some = replace(task, x=task.x[index], region=None if task.region is None else task.region[index])
        new, old = some.error(images), some.error(restored[index])
        better = new <= old if equal else new < old
        places = index[better]
        restored[places] = images[better]
        for kept, state in zip(found.states, trial.states, strict=True):
            kept[places] = state[better]
        found.residuals[:, places] = trial.residuals[:, better]
        if found.reasons is not None and trial.reasons is not None:
            found.reasons[:, places] = trial.reasons[:, better]
        found.evaluations[index] += trial.evaluations

    def _explain(self, task: Task, found: Trajectory, restored: Tensor) -> tuple[dict[int, Reason], list[str]]:
        """Return, for each sample that was not inverted, why, and what to tell."""
        error, allowed, x = task.error(restored), _allowed(task, 1.0), task.wide
        reasons, notes = {}, []
        for i in task.failed(error):
            index = torch.tensor([i], device=x.device)
            step = task.plan.steps[int((found.residuals[:, i] / allowed[:, i]).argmax())]
            residual = float(found.residuals[step.index, i])
            note = (
                f"sample {task.samples[i]} not inverted: round-trip error {error[i]:.2g}; worst is step {step.index} "
                f"(sigma {step.sigma:.4g} -> {step.sigma_next:.4g}), residual {residual:.2g}"
            )
            y, u = found.states[step.index + 1][index], found.states[step.index][index]
            levels, spent = levels_of(task.plan, y)[step.index], found.evaluations[i : i + 1]
            rows, zero = task.solving.take(index), torch.zeros_like(spent)
            problem = step_problem(task.plan, step, rows, y, levels, y.new_zeros(1), zero, task.eps)
            ended = _ended(found.reasons, step.index, i)
            noisy = ended == Reason.PRECISION
            value = None if noisy else measure_fold(task, problem, u, spent)
            if noisy:
                note += f"; {NOISY}"
            elif task.watch.stopped:
                note += "; the search was stopped"
            if value is not None:
                note += f", where the smallest singular value of the step's derivative is {value:.2g}"
            rounded = residual <= self.rounded * task.eps * float(task.unit(step.sigma)[i])
            left = task.limit - int(found.evaluations[i])
            poor = left < self.reserve * task.plan.evaluations
            if not noisy and residual <= float(allowed[step.index, i]) and poor:
                ended = Reason.BUDGET  # for solving the steps finer, since their errors add up
            folded = value is not None and value < self.folded * step.sigma_next / step.sigma
            if ended == Reason.BUDGET and folded and task.limit >= RUNS * task.plan.evaluations:
                ended = Reason.FOLD
            reasons[i] = _reason(Reason.STOPPED if task.watch.stopped and not noisy else ended, rounded, folded)
            if reasons[i] == Reason.BUDGET and left >= task.plan.evaluations:
                note += f"; {left} evaluations are left, too few for another attempt"
            notes.append(note)
        return reasons, notes


def _ended(reasons: Tensor | None, step: int, i: int) -> Reason:
    """Return how the attempt on a sample ended: at its worst step, or at the first other one that it did not solve.

    `reasons` is None if there were no evaluations for an attempt.
    """
    if reasons is None:
        return Reason.BUDGET
    every = [int(reasons[step, i]), *reasons[:, i].tolist()]  # all CONVERGED if the plain run came closer
    return next((Reason(code) for code in every if code != Reason.CONVERGED), Reason.STALLED)


def _reason(ended: Reason, rounded: bool, folded: bool) -> Reason:
    """Return why a sample was not inverted, from how its worst step ended."""
    if ended in (Reason.NOT_FINITE, Reason.PRECISION):
        return ended
    if rounded:
        return Reason.PRECISION
    if ended in (Reason.BUDGET, Reason.STOPPED):
        return ended
    return Reason.FOLD if folded else Reason.STALLED


def _is_settled(found: Trajectory) -> Tensor:
    """Tell which samples are solved as well as the network's noise allows, shape (batch,)."""
    if found.reasons is None:
        return torch.zeros_like(found.evaluations, dtype=torch.bool)
    noisy = found.reasons == Reason.PRECISION
    return ((found.reasons == Reason.CONVERGED) | noisy).all(0) & noisy.any(0)


def _plain(task: Task, up: Plan | None) -> tuple[Trajectory, Tensor]:
    """Return what plain unsampling finds, on the way that the sampler takes from there, and where it ends."""
    if up is None:
        raise ValueError(f"{task.plan.rule.name} cannot run upwards, so that there is no plain run")
    plan, x = task.plan, task.wide
    plain = Recorded.of(up, plan, task.denoiser, task.x, task.callback, keep="inputs")
    residuals = x.new_zeros(len(plan.steps), len(x))
    residuals[-1] = task.error(plain.restored)  # every other step goes where the next one starts
    spent = torch.full((len(x),), plain.evaluations, dtype=torch.int64, device=x.device)
    return Trajectory(plain.trajectory(plan, x), residuals, spent), plain.restored.to(x.dtype)


def _solve_again(
    task: Task, solver: Solver, found: Trajectory, allowed: Tensor, index: Tensor, left: Tensor
) -> tuple[Trajectory, Tensor]:
    """Solve the steps of the samples `index` again, from where they are; return the trajectory and its images.

    The states are in float64 if the device has it: at high noise the rounding of float32 is too much for an image on
    the edge between two modes of the data.
    """
    plan, narrow = task.plan, task.wide.dtype
    if task.x.dtype == torch.float32 and has_float64(task.x.device):
        task = replace(task, states=torch.float64)
    x = task.wide
    allowed, starts = allowed.to(x), [state[index].to(x) for state in found.states]
    path = invert_steps(
        plan, task.solving, x, lambda step: allowed[step.index], solver, left, starts, task.eps, task.watch
    )
    states, residuals = [state.to(narrow) for state in path.states], path.residuals.to(narrow)
    everyone = torch.arange(len(index), device=x.device)
    images = task.sample_some(states[0], everyone)
    return Trajectory(states, residuals, path.evaluations + plan.evaluations, path.reasons), images


def _allowed(task: Task, share: float) -> Tensor:
    """Return the rms of the residual that is good enough, shape (steps, batch): a share of the aim, above rounding.

    What a step misses shrinks as sigma does.
    """
    eps = torch.finfo(task.wide.dtype).eps
    rows = [(share * task.aim * task.unit(step.sigma_next)).clamp(min=eps * step.sigma) for step in task.plan.steps]
    return torch.stack(rows)
