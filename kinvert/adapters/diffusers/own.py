"""The sampler of kinvert that equals a scheduler's own method.

Where diffusers has a method that kinvert does not have, or one that changes with an option that kinvert lacks, there is
no such sampler, and the caller has to name one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import kinvert as ki
from kinvert.adapters.diffusers.host import class_name, noise_scales, option, tree_noise
from kinvert.adapters.diffusers.running import PathMaker
from kinvert.adapters.diffusers.timetable import Timetable, space_of
from kinvert.rules import Flow, Rule, SASolver

__all__ = ["draws_every_step", "on_levels", "own_path", "own_rule", "uses_pair"]


NO_LENGTH = "these sigmas, whose last step has no length"


def own_rule(scheduler: Any) -> Rule:
    """Return the sampler that equals a scheduler's own method on its own levels.

    Raises:
        ValueError: there is none, with the reason.
    """
    name = class_name(scheduler)
    missing = _WITHOUT.get(name)
    if missing is None:
        made = _OWN[name](scheduler)
        if isinstance(made, Rule):
            return made
        missing = made
    raise ValueError(
        f"sampler: kinvert has no sampler that equals {name}{missing}; name one, e.g. "
        f"KinvertScheduler.from_scheduler(scheduler, 'dpmpp_2m')"
    )


def uses_pair(scheduler: Any) -> bool:
    """Tell whether a scheduler clips the image of a step but keeps the noise of the unclipped one.

    Such a step is one of CFG++, whose pair is the clipped image and the image as it came: `x' = D_clipped + sigma' (x -
    D) / sigma`.
    """
    return class_name(scheduler) == "DDIMScheduler" and bool(
        option(scheduler, "clip_sample") or option(scheduler, "thresholding")
    )


def on_levels(rule: Rule, scheduler: Any, table: Timetable) -> Rule:
    """Return a scheduler's own rule for the levels of a run: SA-Solver has noise in the steps that its tau_func names.

    Raises:
        ValueError: a tau_func that is not one number in some steps next to each other and 0 in all others.
    """
    if isinstance(rule, Flow):
        return replace(rule, rule=on_levels(rule.rule, scheduler, table))
    if not isinstance(rule, SASolver):
        return rule
    taus = [float(tau) for tau in noise_scales(scheduler, [t for _, t in table.known])]
    inside = [i for i, tau in enumerate(taus) if tau]
    if not inside:
        return replace(rule, eta=0.0)
    first, last = inside[0], inside[-1]
    if len({*taus[first : last + 1]}) > 1:
        raise ValueError(
            "SASolverScheduler: kinvert's SA-Solver has one noise scale in steps next to each other, and tau_func "
            f"gives {', '.join(f'{tau:g}' for tau in taus)}; name a sampler"
        )
    ends = table.levels[first + 1], table.levels[last + 1]
    start, end = (t / (1.0 - t) for t in ends) if table.space == "flow" else ends
    # The ends are compared with levels that may be rounded.
    return replace(rule, eta=taus[first], sde_start=start * (1 + 1e-9), sde_end=end * (1 - 1e-9))


def draws_every_step(scheduler: Any) -> bool:
    """Tell whether a scheduler draws noise in each step, whether it uses it or not."""
    return class_name(scheduler) == "SASolverScheduler"


def own_path(scheduler: Any) -> PathMaker | None:
    """Return what makes a scheduler's noise of the state and the generator; None if it draws step by step."""
    return partial(tree_noise, scheduler) if class_name(scheduler) == "CosineDPMSolverMultistepScheduler" else None


def _ddim(scheduler: Any) -> Rule:
    return ki.sampler("euler_cfg_pp" if uses_pair(scheduler) else "euler")


def _ddim_inverse(scheduler: Any) -> Rule | str:
    if option(scheduler, "clip_sample"):
        return " with clip_sample=True, which keeps the noise of the unclipped image"
    if option(scheduler, "prediction_type") != "epsilon":
        return " with another prediction than epsilon, which it reads at the level below that of the timestep"
    return ki.sampler("ddim_inverse")


def _ddpm(scheduler: Any) -> Rule | str:
    variance = option(scheduler, "variance_type")
    return ki.sampler("ddpm") if variance == "fixed_small" else f" with variance_type={variance!r}"


def _flow_euler(scheduler: Any) -> Rule | str:
    if option(scheduler, "stochastic_sampling"):
        return " with stochastic_sampling=True"
    return ki.sampler("euler")


