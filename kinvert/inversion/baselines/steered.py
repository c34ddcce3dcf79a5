"""RF-Inversion: the flow upwards, steered towards a given noise, and downwards, steered towards the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinvert.denoisers import Denoiser, expand, guide
from kinvert.inversion.back import Steering, check_unit, steer
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, in_ve, noise_for
from kinvert.inversion.result import Inversion
from kinvert.rules import Euler
from kinvert.sampling import sample, unsample

__all__ = ["rf_inversion"]


@in_ve
@torch.no_grad()
def rf_inversion(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    gamma: float = 0.5,
    eta: float = 0.0,
    until: float = 0.0,
    noise: Tensor | None = None,
) -> Inversion:
    r"""RF-Inversion: up along a flow steered towards a given noise, and down along one steered towards the image.

    In flow time `dY = (v + gamma (v_1 - v)) dt` with `v_1 = (y_1 - Y) / (1 - t)`, by Euler's method. In variance-
    exploding coordinates v_1 has the slope `y_1` and the denoised image `x - sigma y_1`, so that it is an Euler run
    upwards with `(1 - gamma) D + gamma (x - sigma y_1)`. `gamma=0` is `ddim_inversion(at="clean")`, `gamma=1` adds
    `(sigmas[0] - sigmas[-1]) y_1` to the image.

    Args:
        gamma: how far it is steered upwards, 0 to 1.
        eta, until: how far the run that checks the latent is steered back, see `steer`. With the default 0 the error
            is that of the latent; above it, the sampler is shown the image.
        noise: `y_1`, unit variance, of x's shape; None draws it from torch's global generator.

    Source: Rout et al., Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations (2024),
    arXiv 2410.10792, where eta may change with t; the released pipelines steer in a part of the run only (`until`).
    """
    plan = checked_plan(x, Euler(), sigmas)
    check_unit("gamma", gamma)
    y = noise_for(x, noise)
    bound = guide(denoiser, cfg, positive, negative, batch=len(x))

    def towards_noise(state: Tensor, sigma: Tensor) -> Tensor:
        denoised: Any = bound(state, sigma)
        return torch.lerp(denoised, state - expand(sigma, state) * y, gamma)

    latent = unsample(towards_noise, x, plan.sigmas, sampler=Euler(), sigma_offset=0.0)
    steered = steer(bound, x, plan.sigmas[-1], eta=eta, until=until)
    back = sample(steered, latent, plan.sigmas)
    return certified(plan, x, latent, back, plan.evaluations, steering=Steering(eta, until) if eta else None)
