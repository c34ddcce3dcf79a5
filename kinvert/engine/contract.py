"""Checks of the state, of what a denoiser returns and of noise: errors that name the fix.

The checks look at types, shapes and dtypes and read no value, so they do not wait for a device. The warnings of
`warn_if_drowned` and `warn_if_rising_drowns` take one read of x.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kinvert import torch_hooks
from kinvert.checks import check_beside, check_dense, has_values, plain
from kinvert.coordinates import FLOW_FIX, VE_FIX, coordinates_of, flow_sampler
from kinvert.denoisers import Guided
from kinvert.devices import memory_limit
from kinvert.engine.kernels import program
from kinvert.noise import NoiseFunction
from kinvert.plan import Interval, Plan, Stage, Step
from kinvert.rules.flow import within_one
from kinvert.tensors import is_half, wide_dtype

__all__ = [
    "check_coordinates",
    "check_edit",
    "check_memory",
    "check_outputs",
    "check_plan",
    "check_resumed",
    "check_room",
    "check_state",
    "checked_noise",
    "checked_output",
    "rounding",
    "warn_if_drowned",
    "warn_if_rising_drowns",
]

LARGE = 2**28
"""Bytes of a state from which on it is asked whether it fits."""

DROWNED = 1.0
"""The rounding, in units of the noise level, above which a warning is given; see `rounding`."""


def check_outputs(out: Any, x: Tensor, stage: Stage, step: Step) -> tuple[Tensor, Tensor | None]:
    """Return (denoised, uncond or None) of what the denoiser returned for x, after checks of type, shape and dtype."""
    where = f"in step {step.index} (sigma {stage.sigma:g})"
    if stage.guided:
        if not isinstance(out, Guided):
            raise TypeError(
                f"the sampler needs a pair Guided(denoised, uncond) of the denoiser, got {type(out).__name__} {where}; "
                "pass negative= (and positive=, cfg=) to sample, or return ki.Guided"
            )
        return checked_output(out.denoised, x, where), checked_output(out.uncond, x, where)
    return checked_output(out.denoised if isinstance(out, Guided) else out, x, where), None


def checked_output(out: Any, x: Tensor, where: str) -> Tensor:
    """Return a tensor that the denoiser returned for x, after checks of its type, shape and dtype."""
    if not isinstance(out, Tensor):
        raise TypeError(f"the denoiser must return a tensor (the denoised x), got {type(out).__name__} {where}")
    if out.shape != x.shape:
        raise ValueError(f"the denoiser must return x's shape {tuple(x.shape)}, got {tuple(out.shape)} {where}")
    widened = is_half(x.dtype) and out.dtype == torch.float32
    if out.dtype != x.dtype and not widened:
        raise TypeError(
            f"the denoiser must return x's dtype {x.dtype}, got {out.dtype} {where}; convert x to the network's dtype, "
            "or return denoised.to(x.dtype)"
        )
    return plain(out)


def checked_noise(draw: NoiseFunction, interval: Interval, x: Tensor) -> Tensor:
    """Draw noise for an interval and check its type and shape."""
    n = draw(*interval)
    if isinstance(n, Tensor):
        check_beside("noise", n, x)
    if not isinstance(n, Tensor) or n.shape != x.shape:
        got = f"shape {tuple(n.shape)}" if isinstance(n, Tensor) else type(n).__name__
        raise ValueError(
            f"noise({interval.sigma_from:g}, {interval.sigma_to:g}) must return a tensor of x's shape "
            f"{tuple(x.shape)}, got {got}"
        )
    return plain(n)


def check_state(x: Any) -> Tensor:
    """Return x, a dense floating point tensor of shape (batch, *event), as a plain tensor.

    Raises:
        TypeError, ValueError: x is anything else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (batch, *event), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}; convert it, e.g. x.float()")
    check_dense("x", x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (batch, *event) with at least one sample, got {tuple(x.shape)}")
    check_room(x)
    return plain(x)


def check_room(x: Tensor, plan: Plan | None = None) -> None:
    """Raise ValueError if a run from x does not fit into the memory of this machine: x, and what the Plan needs.

    The system would end the process in the middle of the work. Devices of their own say at once what does not fit.
    """
    size = x.numel() * x.element_size()
    if torch.compiler.is_compiling() or size < LARGE or x.device.type != "cpu" or not has_values(x):
        return
    count = 1 if plan is None else program(plan, half=is_half(x.dtype)).memory
    limit, held = memory_limit(), x.untyped_storage().nbytes()
    if limit is not None and held + count * size > limit:
        raise ValueError(
            f"x of shape {tuple(x.shape)} in {x.dtype} does not fit: a tensor of its size takes {size / 1e9:,.1f} GB, "
            f"a run needs at least {count} of them besides x, and this machine has {limit / 1e9:,.1f} GB; give fewer "
            "samples at a time, smaller ones, or a narrower dtype"
        )


def check_memory(plan: Plan, state: dict[str, Tensor]) -> None:
    """Raise TypeError or ValueError if `state` is not what the Plan starts from; see `run_state`."""
    check_state(state.get("x"))
    needed = plan.steps[0].reads | {"x"}
    if state.keys() != needed:
        raise ValueError(
            f"the Plan of {plan.rule.name} starts from {', '.join(sorted(needed))}, got {', '.join(sorted(state))}; "
            "plan.closed starts from x and the auxiliary state, compile_plan's from x alone"
        )
    x = state["x"]
    for name in needed - {"x"}:
        value = state[name]
        if not isinstance(value, Tensor) or value.dtype != x.dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"the auxiliary state {name!r} must be a tensor of x's dtype {x.dtype}, got {got}")
        if value.shape != x.shape:
            raise ValueError(
                f"the auxiliary state {name!r} must have x's shape {tuple(x.shape)}, got {tuple(value.shape)}"
            )


