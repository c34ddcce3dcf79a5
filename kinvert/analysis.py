r"""What a Plan says about its sampler, without a model: a Plan in, numbers out.

Two laws hold for a sampler whatever the denoiser learned, and both can be read off the rows of its Plan:

* translation: if the data is one point `m`, then `D = m` everywhere and `x = m` stays there, so the rows sum to 1;
* marginals: if that point is 0, then `x_i` has variance `sigma_i^2` at every noise level, as the forward process
  `x = x0 + sigma * eps` has; for a stochastic sampler this is what its noise is scaled for.

`D` is constant in both, so every state is a linear combination of a few knowns, and the laws are exact arithmetic.

`properties` reads the character of a sampler off a reference Plan: cost, memory, noise, and how it can be inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kinvert.plan import Interval, Plan, compile_plan
from kinvert.rules import Rule, sampler

Invertibility = Literal["stepwise", "two-point", "noise", "none"]

INVERTIBILITY: dict[Invertibility, str] = {
    "stepwise": "each step can be solved for x by itself: it remembers nothing and keeps some of x",
    "two-point": "steps remember values of noisier, still unknown states: the run must be solved as a whole",
    "noise": "the run draws noise: it can be inverted together with its noises only",
    "none": "some step forgets x: many latents give the same image, and none is the latent",
}
"""The words of `Properties.invertibility`, the strongest obstacle last."""

# Ten steps of the schedule of Karras et al. (2022, arXiv 2206.00364) from sigma 15 to 0.03: longer than any start-up.
REFERENCE = tuple((15.0 ** (1 / 7) + i / 10 * (0.03 ** (1 / 7) - 15.0 ** (1 / 7))) ** 7 for i in range(11))


def row_sums(plan: Plan) -> tuple[float, ...]:
    """`x / m` after each step where `x = m` at the start and the denoiser returns `m` always: the law asks for 1.

    Noise is left out (its mean is 0). The value does not depend on `m`.
    """
    return tuple(_trajectory(plan, 1.0, 1.0, (0.0,) * plan.draws))


def marginal_variances(plan: Plan, covariance: Literal["white", "brownian"] = "white") -> tuple[float, ...]:
    r"""`Var x` after each step where `Var x = sigma_0^2` at the start and the denoiser returns 0 always.

    The law asks for `sigma_i^2` of `plan.sigmas`.

    Args:
        plan: from `compile_plan`.
        covariance: of the unit noises of a run. "white": all independent. "brownian": increments of one path `W`,
            `n(a, b) = (W(b) - W(a)) / sqrt|b - a|`, so that overlapping intervals I and J are correlated,
            `Cov = +-|I n J| / sqrt(|I| |J|)`, negative where they run in opposite directions.

    Raises:
        ValueError: another covariance.
    """
    if covariance not in ("white", "brownian"):
        raise ValueError(f"covariance must be 'white' or 'brownian', got {covariance!r}")
    unit = np.eye(1 + plan.draws)  # the noise of the initial state, then the draws in order
    cov = unit.copy()
    if covariance == "brownian":
        cov[1:, 1:] = _brownian([interval for step in plan.steps for interval in step.noises])
    states = _trajectory(plan, plan.sigmas[0] * unit[0], 0.0 * unit[0], unit[1:])
    return tuple(float(x @ cov @ x) for x in states)


def _trajectory(plan: Plan, x: Any, denoised: Any, noises: Any) -> Iterator[Any]:
    """x after each step, from the rows of the update alone: every evaluation (guided or not) returns `denoised`."""
    state = {"x": x}
    first = 0
    for step in plan.steps:
        drawn = noises[first : first + len(step.noises)]
        first += len(step.noises)
        values: dict[str, Any] = {"state": state, "noise": drawn}
        state = {
            name: sum(
                (c * (values[s.kind][s.key] if s.kind in values else denoised) for s, c in form),
                start=0.0 * denoised,
            )
            for name, form in (("x", step.x), *step.memory)
        }
        yield state["x"]


def _brownian(intervals: Sequence[Interval]) -> np.ndarray:
    """Covariance matrix of normalized increments of one Brownian path."""
    a, b = np.array(intervals, dtype=np.float64).reshape(-1, 2).T
    low, high = np.minimum(a, b), np.maximum(a, b)
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    scale = np.sign(b - a) * np.sqrt(high - low)
    return np.maximum(overlap, 0.0) / np.outer(scale, scale)


@dataclass(frozen=True)
class Properties:
    """The character of a sampler, as `properties` reads it off Plans on a reference schedule.

    Attributes:
        name: the sampler's public name.
        order: order of convergence to the probability-flow ODE, as the rule declares it.
        evaluations_per_step: the most evaluations of the denoiser that a step makes.
        draws: the most noises that a step draws.
        memory: the most values, besides x, that a step hands on to the next.
        guided: whether the denoiser must return a pair `Guided(denoised, uncond)` (CFG++).
        unsamples: whether it can run up a schedule and still depend on the image: there it draws no noise, and no
            step forgets x.
        invertibility: what stands between a sample and its latent; see `INVERTIBILITY`.
    """

    name: str
    order: int
    evaluations_per_step: int
    draws: int
    memory: int
    guided: bool
    unsamples: bool
    invertibility: Invertibility

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return self.draws > 0

    @property
    def multistep(self) -> bool:
        """Whether steps remember values of earlier steps."""
        return self.memory > 0


def properties(rule: str | Rule) -> Properties:
    """The properties of a sampler with its options, read off its Plan on `REFERENCE`, which stops above 0.

    Args:
        rule: a name of `ki.SAMPLERS` (with its default options), or a rule.

    Raises:
        ValueError: an unknown name, or a rule without a Plan on the reference schedule (one that chooses its steps).
    """
    built = sampler(rule)
    plan = compile_plan(built, REFERENCE)
    return Properties(
        name=rule if isinstance(rule, str) else rule.name,
        order=built.ode_order,
        evaluations_per_step=max(len(step.stages) for step in plan.steps),
        draws=max(len(step.noises) for step in plan.steps),
        memory=plan.memory_size,
        guided=plan.is_guided,
        unsamples=not plan.is_stochastic and _unsamples(built),
        invertibility=_invertibility(plan),
    )


def _unsamples(rule: Rule) -> bool:
    try:
        up = compile_plan(rule, REFERENCE[::-1])
    except ValueError:  # the variance of an SDE's noise is negative upwards
        return False
    keeps_last = getattr(rule, "keep_last", True)
    return keeps_last and not up.is_stochastic and not any(step.forgets_x for step in up.steps)


def _invertibility(plan: Plan) -> Invertibility:
    if any(step.forgets_x for step in plan.steps):
        return "none"
    if plan.is_stochastic:
        return "noise"
    return "two-point" if plan.is_multistep else "stepwise"
