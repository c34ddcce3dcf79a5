"""Metrics of reconstructions, against their definitions and what scikit-image and torchmetrics compute."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
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


def test_by_hand() -> None:
    assert metrics.mse(A, B).tolist() == [1.0, 0.0]
    assert metrics.max_error(A, B).tolist() == [2.0, 0.0]
    assert metrics.psnr(A, B).tolist() == [pytest.approx(10 * math.log10(4)), INF]
    assert metrics.psnr(A, B, data_range=1.0)[0] == 0.0
    assert metrics.nmse(A, B).tolist() == [pytest.approx(10 * math.log10(4 / 2)), -INF]


def test_nmse_of_an_original_without_energy() -> None:
    zero = torch.zeros(2, 3)
    assert metrics.nmse(torch.stack([zero[0], zero[1] + 1]), zero).tolist() == [-INF, INF]


@settings(deadline=None)
@given(scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
def test_scale_and_shift(scale: float, shift: float) -> None:
    torch.testing.assert_close(metrics.mse(scale * A + shift, scale * B + shift), scale**2 * metrics.mse(A, B))
    torch.testing.assert_close(metrics.nmse(scale * A, scale * B)[0], metrics.nmse(A, B)[0])
    torch.testing.assert_close(metrics.psnr(scale * A, scale * B, 2 * scale)[0], metrics.psnr(A, B)[0])


@settings(deadline=None)
@given(scale=st.floats(0.1, 10))
def test_ssim_is_relative_to_the_range(scale: float) -> None:
    a, b = (noise(2, 1, 8, 8, seed=k) for k in (0, 1))
    torch.testing.assert_close(metrics.ssim(scale * a, scale * b, 2 * scale), metrics.ssim(a, b))


def test_half_precision_is_compared_in_float32() -> None:
    a, b = (x[:, None].repeat(1, 1, 4, 4) for x in (A, B))
    for function in (metrics.mse, metrics.ssim):
        assert function(a.half(), b.half()).dtype == torch.float32
        assert function(a, b.half()).dtype == torch.float32
    # Values of 300 have squares beyond float16.
    torch.testing.assert_close(metrics.mse(300 * A.half(), 0 * B.half()), metrics.mse(300 * A, 0 * B).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_reconstruction_that_is_not_finite_is_infinitely_far_away(dtype: torch.dtype) -> None:
    original = noise(4, 1, 8, 8).to(dtype)
    broken = original.clone()
    broken[1, 0, 2, 3], broken[2, 0, 0, 0] = NAN, -INF
    broken[3] = torch.finfo(dtype).max  # finite, with squares that overflow
    found = metrics.reconstruction_metrics(broken, original)
    assert {key: value[1:3].tolist() for key, value in found.items()} == {
        "nmse_db": [INF, INF], "mse": [INF, INF], "psnr": [-INF, -INF], "max_error": [INF, INF], "ssim": [0, 0],
    }  # fmt: skip
    assert [value[0].item() for value in found.values()] == [-INF, 0, INF, 0, 1]
    assert found["ssim"][3] == pytest.approx(0, abs=1e-3) and not any(value.isnan().any() for value in found.values())


def test_nmse_of_values_whose_squares_leave_float32() -> None:
    one = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    for scale in (1e-25, 1.0, 1e25):
        torch.testing.assert_close(metrics.nmse(2 * scale * one, scale * one), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [5, 16, 28, 32, 33, 64])
def test_a_constant_has_no_shape_whatever_it_is(side: int) -> None:
    """The mean of n equal numbers is one of them up to rounding, which is not to be taken for a distribution."""
    for constant in (0.1, 0.3, 0.7, 1 / 3, 123.456, -1e-8):
        z = torch.full((1, 3, side, side), constant, dtype=torch.float64)
        for metric in (metrics.skew, metrics.kurtosis, metrics.patch_correlation):
            assert metric(z).isnan().all()


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.25)
    c1 = (0.01 * 2) ** 2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert metrics.ssim(a, a).item() == 1.0


def test_ssim_of_the_smallest_images_is_one_window() -> None:
    a, b = noise(1, 1, 3, 3, seed=1), noise(1, 1, 3, 3, seed=2)
    line = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / (1.5 * 3 / 11)) ** 2)
    w = line.outer(line) / line.sum() ** 2
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * a * a).sum() - ma**2, (w * b * b).sum() - mb**2, (w * a * b).sum() - ma * mb
    c1, c2 = 4e-4, 3.6e-3
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    torch.testing.assert_close(metrics.ssim(a, b)[0], expected)


@pytest.mark.parametrize("name", ["digits", "small", "mnist", "colour"])
def test_against_recorded_scikit_image_and_torchmetrics(name: str) -> None:
    stored = np.load(DATA / "metrics.npz")
    b, a = (torch.from_numpy(stored[f"{name}/{which}"]) for which in ("original", "reconstruction"))
    compared = [key.split("/")[1:] for key in stored if key.startswith(name) and key.count("/") == 2]
    assert len(compared) == 6
    for library, metric in compared:
        # torchmetrics has its window in float32.
        tolerance = {"rtol": 1e-5 if library == "torchmetrics" else 1e-11, "atol": 0.0}
        reference = torch.from_numpy(stored[f"{name}/{library}/{metric}"])
        torch.testing.assert_close(getattr(metrics, metric)(a, b), reference, **tolerance, check_dtype=False)


def test_the_recorded_values_are_those_of_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchmetrics")
    path = DATA / "metrics_reference.py"
    spec = importlib.util.spec_from_file_location("metrics_reference", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "__file__", str(tmp_path / path.name))
    module.main()
    stored, made = np.load(DATA / "metrics.npz"), np.load(tmp_path / "metrics.npz")
    assert set(stored) == set(made)
    for key in set(stored) - {"versions"}:
        np.testing.assert_allclose(made[key], stored[key], rtol=1e-6, err_msg=key)


def test_errors_of_reconstructions() -> None:
    images = noise(2, 1, 8, 8)
    for match, call in {
        r"shape \(1, 2, 2\) and original \(2, 2, 2\)": lambda: metrics.mse(A[:1], B),
        "data_range must be positive, got 0": lambda: metrics.psnr(A, B, data_range=0),
        "data_range must be positive, got -1": lambda: metrics.ssim(images, images, data_range=-1),
        "original must be finite": lambda: metrics.mse(A, B / 0),
        r"original must be images .* at least 3, got \(2, 2, 2\)": lambda: metrics.ssim(A, B),
        r"at least 3, got \(2, 1, 2, 8\)": lambda: metrics.ssim(images[:, :, :2], images[:, :, :2]),
        r"equal, \(batch, \*event\), and not empty": lambda: metrics.mse(images[:0], images[:0]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
