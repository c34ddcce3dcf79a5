"""Masks: 1 is processed, 0 is kept, each item by its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kinvert.denoisers import Gaussian, Guided, Masked, expand, guide, resize_mask


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, CLEAN, NOISE = randn(2, 3, 4, 6), randn(2, 3, 4, 6, seed=1), randn(2, 3, 4, 6, seed=2)
SIGMA = torch.tensor([0.5, 3.0], dtype=torch.float64)
DENOISER = Gaussian(0.2, 0.8)
EVENTS = [(), (3,), (3, 5), (3, 4, 6), (3, 2, 4, 6)]


@pytest.mark.parametrize(
    "shape",
    [(4, 6), (1, 4, 6), (2, 4, 6), (1, 1, 4, 6), (2, 1, 4, 6), (1, 3, 4, 6), (2, 3, 4, 6)],
)
def test_image_masks_mean_what_their_shape_says(shape: tuple[int, ...]) -> None:
    mask = rand(*shape)
    resized = resize_mask(mask, X).expand(2, 3, 4, 6)
    for item in range(2):
        for channel in range(3):
            plane = mask if mask.ndim == 2 else mask[item % shape[0]]
            plane = plane[channel % shape[1]] if plane.ndim == 3 else plane
            assert torch.equal(resized[item, channel], plane)


@pytest.mark.parametrize("size", [(8, 12), (2, 3), (5, 7), (1, 1), (4, 48)])
@pytest.mark.parametrize("lead", [(), (2,), (1, 3), (2, 3)])
def test_other_sizes_are_resized_bilinearly(size: tuple[int, int], lead: tuple[int, ...]) -> None:
    mask = rand(*lead, *size)
    planes = {0: mask[None, None], 1: mask[:, None] if lead else mask, 2: mask}[len(lead)]
    expected = functional.interpolate(planes, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_mask(mask, X), expected, rtol=0, atol=1e-15)


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 30), width=st.integers(1, 30), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_resized_masks_stay_in_range_and_are_accepted_again(height: int, width: int, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    resized = resize_mask(torch.ones(height, width, dtype=dtype), x)
    assert torch.equal(resized, torch.ones(1, 1, 4, 6, dtype=dtype)) or float((resized - 1).abs().max()) < 1e-3
    again = resize_mask(resized, x)
    assert torch.equal(again, resized)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_of_any_dtype_become_x_s(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    mask = (rand(8, 12) > 0.5).to(dtype)
    resized = resize_mask(mask, X.to(x_dtype))
    assert resized.dtype == x_dtype
    expected = resize_mask(mask.double(), X)
    torch.testing.assert_close(resized.double(), expected, rtol=0, atol=torch.finfo(x_dtype).eps)


def read(mask: Tensor, x: Tensor) -> Tensor:
    """The rule, written out for every element: (item, channel, *place) -> the mask's value there."""
    result = torch.empty_like(x)
    space = x.ndim - min(x.ndim, 2) if x.ndim != 2 else 1
    for at in itertools.product(*map(range, x.shape)):
        place = at[len(at) - space :] if space else ()
        given = {space + 1: at[:1] + place, space + 2: at[:2] + place}.get(mask.ndim, place[space - mask.ndim :])
        result[at] = mask[tuple(i if size > 1 else 0 for i, size in zip(given, mask.shape, strict=True))]
    return result


