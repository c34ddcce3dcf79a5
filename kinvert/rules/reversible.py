r"""Algebraically reversible methods: each step can be undone in closed form, with a second state beside x.

The second state is the rule's *auxiliary state* (`Rule.auxiliary`). It belongs to the latent as x does: a run from x
alone starts a new auxiliary state, and ends at another image. `kinvert.analysis.explicit_inverse` finds the inverse of
a step from its rows, so the rules contain no code for it.

In their papers three of the methods carry a slope, `u = (x - A) / sigma`. Here they carry the image `A` that the slope
points at, the *aim*. It has the unit of x, it does not change along a step, and a step along u is
`interpolate(x, A, q)`. Written so, all three reflect the old aim in the denoised image.

A step to sigma = 0 has no inverse: each method returns the denoised image and drops the second state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kinvert.forms import Form
from kinvert.rules.base import OneStep, Rule, StepBuilder, interpolate, option, quiet_rule, slope

__all__ = ["BDIA", "EDICT", "OBELM", "Leapfrog", "McCallumFoster", "ReversibleHeun"]

MOST_APART = 20.0
"""The factor by which a step up may part the two states of a data coupling: a first step from 1e-4 has hundreds."""


@dataclass(frozen=True)
class EDICT(Rule):
    r"""EDICT: two coupled states, each moved by the slope at the other, then mixed.

    `X = x - h (y - D(y, sigma)) / sigma`, `Y = y - h (w X - D(w X, sigma)) / sigma` with `h = sigma - sigma_next`, then
    `x' = p X + (1 - p) Y`, `y' = p Y + (1 - p) x'`; y starts as x. Two evaluations a step, order 1. The mixing keeps x
    and y close, and its inverse amplifies their difference by `p^-2` a step.

    `w = sqrt((1 + sigma^2) / (1 + sigma_next^2))`: the network gets the variance-preserving latent X, which is at
    sigma_next, with the timestep of sigma. `evaluate_at="sigma_next"` evaluates X at its own level instead, without w.
    The paper does not do this; it gives the variance of the forward process for data of one point, and it works in any
    unit of x. With `flow=True` the levels are flow times, and `w = 1`.

    With `alternate`, every other step moves y first, by the slope at x, and then x. This is the default of the released
    code (`leapfrog_steps`). In both cases a step to 0 returns its first denoised image.

    Source: Wallace, Gokul and Naik, EDICT: Exact Diffusion Inversion via Coupled Transformations (2022), arXiv
    2211.12446, equations 12 to 14.
    """

    p: float = option(0.93, low=0.01, high=1.0)
    evaluate_at: Literal["sigma", "sigma_next"] = "sigma"
    alternate: bool = False
    flow: bool = False

    name: ClassVar[str] = "edict"
    ode_order: ClassVar[int] = 1

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"y": s.x}

    def step(self, s: StepBuilder) -> Form:
        x, y = s.x, s.memory["y"]
        if swap := self.alternate and s.index % 2 == 1:
            x, y = y, x
        denoised = s.denoise(y, s.sigma)
        if s.sigma_next == 0:
            return denoised
        width = s.sigma_next - s.sigma
        x = x + width * slope(y, denoised, s.sigma)
        sigma, seen = s.sigma_next, x
        if self.evaluate_at == "sigma":
            sigma = s.sigma
            seen = x if self.flow else math.hypot(1.0, s.sigma) / math.hypot(1.0, s.sigma_next) * x
        y = y + width * slope(seen, s.denoise(seen, sigma), sigma)
        if swap:
            x, y = y, x
        x = self.p * x + (1.0 - self.p) * y
        s.remember("y", self.p * y + (1.0 - self.p) * x)
        return x


@dataclass(frozen=True)
class BDIA(Rule):
    r"""BDIA: DDIM steps up and down from `x_i`, so that `x'` follows from `x_i` and the state before it.

    `z' = down(z) + gamma (z_prev - up(z))` with DDIM steps from z to the next level (`down`) and to the level before
    (`up`); the first step is `down`. The paper does this in variance-preserving coordinates, `z = alpha x` with
    `alpha = 1 / sqrt(1 + sigma^2)`. In x it is `x' = x - h d + g (x_prev - x - h_prev d)`, `h = sigma - sigma_next`,
    `h_prev = sigma_prev - sigma`, `g = gamma alpha_prev / alpha_next`. With `coordinates="ve"` the formula applies to x
    itself, `g = gamma`. With the aim `A`, `A' = D - c (A - D)`, `x' = q x + (1 - q) A'`, `c = g h_prev / h`. One
    evaluation a step.

    Order 2 on smooth grids at `gamma=1`, the leapfrog; order 1 for smaller gamma, and on grids whose steps alternate in
    size. The inverse amplifies errors by `1 / g` a step: at gamma 0.5 and 50 steps by 1e15 or more, at gamma 1 over all
    steps by about `1 / (alpha_first alpha_second)`. In VE coordinates that factor is 1, but runs of few steps end
    further from the ODE.

    Source: Zhang, Lewis and Kleijn, Exact Diffusion Inversion via Bi-directional Integration Approximation (2023),
    arXiv 2307.10829.
    """

    gamma: float = option(1.0, low=0.01, high=1.0)
    coordinates: Literal["vp", "ve"] = "vp"

    name: ClassVar[str] = "bdia"

    @property
    def ode_order(self) -> int:
        """The order: 2 for the leapfrog, 1 for every other gamma."""
        return 2 if self.gamma == 1.0 else 1

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"aim": s.denoise(s.x, s.sigma)}

    def step(self, s: StepBuilder) -> Form:
        gain = self.gamma
        if self.coordinates == "vp" and s.index > 0:
            gain *= math.hypot(1.0, s.sigma_next) / math.hypot(1.0, s.sigmas[s.index - 1])  # alpha_prev / alpha_next
        return _reflect(s, lambda ratio: gain / ratio)


@dataclass(frozen=True)
class OBELM(Rule):
    r"""O-BELM: the explicit two-step method of least local error, a leapfrog for steps of different sizes.

    `x' = x - h d + (h / h_prev)^2 (x_prev - x - h_prev d)`, which is `bdia` with another weight: with the aim `A`,
    `A' = D - c (A - D)`, `x' = q x + (1 - q) A'`, `c = h / h_prev`; the first step is an Euler step. One evaluation a
    step. Order 2 on smooth grids; about 1.4, and falling, if step sizes alternate. The inverse amplifies the
    displacement by `(h_prev / h)^2` a step, `(h_first / h_last)^2` in all. If neighbouring steps differ by orders of
    magnitude, so do the weights, and the run loses as many digits.

    Source: Wang et al., BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion Models
    (2024), arXiv 2410.07273.
    """

    name: ClassVar[str] = "o_belm"
    ode_order: ClassVar[int] = 2

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"aim": s.denoise(s.x, s.sigma)}

    def step(self, s: StepBuilder) -> Form:
        return _reflect(s, lambda ratio: ratio)


@dataclass(frozen=True)
class Leapfrog(Rule):
    r"""Asynchronous leapfrog: half a step along the old slope, half a step along its reflection in the new one.

    With the aim `A` and `m = (sigma + sigma_next) / 2`: `x_m = x + (m - sigma) (x - A) / sigma`,
    `A' = 2 D(x_m, m) - A`, `x' = x_m + (sigma_next - m) (x_m - A') / m`. A starts as `D(x, sigma)`. One evaluation a
    step and one to start. Order 2. It damps no error, in neither direction.

    Source: Zhuang et al., MALI: A memory efficient and reverse accurate integrator for Neural ODEs (2021), arXiv
    2102.04668, with velocity `(x - A) / sigma` and eta = 1.
    """

    name: ClassVar[str] = "leapfrog"
    ode_order: ClassVar[int] = 2

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"aim": s.denoise(s.x, s.sigma)}

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next == 0:
            return s.denoise(s.x, s.sigma)
        m = (s.sigma + s.sigma_next) / 2
        x_m = interpolate(s.x, s.memory["aim"], m / s.sigma)
        aim = 2.0 * s.denoise(x_m, m) - s.memory["aim"]
        s.remember("aim", aim)
        return interpolate(x_m, aim, s.sigma_next / m)


@dataclass(frozen=True)
class ReversibleHeun(Rule):
    r"""Reversible Heun: Heun's method with its slopes taken at a second state `X`, which leaps over x.

    `X' = 2 x - X + w d(X, sigma)`, `x' = x + w (d(X, sigma) + d(X', sigma_next)) / 2`, `w = sigma_next - sigma`; X
    starts as x. Order 2. It remembers `d(X')` for the next step, so it takes one evaluation a step and one to start. If
    each step stands alone (`Plan.closed`), it takes two.

    Source: Kidger et al., Efficient and Accurate Gradients for Neural SDEs (2021), arXiv 2105.13493, Algorithm 1
    without noise.
    """

    name: ClassVar[str] = "reversible_heun"
    ode_order: ClassVar[int] = 2

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"X": s.x}

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next == 0:
            return s.denoise(s.x, s.sigma)
        width, X, d = s.sigma_next - s.sigma, s.memory["X"], s.recall("d")
        if d is None:
            d = slope(X, s.denoise(X, s.sigma), s.sigma)
        X = 2.0 * s.x - X + width * d
        d_next = slope(X, s.denoise(X, s.sigma_next), s.sigma_next)
        s.remember("X", X)
        s.remember("d", d_next)
        return s.x + width * (d + d_next) / 2


@dataclass(frozen=True)
class McCallumFoster(Rule):
    r"""McCallum-Foster: any one-step method made reversible, by a step down from z and a step back up from x'.

    With the increment `F(x, a, b) = step of the rule from a to b, minus x`:
    `x' = lam x + (1 - lam) z + F(z, sigma, sigma_next)`, `z' = z - F(x', sigma_next, sigma)`; z starts as x. It takes
    twice the evaluations of the rule (by default Heun's method) and has its order. `lam` draws x towards z; the inverse
    amplifies errors by `1 / lam` a step.

    With `coupling="data"` the same is done to `x / sigma`: `x' = q lam (x - z) + S(z)`, `z' = x' + q (z - S(x'))`, with
    `S` the steps of the rule down and up and `q = sigma_next / sigma`, so that x and z, once apart, come closer by q.
    The inverse parts them by `1 / (q lam)` a step. This is Rex for ODEs with data prediction, if the rule is a
    `LawsonRungeKutta`; `coupling="noise"`, the default, is Rex with noise prediction, if it is a `RungeKutta`. Run
    upwards, which is not the inverse, "data" parts x and z by q, and refuses a step with `q > 20`.

    Source: McCallum and Foster, Efficient, Accurate and Stable Gradients for Neural ODEs (2024), arXiv 2410.11648;
    Blasingame and Liu, Rex: A Family of Reversible Exponential (Stochastic) Runge-Kutta Solvers (2025), arXiv
    2502.08834.
    """

    rule: Rule
    lam: float = option(0.999, low=0.01, high=1.0)
    coupling: Literal["noise", "data"] = "noise"

    name: ClassVar[str] = "mccallum_foster"

    @property
    def ode_order(self) -> int:
        """The order of the wrapped rule."""
        return self.rule.ode_order

    @property
    def default_noise(self) -> Literal["white", "brownian"]:
        """The kind of noise that the wrapped rule draws."""
        return self.rule.default_noise

    @property
    def noise_options(self) -> dict[str, Any]:
        """The wrapped rule without its noise, if it draws any."""
        return quiet_rule(self.rule)

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return {"z": s.x}

    def step(self, s: StepBuilder) -> Form:
        if s.sigma_next == 0:
            return self.rule.step(OneStep(s, s.x, s.sigma, 0.0))
        z, q = s.memory["z"], 1.0
        if self.coupling == "data":
            q = (s.sigma_next / s.sigma) ** (1.0 + self.rule.options.get("eta", 0.0))
        if q > MOST_APART:
            raise ValueError(
                f"{self.name}: with coupling='data' the step up from sigma {s.sigma:g} to {s.sigma_next:g} takes its "
                f"two states apart by {q:.3g}; use ki.invert, which runs the inverse, or a schedule without so long a "
                "step, such as sigmas[:-1]"
            )
        there = OneStep(s, z, s.sigma, s.sigma_next)
        x = self.rule.step(there) + q * self.lam * (s.x - z)
        up = self.rule.step(OneStep(s, x, s.sigma_next, s.sigma, there.noises))
        s.remember("z", x + q * (z - up))
        return x


def _reflect(s: StepBuilder, weight: Callable[[float], float]) -> Form:
    """Make a step of a two-step method; `weight(ratio)` is `c` for `ratio = h / h_prev`."""
    aim = s.memory["aim"]
    if s.index > 0:
        denoised = s.denoise(s.x, s.sigma)
        if s.sigma_next == 0:
            return denoised
        c = weight((s.sigma_next - s.sigma) / (s.sigma - s.sigmas[s.index - 1]))
        aim = denoised - c * (aim - denoised)
    s.remember("aim", aim)
    return interpolate(s.x, aim, s.sigma_next / s.sigma)
