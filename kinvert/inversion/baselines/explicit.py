"""Inversions that are one run upwards: DDIM inversion in both meanings, EasyInv, RF-Solver, FireFlow."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kinvert.checks import check_choice
from kinvert.denoisers import Denoiser, guide
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, in_ve
from kinvert.inversion.result import Inversion
from kinvert.plan import compile_plan
from kinvert.rules import DDIMInverse, Euler, FireFlow, RFSolver, Rule
from kinvert.sampling import sample, unsample

__all__ = ["ddim_inversion", "easyinv", "fireflow", "rf_solver"]


@in_ve
def ddim_inversion(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    at: Literal["clean", "noisy"] = "noisy",
) -> Inversion:
    """DDIM inversion, `x_a = x_b + (a - b) d`, in both meanings of the word.

    Args:
        at: the noise level that the denoiser is told. "clean": `d(x_b, b)`, the Euler step up, as `unsample` and hosts
            that flip the schedule have it. "noisy": `d(w x_b, a)`, as Prompt-to-Prompt and the inverse scheduler of
            diffusers have it: the network gets the variance-preserving latent as it is, hence `w` (see `DDIMInverse`).

    Source: Song, Meng and Ermon, Denoising Diffusion Implicit Models (2020), arXiv 2010.02502; "noisy": Mokady et al.,
    Null-text Inversion for Editing Real Images using Guided Diffusion Models (2022), arXiv 2211.09794.
    """
    rules: dict[str, Rule] = {"clean": Euler(), "noisy": DDIMInverse()}
    check_choice("at", at, rules)
    return _unsampled(denoiser, x, sigmas, rules[at], Euler(), cfg, positive, negative)


@in_ve
def easyinv(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    keep: float = 0.5,
    start: float = 0.05,
    stop: float = 0.25,
) -> Inversion:
    """EasyInv: DDIM inversion ("noisy") that mixes a new latent with the one before, `keep x_a + (1 - keep) w x_b`.

    The mean is of variance-preserving latents. Early noise counts less, the latent keeps more of the image; it is not
    the solution of another equation, and more steps do not make it exact.

    Args:
        keep: weight of the new latent.
        start, stop: the steps up that mix, as a part of all; those of the released code for Stable Diffusion 1.4.

    Source: Zhang et al., EasyInv: Toward Fast and Better DDIM Inversion (2024), arXiv 2408.05159.
    """
    rule = DDIMInverse(keep=keep, start=start, stop=stop)
    return _unsampled(denoiser, x, sigmas, rule, Euler(), cfg, positive, negative)


@in_ve
def rf_solver(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
) -> Inversion:
    """RF-Solver: the sampler `rf_solver` run upwards, without the sharing of attention that the paper edits with.

    Source: Wang et al., Taming Rectified Flow for Inversion and Editing (2024), arXiv 2411.04746.
    """
    return _unsampled(denoiser, x, sigmas, RFSolver(), RFSolver(), cfg, positive, negative)


@in_ve
def fireflow(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
) -> Inversion:
    """FireFlow: the sampler `fireflow` run upwards.

    Source: Deng et al., FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing (2024), arXiv 2412.07517.
    """
    return _unsampled(denoiser, x, sigmas, FireFlow(), FireFlow(), cfg, positive, negative)


@torch.no_grad()
def _unsampled(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    up: Rule,
    down: Rule,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
) -> Inversion:
    """Make one run of `up` upwards, and check it by one of `down` downwards."""
    plan, bound = checked_plan(x, down, sigmas), guide(denoiser, cfg, positive, negative, batch=len(x))
    latent = unsample(bound, x, plan.sigmas, sampler=up, sigma_offset=0.0)
    back = sample(bound, latent, plan.sigmas, sampler=down)
    return certified(plan, x, latent, back, compile_plan(up, plan.sigmas[::-1]).evaluations)
