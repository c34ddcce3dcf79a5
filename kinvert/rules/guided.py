r"""CFG++ samplers: move towards the guided image D, but take the noise from the unconditional image U.

Under classifier-free guidance `D = U + cfg (C - U)` is an extrapolation, and `(x - D) / sigma` is not the noise in x.
CFG++ takes the noise from U. All its samplers follow from one substitution: shift the state by `D - U` first. With
`y = x + (D - U)` the slope of the plain sampler, `(y - D) / sigma`, is the unconditional slope `(x - U) / sigma`, and
Euler's step `q y + (1 - q) D = D + sigma_next (x - U) / sigma` is the step of CFG++. The multistep samplers remember U
in place of D. At `cfg = 1` the pair has `U = D`, and they are the plain samplers, except `dpmpp_2s_ancestral_cfg_pp`.

The denoiser must return pairs (D, U) as `Guided(denoised, uncond)`; a pair is one evaluation.

Source: Chung et al., CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models (2024), arXiv
2406.08070; ComfyUI (2024-2025), for the multistep forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kinvert.coefficients import ancestral_split, log_step
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option, slope
from kinvert.rules.res import res_weight

__all__ = [
    "CFGppUD10AB",
    "DPMpp2MCFGpp",
    "DPMpp2SAncestralCFGpp",
    "EulerAncestralCFGpp",
    "GradientEstimationCFGpp",
    "ResMultistepCFGpp",
]


def _denoise_shifted(s: StepBuilder) -> tuple[Form, Form, Form]:
    """Return `(x + D - U, D, U)` at the state and the noise level of the step."""
    denoised, uncond = s.denoise_guided(s.x, s.sigma)
    return s.x + (denoised - uncond), denoised, uncond


@dataclass(frozen=True)
class EulerAncestralCFGpp(Rule):
    r"""CFG++ of `euler_ancestral`: `x' = (down/sigma) y + (1 - down/sigma) D + up s_noise n(sigma, sigma_next)`.

    `y = x + D - U`. Order 1 at `eta = 0` (`euler_cfg_pp`, the sampler of the paper), one evaluation a step. With
    `U = D` it is `euler_ancestral`. With `flow=True` the noise levels are flow times t, `a = 1 - t`, and it is the same
    step for `sigma = t / a`: `x' = a' D + down (x - a U) / t + up s_noise n`, with the split of `t a' / a -> t'`. From
    `t = 1`, pure noise, a step with `eta > 0` draws all its noise anew.

    Source: Chung et al., CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models (2024), arXiv
    2406.08070.
    """

    eta: float = option(1.0, low=0.0)
    s_noise: float = 1.0
    flow: bool = False

    name: ClassVar[str] = "euler_ancestral_cfg_pp"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        denoised, uncond = s.denoise_guided(s.x, s.sigma)
        a, a_next = (1.0 - s.sigma, 1.0 - s.sigma_next) if self.flow else (1.0, 1.0)
        # The split is homogeneous: a' split(t / a, t' / a') = split(t a' / a, t').
        down, up = ancestral_split(s.sigma * a_next / a if a else math.inf, s.sigma_next, self.eta)
        x = a_next * denoised + down * (s.x - a * uncond) / s.sigma
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)


@dataclass(frozen=True)
class DPMpp2SAncestralCFGpp(Rule):
    r"""CFG++ of `dpmpp_2s_ancestral`, as in ComfyUI.

    `m = sqrt(sigma down)`, `x_m = (m/sigma) (x + D - U) + (1 - m/sigma) D`, `(D_m, U_m)` at `(x_m, m)`,
    `x' = (down/sigma) (x + D - U_m) + (1 - down/sigma) D_m + up s_noise n(sigma, sigma_next)`: the last shift mixes the
    first image with the second unconditional image. So with `U = D` this is *not* `dpmpp_2s_ancestral`: at `eta = 0` it
    does not converge to the ODE (order 0), and with noise it converges to a wrong law. For Gaussian data the variance
    of its samples is 31 % too small with 10 steps, and 35 % with 160. Two evaluations a step, one if `down = 0`.

    Source: ComfyUI (2024), after Chung et al., CFG++ (2024), arXiv 2406.08070, and Lu et al., DPM-Solver++ (2022),
    arXiv 2211.01095.
    """

    eta: float = option(1.0, low=0.0)
    s_noise: float = 1.0

    name: ClassVar[str] = "dpmpp_2s_ancestral_cfg_pp"
    ode_order: ClassVar[int] = 0

    def step(self, s: StepBuilder) -> Form:
        y, x, _ = _denoise_shifted(s)
        denoised = x
        down, up = ancestral_split(s.sigma, s.sigma_next, self.eta)
        if down > 0:
            m = math.sqrt(s.sigma * down)
            denoised_m, uncond_m = s.denoise_guided(interpolate(y, denoised, m / s.sigma), m)
            x = interpolate(s.x + (denoised - uncond_m), denoised_m, down / s.sigma)
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)


@dataclass(frozen=True)
class DPMpp2MCFGpp(Rule):
    r"""CFG++ of `dpmpp_2m`: `x' = q y + (1 - q) (D + h / (2 h_prev) (D - U_prev))` with `y = x + D - U`.

    Order 2 at `U = D`, where it is `dpmpp_2m`. One evaluation a step, remembers one unconditional image. The first
    step and a step to sigma = 0 use D alone.

    Source: ComfyUI (2024), after Chung et al., CFG++ (2024), arXiv 2406.08070, and Lu et al., DPM-Solver++ (2022),
    arXiv 2211.01095.
    """

    name: ClassVar[str] = "dpmpp_2m_cfg_pp"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        y, denoised, uncond = _denoise_shifted(s)
        _, *past = s.history("U", uncond, 2)
        if past and s.sigma_next > 0:
            ratio = log_step(s.sigma, s.sigma_next) / log_step(s.sigmas[s.index - 1], s.sigma)
            denoised = denoised + ratio / 2 * (denoised - past[0])
        return interpolate(y, denoised, s.sigma_next / s.sigma)


@dataclass(frozen=True)
class ResMultistepCFGpp(Rule):
    r"""CFG++ of `res_multistep`: `x' = e^{-h} y + (1 - e^{-h}) U + h phi_2(-h) / c (U_prev - U) + up s_noise n`.

    `y = x + D - U`, the other symbols are as in `res_multistep`. D takes the place of U in the first step and if
    `down = 0`. One evaluation a step, remembers one unconditional image. Order 2 at `U = D` and `eta = 0`, where it is
    `res_multistep`; `res_multistep_ancestral_cfg_pp` has `eta = 1`.

    Source: ComfyUI (2025), after Chung et al., CFG++ (2024), arXiv 2406.08070, and Zhang, Song and Chen, Improved Order
    Analysis and Design of Exponential Integrator for Diffusion Models Sampling (2023), arXiv 2308.02157.
    """

    eta: float = option(0.0, low=0.0)
    s_noise: float = 1.0

    name: ClassVar[str] = "res_multistep_cfg_pp"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        y, denoised, uncond = _denoise_shifted(s)
        _, *past = s.history("U", uncond, 2)
        down, up = ancestral_split(s.sigma, s.sigma_next, self.eta)
        if past and down > 0:
            x = interpolate(y, uncond, down / s.sigma) + res_weight(s, down, self.eta) * (past[0] - uncond)
        else:
            x = interpolate(y, denoised, down / s.sigma)
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)


@dataclass(frozen=True)
class GradientEstimationCFGpp(Rule):
    r"""CFG++ of `gradient_estimation`: `x' = y + (sigma_next - sigma) (ge_gamma d + (1 - ge_gamma) d_prev)`.

    `y = x + D - U`, `d = (x - U) / sigma`. Order 1 at `U = D`, where it is `gradient_estimation`. One evaluation a
    step, remembers one slope. The first step uses d alone, a step to sigma = 0 returns D.

    Source: ComfyUI (2025), after Chung et al., CFG++ (2024), arXiv 2406.08070, and Permenter and Yuan, Interpreting and
    Improving Diffusion Models from an Optimization Perspective (2023), arXiv 2306.04848.
    """

    ge_gamma: float = 2.0

    name: ClassVar[str] = "gradient_estimation_cfg_pp"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        y, denoised, uncond = _denoise_shifted(s)
        d, *past = s.history("d", slope(s.x, uncond, s.sigma), 2)
        x = interpolate(y, denoised, s.sigma_next / s.sigma)
        if past and s.sigma_next > 0:
            x = x + (self.ge_gamma - 1.0) * (s.sigma_next - s.sigma) * (d - past[0])
        return x


@dataclass(frozen=True)
class CFGppUD10AB(Rule):
    r"""CFG++ with a memory of the unconditional slope and of the step: "UD10" and "AB".

    With `w = sigma_next - sigma`, `w_prev` the same of the step before, and `u = (x - U) / sigma`, the unconditional
    slope is extrapolated by a tenth, `u* = u + uncond_history (w / w_prev) (u - u_prev)`. A CFG++ step along it has the
    slope `e = (D + sigma_next u* - x) / w`, which is extrapolated by a quarter of the two-step Adams-Bashforth method:
    `x' = x + w (e + history w / (2 w_prev) (e - e_prev))`. A step to sigma = 0 extrapolates the denoised image,
    `x' = D - sigma (D - D_prev) / (sigma - sigma_prev)`. The first step is the step of `euler_cfg_pp`. One evaluation a
    step, remembers u, e and D.

    The extrapolation by a tenth does not vanish with the step, because it is divided by w: at `U = D` the run follows
    `dx/dsigma = d + sigma / 10 dd/dsigma` and not the probability-flow ODE, order 0. With `uncond_history=0` the order
    is 1. With `history=0` too, it is `euler_cfg_pp` up to the last step. With `flow=True` the noise levels are flow
    times t, `a = 1 - t`, and `u = (x - a U) / t`, `e = (a' D + t' u* - x) / w`.

    Source: ComfyUI (2026), after Chung et al., CFG++ (2024), arXiv 2406.08070.
    """

    uncond_history: float = 0.1
    history: float = 0.25
    flow: bool = False

    name: ClassVar[str] = "cfgpp_ud10_ab"

    @property
    def ode_order(self) -> int:
        """The order: 0 with an extrapolated slope, 1 without."""
        return 0 if self.uncond_history else 1

    def step(self, s: StepBuilder) -> Form:
        denoised, uncond = s.denoise_guided(s.x, s.sigma)
        a, a_next = (1.0 - s.sigma, 1.0 - s.sigma_next) if self.flow else (1.0, 1.0)
        width = s.sigma_next - s.sigma
        ratio = width / (s.sigma - s.sigmas[s.index - 1]) if s.index else 0.0
        u, *past_u = s.history("u", (s.x - a * uncond) / s.sigma, 2)
        if past_u:
            u = u + self.uncond_history * ratio * (u - past_u[0])
        moved = a_next * denoised + s.sigma_next * u - s.x
        step, *past = s.history("e", moved / width, 2)
        _, *past_denoised = s.history("D", denoised, 2)
        if not past:
            return s.x + moved
        if s.sigma_next == 0:
            return denoised + ratio * (denoised - past_denoised[0])
        return s.x + moved + self.history * width * ratio / 2 * (step - past[0])
