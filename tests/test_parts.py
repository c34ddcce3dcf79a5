"""A batch in parts: the denoiser sees some samples at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import noise_like
from runs import KARRAS
from torch import Tensor

import kinvert as ki


def conditioned(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
    denoised = x / (1 + sigma[:, None] ** 2)
    return denoised if shift is None else denoised + shift[:, None]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", ["euler", "lms", "dpmpp_2m_sde", "euler_ancestral_cfg_pp"])
def test_max_batch_does_not_change_the_result(name: str, max_batch: int) -> None:
    """With conditioning and noise of each sample, and no call of the denoiser with more samples than allowed."""
    calls: list[int] = []

    def counted(x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        return conditioned(x, sigma, shift)

    x, shift = 10 * noise_like((5, 6)), torch.arange(5.0, dtype=torch.float64)
    shared: dict[str, Any] = dict(
        sampler=name, cfg=2.0, positive={"shift": shift}, negative={}, noise=ki.noise.white([1, 2, 3, 4, 5])
    )
    whole = ki.sample(conditioned, x, KARRAS, **shared)
    parts = ki.sample(counted, x, KARRAS, **shared, max_batch=max_batch)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert max(calls) <= max_batch
    alone = ki.sample(
        conditioned, x[3:4], KARRAS, **(shared | dict(positive={"shift": shift[3:4]}, noise=ki.noise.white([4])))
    )
    torch.testing.assert_close(parts[3:4], alone, rtol=1e-12, atol=1e-12)


def test_unsample_in_parts() -> None:
    x, shift = noise_like((5, 6)), torch.arange(5.0, dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)[None, None].expand(5, 1, 6)
    shared: dict[str, Any] = dict(sampler="dpmpp_2m", positive={"shift": shift}, mask=mask, normalize=True)
    x = x[:, None, None, :]

    def denoise(y: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return conditioned(y.flatten(1), sigma, shift).view_as(y)

    whole = ki.unsample(denoise, x, KARRAS, **shared)
    torch.testing.assert_close(ki.unsample(denoise, x, KARRAS, **shared, max_batch=2), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("max_batch", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_max_batch_is_a_positive_int(max_batch: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_batch must be"):
        ki.sample(conditioned, torch.ones(2, 3), KARRAS, max_batch=max_batch)
