r"""Gradients of a run whose states are not kept: the backward pass undoes the steps and makes them again.

The steps of an algebraically reversible sampler have an inverse in closed form, so the states at the end of a run
determine all earlier ones. The forward pass keeps the states at both ends, whatever the number of steps. The backward
pass goes from the last step to the first: it undoes a step, makes it again with a graph, and goes backwards through
that. `torch.utils.checkpoint` around each step does the second and the third; so gradients reach x, the parameters, the
conditioning and all else that a denoiser depends on, as in a run that keeps everything.

An undone state is exact up to rounding, which the sampler may magnify. So the state at the start, which is known, is
compared with the one that was found by undoing all steps.

Source: Zhuang et al., MALI: A memory efficient and reverse accurate integrator for Neural ODEs (2021), arXiv
2102.04668.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from kinvert.analysis import explicit_inverse
from kinvert.checks import has_values
from kinvert.denoisers import Denoiser
from kinvert.engine.step import Callback, Memory, Progress, advance, stage_sigmas
from kinvert.plan import Plan, Step, compile_auxiliary
from kinvert.tensors import is_half, rms

__all__ = [
    "OnceDifferentiable",
    "check_recomputable",
    "refuse_second_derivatives",
    "run_recomputing",
    "started_state",
]


def check_recomputable(plan: Plan, x: Tensor) -> None:
    """Raise ValueError or RuntimeError if the states of a run cannot be found from its end."""
    if not plan.auxiliary:
        raise ValueError(
            f"recompute=True undoes the steps of an algebraically reversible sampler, and {plan.rule.name} is none; "
            "take 'o_belm', 'bdia', 'edict' or another, or leave recompute out and put torch.utils.checkpoint around "
            "the denoiser"
        )
    if plan.is_stochastic:
        raise ValueError(
            f"recompute=True undoes steps, and {plan.rule.name} draws noise, which is not kept; leave recompute out "
            "and put torch.utils.checkpoint around the denoiser"
        )
    if is_half(x.dtype):
        raise ValueError(
            f"recompute=True undoes steps, which rounding in {x.dtype} does not allow; give x in float32 or float64 "
            "(the network may compute in half precision)"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError("recompute=True cannot be compiled; compile the network, and call ki.run as it is")
    _undoing(plan)


def _undoing(plan: Plan) -> tuple[Step, ...]:
    """Return the steps that undo those of `plan.closed`, the last first; a step to 0 has no inverse and is left out."""
    closed = plan.closed
    undone = closed.steps[:-1] if plan.sigmas[-1] == 0 else closed.steps
    if not undone:
        return ()
    return explicit_inverse(replace(closed, sigmas=plan.sigmas[: len(undone) + 1], steps=undone)).steps


def run_recomputing(plan: Plan, denoiser: Denoiser, state: Memory, callback: Callback | None) -> Memory:
    """Run the Plan of a reversible sampler with a graph that keeps the two ends only; see `run`.

    Args:
        plan: that `check_recomputable` accepts.
        denoiser, callback: see `run`.
        state: see `run_state`.

    Returns:
        The final state. It can be differentiated once.
    """
    steps, undo, x = plan.closed.steps, _undoing(plan), state["x"]
    if len(state) == 1:
        state = {"x": x, **started_state(plan, denoiser, x, plan.sigmas[0])[0]}
    levels = stage_sigmas([stage.sigma for step in steps for stage in step.stages], x)
    way, done = _WayBack(plan.rule.name, undo, denoiser, state), 0
    state = dict(zip(state, _Checked.apply(way, *state.values()), strict=True))
    for number, step in enumerate(steps):
        sigmas = levels[done : done + len(step.stages)]
        done += len(step.stages)
        if number == len(undo):
            way.keep(state)
        state, seen = _make(number, step, denoiser, way, state, sigmas, callback is not None)
        if callback is not None and seen is not None:
            callback(Progress(step.index, step.sigma, step.sigma_next, *seen, evaluations=done))
    if len(undo) == len(steps):
        way.keep(state)
    return {name: OnceDifferentiable.apply(value) for name, value in state.items()}


def started_state(plan: Plan, denoiser: Denoiser, x: Tensor, sigma: float) -> tuple[Memory, int]:
    """Return the auxiliary state that the sampler starts at x with noise level `sigma`, and its evaluations."""
    step = compile_auxiliary(plan.rule, sigma)
    sigmas = stage_sigmas([stage.sigma for stage in step.stages], x)

    def start(x: Tensor, sigmas: Tensor) -> Memory:
        return advance(step, denoiser, {"x": x}, _no_noise, sigmas)[0]

    if step.stages and torch.is_grad_enabled():
        state: Memory = checkpoint(start, x, sigmas, use_reentrant=False)
    else:
        state = start(x, sigmas)
    return {name: value for name, value in state.items() if name != "x"}, len(step.stages)


def _make(
    number: int, step: Step, denoiser: Denoiser, way: _WayBack, state: Memory, sigmas: Tensor, watched: bool
) -> tuple[Memory, tuple[Tensor, Tensor] | None]:
    """Make one step; the backward pass makes it again, from the state that `way` finds."""
    given = [state]
    differentiated = [name for name, value in state.items() if value.requires_grad]

    def make(sigmas: Tensor) -> tuple[Memory, tuple[Tensor, Tensor] | None]:
        if given:  # the forward pass, after which nothing here holds the state
            values = given.pop()
        else:
            cpu, (devices, states) = torch.get_rng_state(), get_device_states(sigmas)
            values = {name: value.detach() for name, value in way.before(number).items()}
            torch.set_rng_state(cpu)  # dropout has to be the same once more
            set_device_states(devices, states)
            for name in differentiated:
                values[name].requires_grad_()
        return advance(step, denoiser, values, _no_noise, sigmas, watched)

    made: tuple[Memory, tuple[Tensor, Tensor] | None] = checkpoint(make, sigmas, use_reentrant=False)
    return made


def _no_noise(sigma_from: float, sigma_to: float) -> Tensor:
    raise RuntimeError("a step that is undone draws no noise")


class _WayBack:
    """The states of a run, found from its end by undoing steps.

    Attributes:
        start, end: the states at both ends.
    """

    def __init__(self, name: str, undo: Sequence[Step], denoiser: Denoiser, start: Memory) -> None:
        self._name, self._undo, self._denoiser = name, undo, denoiser
        self.start = {name: value.detach() for name, value in start.items()}
        self.end: Memory = {}
        self._state: Memory = {}
        self._at = -1  # the step before which `_state` is; -1: there is none
        self._checked = False  # whether the last way back was checked

    def keep(self, end: Memory) -> None:
        """Keep the state after the last step that can be undone; copies, since the caller may write to his result."""
        self.end = {name: value.detach().clone() for name, value in end.items()}

    @torch.no_grad()
    def before(self, number: int) -> Memory:
        """Return the state before a step; they are asked for from the last to the first."""
        if not 0 <= number <= self._at:  # also if the backward pass is made once more
            self._state, self._at, self._checked = self.end, len(self._undo), False
        while self._at > number:
            step = self._undo[len(self._undo) - self._at]
            sigmas = stage_sigmas([stage.sigma for stage in step.stages], self._state["x"])
            self._state, _ = advance(step, self._denoiser, self._state, _no_noise, sigmas)
            self._at -= 1
        state = self._state
        if number == 0:
            self._state, self._at, self._checked = {}, -1, True
            self._check(state)
        return state

    def finish(self) -> None:
        """Go back to the start, if no step asked for it, and check the state there."""
        if not self._checked:
            self.before(0)

    def _check(self, state: Memory) -> None:
        """Raise RuntimeError if the run, undone, starts elsewhere: half of the digits have to be right."""
        x = self.start["x"]
        if not self._undo or not has_values(x):
            return
        size, half = rms(self.end["x"]), torch.finfo(x.dtype).eps ** 0.5
        for name, value in self.start.items():
            error, allowed = rms(state[name] - value), half * torch.maximum(rms(value), size)
            if not bool((error <= allowed).all()):
                i = int((error / allowed).nan_to_num(torch.inf).argmax())
                raise RuntimeError(
                    f"the states of {self._name} were not recovered: undone, the run of sample {i} starts with an rms "
                    f"error in {name!r} of {float(error[i]):.2g}, allowed {float(allowed[i]):.2g}, so its gradient "
                    "would be wrong. Either the denoiser does not answer the same twice (dropout? use .eval()), or "
                    "the sampler magnifies rounding: take float64, fewer steps or another reversible sampler, or leave "
                    "recompute out and put torch.utils.checkpoint around the denoiser"
                )


class _Checked(torch.autograd.Function):
    """The state at the start, whose gradient is known at last: then the way back is checked."""

    @staticmethod
    def forward(ctx: Any, way: _WayBack, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.way = way
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.way.finish()
        return None, *gradients


def refuse_second_derivatives(fix: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: this result can be differentiated only once, since its graph does not hold all that a "
            f"second derivative needs; {fix}"
        )


class OnceDifferentiable(torch.autograd.Function):
    """A copy of a tensor whose gradient has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a copy."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient; raise RuntimeError if it is to be differentiated again."""
        refuse_second_derivatives("leave recompute out of ki.run")
        return gradient
