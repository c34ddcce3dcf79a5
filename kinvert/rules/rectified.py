r"""Rectified-flow solvers, in flow time: the midpoint method, and methods that reuse a velocity.

A rectified flow has `x_t = (1 - t) x0 + t eps`, `t = sigma / (1 + sigma)`, and the velocity `v = eps - x0`. Seen from
variance-exploding coordinates `x = (1 + sigma) x_t`, with the denoised image D and the slope d,

    v = d - D,    x' = ((1 + sigma_next) x + (sigma_next - sigma) v) / (1 + sigma)    is    x_t' = x_t + (t' - t) v

and the middle `m` of a step is the middle in t, `t_m = (t + t') / 2`. So these rules run on any denoiser. With
`flow=True` x and the schedule are in flow time already. The unit of x matters: t weighs noise against data of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinvert.forms import Form
from kinvert.rules.base import Rule, StepBuilder, interpolate, slope

__all__ = ["FireFlow", "RFSolver", "UniInv"]


@dataclass(frozen=True)
class RFSolver(Rule):
    r"""RF-Solver: the explicit midpoint method in flow time, `x_t' = x_t + (t' - t) v(x_m, t_m)`.

    `x_m = x_t + (t_m - t) v(x_t, t)`. The paper writes it as a Taylor step `x_t + h v + h^2/2 (v_m - v) / (h/2)`, which
    is the same. With `flow=True` it is `midpoint` on the flow times. Order 2, two evaluations a step.

    Source: Wang et al., Taming Rectified Flow for Inversion and Editing (2024), arXiv 2411.04746.
    """

    flow: bool = False

    name: ClassVar[str] = "rf_solver"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        m = _middle(s.sigma, s.sigma_next, self.flow)
        x_m = _move(s.x, _velocity(s, s.x, s.sigma, self.flow), s.sigma, m, self.flow)
        return _move(s.x, _velocity(s, x_m, m, self.flow), s.sigma, s.sigma_next, self.flow)


@dataclass(frozen=True)
class FireFlow(Rule):
    r"""FireFlow: the midpoint method in flow time that starts each step with the last midpoint velocity.

    `x_m = x_t + (t_m - t) v_prev`, `v = v(x_m, t_m)`, `x_t' = x_t + (t' - t) v`; the first step evaluates
    `v_prev = v(x_t, t)`. Order 2, one evaluation a step and one to start. It remembers one velocity, and a run upwards
    remembers other velocities than a run downwards.

    Source: Deng et al., FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing (2024), arXiv 2412.07517.
    """

    flow: bool = False

    name: ClassVar[str] = "fireflow"
    ode_order: ClassVar[int] = 2

    def step(self, s: StepBuilder) -> Form:
        m, v = _middle(s.sigma, s.sigma_next, self.flow), s.recall("v")
        if v is None:
            v = _velocity(s, s.x, s.sigma, self.flow)
        v = _velocity(s, _move(s.x, v, s.sigma, m, self.flow), m, self.flow)
        s.remember("v", v)
        return _move(s.x, v, s.sigma, s.sigma_next, self.flow)


@dataclass(frozen=True)
class UniInv(Rule):
    r"""Uni-Inv, the way up: an Euler step along the velocity at the *noisier* end, which the last velocity predicts.

    `x_p = x_t + (t' - t) v_prev`, `v = v(x_p, t')`, `x_t' = x_t + (t' - t) v`; the first step evaluates
    `v_prev = v(x_t, t)`. An Euler step down takes the velocity at its noisier end too, so that up and down miss by
    order 2. Order 1, one evaluation a step and one to start. A step down is an Euler step, and remembers nothing.

    Source: Jiao et al., UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models (2025), arXiv
    2504.13109.
    """

    flow: bool = False

    name: ClassVar[str] = "uni_inv"
    ode_order: ClassVar[int] = 1

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next < s.sigma:
            return interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)
        v = s.recall("v")
        if v is None:
            v = _velocity(s, s.x, s.sigma, self.flow)
        ahead = _move(s.x, v, s.sigma, s.sigma_next, self.flow)
        v = _velocity(s, ahead, s.sigma_next, self.flow)
        s.remember("v", v)
        return _move(s.x, v, s.sigma, s.sigma_next, self.flow)


def _middle(sigma: float, sigma_next: float, flow: bool) -> float:
    """Return the noise level whose flow time is the mean of the flow times of two levels."""
    if flow:
        return (sigma + sigma_next) / 2
    t = (sigma / (1.0 + sigma) + sigma_next / (1.0 + sigma_next)) / 2
    return t / (1.0 - t)


def _velocity(s: StepBuilder, x: Form, sigma: float, flow: bool) -> Form:
    """Return the velocity `eps - x0` by the denoiser."""
    denoised = s.denoise(x, sigma)
    return slope(x, denoised, sigma) if flow else slope(x, denoised, sigma) - denoised


def _move(x: Form, v: Form, sigma: float, sigma_to: float, flow: bool) -> Form:
    """Move x along the velocity v, on a straight line in flow time."""
    if flow:
        return x + (sigma_to - sigma) * v
    return ((1.0 + sigma_to) * x + (sigma_to - sigma) * v) / (1.0 + sigma)
