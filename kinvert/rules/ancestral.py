r"""Ancestral samplers: a deterministic move below the target noise level, then fresh noise up to it.

`coefficients.ancestral_split` gives `(down, up)` with `down^2 + up^2 = sigma_next^2`; `eta` scales `up`. With `eta = 0`
the samplers are deterministic. On a rising schedule `down = 0`: the step returns the denoised image and forgets x.

With `flow=True` the noise levels are flow times, `x = (1 - sigma) x0 + sigma eps`, and the state is rescaled before the
noise is added: `x' = scale * (...) + up s_noise n`, with `coefficients.flow_ancestral_split`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kinvert.coefficients import ancestral_split, flow_ancestral_split
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option, slope

__all__ = ["LCM", "DPM2Ancestral", "DPMpp2SAncestral", "EulerAncestral"]


def _split(s: StepBuilder, eta: float, flow: bool) -> tuple[float, float, float]:
    """Return `(down, scale, up)` of the step: move to `down`, multiply by `scale`, add `up` times noise."""
    if flow:
        return flow_ancestral_split(s.sigma, s.sigma_next, eta)
    down, up = ancestral_split(s.sigma, s.sigma_next, eta)
    return down, 1.0, up


@dataclass(frozen=True)
class EulerAncestral(Rule):
    r"""Euler to `down`, then noise: `x' = (down/sigma) x + (1 - down/sigma) D + up s_noise n(sigma, sigma_next)`.

    At `eta = 1` this is the ancestral step of DDPM (public name `ddpm`). At `eta = 0` it is `euler` (public name
    `ddim`). Between them it is DDIM with that eta: sigma_t(eta) of Song et al. is `up` after the change from
    variance-preserving coordinates. One evaluation a step. If `down = 0` the step returns D without noise, as in
    ComfyUI; `noise_at_down_zero=True` adds the noise, as in k-diffusion. The two differ only if eta is clipped or the
    schedule rises.

    Source: Crowson, k-diffusion (2022); Ho et al., Denoising Diffusion Probabilistic Models (2020), arXiv
    2006.11239; Song et al., Denoising Diffusion Implicit Models (2020), arXiv 2010.02502.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    flow: bool = False
    noise_at_down_zero: bool = False

    name: ClassVar[str] = "euler_ancestral"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        down, scale, up = _split(s, self.eta, self.flow)
        x = scale * interpolate(s.x, denoised, down / s.sigma)
        if s.sigma_next == 0 or (down == 0 and not self.noise_at_down_zero):
            return x
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)


@dataclass(frozen=True)
class DPMpp2SAncestral(Rule):
    r"""DPM-Solver++(2S) to `down`, then noise.

    With the midpoint `m = sqrt(sigma down)` in log sigma: `x_m = (m/sigma) x + (1 - m/sigma) D`, `D_m = D(x_m, m)`,
    `x' = (down/sigma) x + (1 - down/sigma) D_m + up s_noise n(sigma, sigma_next)`. Order 2 at `eta = 0`, where it is
    the exponential midpoint rule and equals `dpmpp_sde` with `eta = 0`. Two evaluations a step, one if `down = 0`. In
    flow time the midpoint is taken in the log signal-to-noise ratio, `m = 0.9999` for a step from 1.

    Source: Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (2022), arXiv
    2211.01095.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    flow: bool = False

    name: ClassVar[str] = "dpmpp_2s_ancestral"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        x = denoised = s.denoise(s.x, s.sigma)
        down, scale, up = _split(s, self.eta, self.flow)
        if down > 0:
            m = self._midpoint(s.sigma, down)
            denoised = s.denoise(interpolate(s.x, denoised, m / s.sigma), m)
            x = scale * interpolate(s.x, denoised, down / s.sigma)
        if s.sigma_next == 0:
            return x
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)

    def _midpoint(self, sigma: float, down: float) -> float:
        """Return the level half way to `down` in the log signal-to-noise ratio."""
        if not self.flow:
            return math.sqrt(sigma * down)
        if sigma == 1:
            return 0.9999
        ratio = math.sqrt(sigma / (1.0 - sigma) * down / (1.0 - down))
        return ratio / (1.0 + ratio)


@dataclass(frozen=True)
class DPM2Ancestral(Rule):
    r"""DPM-Solver-2 in sigma to `down`, then noise.

    With `m = sqrt(sigma down)`: `x_m = (m/sigma) x + (1 - m/sigma) D`, `D_m = D(x_m, m)`,
    `x' = x + (down - sigma) (x_m - D_m) / m + up s_noise n(sigma, sigma_next)`. Order 2 at `eta = 0`, where it is
    `dpm_2`. Two evaluations a step. If `down = 0` the step returns D without noise, after one evaluation.

    Source: Crowson, k-diffusion (2022), after Lu et al., DPM-Solver (2022), arXiv 2206.00927.
    """

    eta: float = option(1.0, low=0.0)
    s_noise: float = 1.0
    flow: bool = False

    name: ClassVar[str] = "dpm_2_ancestral"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        down, scale, up = _split(s, self.eta, self.flow)
        if down <= 0:  # in flow time a large eta makes it negative
            return denoised
        m = math.sqrt(s.sigma * down)
        x_m = interpolate(s.x, denoised, m / s.sigma)
        x = scale * (s.x + (down - s.sigma) * slope(x_m, s.denoise(x_m, m), m))
        return x + up * self.s_noise * s.noise(s.sigma, s.sigma_next)


@dataclass(frozen=True)
class LCM(Rule):
    r"""Sampling of a consistency model: denoise, then noise again, `x' = D + sigma_next s n(sigma, sigma_next)`.

    `s` goes from `s_noise` in the first of N steps to `s_noise_end` (None: the same) in the last one,
    `s = s_noise + (s_noise_end - s_noise) i / (N - 1)`. With `noise_clip_std > 0` the noise n is clipped at so many
    standard deviations (`noise.clipped`), from every source but recorded noise, which is replayed unchanged. With
    `flow=True`, `x' = (1 - sigma_next) D + sigma_next s n`. One evaluation a step. Every step forgets x, so there is
    nothing to invert. Without the noise it approximates no differential equation: order 0. It is `euler_ancestral` with
    `noise_at_down_zero=True` and an eta so large that `down = 0`.

    Source: Luo et al., Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference (2023),
    arXiv 2310.04378; Song et al., Consistency Models (2023), arXiv 2303.01469, Algorithm 1.
    """

    s_noise: float = 1.0
    flow: bool = False
    s_noise_end: float | None = None
    noise_clip_std: float = option(0.0, low=0.0)

    name: ClassVar[str] = "lcm"
    ode_order: ClassVar[int] = 0

    @property
    def noise_clip(self) -> float:
        """The option `noise_clip_std`."""
        return self.noise_clip_std

    @property
    def noise_options(self) -> dict[str, Any]:
        """Both ends of the noise scale, if one of them is not 0."""
        return {"s_noise": 0.0, "s_noise_end": None} if self.s_noise or self.s_noise_end else {}

    def step(self, s: StepBuilder) -> Form:
        signal = 1.0 - s.sigma_next if self.flow else 1.0
        x = signal * s.denoise(s.x, s.sigma)
        end = self.s_noise if self.s_noise_end is None else self.s_noise_end
        scale = self.s_noise + (end - self.s_noise) * s.index / max(s.steps - 1, 1)
        return x + s.sigma_next * scale * s.noise(s.sigma, s.sigma_next)
