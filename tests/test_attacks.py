"""What happens to images on their way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kinvert import attacks

ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian_noise": lambda x: attacks.gaussian_noise(x, 0.2, seed=1),
    "crop_and_resize": lambda x: attacks.crop_and_resize(x, 0.7),
    "blur": lambda x: attacks.blur(x, 0.8),
    "quantize": lambda x: attacks.quantize(x, 4),
    "jpeg": lambda x: attacks.jpeg(x, 60),
}


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1).to(dtype)


# -- laws of all of them -----------------------------------------------------------------------------------------------
def test_every_attack_is_tried() -> None:
    assert set(ALL) == set(attacks.__all__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_shape_dtype_and_range_stay_and_the_input_too(name: str, dtype: torch.dtype) -> None:
    x = 1.2 * images(2, 3, 9, 12, dtype=dtype)  # some values outside
    before = x.clone()
    y = ALL[name](x)
    assert y.shape == x.shape and y.dtype == dtype and float(y.abs().max()) <= 1
    assert torch.equal(x, before) and not torch.equal(y, x)
    assert ALL[name](x[:0]).shape == (0, 3, 9, 12)


@pytest.mark.parametrize("name", ALL)
def test_what_is_outside_is_clipped_before(name: str) -> None:
    x = 3 * images(2, 1, 8, 8)
    assert torch.equal(ALL[name](x), ALL[name](x.clamp(-1, 1)))


@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_its_neighbours_nor_on_the_layout(name: str) -> None:
    x = images(3, 3, 8, 10, dtype=torch.float32)
    y = ALL[name](x)
    assert torch.equal(ALL[name](x[:1]), y[:1])
    torch.testing.assert_close(ALL[name](x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"gaussian_noise"}))
def test_a_flat_image_stays_one(name: str) -> None:
    x = torch.full((1, 1, 8, 8), -0.6, dtype=torch.float64)
    torch.testing.assert_close(ALL[name](x), x, rtol=0, atol=1 / 15 + 1e-12)
    assert float(ALL[name](x).std()) < 1e-12


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8, 8), r"images must be images of shape \(batch, channels, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "images must be a floating point tensor of values from -1 to 1"),
        (torch.full((1, 1, 8, 8), math.nan), "images has 64 NaN"),
        (torch.zeros(1, 1, 8, 8, device="meta"), "images has a shape but no values"),
    ],
)
def test_what_are_no_images_is_refused(name: str, x: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ALL[name](x)


# -- each --------------------------------------------------------------------------------------------------------------
def test_noise_has_its_size_and_is_the_same_for_every_dtype_and_batch() -> None:
    x = torch.zeros(4, 1, 64, 64, dtype=torch.float64)
    y = attacks.gaussian_noise(x, 0.1)
    assert y.std().item() == pytest.approx(0.1, rel=0.03) and abs(y.mean().item()) < 0.003
    assert len({float(part.sum()) for part in y}) == 4
    torch.testing.assert_close(attacks.gaussian_noise(x[:2].float(), 0.1), y[:2].float())
    assert not torch.equal(attacks.gaussian_noise(x, 0.1, seed=1), y)
    assert torch.equal(attacks.gaussian_noise(images(1, 1, 4, 4), 0.0), images(1, 1, 4, 4))


def test_a_crop_by_hand() -> None:
    x = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4) / 16
    window = x[0, 0, 1:3, 1:3]
    row = [1.0, 0.75, 0.25, 0.0]  # the weight of the first of two pixels, stretched to four
    along = torch.tensor([row, [1 - w for w in row]], dtype=torch.float64)
    torch.testing.assert_close(attacks.crop_and_resize(x, 0.5)[0, 0], along.T @ window @ along)
    assert torch.equal(attacks.crop_and_resize(x, 1.0), x)
    assert bool((attacks.crop_and_resize(x, 0.01) == x[0, 0, 1, 1]).all())


def test_a_blur_by_hand() -> None:
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 4] = 1.0
    weights = torch.tensor([math.exp(-0.5 * (k / 0.5) ** 2) for k in range(-2, 3)], dtype=torch.float64)
    weights = weights / weights.sum()
    y = attacks.blur(x, 0.5)[0, 0]
    torch.testing.assert_close(y[2:7, 2:7], torch.outer(weights, weights))
    assert float(y.sum()) == pytest.approx(1.0) and torch.equal(attacks.blur(x, 0.0), x)
    torch.testing.assert_close(attacks.blur(x, 20.0).mean(), attacks.blur(x, 20.0).median(), rtol=0.2, atol=0)


@given(st.integers(1, 12))
def test_rounding_is_to_the_nearest_level_and_done_once(bits: int) -> None:
    x = images(1, 1, 5, 5)
    y = attacks.quantize(x, bits)
    assert float((y - x).abs().max()) <= 1 / (2**bits - 1) + 1e-12
    assert torch.equal(attacks.quantize(y, bits), y)
    assert set(attacks.quantize(x, 1).unique().tolist()) == {-1.0, 1.0}
    levels = (y + 1) / 2 * (2**bits - 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)


def test_jpeg_loses_more_at_a_lower_quality() -> None:
    smooth = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(1, 3, 32, 32)
    x = attacks.blur(images(1, 3, 32, 32), 1.0) / 2 + smooth / 2
    errors = [float((attacks.jpeg(x, quality) - x).square().mean()) for quality in (95, 75, 30, 5)]
    assert errors == sorted(set(errors)) and errors[0] < 0.01
    grey = attacks.jpeg(x[:, :1], 95)
    torch.testing.assert_close(grey, attacks.quantize(grey))
    assert float((grey - x[:, :1]).abs().max()) < 0.1


def test_jpeg_without_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kinvert\[cli\]'"):
        attacks.jpeg(images(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["gaussian_noise", "blur", "crop_and_resize"])
def test_gradients_go_through(name: str) -> None:
    x = images(1, 1, 6, 6).mul(0.1).requires_grad_()
    ALL[name](x).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: attacks.gaussian_noise(x, -1.0), "std must be .*not negative, got -1.0"),
        (lambda x: attacks.gaussian_noise(x, 1.0, seed=-1), "seed must not be negative"),
        (lambda x: attacks.blur(x, math.inf), "std must be finite"),
        (lambda x: attacks.crop_and_resize(x, 0.0), "share must be positive and finite, got 0.0"),
        (lambda x: attacks.crop_and_resize(x, 1.1), "share must be at most 1"),
        (lambda x: attacks.quantize(x, 0), "bits must be from 1 to 16, got 0"),
        (lambda x: attacks.jpeg(x, 96), "quality must be from 1 to 95, got 96"),
        (lambda x: attacks.jpeg(x), "images must have 1 or 3 channels"),
    ],
)
def test_strengths_out_of_range_are_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(images(1, 2, 8, 8))
