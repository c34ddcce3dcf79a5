"""The inverse of a run as a whole: by sweeps over its evaluations, and for what they leave through another sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kinvert.engine import run
from kinvert.inversion.job import UNLIMITED, Job, least_stretch, restrict
from kinvert.inversion.plain import Recorded, rising
from kinvert.inversion.result import Inversion
from kinvert.inversion.solvers import Anderson, Equation, Select
from kinvert.inversion.stepwise import Trajectory, invert_steps
from kinvert.inversion.trajectory import Sweeps
from kinvert.plan import Plan, Step, compile_plan
from kinvert.rules import DPMpp2SAncestral, Euler, Heun

# Invertible step by step, in the order in which a whole run is tried through them: Euler is the cheapest, the others
# are closer to a sampler of order 2.
BASES = (Euler(), Heun(), DPMpp2SAncestral(eta=0.0))


def whole_run(job: Job, sweeps: Sweeps) -> Inversion:
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
    checking = once * (2 if job.callback else 1)
    notes = _verdicts(job, latent, error, spent)
    return job.result(Trajectory([latent], error[None], spent), restored, notes, checking=checking)


def _verdicts(job: Job, latent: Tensor, error: Tensor, spent: Tensor) -> list[str]:
    """What is to be said of the samples that were not inverted; evaluations that go into it are added to `spent`."""
    plan, x, notes = job.plan, job.wide, []
    for i in (error > job.tol * job.judge.size).nonzero()[:, 0].tolist():
        index = torch.tensor([i], device=x.device)
        note = f"sample {job.samples[i]} not inverted: round-trip error {error[i]:.2g}, solved as a whole run"
        again = _run_map(plan, restrict(job.select, index))
        value = least_stretch(job, again, latent[index], x[index], plan.evaluations, spent[i : i + 1])
        if value is not None:
            note += (
                f"; the smallest singular value of its derivative is {value:.2g}, without a denoiser it would be "
                f"{plan.sigmas[-1] / plan.sigmas[0]:.2g}"
            )
        notes.append(note)
    return notes


def _run_map(plan: Plan, select: Select) -> Callable[[Tensor, Tensor], Tensor]:
    """`(u, index) -> S(u)`."""
    return lambda u, index: run(plan, select(index), u)


class _Through(Equation):
    """`S(E^{-1}(z)) = image`. Each inverse starts from the last one and is as exact as it needs to be.

    That is a thousandth of the error that is left, and with every call a little more: an inverse that is as exact as
    the change of z is small would be returned as it is, and the iteration would stand still.
    """

    def __init__(self, job: Job, base: Plan, index: Tensor, budget: Tensor) -> None:
        self.job = job.part(index)
        x, judge = self.job.wide, self.job.judge
        enough = max(job.tol, job.eps) * judge.size * judge.share
        super().__init__(self.down_again, x, enough, budget, self.least(job, base))
        self.base, self.most = base, self._most(job, base)
        self.latent, self.restored, self.best = x.clone(), x.clone(), x.new_full((len(x),), torch.inf)
        self.accuracy = x.new_full((len(x),), 1e-3)
        self.warm: list[Tensor] | None = None

    @staticmethod
    def _most(job: Job, base: Plan) -> int | None:
        """What an inverse may cost where there is a limit, whatever it is: a larger one makes the same calls, and more.

        None: what is left.
        """
        limited = job.limit < UNLIMITED and job.plan.sigmas[-1] > 0
        return 8 * base.evaluations if limited else None

    @classmethod
    def least(cls, job: Job, base: Plan) -> int:
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
        path = invert_steps(self.base, restrict(job.select, index), z, tolerance, solver, left, starts, job.eps)
        if self.warm is None:  # the first call is for all samples
            self.warm = [state.clone() for state in path.states]
        for kept, state in zip(self.warm, path.states, strict=True):
            kept[index] = state
        out, error = job.judge.verify(path.states[0], index)
        self.evaluations[index] += path.evaluations + plan.evaluations
        better = error < self.best[index]
        self.best[index[better]] = error[better]
        self.latent[index[better]], self.restored[index[better]] = path.states[0][better], out[better]
        finer = (0.001 * error / job.judge.size[index]).minimum(0.7 * self.accuracy[index])
        self.accuracy[index] = finer.clamp(min=job.eps)
        return out
