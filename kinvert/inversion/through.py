r"""A sampler seen through the inverse of another one: `S(E^{-1}(z)) = image`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.inversion.problem import Problem
from kinvert.inversion.solvers import Solver
from kinvert.inversion.steps import invert_steps
from kinvert.inversion.task import Task
from kinvert.plan import Plan, Step

__all__ = ["Best", "ThroughBase"]


@dataclass(eq=False)
class Best:
    """The best latents that came up, the images of them, and their errors; and where the last inverses ended.

    Attributes:
        latent, restored: shape (batch, *event).
        error: rms, shape (batch,).
        spent: evaluations so far, shape (batch,).
        accuracy: how exact the next inverse is, in parts of the image's size, shape (batch,).
        states: of the last inverses, which the next ones start from; None before the first.
    """

    latent: Tensor
    restored: Tensor
    error: Tensor
    spent: Tensor
    accuracy: Tensor
    states: list[Tensor] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ThroughBase(Problem):
    """`S(E^{-1}(z)) = image`, with S as `function`; a call is charged what it costs, which is `cost` at least.

    Each inverse starts from the last one and is as exact as it needs to be. That is a thousandth of the error that is
    left, and with every call a little more: an inverse that is as exact as the change of z is small would be returned
    as it is, and the iteration would stand still.

    Attributes:
        task: the images to invert.
        base: the Plan of E.
        inner: root finder for the steps of E.
        most: what an inverse may cost; None: what is left.
        best: what came up so far.
    """

    task: Task
    base: Plan
    inner: Solver
    most: int | None
    best: Best

    @staticmethod
    def least(task: Task, base: Plan) -> int:
        """Return what a call costs at least: a run up, from a first guess, and one down."""
        return (_most(task, base) or base.evaluations + 1) + task.plan.evaluations

    @classmethod
    def of(cls, task: Task, base: Plan, inner: Solver, budget: Tensor) -> ThroughBase:
        """Return the problem of a task; `budget`, shape (batch,), is what each sample may spend."""
        x, judge = task.wide, task.judge
        enough = max(task.tol, task.eps) * judge.size * judge.share
        infinite, accuracy = x.new_full((len(x),), torch.inf), x.new_full((len(x),), 1e-3)
        best = Best(x.clone(), x.clone(), infinite, torch.zeros_like(budget), accuracy)
        return cls(
            task.sample_some, x, enough, budget, cls.least(task, base), None,
            task=task, base=base, inner=inner, most=_most(task, base), best=best, watch=task.watch,
        )  # fmt: skip

    def call(self, u: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return `S(E^{-1}(u))` of the samples `index`, and the evaluations that it took of each."""
        task, best = self.task, self.best
        left = self.budget[index] - best.spent[index] - task.plan.evaluations
        left = left if self.most is None else left.clamp(max=self.most)

        def tolerance(step: Step) -> Tensor:
            return best.accuracy[index] * task.unit(step.sigma_next)[index]

        rows = task.solving if len(index) == len(self.value) else task.solving.take(index)
        starts = best.states and [state[index] for state in best.states]
        path = invert_steps(self.base, rows, u, tolerance, self.inner, left, starts, task.eps, self.watch)
        if best.states is None:  # the first call is for all samples
            best.states = [state.clone() for state in path.states]
        for kept, state in zip(best.states, path.states, strict=True):
            kept[index] = state
        latent = path.states[0]
        out = self.function(latent, index)
        error = task.judge.error(self.value[index] - out, index)
        spent = path.evaluations + task.plan.evaluations
        best.spent[index] += spent
        better = error < best.error[index]
        places = index[better]
        best.error[places], best.latent[places], best.restored[places] = error[better], latent[better], out[better]
        finer = (0.001 * error / task.judge.size[index]).minimum(0.7 * best.accuracy[index])
        best.accuracy[index] = finer.clamp(min=task.eps)
        return out, spent


def _most(task: Task, base: Plan) -> int | None:
    """Return what an inverse may cost where there is a limit, however large: a larger limit makes the same calls first.

    None: what is left.
    """
    limited = task.limited and task.plan.sigmas[-1] > 0
    return 8 * base.evaluations if limited else None
