"""Small rules for tensors that every layer shares: the dtype to compute in, sizes and shapes per sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_half", "per_sample", "rms", "wide_dtype"]


def is_half(dtype: torch.dtype) -> bool:
    """Tell whether a floating point dtype is narrower than float32."""
    return dtype.itemsize < 4


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for float32 and half precision."""
    return torch.promote_types(dtype, torch.float32)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshape one value per sample, shape (batch,), so that it multiplies x, shape (batch, *event)."""
    return value.reshape(-1, *(1,) * (x.ndim - 1))


def rms(x: Tensor, region: Tensor | None = None) -> Tensor:
    """Compute the root mean square of each sample, over all values or where `region` is 1.

    Returns:
        Shape (batch,), in float32 for half precision, whose squares overflow.
    """
    wide = x.reshape(len(x), -1).to(wide_dtype(x.dtype))
    if region is None:
        return wide.square().mean(1).sqrt()
    inside = region.reshape(len(x), -1).to(wide)
    return ((wide.square() * inside).sum(1) / inside.sum(1).clamp(min=1)).sqrt()
