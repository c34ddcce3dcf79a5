"""Forecasts of what the evaluations of the next step will return, from the steps solved before it.

D varies slowly along a run. Which forecast is best depends on the image, the guidance and the schedule. So each sample
takes the one that came closest one step before, which takes no evaluation to know. The forecasts are:

* "raised": the state grows as an image and independent noise do, as DDIM inversion assumes;
* "order k": D is the polynomial in ln sigma through the last k steps;
* "proposed": where earlier evaluations of the same step point to;
* "change k": D differs from its record in an earlier run by the polynomial through the last k differences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinvert.coefficients import lagrange
from kinvert.inversion.problem import Problem
from kinvert.tensors import per_sample, rms

__all__ = ["Forecasts"]

ORDERS = (1, 2)  # how many solved steps a forecast goes through


class Forecasts:
    """The forecasts of one climb.

    Attributes:
        size: rms of each image, shape (batch,).
        unit: what levels are measured in.
        known: ln(sigma / unit) of the last steps that were solved, and the mean of D in them, newest first.
        changes: the same of what D differs by from its record of an earlier climb, as far as there is one.
        misses: rms by which each forecast missed one step before, shape (batch,), by name.
    """

    def __init__(self, size: Tensor, unit: float) -> None:
        self.size, self.unit = size, unit
        self.known: list[tuple[float, Tensor]] = []
        self.changes: list[tuple[float, Tensor]] = []
        self.misses: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] = {}

    def guess(self, problem: Problem, proposed: Tensor | None = None, recorded: Tensor | None = None) -> Tensor:
        """Return where to evaluate first for a step.

        Args:
            problem: of the step; y of shape (batch, *event).
            proposed: where earlier evaluations of this step point to.
            recorded: the mean of D in this step in an earlier run.
        """
        system, y = problem.couplings, problem.value
        r, (high, low), place = system.r, system.ends, math.log(system.noisiest / self.unit)
        raised = y * per_sample(((self.size**2 + high**2) / (self.size**2 + low**2)).sqrt(), y)
        made = {"raised": (y - r * raised) / (1 - r)}
        made |= {f"order {k}": _extrapolate(self.known[:k], place) for k in ORDERS[: len(self.known)]}
        if proposed is not None:
            made["proposed"] = (y - r * proposed) / (1 - r)
        if recorded is not None:
            changes = ORDERS[: len(self.changes)]
            made |= {f"change {k}": recorded + _extrapolate(self.changes[:k], place) for k in changes}
        self._made = made
        names = [name for name in made if name in self.misses]
        if not names:
            names = [next(name for name in ("proposed", "order 1", "raised") if name in made)]
        best = torch.stack([self.misses.get(name, self.size) for name in names]).argmin(0)
        every = torch.stack([(y - (1 - r) * made[name]) / r for name in names])
        return every[best, torch.arange(len(y), device=y.device)]

    def learn(self, problem: Problem, u: Tensor, recorded: Tensor | None = None) -> None:
        """Take the solution of a step, shape (batch, *event)."""
        denoised = problem.denoised(u)
        if denoised is None:
            return
        self.misses = {name: rms(denoised - made).nan_to_num(math.inf) for name, made in self._made.items()}
        place = math.log(problem.couplings.noisiest / self.unit)
        self.known = [(place, denoised), *self.known][: max(ORDERS)]
        if recorded is not None:
            self.changes = [(place, denoised - recorded), *self.changes][: max(ORDERS)]


def _extrapolate(known: list[tuple[float, Tensor]], place: float) -> Tensor:
    """Return the polynomial through the known values, at a place."""
    places, values = zip(*known, strict=True)
    total = torch.zeros_like(values[0])
    for j, value in enumerate(values):
        total.add_(value, alpha=lagrange(places, j, place))
    return total
