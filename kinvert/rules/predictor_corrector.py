r"""Exponential Adams methods in `lambda = -log sigma`: predict, evaluate, correct.

They solve `dx/dlambda = rate (D - x)` with a polynomial in lambda through the denoised images of several steps:
`x' = e^{-rate h} x + sum_j W_j D_j + noise` with `h = log(sigma / sigma_next)` and
`W = coefficients.exponential_adams`. The predictor interpolates at known noise levels (Adams-Bashforth). After D has
been evaluated at the predicted state, the corrector makes the same step again with this D as one more node
(Adams-Moulton).

A step of these rules evaluates the denoiser at the predicted state `s.x`, corrects that state, and predicts the next
state from the corrected one. Predictor and corrector share the term `e^{-rate h} x + noise` with the corrected x. It is
remembered as "base".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kinvert.coefficients import exponential_adams, log_step, sde_noise_scale
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, option, weighted_sum

__all__ = ["SASolver", "UniPC"]


@dataclass(frozen=True)
class UniPC(Rule):
    r"""UniPC in data prediction: exponential Adams predictor and corrector of order up to `order` (3), rate 1.

    The linear systems of the paper have the exponential Adams weights as their solution for every function B(h). B
    matters only where the paper takes 1/2 in place of a solution. That is the corrector of the first step,
    `x' = q x + (1 - q) D - B/2 (D_next - D)`, and the predictor of order 2,
    `x' = q x + (1 - q) D - B h / (2 h_prev) (D - D_prev)`, with `B = -h` (`uni_pc`, "bh1") or `B = e^{-h} - 1`
    (`uni_pc_bh2`, "bh2"). With "bh2" the predictor of order 2 is `dpmpp_2m`.

    The orders of the steps are 1, 2, 3, 3, ..., 3, 2, 1, or with `lower_order_final=False` 1, 2, 3, 3, ..., 3. The last
    step is not corrected. The default of diffusers is `order=2` with "bh2". A schedule of a single step evaluates
    nothing: `x' = x sqrt((1 + sigma_next^2) / (1 + sigma^2))`. A final sigma = 0 is replaced by 0.001, so the result is
    at 0.001. With `at_zero="denoised"` the step to 0 returns the last denoised image, as in diffusers. One evaluation a
    step, remembers the base and `order` denoised images. The low orders at both ends cap the published order 3 at 2.

    Source: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (2023),
    arXiv 2302.04867.
    """

    variant: Literal["bh1", "bh2"] = "bh1"
    order: int = option(3, low=1, high=6)
    lower_order_final: bool = True
    at_zero: Literal["0.001", "denoised"] = "0.001"

    name: ClassVar[str] = "uni_pc"
    ode_order: ClassVar[int] = 2

    def prepare(self, sigmas: tuple[float, ...]) -> tuple[Rule, tuple[float, ...]]:
        if sigmas[-1] > 0 or self.at_zero == "denoised":
            return self, sigmas
        if sigmas[-2] <= 0.001:
            raise ValueError(
                f"{self.name} takes 0.001 for the final 0, but the level before it is {sigmas[-2]:g}; use a schedule "
                "whose last positive level is above 0.001"
            )
        return self, (*sigmas[:-1], 0.001)

    def step(self, s: StepBuilder) -> Form:
        to_zero = s.sigma_next == 0
        if s.steps == 1 and not to_zero:
            return math.sqrt((1.0 + s.sigma_next**2) / (1.0 + s.sigma**2)) * s.x
        denoised = s.history("D", s.denoise(s.x, s.sigma), self.order + 1)
        if to_zero:
            return denoised[0]
        x, base = s.x, s.recall("base")
        if base is not None:
            x = weighted_sum(base, *self._corrector(s.sigmas, s.index, denoised))
        base = s.sigma_next / s.sigma * x
        s.remember("base", base)
        return weighted_sum(base, *self._predictor(s.sigmas, s.index + 1, denoised))

    def _order(self, steps: int, k: int) -> int:
        """Return the order of the step to `sigmas[k]`."""
        return min(self.order, k, steps + 1 - k) if self.lower_order_final else min(self.order, k)

    def _predictor(self, sigmas: Sequence[float], k: int, denoised: list[Form]) -> tuple[list[float], list[Form]]:
        """Return the weights of the step to `sigmas[k]` from known denoised images, and these images."""
        p = self._order(len(sigmas) - 1, k)
        weights = exponential_adams(sigmas[k - p : k][::-1], sigmas[k - 1], sigmas[k])
        if p == 2:
            tilt = self._half_b(sigmas, k) * log_step(sigmas[k - 1], sigmas[k]) / log_step(sigmas[k - 2], sigmas[k - 1])
            weights = [1.0 - sigmas[k] / sigmas[k - 1] - tilt, tilt]
        return weights, denoised[:p]

    def _corrector(self, sigmas: Sequence[float], k: int, denoised: list[Form]) -> tuple[list[float], list[Form]]:
        """Return the weights of the step to `sigmas[k]` with the image at `sigmas[k]` known, and the images."""
        p = self._order(len(sigmas) - 1, k)
        weights = exponential_adams(sigmas[k - p : k + 1][::-1], sigmas[k - 1], sigmas[k])
        if p == 1:
            tilt = -self._half_b(sigmas, k)
            weights = [tilt, 1.0 - sigmas[k] / sigmas[k - 1] - tilt]
        return weights, denoised[: p + 1]

    def _half_b(self, sigmas: Sequence[float], k: int) -> float:
        """Return `B / 2` of the step to `sigmas[k]`."""
        z = -log_step(sigmas[k - 1], sigmas[k])
        return (z if self.variant == "bh1" else math.expm1(z)) / 2


@dataclass(frozen=True)
class SASolver(Rule):
    r"""SA-Solver: stochastic Adams predictor and corrector with rate `1 + tau^2`, where tau(sigma) scales the noise.

    `x' = e^{-(1 + tau^2) h} x + sum_j W_j D_j + sigma_next sqrt(1 - e^{-2 tau^2 h}) s_noise n(sigma, sigma_next)`, with
    the same noise in predictor and corrector. `tau = eta` where `sde_start >= sigma_next >= sde_end`, and 0 elsewhere;
    the defaults are the noise levels at 20 % and 80 % of the time of Stable Diffusion 1.5. With `use_pece`
    (`sa_solver_pece`) D is evaluated again at the corrected state. `corrector_order=0` is the predictor alone; with
    `eta = 0`, on a schedule that does not end in 0, it is `res_3m`. The orders fall near an end at sigma = 0, where the
    step returns D. With `lower_order_final=True` they fall near every end, as in diffusers: the predictor's to 1.
    `simple_order_2` takes trapezoidal weights in each step that uses two denoised images.

    `keep_last=False` is the behaviour of ComfyUI until 2026: if the schedule does not end in 0, the last step is
    discarded, and the result is the corrected x at `sigmas[-2]`. The result is one step too early: order 1.

    One evaluation a step; with `use_pece` two, except in the first step. Remembers the base and up to three denoised
    images. The published order is 3 to 4. With `eta = 0` order 4 is measured up to 320 steps. The first step, predicted
    with order 1 and corrected with order 2, caps it at 3 for more steps. With `eta=0`, `predictor_order=1` and
    `corrector_order=0` it is `euler`.

    Source: Xue et al., SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models (2023), arXiv
    2309.05019.
    """

    eta: float = option(1.0, low=0.0)
    s_noise: float = option(1.0, low=0.0)
    predictor_order: int = option(3, low=1, high=6)
    corrector_order: int = option(4, low=0, high=6)
    use_pece: bool = False
    simple_order_2: bool = False
    sde_start: float = option(5.0924082, low=0.0)
    sde_end: float = option(0.57118887, low=0.0)
    keep_last: bool = True
    lower_order_final: bool = False

    name: ClassVar[str] = "sa_solver"

    @property
    def ode_order(self) -> int:
        """The order that the predictor, the corrector and the first step allow."""
        if not self.keep_last:
            return 1
        if not self.corrector_order:
            return min(self.predictor_order, 2)
        return min(self.predictor_order + 1, self.corrector_order, 3)

    @property
    def keeps_last(self) -> bool:
        """The option `keep_last`."""
        return self.keep_last

    def step(self, s: StepBuilder) -> Form:
        length = max(self.predictor_order, self.corrector_order)
        x, denoised = s.x, s.denoise(s.x, s.sigma)
        past = [value for k in range(1, length) if (value := s.recall(f"D[-{k}]")) is not None]
        order, corrector_order = self._orders(s, len(past) + 1)
        base = s.recall("base")
        if base is not None and corrector_order:
            nodes = [s.sigmas[s.index - j] for j in range(corrector_order)]
            weights = self._weights(nodes, s.sigmas[s.index - 1], s.sigma)
            x = weighted_sum(base, weights, [denoised, *past][:corrector_order])
            if self.use_pece:
                denoised = s.denoise(x, s.sigma)
        history = s.history("D", denoised, length)
        if s.sigma_next == 0:
            return denoised
        if s.index == s.steps - 1 and not self.keep_last:
            return x
        nodes = [s.sigmas[s.index - j] for j in range(order)]
        base = self._base(s, x)
        s.remember("base", base)
        return weighted_sum(base, self._weights(nodes, s.sigma, s.sigma_next), history[:order])

    def _tau(self, sigma: float) -> float:
        """Return the noise scale of a step that ends at `sigma`."""
        return self.eta if self.sde_start >= sigma >= self.sde_end else 0.0

    def _orders(self, s: StepBuilder, known: int) -> tuple[int, int]:
        """Return the order of the predictor and of the corrector (0: none) with `known` denoised images."""
        corrected = s.index > 0 and (s.sigma_next > 0 or self.use_pece)
        orders = min(self.predictor_order, known), min(self.corrector_order, known) if corrected else 0
        left = s.steps - s.index
        if s.sigmas[-1] > 0:
            return (min(orders[0], left), min(orders[1], left + 2)) if self.lower_order_final else orders
        return min(orders[0], left - 1), min(orders[1], left)

    def _base(self, s: StepBuilder, x: Form) -> Form:
        """Return `e^{-(1 + tau^2) h} x + noise` of the step, from the corrected x."""
        tau = self._tau(s.sigma_next)
        h = log_step(s.sigma, s.sigma_next)
        base = math.exp(-(1.0 + tau**2) * h) * x
        if tau > 0 and self.s_noise > 0:
            base = base + s.sigma_next * sde_noise_scale(h, tau**2) * self.s_noise * s.noise(s.sigma, s.sigma_next)
        return base

    def _weights(self, nodes: Sequence[float], sigma: float, sigma_next: float) -> list[float]:
        """Return the weights of the step to sigma_next for the denoised images at `nodes`, newest first."""
        rate = 1.0 + self._tau(sigma_next) ** 2
        if not (self.simple_order_2 and len(nodes) == 2):
            return exponential_adams(nodes, sigma, sigma_next, rate)
        h = log_step(sigma, sigma_next)
        total, half = -math.expm1(-rate * h), rate * h / 2
        if nodes[0] == sigma_next:
            return [half, total - half]
        tilt = half * h / log_step(nodes[1], sigma)
        return [total + tilt, -tilt]
