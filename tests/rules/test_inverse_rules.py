"""DDIM inversion as a rule."""

from __future__ import annotations

import itertools
import math

import torch
from problems import noise_like
from rule_runs import MIXTURE

import kinvert as ki


def test_ddim_inversion_by_name() -> None:
    """Up: as diffusers' inverse scheduler, in VP coordinates, the slope at the noisier level. Down: DDIM."""
    sigmas = ki.schedules.karras(6, 0.1, 10)
    x = noise_like((3, 6))
    got = ki.unsample(MIXTURE, x, sigmas[:-1], sampler="ddim_inverse", sigma_offset=0.0)
    y = x / math.sqrt(1 + 0.1**2)
    for a, b in itertools.pairwise(sigmas[:-1].flip(0).tolist()):
        seen = y * math.sqrt(1 + b**2)  # the latent as it is, at the next level
        eps = (seen - MIXTURE(seen, torch.full((3,), b, dtype=torch.float64))) / b
        clean = (y - eps * a / math.sqrt(1 + a**2)) * math.sqrt(1 + a**2)
        y = (clean + b * eps) / math.sqrt(1 + b**2)
    torch.testing.assert_close(got, y * math.sqrt(1 + 10.0**2), rtol=1e-10, atol=1e-10)
    down = ki.sample(MIXTURE, got, sigmas, sampler="ddim_inverse")
    assert torch.equal(down, ki.sample(MIXTURE, got, sigmas, sampler="euler"))
