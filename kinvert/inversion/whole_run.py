"""The route of runs whose steps remember earlier ones: one problem for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kinvert.denoisers import BoundDenoiser
from kinvert.engine import run, run_state
from kinvert.inversion.certificate import Found
from kinvert.inversion.noise_floor import NOISY, measure_noise
from kinvert.inversion.plain import Recorded, rising
from kinvert.inversion.problem import Guess, Problem, Reason, Search
from kinvert.inversion.solvers import Anderson, RunLevenbergMarquardt, Solver, Sweeps
from kinvert.inversion.task import Task, measure_fold
from kinvert.inversion.through import ThroughBase
from kinvert.plan import Plan, compile_plan
from kinvert.rules import DPMpp2SAncestral, Euler, Heun, Rule
from kinvert.tensors import rms

__all__ = ["WholeRun"]


@dataclass(frozen=True)
class WholeRun:
    r"""Sweep over all evaluations; for what that leaves, go through one invertible base sampler after the other.

    What is then still lost goes to `RunLevenbergMarquardt`, if the event has few values and the limit allows for it.

    Let S be the sampler's run, and E the run of a base on the same schedule, which is inverted step by step. Then
    `S(E^{-1}(z)) = image` is solved by Anderson's acceleration of `z <- z + image - S(E^{-1}(z))`. S is nearly
    singular, since it contracts whole regions of noise to one image, but so is E, and `S E^{-1}` is close to the
    identity.

    Attributes:
        bases: in the order in which they are tried: Euler is the cheapest, the others are closer to a sampler of
            order 2.
        outer: the root finder for z.
        inner: the root finder for the steps of E.
        last: the last resort, for events of few values; None leaves it out.
        near: errors up to so many times what is allowed are searched on, though the noise of the denoiser explains
            them: a search from elsewhere may end below it.
        again: such a search ends when the evaluations of a sample are so many times what they were.
        folded: a run folds if the least singular value of its derivative is below this part of what it would be
            without a denoiser.
        rounded: errors up to so many roundings of the image are rounding; those of the steps add up.
    """

    methods: ClassVar[dict[str, Callable[[], Solver]]] = {
        "auto": Sweeps,
        "sweeps": Sweeps,
        "levenberg": RunLevenbergMarquardt,
    }
    scope: ClassVar[str] = "run"

    bases: tuple[Rule, ...] = (Euler(), Heun(), DPMpp2SAncestral(eta=0.0))
    outer: Solver = field(default_factory=lambda: Anderson(window=12, max_iterations=40))
    inner: Solver = field(default_factory=lambda: Anderson(max_iterations=25))
    last: RunLevenbergMarquardt | None = field(default_factory=lambda: RunLevenbergMarquardt(starts=3, max_values=1024))
    near: float = 2.0
    again: int = 3
    folded: float = 0.1
    rounded: float = 30.0

    def accepts(self, plan: Plan) -> bool:
        """Tell whether the run starts from x alone."""
        return not plan.auxiliary

    def solve(self, task: Task, solver: Solver) -> Found:
        """Solve for the latent. With a limit the plain run comes first, as a guess; without one it comes last."""
        if not task.check:
            return self._unchecked(task, solver)
        task, asked = task.steadied()
        plan, x, up, once = task.plan, task.wide, rising(task.plan), task.plan.evaluations
        limited = task.limited
        budget = task.limit - once * (task.callback is not None) - 2 * once * (not limited)  # for the plain run
        latent, restored = x.clone(), torch.full_like(x, torch.nan)
        error, spent = x.new_full((len(x),), torch.finfo(x.dtype).max), torch.zeros_like(task.problem.budget)
        ended = torch.full_like(spent, int(Reason.STALLED))
        if plan.sigmas[-1] > 0:  # a step to 0 forgets x
            plain = Recorded.of(up, plan, task.denoiser, task.x, keep="outputs") if up and limited else None
            latent, restored, error, spent, ended = _sweep(task, solver, plain, budget)
            del plain  # as large as the run
            spent = _tell_noise(task, latent, restored, error, spent, ended, budget)
        most = torch.where(ended == Reason.PRECISION, self.again * spent, budget).clamp(max=budget)
        for base in [compile_plan(rule, plan.sigmas) for rule in self.bases]:
            least = ThroughBase.least(task, base)
            wanted = self._wants_more(task, error, ended) & (ended != Reason.CONVERGED)
            index = (wanted & (most - spent >= least)).nonzero()[:, 0]
            if not len(index) or task.watch.stopped:
                continue
            through = ThroughBase.of(task.take(index), base, self.inner, most[index] - spent[index])
            spent[index] += self.outer.solve(through, Guess(x[index])).evaluations
            best = through.best
            better = best.error < error[index]
            where = index[better]
            latent[where], restored[where], error[where] = (
                part[better] for part in (best.latent, best.restored, best.error)
            )
        spent = self._try_last(task, latent, restored, error, spent, ended, most)
        if up and not limited:
            error, spent = _try_plain(task, up, latent, restored, error, spent)
        if task.callback is not None:
            restored = task.sample(latent)
            spent += once
        reasons, notes = self._explain(task, latent, error, spent, ended, budget)
        checking = once * (2 if task.callback else 1)
        floor = torch.where((ended == Reason.PRECISION) & task.is_lost(error), error, 0.0)
        spent += asked
        return Found(latent, restored, spent, checking, error[None], reasons, failures=notes, floor=floor)

    def _unchecked(self, task: Task, solver: Solver) -> Found:
        """Find latents that nobody checks; with less than three runs that is the plain run up."""
        up, once = rising(task.plan), task.plan.evaluations
        if task.limit >= 3 * once or up is None:
            return replace(self.solve(replace(task, check=True), solver), restored=None, residuals=None)
        latent = run_state(up, task.denoiser, {"x": task.x})["x"]
        return Found(latent, None, torch.full_like(task.problem.budget, up.evaluations), 0)

    def _wants_more(self, task: Task, error: Tensor, ended: Tensor) -> Tensor:
        """Tell which samples are worth another search: those that are lost, but not in noise far above their goal."""
        noisy = ended == Reason.PRECISION
        if not task.is_half:
            noisy &= error > self.near * task.judge.enough
        return task.is_lost(error) & error.isfinite() & ~noisy  # infinite only if the denoiser fails

    def _try_last(
        self, task: Task, latent: Tensor, restored: Tensor, error: Tensor, spent: Tensor, ended: Tensor, most: Tensor
    ) -> Tensor:
        """Try the last resort on small events that are still lost; return what is spent then."""
        if self.last is None or task.x[0].numel() > self.last.max_values or task.is_half:
            return spent
        wanted = self._wants_more(task, error, ended)
        needs = (task.x[0].numel() + 4) * task.plan.evaluations
        index = (wanted & (most - spent >= needs)).nonzero()[:, 0]
        if not len(index):
            return spent
        some = task.take(index)
        root = self.last.solve(replace(some.problem, budget=most[index] - spent[index]), Guess(latent[index]))
        if root.reached is not None:
            better = some.error(root.reached) < error[index]
            where = index[better]
            latent[where], restored[where] = root.u[better], root.reached[better]
            error[where] = some.error(root.reached)[better]
        return spent.index_add(0, index, root.evaluations)

    def _explain(
        self, task: Task, latent: Tensor, error: Tensor, spent: Tensor, ended: Tensor, budget: int
    ) -> tuple[dict[int, Reason], list[str]]:
        """Return, for each sample that was not inverted, why, and what to tell; what that costs is added to `spent`."""
        plan, x, reasons, notes = task.plan, task.wide, dict[int, Reason](), list[str]()
        for i in task.failed(error):
            index = torch.tensor([i], device=x.device)
            note = f"sample {task.samples[i]} not inverted: round-trip error {error[i]:.2g}, solved as a whole run"
            if ended[i] == Reason.PRECISION:
                notes.append(f"{note}; {NOISY}")
                reasons[i] = Reason.PRECISION
                continue
            poor, some = budget - int(spent[i]) < 2 * plan.evaluations, task.take(index)
            rows, y, zero = some.solving, x[index], torch.zeros_like(spent[i : i + 1])
            problem = Problem(partial(_run_rows, plan, rows), y, rms(y), zero, plan.evaluations, task.eps)
            value = measure_fold(task, problem, latent[index], spent[i : i + 1])
            free = plan.sigmas[-1] / plan.sigmas[0]
            if value is not None:
                note += (
                    f"; the smallest singular value of its derivative is {value:.2g}, without a denoiser it would be "
                    f"{free:.2g}"
                )
            notes.append(note + "; the search was stopped" * task.watch.stopped)
            reasons[i] = Reason.BUDGET if poor else Reason.STALLED
            if error[i] <= self.rounded * task.eps * task.judge.size[i]:
                reasons[i] = Reason.PRECISION
            elif task.watch.stopped:
                reasons[i] = Reason.STOPPED
            elif not poor and value is not None and value < self.folded * free:
                reasons[i] = Reason.FOLD
        return reasons, notes


def _try_plain(
    task: Task, up: Plan, latent: Tensor, restored: Tensor, error: Tensor, spent: Tensor
) -> tuple[Tensor, Tensor]:
    """Put in what the plain run finds where that is better; return the errors, and what is spent then."""
    index = (task.is_lost(error) | task.is_half).nonzero()[:, 0]
    if not len(index):
        return error, spent
    some, narrow = task.take(index), restored.dtype
    plain = Recorded.of(up, task.plan, some.denoiser, some.x)
    better, images = some.error(plain.restored) < error[index], plain.restored.to(narrow)
    latent[index[better]], restored[index[better]] = plain.latent.to(narrow)[better], images[better]
    return task.error(restored), spent.index_add(0, index, torch.full_like(index, plain.evaluations))


def _tell_noise(
    task: Task, latent: Tensor, restored: Tensor, error: Tensor, spent: Tensor, ended: Tensor, budget: int
) -> Tensor:
    """Mark samples in `ended` whose errors are the denoiser's noise; return what is spent then.

    It takes two runs of each sample that is left, or four, before anything dearer is tried on it.
    """
    unknown = (ended != Reason.CONVERGED) & (ended != Reason.PRECISION) & error.isfinite()
    able = budget - spent >= 5 * task.plan.evaluations
    index = (task.is_lost(error) & unknown & able).nonzero()[:, 0]
    if not len(index) or task.is_half or task.watch.stopped:
        return spent
    search = Search(task.problem, latent)
    search.residual = error.clone()
    noise = measure_noise(search, index, restored[index])
    ended[index] = torch.where(noise > 0, int(Reason.PRECISION), ended[index])
    return spent + search.evaluations


def _run_rows(plan: Plan, denoiser: BoundDenoiser, u: Tensor, index: Tensor) -> Tensor:
    """Run the sampler on all rows of a problem, in its own dtype."""
    return run(plan, denoiser, u)


def _sweep(
    task: Task, solver: Solver, plain: Recorded | None, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what a solver of whole runs finds: latents, images, errors, cost, and which samples it left unsolved."""
    x, n = task.wide, len(task.wide)
    if plain is None:
        expected = x[:, None].expand(-1, task.plan.evaluations, *x.shape[1:])
        guess, spent = Guess(x, expected), 0
    else:
        guess, spent = plain.guess(x), plain.evaluations
    problem = replace(task.problem, budget=torch.full((n,), budget - spent, dtype=torch.int64, device=x.device))
    root = solver.solve(problem, guess)
    restored = root.reached if root.reached is not None else task.sample(root.u).to(x.dtype)
    cost = root.evaluations + spent + (root.reached is None) * task.plan.evaluations
    return root.u, restored, task.error(restored), cost, root.reason
