"""The helper of k-diffusion that its samplers and wrappers are written with."""

from __future__ import annotations

from torch import Tensor

__all__ = ["append_dims"]


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append dimensions of size 1 to x until it has `target_dims`.

    Raises:
        ValueError: x has more dimensions.
    """
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} dimensions, more than target_dims={target_dims}; give the larger number")
    return x.reshape(*x.shape, *(1,) * (target_dims - x.ndim))
