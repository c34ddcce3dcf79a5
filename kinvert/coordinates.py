r"""What a run's numbers mean: sigmas of variance-exploding (VE) coordinates, or flow times.

`x = x0 + sigma eps` in VE coordinates, `x_t = (1 - t) x0 + t eps` in flow time. A denoiser takes one of the two, a
schedule holds one of the two, and nothing in the numbers says which: 0.9 is a sigma as well as a time. So denoisers,
levels, schedules of flow levels and rules carry an attribute `coordinates`, and every verb asks `settle`, which refuses
what does not belong together.

A sampler in flow time is one of three things, and `flow_sampler` says which: the rule as it is, where it integrates
`dx/dt = (x - D) / t`, which holds in both; the rule with its option `flow`, where it noises the state; or the rule
through `rules.Flow`, where its formulas are in the log signal-to-noise ratio.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

from kinvert.plan import as_schedule, compile_plan
from kinvert.rules import (
    ERSDE,
    DPMAdaptive,
    DPMpp2MSDE,
    DPMpp3MSDE,
    DPMppSDE,
    Flow,
    Rule,
    SASolver,
    Seeds2,
    Seeds3,
)
from kinvert.rules import sampler as resolve_sampler
from kinvert.rules.base import options_of
from kinvert.rules.flow import within_one

Coordinates = Literal["ve", "flow"]
# Formulas in the log signal-to-noise ratio, which is log((1 - t) / t) in flow time, as hosts have them.
LOG_SNR = (DPMppSDE, DPMpp2MSDE, DPMpp3MSDE, ERSDE, Seeds2, Seeds3, SASolver)
# SEEDS without noise in a host, and a rule that runs in flow time as it is under another name here.
LOG_SNR_NAMES = ("exp_heun_2_x0",)
# Falling noise levels on which a rule shows whether it draws noise.
TRIAL = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

VE_FIX = "ki.levels.flow_to_ve(times.clamp(max=1 - 1e-4)), with states x / (1 - t)"
FLOW_FIX = 'from_velocity(model, levels, coordinates="flow"), or set `coordinates = "flow"` on your own denoiser'


class HasPercents(Protocol):
    """Noise levels of a model: kinvert's `Levels`, or a host's own object."""

    def percent_to_sigma(self, p: float, /) -> float:
        """The noise level after a fraction p of sampling."""
        ...


class Setting(NamedTuple):
    """A run: what its numbers mean, its sampler, and its schedule as floats."""

    coordinates: Coordinates
    rule: Rule
    schedule: tuple[float, ...]


def coordinates_of(value: Any) -> Coordinates | None:
    """The coordinates that a denoiser, levels or a schedule says that it has; None if it does not say.

    Raises:
        ValueError: an attribute `coordinates` that is neither "ve" nor "flow".
    """
    found = getattr(_inner(value), "coordinates", None)
    if not isinstance(found, str):  # a network may have something else by that name
        return None
    if found not in get_args(Coordinates):
        raise ValueError(f"coordinates of {type(value).__name__} must be 've' or 'flow', got {found!r}")
    return cast(Coordinates, found)


def settle(denoiser: Any, sampler: str | Rule, sigmas: Any) -> Setting:
    """Decide what the numbers of a run mean, and which rule its sampler is there.

    They mean what the denoiser says, else what the schedule says, else what the rule says, else VE.

    Raises:
        ValueError: a denoiser, a schedule and a rule that do not belong together, with the fix; a flow time above 1.

    Warns:
        RuntimeWarning: a schedule from exactly 1 of which nothing says what it is, and a sampler to which it matters.
    """
    rule, schedule = resolve_sampler(sampler), as_schedule(sigmas)
    model, times = coordinates_of(denoiser), coordinates_of(sigmas)
    needed: Coordinates | None = "flow" if is_in_flow(rule) else None
    coordinates = model or times or needed or "ve"
    if times == "flow" and coordinates == "ve":
        raise ValueError(
            "sigmas are flow times, but the denoiser takes sigmas of variance-exploding coordinates; for a flow model "
            f"build it in flow time, {FLOW_FIX}, or convert the schedule, {VE_FIX}; any other model needs a schedule "
            "of its own levels"
        )
    if needed == "flow" and coordinates == "ve":
        raise ValueError(
            f"sampler: {rule!r} is for flow time, but the denoiser takes sigmas of variance-exploding coordinates; "
            f"pass the sampler without Flow or flow=True, or build the denoiser in flow time, {FLOW_FIX}"
        )
    if coordinates == "ve":
        if model is None and max(schedule) == 1.0 and not isinstance(rule, DPMAdaptive) and flow_sampler(rule) != rule:
            warnings.warn(
                f"sigmas start at exactly 1, as flow times do, and nothing says what they are; {rule.name} takes them "
                "as sigmas of variance-exploding coordinates; for a flow model pass ki.levels.FlowTimes(sigmas), else "
                'set `coordinates = "ve"` on the denoiser',
                RuntimeWarning,
                stacklevel=4,
            )
        return Setting("ve", rule, schedule)
    return Setting("flow", flow_sampler(rule, levels_of(denoiser)), within_one(schedule))


def flow_sampler(sampler: str | Rule, levels: HasPercents | None = None) -> Rule:
    """The rule that a sampler is on a flow model in flow time: what ComfyUI runs there, by one name for all.

    `sample`, `unsample`, `invert`, `extract_noise` and `round_trip` apply it where the coordinates are "flow".

    * A rule with an option `flow` (ancestral samplers, `lcm`, `euler_cfg_pp`, RF-Solver, EDICT): with `flow=True`;
      BDIA with `coordinates="ve"`.
    * A rule in the log signal-to-noise ratio, or another that draws noise: through `rules.Flow`, which starts at the
      time of 0.01 % of sampling in place of 1. `sa_solver` is stochastic from 20 % to 80 % of sampling, unless its
      interval was set.
    * All others as they are; `rules.Flow` and `flow=True` that are there already stay.

    Of ComfyUI's samplers `ddpm`, `res_multistep_ancestral` and the ancestral CFG++ samplers of more than one evaluation
    or step have no formulas of their own for flow models there, and their images too much spread; here they have.

    Args:
        sampler: a name of `ki.SAMPLERS`, or a rule with options.
        levels: whatever has `percent_to_sigma(p)`, such as `ki.levels.flow(3.0)` or a host's model sampling; None is a
            flow without shift.

    Raises:
        ValueError: a sampler that cannot be right in flow time, with the fix.
    """
    rule = resolve_sampler(sampler)
    if is_in_flow(rule):
        return rule
    options = {f.name: f.default for f in options_of(rule)}
    if "flow" in options:
        return _with(rule, flow=True)
    if getattr(rule, "coordinates", None) == "vp":
        return _with(rule, coordinates="ve")  # it takes the state as it is
    if isinstance(rule, DPMAdaptive):
        if rule.eta:
            raise ValueError(
                f"{rule.name}: its noise (eta={rule.eta:g}) is of variance-exploding coordinates; use eta=0 in flow "
                f'time, or run it there: a denoiser with coordinates="ve" and {VE_FIX}'
            )
        return rule
    at: Callable[[float], float] = (lambda p: 1.0 - p) if levels is None else levels.percent_to_sigma
    if isinstance(rule, SASolver) and all(getattr(rule, key) == options[key] for key in ("sde_start", "sde_end")):
        start, end = float(at(0.2)), float(at(0.8))
        rule = _with(rule, sde_start=start / (1.0 - start), sde_end=end / (1.0 - end))
    if isinstance(rule, LOG_SNR) or rule.name in LOG_SNR_NAMES or _draws(rule):
        return Flow(rule, start=min(max(float(at(1e-4)), 0.5), 1.0 - 1e-9))
    return rule


def levels_of(denoiser: Any) -> HasPercents | None:
    """The levels of a denoiser, where it has some."""
    found = getattr(_inner(denoiser), "levels", None)
    return found if callable(getattr(found, "percent_to_sigma", None)) else None


def is_in_flow(rule: Rule) -> bool:
    """Whether a rule is one for flow times alone."""
    return isinstance(rule, Flow) or getattr(rule, "flow", False) is True


def _inner(value: Any) -> Any:
    """A denoiser without what was put around it: bound arguments, guidance, masks."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType):
            value = value.__self__
        elif type(value).__module__.startswith("kinvert.denoisers") and hasattr(value, "denoiser"):
            value = value.denoiser
        else:
            return value


def _draws(rule: Rule) -> bool:
    """Whether a rule draws noise: on a schedule to try it, or by churn, which may be for other levels."""
    return getattr(rule, "s_churn", 0.0) > 0 or compile_plan(rule, TRIAL).is_stochastic


def _with(rule: Rule, **options: Any) -> Rule:
    """The rule with options that not every rule has."""
    return replace(rule, **options)
