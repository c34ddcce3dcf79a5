r"""The exact mean and standard deviation of the result of a Plan for Gaussian data.

For data N(m, s²), each coordinate by itself, under `x = a x0 + sigma eps` (`a = 1`, or `a = 1 - sigma` in flow time)
the exact denoiser is affine, `D = m + a s² / (a² s² + sigma²) (x - a m)`. So every state of a run is an affine function
of the unit noise at the start and the noises that the run draws. The coefficients of that function give the law of the
state, without sampling and without any error but rounding.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from kinvert.analysis import brownian_covariance
from kinvert.caches import sized_cache
from kinvert.coordinates import Coordinates, flow_sampler
from kinvert.forms import Form
from kinvert.plan import KEPT, Plan, plan_size
from kinvert.rules import Flow

__all__ = ["Moments", "check_flow_spread", "check_kept", "gaussian_law", "gaussian_moments"]


class Moments(NamedTuple):
    """The mean and the standard deviation of one coordinate."""

    mean: float
    std: float


def gaussian_law(sigma: float, mean: float = 0.0, std: float = 1.0, coordinates: Coordinates = "ve") -> Moments:
    """Return the moments that a state at noise level `sigma` should have, for data N(mean, std²)."""
    a = 1.0 - sigma if coordinates == "flow" else 1.0
    return Moments(a * mean, math.hypot(a * std, sigma))


def gaussian_moments(
    plan: Plan,
    mean: float = 0.0,
    std: float = 1.0,
    coordinates: Coordinates = "ve",
    start: Moments | None = None,
) -> Moments:
    """Compute the moments of the result of a Plan, run with the exact denoiser of data N(mean, std²).

    A guided Plan gets the pair (D, D). The noises are independent, or belong to one Brownian path
    (`Rule.default_noise`).

    Args:
        plan: from `compile_plan`.
        mean: mean of the data.
        std: standard deviation of the data.
        coordinates: "flow" if the levels of the Plan are flow times.
        start: moments of the state at the start; None takes `gaussian_law` at the first level.
    """
    first = gaussian_law(plan.sigmas[0], mean, std, coordinates) if start is None else start
    one, initial, *draws = np.eye(2 + plan.draws)  # coefficients of 1, the noise at the start, and each draw
    covariance = np.eye(1 + plan.draws)
    if plan.draws and plan.rule.default_noise == "brownian":
        covariance[1:, 1:] = brownian_covariance([interval for step in plan.steps for interval in step.noises])
    state: dict[str, Any] = {"x": first.mean * one + first.std * initial}
    drawn = 0
    for step in plan.steps:
        values: dict[str, Any] = {"state": state, "noise": draws[drawn : drawn + len(step.noises)], "denoised": []}
        values["uncond"] = values["denoised"]
        drawn += len(step.noises)
        for stage in step.stages:
            a = 1.0 - stage.sigma if coordinates == "flow" else 1.0
            gain = a * std**2 / (a**2 * std**2 + stage.sigma**2)
            values["denoised"].append(gain * _value(stage.input, values, one) + (1.0 - gain * a) * mean * one)
        state = {name: _value(form, values, one) for name, form in (("x", step.x), *step.memory)}
    x = state["x"]
    return Moments(float(x[0]), math.sqrt(max(float(x[1:] @ covariance @ x[1:]), 0.0)))


def check_flow_spread(plan: Plan | None, coordinates: Coordinates) -> None:
    """Refuse a rule through `Flow` that diverges, because its steps in sigma = t / (1 - t) are huge near t = 1.

    A rule diverges if the result for Gaussian data N(1, 1) is more than twice as wide as it should be, or if its mean
    is off by more than its width.

    Raises:
        ValueError: a rule through `Flow` diverges.

    Warns:
        RuntimeWarning: a rule in flow time without `Flow` diverges.
    """
    what = "" if plan is None or coordinates == "ve" else _fault(plan)
    if plan is None or not what:
        return
    name, high = plan.rule.name, max(plan.sigmas)
    fix = (
        "use a sampler such as 'euler', 'heun' or 'dpmpp_2m', more steps, or a schedule that stays further below t = 1 "
        "(unsample: end_at_step=1)"
    )
    if not isinstance(plan.rule, Flow):
        warnings.warn(f"{name} {what}; {fix}", RuntimeWarning, stacklevel=4)
        return
    if not isinstance(flow_sampler(plan.rule.rule), Flow):
        fix = f"use sampler={name!r} without Flow, which runs in flow time by its name"
    sigma = high / (1.0 - high)
    raise ValueError(f"{name} through Flow {what}: its steps are in sigma = t / (1 - t), up to {sigma:.3g}; {fix}")


@sized_cache(KEPT, lambda _, plan: plan_size(plan))
def _fault(plan: Plan) -> str:
    """Describe the result of a Plan in flow time for Gaussian data N(1, 1); return "" if it follows their law."""
    wanted = gaussian_law(plan.sigmas[-1], 1.0, coordinates="flow")
    found = gaussian_moments(plan, 1.0, coordinates="flow")
    if found.std > 2.0 * wanted.std:
        return f"makes unit Gaussian data {found.std / wanted.std:.3g} times too wide on this schedule"
    if abs(found.mean - wanted.mean) > wanted.std:
        return f"moves the mean of Gaussian data from {wanted.mean:.3g} to {found.mean:.3g} on this schedule"
    return ""


def check_kept(plan: Plan | None, coordinates: Coordinates) -> None:
    """Refuse a run upwards that loses the region that a mask keeps.

    In that region the denoised image is constant, and x must stay at it.

    Raises:
        ValueError: a CFG++ sampler, whose unconditional image no mask changes; a Plan whose x would move away.
    """
    if plan is None:
        return
    start = Moments(gaussian_law(plan.sigmas[0], 1.0, coordinates=coordinates).mean, 0.0)
    wanted = gaussian_law(plan.sigmas[-1], 1.0, coordinates=coordinates).mean
    off = math.inf if plan.is_guided else abs(gaussian_moments(plan, 1.0, 0.0, coordinates, start).mean - wanted)
    if off > 0.01:
        why = (
            "its unconditional image is not masked"
            if plan.is_guided
            else f"where the mask keeps the image, the result would be off by {off:.2g} times the image"
        )
        raise ValueError(
            f"{plan.rule.name} cannot unsample with a mask: {why}; use 'euler', 'heun' or 'dpmpp_2m', or leave mask out"
        )


def _value(form: Form, values: dict[str, Any], like: np.ndarray) -> Any:
    """Evaluate a form on values by the kind and key of its symbols."""
    return sum((c * values[symbol.kind][symbol.key] for symbol, c in form), start=0.0 * like)
