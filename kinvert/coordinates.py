r"""The meaning of the numbers of a run: sigmas of variance-exploding (VE) coordinates, or flow times.

`x = x0 + sigma eps` in VE coordinates, `x_t = (1 - t) x0 + t eps` in flow time. A denoiser takes one of the two, and a
schedule holds one of the two. The numbers do not say which: 0.9 can be a sigma or a time. So denoisers, levels and
schedules of flow levels carry an attribute `coordinates`, rules say it by `Rule.is_in_flow`, and every verb calls
`settle`, which refuses combinations that do not match.

In flow time a sampler is one of three rules, and `flow_sampler` chooses: the unchanged rule if it integrates
`dx/dt = (x - D) / t`, which holds in both coordinates; the rule with its option `flow` if it adds noise to the state;
or the rule through `rules.Flow` if its formulas are in the log signal-to-noise ratio.
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
from kinvert.rules.base import TRIAL
from kinvert.rules.flow import within_one

__all__ = [
    "FLOW_FIX",
    "LOG_SNR",
    "LOG_SNR_NAMES",
    "VE_FIX",
    "Coordinates",
    "HasPercents",
    "Setting",
    "coordinates_of",
    "flow_sampler",
    "innermost",
    "levels_of",
    "settle",
]

Coordinates = Literal["ve", "flow"]
# Rules whose formulas hosts write in the log signal-to-noise ratio, which is log((1 - t) / t) in flow time.
LOG_SNR = (DPMppSDE, DPMpp2MSDE, DPMpp3MSDE, ERSDE, Seeds2, Seeds3, SASolver)
# In hosts this is SEEDS without noise; here it is a `RES2S`, which by its other names runs unchanged in flow time.
LOG_SNR_NAMES = ("exp_heun_2_x0",)

VE_FIX = "ki.levels.flow_to_ve(times.clamp(max=1 - 1e-4)), with states x / (1 - t)"
FLOW_FIX = 'from_velocity(model, levels, coordinates="flow"), or set `coordinates = "flow"` on your own denoiser'


class HasPercents(Protocol):
    """Noise levels of a model: the `Levels` of kinvert, or an object of a host."""

    def percent_to_sigma(self, p: float, /) -> float:
        """Return the noise level after a fraction p of sampling."""
        ...


class Setting(NamedTuple):
    """The setting of a run.

    Attributes:
        coordinates: the coordinates of its states and levels.
        rule: its sampler in these coordinates.
        schedule: its noise levels, or flow times, as floats.
    """

    coordinates: Coordinates
    rule: Rule
    schedule: tuple[float, ...]


def coordinates_of(value: Any) -> Coordinates | None:
    """Return the coordinates that a denoiser, levels or a schedule declares, or None if it declares none.

    Raises:
        ValueError: an attribute `coordinates` that is neither "ve" nor "flow".
    """
    found = getattr(innermost(value), "coordinates", None)
    if not isinstance(found, str):  # a network may have another attribute of that name
        return None
    if found not in get_args(Coordinates):
        raise ValueError(f"coordinates of {type(value).__name__} must be 've' or 'flow', got {found!r}")
    return cast(Coordinates, found)


def settle(denoiser: Any, sampler: str | Rule, sigmas: Any) -> Setting:
    """Decide what the numbers of a run mean, and which rule its sampler is in these coordinates.

    The denoiser declares the coordinates; if it does not, the schedule; if it does not, the rule. The default is VE.

    Raises:
        ValueError: a denoiser, a schedule and a rule that do not match, with the fix; a flow time above 1.

    Warns:
        RuntimeWarning: a schedule starts at exactly 1, nothing declares its coordinates, and the sampler depends on
            them.
    """
    rule, schedule = resolve_sampler(sampler), as_schedule(sigmas)
    model, times = coordinates_of(denoiser), coordinates_of(sigmas)
    needed: Coordinates | None = "flow" if rule.is_in_flow else None
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
    """Return the rule of a sampler for a flow model in flow time, the same that ComfyUI runs there by this name.

    `sample`, `unsample`, `invert`, `extract_noise` and `round_trip` apply it if the coordinates are "flow".

    * A rule with an option `flow` (ancestral samplers, `lcm`, `euler_cfg_pp`, RF-Solver, EDICT) gets `flow=True`. BDIA
      gets `coordinates="ve"`.
    * A rule in the log signal-to-noise ratio, and every other rule that draws noise, runs through `rules.Flow`, which
      starts at the time of 0.01 % of sampling in place of 1. `sa_solver` is stochastic from 20 % to 80 % of sampling,
      unless its interval was set.
    * All other rules stay unchanged, and so do rules that are for flow time already.

    In ComfyUI, `ddpm`, `res_multistep_ancestral` and the ancestral CFG++ samplers of more than one evaluation or step
    have no formulas for flow models, and their images have too much spread. Here they have such formulas.

    Args:
        sampler: a name of `ki.SAMPLERS`, or a rule with options.
        levels: an object with a method `percent_to_sigma(p)`, such as `ki.levels.flow(3.0)` or a host's model sampling;
            None is a flow without shift.

    Raises:
        ValueError: a sampler that cannot be right in flow time, with the fix.
    """
    rule = resolve_sampler(sampler)
    if rule.is_in_flow:
        return rule
    if "flow" in rule.options:
        return _with(rule, flow=True)
    if rule.options.get("coordinates") == "vp":
        return _with(rule, coordinates="ve")  # its formulas for x hold in flow time too
    if isinstance(rule, DPMAdaptive):
        if rule.eta:
            raise ValueError(
                f"{rule.name}: its noise (eta={rule.eta:g}) is of variance-exploding coordinates; use eta=0 in flow "
                f'time, or run it there: a denoiser with coordinates="ve" and {VE_FIX}'
            )
        return rule
    at: Callable[[float], float] = (lambda p: 1.0 - p) if levels is None else levels.percent_to_sigma
    if isinstance(rule, SASolver) and (rule.sde_start, rule.sde_end) == (SASolver.sde_start, SASolver.sde_end):
        start, end = float(at(0.2)), float(at(0.8))
        rule = _with(rule, sde_start=start / (1.0 - start), sde_end=end / (1.0 - end))
    if isinstance(rule, LOG_SNR) or rule.name in LOG_SNR_NAMES or _draws(rule):
        return Flow(rule, start=min(max(float(at(1e-4)), 0.5), 1.0 - 1e-9))
    return rule


def levels_of(denoiser: Any) -> HasPercents | None:
    """Return the levels of a denoiser, or None if it has none."""
    found = getattr(innermost(denoiser), "levels", None)
    return found if callable(getattr(found, "percent_to_sigma", None)) else None


def innermost(value: Any) -> Any:
    """Return a denoiser without its wrappers: bound arguments, guidance, masks."""
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
    """Tell whether a rule draws noise: on a trial schedule, or by churn, which may be for other levels."""
    return "s_churn" in rule.noise_options or compile_plan(rule, TRIAL).is_stochastic


def _with(rule: Rule, **options: Any) -> Rule:
    """Return the rule with options that not every rule has."""
    return replace(rule, **options)
