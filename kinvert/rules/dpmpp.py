r"""The DPM-Solver++ family: exponential integrators of `dx/dlambda = -x + D` in `lambda = -log sigma`.

`h = log(sigma / sigma_next)` is the step, `h_prev` the step before, `D_prev` the denoised image of the step before.
The stochastic members solve the reverse SDE with `eta`: `h_eta = (1 + eta) h`, noise
`sigma_next sqrt(1 - exp(-2 eta h))`.

Source: Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (2022), arXiv
2211.01095; Crowson, k-diffusion (2022-2023), for the SDE forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from kinvert.coefficients import ancestral_split, log_step, phi, phi1, sde_noise_scale
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, final_order, interpolate, option

__all__ = ["DPMpp2M", "DPMpp2MSDE", "DPMpp3MSDE", "DPMppSDE"]


@dataclass(frozen=True)
class DPMpp2M(Rule):
    r"""DPM-Solver++(2M): `x' = q x + (1 - q) (D + h / (2 h_prev) (D - D_prev))`.

    Order 2, one evaluation a step, remembers one denoised image. The first step and a step to sigma = 0 use D alone.
    With `lower_order_final=True` so does the last step of a run of fewer than 15 steps, the default of diffusers.

    Source: Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (2022), arXiv
    2211.01095.
    """

    lower_order_final: bool = False

    name: ClassVar[str] = "dpmpp_2m"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised, *past = s.history("D", s.denoise(s.x, s.sigma), 2)
        if past and s.sigma_next > 0 and final_order(s, 2, self.lower_order_final) == 2:
            ratio = log_step(s.sigma, s.sigma_next) / log_step(s.sigmas[s.index - 1], s.sigma)
            denoised = denoised + ratio / 2 * (denoised - past[0])
        return interpolate(s.x, denoised, s.sigma_next / s.sigma)


@dataclass(frozen=True)
class DPMpp2MSDE(Rule):
    r"""DPM-Solver++(2M) for the reverse SDE.

    `x' = e^{-h_eta} x + (1 - e^{-h_eta}) D + g (h / h_prev) (D - D_prev)`, plus the noise
    `sigma_next sqrt(1 - e^{-2 eta h}) s_noise n`, with `g = (1 - e^{-h_eta}) / 2` (solver_type "midpoint") or
    `g = 1 - (1 - e^{-h_eta}) / h_eta` ("heun", the public name `dpmpp_2m_sde_heun`). Order 2 at `eta = 0`, where
    "midpoint" is `dpmpp_2m` and "heun" is `res_multistep`. One evaluation a step, remembers one denoised image.
    `lower_order_final=True` drops the term in g in the last step of a run of fewer than 15 steps, as in diffusers.

    Source: Crowson, k-diffusion (2023), after Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models (2022), arXiv 2211.01095.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = False

    name: ClassVar[str] = "dpmpp_2m_sde"
    ode_order: ClassVar[int] = 2
    default_noise: ClassVar[Literal["white", "brownian"]] = "brownian"

    def step(self, s: StepBuilder) -> Form:
        denoised, *past = s.history("D", s.denoise(s.x, s.sigma), 2)
        if s.sigma_next == 0:
            return denoised
        h = log_step(s.sigma, s.sigma_next)
        h_eta = (1.0 + self.eta) * h
        x = interpolate(s.x, denoised, math.exp(-h_eta))
        if past and final_order(s, 2, self.lower_order_final) == 2:
            g = -math.expm1(-h_eta) / 2 if self.solver_type == "midpoint" else 1.0 - phi1(-h_eta)
            x = x + g * h / log_step(s.sigmas[s.index - 1], s.sigma) * (denoised - past[0])
        if self.eta > 0 and self.s_noise > 0:
            scale = s.sigma_next * sde_noise_scale(h, self.eta) * self.s_noise
            x = x + scale * s.noise(s.sigma, s.sigma_next)
        return x


