r"""Denoising a part of the sample, with the rest pinned to a known one.

A mask ``m`` is 1 where the sampler works and 0 where the clean latent ``z`` is kept. With the kept
region at the noise level of the step, ``b = z + sigma eps`` (``b = z`` where no noise is given),

    x' = m x + (1 - m) b          what the denoiser sees
    D' = m D(x', sigma) + (1 - m) z

so only what goes in and out of the denoiser is masked; the sampler's own x is not overwritten, and
follows because the slope ``(x - D') / sigma`` leads it to z in the kept region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kinvert.denoisers.protocol import (
    Denoiser,
    Guided,
    broadcasts,
    check_output,
    expand,
    working_dtype,
)
from kinvert.inputs import check_beside, has_values, plain


def resize_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A user's mask as a tensor that broadcasts against x, in x's dtype and on its device.

    For images, x of shape (batch, channels, H, W), the mask is (h, w), (batch, h, w), (1, h, w) or
    (batch or 1, channels or 1, h, w); if (h, w) is not (H, W) it is resized bilinearly
    (align_corners=False). For any other x the mask broadcasts to x's event shape or to x's shape as
    it is.

    Reads the mask's values once, to check them: call it before a loop, not in it.

    Raises:
        TypeError: `mask` is not a tensor of numbers or booleans.
        ValueError: `mask` has a shape that does not fit x, NaN, or values outside [0, 1].
    """
    dtype = working_dtype(x)
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a real or boolean tensor, got {got}; use torch.as_tensor(mask)")
    check_beside("mask", mask, x)
    _check_values(mask)
    values = plain(mask).to(device=x.device, dtype=dtype)
    if x.ndim == 4:
        values = _as_image(values, x)
        if values.shape[-2:] != x.shape[-2:]:
            size = list(x.shape[-2:])
            values = functional.interpolate(values, size, mode="bilinear", align_corners=False)
            values = values.clamp(0, 1)  # interpolated ones can round to just above 1
    elif not broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to x's event shape "
            f"{tuple(x.shape[1:])} or to x's shape {tuple(x.shape)}"
        )
    return values.to(x.dtype)


def _check_values(mask: Tensor) -> None:
    if not mask.numel():
        got = tuple(mask.shape)
        raise ValueError(f"mask is empty, of shape {got}; mask=None processes everything")
    if not has_values(mask):
        return
    low, high = (float(value) for value in mask.aminmax())
    if math.isnan(low):
        raise ValueError("mask contains NaN; values must lie in [0, 1], 1 = process and 0 = keep")
    if low < 0 or high > 1:
        raise ValueError(
            f"mask values must lie in [0, 1], 1 = process and 0 = keep, got [{low:g}, {high:g}]; "
            "clamp it, or divide a mask of bytes by 255"
        )


def _as_image(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as (batch or 1, channels or 1, h, w)."""
    batch, channels, *_ = x.shape
    if mask.ndim == 2:
        return mask[None, None]
    if mask.ndim == 3 and mask.shape[0] in (1, batch):
        return mask[:, None]
    if mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, channels):
        return mask
    raise ValueError(
        f"mask has shape {tuple(mask.shape)}, which does not fit x of shape {tuple(x.shape)}; "
        f"accepted are (h, w), ({batch}, h, w), (1, h, w), ({batch} or 1, {channels} or 1, h, w)"
    )


@dataclass(frozen=True, eq=False)
class Masked:
    """A denoiser that processes the mask and keeps the rest, by the module's two equations.

    The pair of a denoiser that returns `Guided` is blended in ``denoised`` only, as ComfyUI does.

    Attributes:
        denoiser: the denoiser after guidance, ``Masked(guide(...), ...)``.
        mask: anything `resize_mask` accepts for the background; kept as `resize_mask` returns it.
        background: the clean latent z, of x's shape.
        noise: the background's fixed ``eps``, of x's shape; None keeps the background clean at
            every sigma.

    Raises:
        TypeError, ValueError: as `resize_mask`.
        ValueError: `noise` is not like `background`; in a call, x is not.
    """

    denoiser: Denoiser
    mask: Tensor = field(repr=False)
    background: Tensor = field(repr=False)
    noise: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", resize_mask(self.mask, self.background))
        if self.noise is not None:
            _check_like("noise", self.noise, self.background)

    def select(self, index: Tensor, batch: int) -> Masked:
        """The same for the samples `index`, shape (n,), of the batch; the denoiser must offer `select` too."""
        inner: Any = self.denoiser
        of_each = self.mask.ndim == self.background.ndim and len(self.mask) == batch  # else it is for every sample
        mask = self.mask[index] if of_each else self.mask
        noise = None if self.noise is None else self.noise[index]
        return Masked(inner.select(index, batch), mask, self.background[index], noise)

    def __call__(self, x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor | Guided:
        """The masked prediction, from x of the background's shape and sigma (batch,)."""
        _check_like("x", x, self.background)
        mask, clean = self.mask.to(x.dtype), self.background.to(x.dtype)
        kept = clean
        if self.noise is not None:
            kept = (self.background + expand(sigma, x) * self.noise).to(x.dtype)
        result = self.denoiser(torch.lerp(kept, x, mask), sigma, **conditioning)
        denoised = result.denoised if isinstance(result, Guided) else result
        denoised = check_output(denoised, x, "denoiser", "x, sigma, **c").to(x.dtype)
        denoised = torch.lerp(clean, denoised, mask)
        return Guided(denoised, result.uncond) if isinstance(result, Guided) else denoised


def _check_like(name: str, value: Tensor, background: Tensor) -> None:
    if (value.shape, value.device) != (background.shape, background.device):
        want = f"{tuple(background.shape)} on {background.device}"
        raise ValueError(
            f"{name} must have the shape and device of background, {want}, "
            f"got {tuple(value.shape)} on {value.device}; mask after guiding, Masked(guide(...), ...), so that "
            "the mask does not see a doubled batch"
        )
