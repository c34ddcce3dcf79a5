"""The plain run up, as a candidate: what `unsample` finds, sampled again.

It costs one run, and one to check. No inversion that is worse is returned, for example because there were too few
evaluations, or because the image has no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from torch import Tensor

from kinvert.denoisers import Denoiser, Guided
from kinvert.engine import Callback, run, run_state
from kinvert.inversion.problem import Guess
from kinvert.plan import Plan, compile_plan

__all__ = ["Recorded", "rising"]


def rising(plan: Plan) -> Plan | None:
    """Return the run upwards of a Plan that can be inverted; None if the sampler has none."""
    if plan.sigmas[-1] == 0 or not plan.rule.keeps_last:
        return None
    try:
        up = compile_plan(plan.rule, plan.sigmas[::-1])
    except ValueError:
        return None
    return None if up.is_stochastic or any(step.forgets_x for step in up.steps) else up


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run down, from the latent of the plain run up: what its evaluations saw and returned.

    Attributes:
        latent, restored: where it starts and ends, shape (batch, *event), in x's dtype.
        evaluations: of both runs.
        inputs: of the evaluations, each of shape (batch, *event), if they were to be kept.
        outputs: one, or D and U of a guided pair, for each evaluation, shape (batch, rows, *event), likewise.
    """

    latent: Tensor
    restored: Tensor
    evaluations: int
    inputs: list[Tensor]
    outputs: Tensor | None

    @classmethod
    def of(
        cls, up: Plan, plan: Plan, denoiser: Denoiser, x: Tensor, callback: Callback | None = None,
        keep: Literal["inputs", "outputs"] | None = None,
    ) -> Recorded:  # fmt: skip
        """Run up from x, and down again, and keep what is asked for."""
        latent = run_state(up, denoiser, {"x": x})["x"]  # `run` would warn of what is a candidate only
        inputs, rows, each = list[Tensor](), count(), 1 + plan.is_guided
        outputs = x.new_empty(len(x), each * plan.evaluations, *x.shape[1:]) if keep == "outputs" else None

        def recording(state: Tensor, sigma: Tensor) -> Any:
            out: Any = denoiser(state, sigma)
            if keep == "inputs":
                inputs.append(state.clone())
            if outputs is not None:
                for part in (tuple(out) if isinstance(out, Guided) else (out,))[:each]:
                    outputs[:, next(rows)] = part
            return out

        restored = run(plan, recording, latent, callback=callback)
        return cls(latent, restored, up.evaluations + plan.evaluations, inputs, outputs)

    def trajectory(self, plan: Plan, x: Tensor) -> list[Tensor]:
        """Return the states of a one-step Plan, in x's dtype; the last is x, which the run misses."""
        states, first = [], 0
        for step in plan.steps:
            states.append(self.inputs[first].to(x.dtype))
            first += len(step.stages)
        return [*states, x]

    def guess(self, x: Tensor) -> Guess:
        """Return the run as the start of a search for states in x's dtype; its outputs must have been kept."""
        return Guess(self.latent.to(x.dtype), self.outputs, reached=self.restored.to(x.dtype))
