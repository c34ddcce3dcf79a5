r"""Brownian noise with the interfaces of k-diffusion, on the path of `kinvert.noise.brownian`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kinvert.noise import brownian

__all__ = ["BatchedBrownianTree", "BrownianTreeNoiseSampler"]

DEPTH = 16
"""The level at which a path is fixed: it resolves steps of 1e-5 of sigma."""


class BatchedBrownianTree:
    """A Brownian path W on an interval, for the whole batch, or one for each item.

    Args:
        x: a state of the run, shape (batch, *event): the shape, dtype and device of the path.
        t0, t1: the ends of the interval; the sign of the path is that of `t1 - t0`.
        seed: one int, or one for each item, which makes an item's path independent of its neighbours. None takes a seed
            from torch's global generator.
        **kwargs: options of torchsde, which is not used here.

    Raises:
        TypeError: options of torchsde.
    """

    def __init__(self, x: Tensor, t0: Any, t1: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        if kwargs:
            names = ", ".join(kwargs)
            raise TypeError(f"BatchedBrownianTree has no {names}: the path is not torchsde's; leave it out")
        low, high = sorted((float(t0), float(t1)))
        self.sign = 1.0 if float(t0) < float(t1) else -1.0
        self.low, self.slack = low, 1e-5 * (high - low)
        self.path = brownian(seed, DEPTH).bind(x)

    def __call__(self, t0: Any, t1: Any) -> Tensor:
        """Return the increment `W(t1) - W(t0)`, of variance `|t1 - t0|`, times the sign of the path.

        Raises:
            ValueError: times before the interval, or too close to each other.
        """
        a, b = float(t0), float(t1)
        return self.path(self._place(a), self._place(b)) * (self.sign * abs(b - a) ** 0.5)

    def _place(self, t: float) -> float:
        """Return the place of a time on the path, which begins at 0."""
        if t < self.low - self.slack:
            raise ValueError(f"the path begins at {self.low:g}, got the time {t:g}; give the lowest level of the run")
        return max(t - min(self.low, 0.0), 0.0)


class BrownianTreeNoiseSampler:
    """Noise of unit variance from one Brownian path, for the SDE samplers: `noise_sampler(sigma, sigma_next)`.

    Args:
        x: a state of the run, shape (batch, *event).
        sigma_min, sigma_max: the ends of the levels of the run.
        seed: one int, or one for each item; None takes one from torch's global generator.
        transform: maps a sigma, a tensor of shape (), to the time of the path.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Any] = lambda x: x,
    ) -> None:
        self.transform = transform
        self.tree = BatchedBrownianTree(x, self._time(sigma_min), self._time(sigma_max), seed)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """Return the noise of an interval, of x's shape."""
        t0, t1 = self._time(sigma), self._time(sigma_next)
        return self.tree(t0, t1) / abs(t1 - t0) ** 0.5

    def _time(self, sigma: Any) -> float:
        if not isinstance(sigma, Tensor):
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        return float(self.transform(sigma))
