r"""The inverse of algebraically reversible samplers, in closed form.

A reversible sampler takes a pair `(x, auxiliary)` from level to level by maps that have an inverse in closed form, and
the inverse is a Plan again (`analysis.explicit_inverse`): one run of it finds the latent. No equation is solved, no
property of the denoiser is used, and the only error is rounding, magnified by `analysis.amplification`.

A sampler that draws noise has an inverse for each noise: its run is undone with the noises that it drew, so these must
be given. They belong to the latent as the auxiliary state does.

The latent is a pair too. If an image comes without an auxiliary state, one is started there as the sampler itself
would start it (x again, or one evaluation), and the inverse finds the pair at the noisy end. Sampling from that pair
returns the image. Sampling from its x alone starts another auxiliary state and returns another image, as far off as
an approximate inversion, or further; `Reversal.gap` says by how much the two starts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinvert.analysis import explicit_inverse
from kinvert.denoisers import Denoiser
from kinvert.engine import Memory, check_state, run_state
from kinvert.engine.recompute import started_state
from kinvert.noise import replay
from kinvert.plan import Plan
from kinvert.tensors import rms

__all__ = ["Reversal", "invert_reversible"]


@dataclass(frozen=True, eq=False)
class Reversal:
    """The pair at the noisy end that a reversible sampler takes to a given image.

    Attributes:
        latent: x at `plan.sigmas[0]`, shape (batch, *event).
        memory: the auxiliary state that belongs to it, by name, each of the same shape.
        gap: root mean square distance of `memory` from what a run from the latent alone would start with, shape
            (batch,): rounding error if the image came from such a run and with its auxiliary state, and otherwise the
            reason why the latent alone does not return the image.
        evaluations: denoiser evaluations spent, each a batch.
    """

    latent: Tensor
    memory: Memory
    gap: Tensor
    evaluations: int

    @property
    def state(self) -> Memory:
        """Return latent and memory, as `engine.run_state(plan.closed, ...)` takes them."""
        return {"x": self.latent, **self.memory}


@torch.no_grad()
def invert_reversible(
    plan: Plan, denoiser: Denoiser, x: Tensor, memory: Memory | None = None, noises: Sequence[Tensor] = ()
) -> Reversal:
    """Undo a run of a reversible sampler: find the latent and its auxiliary state.

    Args:
        plan: from `compile_plan`, of an algebraically reversible sampler, on a schedule that stops above 0.
        denoiser: the sampler's own; a Plan with `is_guided` needs a pair.
        x: the image, at `plan.sigmas[-1]`, shape (batch, *event).
        memory: the auxiliary state that `engine.run_state` returned with x, by name; None starts one at x.
        noises: those that the run drew, in order, each of x's shape; needed if it draws any.

    Returns:
        A `Reversal`; `run_state(plan.closed, denoiser, reversal.state, ki.noise.replay(noises))["x"]` is x, to rounding
        error.

    Raises:
        ValueError: a Plan without an inverse in closed form; memory of other names or another shape; more or fewer
            noises than the run draws.
        TypeError: see `engine.run_state`.
    """
    x = check_state(x)
    if noises and len(noises) != plan.closed.draws:
        raise ValueError(f"noises must be those of the run, {plan.closed.draws} of them, got {len(noises)}")
    inverse = explicit_inverse(plan, known_noise=bool(noises))
    started, spent = started_state(plan, denoiser, x, inverse.sigmas[0]) if memory is None else ({}, 0)
    back = replay(_last_step_first(plan, noises)) if noises else None
    state = run_state(inverse, denoiser, {"x": x, **(memory or started)}, back)
    latent = state.pop("x")
    alone, checks = started_state(plan, denoiser, latent, plan.sigmas[0])
    gap = torch.stack([rms(state[name] - alone[name]) for name in state]).square().sum(0).sqrt()
    return Reversal(latent, state, gap, spent + inverse.evaluations + checks)


def _last_step_first(plan: Plan, noises: Sequence[Tensor]) -> list[Tensor]:
    """Return the noises of a run as its inverse asks for them: step by step from the last, in the step's own order."""
    given = iter(noises)
    steps = [[next(given) for _ in step.noises] for step in plan.closed.steps]
    return [noise for step in reversed(steps) for noise in step]
