"""One step of a Plan on tensors: what to evaluate, what to do with the result, and what a callback is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser
from kinvert.denoisers.buffers import keep
from kinvert.engine.contract import check_outputs, checked_noise
from kinvert.engine.kernels import outlives
from kinvert.forms import Denoised, Form, Noise, State, Symbol, Uncond
from kinvert.noise import NoiseFunction
from kinvert.plan import Step
from kinvert.showing.brief import brief_repr
from kinvert.tensors import wide_dtype

__all__ = ["Callback", "Memory", "OpenStep", "Progress", "advance", "combine", "draw_noises", "stage_sigmas"]


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback receives once a step: the state that the step's first evaluation saw, and its result.

    The tensors are copies: a callback may write into them.

    Attributes:
        index: number of the step, from 0.
        sigma, sigma_next: noise levels of the step (floats).
        x: shape (batch, *event), before the update (after churn).
        denoised: shape (batch, *event).
        evaluations: of the denoiser, so far in this run.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor
    evaluations: int

    __repr__ = brief_repr


Callback = Callable[[Progress], None]
Memory = dict[str, Tensor]


class OpenStep:
    """A step under way: the values that it started from, its noises, and what the denoiser returned so far.

    Attributes:
        step: the step.
        stage: number of the next evaluation; `len(step.stages)` after the last one.
        x: the input of the next evaluation; after the last evaluation, the input of that one.
        known: the values of all symbols so far.
        seen: (x, denoised) of the first evaluation, None before it. Copies if `watched`; else they hold until the next
            evaluation.
    """

    def __init__(self, step: Step, values: Memory, noises: Sequence[Tensor], watched: bool = False) -> None:
        self.step, self.watched = step, watched
        self.stage = 0
        self.seen: tuple[Tensor, Tensor] | None = None
        self.like = self.x = values["x"]
        self.known: dict[Symbol, Tensor] = {State(name): value for name, value in values.items()}
        for r, noise in enumerate(noises):
            self.known[Noise(r)] = noise
        self._prepare()

    def _prepare(self) -> None:
        """Compute the input of the next evaluation."""
        if self.stage < len(self.step.stages):
            self.x = combine(self.step.stages[self.stage].input, self.known, self.like)

    def take(self, outputs: list[Any]) -> None:
        """Take what the denoiser returned for `x`; raise as `check_outputs` does, and leave the step as it is then.

        The list must hold the caller's only reference to it, and is emptied: an output that somebody else holds is
        copied if a later evaluation may overwrite it.
        """
        step, k = self.step, self.stage
        results: list[Any] = list(check_outputs(outputs.pop(), self.x, step.stages[k], step))
        if outlives(step, k):
            keep(results)
        self.known[Denoised(k)], uncond = results
        if uncond is not None:
            self.known[Uncond(k)] = uncond
        if self.seen is None:
            denoised = self.known[Denoised(k)]
            self.seen = (self.x.clone(), denoised.clone()) if self.watched else (self.x, denoised)
        self.stage += 1
        self._prepare()

    def end(self) -> Memory:
        """Compute the state after the step: "x" and what the sampler remembers."""
        rows = ("x", self.step.x), *self.step.memory
        return {name: combine(form, self.known, self.like) for name, form in rows}


def advance(
    step: Step, denoiser: Denoiser, state: Memory, draw: NoiseFunction, sigmas: Tensor, watched: bool = False
) -> tuple[Memory, tuple[Tensor, Tensor] | None]:
    """Make one step of a Plan.

    Args:
        step: the step.
        denoiser: see `run`.
        state: "x" and the remembered values.
        draw: noise function `(sigma_from, sigma_to) -> Tensor`.
        sigmas: noise levels of the step's stages, shape (stages, batch), from `stage_sigmas`.
        watched: return copies of what the first evaluation saw and gave.

    Returns:
        The new state, and the pair (x, denoised) of the first evaluation (None for a step without evaluations), which
        holds until the next evaluation if it is not a copy.
    """
    current = OpenStep(step, state, draw_noises(step, draw, state["x"]), watched)
    for k in range(len(step.stages)):
        current.take([denoiser(current.x, sigmas[k].clone())])
    return current.end(), current.seen


def draw_noises(step: Step, draw: NoiseFunction, x: Tensor) -> list[Tensor]:
    """Draw the noises of a step, each into a tensor of its own: a source may use its memory again."""
    return [checked_noise(draw, interval, x).clone() for interval in step.noises]


def combine(form: Form, known: dict[Symbol, Tensor], like: Tensor) -> Tensor:
    """Compute the value of a form in `like`'s dtype. `1 * symbol` is the tensor itself, not a copy."""
    alias = form.alias()
    if alias is not None and known[alias].dtype == like.dtype:
        return known[alias]
    wide = wide_dtype(like.dtype)
    total: Tensor | None = None
    for symbol, c in form:
        total = known[symbol].to(wide) * c if total is None else total.add_(known[symbol], alpha=c)
    return torch.zeros_like(like) if total is None else total.to(like.dtype)


def stage_sigmas(sigmas: Sequence[float], x: Tensor) -> Tensor:
    """Return noise levels in the dtype of denoisers, shape (stages, batch), on x's device: one upload for them all.

    The samples share the memory of a level, which is one number. A denoiser gets a clone of a row.
    """
    dtype = wide_dtype(x.dtype)
    column = torch.tensor(sigmas, dtype=torch.float64, device="cpu").to(dtype).to(x.device)
    return column[:, None].expand(-1, x.shape[0])