def _dpm(scheduler: Any) -> Rule | str:
    """DPM-Solver++ of one step, two or three, with and without noise."""
    kind, order = option(scheduler, "algorithm_type", "sde-dpmsolver++"), option(scheduler, "solver_order")
    if not kind.endswith("dpmsolver++"):
        return f" with algorithm_type={kind!r}"
    if option(scheduler, "euler_at_final") and option(scheduler, "final_sigmas_type") != "zero":
        return " with euler_at_final=True, whose last step has order 1 in runs of any length"
    eta, lower = float(kind.startswith("sde")), bool(option(scheduler, "lower_order_final"))
    if _repeats_last(scheduler):  # it is the step of no length that has order 1
        if order > 2 and lower:
            return f" of order 3 with {NO_LENGTH}"
        lower = False
    solver = option(scheduler, "solver_type")
    if order == 1:
        rule = ki.sampler("euler_ancestral" if eta else "euler")
    elif order == 2 and not eta and solver == "midpoint":
        rule = ki.sampler("dpmpp_2m", lower_order_final=lower)
    elif order == 3 and eta:
        return " with noise and solver_order=3, where the weight of the second difference does not vanish with the step"
    else:
        name = "dpmpp_2m_sde" if order == 2 else "dpmpp_3m_sde"
        rule = ki.sampler(name, eta=eta, solver_type=solver, lower_order_final=lower)
    return _in_log_snr(scheduler, rule)


def _unipc(scheduler: Any) -> Rule | str:
    if not option(scheduler, "predict_x0"):
        return " with predict_x0=False"
    if option(scheduler, "disable_corrector") or option(scheduler, "solver_p"):
        return " with disable_corrector or solver_p"
    lower, order = bool(option(scheduler, "lower_order_final")), option(scheduler, "solver_order")
    zero = option(scheduler, "final_sigmas_type") == "zero"
    if _repeats_last(scheduler):
        return f" with final_sigmas_type='sigma_min' and {NO_LENGTH} but corrects the state"
    if zero and not lower:
        return " with lower_order_final=False and a last level of 0"
    variant = option(scheduler, "solver_type")
    rule = ki.sampler(
        "uni_pc", variant=variant, order=order, lower_order_final=lower, at_zero="denoised" if zero else "0.001"
    )
    return _in_log_snr(scheduler, rule)


def _deis(scheduler: Any) -> Rule | str:
    order, lower = option(scheduler, "solver_order"), bool(option(scheduler, "lower_order_final"))
    if _repeats_last(scheduler):  # as in `_dpm`
        if order > 2 and lower:
            return f" of order 3 with {NO_LENGTH}"
        lower = False
    rule = ki.sampler("deis", max_order=order, variable="log_sigma", lower_order_final=lower)
    return _in_log_snr(scheduler, rule)


def _sa(scheduler: Any) -> Rule | str:
    if option(scheduler, "algorithm_type") != "data_prediction":
        return f" with algorithm_type={option(scheduler, 'algorithm_type')!r}"
    if _repeats_last(scheduler):
        return f" with {NO_LENGTH} but corrects the state"
    rule = ki.sampler(
        "sa_solver",
        predictor_order=option(scheduler, "predictor_order"),
        corrector_order=option(scheduler, "corrector_order"),
        lower_order_final=bool(option(scheduler, "lower_order_final")),
        simple_order_2=True,
    )
    return _in_log_snr(scheduler, rule)


def _repeats_last(scheduler: Any) -> bool:
    """Tell whether the last level of a run is there twice, so that the last step has no length."""
    if option(scheduler, "final_sigmas_type") == "zero":
        return False
    if class_name(scheduler) in ("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        return True
    names = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]
    if class_name(scheduler) != "DPMSolverMultistepScheduler":
        names.append("use_flow_sigmas")
    return any(option(scheduler, name) for name in names)


def _in_log_snr(scheduler: Any, rule: Rule) -> Rule:
    """Return the rule for a flow model: diffusers takes its coefficients in ln((1 - t) / t)."""
    return Flow(rule) if space_of(scheduler) == "flow" else rule


_OWN: dict[str, Callable[[Any], Rule | str]] = {
    "CosineDPMSolverMultistepScheduler": _dpm,
    "DDIMInverseScheduler": _ddim_inverse,
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepInverseScheduler": _dpm,
    "DPMSolverMultistepScheduler": _dpm,
    "EDMDPMSolverMultistepScheduler": _dpm,
    "EDMEulerScheduler": lambda scheduler: ki.sampler("euler"),
    "EulerAncestralDiscreteScheduler": lambda scheduler: ki.sampler("euler_ancestral"),
    "EulerDiscreteScheduler": lambda scheduler: ki.sampler("euler"),
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": lambda scheduler: ki.sampler("heun"),
    "HeunDiscreteScheduler": lambda scheduler: ki.sampler("heun"),
    "KDPM2AncestralDiscreteScheduler": lambda scheduler: ki.sampler("dpm_2_ancestral"),
    "KDPM2DiscreteScheduler": lambda scheduler: ki.sampler("dpm_2"),
    "LMSDiscreteScheduler": lambda scheduler: ki.sampler("lms", at_zero="adams"),
    "SASolverScheduler": _sa,
    "UniPCMultistepScheduler": _unipc,
}
_WITHOUT = {
    "DPMSolverSinglestepScheduler": ", whose steps take turns in their order",
    "LCMScheduler": ", whose network has boundary conditions of its own",
    "PNDMScheduler": ", whose multistep coefficients are those of equal steps of time",
}
"""Schedulers whose levels are used, with the reason why there is no sampler that equals them."""
