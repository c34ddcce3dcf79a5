r"""Rules that published inversions consist of.

`DDIMInverse` is made to run upwards, with `sigma_next > sigma`; downwards it is DDIM. A variance-preserving latent is
`alpha x` with `alpha = 1 / sqrt(1 + sigma^2)`. A published method that gives the network the latent of one level with
the timestep of the next shows it `w x` in these coordinates, with `w = alpha(sigma) / alpha(sigma_next)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option, slope

__all__ = ["DDIMInverse", "DirectInversion"]


@dataclass(frozen=True)
class DDIMInverse(Rule):
    r"""A DDIM step up whose slope is taken at the *noisier* level: `x' = x + (sigma_next - sigma) d`.

    `d = (w x - D(w x, sigma_next)) / sigma_next`, `w = sqrt((1 + sigma_next^2) / (1 + sigma^2))`: the network gets the
    unchanged latent with the timestep of the next level. The Euler step up takes d at `(x, sigma)` instead. A step down
    is a DDIM step, `x' = x + (sigma_next - sigma) (x - D(x, sigma)) / sigma`, so both directions are the published
    pair. In a run upwards, with `start < index / steps < stop`, x' is mixed with the latent before the step,
    `keep x' + (1 - keep) w x` (EasyInv); the default `keep=1` does not mix. With `flow=True` the levels are flow times,
    and `w = 1`.

    Source: Song, Meng and Ermon, Denoising Diffusion Implicit Models (2020), arXiv 2010.02502; Zhang et al., EasyInv:
    Toward Fast and Better DDIM Inversion (2024), arXiv 2408.05159.
    """

    keep: float = option(1.0, low=0.0, high=1.0)
    start: float = option(0.05, low=0.0, high=1.0)
    stop: float = option(0.25, low=0.0, high=1.0)
    flow: bool = False

    name: ClassVar[str] = "ddim_inverse"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next < s.sigma:
            return interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)
        seen = s.x if self.flow else math.hypot(1.0, s.sigma_next) / math.hypot(1.0, s.sigma) * s.x
        x = s.x + (s.sigma_next - s.sigma) * slope(seen, s.denoise(seen, s.sigma_next), s.sigma_next)
        if self.start < s.index / s.steps < self.stop:
            x = self.keep * x + (1.0 - self.keep) * seen
        return x


@dataclass(frozen=True)
class DirectInversion(Rule):
    r"""An Euler step plus an offset, `x' = q x + (1 - q) D + o`; the noises of the run are the offsets.

    It samples back a latent of `inversion.direct_inversion`: `sample(..., noise=ki.noise.replay(found.noises))`.

    Source: Ju et al., Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code (2023), arXiv 2310.01506.
    """

    name: ClassVar[str] = "direct_inversion"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        euler = interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)
        return euler + s.noise(s.sigma, s.sigma_next)
