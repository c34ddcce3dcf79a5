r"""RES: the refined exponential solver, a two-step exponential integrator with an ancestral split.

It differs from DPM-Solver++(2M) only in the weight of the remembered denoised image. The weight here is `phi_2`, which
is exact for a denoised image that is linear in `lambda = -log sigma`; 2M takes half of `phi_1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kinvert.coefficients import ancestral_split, log_step, phi
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option

__all__ = ["ResMultistep", "res_weight"]


def res_weight(s: StepBuilder, down: float, eta: float) -> float:
    r"""Return the weight of `D_prev - D` in a step to `down`: `h^2 phi_2(-h) / log(down_prev / sigma_prev)`.

    `h = log(sigma / down)`, and `down_prev` is the `down` of the step before, from `sigma_prev` to `sigma`. If
    `down_prev = 0`, the step before forgets x, and the weight is 0.
    """
    sigma_prev = s.sigmas[s.index - 1]
    down_prev = ancestral_split(sigma_prev, s.sigma, eta)[0]
    if down_prev == 0:
        return 0.0
    h = log_step(s.sigma, down)
    return h**2 * phi(2, -h) / math.log(down_prev / sigma_prev)


@dataclass(frozen=True)
class ResMultistep(Rule):
    r"""RES multistep: `x' = e^{-h} x + (1 - e^{-h}) D + h phi_2(-h) / c (D_prev - D) + up s_noise n`.

    `n = n(sigma, sigma_next)`, `(down, up)` is the ancestral split, `h = log(sigma / down)`,
    `c = log(down_prev / sigma_prev) / h` with the values of the step before, `phi_2(z) = (phi_1(z) - 1) / z`. The first
    step and a step with `down = 0` use D alone. One evaluation a step, remembers one denoised image. Order 2 at
    `eta = 0` (`res_multistep`), where it is `dpmpp_2m_sde` with `eta=0` and solver_type "heun".
    `res_multistep_ancestral` has `eta = 1`.

    Source: Zhang, Song and Chen, Improved Order Analysis and Design of Exponential Integrator for Diffusion Models
    Sampling (2023), arXiv 2308.02157.
    """

    eta: float = option(0.0, low=0.0)
    s_noise: float = 1.0

    name: ClassVar[str] = "res_multistep"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised, *past = s.history("D", s.denoise(s.x, s.sigma), 2)
        down, up = ancestral_split(s.sigma, s.sigma_next, self.eta)
        x = interpolate(s.x, denoised, down / s.sigma)
        if past and down > 0:
            x = x + res_weight(s, down, self.eta) * (past[0] - denoised)
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)
