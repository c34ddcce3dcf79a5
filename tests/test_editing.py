"""Edits, and walks between latents."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.editing import change_class, edit, edit_metrics, lpips, self_interpolation, slerp
from kinvert.models import classifier

SIGMAS = ki.schedules.karras(8, 0.02, 80.0)[:-1]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -- edits -------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
@pytest.mark.parametrize("method", ["unsample", "invert"])
def test_an_edit_without_a_change_is_a_reconstruction(method: str) -> None:
    images, labels = (t[::10] for t in models.held_out("digits"))
    denoiser = models.load("digits", dtype=torch.float64)
    done = edit(denoiser, images.double(), labels, labels, SIGMAS, method=method)
    assert done.measured["edit_took"].tolist() == [1] * 4
    # Exactly inverted it is the image; unsampled in 7 steps it is still the digit.
    assert done.measured["edit_mse"].max() < (1e-12 if method == "invert" else 0.5)
    assert done.latent.shape == done.edited.shape == images.shape


def test_edits_take_and_keep_more_than_fresh_noise() -> None:
    images, labels = models.held_out("digits")
    denoiser, target = models.load("digits"), (labels + 3) % 10
    done = edit(denoiser, images, labels, target, SIGMAS, sampler="heun", method="unsample")
    fresh = ki.sample(
        denoiser, 80 * noise(*images.shape, dtype=torch.float32), SIGMAS, sampler="heun", positive={"label": target}
    )
    baseline = edit_metrics(fresh, images, target, classifier.load("digits"))
    assert done.measured["edit_took"].mean() >= 0.9 and baseline["edit_took"].mean() >= 0.9
    assert done.measured["edit_mse"].mean() < 0.8 * baseline["edit_mse"].mean()
    assert done.measured["edit_ssim"].mean() > 1.5 * baseline["edit_ssim"].mean()
    assert f"{int(done.measured['edit_took'].sum())} of 40 edits took" in str(done)


def test_extracted_noises_are_replayed_with_another_class() -> None:
    images, labels = (t[:2].double() if t.is_floating_point() else t[:2] for t in models.held_out("digits"))
    denoiser, given = models.load("digits", dtype=torch.float64), {"sampler": "euler_ancestral"}
    found = ki.extract_noise(denoiser, images, SIGMAS, positive={"label": labels}, **given)
    same, other = (
        change_class(denoiser, found.latent, images, t, SIGMAS, noise=ki.noise.replay(found.noises), **given)
        for t in (labels, (labels + 3) % 10)
    )
    assert same.measured["edit_mse"].max() < 1e-20 and other.measured["edit_mse"].min() > 1e-3


def test_edit_metrics_by_hand() -> None:
    images, labels = (t[:3] for t in models.held_out("mnist"))
    model = classifier.load("mnist")
    target = torch.stack([labels[0], (labels[1] + 1) % 10, labels[2]])
    found = edit_metrics(images, images, target, model)
    assert found["edit_took"].tolist() == [1, 0, 1]
    assert found["edit_mse"].tolist() == [0] * 3 and found["edit_ssim"].tolist() == [1] * 3
    odds = torch.softmax(model(images), 1)[torch.arange(3), target]
    torch.testing.assert_close(found["edit_probability"], odds)


def test_bad_edits() -> None:
    images, labels = (t[:2] for t in models.held_out("digits"))
    denoiser = models.load("digits")
    with pytest.raises(ValueError, match="method must be 'unsample' or 'invert', got 'wish'"):
        edit(denoiser, images, labels, labels, SIGMAS, method="wish")
    with pytest.raises(ValueError, match=r"target must be one class an image, shape \(2,\), got \(1,\)"):
        edit(denoiser, images, labels, labels[:1], SIGMAS)
    colour, pictures = models.load("emoji"), models.held_out("emoji")[0][:2]
    with pytest.raises(ValueError, match=r"model 'emoji' has no classifier; kinvert\.models\.variants has the true"):
        edit(colour, pictures, labels, labels, SIGMAS)
    with pytest.raises(ValueError, match="model 'emoji' has no classifier"):
        change_class(colour, pictures, pictures, labels, SIGMAS)


# -- walks -------------------------------------------------------------------------------------------------------------
def test_slerp_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([[half, half]]))
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([[math.cos(math.pi / 6), 0.5]]))


@settings(deadline=None)
@given(t=st.floats(0, 1), seed=st.integers(0, 50))
def test_laws_of_slerp(t: float, seed: int) -> None:
    a, b = noise(3, 2, 4, 4, seed=seed), noise(3, 2, 4, 4, seed=seed + 100)
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t))
    torch.testing.assert_close(slerp(a, a, t), a)
    torch.testing.assert_close(slerp(3 * a, 3 * b, t), 3 * slerp(a, b, t))
    # On a sphere it stays on it, at a constant speed.
    u, v = (x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b))
    w = slerp(u, v, t).flatten(1)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(3, dtype=torch.float64))
    angle = torch.acos((u.flatten(1) * v.flatten(1)).sum(1))
    torch.testing.assert_close((w * u.flatten(1)).sum(1), (t * angle).cos())


def test_slerp_of_neighbours_and_of_each_sample() -> None:
    a = noise(3, 5)
    b = a + 1e-9 * noise(3, 5, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.5), (a + b) / 2, rtol=1e-15, atol=1e-15)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    mixed = slerp(a, noise(3, 5, seed=2), t)
    for i in range(3):
        torch.testing.assert_close(mixed[i : i + 1], slerp(a[i : i + 1], noise(3, 5, seed=2)[i : i + 1], float(t[i])))


def test_slerp_in_half_precision() -> None:
    a, b = (noise(2, 64, seed=k, dtype=torch.float32) for k in (0, 1))
    found = slerp(100 * a.half(), 100 * b.half(), 0.3)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), 100 * slerp(a, b, 0.3), rtol=2e-3, atol=0.2)


def test_bad_slerps() -> None:
    a = noise(3, 4)
    for b, match in [
        (a[:2], r"a has shape \(3, 4\) and b \(2, 4\)"),
        (a * torch.tensor([1.0, -1.0, 2.0])[:, None], r"opposite directions, as samples \[1\] do"),
        (a * torch.tensor([1.0, 1.0, 0.0])[:, None], r"must not be 0 .* samples \[2\]"),
        (a / torch.tensor([1.0, 1.0, 0.0])[:, None], r"samples \[2\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            slerp(a, b, 0.5)


def test_self_interpolation() -> None:
    denoiser = ki.denoisers.Gaussian(0.0, 1.0)
    true = 80 * noise(3, 6)
    same = self_interpolation(denoiser, true, true, SIGMAS)
    assert same.shape == (5, 3) and same.max() < 1e-25
    other = true.flip(1)
    found = self_interpolation(denoiser, true, other, SIGMAS, points=3, sampler="heun")
    images = [ki.sample(denoiser, z, SIGMAS, sampler="heun") for z in (true, slerp(true, other, 0.5), other)]
    torch.testing.assert_close(found, torch.stack([ki.metrics.mse(x, images[0]) for x in images]))
    with pytest.raises(ValueError, match="points must be at least 2, the two ends, got 1"):
        self_interpolation(denoiser, true, other, SIGMAS, points=1)


# -- lpips -------------------------------------------------------------------------------------------------------------
def test_missing_lpips_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ModuleNotFoundError, match="lpips needs the package .* pip install lpips"):
        lpips(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_lpips_gets_three_channels_and_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg" and not verbose

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape == b.shape == (2, 3, 8, 8) and a.dtype == torch.float32 and not self.training
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    module.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    a, b = torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert lpips(a, b.double(), net="vgg").tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 1, 8, 8\) and \(1, 1, 8, 8\)"):
        lpips(a, b[:1])


def test_importing_editing_reads_no_weights() -> None:
    code = "import sys, kinvert.editing; sys.exit('kinvert.models.train' in sys.modules or 'lpips' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(models.__file__).parents[2], check=False).returncode == 0
    )
