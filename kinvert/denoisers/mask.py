r"""Denoising a part of the sample, with the rest pinned to a known one.

A mask `m` is 1 where the sampler works and 0 where the clean latent `z` is kept. With the kept region at the noise
level of the step, `b = a z + sigma eps` (`b = a z` if no noise is given), where `a = 1`, in flow time `a = 1 - sigma`,

    x' = m x + (1 - m) b          what the denoiser sees
    D' = m D(x', sigma) + (1 - m) z

so only the input and the output of the denoiser are masked. The sampler's own x is not overwritten: the slope
`(x - D') / sigma` leads it to z in the kept region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kinvert.checks import check_beside, has_values, plain
from kinvert.coordinates import Coordinates, coordinates_of
from kinvert.denoisers.protocol import (
    Denoiser,
    Guided,
    broadcasts,
    check_output,
    expand,
    take_rows,
    working_dtype,
)
from kinvert.showing.brief import brief_repr

__all__ = ["Masked", "resize_mask"]


def resize_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return a user's mask as a tensor that broadcasts against x, in x's dtype and on its device.

    One rule for all events. Let *space* be the dimensions of x after batch and channels, all but the batch
    where an event has one dimension or none. A mask has the dimensions

    * *space*: it is shared by all items and channels;
    * (batch or 1, *space*): one for each item;
    * (batch or 1, channels or 1, *space*): one for each item and channel;
    * the last ones of *space*, or none: shared, and the same along the others, e.g. (H, W) for every frame of a
      video. If its first dimension may as well be the batch it is refused.

    So (L,), (batch, L) and (batch, channels, L) are masks of audio, (H, W), (batch, H, W) and (batch, channels, H, W)
    of images. A dimension of *space* may be 1. The mask of an image has its last two dimensions, and is resized to
    (H, W) bilinearly (align_corners=False) if it has another size.

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
    values = _placed(values, x)
    if x.ndim == 4:
        values = values[(None,) * (4 - values.ndim)]
        if values.shape[-2:] != x.shape[-2:]:
            size = list(x.shape[-2:])
            values = functional.interpolate(values, size, mode="bilinear", align_corners=False)
            values = values.clamp(0, 1)  # interpolated ones can round to just above 1
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


def _placed(mask: Tensor, x: Tensor) -> Tensor:
    """Give the mask dimensions that broadcast against x, by the rule of `resize_mask`."""
    batch, *event = x.shape
    channels = event[:1] if len(event) > 1 else []
    space = event[len(channels) :]
    n, k, shape = len(space), mask.ndim, mask.shape
    if x.ndim == 4:  # of any size, but not of fewer dimensions
        shared = k == 2
        space = list(shape[-2:])
    else:
        shared = k <= n and broadcasts(shape, torch.Size(space))
    if shared and 0 < k < n and shape[0] == batch > 1 and broadcasts(shape[1:], torch.Size(space)):
        raise ValueError(
            f"mask has shape {tuple(shape)}, which can be read in two ways for x of shape {tuple(x.shape)}: its first "
            f"dimension as the batch, or as one of {tuple(space)}; give it {n + 1} dimensions, (batch or 1, *space), "
            f"e.g. mask.reshape({batch}, {'1, ' * (n + 1 - k)}...) or mask[{'None, ' * (n + 1 - k)}]"
        )
    if shared:
        return mask
    if k == n + 1 and broadcasts(shape, torch.Size([batch, *space])):
        return mask[:, None] if channels else mask
    if channels and k == n + 2 and broadcasts(shape, x.shape[:2] + torch.Size(space)):
        return mask
    names = ", ".join(["h", "w"] if x.ndim == 4 else [f"{size} or 1" for size in space])
    accepted = [f"({names})", f"({batch} or 1{names and ', '}{names})"]
    accepted += [f"({batch} or 1, {channels[0]} or 1, {names})"] if channels else []
    raise ValueError(
        f"mask has shape {tuple(shape)}, which does not fit x of shape {tuple(x.shape)}; accepted are "
        f"{', '.join(accepted)}: for all items, for each, and for each channel"
    )


@dataclass(frozen=True, eq=False)
class Masked:
    """A denoiser that processes the mask and keeps the rest, by the module's two equations.

    The pair of a denoiser that returns `Guided` is blended in `denoised` only, as ComfyUI does.

    Attributes:
        denoiser: the denoiser after guidance, `Masked(guide(...), ...)`.
        mask: anything `resize_mask` accepts for the background; kept as `resize_mask` returns it.
        background: the clean latent z, of x's shape.
        noise: the background's fixed `eps`, unit variance, of x's shape; None keeps the background
            clean at every sigma.
        coordinates: of x and sigma, "ve" or "flow"; None takes the denoiser's, or "ve".

    Raises:
        TypeError, ValueError: as `resize_mask`.
        ValueError: `noise` is not like `background`; in a call, x is not.
    """

    denoiser: Denoiser
    mask: Tensor = field(repr=False)
    background: Tensor = field(repr=False)
    noise: Tensor | None = field(default=None, repr=False)
    coordinates: Coordinates | None = None

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", resize_mask(self.mask, self.background))
        if self.coordinates is None:
            object.__setattr__(self, "coordinates", coordinates_of(self.denoiser))
        if self.noise is not None:
            _check_like("noise", self.noise, self.background)

    def take(self, index: Tensor) -> Masked:
        """Return the masked denoiser of the rows `index`, shape (n,)."""
        of_each = self.mask.ndim == self.background.ndim and len(self.mask) == len(self.background)
        mask = self.mask[index] if of_each else self.mask  # another mask is one for all rows
        noise = None if self.noise is None else self.noise[index]
        return Masked(take_rows(self.denoiser, index), mask, self.background[index], noise, self.coordinates)

    def __call__(self, x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor | Guided:
        """Return the masked prediction, from x of the background's shape and sigma (batch,)."""
        _check_like("x", x, self.background)
        mask, clean = self.mask.to(x.dtype), self.background.to(x.dtype)
        level, kept = expand(sigma, x), clean
        if self.noise is not None or self.coordinates == "flow":
            signal = (1 - level) * self.background if self.coordinates == "flow" else self.background
            kept = (signal if self.noise is None else signal + level * self.noise).to(x.dtype)
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
