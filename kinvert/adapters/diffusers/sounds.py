"""Sounds to latents and back, as `StableAudioPipeline` does it: without a scale, and all of one length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinvert.adapters.diffusers import host
from kinvert.checks import check_finite, describe
from kinvert.tensors import wide_dtype

__all__ = ["decode_sound", "encode_sound"]

AXES = 3
LOUDEST = 10.0
"""A value that no sound reaches whose full scale is 1."""


def encode_sound(pipe: Any, sound: Any) -> Tensor:
    """Return the latents of sounds; see `kinvert.adapters.diffusers.encode`."""
    values = _samples(sound)
    channels, length, rate = host.samples_of_sound(pipe)
    if values.ndim == AXES - 1:
        values = values[None]
    if values.ndim != AXES or values.shape[1] != channels or not len(values):
        raise ValueError(
            f"sound must have shape (batch, {channels}, samples), got {tuple(values.shape)}; sound.mean(-2, "
            f"keepdim=True) makes one channel, and expand(-1, {channels}, -1) of that {channels}"
        )
    if not 0 < values.shape[2] <= length:
        raise ValueError(
            f"sound must have 1 to {length} samples, {length / rate:.3g} s at {rate} a second, got {values.shape[2]}; "
            "cut it, and resample it if it has another rate"
        )
    padded = torch.nn.functional.pad(values, (0, length - values.shape[2]))
    return host.encoded(pipe.vae, padded.to(device=host.device_of(pipe), dtype=pipe.vae.dtype))


def decode_sound(pipe: Any, latents: Tensor, output_type: str) -> Any:
    """Return the sounds of latents."""
    if output_type == "pil":
        raise ValueError("output_type='pil' is for images; use 'pt' or 'np' for sounds")
    z = latents.to(device=host.device_of(pipe), dtype=pipe.vae.dtype)
    sound = pipe.vae.decode(z, return_dict=False)[0]
    check_finite("the decoded sound", sound)
    return sound.float() if output_type == "pt" else sound.float().cpu().numpy()


def _samples(sound: Any) -> Tensor:
    """Return samples as a tensor of floats."""
    if not isinstance(sound, (np.ndarray, Tensor)):
        raise TypeError(f"sound must be a tensor or an array of samples, got {describe(sound)}")
    values = sound if isinstance(sound, Tensor) else torch.from_numpy(np.ascontiguousarray(sound))
    if not values.is_floating_point():
        raise TypeError(f"sound must hold floats from -1 to 1, got {values.dtype}; divide int16 by 32768")
    check_finite("sound", values)
    if values.numel() and float(values.abs().max()) > LOUDEST:
        raise ValueError(
            f"sound must have values from -1 to 1, got up to {float(values.abs().max()):.3g}; divide by its full scale"
        )
    return values.to(wide_dtype(values.dtype))
