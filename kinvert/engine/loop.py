r"""The loop that runs every sampler: a Plan, a denoiser and a state go in, the final state comes out.

There are denoiser calls and linear combinations here, nothing else. Noise levels are uploaded once, the coefficients
are Python floats, and the host reads no tensor. States in half precision are combined in float32 and rounded once.

A run is made in one of two ways, whose results agree to rounding:

* the plain loop, `_plain_loop`, follows the Plan as it is written and makes a new tensor for every value;
* `fused.fused_loop` runs the kernels that `kernels.program` lays out for the Plan, in memory that is used again from
  step to step. It is taken if nobody differentiates, vectorises or compiles the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kinvert import torch_hooks
from kinvert.checks import check_callback, has_values, plain
from kinvert.denoisers import Cfg, Denoiser, refuse_history
from kinvert.denoisers.dtypes import explain
from kinvert.engine.binding import bind
from kinvert.engine.contract import check_coordinates, check_memory, check_plan, check_room, warn_if_rising_drowns
from kinvert.engine.draws import noise_for
from kinvert.engine.fused import fused_loop
from kinvert.engine.recompute import check_recomputable, run_recomputing
from kinvert.engine.step import Callback, Memory
from kinvert.engine.stepwise import Stepwise
from kinvert.noise import Noise, NoiseFunction
from kinvert.plan import Plan

__all__ = ["plain_loop", "run", "run_state"]

_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def run(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    latent: Tensor | None = None,
    mask_noise: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Run a Plan: from `x` at `plan.sigmas[0]` to the state at `plan.sigmas[-1]`.

    This is the differentiable way to sample and to unsample. The gradient reaches x, the conditioning, `latent`, the
    network's parameters, and all else that the denoiser depends on.

    Args:
        plan: from `compile_plan`.
        denoiser: `denoiser(x, sigma) -> denoised` with x (batch, *event) and sigma (batch,); a Plan with `is_guided`
            needs a pair `Guided(denoised, uncond)`. sigma has x's dtype, float32 if x is in half precision. The
            denoiser may return the same memory at every call: outputs that a sampler reads again are copied unless
            the run alone holds them.
        x: the state, shape (batch, *event), floating point. It is not modified.
        noise: a noise source for stochastic Plans; None draws the rule's own kind (`Rule.default_noise`), seeded by
            torch's global generator.
        callback: called with a `Progress` after every step.
        cfg, positive, negative: as in `sample`; one scale for each step goes with `plan.sigmas`, the noisiest first.
        mask, latent, mask_noise: as in `sample`. A Plan that runs upwards keeps the clean region of `unsample` if
            `latent` is x.
        recompute: keep the states at the two ends of the run for the backward pass, which finds the others by undoing
            the steps of an algebraically reversible sampler. Memory then does not grow with the number of steps. A step
            is evaluated three times instead of once. `reversible_heun` takes two evaluations a step then instead of
            one.

    Returns:
        The final state, of x's shape, dtype and device. The result is not checked for NaN (`sample` and `unsample`
        do that). Gradients flow through it; a run under `torch.no_grad()` takes fewer passes over memory. With
        `recompute` it can be differentiated once. In the backward pass a RuntimeError says, with the number, that
        undoing did not lead to the state at the start: rounding was magnified, or the denoiser is random.

    Raises:
        TypeError: x that is not a floating point tensor; a denoiser that returns anything but a tensor of x's dtype
            (float32 is accepted for half-precision states), or that fails on x's dtype.
        ValueError: a denoiser or noise source that returns another shape than x's; conditioning and masks as in
            `sample`; `recompute` for a sampler that cannot be undone or draws noise, or x in half precision.

    Warns:
        RuntimeWarning: a run upwards in half precision whose rounding drowns it, with the number (one read of x).
    """
    warn_if_rising_drowns(plan, x)
    given = (positive, negative, mask, latent, mask_noise)
    if not (type(cfg) is float and cfg == 1.0) or any(value is not None for value in given):
        check_plan(plan)
        denoiser = bind(plan, denoiser, x, cfg, *given)
    if recompute:
        refuse_history(cfg, "run", "makes its evaluations again (recompute=True)")
    return run_state(plan, denoiser, {"x": x}, noise, callback, recompute=recompute)["x"]


def run_state(
    plan: Plan,
    denoiser: Denoiser,
    state: Memory,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    recompute: bool = False,
) -> Memory:
    """Run a Plan and return the auxiliary state too, so that the run can be continued or undone.

    Args:
        plan: from `compile_plan`, which starts from "x" alone; its `closed` form starts from a given auxiliary state.
        denoiser, noise, callback, recompute: see `run`.
        state: "x", and the auxiliary state by the names of `plan.auxiliary` if the Plan starts from it; tensors of
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
    check_room(x, plan)
    draw = noise_for(plan, noise, x)
    if recompute:
        check_recomputable(plan, x)
    if torch.compiler.is_compiling():
        return _plain_loop(plan, denoiser, state, draw, callback)
    try:
        if recompute and torch.is_grad_enabled():
            return run_recomputing(plan, denoiser, state, callback)
        return (_plain_loop if _is_watched(x) else fused_loop)(plan, denoiser, state, draw, callback)
    except RuntimeError as error:
        said = explain(error, x)
        if said is None:
            raise
        raise said from error


def _plain_loop(
    plan: Plan, denoiser: Denoiser, values: Memory, draw: NoiseFunction, callback: Callback | None
) -> Memory:
    """Run a Plan as it is written: a new tensor for every value."""
    run = Stepwise(plan, values, draw, callback)
    while not run.done:
        run.send(denoiser(run.x, run.sigma))
    return run.values


@contextmanager
def plain_loop() -> Iterator[None]:
    """Make all runs in this context by the plain loop: easier to debug, at the cost of memory and time."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def _is_watched(x: Tensor) -> bool:
    """Tell whether memory must not be used again: somebody differentiates, vectorises or compiles, or may do so."""
    return (
        torch.is_grad_enabled()
        or _PLAIN.get()
        or torch_hooks.is_transformed()
        or not torch_hooks.can_reuse_memory()
        or not has_values(x)
        or torch_hooks.is_forward_mode()
        or torch_hooks.is_wrapper(x)
    )
