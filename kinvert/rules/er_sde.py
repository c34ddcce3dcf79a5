r"""ER-SDE: solvers of the extended reverse-time SDE, in which a function f of the noise level scales the noise.

`f(v) = v (e^{v^0.3} + 10)` ("er_sde"), `f(v) = v^{1 + reverse_eta}` ("reverse_time_sde": the reverse SDE with that
eta) or `f(v) = v` ("ode": the probability-flow ODE, without noise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kinvert.coefficients import left_sums
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option

__all__ = ["ERSDE"]


@dataclass(frozen=True)
class ERSDE(Rule):
    r"""ER-SDE-Solver: `x' = r x + (1 - r) D + c_1 D1 + c_2 D2 + s_noise sqrt(sigma_next^2 - r^2 sigma^2) n`.

    `r = f(sigma_next) / f(sigma)`, `D1 = (D - D_prev) / (sigma - sigma_prev)` from the second step and stage on,
    `D2 = 2 (D1 - D1_prev) / (sigma - sigma_prev2)` from the third, and with `delta = sigma_next - sigma`
    `c_1 = delta + f(sigma_next) int dv / f(v)`, `c_2 = delta^2 / 2 + f(sigma_next) int (v - sigma) / f(v) dv`, both
    integrals from sigma_next to sigma as left sums of 200 points, as in the public implementations. If the variance of
    the noise is not positive, as on a rising schedule, there is no noise. One evaluation a step, remembers two values.
    A step to sigma = 0 returns D.

    It follows the drift of an SDE: with `s_noise = 0` it does not converge to the probability-flow ODE, so its order is
    0. With `noise_scaler="ode"` it converges: with `max_stage=1` it is `euler`, and with more stages it has order 2
    until the error of the left sums shows, which has order 1. `noise_scaler="reverse_time_sde"` with `max_stage=1` is
    `euler_ancestral`.

    Source: Cui et al., Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models (2023), arXiv
    2309.06169.
    """

    s_noise: float = option(1.0, low=0.0)
    max_stage: int = option(3, low=1, high=3)
    noise_scaler: Literal["er_sde", "reverse_time_sde", "ode"] = "er_sde"
    reverse_eta: float = option(1.0, low=0.0)

    name: ClassVar[str] = "er_sde"
    ode_order: ClassVar[int] = 0

    @property
    def noise_options(self) -> dict[str, Any]:
        """The scale of the noise; no option if the noise scaler is `f(v) = v`."""
        is_ode = self.noise_scaler == "ode" or (self.noise_scaler == "reverse_time_sde" and self.reverse_eta == 0)
        return {} if is_ode else super().noise_options

    def scaler(self, v: Any) -> Any:
        """Return the noise scaler f at a noise level, or at an array of noise levels."""
        if self.noise_scaler == "er_sde":
            return v * (math.e ** (v**0.3) + 10.0)
        return v ** (1.0 + self.reverse_eta) if self.noise_scaler == "reverse_time_sde" else v

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        s.remember("D", denoised)
        if s.sigma_next == 0:
            return denoised
        f_next = self.scaler(s.sigma_next)
        ratio = f_next / self.scaler(s.sigma)
        x = interpolate(s.x, denoised, ratio)
        previous = s.recall("D")
        if previous is not None and self.max_stage > 1:
            delta = s.sigma_next - s.sigma
            mean, moment = left_sums(self.scaler, s.sigma_next, s.sigma)
            first, *older = s.history("D1", (denoised - previous) / (s.sigma - s.sigmas[s.index - 1]), 2)
            x = x + (delta + f_next * mean) * first
            if older and self.max_stage > 2:
                second = 2.0 * (first - older[0]) / (s.sigma - s.sigmas[s.index - 2])
                x = x + (delta**2 / 2 + f_next * moment) * second
        variance = s.sigma_next**2 - (ratio * s.sigma) ** 2
        if variance <= 1e-12 * s.sigma_next**2:  # with f(v) = v it is 0 up to rounding
            return x
        return x + self.s_noise * math.sqrt(variance) * s.noise(s.sigma, s.sigma_next)
