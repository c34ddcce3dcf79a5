"""The certificate: what is restored, the report, the same for parts of a batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.tensors import rms


def test_restored_is_what_the_sampler_makes_of_the_latent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for sampler in ("euler", "dpmpp_2m"):
            found = ki.invert(MIXTURE, images(), schedule(8), sampler=sampler, tol=1e-13, max_evals=80)
            assert found.restored is not None
            torch.testing.assert_close(found.restored, ki.sample(MIXTURE, found.latent, schedule(8), sampler=sampler))
            torch.testing.assert_close(rms(found.restored - images()), found.round_trip_error)


def test_the_report() -> None:
    report = str(ki.invert(MIXTURE, images(), schedule(8)))
    for line in ("converged        6 of 6", "residuals        at most", "contraction ", "kurtosis", "KS distance"):
        assert line in report


def test_parts_of_a_batch_have_the_certificate_of_the_whole() -> None:
    """The contraction of a sample does not depend on its place, the amplification not on the part that comes first."""
    weights = 0.5 * noise_like((16, 16), seed=0)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma[:, None] ** 2).sqrt() @ weights)

    whole, parts = (ki.invert(denoiser, noise_like((4, 16), seed=3), schedule(6), max_batch=b) for b in (None, 1))
    assert whole.contraction is not None and parts.contraction is not None
    torch.testing.assert_close(whole.contraction, parts.contraction, rtol=1e-6, atol=0)
    x = torch.cat([torch.full((1, 16), size, dtype=torch.float64) for size in (1e-3, 1e3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [
            ki.invert(MIXTURE, y, schedule(6), sampler="bdia", max_batch=b)
            for y in (x[:, :6], x.flip(0)[:, :6])
            for b in (None, 1)
        ]
    assert [f.amplification for f in found] == pytest.approx([found[0].amplification] * 4) and found[
        0
    ].amplification > 9
