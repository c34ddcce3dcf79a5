r"""How exactly a function answers: its noise, told from its shape by a second difference.

A network that computes in half precision, or that answers differently each time, is not a smooth function. Of

    F(u + e) + F(u - e) - 2 F(u)

a smooth F leaves `e^2 F''`, which is small next to e if e is small; noise leaves `sqrt(6)` times itself, however small
e is. So if a search no longer comes closer, a few evaluations tell whether that is noise.

Source: Moré and Wild, Estimating Computational Noise (2011), with one difference table over all values of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinvert.inversion.problem import Search
from kinvert.noise import white
from kinvert.tensors import per_sample, rms

__all__ = ["LONGEST", "NOISY", "is_confirmed", "is_noise", "measure_noise", "small_steps"]

NOISY = (
    "what is left is the denoiser's own noise, rounding or randomness; run the network in a wider dtype, or give a "
    "larger tol"
)
LONGEST = 0.01  # of e in parts of the size: shorter than that, a smooth F leaves little even where it bends
ROUGH = 0.1  # a second difference above this part of e is noise; that of a smooth F is of order e
MOST = 20.0  # noise explains a residual that is at most so many second differences


def small_steps(u: Tensor, length: Tensor) -> Tensor:
    """Return steps of the rms `length`, shape (batch,), in one direction for all samples of u, (batch, *event)."""
    direction = white(0).bind(u[:1])(1.0, 0.0)
    return direction * per_sample(length / rms(direction), u)


def is_noise(second: Tensor, length: Tensor, residual: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """Tell whether a second difference may be noise that explains a residual.

    Args:
        second: rms of the second difference.
        length: rms of e.
        residual: rms of the residual that may be noise.
        gain: by how much the residual magnifies the noise of the second difference.
    """
    return (second > ROUGH * length) & (residual <= MOST * gain * second)


def is_confirmed(second: Tensor, longer: Tensor) -> Tensor:
    """Tell whether a second difference over four times e confirms noise: that of a smooth F is 16 times as large."""
    return longer < 6 * second


def measure_noise(search: Search, index: Tensor, center: Tensor | None = None) -> Tensor:
    """Return the noise that the best iterates of the samples `index` are lost in, as an rms residual; 0 if F is smooth.

    It takes two evaluations of F, one more if `center`, F at the best iterates, is not known, and two to confirm what
    looks like noise. The best residual of a search on a noisy F is about its noise, so that is what is returned.
    """
    u, residual = search.u[index], search.residual[index].nan_to_num(0.0, 0.0, 0.0)
    length = residual.minimum(LONGEST * search.size[index])
    e = small_steps(u, length * (rms(u) / search.size[index]).clamp(min=1.0))  # F contracts by about that
    middle = search.call(u, index) if center is None else center

    def second(rows: Tensor, part: float) -> Tensor:
        some, step = index[rows], part * e[rows]
        total = search.call(u[rows] + step, some) + search.call(u[rows] - step, some)
        return rms(total - 2 * middle[rows])

    everyone = torch.arange(len(index), device=index.device)
    found = second(everyone, 1.0)
    suspects = is_noise(found, length, residual).nonzero()[:, 0]
    noise = torch.zeros_like(residual)
    if len(suspects):
        confirmed = is_confirmed(found[suspects], second(suspects, 4.0))
        noise[suspects] = torch.where(confirmed, residual[suspects], 0.0)
    return noise
