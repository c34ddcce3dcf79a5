r"""Images to the latents that a pipeline takes and back, with the scale, the shift, the mean and the std of its VAE.

With z what the VAE encodes to, m = `latents_mean` or `shift_factor` (else 0), s = `latents_std` (else 1) and
f = `scaling_factor` (else 1) of its configuration, the latents of a pipeline are

    latents = (z - m) f / s

Pipelines of the Flux family pack 2 x 2 neighbours into one token of four times the channels. A pipeline without a VAE
works on the image itself, from -1 to 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinvert.adapters.diffusers import host
from kinvert.adapters.diffusers.sounds import decode_sound, encode_sound
from kinvert.checks import check_choice, check_finite, describe
from kinvert.tensors import wide_dtype

__all__ = ["decode", "encode"]

OUTPUTS = ("pil", "np", "pt")
CLIPS = 5  # dimensions of the latents of videos


@torch.no_grad()
def encode(pipe: Any, image: Any, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Return the latents of images, as `pipe(latents=...)` and `kd.invert` take them.

    Args:
        pipe: a pipeline of diffusers.
        image: a PIL image or a list of them; an array (batch, H, W, 3) or (H, W, 3); a tensor (batch, 3, H, W) or
            (3, H, W). Arrays and tensors hold bytes, or floats from 0 to 1, as diffusers returns them. For a pipeline
            of videos: a list of the frames of one video, an array (batch, frames, H, W, 3) or a tensor
            (batch, frames, 3, H, W). For Stable Audio: samples, an array or a tensor (batch, channels, samples) or
            (channels, samples), from -1 to 1, at the rate `pipe.vae.sampling_rate`.
        height, width: resize PIL images to this size. All images must have sides that the VAE can divide.

    Returns:
        Latents in the dtype of the VAE, on the pipeline's device. An image is encoded to the mean of the VAE's
        distribution, so that the same image has the same latents. A sound that is shorter than those of the pipeline
        ends in silence.

    Raises:
        TypeError, ValueError: something else; values out of range; sides, numbers of frames or samples that the
            pipeline would cut off; a pipeline whose latents are packed or scaled in a way that is not known.
    """
    if host.is_sound(pipe):
        if height is not None or width is not None:
            raise ValueError("height and width resize images; leave them out for a sound")
        return encode_sound(pipe, image)
    vae, video = host.vae_of(pipe), host.is_video(pipe)
    pixels = 2 * _pixels(image, height, width, video) - 1
    if vae is None:
        return pixels.to(device=host.device_of(pipe), dtype=host.network_dtype(pipe))
    packed = host.packs(pipe)
    with _upcast(vae):
        given = pixels.to(device=host.device_of(pipe), dtype=vae.dtype)
        z = host.encoded(vae, given.movedim(1, 2) if video else given)
    _check_sides(pixels, z, pipe, packed)
    mean, scale = _affine(vae, z)
    latents = (z - mean) * scale
    return _pack(latents) if packed else latents


@torch.no_grad()
def decode(
    pipe: Any, latents: Tensor, *, height: int | None = None, width: int | None = None, output_type: str | None = None
) -> Any:
    """Return the images, the videos or the sounds of latents, as the pipeline itself decodes them.

    Args:
        pipe: a pipeline of diffusers.
        latents: what `pipe(output_type="latent")` or `kd.encode` returns.
        height, width: the size of the image, for pipelines with packed latents only, which do not say it.
        output_type: "pil": a list of PIL images (of lists of frames for videos); "np": an array (batch, H, W, 3); "pt":
            a tensor (batch, 3, H, W) in float32, both from 0 to 1. Videos have frames after the batch. Sounds are "pt"
            or "np", (batch, channels, samples). None takes "pil" for images and videos, "pt" for sounds.

    Raises:
        TypeError, ValueError: latents that do not fit, or that decode to NaN.
    """
    sound = host.is_sound(pipe)
    if output_type is None:
        output_type = "pt" if sound else "pil"
    check_choice("output_type", output_type, OUTPUTS)
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be a floating point tensor, got {describe(latents)}")
    if sound:
        return decode_sound(pipe, latents, output_type)
    vae, video = host.vae_of(pipe), host.is_video(pipe)
    z = _unpack(latents, pipe, height, width) if host.packs(pipe) else latents
    if vae is not None:
        with _upcast(vae):
            mean, scale = _affine(vae, z)
            z = (z / scale + mean).to(device=host.device_of(pipe), dtype=vae.dtype)
            z = vae.decode(z, return_dict=False)[0]
    check_finite("the decoded image", z)
    pixels = (z.float() / 2 + 0.5).clamp(0, 1)
    pixels = pixels.movedim(2, 1) if video else pixels
    if output_type == "pt":
        return pixels
    array = pixels.movedim(-3, -1).cpu().numpy()
    return array if output_type == "np" else _pil(array)