@dataclass(frozen=True)
class DPMppSDE(Rule):
    r"""DPM-Solver++ (singlestep, stochastic) with an intermediate level `m = sigma^{1-r} sigma_next^r`.

    Stage: `(down_m, up_m)` splits `sigma -> m`,
    `x_m = (down_m/sigma) x + (1 - down_m/sigma) D + up_m s_noise n(sigma, m)`, `D_m = D(x_m, m)`. Update: `(down, up)`
    splits `sigma -> sigma_next`, with `f = 1 / (2 r)`
    `x' = (down/sigma) x + (1 - down/sigma) ((1 - f) D + f D_m) + up s_noise n(sigma, sigma_next)`. The two noises
    belong to overlapping intervals. Order 2 at `eta = 0`, where `r = 1/2` is `dpmpp_2s_ancestral` with `eta = 0`. Two
    evaluations a step, one if sigma_next = 0.

    Source: Crowson, k-diffusion (2022), after Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models (2022), arXiv 2211.01095.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    r: float = option(0.5, low=1e-3, high=1.0)

    name: ClassVar[str] = "dpmpp_sde"
    ode_order: ClassVar[int] = 2
    default_noise: ClassVar[Literal["white", "brownian"]] = "brownian"

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return denoised
        m = s.sigma ** (1.0 - self.r) * s.sigma_next**self.r
        denoised_m = s.denoise(self._move(s, denoised, m), m)
        f = 1.0 / (2.0 * self.r)
        return self._move(s, (1.0 - f) * denoised + f * denoised_m, s.sigma_next)

    def _move(self, s: StepBuilder, denoised: Form, sigma_to: float) -> Form:
        """Return the ancestral step from `s.x` to `sigma_to` along the given denoised image."""
        down, up = ancestral_split(s.sigma, sigma_to, self.eta)
        x = interpolate(s.x, denoised, down / s.sigma)
        if self.eta > 0 and self.s_noise > 0:
            x = x + up * self.s_noise * s.noise(s.sigma, sigma_to)
        return x


@dataclass(frozen=True)
class DPMpp3MSDE(Rule):
    r"""DPM-Solver++(3M) for the reverse SDE.

    `x' = e^{-h_eta} x + (1 - e^{-h_eta}) D + h_eta phi_2(-h_eta) D1 + h_eta phi_3(-h_eta) D2`, plus the noise
    `sigma_next sqrt(1 - e^{-2 eta h}) s_noise n`, with `phi_k` of `coefficients.phi` and the divided differences of the
    last three denoised images `g_0 = (D - D_prev) h / h_prev`, `g_1 = (D_prev - D_prev2) h / h_prev2`, `D2 = (g_0 -
    g_1) / (r_0 + r_1)`, `D1 = g_0 + r_0 D2`, where `r_0 = h_prev / h`, `r_1 = h_prev2 / h`. The second step has `D1 =
    g_0` and `D2 = 0`, the first has neither. A step to sigma = 0 returns D. A step with two images is a step of
    `dpmpp_2m_sde_heun` (solver_type "heun") or of `dpmpp_2m_sde` ("midpoint"). `dpmpp_3m`, the deterministic sampler of
    diffusers with solver_order 3, is "midpoint" with `eta = 0`. `lower_order_final=True` ends runs of fewer than 15
    steps with a step of two images and a step of D alone, as in diffusers. One evaluation a step, remembers two
    denoised images. The published order is 3. At `eta = 0` it is 2, because of the factor of D2: the exact integral of
    the quadratic would have a factor twice as large.

    Source: Crowson, k-diffusion (2023), after Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models (2022), arXiv 2211.01095.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    solver_type: Literal["midpoint", "heun"] = "heun"
    lower_order_final: bool = False

    name: ClassVar[str] = "dpmpp_3m_sde"
    ode_order: ClassVar[int] = 2
    default_noise: ClassVar[Literal["white", "brownian"]] = "brownian"

    def step(self, s: StepBuilder) -> Form:
        denoised, *past = s.history("D", s.denoise(s.x, s.sigma), 3)
        if s.sigma_next == 0:
            return denoised
        h = log_step(s.sigma, s.sigma_next)
        h_eta = (1.0 + self.eta) * h
        x = interpolate(s.x, denoised, math.exp(-h_eta))
        order = min(len(past) + 1, final_order(s, 3, self.lower_order_final))
        if order > 1:
            r_0 = log_step(s.sigmas[s.index - 1], s.sigma) / h
            first = (denoised - past[0]) / r_0
            weight = h_eta * phi(2, -h_eta)
            if order == 3:
                r_1 = log_step(s.sigmas[s.index - 2], s.sigmas[s.index - 1]) / h
                second = (first - (past[0] - past[1]) / r_1) / (r_0 + r_1)
                first = first + r_0 * second
                x = x + h_eta * phi(3, -h_eta) * second
            elif self.solver_type == "midpoint":
                weight = -math.expm1(-h_eta) / 2
            x = x + weight * first
        if self.eta > 0 and self.s_noise > 0:
            scale = s.sigma_next * sde_noise_scale(h, self.eta) * self.s_noise
            x = x + scale * s.noise(s.sigma, s.sigma_next)
        return x
