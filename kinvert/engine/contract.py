"""What a run demands of the state, of what the denoiser returns and of noise: errors that name the fix.

Types, shapes and dtypes are looked at, no value is read: nothing here waits for a device.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_beside, check_dense, has_values, plain
from kinvert.coordinates import FLOW_FIX, VE_FIX, coordinates_of, flow_sampler
from kinvert.denoisers import Guided
from kinvert.noise import NoiseFunction
from kinvert.plan import Interval, Plan, Stage, Step
from kinvert.rules.flow import within_one
from kinvert.tensors import is_half, wide_dtype


def check_outputs(out: Any, x: Tensor, stage: Stage, step: Step) -> tuple[Tensor, Tensor | None]:
    """What the denoiser returned for x, checked by its type, shape and dtype (no value is read)."""
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
    """A tensor that the denoiser returned for x, checked by its type, shape and dtype."""
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
    """The state `x`, a dense floating point tensor of shape (batch, *event), as a plain tensor.

    Raises:
        TypeError, ValueError: x is something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (batch, *event), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}; convert it, e.g. x.float()")
    check_dense("x", x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (batch, *event) with at least one sample, got {tuple(x.shape)}")
    return plain(x)


def check_memory(plan: Plan, state: dict[str, Tensor]) -> None:
    """Raise TypeError or ValueError where `state` is not what the Plan starts from; see `engine.run_state`."""
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


DROWNED = 1.0
"""The rounding, in units of the noise level, above which a run is not begun without a word; see `rounding`."""


def rounding(x: Tensor, sigma: float) -> float:
    """What rounding leaves of a slope `(x - D) / sigma`, in units of sigma: `eps rms(x) / sigma`, eps of x's dtype.

    A run that starts at a small level, or divides by one, has this error in its first step, and carries it along: on
    the embedded digits in bfloat16 (20 steps, levels 0.002 to 80, rms 0.85) latents were off by 1.4 sigma where it is
    66, by 0.4 where it is 1.3, and by 0.2 where it is 0.7. One read of x; 0 for one without values.
    """
    if not has_values(x):
        return 0.0
    wide = x.detach().to(wide_dtype(x.dtype))
    return float(wide.square().mean().sqrt()) * torch.finfo(x.dtype).eps / sigma


def warn_if_drowned(x: Tensor, sigma: float, what: str, fix: str, stacklevel: int = 4) -> None:
    """Say so, with the number, where rounding must drown what is divided by sigma."""
    if sigma > 0 and (error := rounding(x, sigma)) > DROWNED:
        warnings.warn(
            f"{what} at sigma {sigma:g} in {x.dtype} has a rounding error of up to {error:.2g} sigma (eps rms(x) / "
            f"sigma), which can drown it; use float32, x.float(), {fix}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def check_plan(plan: Any) -> None:
    """Raise TypeError where `plan` is a sampler that is not compiled yet, or something else."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}; use ki.compile_plan(sampler, sigmas)")


def check_coordinates(plan: Plan, denoiser: Any) -> None:
    """Raise ValueError where a denoiser says that it takes other numbers than those of the Plan."""
    if torch.compiler.is_compiling():  # which does not follow it
        return
    model = coordinates_of(denoiser)
    if model == "ve" and plan.coordinates == "flow":  # a rule spelled out for flow time may be run on any numbers here
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
