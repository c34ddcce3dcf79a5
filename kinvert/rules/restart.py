r"""Restart sampling: at one noise level the run goes back up by adding noise, and comes down again, several times.

The noise contracts the errors that the run has made so far, and the steps between are those of an ODE, whose errors are
smaller than those of an SDE. To a Plan the restarts are a part of the step that ends at their level: the levels of the
schedule fall, and the step has the evaluations and the noises of its restarts too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from kinvert.forms import Form
from kinvert.rules.base import OneStep, Rule, StepBuilder, option, quiet_rule

__all__ = ["Restart"]


@dataclass(frozen=True)
class Restart(Rule):
    r"""Restart: `restarts` times from a level m up to `s_tmax` by noise, and down again by `steps` steps of the rule.

    m is the level of the schedule nearest to `s_tmin`, of those between 0 and `s_tmax`; a schedule without any has no
    restart. After the step that ends at m: `x <- x + sqrt(s_tmax^2 - m^2) s_noise n`, then the rule's steps down the
    levels of Karras et al. (rho = 7) from `s_tmax` to m. In the paper K is `restarts`, and N_Restart is `steps + 1`,
    the number of levels. It uses Heun's method, the default, `s_noise = 1.003`, and for some models several intervals:
    `Restart(Restart(Heun(), s_tmin=0.3, s_tmax=0.6), s_tmin=0.06, s_tmax=0.3)`.

    Each restart takes its noise from its own part of the interval, so that a Brownian path gives independent ones too.
    The rule has the order of the wrapped one; its steps within restarts draw no noise, and remember nothing.

    Source: Xu, Deng, Cheng, Tian, Liu and Jaakkola, Restart Sampling for Improving Generative Processes (2023), arXiv
    2306.14878.
    """

    rule: Rule
    restarts: int = option(2, low=0)
    steps: int = option(2, low=1)
    s_tmin: float = option(0.06, low=0.0)
    s_tmax: float = option(0.3, low=0.0)
    s_noise: float = option(1.0, low=0.0)

    name: ClassVar[str] = "restart"

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
        """The number of restarts, not `s_noise`: without its noise a state would not be at its level. And the rule."""
        return ({"restarts": 0} if self.restarts else {}) | quiet_rule(self.rule)

    def step(self, s: StepBuilder) -> Form:
        x = self.rule.step(s)
        if not self.restarts:
            return x
        if s.sigma_next > s.sigma:
            raise ValueError("its restarts add noise to a run downwards; use restarts=0")
        within = [sigma for sigma in s.sigmas[1:] if 0 < sigma < self.s_tmax]
        if s.sigma_next != min(within, key=lambda sigma: abs(sigma - self.s_tmin), default=None):
            return x
        rule, levels = self._inner.quiet(), _ramp(self.s_tmax, s.sigma_next, self.steps)
        parts = _ramp(s.sigma_next, self.s_tmax, self.restarts)
        scale = self.s_noise * math.sqrt(self.s_tmax**2 - s.sigma_next**2)
        for part in pairwise(parts):
            x = x + scale * s.noise(*part)
            for sigma, sigma_next in pairwise(levels):
                x = rule.step(OneStep(s, x, sigma, sigma_next))
        return x

    @property
    def _inner(self) -> Rule:
        """The rule within all restarts."""
        return self.rule._inner if isinstance(self.rule, Restart) else self.rule


def _ramp(start: float, end: float, steps: int) -> list[float]:
    """Return the ends of so many steps, equal in the seventh root of the level, with both ends exact."""
    a, b = start ** (1 / 7), end ** (1 / 7)
    return [start, *((a + i / steps * (b - a)) ** 7 for i in range(1, steps)), end]
