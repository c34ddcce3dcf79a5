r"""DPM-Solver: exponential integrators of `dx/dlambda = -sigma d` in `lambda = -log sigma`, with the slope d predicted.

`d(x, sigma) = (x - D(x, sigma)) / sigma` is the predicted noise. Over one sub-step `h = log(sigma / sigma_next)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from kinvert.coefficients import ancestral_split, log_step, phi1
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, option, slope

__all__ = ["DPMFast"]


@dataclass(frozen=True)
class DPMFast(Rule):
    r"""DPM-Solver-fast: sub-steps of order 3, 2 and 1 on a geometric grid.

    A run makes n = `evaluations` evaluations; 0 stands for the number of steps of the schedule. Of the levels only the
    first and the last positive one count: their ratio is divided into `n // 3 + 1` equal sub-steps, which are the steps
    of the Plan. All have order 3 but the last, which has order `n mod 3`, or if that is 0 the last two, which have
    orders 2 and 1. **The result is at the last positive level**, never at 0. Order 1 is `euler`, order 2 is `dpm_2`.
    Order 3 is, with `a = sigma e^{-h/3}`, `b = sigma e^{-2h/3}`: `x_a = x + (a - sigma) d`, `x_b = x + (b - sigma) d -
    2 b (phi_1(2h/3) - 1) (d_a - d)`, `x' = x + (sigma_next - sigma) d - 3/2 sigma_next (phi_1(h) - 1) (d_b - d)`.

    With eta > 0 a sub-step goes to `down`, but not below the last level, and noise makes up the rest to sigma_next. The
    published order is 3, and it is measured if `n mod 3 = 2`. For other n the one sub-step of order 1 caps it at 2.

    Source: Lu et al., DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps
    (2022), arXiv 2206.00927.
    """

    eta: float = option(0.0, low=0.0)
    s_noise: float = 1.0
    evaluations: int = option(0, low=0)

    name: ClassVar[str] = "dpm_fast"
    ode_order: ClassVar[int] = 2

    def prepare(self, sigmas: tuple[float, ...]) -> tuple[Rule, tuple[float, ...]]:
        n = self.evaluations or len(sigmas) - 1
        first, last = sigmas[0], sigmas[-1] or sigmas[-2]
        m = n // 3 + 1
        return replace(self, evaluations=n), (*(first * (last / first) ** (k / m) for k in range(m)), last)

    def step(self, s: StepBuilder) -> Form:
        n, left = self.evaluations, s.steps - s.index  # sub-steps left, this one included
        order = 3 if left > 2 else (left if n % 3 == 0 else 3 if left == 2 else n % 3)
        if not self.eta:
            return self._move(s, order, s.sigma_next)
        if s.sigma_next > s.sigma:
            raise ValueError(f"the noise of a rising step has negative variance for eta={self.eta:g}; use eta=0")
        down = max(ancestral_split(s.sigma, s.sigma_next, self.eta)[0], s.sigmas[-1])
        x = self._move(s, order, down)
        return x + math.sqrt(s.sigma_next**2 - down**2) * self.s_noise * s.noise(s.sigma, s.sigma_next)

    def _move(self, s: StepBuilder, order: int, sigma_to: float) -> Form:
        """Return the deterministic sub-step of that order from `s.x` to `sigma_to`."""
        d = slope(s.x, s.denoise(s.x, s.sigma), s.sigma)
        h = log_step(s.sigma, sigma_to)
        euler = s.x + (sigma_to - s.sigma) * d
        if order == 1:
            return euler
        a = s.sigma * math.exp(-h / order)
        x_a = s.x + (a - s.sigma) * d
        d_a = slope(x_a, s.denoise(x_a, a), a)
        if order == 2:
            return s.x + (sigma_to - s.sigma) * d_a
        b = s.sigma * math.exp(-2 * h / 3)
        x_b = s.x + (b - s.sigma) * d - 2 * b * (phi1(2 * h / 3) - 1.0) * (d_a - d)
        d_b = slope(x_b, s.denoise(x_b, b), b)
        return euler - 1.5 * sigma_to * (phi1(h) - 1.0) * (d_b - d)