def rounding(x: Tensor, sigma: float) -> float:
    """Estimate the rounding error of a slope `(x - D) / sigma`, in units of sigma: `eps rms(x) / sigma`.

    eps belongs to x's dtype. A run that starts at a small level, or divides by one, makes this error in its first step
    and carries it along. On the embedded digits in bfloat16 (20 steps, levels 0.002 to 80, rms 0.85) an estimate of 66
    went with latents that were off by 1.4 sigma, 1.3 with 0.4 sigma, and 0.7 with 0.2 sigma.

    Returns:
        The estimate, which takes one read of x; 0 for an x without values.
    """
    if not has_values(x):
        return 0.0
    wide = x.detach().to(wide_dtype(x.dtype))
    return float(wide.square().mean().sqrt()) * torch.finfo(x.dtype).eps / sigma


def warn_if_drowned(x: Tensor, sigma: float, what: str, fix: str, stacklevel: int = 4) -> None:
    """Warn, with the number, if rounding drowns what is divided by sigma."""
    if sigma > 0 and (error := rounding(x, sigma)) > DROWNED:
        warnings.warn(
            f"{what} at sigma {sigma:g} in {x.dtype} has a rounding error of up to {error:.2g} sigma (eps rms(x) / "
            f"sigma), which can drown it; use float32, x.float(), {fix}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def warn_if_rising_drowns(plan: Plan, x: Tensor, stacklevel: int = 3) -> None:
    """Warn if a Plan that runs upwards starts at a level that rounding in half precision drowns; see `rounding`."""
    if (
        isinstance(plan, Plan)
        and plan.is_rising
        and isinstance(x, Tensor)
        and x.dtype in (torch.bfloat16, torch.float16)
        and not torch_hooks.is_transformed()
    ):
        what, fix = "the first slope of the way up", "or a higher first level"
        warn_if_drowned(x, plan.sigmas[0], what, fix, stacklevel=stacklevel + 1)


def check_plan(plan: Any) -> None:
    """Raise TypeError if `plan` is a sampler that is not compiled yet, or anything else."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}; use ki.compile_plan(sampler, sigmas)")


def check_coordinates(plan: Plan, denoiser: Any) -> None:
    """Raise ValueError if the denoiser declares other coordinates than those of the Plan."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace this check
        return
    model = coordinates_of(denoiser)
    if model == "ve" and plan.coordinates == "flow":  # rules written for flow time run on any numbers
        raise ValueError(
            "the Plan is for flow times, but the denoiser takes sigmas of variance-exploding coordinates; build the "
            f"denoiser in flow time, {FLOW_FIX}, or convert the schedule, {VE_FIX}"
        )
    if model == "flow":
        within_one(plan.sigmas)
        if flow_sampler(plan.rule) != plan.rule:
            raise ValueError(
                f"the Plan of {plan.rule.name} is one for variance-exploding coordinates, but the denoiser takes flow "
                f"times; use ki.compile_plan(ki.flow_sampler({plan.rule.name!r}, levels), sigmas)"
            )


def check_edit(plan: Plan, index: int, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Raise TypeError or ValueError if `new` values cannot replace those that step number `index` starts from."""
    step, name = plan.steps[index], plan.rule.name
    for key, value in new.items():
        if key not in step.reads:
            raise ValueError(
                f"step {index} of {name} does not read {key!r}, so that replacing it changes nothing; it reads "
                f"{', '.join(sorted(step.reads))}"
            )
        if not isinstance(value, Tensor):
            raise TypeError(f"the new {key} must be a tensor, got {type(value).__name__}")
        check_beside(f"the new {key}", value, old[key])
        got, want = [(tuple(t.shape), t.dtype, t.device) for t in (value, old[key])]
        if got != want:
            error = ValueError if got[1:] == want[1:] else TypeError
            raise error(
                f"the new {key} must have shape {want[0]}, {want[1]}, on {want[2]}, as the old one, got {got[0]}, "
                f"{got[1]}, on {got[2]}"
            )
    rows = (step.x, *(form for _, form in step.memory))
    carried = {str(symbol.key) for row in rows for symbol, _ in row if symbol.kind == "state"}
    missing = carried & _copies_of_x(plan, index) - new.keys()
    if "x" not in carried and missing:
        raise ValueError(
            f"step {index} of {name} shows x to the denoiser and goes on from {', '.join(sorted(missing))} instead, so "
            f"that a new x alone would be lost; replace it too, run.replace(x, {', '.join(sorted(missing))}=...)"
        )


def _copies_of_x(plan: Plan, index: int) -> set[str]:
    """Return the values before a step that depend on the first state by other ways than the denoiser alone."""
    names = set(plan.steps[0].reads | {"x"})
    for step in plan.steps[:index]:
        rows = ("x", step.x), *step.memory
        names = {key for key, form in rows if any(s.kind == "state" and s.key in names for s, _ in form)}
    return names


_STATE = {"sampler", "sigmas", "step", "stage", "values", "noises", "denoised", "uncond", "x", "noise"}


def check_resumed(plan: Plan, state: Any) -> None:
    """Raise TypeError or ValueError if `state` is not where a run of the Plan can go on."""
    if not isinstance(state, dict) or not state.keys() >= _STATE:
        raise TypeError(f"state must be the state of a run, run.state, got {type(state).__name__}")
    if (state["sampler"], tuple(state["sigmas"])) != (repr(plan.rule), plan.sigmas):
        raise ValueError(
            f"the state belongs to {state['sampler']} on {len(state['sigmas'])} noise levels, the Plan is of "
            f"{plan.rule!r} on {len(plan.sigmas)}; compile the Plan for the same sampler and the same sigmas"
        )
    step, stage, count = state["step"], state["stage"], len(plan.steps)
    if not 0 <= step <= count or not 0 <= stage < (len(plan.steps[step].stages) if step < count else 1):
        raise ValueError(f"the state stands at stage {stage} of step {step}, which the Plan of {count} steps lacks")
    needed = {"x"} if step == count else plan.steps[step].reads | {"x"}
    if not needed <= state["values"].keys():
        raise ValueError(f"the state lacks {', '.join(sorted(needed - state['values'].keys()))}; save all of run.state")
