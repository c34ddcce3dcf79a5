"""Exact denoisers in flow time, shared by the tests of flow models."""

from __future__ import annotations

import torch
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import from_velocity

LEVELS = ki.levels.flow(3.0)

TIMES = ki.schedule("simple", 20, LEVELS)

MEAN, STD = 0.3, 0.5


def gaussian_network(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data N(0.3, 0.5²), told 1000 t."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)) / 1000
    variance = ((1 - t) * STD) ** 2 + t**2
    away = x - (1 - t) * MEAN
    return (away * (1 - (1 - t) * STD**2 / variance) + (1 - t) * MEAN - MEAN) / t


def mixture_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Of x0 in one dimension: 0.3 N(-0.6, 0.2²) + 0.7 N(0.5, 0.4²)."""
    means, stds, weights = (torch.tensor(v, dtype=x.dtype) for v in ((-0.6, 0.5), (0.2, 0.4), (0.3, 0.7)))
    t = t[:, None]
    variance = ((1 - t) * stds) ** 2 + t**2
    away = x - (1 - t) * means
    share = (weights.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(1)
    return (share * (means + (1 - t) * stds**2 / variance * away)).sum(1, keepdim=True)


IN_FLOW = from_velocity(gaussian_network, LEVELS)
IN_VE = from_velocity(gaussian_network, LEVELS, coordinates="ve")
X = MEAN + STD * noise_like((4, 2, 8, 8))
