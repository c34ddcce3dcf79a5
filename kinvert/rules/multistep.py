r"""Linear multistep methods in the slope `d_i = (x_i - D_i) / sigma_i`, which remember past slopes.

A step is `x' = x + sum_j c_j d_{i-j}` with weights that depend on the schedule only. The first steps have fewer slopes
than the order needs; that start-up caps the global order at about 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kinvert.coefficients import UNIFORM_ADAMS, adams, deis_weights, ipndm_v_weights
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, final_order, option, slope, weighted_sum

__all__ = ["DEIS", "IPNDM", "IPNDMV", "LMS", "GradientEstimation"]


@dataclass(frozen=True)
class LMS(Rule):
    r"""Adams-Bashforth on the actual noise levels: `x' = x + sum_j c_j d_{i-j}`.

    `c_j = int_sigma^sigma_next l_j(t) dt` with the Lagrange polynomials `l_j` on the last `order` noise levels. One
    evaluation a step. The start-up caps the published order 4 at about 2. `order=1` is `euler`.

    A step to sigma = 0 returns the denoised image, as in ComfyUI. With `at_zero="adams"` it uses the formula there too,
    as in k-diffusion.

    Source: Crowson, k-diffusion (2022), for the Adams-Bashforth method on a non-uniform grid.
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
        return weighted_sum(s.x, adams(nodes, s.sigma, s.sigma_next), slopes)


@dataclass(frozen=True)
class IPNDM(Rule):
    r"""Adams-Bashforth with the weights of a uniform grid on every grid.

    `x' = x + (sigma_next - sigma) sum_j w_j d_{i-j}` with `w = (1)`, `(3, -1)/2`, `(23, -16, 5)/12`,
    `(55, -59, 37, -9)/24` for 1 to 4 slopes. One evaluation a step. A step to sigma = 0 returns the denoised image. The
    published order is 4. The start-up and a smooth grid that is not uniform cap it at 2, step sizes that alternate at
    1. `max_order=2` is `gradient_estimation` with `ge_gamma=1.5`, `max_order=1` is `euler`.

    Source: Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator (2022), arXiv 2204.13902;
    Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds (2022), arXiv 2202.09778.
    """

    max_order: int = option(4, low=1, high=4)

    name: ClassVar[str] = "ipndm"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        return _adams_step(s, self.max_order, lambda k: [w * (s.sigma_next - s.sigma) for w in UNIFORM_ADAMS[k - 1]])


@dataclass(frozen=True)
class IPNDMV(Rule):
    r"""Adams-Bashforth for a variable step, as in ComfyUI's `ipndm_v`.

    `x' = x + sum_j c_j d_{i-j}` with `coefficients.ipndm_v_weights`. One and two weights are exact: `max_order=1` is
    `euler`, `max_order=2` is `lms` with `order=2`. Three and four weights differ from the exact integrals, the weights
    of `lms`; on a uniform grid three agree. Four weights add up to `sigma_next - sigma` only if the steps are in
    geometric progression. One evaluation a step. A step to sigma = 0 returns the denoised image. The published order is
    4. It is 2 for many steps of a smooth grid (0.6 to 1.9 from 40 to 640 steps); with alternating step sizes the method
    does not converge.

    Source: ComfyUI (2024), after Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator (2022),
    arXiv 2204.13902.
    """

    max_order: int = option(4, low=1, high=4)

    name: ClassVar[str] = "ipndm_v"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        return _adams_step(s, self.max_order, lambda k: ipndm_v_weights(s.sigmas[s.index + 1 - k : s.index + 2]))


@dataclass(frozen=True)
class DEIS(Rule):
    r"""DEIS (tAB): Adams-Bashforth with polynomials in the time t of a VP process, `x' = x + sum_j c_j d_{i-j}`.

    `c_j = int_sigma^sigma_next l_j(t(tau)) dtau` with `t = coefficients.deis_time` and the polynomials `l_j` on the
    times of the last `max_order` noise levels. In this VP time, `quadrature="upstream"` takes the integrals as a sum
    over 10,000 points, as in ComfyUI. The sum is off by about 1e-4 of the step, so the weights do not add up to
    `sigma_next - sigma`. `quadrature="exact"` is exact up to rounding. With `variable="log_sigma"`, `t = log(tau)` as
    in diffusers' scheduler, and the integrals are exact. `lower_order_final=True` ends runs of fewer than 15 steps with
    orders 2 and 1, as in diffusers. One evaluation a step. A step to sigma = 0 is an Euler step, and with `max_order=1`
    every step is: that is `euler`. The start-up caps the published order 3 at 2 (2.3 to 2.8 is measured below 300
    steps).

    Source: Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator (2022), arXiv 2204.13902.
    """

    max_order: int = option(3, low=1, high=4)
    quadrature: Literal["upstream", "exact"] = "upstream"
    variable: Literal["vp_time", "log_sigma"] = "vp_time"
    lower_order_final: bool = False

    name: ClassVar[str] = "deis"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        quadrature = self.quadrature if self.variable == "vp_time" else "log_sigma"

        def weights(k: int) -> Sequence[float]:
            order = final_order(s, k, self.lower_order_final)
            used = deis_weights(tuple(s.sigmas[s.index + 1 - order : s.index + 2]), quadrature)
            return (*used, *[0.0] * (k - order))

        return _adams_step(s, self.max_order, weights)


@dataclass(frozen=True)
class GradientEstimation(Rule):
    r"""Euler along an extrapolated slope: `x' = x + (sigma_next - sigma) (ge_gamma d + (1 - ge_gamma) d_prev)`.

    One evaluation a step, remembers one slope. The first step uses d alone, a step to sigma = 0 returns the denoised
    image. Order 1 at the default `ge_gamma=2`, which extrapolates too far on purpose: the method takes the slope as a
    noisy estimate of a gradient. `ge_gamma=1` is `euler`, `ge_gamma=1.5` is `ipndm` with `max_order=2`.

    Source: Permenter and Yuan, Interpreting and Improving Diffusion Models from an Optimization Perspective (2023),
    arXiv 2306.04848.
    """

    ge_gamma: float = 2.0

    name: ClassVar[str] = "gradient_estimation"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        width = s.sigma_next - s.sigma
        extrapolated = [self.ge_gamma * width, (1.0 - self.ge_gamma) * width]
        return _adams_step(s, 2, lambda k: extrapolated if k == 2 else [width])


def _adams_step(s: StepBuilder, order: int, weights: Callable[[int], Sequence[float]]) -> Form:
    """Return `x + sum_j c_j d_{i-j}` with `c = weights(k)` for the k slopes known; the denoised image at sigma = 0."""
    denoised = s.denoise(s.x, s.sigma)
    slopes = s.history("d", slope(s.x, denoised, s.sigma), order)
    if s.sigma_next == 0:
        return denoised
    return weighted_sum(s.x, weights(len(slopes)), slopes)
