"""Inversions that are one run upwards: DDIM inversion in both meanings, EasyInv, RF-Solver, FireFlow, Uni-Inv, TABA."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kinvert.checks import check_choice, check_count
from kinvert.denoisers import Denoiser, guide
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, ddim_up, in_ve, noise_for
from kinvert.inversion.result import Inversion
from kinvert.plan import compile_plan
from kinvert.rules import DDIMInverse, Euler, FireFlow, RFSolver, Rule, UniInv
from kinvert.sampling import sample, unsample

__all__ = ["ddim_inversion", "easyinv", "fireflow", "forward_first", "rf_solver", "uni_inv"]


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


@in_ve
def uni_inv(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
) -> Inversion:
    """Uni-Inv: Euler's method upwards, with the velocity at the noisier end, which the last velocity predicts.

    See the rule `UniInv`; the sampler is `euler`. It is written in flow time, as published. The region-aware editing
    of the paper, Uni-Edit, is left out.

    Source: Jiao et al., UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models (2025), arXiv
    2504.13109.
    """
    return _unsampled(denoiser, x, sigmas, UniInv(), Euler(), cfg, positive, negative)


@in_ve
@torch.no_grad()
def forward_first(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    forward: int = 1,
    noise: Tensor | None = None,
) -> Inversion:
    r"""Forward first (TABA): noise in place of the first steps of DDIM inversion ("noisy").

    The first steps up predict too little noise where the image is plain, and the latent keeps its shape. So the first
    `forward` of them are replaced by the forward process, `x_k = x + sqrt(sigma_k^2 - sigma_n^2) noise` from the level
    sigma_n of the image, and DDIM inversion goes on from there. The latent is a likelier one, and what the
    noise covers is lost.

    Args:
        forward: how many steps up are replaced, from 0, which is `ddim_inversion(at="noisy")`, to all of them.
        noise: unit variance, of x's shape; None draws it from torch's global generator.

    Source: Staniszewski, Kuciński and Deja, There and Back Again: On the Relation between Noise and Image Inversions in
    Diffusion Models (2024), arXiv 2410.23530.
    """
    plan, bound = checked_plan(x, Euler(), sigmas), guide(denoiser, cfg, positive, negative, batch=len(x))
    forward, rising = check_count("forward", forward, 0), plan.sigmas[::-1]
    if forward >= len(rising):
        raise ValueError(f"forward must be at most the number of steps, {len(rising) - 1}, got {forward}")
    latent = x + math.sqrt(rising[forward] ** 2 - rising[0] ** 2) * noise_for(x, noise)
    if forward < len(rising) - 1:
        latent = ddim_up(bound, latent, *rising[forward:])
    back = sample(bound, latent, plan.sigmas)
    return certified(plan, x, latent, back, len(rising) - 1 - forward)


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
