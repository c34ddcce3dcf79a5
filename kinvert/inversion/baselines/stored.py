"""Inversions that keep what corrects them: direct inversion (an offset a step), null-text (an embedding a step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_count, check_positive
from kinvert.denoisers import Denoiser, guide
from kinvert.engine import advance, stage_sigmas
from kinvert.inversion.back import guided_step, sample_embedded
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, ddim_path, in_ve
from kinvert.inversion.result import Inversion
from kinvert.noise import replay
from kinvert.plan import compile_plan
from kinvert.rules import DirectInversion, Euler
from kinvert.sampling import sample

__all__ = ["direct_inversion", "null_text", "sample_null_text"]


@in_ve
@torch.no_grad()
def direct_inversion(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
) -> Inversion:
    """Direct (PnP) inversion: DDIM inversion without guidance, and each sampling step's distance from its path.

    The offsets, `noises` of the result, make `sample` with the rule `DirectInversion` and the same denoiser and cfg
    return the image, however far off the latent is: they hold what it does not, one image a step. To edit, sample the
    image along with its edit, and give the offsets to the first.

        ki.sample(denoiser, found.latent, sigmas, sampler=ki.rules.DirectInversion(), cfg=cfg, ...,
                  noise=ki.noise.replay(found.noises))

    Source: Ju et al., Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code (2023), arXiv 2310.01506.
    """
    plan = compile_plan(DirectInversion(), checked_plan(x, Euler(), sigmas).sigmas)
    bound = guide(denoiser, cfg, positive, negative, batch=len(x))
    path = ddim_path(denoiser, x, plan, positive)
    state, offsets = {"x": path[0]}, []
    for step, target in zip(plan.steps, path[1:], strict=True):
        state, _ = advance(step, bound, state, lambda *_: torch.zeros_like(x), stage_sigmas([step.sigma], x))
        offsets.append(target - state["x"])
        state = {"x": state["x"] + offsets[-1]}
    back = sample(bound, path[0], plan.sigmas, sampler=plan.rule, noise=replay(offsets))
    return certified(plan, x, path[0], back, 2 * plan.evaluations, noises=tuple(offsets))


@in_ve
def null_text(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 7.5,
    positive: Conditioning = None,
    negative: Conditioning = None,
    iterations: int = 10,
    lr: float = 0.01,
) -> Inversion:
    """Null-text inversion: DDIM inversion without guidance, and a negative conditioning optimised for each step.

    Every floating point tensor of `negative` is optimised, by Adam, so that the guided step lands on the path of the
    inversion; a step starts from what the one before found. `embeddings` holds them by keyword, shape (steps, batch,
    ...); `Inversion.sample` and `sample_null_text` sample with them. The released code ends a step early if the loss is
    small.

    Args:
        denoiser: differentiable in its conditioning; its own parameters need no gradients.
        iterations: optimisation steps for each sampling step.
        lr: Adam's step length in the first step; it falls linearly to a half.

    Raises:
        TypeError: `negative` has no floating point tensor, e.g. because it is a label.

    Source: Mokady et al., Null-text Inversion for Editing Real Images using Guided Diffusion Models (2022), arXiv
    2211.09794.
    """
    plan = checked_plan(x, Euler(), sigmas)
    iterations = check_count("iterations", iterations)
    lr = check_positive("lr", lr)
    fixed = guide(denoiser, cfg, positive, {} if negative is None else negative).negative or {}
    tensors = {key: v for key, v in fixed.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not tensors:
        raise TypeError(
            f"negative must have a floating point tensor to optimise, got {', '.join(fixed) or 'nothing'}; pass the "
            "embedding, not the label"
        )
    path = ddim_path(denoiser, x, plan, positive)
    state, value, found = path[0], {key: _per_sample(v.detach(), len(x)) for key, v in tensors.items()}, []
    for step, target in zip(plan.steps, path[1:], strict=True):
        value = {key: v.clone().requires_grad_() for key, v in value.items()}
        adam = torch.optim.Adam(value.values(), lr=lr * (1.0 - step.index / (2 * len(plan.steps))))
        for _ in range(iterations):
            with torch.enable_grad():
                miss = guided_step(step, denoiser, state, cfg, positive, {**fixed, **value}) - target
            _set_gradients(value, miss.square().flatten(1).mean(1).sum())
            adam.step()
        value = {key: v.detach() for key, v in value.items()}
        with torch.no_grad():
            state = guided_step(step, denoiser, state, cfg, positive, {**fixed, **value})
        found.append(value)
    embeddings = {key: torch.stack([v[key] for v in found]) for key in value}
    back = sample_null_text(denoiser, path[0], plan.sigmas, embeddings, cfg=cfg, positive=positive, negative=fixed)
    return certified(plan, x, path[0], back, (iterations + 2) * plan.evaluations, embeddings=embeddings)


def _per_sample(value: Tensor, batch: int) -> Tensor:
    """Repeat a conditioning that all samples share for each of them."""
    return value.expand(batch, *value.shape[1:]) if value.ndim and len(value) == 1 else value


def _set_gradients(value: dict[str, Tensor], loss: Tensor) -> None:
    """Set the gradients of the conditioning only; those of the network's parameters stay as they are."""
    gradients = torch.autograd.grad(loss, list(value.values()), allow_unused=True) if loss.requires_grad else []
    if all(gradient is None for gradient in gradients):
        raise TypeError(
            "the denoiser does not depend on negative in a way that can be differentiated; take a cfg other than 1, "
            "and no torch.no_grad() inside the denoiser"
        )
    for tensor, gradient in zip(value.values(), gradients, strict=True):
        tensor.grad = gradient


@in_ve
@torch.no_grad()
def sample_null_text(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    embeddings: Mapping[str, Tensor],
    *,
    cfg: float = 7.5,
    positive: Conditioning = None,
    negative: Conditioning = None,
) -> Tensor:
    """Sample, by Euler's method, with a negative conditioning for each step: `null_text(...).embeddings`."""
    plan = checked_plan(x, Euler(), sigmas)
    return sample_embedded(plan, denoiser, x, embeddings, cfg=cfg, positive=positive, negative=negative)
