"""Metrics of latents, against their definitions and against scipy; those of reconstructions: test_fidelity.py."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinvert import metrics

DATA = Path(__file__).parent / "data"
A = torch.tensor([[[0.0, 1.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
B = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
NAN, INF = math.nan, math.inf


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_errors_of_latents() -> None:
    images = noise(2, 1, 8, 8)
    for match, call in {
        r"z must be images .* at least 4, got \(2, 2, 2\)": lambda: metrics.spectrum_slope(A),
        r"z must be images .* at least 4, got \(2, 4\)": lambda: metrics.autocorrelation(A.flatten(1)),
        "patch must be an int from 2 to 8, the shorter side of z, got 9": lambda: metrics.patch_correlation(
            images, patch=9
        ),
        "per must be 'sample' or 'channel', got 'pixel'": lambda: metrics.mean(A, per="pixel"),
        r"z must be floating point of shape \(batch, \*event\) and not empty, got torch.int64": lambda: metrics.ks(
            A.long()
        ),
        r"\(batch, channels, \*rest\) and not empty, got torch.float64 of \(4,\)": lambda: metrics.ks(
            A[0].flatten(), per="channel"
        ),
        r"z must be .* not empty, got .* of \(2, 0\)": lambda: metrics.mean(torch.empty(2, 0)),
        "at least 20 values per channel, got 16": lambda: metrics.dagostino(images[:, :, :4, :4], per="channel"),
        r"z has shape \(2, 2, 2\) and image \(1, 2, 2\)": lambda: metrics.cosine(A, B[:1]),
        "sigma must be positive and finite, got 0": lambda: metrics.latent_metrics(images, 0, images),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# -- the values of latents ---------------------------------------------------------------------------------------------
def anderson_reference(x: np.ndarray) -> float:
    """The A^2 of scipy for a known mean and variance; the Monte Carlo draw is only for its p-value."""
    known = {"loc": 0.0, "scale": 1.0}
    found = scipy.stats.goodness_of_fit(scipy.stats.norm, x, known_params=known, statistic="ad", n_mc_samples=1)
    return found.statistic


SCIPY: dict[str, Callable[[np.ndarray], float]] = {
    "mean": np.mean,
    "std": lambda x: scipy.stats.tstd(x),
    "skew": scipy.stats.skew,
    "kurtosis": scipy.stats.kurtosis,
    "ks": lambda x: scipy.stats.kstest(x, "norm").statistic,
    "anderson": anderson_reference,
    "dagostino": lambda x: scipy.stats.normaltest(x).statistic,
    "norm_score": lambda x: (np.sum(x**2) - scipy.stats.chi2(x.size).mean()) / scipy.stats.chi2(x.size).std(),
}


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_against_scipy(name: str, dtype: torch.dtype) -> None:
    z = noise(3, 2, 6, 5)
    z = torch.stack([z[0], z[1].exp(), 3 * z[2] - 1]).to(dtype)
    function = getattr(metrics, name)
    x = z.double().numpy()
    samples, channels = function(z), function(z, per="channel")
    assert samples.shape == (3,) and channels.shape == (3, 2) and samples.dtype == channels.dtype == torch.float64
    for i in range(3):
        assert samples[i].item() == pytest.approx(SCIPY[name](x[i].ravel()), rel=1e-10)
        for c in range(2):
            assert channels[i, c].item() == pytest.approx(SCIPY[name](x[i, c].ravel()), rel=1e-10)


def test_the_bands_of_the_docstring_hold_for_noise() -> None:
    n, draws = 400, 2000
    z = noise(draws, n)
    for name, width in {
        "mean": n**-0.5, "std": (2 * n) ** -0.5, "skew": (6 / n) ** 0.5, "kurtosis": (24 / n) ** 0.5, "norm_score": 1.0,
    }.items():  # fmt: skip
        values = getattr(metrics, name)(z) - float(name == "std")
        assert abs(values.mean()) < 0.1 * width and values.std() == pytest.approx(width, rel=0.07)
    for name, critical in {"ks": 1.36 / n**0.5, "anderson": 2.49, "dagostino": 5.99}.items():
        assert (getattr(metrics, name)(z) > critical).double().mean() == pytest.approx(0.05, abs=0.015)


def test_wrong_latents_are_seen() -> None:
    z = noise(4, 1, 28, 28)
    for worse, names in [
        (z + 0.5, ["mean", "ks", "anderson"]),
        (1.3 * z, ["std", "ks", "anderson", "norm_score"]),
        (z.exp(), ["skew", "kurtosis", "ks", "anderson", "dagostino"]),
        (torch.nn.functional.avg_pool2d(z, 3, 1, 1) * 3, ["patch_correlation", "autocorrelation"]),
    ]:
        for name in names:
            assert (getattr(metrics, name)(worse) > getattr(metrics, name)(z)).all(), name


def test_latents_without_variance_or_that_are_not_finite() -> None:
    z = noise(5, 1, 8, 8)
    z[0], z[1], z[2, 0, 0, 0], z[3, 0, 7, 7] = 0.0, 0.1, NAN, INF
    found = metrics.latent_metrics(z, 1.0, noise(5, 1, 8, 8, seed=1))
    assert all(value.dtype == torch.float64 and value.shape == (5,) for value in found.values())
    for key, value in found.items():
        assert value[2:4].isnan().all() and value[4].isfinite(), key
    undefined = {key for key, value in found.items() if value[1].isnan()}
    shape_only = {"latent_skew", "latent_kurtosis", "latent_dagostino", "patch_correlation", "spectrum_slope"}
    assert undefined == shape_only
    assert {key for key, value in found.items() if value[0].isnan()} == {*shape_only, "cosine", "autocorrelation"}
    assert found["latent_ks"][:2].tolist() == [0.5, pytest.approx(scipy.stats.norm.cdf(0.1))]


def test_far_tails_stay_finite() -> None:
    z = torch.tensor([[-1e10, 0.0, 1e10, 5.0]])
    assert metrics.anderson(z).isfinite().all() and metrics.ks(z).item() == pytest.approx(0.5)


# -- spatial -----------------------------------------------------------------------------------------------------------
def test_patch_correlation_by_its_definition() -> None:
    z = noise(2, 2, 7, 6)
    patch = 3
    windows = np.stack([
        z[1, c, i : i + patch, j : j + patch].numpy().ravel()
        for c in range(2) for i in range(5) for j in range(4)
    ])  # fmt: skip
    r = np.abs(np.corrcoef(windows.T))[np.triu_indices(9, 1)]
    expected = np.sort(r)[-20:].mean()
    assert metrics.patch_correlation(z)[1].item() == pytest.approx(expected, rel=1e-12)
    assert metrics.patch_correlation(z, patch=3, pairs=1000)[1].item() == pytest.approx(r.mean(), rel=1e-12)
    stripes = torch.arange(8.0).remainder(2).expand(1, 1, 8, 8)
    assert metrics.patch_correlation(stripes).item() == pytest.approx(1.0)


def test_autocorrelation_by_its_definition() -> None:
    z = noise(1, 2, 16, 20)
    squares = []
    for level in (z, torch.nn.functional.avg_pool2d(z, 2)):
        for dim in (2, 3):
            for k in range(1, level.shape[dim] // 2 + 1):
                r = (level * level.roll(k, dim)).sum((2, 3)) / level.square().sum((2, 3))
                squares.append(r.square())
    # Both scales and both directions weigh by their number of shifts.
    assert metrics.autocorrelation(z).item() == pytest.approx(torch.cat(squares).mean().sqrt().item(), rel=1e-12)
    assert metrics.autocorrelation(torch.full((1, 1, 8, 8), 3.0)).item() == pytest.approx(1.0)


@settings(deadline=None)
@given(height=st.integers(4, 12), width=st.integers(4, 12))
def test_the_spectrum_keeps_the_energy(height: int, width: int) -> None:
    z = noise(2, 3, height, width)
    frequency, power = metrics.radial_spectrum(z)
    side = min(height, width)
    assert frequency.tolist() == [k / side for k in range(1, side // 2 + 1)] and power.shape == (2, side // 2)
    # Of a plane wave all the energy is in one ring.
    wave = torch.cos(2 * math.pi * torch.arange(side, dtype=torch.float64) / side).expand(1, 1, side, side)
    _, power = metrics.radial_spectrum(wave)
    ys, xs = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    members = (np.round(np.hypot(ys, xs) * side) == 1).sum()
    assert power[0, 0].item() * members == pytest.approx(wave.square().sum().item())
    assert power[0, 1:].abs().max() < 1e-20


def test_white_noise_is_flat_and_a_power_law_has_its_slope() -> None:
    z = noise(64, 1, 32, 32)
    _, power = metrics.radial_spectrum(z)
    torch.testing.assert_close(power.mean(0), torch.ones_like(power[0]), rtol=0, atol=0.15)
    assert abs(metrics.spectrum_slope(z).mean()) < 0.05
    f = torch.hypot(torch.fft.fftfreq(32, dtype=torch.float64)[:, None], torch.fft.fftfreq(32, dtype=torch.float64))
    f[0, 0] = 1.0
    coloured = torch.fft.ifft2(torch.fft.fft2(z) / f).real
    assert metrics.spectrum_slope(coloured).mean().item() == pytest.approx(-2, abs=0.1)


def test_cosine() -> None:
    x = noise(3, 2, 5)
    assert metrics.cosine(2 * x, x).tolist() == pytest.approx([1.0] * 3)
    assert metrics.cosine(-x.half(), x.half()).tolist() == pytest.approx([-1.0] * 3)
    assert metrics.cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == 0


# -- records -----------------------------------------------------------------------------------------------------------
VALUES = {
    "latent_mean", "latent_std", "latent_skew", "latent_kurtosis", "latent_ks", "latent_anderson", "latent_dagostino",
    "latent_norm", "cosine",
}  # fmt: skip
SPATIAL = {"patch_correlation", "autocorrelation", "spectrum_slope"}


def test_what_events_have_which_metrics() -> None:
    for shape, spatial, similar in [((2, 1, 8, 8), SPATIAL, {"ssim"}), ((2, 30), set(), set())]:
        x = noise(*shape)
        assert set(metrics.latent_metrics(80 * x, 80.0, x)) == VALUES | spatial
        assert set(metrics.reconstruction_metrics(x, x)) == {"nmse_db", "mse", "psnr", "max_error"} | similar
    one = noise(3, 1)
    assert set(metrics.latent_metrics(one, 1.0, one)) == VALUES - {"latent_dagostino"}


@pytest.mark.parametrize("sigma", [1e-3, 80.0])
def test_a_latent_is_measured_in_units_of_sigma(sigma: float) -> None:
    z, image = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1)
    found = metrics.latent_metrics(sigma * z, sigma, image)
    for key, function in {"mean": metrics.mean, "ks": metrics.ks, "norm": metrics.norm_score}.items():
        torch.testing.assert_close(found[f"latent_{key}"], function(z))
    torch.testing.assert_close(found["cosine"], metrics.cosine(z, image))


def test_importing_scipy_waits_until_it_is_needed() -> None:
    assert "scipy" not in vars(metrics) and isinstance(sys.modules["kinvert.metrics"], types.ModuleType)
