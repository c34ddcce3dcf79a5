"""How far a reconstruction is from its original. Public in `kinvert.metrics`, which has the definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinvert.tensors import wide_dtype

__all__ = ["check_images", "is_image", "max_error", "mse", "nmse", "psnr", "reconstruction_metrics", "ssim"]


def mse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Compute the mean squared error of each sample, shape (batch,)."""
    return _bounded(_flat_error(reconstruction, original).square()).mean(1)


def psnr(reconstruction: Tensor, original: Tensor, data_range: float = 2.0) -> Tensor:
    """Compute the peak signal-to-noise ratio of each sample in dB, shape (batch,); infinite if the two are equal.

    Args:
        reconstruction: shape (batch, *event).
        original: the same shape.
        data_range: distance between the darkest and the brightest possible value: 2 for data in [-1, 1].
    """
    _check_range(data_range)
    return 10.0 * torch.log10(data_range**2 / mse(reconstruction, original))


def nmse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Compute the error relative to the energy of the original in dB, shape (batch,): -20 dB is 10% in amplitude.

    It is -inf if the two are equal, even if both are 0, and inf if only the original is 0.
    """
    difference = _flat_error(reconstruction, original)
    flat = original.reshape(len(original), -1).to(difference.dtype)
    size = flat.abs().amax(1, keepdim=True)  # squares of values divided by it stay in the range of the dtype
    size = torch.where(size > 0, size, 1.0)
    error = _bounded((difference / size).square()).sum(1)
    decibels = 10.0 * torch.log10(error / (flat / size).square().sum(1))
    return torch.where(difference.eq(0).all(1), -math.inf, decibels)


def max_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Compute the largest absolute error of each sample, shape (batch,)."""
    return _bounded(_flat_error(reconstruction, original).abs()).amax(1)


def ssim(reconstruction: Tensor, original: Tensor, data_range: float = 2.0) -> Tensor:
    r"""Compute the structural similarity of images, shape (batch,): 1 if they are equal, 0 if nothing is alike.

    It is the mean, over channels and windows inside the image, of

        (2 m_a m_b + c1) (2 cov + c2) / ((m_a^2 + m_b^2 + c1) (v_a + v_b + c2))

    with the means m, variances v and covariance under a Gaussian window of 11 x 11 pixels and standard deviation 1.5,
    `c1 = (0.01 range)^2` and `c2 = (0.03 range)^2`. If the shorter side has fewer than 11 pixels, the window is the
    largest odd one that fits, with its standard deviation in proportion: 7 x 7 and 0.95 for an image of 8 x 8.

    Args:
        reconstruction: shape (batch, channels, H, W), H and W at least 3.
        original: the same shape.
        data_range: distance between the darkest and the brightest possible value: 2 for data in [-1, 1].

    Raises:
        ValueError: not images of at least 3 x 3 pixels, or a data range that is not positive.

    Source: Wang, Bovik, Sheikh and Simoncelli, Image Quality Assessment: From Error Visibility to Structural Similarity
    (2004), doi 10.1109/TIP.2003.819861.
    """
    _check_range(data_range)
    check_images("original", original, 3)
    e = _flat_error(reconstruction, original)
    window = _window(min(original.shape[2:])).to(e)
    b = original.to(e.dtype).flatten(0, 1)[:, None]
    a = b + torch.where(e.isfinite(), e, 0.0).reshape(b.shape)

    def local(x: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(x, window[None, None, :, None])
        return torch.nn.functional.conv2d(rows, window[None, None, None, :])

    mean_a, mean_b, product = local(a), local(b), local(a * b)
    squares = mean_a.square() + mean_b.square()
    variances = local(a.square() + b.square()) - squares
    covariance = product - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    # Values whose squares overflow count as infinitely far away, like those that are not finite.
    means = similarity.reshape(len(original), -1).mean(1)
    return torch.where(e.isfinite().all(1) & means.isfinite(), means, 0.0)


def reconstruction_metrics(restored: Tensor, image: Tensor, data_range: float = 2.0) -> dict[str, Tensor]:
    """Compute all metrics of a reconstruction, each of shape (batch,), under the names that records use.

    These are `nmse_db`, `mse`, `psnr`, `max_error`, and for images (batch, channels, H, W) of at least 3 x 3 pixels
    `ssim`.

    Args:
        restored: the reconstruction, shape (batch, *event).
        image: its original, the same shape.
        data_range: as in `psnr`.
    """
    measured = {
        "nmse_db": nmse(restored, image),
        "mse": mse(restored, image),
        "psnr": psnr(restored, image, data_range),
        "max_error": max_error(restored, image),
    }
    if is_image(image, 3):
        measured["ssim"] = ssim(restored, image, data_range)
    return measured


# -- parts -------------------------------------------------------------------------------------------------------------
def _flat_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    if reconstruction.shape != original.shape or original.numel() == 0:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and original {tuple(original.shape)}; "
            "they must be equal, (batch, *event), and not empty"
        )
    if not original.isfinite().all():
        raise ValueError("original must be finite, got a NaN or an infinity in it")
    wide = wide_dtype(original.dtype)
    return (reconstruction.to(wide) - original.to(wide)).reshape(len(original), -1)


def _bounded(error: Tensor) -> Tensor:
    return torch.where(error.isnan(), math.inf, error)


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}; it is 2 for data in [-1, 1]")


def is_image(x: Tensor, side: int) -> bool:
    """Tell whether x has shape (batch, channels, H, W), with H and W at least `side`."""
    return x.ndim == 4 and min(x.shape[2:]) >= side


def check_images(name: str, x: Tensor, side: int) -> None:
    """Raise ValueError if x is not made of images with sides of at least `side` pixels."""
    if not is_image(x, side):
        raise ValueError(
            f"{name} must be images of shape (batch, channels, H, W) with H and W at least {side}, got {tuple(x.shape)}"
        )


def _window(side: int) -> Tensor:
    size = min(11, side - 1 + side % 2)
    offsets = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2
    weights = torch.exp(-0.5 * (offsets / (1.5 * size / 11)) ** 2)
    return weights / weights.sum()
