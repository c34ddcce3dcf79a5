r"""Exponential Runge-Kutta and multistep methods for `dx/dlambda = D - x` in `lambda = -log sigma`.

The linear part is solved exactly. With `h = log(sigma / sigma_next)`, stage k is at `sigma e^{-c_k h}` (`c_0 = 0`):
`x_k = e^{-c_k h} x + (1 - e^{-c_k h}) D_0 + h sum_{0<l<k} a_kl (D_l - D_0)`, and with `c = 1` and weights b likewise
`x' = e^{-h} x + (1 - e^{-h}) D_0 + h sum_{l>0} b_l (D_l - D_0)`. The coefficients are combinations of `phi_j(-c h)`,
`phi_{j+1}(z) = (phi_j(z) - 1/j!) / z`. Each row sums to `c phi_1(-c h)`, so the coefficients of `D_0` are not listed.

Source: Hochbruck and Ostermann, Explicit Exponential Runge-Kutta Methods for Semilinear Parabolic Problems (2005), SIAM
J. Numer. Anal. 43; Hochbruck and Ostermann, Exponential Integrators (2010), Acta Numerica 19.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kinvert.coefficients import exponential_adams, log_step, phi
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, option, weighted_sum
from kinvert.rules.phi_tableau import Phi, PhiTableau, Row
from kinvert.rules.tables import HOCHBRUCK_OSTERMANN, KROGSTAD

__all__ = [
    "RES2S",
    "RES3S",
    "ExponentialAdams",
    "ExponentialRK",
    "HochbruckOstermann5",
    "Krogstad4",
    "Phi",
    "PhiRungeKutta",
    "Row",
]


@dataclass(frozen=True)
class ExponentialRK(Rule, ABC):
    """An exponential Runge-Kutta method, given by its tableau. A step to sigma = 0 returns the denoised image."""

    @abstractmethod
    def rows(self, p: Phi) -> tuple[Row, ...]:
        """Return `(c, (a_1, a_2, ...))` for each stage after the first, and last `(1, b)`; `p(j, c) = phi_j(-c h)`."""

    def step(self, s: StepBuilder) -> Form:
        first = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return first
        h = log_step(s.sigma, s.sigma_next)
        *stages, (_, b) = self.rows(lambda j, c: phi(j, -c * h))
        turns: list[Form] = []
        for c, a in stages:
            sigma = s.sigma ** (1.0 - c) * s.sigma_next**c
            turns.append(s.denoise(self._move(s, first, sigma, h, a, turns), sigma) - first)
        return self._move(s, first, s.sigma_next, h, b, turns)

    def _move(
        self, s: StepBuilder, first: Form, sigma: float, h: float, weights: tuple[float, ...], turns: list[Form]
    ) -> Form:
        """Return the state at `sigma` from `D_0` (`first`) and the differences `D_l - D_0` (`turns`)."""
        return weighted_sum(interpolate(s.x, first, sigma / s.sigma), [h * weight for weight in weights], turns)


@dataclass(frozen=True)
class RES2S(ExponentialRK):
    r"""RES 2S, the exponential Runge-Kutta method of order 2: `b_1 = phi_2(-h) / c2`.

    Order 2, two evaluations a step. `c2 = 1` is ETD2RK (Cox and Matthews 2002).

    Source: Hochbruck and Ostermann, Explicit Exponential Runge-Kutta Methods for Semilinear Parabolic Problems (2005),
    SIAM J. Numer. Anal. 43; Zhang, Song and Chen, Improved Order Analysis and Design of Exponential Integrator for
    Diffusion Models Sampling (2023), arXiv 2308.02157.
    """

    c2: float = option(0.5, low=1e-3, high=1.0)

    name: ClassVar[str] = "res_2s"
    ode_order: ClassVar[int] = 2

    def rows(self, p: Phi) -> tuple[Row, ...]:
        return (self.c2, ()), (1.0, (p(2, 1) / self.c2,))


@dataclass(frozen=True)
class RES3S(ExponentialRK):
    r"""RES 3S, a family of exponential Runge-Kutta methods of order 3.

    With `gamma = c3 (3 c3 - 2) / (c2 (2 - 3 c2))`: `a_21 = gamma c2 phi_2(-c2 h) + c3^2 / c2 phi_2(-c3 h)`,
    `b_2 = phi_2(-h) / (gamma c2 + c3)`, `b_1 = gamma b_2`. Order 3, three evaluations a step. `c2 = 1/3`, `c3 = 2/3`
    (gamma = 0) is `seeds_3` with `eta = 0`.

    Source: Hochbruck and Ostermann, Explicit Exponential Runge-Kutta Methods for Semilinear Parabolic Problems (2005),
    SIAM J. Numer. Anal. 43; Zhang, Song and Chen, Improved Order Analysis and Design of Exponential Integrator for
    Diffusion Models Sampling (2023), arXiv 2308.02157.
    """

    c2: float = option(0.5, low=1e-3, high=1.0)
    c3: float = option(1.0, low=1e-3, high=1.0)

    name: ClassVar[str] = "res_3s"
    ode_order: ClassVar[int] = 3

    def rows(self, p: Phi) -> tuple[Row, ...]:
        c2, c3 = self.c2, self.c3
        if abs(c2 - 2 / 3) < 1e-9 or c2 == c3:
            raise ValueError(f"no method of order 3 has c2={c2:g} with c3={c3:g}; use c2 other than 2/3 and c3")
        gamma = c3 * (3 * c3 - 2) / (c2 * (2 - 3 * c2))
        b = p(2, 1) / (gamma * c2 + c3)
        return (c2, ()), (c3, (gamma * c2 * p(2, c2) + c3**2 / c2 * p(2, c3),)), (1.0, (gamma * b, b))


@dataclass(frozen=True)
class Krogstad4(ExponentialRK):
    r"""Krogstad's exponential Runge-Kutta method (ETDRK4-B), stages at 1/2, 1/2 and 1.

    Order 4 (3 for stiff problems), four evaluations a step.

    Source: Krogstad, Generalized Integrating Factor Methods for Stiff PDEs (2005), J. Comput. Phys. 203.
    """

    name: ClassVar[str] = "res_4s_krogstad"
    ode_order: ClassVar[int] = 4

    def rows(self, p: Phi) -> tuple[Row, ...]:
        return KROGSTAD.at(p)


@dataclass(frozen=True)
class HochbruckOstermann5(ExponentialRK):
    r"""The five-stage exponential Runge-Kutta method of stiff order 4, stages at 1/2, 1/2, 1 and 1/2.

    Order 4, five evaluations a step.

    Source: Hochbruck and Ostermann, Explicit Exponential Runge-Kutta Methods for Semilinear Parabolic Problems (2005),
    SIAM J. Numer. Anal. 43, equation 5.19.
    """

    name: ClassVar[str] = "res_5s_hochbruck-ostermann"
    ode_order: ClassVar[int] = 4

    def rows(self, p: Phi) -> tuple[Row, ...]:
        return HOCHBRUCK_OSTERMANN.at(p)


@dataclass(frozen=True)
class PhiRungeKutta(ExponentialRK):
    r"""An exponential Runge-Kutta method, given by a `PhiTableau`, which checks its order.

    Each stage is one evaluation a step. `PhiRungeKutta(PhiTableau("mine", 2, "1: | 1: p2"))` runs one of your own; that
    one is ETD2RK, `exp_heun_2_x0`. Registered are `etdrk3` and `etdrk4` of Cox and Matthews (2002), the second with
    order 2 only where the problem is stiff, and `strehmel_weiner` (1992), of order 4, on stiff problems 3.

    Source: Cox and Matthews, Exponential Time Differencing for Stiff Systems (2002), J. Comput. Phys. 176; Strehmel and
    Weiner, Linear-implizite Runge-Kutta-Methoden und ihre Anwendung (1992); Hochbruck and Ostermann, Explicit
    Exponential Runge-Kutta Methods for Semilinear Parabolic Problems (2005), SIAM J. Numer. Anal. 43.
    """

    tableau: PhiTableau

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, PhiTableau):
            raise TypeError(f"PhiRungeKutta: tableau must be a PhiTableau, got {self.tableau!r}")

    @property
    def name(self) -> str:
        """The name of the tableau."""
        return self.named or self.tableau.name

    @property
    def ode_order(self) -> int:
        """The order of the tableau."""
        return self.tableau.order

    def rows(self, p: Phi) -> tuple[Row, ...]:
        return self.tableau.at(p)


@dataclass(frozen=True)
class ExponentialAdams(Rule):
    r"""Exponential Adams-Bashforth: D is interpolated in lambda at the last `order` noise levels, on any grid.

    `x' = q x + sum_j W_j D_{i-j}`, `W_j = int_0^h e^{u - h} l_j(u) du`. One evaluation a step. `order=2` (`res_2m`) is
    `res_multistep`, and `dpmpp_2m_sde` with `eta = 0` and solver_type "heun". `order=1` is `euler`. A step to sigma = 0
    returns D. The published order of `res_3m` is 3; its first step, which has order 1, caps it at 2.

    Source: Hochbruck and Ostermann, Exponential Integrators (2010), Acta Numerica 19; Zhang, Song and Chen, Improved
    Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling (2023), arXiv 2308.02157.
    """

    order: int = option(2, low=1, high=6)

    name: ClassVar[str] = "res_2m"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        denoised = s.history("D", s.denoise(s.x, s.sigma), self.order)
        if s.sigma_next == 0:
            return denoised[0]
        nodes = [s.sigmas[s.index - j] for j in range(len(denoised))]
        return weighted_sum(s.sigma_next / s.sigma * s.x, exponential_adams(nodes, s.sigma, s.sigma_next), denoised)
