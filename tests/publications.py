"""What the tests of the published inversions share: images, a conditional mixture, formulas in other coordinates."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from inverting import MIXTURE
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki

GAUSSIAN = ki.denoisers.Gaussian(0.3, 0.7)

NEGATIVE = mixture(seed=1)


def schedule(steps: int = 10) -> Tensor:
    return ki.schedules.karras(steps + 1, 0.1, 10.0)[:-1]


def images(count: int = 4) -> Tensor:
    return 0.8 * noise_like((count, 6), seed=5)


def labelled(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """A mixture for label 0 and another for label 1."""
    return torch.where(label[:, None] == 0, NEGATIVE(x, sigma), MIXTURE(x, sigma))


def shifted(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
    """Conditioning by a continuous vector: the mixture, moved."""
    return MIXTURE(x - shift, sigma) + shift


def guidance(cfg: float, count: int = 4) -> dict[str, Any]:
    ones = torch.ones(count, dtype=torch.int64)
    return {"cfg": cfg, "positive": {"label": ones}, "negative": {"label": 0 * ones}}


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(clean, noisy) for each step up."""
    return list(itertools.pairwise(sigmas.flip(0).tolist()))


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.abs().max()))


def velocity(y: Tensor, t: float) -> Tensor:
    """v = (Y - D) / t of the mixture, at Y = (1 - t) x."""
    return (y - MIXTURE(y / (1 - t), torch.full((len(y),), t / (1 - t), dtype=torch.float64))) / t


def flow_times(sigmas: Tensor) -> list[float]:
    return (sigmas / (1 + sigmas)).tolist()
