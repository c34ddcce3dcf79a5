r"""The loop. Every sampler is a Plan, and this is the only place where Plans (and rules) meet tensors.

Inside the loop there are denoiser calls and linear combinations, nothing else: noise levels are uploaded once, the
coefficients are Python floats, and no tensor is read by the host. States in half precision are combined in float32
and rounded once.

A run is made in one of two ways, with results that agree to rounding: `_loop` takes the Plan as it is written and
makes a new tensor for every value; `fused_loop`, where no one differentiates, vectorises or compiles the run, carries
out the kernels that `program` lays out for it, in buffers that are used again from step to step (`fused`). Both are
made of steps (`advance`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kinvert.checks import check_callback, has_values, plain
from kinvert.denoisers import Denoiser
from kinvert.denoisers.dtypes import explain
from kinvert.engine.contract import check_coordinates, check_memory, check_plan, check_state, warn_if_drowned
from kinvert.engine.fused import BLOCK, Constants, FusedRun, can_fuse, fused_loop
from kinvert.engine.step import Callback, Memory, Progress, advance, combine, evaluate, stage_sigmas
from kinvert.noise import Noise as NoiseLike
from kinvert.noise import NoiseFunction, bind, default_noise
from kinvert.plan import Plan

__all__ = [
    "BLOCK",
    "Callback",
    "Constants",
    "FusedRun",
    "Memory",
    "Progress",
    "advance",
    "can_fuse",
    "check_state",
    "combine",
    "evaluate",
    "fused_loop",
    "noise_for",
    "run",
    "run_state",
    "stage_sigmas",
]
HALVES = (torch.bfloat16, torch.float16)


def run(
    plan: Plan, denoiser: Denoiser, x: Tensor, noise: NoiseLike | None = None, callback: Callback | None = None
) -> Tensor:
    """Run a Plan: from `x` at `plan.sigmas[0]` to the state at `plan.sigmas[-1]`.

    Args:
        plan: from `compile_plan`.
        denoiser: `denoiser(x, sigma) -> denoised` with x (batch, *event) and sigma (batch,); a Plan with `is_guided`
            needs a pair `Guided(denoised, uncond)`. sigma has x's dtype, float32 where x is in half precision. It may
            return the same memory at every call: what a sampler reads again is copied where it is not the run's alone.
        x: the state, shape (batch, *event), floating point. It is not modified.
        noise: a noise source for stochastic Plans; None draws the rule's own kind (`Rule.default_noise`), seeded by
            torch's global generator.
        callback: called with a `Progress` after every step.

    Returns:
        The final state, of x's shape, dtype and device. The result is not checked for NaN (`sample` and `unsample`
        do that). Gradients flow through it; a run under `torch.no_grad()` takes fewer passes over memory.

    Raises:
        TypeError: x that is not a floating point tensor; a denoiser that returns something else than a tensor of x's
            dtype (float32 is accepted for half-precision states), or that fails on x's dtype.
        ValueError: a denoiser or noise source that returns another shape than x's.

    Warns:
        RuntimeWarning: a run upwards in half precision whose rounding drowns it, with the number (one read of x).
    """
    if (
        isinstance(plan, Plan)
        and plan.is_rising
        and isinstance(x, Tensor)
        and x.dtype in HALVES
        and not _is_transformed()
    ):
        warn_if_drowned(x, plan.sigmas[0], "the first slope of the way up", "or a higher first level", stacklevel=3)
    return run_state(plan, denoiser, {"x": x}, noise, callback)["x"]


def run_state(
    plan: Plan, denoiser: Denoiser, state: Memory, noise: NoiseLike | None = None, callback: Callback | None = None
) -> Memory:
    """Run a Plan and return the auxiliary state too, so that the run can be continued or undone.

    Args:
        plan: from `compile_plan`, which starts from "x" alone; its `closed` form starts from a given auxiliary state.
        denoiser, noise, callback: see `run`.
        state: "x", and the auxiliary state by the names of `plan.auxiliary` where the Plan starts from it; tensors of
            x's shape and dtype.

    Returns:
        The final state: "x" and the values of `plan.auxiliary` (none after a step to sigma = 0).

    Raises:
        TypeError: as `run`; auxiliary state of another dtype than x's.
        ValueError: as `run`; auxiliary state that the Plan does not start from, or that is missing or of another shape.
    """
    check_plan(plan)
    check_memory(plan, state)
    check_callback(callback)
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma), got {type(denoiser).__name__}")
    check_coordinates(plan, denoiser)
    state = {name: plain(value) for name, value in state.items()}
    x = state["x"]
    draw = noise_for(plan, noise, x)
    if torch.compiler.is_compiling():
        return _loop(plan, denoiser, state, draw, callback)
    try:
        return (_loop if _is_traced(x) else fused_loop)(plan, denoiser, state, draw, callback)
    except RuntimeError as error:
        said = explain(error, x)
        if said is None:
            raise
        raise said from error


def _is_transformed() -> bool:
    """Whether someone vectorises or compiles the run, so that no value can be read, or nobody can say."""
    return torch.compiler.is_compiling() or not can_fuse() or torch._C._functorch.peek_interpreter_stack() is not None


def _is_traced(x: Tensor) -> bool:
    """Whether someone differentiates, vectorises or compiles the run, or x is not a plain tensor, or nobody can say."""
    if torch.is_grad_enabled() or _is_transformed() or not has_values(x):
        return True
    return forward_ad._current_level >= 0 or (type(x) is not Tensor and is_traceable_wrapper_subclass(x))


def _loop(plan: Plan, denoiser: Denoiser, state: Memory, draw: NoiseFunction, callback: Callback | None) -> Memory:
    """The run as it is read off the Plan: a new tensor for every value."""
    sigmas = stage_sigmas(plan.stage_levels, state["x"])
    first = 0
    for step in plan.steps:
        levels = sigmas[first : first + len(step.stages)]
        state, seen = advance(step, denoiser, state, draw, levels, watched=callback is not None)
        first += len(step.stages)
        if callback is not None and seen is not None:
            callback(Progress(step.index, step.sigma, step.sigma_next, *seen, evaluations=first))
    # A last step "x' = D" hands out the denoiser's own tensor, which the denoiser may reuse.
    rows = {"x": plan.steps[-1].x, **dict(plan.steps[-1].memory)}
    return {name: value.clone() if rows[name].alias() else value for name, value in state.items()}


def noise_for(plan: Plan, noise: NoiseLike | None, x: Tensor) -> NoiseFunction:
    """The noise function of a run; a deterministic Plan leaves torch's global generator alone."""
    if not plan.is_stochastic:
        return lambda sigma_from, sigma_to: x  # never called
    source = default_noise(plan.rule.default_noise) if noise is None else noise
    return bind(source, x, plan.noise_levels, plan.rule.noise_clip)
