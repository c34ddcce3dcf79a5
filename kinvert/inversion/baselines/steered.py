"""RF-Inversion: the flow upwards, steered towards a given noise, and downwards, steered towards the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinvert.checks import is_number
from kinvert.coordinates import coordinates_of
from kinvert.denoisers import Denoiser, expand, guide
from kinvert.engine import check_state
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, in_ve
from kinvert.inversion.result import Inversion
from kinvert.rules import Euler
from kinvert.sampling import sample, unsample


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
    _unit("gamma", gamma)
    y = torch.randn_like(x) if noise is None else noise
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"noise must be a tensor of x's shape {tuple(x.shape)}, got {got}")
    bound: Any = guide(denoiser, cfg, positive, negative)

    def towards_noise(state: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(bound(state, sigma), state - expand(sigma, state) * y, gamma)

    latent = unsample(towards_noise, x, plan.sigmas, sampler=Euler(), sigma_offset=0.0)
    steered = steer(bound, x, plan.sigmas[-1], eta=eta, until=until)
    return certified(plan, x, latent, sample(steered, latent, plan.sigmas), plan.evaluations)


def steer(denoiser: Denoiser, image: Tensor, sigma_end: float, *, eta: float, until: float = 0.0) -> Denoiser:
    r"""A denoiser steered towards an image: RF-Inversion's controlled sampling, `(1 - eta) D + eta D_0`.

    `D_0 = x - sigma (x - image) / (sigma - sigma_end)` is what a denoiser would return from which every Euler run ends
    at the image. Sample with it, and with other conditioning, to edit. `eta=1` gives the image back, `eta=0` the
    denoiser.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        image: the state at `sigma_end`, shape (batch, *event).
        sigma_end: the last noise level of the run.
        eta: how far it is steered, 0 to 1.
        until: steer at noise levels from here up only.

    Raises:
        TypeError, ValueError: eta out of [0, 1], an image that is no batch of states; in a call, one that does not
            fit x.

    Source: Rout et al. (2024), arXiv 2410.10792, where sigma_end = 0.
    """
    _unit("eta", eta)
    image = check_state(image)

    def steered(x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        denoised: Any = denoiser(x, sigma, **conditioning)
        level = expand(sigma, x)
        if len(x) % len(image) or x.shape[1:] != image.shape[1:]:
            raise ValueError(f"image has shape {tuple(image.shape)}, which does not fit x's {tuple(x.shape)}")
        target = image.repeat(len(x) // len(image), *[1] * (x.ndim - 1))  # guidance may ask for two branches at once
        aim = torch.where(level > sigma_end, x - level * (x - target) / (level - sigma_end), target)
        return torch.where(level >= until, torch.lerp(denoised, aim, eta), denoised)

    steered.coordinates = coordinates_of(denoiser)  # type: ignore[attr-defined]  # its formula holds in both
    return steered


def _unit(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 (not steered) to 1, got {value!r}")
