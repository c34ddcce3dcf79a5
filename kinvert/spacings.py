"""Schedules by the spacing of their levels, and what all schedules share; public in `kinvert.schedules`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import MOST_STEPS, check_integer, check_number
from kinvert.levelbase import check_levels
from kinvert.levels import FlowTimes, Levels

__all__ = [
    "between",
    "bong_tangent",
    "check_falling",
    "check_steps",
    "leading",
    "linspace",
    "logit_normal",
    "schedule_of",
    "shift_terminal",
    "trailing",
    "with_zero",
]


def leading(steps: int, levels: Levels, offset: int = 1) -> Tensor:
    """Levels offset, offset + s, offset + 2 s, ... with the stride s = floor(M / n), n of them, downwards, then 0.

    It starts below sigma_max: at `offset + (n - 1) s`. Levels beyond the table are left out, and n > M is n = M. It is
    the timestep spacing "leading" of diffusers, with its `steps_offset`. `ddim_uniform` goes on to the table's top.

    Raises:
        ValueError: offset is not an index of the table.
    """
    n, table = check_steps(steps), check_levels(levels).sigmas
    if not 0 <= (offset := check_integer("offset", offset, 0, fix="pass e.g. 1")) < len(table):
        raise ValueError(f"offset must be an index of the table, below {len(table)}, got {offset}")
    stride = max(len(table) // n, 1)
    return _positive(levels, table[offset::stride][:n].flip(0))


def trailing(steps: int, levels: Levels) -> Tensor:
    """Every (M / n)-th level from the top, `T[round(M - j M / n) - 1]`, rounding half to even, then 0.

    It starts at sigma_max; n > M is n = M. It is the timestep spacing "trailing" of diffusers. `simple` rounds down,
    and is the same if n divides M. The schedule of SD Turbo is the first n of `trailing(10, levels)`, then 0.
    """
    table = check_levels(levels).sigmas
    n = min(check_steps(steps), len(table))
    index = np.rint(len(table) - np.arange(n) * len(table) / n).astype(np.int64) - 1
    return _positive(levels, table[torch.from_numpy(index)])


def logit_normal(steps: int, levels: Levels, mu: float = 0.0, std: float = 1.0) -> Tensor:
    """Quantiles of a normal law of ln sigma, cut off at the ends of the table, then 0.

    `ln sigma_j = mu + std Q(p_j)`, Q the quantile function of the unit normal, with p_j uniform from the law's share
    below sigma_max to that below sigma_min. For flow levels it is the law of `ln(t / (1 - t))`: the flow time t is
    logit-normal, as the times at which Stable Diffusion 3 was trained. n = 1 gives [sigma_max, 0].

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2024), arXiv
    2403.03206, section 3.1.

    Raises:
        ValueError: the law has so little of its mass on the table that levels coincide.
    """
    from scipy import special  # here, because importing it takes a tenth of the time of importing torch

    n, levels = check_steps(steps), check_levels(levels)
    mu, std = check_number("mu", mu), check_number("std", std, above=0)
    flow, ends = levels.coordinates == "flow", np.array([levels.sigma_max, levels.sigma_min])
    logs = special.logit(ends) if flow else np.log(ends)
    high, low = special.ndtr((logs - mu) / std).tolist()
    quantiles = mu + std * special.ndtri(np.linspace(high, low, n))
    quantiles[-1], quantiles[0] = logs[1], logs[0]
    sigmas = torch.from_numpy(special.expit(quantiles) if flow else np.exp(quantiles))
    if n > 1 and not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"logit_normal: with mu={mu:g} and std={std:g} levels coincide, since the law has next to nothing between "
            f"{ends[1]:g} and {ends[0]:g}; take a larger std, or mu nearer to {logs[np.isfinite(logs)].mean():.2g}"
        )
    return schedule_of(levels, between(sigmas, *ends[::-1].tolist()))


def bong_tangent(steps: int, levels: Levels, middle: float = 0.5, pivot: float = 0.6, slope: float = 0.2) -> Tensor:
    """Two arcs of an arctangent: slow at sigma_max, fast around the step `pivot n`, slow again at 0.

    With N = n + 2 and P = floor(pivot N) an arc of L values is `atan(s (P' - i))` for i = 0 ... L - 1, scaled to its
    ends, with `s = 40 slope / N`. The first goes from sigma_max to `middle sigma_max` in P values, with P' = P; the
    second to 0 in N - P values, with P' = 0; they share a value. n = 1 gives [sigma_max, 0].

    Source: RES4LYF (no paper is known). Its ends are 1, 1/2 and 0, as for a flow; here they are parts of sigma_max.

    Raises:
        ValueError: middle or pivot outside (0, 1), or so few steps that an arc has no length.
    """
    n, levels = check_steps(steps), check_levels(levels)
    middle, pivot = (check_number(name, v, above=0, below=1) for name, v in (("middle", middle), ("pivot", pivot)))
    total, slope = n + 2, 40 * check_number("slope", slope, above=0) / (n + 2)
    first = int(total * pivot)
    if n == 1:
        first, middle = 1, 1.0  # one step has no middle
    elif min(first, total - first) < 2:
        raise ValueError(f"pivot={pivot:g} leaves one part of {n} steps without a step; take it nearer to 1/2")
    upper = _arc(first, slope, first, 1.0, middle)[:-1] if n > 1 else []
    lower = _arc(total - first, slope, 0, middle, 0.0) if n > 1 else [1.0, 0.0]
    return schedule_of(levels, levels.sigma_max * torch.tensor([*upper, *lower], dtype=torch.float64, device="cpu"))


def shift_terminal(times: Tensor, terminal: float = 0.1) -> Tensor:
    """Stretch a schedule of flow times so that its last positive time is `terminal`; the start and the 0 stay.

    `t <- 1 - (1 - t) (1 - terminal) / (1 - t_last)`, the `shift_terminal` of the schedulers for LTX-Video and others.

    Args:
        times: falling flow times that end at 0, from `ki.schedule` with flow levels.
        terminal: the last positive time, between 0 and 1.

    Raises:
        ValueError: not flow times, no 0 at the end, terminal outside (0, 1), or a last time of 1.
    """
    terminal = check_number("terminal", terminal, above=0, below=1)
    if not isinstance(times, FlowTimes) or times.ndim != 1 or len(times) < 2 or float(times[-1]) != 0:
        raise ValueError(
            "times must be a schedule of flow times that ends at 0, e.g. ki.schedule('simple', 20, ki.levels.flow()), "
            "or ki.levels.FlowTimes(numbers)"
        )
    last = float(times[-2])
    if not 0 < last < 1:
        raise ValueError(f"the last positive time must be below 1, to be stretched to {terminal:g}; got {last:g}")
    stretched = 1 - (1 - torch.as_tensor(times[:-1], device="cpu")) * (1 - terminal) / (1 - last)
    return FlowTimes(with_zero(stretched.as_subclass(Tensor)))


def _arc(count: int, slope: float, pivot: int, start: float, end: float) -> list[float]:
    """Return an arctangent that falls around `pivot`, scaled to go from start to end."""
    values = [math.atan(slope * (pivot - i)) for i in range(count)]
    return [end + (start - end) * (value - values[-1]) / (values[0] - values[-1]) for value in values]


def check_steps(n: object, name: str = "steps") -> int:
    """Return a number of steps; raise if it is none, or too large."""
    steps = check_integer(name, n, fix="pass e.g. 20")
    if steps > MOST_STEPS:
        raise ValueError(
            f"{name} must be at most {MOST_STEPS}, got {steps}; the levels alone would take {steps * 8e-9:,.1f} GB"
        )
    return steps


def linspace(start: float, end: float, n: int) -> Tensor:
    """Return n numbers from start to end, float64 on the CPU."""
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")


def between(sigmas: Tensor, low: float, high: float) -> Tensor:
    """Set the ends to the bounds exactly, so that rounding does not move a flow time of 1, and append 0."""
    sigmas[-1] = low
    sigmas[0] = high
    return with_zero(sigmas)


def schedule_of(levels: Levels | float, sigmas: Tensor) -> Tensor:
    """Return the schedule, as `FlowTimes` if the levels are flow times."""
    return FlowTimes(sigmas) if getattr(levels, "coordinates", "ve") == "flow" else sigmas


def check_falling(name: str, options: dict[str, Any], sigmas: Tensor) -> None:
    """Raise ValueError if the options of a schedule give levels that are not finite, or that do not fall.

    `laplace` may repeat its bounds.
    """
    steps = sigmas.diff()
    if not sigmas.isfinite().all():
        what = "levels beyond all numbers"
    elif bool((steps > 0).any()) or (name != "laplace" and bool((steps == 0).any())):
        what = "levels that do not fall, since several of them are equal but for rounding"
    else:
        return
    raise ValueError(f"the options of {name}, {options}, give {what}; they are too extreme")


def with_zero(sigmas: Tensor) -> Tensor:
    """Append 0."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _positive(levels: Levels, sigmas: Tensor) -> Tensor:
    """Append 0 to falling levels, unless the last is 0 already (sigma <= 1e-5)."""
    return schedule_of(levels, sigmas if float(sigmas[-1]) <= 1e-5 and len(sigmas) > 1 else with_zero(sigmas))
