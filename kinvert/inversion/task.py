"""The task of `invert` for some samples: the image, how exact its latent must be, and what that may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kinvert.denoisers import BoundDenoiser, Guided
from kinvert.engine import Callback, Memory, run, run_state, stage_sigmas
from kinvert.inversion.batches import FewBatches
from kinvert.inversion.problem import Judge, Problem
from kinvert.inversion.solvers.newton import smallest_singular_value
from kinvert.inversion.verdict import Widened, image_size
from kinvert.inversion.watching import UNLIMITED, Watch
from kinvert.noise import replay
from kinvert.plan import Plan
from kinvert.showing.brief import brief_repr
from kinvert.tensors import is_half, rms

__all__ = ["RUNS", "UNLIMITED", "Task", "default_runs", "measure_fold"]

RUNS = 128
"""The default limit on evaluations, in runs of the sampler."""


@dataclass(frozen=True, eq=False)
class Task:
    """An image to invert, and how exactly.

    Equations are solved in the dtype of `wide`, float32 if x is in half precision. What comes out is judged in x's.

    Attributes:
        plan: the run to invert.
        denoiser: of these samples, for states in x's dtype.
        x: the image, shape (batch, *event).
        tol: tolerance in parts of the image's size.
        limit: evaluations that a sample may cost.
        limited: whether that was asked for; if not, nothing is tried just to have something at a smaller limit.
        callback: of the run that checks the result.
        samples: numbers of these samples in the batch that was given, for messages.
        region: 1 where a value counts, of x's shape; None counts all.
        states: least dtype of the states.
        network: dtype that the network is known to compute in.
        watch: who is told how it goes, and whether to stop.
        check: whether latents are to be sampled again, to know how good they are.
        noises: those that the run draws, in order, each like x; () if it draws none.
    """

    plan: Plan
    denoiser: FewBatches
    x: Tensor
    tol: float
    limit: int
    callback: Callback | None
    samples: Tensor
    region: Tensor | None = None
    states: torch.dtype = torch.float32
    network: torch.dtype = torch.float64
    watch: Watch = field(default_factory=Watch)
    limited: bool = False
    check: bool = True
    noises: tuple[Tensor, ...] = ()

    __repr__ = brief_repr

    @cached_property
    def wide(self) -> Tensor:
        """Return the image in the dtype of the equations."""
        return self.x.to(torch.promote_types(self.x.dtype, self.states))

    @cached_property
    def solving(self) -> BoundDenoiser:
        """Return the denoiser for states like `wide`."""
        return self.denoiser if self.x.dtype == self.wide.dtype else Widened(self.denoiser, self.x.dtype)

    @property
    def is_half(self) -> bool:
        """Tell whether x is in half precision: a round trip is then mostly rounding, and the plain run may do."""
        return is_half(self.x.dtype)

    @property
    def eps(self) -> float:
        """Return the relative precision of x and of the network, whichever is worse."""
        return max(torch.finfo(self.x.dtype).eps, torch.finfo(self.network).eps)

    @property
    def aim(self) -> float:
        """Return the relative accuracy of the equations: no better than x can hold, but in half precision no worse."""
        return self.eps if self.is_half else max(self.tol, self.eps)

    @cached_property
    def judge(self) -> Judge:
        """Return how a whole run is judged; in half precision any error is accepted if the equations are solved."""
        size = image_size(self.x, self.plan.sigmas, self.region)
        share = torch.ones_like(size)
        if self.region is not None:
            share = self.region.flatten(1).to(size).mean(1).sqrt()
            share = torch.where(share > 0, share, 1.0)
        enough = torch.full_like(size, math.inf) if self.is_half else max(self.tol, self.eps) * size
        return Judge(size, share, enough, self.region)

    def is_lost(self, error: Tensor) -> Tensor:
        """Tell which samples, with these errors, need a better candidate."""
        return error > max(self.tol, self.eps) * self.judge.size

    def failed(self, error: Tensor) -> list[int]:
        """Return the places of the samples whose errors are above the tolerance."""
        places: list[int] = (error > self.tol * self.judge.size).nonzero()[:, 0].tolist()
        return places

    def unit(self, sigma: float) -> Tensor:
        """Return what an rms over all values is measured in at a noise level, shape (batch,)."""
        return self.judge.size.clamp(min=sigma) * self.judge.share

    def take(self, index: Tensor) -> Task:
        """Return the task of the samples `index`, without the callback."""
        return replace(
            self,
            denoiser=self.denoiser.take(index),
            x=self.x[index],
            samples=self.samples[index],
            region=None if self.region is None else self.region[index],
            callback=None,
            noises=tuple(noise[index] for noise in self.noises),
        )

    def steady(self) -> Task:
        """Return the task with the network called as the run that checks the latent calls it: with the whole batch.

        A network's answers may change with the batch size, in their last digits or more.
        """
        return replace(self, denoiser=self.denoiser.steady())

    def steadied(self) -> tuple[Task, Tensor]:
        """Return the task, steady if the network depends on the batch size, and what it took to find out, (batch,).

        That is two evaluations of the first sample, at the noise level that is evaluated last, if so many are to spare.
        """
        asked = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        small = self.limit < 4 * self.plan.evaluations + 2
        if small or self.is_half or self.watch.stopped or not self.denoiser.varies:
            return self, asked
        asked[0] = 2
        task = replace(self, limit=self.limit - 2) if self.limit < UNLIMITED else self
        return task.steady() if self._depends_on_batch() else task, asked

    def _depends_on_batch(self) -> bool:
        """Tell whether the network answers differently, by a tenth of the tolerance, with another batch size."""
        one = torch.zeros(1, dtype=torch.int64, device=self.x.device)
        x, rows = self.x[one], self.denoiser.take(one)
        sigma = stage_sigmas([self.plan.stage_levels[-1]], x)[0].clone()
        outs = [few(x, sigma) for few in (rows, rows.steady())]
        few, many = (out.denoised if isinstance(out, Guided) else out for out in outs)
        return bool((rms(few - many) > 0.1 * self.tol * self.judge.size[one]).all())

    def sample(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """Return what the sampler makes of a latent of the whole batch, in x's dtype."""
        plan = self.plan.closed if memory else self.plan
        state = {name: value.to(self.x.dtype) for name, value in {"x": latent, **(memory or {})}.items()}
        noise = replay(self.noises) if self.noises else None
        return run_state(plan, self.denoiser, state, noise, self.callback)["x"]

    def sample_some(self, latent: Tensor, index: Tensor) -> Tensor:
        """Return what the sampler makes of the latents of the samples `index`, like `wide`.

        The network is called with the largest batch size, as the run that the user will make calls it.
        """
        denoiser = (self.denoiser if len(index) == len(self.x) else self.denoiser.take(index)).steady()
        return run(self.plan, denoiser, latent.to(self.x.dtype)).to(latent.dtype)

    def error(self, restored: Tensor) -> Tensor:
        """Return the rms of a round trip, shape (batch,); infinite if it is not finite."""
        return rms(restored.to(self.wide.dtype) - self.wide, self.region).nan_to_num(math.inf)

    @cached_property
    def problem(self) -> Problem:
        """Return the problem of the whole run: which latent does the sampler take to the image?"""
        tolerance = self.aim * self.judge.size
        budget = torch.full((len(self.x),), self.limit, dtype=torch.int64, device=self.x.device)
        plan = self.plan
        return Problem(
            self.sample_some, self.wide, tolerance, budget, plan.evaluations, self.eps, plan, self.solving, self.judge,
            watch=self.watch,
        )  # fmt: skip


def default_runs(values: int) -> int:
    """Return the default limit on evaluations, in runs; small events have more, for a method that takes Jacobians."""
    return RUNS if values > 1024 else 2 * RUNS + 4 * values


def measure_fold(task: Task, problem: Problem, u: Tensor, spent: Tensor, products: int = 60) -> float | None:
    """Return the smallest singular value of F' for a problem of one sample; None if it is not finite or affordable.

    `spent`, shape (1,), grows by what it costs. It takes at most `products` evaluations of F and one more; with six or
    fewer it would say nothing.
    """
    products = min(products, (task.limit - int(spent)) // problem.cost - 1)
    if products <= 5 or task.watch.stopped:
        return None
    value, evaluations = smallest_singular_value(problem, u, products)
    spent += evaluations
    return None if math.isnan(value) else value
