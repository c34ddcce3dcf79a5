r"""One-step methods for the probability-flow ODE `dx/dsigma = d(x, sigma) = (x - D(x, sigma)) / sigma`.

They share the churn of Karras et al. (2022): before each step with `s_tmin <= sigma <= s_tmax`, the noise level is
raised from `sigma` to `sigma_hat = (1 + gamma) sigma` with `gamma = min(s_churn / steps, sqrt(2) - 1)`, and noise of
variance `s_noise^2 (sigma_hat^2 - sigma^2)` is added. With `s_churn = 0`, the default, the methods are deterministic.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364,
Algorithm 2.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option, slope

__all__ = ["DPM2", "ChurnedRule", "Euler", "Heun", "HeunPP2"]


@dataclass(frozen=True)
class ChurnedRule(Rule, ABC):
    """A one-step method with churn.

    Attributes:
        s_churn: amount of churn over the whole run; each step gets `s_churn / steps`.
        s_tmin: lowest noise level that is churned.
        s_tmax: highest noise level that is churned.
        s_noise: factor of the noise.
    """

    s_churn: float = option(0.0, low=0.0)
    s_tmin: float = option(0.0, low=0.0)
    s_tmax: float = option(math.inf, low=0.0)
    s_noise: float = 1.0

    def churn(self, s: StepBuilder) -> tuple[Form, float]:
        """Return the churned state and its noise level `sigma_hat`."""
        inside = self.s_tmin <= s.sigma <= self.s_tmax
        gamma = min(self.s_churn / s.steps, math.sqrt(2.0) - 1.0) if inside else 0.0
        if gamma == 0.0:
            return s.x, s.sigma
        sigma_hat = (1.0 + gamma) * s.sigma
        scale = self.s_noise * math.sqrt(sigma_hat**2 - s.sigma**2)
        return s.x + scale * s.noise(s.sigma, sigma_hat), sigma_hat


@dataclass(frozen=True)
class Euler(ChurnedRule):
    r"""Euler's method: `x' = x + (sigma_next - sigma) d = q x + (1 - q) D`.

    Order 1, one evaluation a step. It is DDIM with eta = 0, in VE, VP and rectified-flow coordinates alike.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364;
    Song et al., Denoising Diffusion Implicit Models (2020), arXiv 2010.02502.
    """

    name: ClassVar[str] = "euler"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        x, sigma = self.churn(s)
        return interpolate(x, s.denoise(x, sigma), s.sigma_next / sigma)


@dataclass(frozen=True)
class Heun(ChurnedRule):
    r"""Heun's method: an Euler step to `x_e`, then `x' = x + (sigma_next - sigma) (d + d_e) / 2`.

    `d_e = (x_e - D(x_e, sigma_next)) / sigma_next`. Order 2, two evaluations a step. A step to sigma = 0, where the
    slope is undefined, is an Euler step.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364,
    Algorithm 2.
    """

    name: ClassVar[str] = "heun"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        x, sigma = self.churn(s)
        denoised = s.denoise(x, sigma)
        euler = interpolate(x, denoised, s.sigma_next / sigma)
        if s.sigma_next == 0:
            return euler
        d = slope(x, denoised, sigma)
        d_next = slope(euler, s.denoise(euler, s.sigma_next), s.sigma_next)
        return x + (s.sigma_next - sigma) * (d + d_next) / 2


@dataclass(frozen=True)
class DPM2(ChurnedRule):
    r"""DPM-Solver-2 in sigma: a midpoint step with the geometric mean `m = sqrt(sigma sigma_next)` as midpoint.

    `x_m = x + (m - sigma) d`, `x' = x + (sigma_next - sigma) (x_m - D(x_m, m)) / m`. Order 2, two evaluations a step.
    A step to sigma = 0 is an Euler step.

    Source: Lu et al., DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps
    (2022), arXiv 2206.00927; Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022),
    arXiv 2206.00364, for the form in sigma.
    """

    name: ClassVar[str] = "dpm_2"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        x, sigma = self.churn(s)
        denoised = s.denoise(x, sigma)
        if s.sigma_next == 0:
            return denoised
        m = math.sqrt(sigma * s.sigma_next)
        x_m = interpolate(x, denoised, m / sigma)
        return x + (s.sigma_next - sigma) * slope(x_m, s.denoise(x_m, m), m)


@dataclass(frozen=True)
class HeunPP2(ChurnedRule):
    r"""Heun++: the slopes at the next one or two noise levels, weighted by their share of the first noise level.

    With `x_e = x + (sigma_next - sigma) d`, `x_ee = x_e + (sigma_next2 - sigma_next) d_e`, slopes d, d_e, d_ee at the
    three, and `w = sigma_next / (3 sigma_0)`, `w' = sigma_next2 / (3 sigma_0)` where `sigma_next2` is the level after
    sigma_next: `x' = x + (sigma_next - sigma) ((1 - w - w') d + w d_e + w' d_ee)`. The last step but one leaves x_ee
    out and has `w = sigma_next / (2 sigma_0)`. The last step is an Euler step, on every schedule. Three evaluations a
    step, two in the last step but one, one in the last. The weights are not the weights of a quadrature, so the order
    is 1. On a rising schedule the weights grow with `sigma / sigma_0`, and so does the result: do not run it upwards.

    Source: sd-webui extensions (no paper is known), as in ComfyUI.
    """

    name: ClassVar[str] = "heunpp2"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        x, sigma = self.churn(s)
        denoised = s.denoise(x, sigma)
        euler = interpolate(x, denoised, s.sigma_next / sigma)
        following = s.steps - s.index - 1  # steps after this one
        if following == 0:
            return euler
        d = slope(x, denoised, sigma)
        d_next = slope(euler, s.denoise(euler, s.sigma_next), s.sigma_next)
        w = s.sigma_next / (min(following + 1, 3) * s.sigmas[0])
        mean = (1.0 - w) * d + w * d_next
        if following > 1:
            sigma_next2 = s.sigmas[s.index + 2]
            second = euler + (sigma_next2 - s.sigma_next) * d_next
            d_next2 = slope(second, s.denoise(second, sigma_next2), sigma_next2)
            mean = mean + sigma_next2 / (3.0 * s.sigmas[0]) * (d_next2 - d)
        return x + (s.sigma_next - sigma) * mean
