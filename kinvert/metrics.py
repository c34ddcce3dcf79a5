r"""How far a reconstruction is from its original, one number per sample.

All take `reconstruction` and `original` of shape (batch, *event) and return a tensor of shape (batch,). With
`e = reconstruction - original`: `mse = mean e^2`, `psnr = 10 log10(range^2 / mse)` in dB,
`nmse = 10 log10(sum e^2 / sum original^2)` in dB, `max_error = max |e|`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Mean squared error per sample, shape (batch,)."""
    return _flat_error(reconstruction, original).square().mean(1)


def psnr(reconstruction: Tensor, original: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio per sample in dB, shape (batch,); infinite where the two are equal.

    Args:
        reconstruction: shape (batch, *event).
        original: the same shape.
        data_range: distance between the darkest and the brightest possible value: 2 for data in [-1, 1].
    """
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}; it is 2 for data in [-1, 1]")
    return 10.0 * torch.log10(data_range**2 / mse(reconstruction, original))


def nmse(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Error relative to the energy of the original in dB, shape (batch,): -20 dB is 10% in amplitude."""
    error = _flat_error(reconstruction, original).square().sum(1)
    return 10.0 * torch.log10(error / original.flatten(1).to(error.dtype).square().sum(1))


def max_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Largest absolute error per sample, shape (batch,)."""
    return _flat_error(reconstruction, original).abs().amax(1)


def _flat_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    if reconstruction.shape != original.shape:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and original {tuple(original.shape)}; "
            "they must be equal, (batch, *event)"
        )
    wide = torch.promote_types(original.dtype, torch.float32)
    return (reconstruction.to(wide) - original.to(wide)).reshape(len(original), -1)
