r"""The embedded pairs of DPM-Solver-12 and DPM-Solver-23: two results of different order from the same evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from kinvert.coefficients import log_step, phi
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, option, slope

__all__ = ["DPMAdaptive"]


@dataclass(frozen=True)
class DPMAdaptive(Rule):
    r"""DPM-Solver-12 or DPM-Solver-23 with a PID controller that chooses the steps by their error.

    One trial step, with slopes `d = (x - D)/sigma`, `h = log(sigma / sigma_next)` and the stages
    `x_a = x + (a - sigma) d`, `x_b = x + (b - sigma) d - 4 b h/3 phi_2(2h/3) (d_a - d)`:

    * `order=2`, `a = sigma e^{-h/2}`: low is the Euler step `x + (sigma_next - sigma) d`; high is the step of `dpm_2`,
      `x + (sigma_next - sigma) d_a`.
    * `order=3`, `a = sigma e^{-h/3}`, `b = sigma e^{-2h/3}`: low is `x + (sigma_next - sigma) (d + 3/2 (d_a - d))`;
      high is `x + (sigma_next - sigma) d - 3/2 sigma_next h phi_2(h) (d_b - d)`.

    The error is the root mean square, over the whole batch, of
    `(low - high) / max(atol, rtol max(|low|, |low before|))`. With `e = 1 / (error + 1e-8)` of this
    step, and `e_1`, `e_2` of the last two accepted steps, h is multiplied by
    `1 + atan(e^{b1} e_1^{b2} e_2^{b3} - 1)`, where `b1 = (pcoeff + icoeff + dcoeff) / k`,
    `b2 = -(pcoeff + 2 dcoeff) / k`, `b3 = dcoeff / k`, `k = order` (1.5 if eta > 0). A step is accepted, with its high
    result, if that factor is at least `accept_safety`. With eta > 0 a step goes to the `down` of the ancestral split,
    and noise makes up the rest. Each trial takes `order` evaluations.

    Of a schedule only its first and its last positive level count, and **the result is at the last positive level**.
    It has no Plan, since a Plan has fixed steps: `kinvert.engine.adaptive.run_adaptive` runs it.

    Source: Lu et al., DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps
    (2022), arXiv 2206.00927, Appendix C; Crowson, k-diffusion (2022), for the PID controller.
    """

    order: int = option(3, low=2, high=3)
    rtol: float = option(0.05, low=0.0)
    atol: float = option(0.0078, low=1e-12)
    h_init: float = option(0.05, low=1e-6)
    pcoeff: float = option(0.0, low=-10.0, high=10.0)
    icoeff: float = option(1.0, low=-10.0, high=10.0)
    dcoeff: float = option(0.0, low=-10.0, high=10.0)
    accept_safety: float = option(0.81, low=0.0, high=1.0)
    eta: float = option(0.0, low=0.0)
    s_noise: float = option(1.0, low=0.0)

    name: ClassVar[str] = "dpm_adaptive"
    ode_order: ClassVar[int] = 3

    def prepare(self, sigmas: tuple[float, ...]) -> NoReturn:
        raise ValueError(
            f"{self.name} chooses its steps on the way, so it has no Plan; use ki.sample or ki.unsample with it, or a "
            "sampler with fixed steps such as 'dpm_fast'"
        )

    def step(self, s: StepBuilder) -> Form:
        """Make one trial step: return the high result, and remember the low result as "low"."""
        h, width = log_step(s.sigma, s.sigma_next), s.sigma_next - s.sigma
        d = slope(s.x, s.denoise(s.x, s.sigma), s.sigma)
        a = s.sigma * math.exp(-h / self.order)
        x_a = s.x + (a - s.sigma) * d
        d_a = slope(x_a, s.denoise(x_a, a), a)
        if self.order == 2:
            s.remember("low", s.x + width * d)
            return s.x + width * d_a
        s.remember("low", s.x + width * (d + 1.5 * (d_a - d)))
        b = s.sigma * math.exp(-2 * h / 3)
        x_b = s.x + (b - s.sigma) * d - 4 / 3 * b * h * phi(2, 2 * h / 3) * (d_a - d)
        d_b = slope(x_b, s.denoise(x_b, b), b)
        return s.x + width * d - 1.5 * s.sigma_next * h * phi(2, h) * (d_b - d)
