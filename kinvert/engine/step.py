"""One step of a Plan on tensors, and what a callback is told of it."""

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
from kinvert.plan import Stage, Step
from kinvert.tensors import wide_dtype


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback receives once a step: the state that the step's first evaluation saw, and its result.

    The tensors are copies: what a callback writes into them changes nothing else.

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


Callback = Callable[[Progress], None]
Memory = dict[str, Tensor]


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
    x = state["x"]
    known: dict[Symbol, Tensor] = {State(name): value for name, value in state.items()}
    seen = None
    for r, interval in enumerate(step.noises):
        known[Noise(r)] = checked_noise(draw, interval, x).clone()  # a source may use its memory again
    for k, stage in enumerate(step.stages):
        stage_x = combine(stage.input, known, x)
        outputs: list[Any] = list(evaluate(denoiser, stage_x, sigmas[k].clone(), stage, step))
        if outlives(step, k):
            keep(outputs)
        known[Denoised(k)], uncond = outputs
        if uncond is not None:
            known[Uncond(k)] = uncond
        if seen is None:
            pair = stage_x, known[Denoised(k)]
            seen = (pair[0].clone(), pair[1].clone()) if watched else pair
    new = {name: combine(form, known, x) for name, form in (("x", step.x), *step.memory)}
    return new, seen


def combine(form: Form, known: dict[Symbol, Tensor], like: Tensor) -> Tensor:
    """The value of a form, in `like`'s dtype. `1 * symbol` is the tensor itself, not a copy."""
    alias = form.alias()
    if alias is not None and known[alias].dtype == like.dtype:
        return known[alias]
    wide = wide_dtype(like.dtype)
    total: Tensor | None = None
    for symbol, c in form:
        total = known[symbol].to(wide) * c if total is None else total.add_(known[symbol], alpha=c)
    return torch.zeros_like(like) if total is None else total.to(like.dtype)


def stage_sigmas(sigmas: Sequence[float], x: Tensor) -> Tensor:
    """Noise levels as the denoiser gets them, shape (stages, batch), on x's device: one upload for the whole run."""
    dtype = wide_dtype(x.dtype)
    column = torch.tensor(sigmas, dtype=torch.float64).to(dtype).to(x.device)
    return column[:, None].expand(-1, x.shape[0]).contiguous()


def evaluate(denoiser: Denoiser, x: Tensor, sigma: Tensor, stage: Stage, step: Step) -> tuple[Tensor, Tensor | None]:
    """Call the denoiser and check what it returns."""
    return check_outputs(denoiser(x, sigma), x, stage, step)
