"""The route of algebraically reversible samplers: their steps have an inverse in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from kinvert.analysis import amplification
from kinvert.inversion.certificate import Found
from kinvert.inversion.problem import Reason
from kinvert.inversion.reversible import invert_reversible
from kinvert.inversion.solvers import Auto, Solver
from kinvert.inversion.task import Task
from kinvert.plan import Plan
from kinvert.telling import warn_user

__all__ = ["ClosedForm"]


@dataclass(frozen=True)
class ClosedForm:
    """Run the inverse Plan once: no root is sought, and the only error is rounding, magnified.

    Attributes:
        spread: standard deviation of the data around one image, in parts of its size, which the growth of rounding is
            predicted for: locally the data vary less than globally, and a tenth matched what was measured of trained
            networks.
    """

    methods: ClassVar[dict[str, Callable[[], Solver]]] = {"auto": Auto}
    scope: ClassVar[str] = "closed form"

    spread: float = 0.1

    def accepts(self, plan: Plan) -> bool:
        """Tell whether the sampler carries auxiliary state."""
        return bool(plan.auxiliary)

    def solve(self, task: Task, solver: Solver) -> Found:
        """Find the latent and its auxiliary state; warn before the run if rounding will exceed the tolerance."""
        plan, x = task.plan, task.wide
        # Sizes to two digits, so that equal ones share one computation.
        sizes = {float(f"{size:.1e}") for size in (task.judge.size / plan.sigmas[0]).tolist()}
        growth = max(max(amplification(plan, std=self.spread * size * plan.sigmas[0])) for size in sizes)
        rounding = growth * task.eps
        before: list[str] = []
        if rounding > task.tol:
            before.append(
                f"{plan.rule.name} magnifies rounding about {growth:.2g} times on this schedule: expect errors of "
                f"{rounding:.2g} of the image's size in {task.x.dtype}, more than the tolerance {task.tol:.2g}; use a "
                "higher precision or fewer steps"
            )
            warn_user(before[0])
        undone = invert_reversible(plan, task.solving, x, noises=task.noises)
        if not task.check:
            spent = torch.full_like(task.problem.budget, undone.evaluations)
            memory = {name: value.to(task.x.dtype) for name, value in undone.memory.items()}
            return Found(
                undone.latent, None, spent, 0, notes=before, memory=memory, amplification=growth, noises=task.noises
            )
        restored = task.sample(undone.latent, undone.memory)
        error = task.error(restored)
        lost = task.failed(error)
        failures = [f"sample {task.samples[i]} not inverted: round-trip error {error[i]:.2g}" for i in lost]
        return Found(
            latent=undone.latent,
            restored=restored,
            evaluations=torch.full_like(task.problem.budget, undone.evaluations + plan.closed.evaluations),
            checking=plan.closed.evaluations,
            residuals=x.new_zeros(1, len(x)),  # nothing was solved, so nothing is left over
            reasons=dict.fromkeys(lost, Reason.PRECISION),
            notes=[*before, *failures] if before else (),  # warned of before the run
            failures=() if before else failures,
            memory={name: value.to(task.x.dtype) for name, value in undone.memory.items()},
            amplification=growth,
            noises=task.noises,
        )
