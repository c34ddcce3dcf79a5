"""Guided Newton-Raphson inversion against its formula, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from publications import GAUSSIAN, close, guidance, images, labelled, pairs, schedule, shifted
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import gnri


def transcribed(x: list[float], sigmas: Tensor, iterations: int, weight: float, through: bool) -> list[float]:
    """The method for one sample of N(0.3, 0.7²), on lists of numbers, with derivatives by hand."""
    state = list(x)
    for b, a in pairs(sigmas):
        gain = 0.49 / (0.49 + a * a)
        grows = (a - b) * (1 - gain) / a  # dG/du
        u, best = list(state), (math.inf, list(state))
        for _ in range(iterations):
            g = [y + (a - b) * (v - (0.3 + gain * (v - 0.3))) / a for y, v in zip(state, u, strict=True)]
            total = sum(abs(p - q) for p, q in zip(g, u, strict=True))
            total -= weight * sum(-0.5 * ((p - q) / a) ** 2 for p, q in zip(g, x, strict=True))
            if total < best[0]:
                best = total, g
            for i in range(len(u)):
                slope = -math.copysign(1, g[i] - u[i])
                if through:
                    slope = (grows - 1) * math.copysign(1, g[i] - u[i]) + weight * (g[i] - x[i]) / a**2 * grows
                u[i] -= total / slope / len(u)
        state = best[1]
    return state


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(("iterations", "weight"), [(1, 0.1), (2, 0.1), (5, 0.0), (6, 0.3)])
def test_it_is_the_published_formula(iterations: int, weight: float, through: bool) -> None:
    found = gnri(GAUSSIAN, images(), schedule(5), iterations=iterations, weight=weight, through=through)
    for row, latent in zip(images().tolist(), found.latent.tolist(), strict=True):
        expected = transcribed(row, schedule(5), iterations, weight, through)
        close(torch.tensor(latent), torch.tensor(expected), 1e-6)
    assert (found.evaluations - found.checking == 5 * iterations).all()


def test_a_prior_keeps_it_from_the_solution() -> None:
    """A single value is Newton's method, which ends in the solution of a linear equation; with a prior it does not."""
    x = images()[:, :1]
    exact = ki.invert(GAUSSIAN, x, schedule(5)).latent
    close(gnri(GAUSSIAN, x, schedule(5), iterations=3, weight=0.0, through=True).latent, exact, 1e-9)
    assert float((gnri(GAUSSIAN, x, schedule(5), iterations=3, through=True).latent - exact).abs().max()) > 1e-3


def test_it_is_guided_and_goes_through_a_conditioned_denoiser() -> None:
    plain, strong = (gnri(labelled, images(), schedule(), **guidance(cfg)).latent for cfg in (1.0, 3.0))
    assert float((plain - strong).abs().max()) > 0.1
    weights = torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    found = gnri(shifted, images(), schedule(), positive={"shift": weights}, through=True)
    assert not found.latent.requires_grad and weights.grad is None


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x = torch.cat([images(2), 3 * images(1)])
    close(gnri(GAUSSIAN, x, schedule()).latent[1:2], gnri(GAUSSIAN, x[1:2], schedule()).latent)
