r"""SEEDS: exponential Runge-Kutta methods for the reverse SDE, with exact noise at every stage.

`lambda = -log sigma`, `h = log(sigma / sigma_next)`, `g = (1 + eta) h`. A stage at `sigma_c = sigma e^{-c h}` is an
exponential integrator of `dx/dlambda = (1 + eta) (D - x)` over `c h`, plus the noise of the SDE at that level. The
noises of the stages belong to one path: between adjacent stages `a -> b` it decays by `(b/a)^{1 + eta}` and gains
`b sqrt(1 - (b/a)^{2 eta}) s_noise n(a, b)`.

Source: Gonzalez et al., SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (2023),
arXiv 2305.14267.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from kinvert.coefficients import log_step, phi, sde_noise_scale
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option

__all__ = ["Seeds2", "Seeds3"]


@dataclass(frozen=True)
class _Seeds(Rule, ABC):
    """The options of the SDE and the noise path, which both orders share."""

    eta: float = option(1.0, low=0.0)
    s_noise: float = option(1.0, low=0.0)

    def noise_path(self, s: StepBuilder, *levels: float) -> list[Form]:
        """Return the noise of the SDE since the start of the step, at each of the levels."""
        path = [0.0 * s.x]
        for a, b in pairwise((s.sigma, *levels)):
            path.append((b / a) ** (1.0 + self.eta) * path[-1])
            if self.eta > 0 and self.s_noise > 0:
                path[-1] = path[-1] + b * sde_noise_scale(log_step(a, b), self.eta) * self.s_noise * s.noise(a, b)
        return path[1:]


@dataclass(frozen=True)
class Seeds2(_Seeds):
    r"""SEEDS-2, the stochastic exponential midpoint rule.

    With `m = sigma^{1-r} sigma_next^r` and the noise path n at both levels (see the module):
    `x_m = e^{-r g} x + (1 - e^{-r g}) D + n_m`, `D_m = D(x_m, m)`,
    `x' = e^{-g} x + (1 - e^{-g}) D + b (D_m - D) + n_next`, where `b = (1 - e^{-g}) / (2 r)` (solver_type "phi_1") or
    `b = g phi_2(-g) / r` ("phi_2"). Order 2 at `eta = 0`, where "phi_1" is `dpmpp_sde` with `eta = 0` and the same r
    (with `r = 1/2` also `dpmpp_2s_ancestral` with `eta = 0`), and "phi_2" is `res_2s` with `c2 = r`. "phi_2" with
    `r = 1` is `exp_heun_2_x0_sde`. Two evaluations a step. A step to sigma = 0 returns D.

    Source: Gonzalez et al., SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (2023),
    arXiv 2305.14267.
    """

    r: float = option(0.5, low=1e-3, high=1.0)
    solver_type: Literal["phi_1", "phi_2"] = "phi_1"

    name: ClassVar[str] = "seeds_2"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return denoised
        g = (1.0 + self.eta) * log_step(s.sigma, s.sigma_next)
        m = s.sigma * (s.sigma_next / s.sigma) ** self.r
        noise_m, noise_next = self.noise_path(s, m, s.sigma_next)
        x_m = interpolate(s.x, denoised, math.exp(-self.r * g)) + noise_m
        b = -math.expm1(-g) / (2.0 * self.r) if self.solver_type == "phi_1" else g * phi(2, -g) / self.r
        return interpolate(s.x, denoised, math.exp(-g)) + b * (s.denoise(x_m, m) - denoised) + noise_next


@dataclass(frozen=True)
class Seeds3(_Seeds):
    r"""SEEDS-3, with stages at `a = sigma e^{-r_1 h}` and `b = sigma e^{-r_2 h}`.

    With the noise path n at the three levels (see the module): `x_a = e^{-r_1 g} x + (1 - e^{-r_1 g}) D + n_a`,
    `x_b = e^{-r_2 g} x + (1 - e^{-r_2 g}) D + (r_2^2 / r_1) g phi_2(-r_2 g) (D_a - D) + n_b`,
    `x' = e^{-g} x + (1 - e^{-g}) D + (g / r_2) phi_2(-g) (D_b - D) + n_next`. Order 3 at `eta = 0` if `r_2 = 2/3`
    (otherwise 2); with `r_1 = 1/3` too, it is `res_3s` with `c2 = 1/3`, `c3 = 2/3`. Three evaluations a step. A step to
    sigma = 0 returns D.

    Source: Gonzalez et al., SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (2023),
    arXiv 2305.14267.
    """

    r_1: float = option(1.0 / 3.0, low=1e-3, high=1.0)
    r_2: float = option(2.0 / 3.0, low=1e-3, high=1.0)

    name: ClassVar[str] = "seeds_3"
    ode_order: ClassVar[int] = 3

    def step(self, s: StepBuilder) -> Form:
        if self.r_1 >= self.r_2:
            raise ValueError(f"its stages must be in order, got r_1={self.r_1:g}, r_2={self.r_2:g}; use r_1 < r_2")
        denoised = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return denoised
        h = log_step(s.sigma, s.sigma_next)
        a, b = (s.sigma * (s.sigma_next / s.sigma) ** r for r in (self.r_1, self.r_2))
        noise_a, noise_b, noise_next = self.noise_path(s, a, b, s.sigma_next)
        g, g_a, g_b = ((1.0 + self.eta) * r * h for r in (1.0, self.r_1, self.r_2))
        x_a = interpolate(s.x, denoised, math.exp(-g_a)) + noise_a
        turn_a = s.denoise(x_a, a) - denoised
        x_b = interpolate(s.x, denoised, math.exp(-g_b)) + self.r_2 / self.r_1 * g_b * phi(2, -g_b) * turn_a + noise_b
        turn_b = s.denoise(x_b, b) - denoised
        return interpolate(s.x, denoised, math.exp(-g)) + g / self.r_2 * phi(2, -g) * turn_b + noise_next
