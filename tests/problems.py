"""Denoisers with exact answers, schedules, and slopes, shared by the tests."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import backend_registration

import kinvert as ki


def mixture(dim: int = 6, seed: int = 0) -> ki.denoisers.GaussianMixture:
    """Three Gaussians in `dim` dimensions, float64."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(3, dim, generator=g, dtype=torch.float64)
    return ki.denoisers.GaussianMixture(means, torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64))


def guided_mixture(dim: int = 6) -> ki.Denoiser:
    """A denoiser for CFG++: another mixture as the unconditional branch."""
    cond, uncond = mixture(dim), mixture(dim, seed=1)

    def pair(x: Tensor, sigma: Tensor) -> Any:
        return ki.Guided(cond(x, sigma), uncond(x, sigma))

    pair.coordinates = "ve"  # type: ignore[attr-defined]
    return pair


def cost_alike(a: Tensor, b: Tensor) -> bool:
    """Whether evaluations of the same samples are the same to a third: in a batch of another size torch rounds products
    differently, and rounding decides after which sweep the last digits are there.
    """
    return bool(((a - b).abs() <= torch.maximum(a, b) / 3).all())


def noise_like(x_shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(x_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def schedules(draw: st.DrawFn, min_steps: int = 1, max_steps: int = 9, zero: bool | None = None) -> list[float]:
    """Random strictly decreasing schedules with steps between a hundredth and one in log sigma, maybe ending in 0."""
    n = draw(st.integers(min_steps, max_steps))
    sigma = draw(st.floats(0.5, 80.0).filter(lambda s: s != 1))  # at 1 it may be flow time, of which there is a warning
    sigmas = [sigma]
    for h in draw(st.lists(st.floats(0.01, 1.0), min_size=n, max_size=n)):
        sigma *= math.exp(-h)
        sigmas.append(sigma)
    if draw(st.booleans()) if zero is None else zero:
        sigmas[-1] = 0.0
    return sigmas


def order_slope(errors: list[float], steps: list[int]) -> float:
    """Least-squares slope of -log error against log steps."""
    u = [math.log(n) for n in steps]
    v = [-math.log(e) for e in errors]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u)


def count_on_simulated_device(script: str) -> None:
    """Run a script that ends with print("counted"), in a process of its own: the device is registered for good."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} takes no backend that is written in Python")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "counted\n", result.stderr[-2000:]
