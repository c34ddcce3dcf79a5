r"""A stochastic Runge-Kutta method for the reverse SDE, in coordinates in which its noise is additive.

With `lambda = -log sigma` the SDE is `dx = (1 + eta) (D - x) dlambda + sqrt(2 eta) sigma dW`. With Lawson's factor,

    y = x / sigma^(1 + eta),   rho = sigma^-(1 + eta),   dy = D drho + dN,

where the noise N does not depend on the state. Over a step it has the variance `sigma_next^(-2 eta) - sigma^(-2 eta)`,
so at `eta = 1` it is a Brownian motion in rho. `eta = 0` is the probability-flow ODE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kinvert.coefficients import log_step, sde_noise_scale
from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, option

__all__ = ["ShARK"]


@dataclass(frozen=True)
class ShARK(Rule):
    r"""ShARK, the shifted additive-noise Runge-Kutta method, for the reverse SDE in `y = x / sigma^(1 + eta)`.

    A step needs two independent normal variables: the increment W of the noise, with its variance V, and its space-time
    Levy area H, the mean of the path above the straight line, with the variance `V / 12`. With `h = rho_next - rho` and
    `D_k` the denoised image at `y_k`:
    `y_1 = y + H`, `y_2 = y + 5/6 (h D_1 + W) + H` at `rho + 5/6 h`, `y' = y + h (2 D_1 + 3 D_2) / 5 + W`.

    W and H are made of the sum and the difference of the noises of the two halves of the step in rho. Their law is that
    of a Brownian motion, but H is not read off a path: runs of different steps on one path have another H. Weak order
    2, strong order 3/2 with the true H. At `eta = 0` it is a `LawsonRungeKutta` of order 2. Two evaluations a step. A
    step to sigma = 0 returns D.

    Source: Foster, dos Reis and Strange, High Order Splitting Methods for SDEs Satisfying a Commutativity Condition
    (2022), arXiv 2210.17543, equation 6.1; Blasingame and Liu, Rex: A Family of Reversible Exponential (Stochastic)
    Runge-Kutta Solvers (2025), arXiv 2502.08834, for the coordinates at eta = 1.
    """

    eta: float = option(1.0, low=0.0)
    s_noise: float = option(1.0, low=0.0)

    name: ClassVar[str] = "shark"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next == 0:
            return s.denoise(s.x, s.sigma)
        g = 1.0 + self.eta
        rho, rho_next = s.sigma**-g, s.sigma_next**-g
        h, late = rho_next - rho, rho / 6 + 5 * rho_next / 6
        y, (W, H) = rho * s.x, self._noise(s, ((rho + rho_next) / 2) ** (-1 / g))
        first = s.denoise((y + H) / rho, s.sigma)
        second = s.denoise((y + 5 / 6 * (h * first + W) + H) / late, late ** (-1 / g))
        return (y + h * (0.4 * first + 0.6 * second) + W) / rho_next

    def _noise(self, s: StepBuilder, middle: float) -> tuple[Form, Form]:
        """Return W and H, from the noises before and after the middle of the step."""
        length = log_step(s.sigma, s.sigma_next)
        scale = self.s_noise * sde_noise_scale(abs(length) if s.retraces else length, self.eta)
        if scale == 0:
            return 0.0 * s.x, 0.0 * s.x
        scale *= min(s.sigma, s.sigma_next) ** -self.eta
        before, after = s.noise(s.sigma, middle), s.noise(middle, s.sigma_next)
        return scale / math.sqrt(2) * (before + after), scale / math.sqrt(24) * (before - after)
