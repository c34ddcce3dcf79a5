"""A denoiser of states in one dtype is called with states and levels of that dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kinvert.inversion.verdict import Widened


@pytest.mark.parametrize(
    ("narrow", "wide", "levels"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_levels_do_not_widen_what_a_network_computes(
    narrow: torch.dtype, wide: torch.dtype, levels: torch.dtype
) -> None:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == narrow and sigma.dtype == levels
        return x / (1 + sigma[:, None] ** 2).to(x.dtype)

    out = Widened(denoiser, narrow)(torch.ones(2, 3, dtype=wide), torch.ones(2, dtype=wide))  # type: ignore[arg-type]
    assert isinstance(out, Tensor) and out.dtype == wide
