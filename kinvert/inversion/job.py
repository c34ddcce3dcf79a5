"""What `invert` is asked for, of some samples: the image, how exact its latent is to be, and what that may cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser
from kinvert.engine import Callback, Memory, run, run_state
from kinvert.inversion.result import Inversion
from kinvert.inversion.solution import Judge
from kinvert.inversion.solvers import Equation, Select
from kinvert.inversion.stepwise import Trajectory, smallest_singular_value
from kinvert.inversion.verdict import Widened, image_size
from kinvert.plan import Plan
from kinvert.tensors import is_half, rms

UNLIMITED = 2**62


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be inverted, to which accuracy; the samples of x are `samples` of the batch that was given.

    Equations are solved in the dtype of `wide`, float32 where x is in half precision, and what comes out is judged in
    x's: by `error`, where `region` is 1.
    """

    plan: Plan
    denoiser: Any
    x: Tensor
    tol: float
    limit: int
    callback: Callback | None
    samples: Tensor
    region: Tensor | None = None
    states: torch.dtype = torch.float32
    network: torch.dtype = torch.float64

    @cached_property
    def wide(self) -> Tensor:
        """The image in the dtype of the equations."""
        return self.x.to(torch.promote_types(self.x.dtype, self.states))

    @property
    def is_half(self) -> bool:
        """Whether a round trip is mostly rounding, so that the plain run may be as good."""
        return is_half(self.x.dtype)

    @property
    def eps(self) -> float:
        """The relative precision of x, of what the denoiser is shown, and of what is known to compute in `network`."""
        return max(torch.finfo(self.x.dtype).eps, torch.finfo(self.network).eps)

    @property
    def aim(self) -> float:
        """The relative accuracy of the equations: no better than x can hold, but in half precision no worse."""
        return self.eps if self.is_half else max(self.tol, self.eps)

    @cached_property
    def judge(self) -> Judge:
        """What is asked of a round trip: in half precision, where it is rounding, that the equations are solved."""
        size = image_size(self.x, self.plan.sigmas, self.region)
        share = torch.ones_like(size)
        if self.region is not None:
            share = self.region.flatten(1).to(size).mean(1).sqrt()
            share = torch.where(share > 0, share, 1.0)
        enough = torch.full_like(size, torch.inf) if self.is_half else max(self.tol, self.eps) * size
        return Judge(size, share, enough, self.error, self.down)

    def lost(self, error: Tensor) -> Tensor:
        """Which samples a better candidate is wanted for."""
        return error > max(self.tol, self.eps) * self.judge.size

    def unit(self, sigma: float) -> Tensor:
        """What an rms over all values is in units of, at a noise level; shape (batch,)."""
        return self.judge.size.clamp(min=sigma) * self.judge.share

    def select(self, index: Tensor) -> Denoiser:
        """The denoiser of some samples, for states like `wide`."""
        denoiser: Denoiser = self.denoiser.select(index, len(self.x))
        return denoiser if self.x.dtype == self.wide.dtype else Widened(denoiser, self.x.dtype)

    def part(self, index: Tensor) -> Job:
        """The same for some samples."""
        region = None if self.region is None else self.region[index]
        denoiser = self.denoiser.select(index, len(self.x))
        x, samples = self.x[index], self.samples[index]
        return replace(self, denoiser=denoiser, x=x, samples=samples, region=region, callback=None)

    def again(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """What the sampler makes of a latent of the whole batch."""
        plan = self.plan.closed if memory else self.plan
        state = {"x": latent, **(memory or {})}
        state = {name: value.to(self.x.dtype) for name, value in state.items()}
        return run_state(plan, self.denoiser, state, callback=self.callback)["x"]

    def down(self, latent: Tensor, index: Tensor) -> Tensor:
        """What the sampler makes of the latents of some samples, like `wide`."""
        return run(self.plan, self.denoiser.select(index, len(self.x)), latent.to(self.x.dtype)).to(latent.dtype)

    def error(self, restored: Tensor, index: Tensor | None = None) -> Tensor:
        """Root mean square of the round trip, of some samples or all."""
        x, region = (part if index is None or part is None else part[index] for part in (self.wide, self.region))
        assert x is not None
        return rms(restored.to(x.dtype) - x, region).nan_to_num(torch.inf)

    def result(self, found: Trajectory, restored: Tensor, notes: list[str], **more: Any) -> Inversion:
        """The inversion, and a warning where it did not come out."""
        if notes:
            warnings.warn(f"invert({self.plan.rule.name}): {'; '.join(notes)}", RuntimeWarning, stacklevel=6)
        error, allowed = self.error(restored), self.tol * self.judge.size
        return Inversion(
            latent=found.states[0].to(self.x.dtype),
            residuals=found.residuals,
            converged=error <= allowed,
            evaluations=found.evaluations,
            round_trip_error=error,
            tolerance=self.tol,
            allowed=allowed,
            sigmas=self.plan.sigmas,
            restored=restored.to(self.x.dtype),
            warnings=tuple(notes),
            **more,
        )


def least_stretch(
    job: Job, function: Callable[[Tensor, Tensor], Tensor], u: Tensor, y: Tensor, cost: int, spent: Tensor
) -> float | None:
    """The smallest singular value of a function's derivative at one sample's u; None where that cannot be had."""
    products = min(60, (job.limit - int(spent)) // cost - 1)
    if products <= 5:
        return None
    equation = Equation(function, y, rms(y), torch.zeros_like(spent), cost)
    equation.eps = job.eps
    value = smallest_singular_value(equation, u, products)
    spent += equation.evaluations
    return None if math.isnan(value) else value


def restrict(select: Select, index: Tensor) -> Select:
    """`select` where `index` are all the samples there are."""
    return lambda inner: select(index[inner])
