"""What every denoiser checks: the noise levels of a batch, and x."""

from __future__ import annotations

import pytest
import torch

from kinvert import levels
from kinvert.denoisers import expand, from_x0

DDPM = levels.stable_diffusion()


def test_expand_makes_sigma_multiply_x() -> None:
    x = torch.zeros(2, 3, 4, dtype=torch.float16)
    assert expand(torch.ones(2), x).shape == (2, 1, 1)
    assert expand(torch.ones(2), x).dtype == torch.float32
    assert expand(torch.ones(2), x.double()).dtype == torch.float64
    assert expand(torch.ones(2), torch.zeros(2)).shape == (2,)


def test_wrong_x_and_sigma_are_refused_with_the_fix() -> None:
    denoiser = from_x0(lambda x, t: x, DDPM)
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"sigma must be a tensor of shape \(batch,\), got float; .*new_full"):
        denoiser(x, 1.0)
    with pytest.raises(ValueError, match=r"sigma must have shape \(2,\), got \(\)"):
        denoiser(x, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"sigma must have shape \(2,\), got \(1,\)"):
        denoiser(x, torch.ones(1))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64; use x.float\(\)"):
        denoiser(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got list"):
        denoiser([0.0], torch.ones(1))
