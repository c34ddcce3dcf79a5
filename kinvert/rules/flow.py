r"""Any rule on a rectified-flow model, in its own time.

A rectified flow has `x_t = (1 - t) x0 + t eps` with t in [0, 1]. Divided by `1 - t` it is variance exploding:
`x = x_t / (1 - t)` has noise level `sigma = t / (1 - t)`, and the denoised image is the same. So every rule runs on a
flow model by a change of coordinates. The change is linear, so the result is a rule again.

Euler's method gives the same result with and without the change. Other methods do not: Heun's method or a linear
multistep method on the flow times themselves is a different integrator of the same ODE. The samplers whose formulas
contain `lambda = log((1 - t) / t)` (DPM++ SDE, 2M SDE, 3M SDE, SEEDS, ER-SDE, SA-Solver, CFG++) need the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from kinvert._moved import moved_names
from kinvert.forms import Form
from kinvert.rules.adaptive import DPMAdaptive
from kinvert.rules.base import Rule, StepBuilder, option

__all__ = ["Flow", "within_one"]

# A flow time that exceeds 1 by no more than this is 1: it is rounding in float32.
ROUNDING = 1e-6


def within_one(times: tuple[float, ...], name: str = "sigmas") -> tuple[float, ...]:
    """Return flow times with those that exceed 1 by rounding set to 1.

    Raises:
        ValueError: a time above 1. It may be just above 1, because a host's node adds an offset, or be a sigma.
    """
    high = max(times)
    if high > 1 + ROUNDING:
        fix = (
            "use sigmas.clamp(max=1), and torch.unique_consecutive of it if that makes two of them 1"
            if high < 1.01
            else "use ki.levels.ve_to_flow(sigmas), or run in the coordinates that they are of: a denoiser with "
            'coordinates="ve", a sampler without Flow'
        )
        raise ValueError(f"{name}: flow times must lie in [0, 1], got {high:.7g}; {fix}")
    return tuple(min(t, 1.0) for t in times)


@dataclass(frozen=True)
class Flow(Rule):
    """`rule` in variance-exploding coordinates, on a schedule and a state in flow time t.

    At `t = 1` the noise level is infinite. A schedule that starts there starts at `t = start` instead, or half way to
    its next time if that time is above `start`. The state is not changed.

    Attributes:
        rule: the rule to run, e.g. `ki.sampler("dpmpp_2m_sde")`.
        start: the flow time used in place of 1.
    """

    rule: Rule
    start: float = option(0.9999, low=0.5, high=1.0 - 1e-9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.is_in_flow:
            raise ValueError(f"Flow: {self.rule!r} is for flow time already; use it without Flow")

    @property
    def name(self) -> str:
        """The name of the wrapped rule."""
        return self.named or self.rule.name

    @property
    def ode_order(self) -> int:
        """The order of the wrapped rule."""
        return self.rule.ode_order

    @property
    def default_noise(self) -> Literal["white", "brownian"]:
        """The kind of noise that the wrapped rule draws."""
        return self.rule.default_noise

    @property
    def noise_clip(self) -> float:
        """The number of standard deviations at which the noise of the wrapped rule is clipped."""
        return self.rule.noise_clip

    @property
    def options(self) -> dict[str, Any]:
        """The options of the wrapped rule."""
        return self.rule.options

    @property
    def noise_options(self) -> dict[str, Any]:
        """The options of the wrapped rule that switch its noise off."""
        return self.rule.noise_options

    @property
    def keeps_last(self) -> bool:
        """Whether the wrapped rule keeps its last step."""
        return self.rule.keeps_last

    @property
    def is_in_flow(self) -> bool:
        """Always true: the noise levels of a schedule are flow times."""
        return True

    def quiet(self) -> Self:
        """Return the wrapped rule with its noise switched off, in flow time; see `Rule.quiet`."""
        rule = self.rule.quiet()
        return self if rule is self.rule else replace(self, rule=rule)

    def prepare(self, sigmas: tuple[float, ...]) -> tuple[Rule, tuple[float, ...]]:
        if isinstance(self.rule, DPMAdaptive):
            raise ValueError(
                f"{self.name} chooses its steps on the way, and Flow changes the coordinates of fixed ones; pass "
                f"sampler={self.name!r} without Flow, which runs in flow time, or a denoiser with "
                'coordinates="ve" and the schedule ki.levels.flow_to_ve(times.clamp(max=1 - 1e-4))'
            )
        sigmas = within_one(sigmas, self.name)
        next_to_1 = max((t for t in sigmas if t < 1), default=0.0)
        start = self.start if next_to_1 < self.start else (1.0 + next_to_1) / 2
        rule, levels = self.rule.prepare(tuple(_noise_level(t if t < 1 else start) for t in sigmas))
        return replace(self, rule=rule), tuple(_flow_time(sigma) for sigma in levels)

    def auxiliary(self, s: StepBuilder) -> dict[str, Form]:
        return self.rule.auxiliary(_FlowStep(s))

    def step(self, s: StepBuilder) -> Form:
        inner = _FlowStep(s)
        x = self.rule.step(inner)
        s.remembered = inner.remembered
        discarded = not self.rule.keeps_last and s.index == s.steps - 1 and s.sigma_next > 0
        return (1.0 - (s.sigma if discarded else s.sigma_next)) * x


class _FlowStep(StepBuilder):
    """A step in variance-exploding coordinates that passes each request on to the step in flow time."""

    def __init__(self, flow: StepBuilder) -> None:
        levels: Sequence[float] = [_noise_level(t) for t in flow.sigmas]
        super().__init__(levels, flow.index, {**flow.memory, "x": flow.x / (1.0 - flow.sigma)})
        self._flow = flow

    def denoise(self, x: Form, sigma: float) -> Form:
        t = _flow_time(sigma)
        return self._flow.denoise((1.0 - t) * x, t)

    def denoise_guided(self, x: Form, sigma: float) -> tuple[Form, Form]:
        t = _flow_time(sigma)
        return self._flow.denoise_guided((1.0 - t) * x, t)

    def noise(self, sigma_from: float, sigma_to: float) -> Form:
        return self._flow.noise(_flow_time(sigma_from), _flow_time(sigma_to))


def _noise_level(t: float) -> float:
    """Return the noise level `sigma = t / (1 - t)` of a flow time."""
    return t / (1.0 - t)


def _flow_time(sigma: float) -> float:
    """Return the flow time `t = sigma / (1 + sigma)` of a noise level."""
    return sigma / (1.0 + sigma)


def _inner(rule: Rule) -> Rule:
    """Return the rule that `Flow` wraps, or the rule itself."""
    return rule.rule if isinstance(rule, Flow) else rule


__getattr__ = moved_names(__name__, {"unwrapped": "kinvert.rules.flow._inner"})
