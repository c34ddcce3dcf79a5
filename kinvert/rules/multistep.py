r"""Linear multistep methods in the slope `d_i = (x_i - D_i) / sigma_i`, which remember past slopes.

A step is `x' = x + sum_j c_j d_{i-j}` with weights that depend on the schedule only. The first steps have fewer
slopes to use than the order asks for; that start-up caps the global order at about 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kinvert.coefficients import adams
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, option, slope


@dataclass(frozen=True)
class LMS(Rule):
    r"""Adams-Bashforth on the actual noise levels: `x' = x + sum_j c_j d_{i-j}`.

    `c_j = int_sigma^sigma_next l_j(t) dt` with the Lagrange polynomials `l_j` on the last `order` noise levels. One
    evaluation a step. Advertised order 4, capped at about 2 by the start-up; `order=1` is `euler`.

    The last step to sigma = 0 returns the denoised image, as ComfyUI does; with `at_zero="adams"` it uses the
    formula there too, as k-diffusion does.

    Source: K. Crowson, k-diffusion (2022); the Adams-Bashforth method on a non-uniform grid.
    """

    order: int = option(4, low=1)
    at_zero: Literal["denoised", "adams"] = "denoised"

    name: ClassVar[str] = "lms"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised = s.denoise(s.x, s.sigma)
        slopes = s.history("d", slope(s.x, denoised, s.sigma), self.order)
        if s.sigma_next == 0 and self.at_zero == "denoised":
            return denoised
        nodes = [s.sigmas[s.index - j] for j in range(len(slopes))]
        x = s.x
        for c, d in zip(adams(nodes, s.sigma, s.sigma_next), slopes, strict=True):
            x = x + c * d
        return x
