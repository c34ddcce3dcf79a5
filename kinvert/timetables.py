"""Levels whose network time is a table, or the angle of the cosine process; public in `kinvert.levels`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_number
from kinvert.levelbase import INFINITE_SIGMA, Levels, as_array, log_uniform, widen

__all__ = ["TableLevels", "VDiffusionLevels", "from_table", "v_diffusion"]


@final
@dataclass(frozen=True, eq=False)
class VDiffusionLevels(Levels):
    """Continuous levels of the cosine process, with network time `t = 2 / pi atan(sigma)` in (0, 1)."""

    kind: ClassVar[str] = "v"

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return t = 2 / pi atan(sigma); `quantize` has no effect. A negative sigma gives NaN."""
        wide, dtype = widen("sigma", sigma)
        return (torch.where(wide < 0, torch.nan, wide).atan() * (2 / math.pi)).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return sigma = tan(pi t / 2), not clamped."""
        wide, dtype = widen("t", t)
        return (wide * (math.pi / 2)).tan().to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Return sigma at t = (1 - p) t_max + p t_min for 0 < p < 1; t_min, t_max are the times of the table's ends."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        first, last = self.timestep(self.sigma_min), self.timestep(self.sigma_max)
        return 0.0 if p >= 1 else float(self.sigma((1 - p) * last + p * first))


@final
@dataclass(frozen=True, eq=False)
class TableLevels(Levels):
    """Noise levels with the network's time of each, not necessarily integers; in between t is linear in ln sigma.

    Attributes:
        times: the network's time of each entry of the table, float64 1-D on the CPU, never decreasing.
    """

    kind: ClassVar[str] = "table"
    times: Tensor = field(kw_only=True, repr=False)
    _buffers: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ln sigma and the times; they are copied to a device once."""
        if like.device not in self._buffers:
            with torch.inference_mode(False):  # as in `DiscreteLevels`
                self._buffers[like.device] = (self.sigmas.log().to(like), self.times.to(like, copy=True))
        return self._buffers[like.device]

    def timestep(self, sigma: Tensor | float, quantize: bool = True) -> Tensor:
        """Return the time at sigma, or that of the nearest end outside the table; `quantize` has no effect."""
        wide, dtype = widen("sigma", sigma)
        log, times = self._on(wide)
        return _interpolated(wide.log(), log, times).to(dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return the level at time t, with ln sigma linear in t; the lowest one if several have the same time."""
        wide, dtype = widen("t", t)
        log, times = self._on(wide)
        return _interpolated(wide, times, log).exp().to(dtype)

    def percent_to_sigma(self, p: float) -> float:
        """Return the level at time (1 - p) t_max + p t_min for 0 < p < 1."""
        p = check_number("p", p)
        if p <= 0:
            return INFINITE_SIGMA
        return 0.0 if p >= 1 else float(self.sigma((1 - p) * float(self.times[-1]) + p * float(self.times[0])))


def _interpolated(value: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Apply the piecewise linear function that maps `at` (never decreasing) to `to`, exactly; constant outside."""
    value = value[..., None]  # as in `DiscreteLevels.timestep`
    high = torch.bucketize(value.contiguous(), at).clamp(1, len(at) - 1)
    width = at[high] - at[high - 1]
    weight = ((value - at[high - 1]) / torch.where(width > 0, width, 1)).clamp(0, 1)
    return torch.where(weight == 1, to[high], torch.lerp(to[high - 1], to[high], weight))[..., 0]


def v_diffusion(sigma_min: float = 0.002, sigma_max: float = 120.0) -> VDiffusionLevels:
    """Return levels of the cosine process `x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps`, for `from_v`.

    The table is 1000 sigmas, uniform in ln sigma; a time is `2 / pi atan(sigma)`.

    Source: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models (2022), arXiv 2202.00512; K.
    Crowson, v-diffusion (2021).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """
    return VDiffusionLevels(log_uniform(sigma_min, sigma_max))


def from_table(
    sigmas: Tensor | np.ndarray | Sequence[float],
    timesteps: Tensor | np.ndarray | Sequence[float],
    sigma_data: float = 1.0,
) -> TableLevels:
    """Return levels with a given network time for each sigma, e.g. those of a host's scheduler.

    Args:
        sigmas: rising or falling noise levels; a 0 at the end, which has no time, is dropped.
        timesteps: the time of each, in the same order; integers or not.
        sigma_data: as in `Levels`.

    For a scheduler of diffusers: `from_table(scheduler.sigmas, scheduler.timesteps)`, after `set_timesteps`.

    Raises:
        ValueError: fewer than two levels, not one time for each, levels that are not positive and strictly monotone, or
            times that do not follow the order of the levels.
    """
    table, times = as_array("sigmas", sigmas), as_array("timesteps", timesteps)
    if table[-1] == 0 and len(table) == len(times) + 1:
        table = table[:-1]
    if len(table) != len(times):
        raise ValueError(f"there must be one timestep for each sigma, got {len(times)} for {len(table)}")
    if table[0] > table[-1]:
        table, times = table[::-1], times[::-1]
    if not (np.isfinite(times).all() and (np.diff(times) >= 0).all() and times[0] < times[-1]):
        raise ValueError(f"timesteps must rise with sigma, got {times[0]:g} ... {times[-1]:g} from the lowest one up")
    return TableLevels(
        torch.from_numpy(table.copy()),
        check_number("sigma_data", sigma_data, above=0),
        times=torch.from_numpy(times.copy()),
    )