@pytest.mark.parametrize(
    ("x_shape", "mask_shape"),
    [((5,), ()), ((5,), (5,)), ((5,), (1,)), ((5, 3), ()), ((5, 3), (3,)), ((5, 3), (5, 1)), ((3, 3), (3,)),
     ((3, 3), (3, 3)), ((5, 3, 4), (4,)), ((5, 3, 4), (5, 4)), ((5, 3, 4), (1, 4)), ((3, 3, 4), (3, 4)),
     ((3, 3, 3), (3, 3)), ((5, 3, 4), (5, 1, 1)), ((5, 3, 4), (5, 3, 4)), ((3, 3, 3, 3), (3, 3)),
     ((3, 3, 3, 3), (3, 3, 3)), ((3, 3, 3, 3), (1, 3, 3, 3)), ((5, 2, 3, 4, 4), (4, 4)), ((5, 2, 3, 4, 4), (3, 1, 1)),
     ((3, 2, 3, 4, 4), (3, 4, 4)), ((3, 2, 3, 4, 4), (3, 3, 4, 4)), ((5, 2, 3, 4, 4), (1, 2, 1, 4, 4)),
     ((2, 2, 2, 2, 2), (2, 2, 2, 2))],
)  # fmt: skip
def test_one_rule_for_all_events(x_shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
    """Points, vectors, audio, images and video, also where the batch is as large as the channels or the space."""
    mask, x = rand(*mask_shape), randn(*x_shape)
    assert torch.equal(resize_mask(mask, x).expand(x.shape), read(mask, x))
    assert torch.equal(resize_mask(resize_mask(mask, x), x).expand(x.shape), read(mask, x))


@pytest.mark.parametrize(
    ("x_shape", "mask_shape", "message"),
    [((5, 3, 4), (3, 1), r"accepted are \(4 or 1\), \(5 or 1, 4 or 1\), \(5 or 1, 3 or 1, 4 or 1\)"),
     ((5, 3, 4), (3, 4), "does not fit x"), ((5, 3, 4), (1, 1, 1, 4), "does not fit x"), ((5,), (4,), r"\(\), \(5 or 1\)"),
     ((5, 2, 3, 4, 4), (5, 4, 4), "does not fit x"), ((5, 2, 3, 4, 4), (2, 3, 4, 4), "does not fit x"),
     ((4, 2, 3, 4, 4), (4, 4), r"two ways.*its first dimension as the batch, or as one of \(3, 4, 4\); give it 4 dim")],
)  # fmt: skip
def test_masks_that_fit_in_no_way_or_in_two_are_refused(
    x_shape: tuple[int, ...], mask_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resize_mask(rand(*mask_shape), randn(*x_shape))


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("noisy", [False, True])
def test_a_mask_of_ones_changes_nothing(event: tuple[int, ...], noisy: bool) -> None:
    x, noise = randn(2, *event), randn(2, *event, seed=2) if noisy else None
    masked = Masked(DENOISER, torch.ones(2, *event), randn(2, *event, seed=1), noise)
    assert torch.equal(masked(x, SIGMA), DENOISER(x, SIGMA))


@pytest.mark.parametrize("event", EVENTS)
def test_a_mask_of_zeros_keeps_everything(event: tuple[int, ...]) -> None:
    x, clean, noise = randn(2, *event), randn(2, *event, seed=1), randn(2, *event, seed=2)
    seen = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return DENOISER(x, sigma)

    mask = torch.zeros(2, *event)
    assert torch.equal(Masked(spy, mask, clean)(x, SIGMA), clean)
    assert torch.equal(Masked(spy, mask, clean, noise)(x, SIGMA), clean)
    assert torch.equal(seen[0], clean)
    torch.testing.assert_close(seen[1], clean + expand(SIGMA, x) * noise, rtol=0, atol=0)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_soft_masks_blend_before_and_after(noise: Tensor | None) -> None:
    mask = rand(2, 4, 6)
    m = mask[:, None]
    kept = CLEAN if noise is None else CLEAN + expand(SIGMA, X) * noise
    expected = DENOISER(X * m + kept * (1 - m), SIGMA) * m + CLEAN * (1 - m)
    torch.testing.assert_close(Masked(DENOISER, mask, CLEAN, noise)(X, SIGMA), expected, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 6), channels=st.integers(1, 4), event=st.sampled_from([(4, 6), (3, 3)]))
def test_each_item_is_masked_by_its_own(batch: int, channels: int, event: tuple[int, int]) -> None:
    x, clean = randn(batch, channels, *event), randn(batch, channels, *event, seed=1)
    mask, sigma = rand(batch, 8, 9), rand(batch, seed=3) + 0.1
    whole = Masked(DENOISER, mask, clean)(x, sigma)
    for i in range(batch):
        alone = Masked(DENOISER, mask[i], clean[i : i + 1])(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-15)


def test_only_denoised_of_a_pair_is_blended() -> None:
    mask = rand(4, 6)
    branches = {"a": Gaussian(0.0, 1.0), "b": Gaussian(1.0, 0.5)}
    guided = guide(lambda x, sigma, pick: branches[pick](x, sigma), 3.0, {"pick": "a"}, {"pick": "b"}, pair=True)
    result = Masked(guided, mask, CLEAN)(X, SIGMA)
    assert isinstance(result, Guided)
    mixed = torch.lerp(CLEAN, X, mask)
    cond, uncond = branches["a"](mixed, SIGMA), branches["b"](mixed, SIGMA)
    torch.testing.assert_close(result.uncond, uncond, rtol=0, atol=1e-14)
    expected = torch.lerp(CLEAN, uncond + 3 * (cond - uncond), mask)
    torch.testing.assert_close(result.denoised, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masking_keeps_x_s_dtype(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    result = Masked(lambda x, sigma: x.float() / 2, rand(4, 6), CLEAN, NOISE)(x, SIGMA.float())
    assert result.dtype == dtype
    exact = Masked(lambda x, sigma: x / 2, rand(4, 6), CLEAN, NOISE)(x.double(), SIGMA)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_conditioning_goes_through_and_inputs_stay() -> None:
    seen = {}

    def spy(x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        seen.update(conditioning)
        return x * 0

    before = [value.clone() for value in (X, CLEAN, NOISE)]
    Masked(spy, rand(4, 6), CLEAN, NOISE)(X, SIGMA, label=3)
    assert seen == {"label": 3}
    assert all(torch.equal(a, b) for a, b in zip(before, (X, CLEAN, NOISE), strict=True))


ACCEPTED = r"accepted are \(h, w\), \(2 or 1, h, w\), \(2 or 1, 3 or 1, h, w\)"


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (rand(3, 4, 6), ValueError, r"mask has shape \(3, 4, 6\).*" + ACCEPTED),
        (rand(3, 1, 4, 6), ValueError, r"mask has shape \(3, 1, 4, 6\).*" + ACCEPTED),
        (rand(2, 2, 4, 6), ValueError, r"mask has shape \(2, 2, 4, 6\).*" + ACCEPTED),
        (rand(6), ValueError, r"mask has shape \(6,\).*" + ACCEPTED),
        (rand(1, 2, 3, 4, 6), ValueError, ACCEPTED),
        (torch.ones(0, 6), ValueError, r"mask is empty, of shape \(0, 6\); mask=None"),
        (rand(4, 6) + 1, ValueError, r"must lie in \[0, 1\], 1 = process and 0 = keep, got \[1\..*clamp it, or divide"),
        (rand(4, 6) - 1, ValueError, r"must lie in \[0, 1\].*got \[-0\."),
        (torch.full((4, 6), 255, dtype=torch.uint8), ValueError, r"got \[255, 255\]; .*divide a mask of bytes by 255"),
        (torch.full((4, 6), float("nan")), ValueError, r"mask contains NaN"),
        (rand(4, 6).to(torch.complex128), TypeError, r"mask must be a real or boolean tensor, got torch.complex128"),
        (rand(4, 6).numpy(), TypeError, r"got ndarray; use torch.as_tensor\(mask\)"),
        ([[1.0]], TypeError, r"got list"),
    ],
)
def test_wrong_masks_are_refused_with_the_fix(mask, error: type[Exception], message: str) -> None:
    for check in (lambda: resize_mask(mask, X), lambda: Masked(DENOISER, mask, CLEAN)):
        with pytest.raises(error, match=message):
            check()


@pytest.mark.parametrize("shape", [(4,), (2, 4), (5, 1), (1, 5, 3)])
def test_masks_that_do_not_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    x = randn(2, 3)
    with pytest.raises(
        ValueError, match=r"does not fit x of shape \(2, 3\); accepted are \(3 or 1\), \(2 or 1, 3 or 1\)"
    ):
        resize_mask(rand(*shape), x)


def test_a_mask_may_be_guided() -> None:
    """Guidance calls it twice instead of doubling its batch: the same as a mask around guidance."""
    outside = Masked(guide(DENOISER, 2.0, negative={}), rand(4, 6), CLEAN)(X, SIGMA)
    torch.testing.assert_close(guide(Masked(DENOISER, rand(4, 6), CLEAN), 2.0, negative={})(X, SIGMA), outside)


def test_x_and_noise_must_be_like_the_background() -> None:
    with pytest.raises(
        ValueError, match=r"noise must have the shape .* of background, \(2, 3, 4, 6\) on cpu, got \(1,"
    ):
        Masked(DENOISER, rand(4, 6), CLEAN, NOISE[:1])
    masked = Masked(DENOISER, rand(4, 6), CLEAN)
    with pytest.raises(ValueError, match=r"x must have the shape .*got \(1, 3, 4, 6\)"):
        masked(X[:1], SIGMA[:1])
    with pytest.raises(ValueError, match=r"got \(4, 3, 4, 6\) on cpu; mask after guiding, Masked\(guide"):
        masked(torch.cat([X, X]), torch.cat([SIGMA, SIGMA]))
    with pytest.raises(TypeError, match=r"denoiser must return a tensor, got NoneType"):
        Masked(lambda x, sigma: None, rand(4, 6), CLEAN)(X, SIGMA)


def test_a_masked_denoiser_is_cut_into_rows() -> None:
    """Inside guidance and around it, with what is inside cut too; rows may be there several times."""
    masked = Masked(lambda x, sigma, shift=0.0: DENOISER(x - shift, sigma) + shift, rand(2, 4, 6), CLEAN)
    inside = guide(masked, 3.0, {"shift": 0.5}, {}, batch=2)
    outside = Masked(guide(masked.denoiser, 3.0, {"shift": 0.5}, {}, batch=2), masked.mask, CLEAN)
    index = torch.tensor([1, 1, 0])
    for guided in (inside, outside):
        torch.testing.assert_close(
            guided.take(index)(X[index], SIGMA[index]), outside(X, SIGMA)[index], rtol=0, atol=1e-14
        )
