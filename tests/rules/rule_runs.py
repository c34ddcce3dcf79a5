"""Runs of rules on the mixture of the tests, shared by the tests of rules."""

from __future__ import annotations

from typing import Any

import torch
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki

MIXTURE = mixture()


def same_noise(sigma_from: float, sigma_to: float) -> Tensor:
    """Return noise that depends only on the end of its interval."""
    return noise_like((3, 6), seed=round(1e6 * sigma_to))


def paired(x: Tensor, sigma: Tensor) -> ki.Guided:
    """Evaluate the mixture as a pair with U = D, as at cfg = 1."""
    denoised = MIXTURE(x, sigma)
    return ki.Guided(denoised, denoised)


def mean_only(x: Tensor, sigma: Tensor) -> Tensor:
    """Denoise data of a single point."""
    return torch.full_like(x, 0.5)


def run(rule: str | ki.Rule, sigmas: Any, denoiser: Any = None) -> Tensor:
    """Run a rule from fixed noise; the denoiser is the mixture unless given."""
    plan = ki.compile_plan(rule, sigmas)
    return ki.run(plan, denoiser or (paired if plan.is_guided else MIXTURE), sigmas[0] * noise_like((3, 6)), same_noise)


def assert_same(one: Tensor, other: Tensor) -> None:
    """Assert that two results are equal up to rounding."""
    assert float((one - other).norm() / other.norm()) < 1e-12
