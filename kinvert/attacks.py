"""What happens to images on their way: noise, a crop, a blur, JPEG, rounding. Does a message in the latent survive it?

Every function takes images of shape (batch, channels, H, W) with values from -1 to 1 and returns images of the same
shape, dtype and device. What is outside of [-1, 1], before or after, is clipped, as in a file. Each image is treated by
itself: its result does not depend on the others of the batch.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kinvert.checks import check_dense, check_finite, check_integer, check_number, check_values, describe
from kinvert.fidelity import check_images
from kinvert.pictures import pillow
from kinvert.streams import derived_seed
from kinvert.tensors import wide_dtype

__all__ = ["blur", "crop_and_resize", "gaussian_noise", "jpeg", "quantize"]


def gaussian_noise(images: Tensor, std: float, seed: int = 0) -> Tensor:
    """Add independent normal noise to every value.

    The noise is drawn on the CPU in float64, for each image from its own stream: it does not depend on the device, the
    dtype or the size of the batch.

    Args:
        images: shape (batch, channels, H, W).
        std: standard deviation of the noise, not negative; the range of the images is 2.
        seed: of the noise; images with the same place in the batch get the same noise.
    """
    wide = _wide(images)
    std, seed = check_number("std", std, low=0.0), check_integer("seed", seed, 0)
    streams = [
        torch.Generator("cpu").manual_seed(derived_seed(f"attack on image {k}", seed)) for k in range(len(images))
    ]
    noise = [torch.randn(images.shape[1:], generator=one, dtype=torch.float64, device="cpu") for one in streams]
    return _like(images, wide + std * torch.stack(noise).to(wide)) if noise else images.clone()


def crop_and_resize(images: Tensor, share: float) -> Tensor:
    """Cut out the middle, and enlarge it to the size of the image by bilinear interpolation.

    Args:
        images: shape (batch, channels, H, W).
        share: part of each side that is kept, above 0 and at most 1; the window has at least one pixel. If the window
            cannot be in the middle, it is half a pixel nearer to the top or to the left.
    """
    wide = _wide(images)
    share = check_number("share", share, above=0.0)
    if share > 1:
        raise ValueError(f"share must be at most 1, which keeps the whole image, got {share:g}")
    height, width = (max(1, round(share * size)) for size in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    window = wide[:, :, top : top + height, left : left + width]
    return _like(images, functional.interpolate(window, size=images.shape[2:], mode="bilinear", align_corners=False))


def blur(images: Tensor, std: float) -> Tensor:
    """Average over a Gaussian window, which ends at three standard deviations; the edge pixels go on outside.

    Args:
        images: shape (batch, channels, H, W).
        std: standard deviation of the window in pixels, not negative; 0 changes nothing.
    """
    wide = _wide(images)
    std = check_number("std", std, low=0.0)
    radius = math.ceil(3 * std)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    window = torch.exp(-0.5 * (offsets / std).square()) if radius else torch.ones_like(offsets)
    window = (window / window.sum()).to(wide)
    padded = functional.pad(wide, (radius,) * 4, mode="replicate").flatten(0, 1)[:, None]
    rows = functional.conv2d(padded, window[None, None, :, None])
    return _like(images, functional.conv2d(rows, window[None, None, None, :]).reshape(images.shape))


def quantize(images: Tensor, bits: int = 8) -> Tensor:
    """Round every value to one of `2^bits` levels from -1 to 1, as a file without losses does with 8 bits.

    Args:
        images: shape (batch, channels, H, W).
        bits: of each value, from 1 to 16.
    """
    wide = _wide(images)
    half = (2 ** check_integer("bits", bits, 1, 16) - 1) / 2
    return _like(images, ((wide + 1) * half).round() / half - 1)


def jpeg(images: Tensor, quality: int = 75) -> Tensor:
    """Write images as JPEG and read them again. The result has no derivative.

    Args:
        images: shape (batch, 1 or 3, H, W): grey or RGB.
        quality: from 1 to 95, as Pillow has it; colours have half the resolution of the brightness.

    Raises:
        ModuleNotFoundError: Pillow is missing: `pip install 'kinvert[cli]'`.
    """
    wide = _wide(images).detach()
    quality = check_integer("quality", quality, 1, 95)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, grey or RGB, for JPEG, got {images.shape[1]}")
    from_pillow, out = pillow(), wide.new_empty(wide.shape, device="cpu")
    levels = ((wide.cpu() + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    for k, pixels in enumerate(levels.numpy()):
        file = io.BytesIO()
        picture = from_pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture.save(file, format="JPEG", quality=quality, subsampling=2)
        read = np.array(from_pillow.open(file)).reshape(pixels.shape)
        out[k] = torch.from_numpy(read).movedim(-1, 0).to(out.dtype) / 127.5 - 1
    return _like(images, out.to(images.device))


# -- parts -------------------------------------------------------------------------------------------------------------
def _wide(images: Tensor) -> Tensor:
    """Return checked and clipped images in the dtype to compute in."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a floating point tensor of values from -1 to 1, got {describe(images)}")
    check_dense("images", images)
    check_values("images", images, "they are to be changed")
    check_images("images", images, 1)
    check_finite("images", images)
    return images.to(wide_dtype(images.dtype)).clamp(-1, 1)


def _like(images: Tensor, changed: Tensor) -> Tensor:
    return changed.clamp(-1, 1).to(images.dtype)