# -- pixels -----------------------------------------------------------------------------------------------------------
def _pixels(image: Any, height: int | None, width: int | None, video: bool) -> Tensor:
    """Return images as a tensor (batch, 3, H, W), of videos (batch, frames, 3, H, W), from 0 to 1."""
    if hasattr(image, "convert") or (isinstance(image, Sequence) and not isinstance(image, str)):
        images = [image] if hasattr(image, "convert") else list(image)
        if not images or not all(hasattr(one, "convert") for one in images):
            raise TypeError(f"image must be a PIL image, a list of them, an array or a tensor, got {describe(image)}")
        values = torch.stack([_from_pil(one, height, width) for one in images])
        return values[None] if video else values
    if height is not None or width is not None:
        raise ValueError("height and width resize PIL images; resize an array or a tensor yourself, and leave them out")
    if isinstance(image, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    elif isinstance(image, Tensor):
        values = image
    else:
        raise TypeError(f"image must be a PIL image, a list of them, an array or a tensor, got {describe(image)}")
    wanted = CLIPS if video else CLIPS - 1
    values = values[None] if values.ndim == wanted - 1 else values
    if values.ndim != wanted or not values.numel():
        names = "(batch, frames, 3, H, W)" if video else "(batch, 3, H, W)"
        raise ValueError(f"image must have shape {names}, channels last for an array, got {tuple(image.shape)}")
    if values.dtype == torch.uint8:
        return values / 255
    if not values.is_floating_point():
        raise TypeError(f"image must hold bytes (uint8) or floats from 0 to 1, got {values.dtype}")
    check_finite("image", values)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"image must have values from 0 to 1, got {low:.3g} to {high:.3g}; use (image + 1) / 2 for values from -1 "
            "to 1, image / 255 for floats from 0 to 255"
        )
    return values.to(wide_dtype(values.dtype))


def _from_pil(image: Any, height: int | None, width: int | None) -> Tensor:
    if height is not None or width is not None:
        image = image.resize((width or image.width, height or image.height), resample=3)  # bicubic
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, -3) / 255


def _pil(array: np.ndarray) -> list[Any]:
    if array.ndim == CLIPS:
        return [_pil(frames) for frames in array]
    from PIL import Image

    pixels = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


def _check_sides(pixels: Tensor, z: Tensor, pipe: Any, packed: bool) -> None:
    """Raise ValueError if the VAE, or packing, cuts off a part of the image."""
    cells = [(side, cell) for side, cell in zip(pixels.shape[-2:], z.shape[-2:], strict=True)]
    factor = max(side // cell for side, cell in cells) * (2 if packed else 1)
    if any(side % factor for side, _ in cells):
        height, width = (max(round(side / factor), 1) * factor for side, _ in cells)
        raise ValueError(
            f"image must have sides that are multiples of {factor}, got {tuple(pixels.shape[-2:])}; crop or resize it, "
            f"e.g. a PIL image by height={height}, width={width}"
        )
    frames, kept = (pixels.shape[1], host.frames_per_latent(pipe)) if pixels.ndim == CLIPS else (1, 1)
    if (frames - 1) % kept:
        raise ValueError(f"a video must have a multiple of {kept} frames and one more, got {frames}; cut it")


# -- latents ----------------------------------------------------------------------------------------------------------
def _affine(vae: Any, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return m and f / s, which broadcast against z."""

    def each(value: Any) -> Any:
        """Return one number for each channel as a tensor, in the dtype of z."""
        if not isinstance(value, (list, tuple)):
            return value
        return torch.tensor(value, dtype=z.dtype, device=z.device).reshape(1, -1, *(1,) * (z.ndim - 2))

    mean, std, shift, factor = host.scaling_of(vae)
    if mean is not None and shift is not None:
        raise ValueError(
            f"the VAE has latents_mean and a shift_factor, {shift:g}, and only one of them can be subtracted; encode "
            "and decode with the pipeline's own methods"
        )
    return each(mean if mean is not None else shift or 0.0), factor / each(1.0 if std is None else std)


def _pack(latents: Tensor) -> Tensor:
    """Return 2 x 2 neighbours as one token: (batch, C, H, W) to (batch, H/2 W/2, 4 C)."""
    batch, channels, h, w = latents.shape
    cells = latents.reshape(batch, channels, h // 2, 2, w // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, h // 2 * (w // 2), 4 * channels)


def _unpack(latents: Tensor, pipe: Any, height: int | None, width: int | None) -> Tensor:
    """Undo `_pack`."""
    if height is None or width is None:
        raise ValueError(
            f"{type(pipe).__name__} packs its latents, so they do not say the size of the image; give height= and "
            "width=, in pixels"
        )
    cell = 2 * host.cell_of(pipe)
    rows, columns = height // cell, width // cell
    if latents.ndim != 3 or latents.shape[1] != rows * columns or latents.shape[2] % 4:
        raise ValueError(
            f"latents must have shape (batch, {rows * columns}, 4 C) for an image of {height} x {width}, got "
            f"{tuple(latents.shape)}; give the height and the width that they were made with"
        )
    batch, _, channels = latents.shape
    cells = latents.reshape(batch, rows, columns, channels // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * columns)


@contextlib.contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Compute in float32 if the VAE overflows in float16 and says so, as that of SDXL does."""
    dtype = vae.dtype
    if dtype != torch.float16 or not host.overflows(vae):
        yield
        return
    vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        vae.to(dtype=dtype)
