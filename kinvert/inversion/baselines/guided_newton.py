"""Guided Newton-Raphson inversion: one scalar equation a step, with a prior on how far the noise leads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_count, check_number, plain
from kinvert.denoisers import Denoiser, Guidance, guide
from kinvert.denoisers.buffers import call_to_keep
from kinvert.engine import run
from kinvert.inversion.baselines.common import Conditioning, certified, checked_plan, in_ve
from kinvert.inversion.result import Inversion
from kinvert.plan import Step
from kinvert.rules import Euler
from kinvert.tensors import per_sample, rms

__all__ = ["gnri"]


@in_ve
@torch.no_grad()
def gnri(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    cfg: float = 1.0,
    positive: Conditioning = None,
    negative: Conditioning = None,
    iterations: int = 2,
    weight: float = 0.1,
    through: bool = False,
) -> Inversion:
    r"""GNRI: Newton-Raphson steps on one number a sample, the size of the residual and how unlikely the state is.

    With `G(u) = x_b + (a - b) d(u, a)`, whose fixed point is the inverse step, and the image x0, the number is the sum
    over the N values of a sample

        S(u) = sum_i |G_i - u_i| + weight / 2 ((G_i - x0_i) / a)^2,

    the second term being that of `-log q(x_a | x0)`. It starts from u = x_b, and every value takes a step as if it were
    alone, `u_i <- u_i - S / (N dS/du_i)`. The state that is returned is G(u) of the u with the least S. The number adds
    a distance to a logarithm, so the method depends on the unit of x; the prior is not 0 at the solution, so more
    iterations do not make it exact. `residuals` are those of that u.

    The released code evaluates the network without gradients, so that `dS/du_i` is `-sign(G_i - u_i)` there and a step
    adds the mean of S over the values, with the sign of the residual. That is the default; its results were compared
    with those of the released code. `through=True` differentiates the denoiser, as the publication has it, for a pass
    backwards with each evaluation but the last of a step. A value whose derivative is 0 stays.

    Args:
        iterations: evaluations a step.
        weight: of the prior.
        through: whether the derivative goes through the denoiser, which has to be differentiable.

    Raises:
        TypeError: `through` and a denoiser without gradients.

    Source: Samuel et al., Lightning-Fast Image Inversion and Editing for Text-to-Image Diffusion Models (2023), arXiv
    2312.12540; the released code for SDXL Turbo, which has the constants.
    """
    plan, bound = checked_plan(x, Euler(), sigmas), guide(denoiser, cfg, positive, negative, batch=len(x))
    iterations, weight = check_count("iterations", iterations), check_number("weight", weight, low=0)
    x = plain(x)
    state = x
    residuals: list[Tensor] = []
    for step in reversed(plan.steps):
        state, residual = _solved(bound, state, x, step, iterations, weight, through)
        residuals.insert(0, residual)
    return certified(plan, x, state, run(plan, bound, state), iterations * len(plan.steps), residuals)


def _solved(
    denoiser: Guidance, below: Tensor, image: Tensor, step: Step, iterations: int, weight: float, through: bool
) -> tuple[Tensor, Tensor]:
    """Return G(u) of the u with the least number, and the rms of its residual."""
    sigma = below.new_full((len(below),), step.sigma)
    u, best, least = below, below, below.new_full((len(below),), torch.inf)
    residual = least
    for i in range(iterations):
        with torch.set_grad_enabled(through):
            u = u.detach().requires_grad_(through)
            denoised: Any = call_to_keep(denoiser, u, sigma)
            g = below + (step.sigma - step.sigma_next) * (u - denoised) / step.sigma
            number = ((g - u).abs() + weight / 2 * ((g - image) / step.sigma).square()).flatten(1).mean(1)
        better = number < least
        least, residual = (
            torch.where(better, number, least).detach(),
            torch.where(better, rms(g - u), residual).detach(),
        )
        best = torch.where(per_sample(better, g), g, best).detach()
        if i < iterations - 1:
            slope = _slope(number, u, denoised) if through else -(g - u).sign() / g[0].numel()
            u = torch.where(slope == 0, u, u - per_sample(number, u) / (slope * g[0].numel()))
    return best, residual


def _slope(number: Tensor, u: Tensor, denoised: Tensor) -> Tensor:
    """Return the derivative of each sample's number with respect to u."""
    if not denoised.requires_grad:
        raise TypeError(
            "through=True needs a denoiser whose result depends on x in its graph: no torch.no_grad(), inference mode "
            "or detach() inside; the default, through=False, needs none"
        )
    (slope,) = torch.autograd.grad(number, u, torch.ones_like(number))
    return slope
