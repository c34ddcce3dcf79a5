"""The latents that sweeps have found so far, and what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kinvert import engine
from kinvert.inversion.plain import Recorded
from kinvert.inversion.solvers import Select
from kinvert.plan import Plan
from kinvert.tensors import rms

if TYPE_CHECKING:
    from kinvert.inversion.trajectory import _Run


@dataclass(frozen=True, eq=False)
class Judge:
    """What is asked of the round trips of some samples.

    Attributes:
        size: what the errors are in units of, shape (batch,).
        share: the root of the share of the values that count; those behind a mask do not. Shape (batch,).
        enough: the error that will do, shape (batch,).
        error: of the images of the samples `index`.
        run: the image that the sampler makes of the latents of the samples `index`.
    """

    size: Tensor
    share: Tensor
    enough: Tensor
    error: Callable[[Tensor, Tensor], Tensor]
    run: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, plan: Plan, select: Select, x: Tensor, goal: float) -> Judge:
        """All values count, and `goal` of their rms will do."""
        size = rms(x)

        def error(restored: Tensor, index: Tensor) -> Tensor:
            return rms(restored - x[index]).nan_to_num(math.inf)

        return cls(size, torch.ones_like(size), goal * size, error, lambda u, i: engine.run(plan, select(i), u))

    def verify(self, latent: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The round trip of the samples `index`, and its error."""
        restored = self.run(latent, index)
        return restored, self.error(restored, index)


@dataclass(eq=False)
class Solution:
    """The best latent of every sample, what the sampler makes of it, and the cost, the check included.

    Attributes:
        latent, restored: shape (batch, *event).
        errors: rms of the round trip, the least so far.
        trial: the latent with the least residual, which may be better.
        residuals: of the trial's evaluations, the largest rms in units of max(size, sigma).
        open: whether the trial has not been run yet.
        evaluations: of the denoiser.
    """

    x: Tensor
    latent: Tensor
    restored: Tensor
    errors: list[float]
    trial: Tensor
    residuals: list[float]
    open: list[bool]
    evaluations: list[int]

    @classmethod
    def empty(cls, x: Tensor) -> Solution:
        """Nothing found yet."""
        none = [math.inf] * len(x)
        return cls(x, x.clone(), x.clone(), list(none), x.clone(), list(none), [True] * len(x), [0] * len(x))

    def take(self, plain: Recorded, judge: Judge) -> None:
        """What a plain run found, and its check."""
        self.latent, self.restored = plain.latent.to(self.x.dtype), plain.restored.to(self.x.dtype)
        self.errors = judge.error(plain.restored, indices(list(range(len(self.x))), self.x)).tolist()

    def improve(self, run: _Run, sizes: list[float]) -> None:
        """Take over the latents with a smaller residual, which are not checked yet."""
        samples = run.samples
        better = [place for place, size in enumerate(sizes) if size < self.residuals[samples[place]]]
        where = [samples[place] for place in better]
        if better:
            self.trial[indices(where, self.x)] = run.latent[indices(better, self.x)]
        for place, i in zip(better, where, strict=True):
            self.residuals[i], self.open[i] = sizes[place], True

    def check(self, plan: Plan, judge: Judge, samples: list[int]) -> None:
        """Run the sampler on the trials of some samples, and keep those that are better than the latents."""
        samples = [i for i in samples if self.open[i]]
        if not samples:
            return
        index = indices(samples, self.x)
        latent = self.trial[index]
        restored, error = judge.verify(latent, index)
        errors = error.tolist()
        better = [
            place for place, i in enumerate(samples) if errors[place] < self.errors[i] or self.errors[i] == math.inf
        ]
        places = indices(better, self.x)
        self.latent[index[places]], self.restored[index[places]] = latent[places], restored[places].to(self.x.dtype)
        for place, i in enumerate(samples):
            self.errors[i] = min(self.errors[i], errors[place])
            self.open[i] = False
            self.evaluations[i] += plan.evaluations


def indices(places: list[int], x: Tensor) -> Tensor:
    """Places as a tensor on the device of x."""
    return torch.tensor(places, dtype=torch.int64, device=x.device)
