r"""Schedules that are computed from a denoiser: where a given sampler should put its levels.

The schedules of `kinvert.schedules` are formulas. Those of this module are searches, deterministic and made once for a
model, a sampler and a number of steps; what they return is an ordinary schedule.

* `round_trip_schedule` moves the inner levels until unsampling and sampling return the images best.
* `oss` chooses the levels of a few steps among those of many steps, so that the few steps end where the many do.

For Gaussian data N(m, s²) the first has a closed form, which is also where its search starts. With the angle
`a = atan(sigma / s)`, an Euler step up and the same step down multiply `x - m` by

    1 - (sigma - sigma')² s² / ((s² + sigma²) (s² + sigma'²)) = cos²(a - a'),

so the round trip of n steps multiplies it by a product of squared cosines, whose angles have a given sum. The logarithm
of the cosine is concave, so equal angles are best: the schedule is uniform in `atan(sigma / s)`, which for s = 1 is
`kl_optimal`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinvert.checks import check_count, check_decreasing
from kinvert.coordinates import Coordinates, settle
from kinvert.denoisers import Cfg, Denoiser, Guidance, guide, refuse_history, step_cfg
from kinvert.engine import check_state
from kinvert.engine.stepwise import stepwise
from kinvert.flowtimes import FlowTimes
from kinvert.forms import State
from kinvert.plan import Plan, compile_plan
from kinvert.roundtrip import round_trip
from kinvert.rules import Rule
from kinvert.tensors import rms

__all__ = ["oss", "round_trip_schedule"]

FARTHEST = 4.0
"""Each step may change by a factor of e^4 in either direction, in units of the last step."""
ROUNDING = 1e3
"""A round trip whose error is below so many roundings has nothing to gain."""
TINY = 1e-300


def round_trip_schedule(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    sampler: str | Rule = "euler",
    method: str = "unsample",
    iterations: int = 30,
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Tensor:
    r"""Move the inner levels of a schedule to where the round trip of images has the least error.

    The error is the mean square over all values of the batch, of `round_trip` itself, so that it holds for every
    sampler and every way up. It is minimised over the angles `atan sigma` between the levels by the quasi-Newton method
    L-BFGS-B, with differences in place of a gradient. It starts from the given levels or from those that are best for
    Gaussian data of the standard deviation of x (see `kinvert.optimal`), whichever return x better, and finds a minimum
    near there, not the best of all schedules. An iteration takes about n round trips of n steps.

    Args:
        denoiser, cfg, positive, negative: as in `sample`.
        x: images to return, shape (batch, *event), states at `sigmas[-1]`; float64 finds the levels to more digits.
        sigmas: the schedule to begin with; its two ends and its number n of steps stay. If it ends at 0, `unsample`
            starts from a little noise, as always.
        sampler: deterministic, by name or as a rule.
        method: how to go up, "unsample" or a published inversion, as in `round_trip`.
        iterations: of the search, at most.

    Returns:
        The schedule, float64 (n + 1,), `FlowTimes` for a denoiser in flow time. The error of its round trip, with
        `sigma_offset=0` if it ends above 0, is never more than that of `sigmas`.

    Source: the search, Byrd, Lu, Nocedal and Zhu, A Limited Memory Algorithm for Bound Constrained Optimization (1995).

    Raises:
        ValueError: a rising schedule; a way up that is exact, or a round trip that is exact to rounding, so that the
            levels do not matter; as in `round_trip`.
    """
    x, iterations = check_state(x), check_count("iterations", iterations)
    refuse_history(cfg, "round_trip_schedule", "makes many round trips")
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    check_decreasing("sigmas", schedule)
    if method in ("invert", "extract_noise"):
        raise ValueError(f"{method!r} is exact on every schedule; use method='unsample' or a published inversion")
    offset = 0.0 if method == "unsample" and schedule[-1] > 0 else None

    def error(levels: Tensor) -> float:
        """Return the mean squared error of the round trip on these levels."""
        trip = round_trip(
            denoiser, x, levels, sampler=rule, method=method, sigma_offset=offset, cfg=cfg, positive=positive,
            negative=negative,
        )  # fmt: skip
        return float(trip.mse.double().mean())

    starts = [_levels(np.array(schedule), coordinates)]
    if len(schedule) > 2:
        starts.append(_equal_angles(schedule, coordinates, float(x.double().std(correction=0))))
    least, start = min(((error(start), i) for i, start in enumerate(starts)))
    if least <= (ROUNDING * torch.finfo(x.dtype).eps * max(float(rms(x).max()), schedule[-1])) ** 2:
        raise ValueError(
            f"the round trip of {rule.name} is exact to rounding on these levels (rms {math.sqrt(least):.2g}), so "
            "there is nothing to gain from others; use the schedule that samples best"
        )
    if len(schedule) == 2:
        return starts[0]
    better, found = _moved(error, starts[start], coordinates, iterations, _difference(denoiser, x))
    return better if found < least else starts[start]


def _moved(
    error: Callable[[Tensor], float], start: Tensor, coordinates: Coordinates, iterations: int, difference: float
) -> tuple[Tensor, float]:
    """Return levels of less error, and it; the steps, as angles, are longer than at the start by factors."""
    from scipy.optimize import minimize  # here, because importing it takes a tenth of the time of importing torch

    angles = _angles(start.numpy(), coordinates)
    steps = -np.diff(angles)

    def levels(change: np.ndarray) -> Tensor:
        """Return the levels whose steps are longer by the factors exp(change); the last step is the unit."""
        length = steps * np.exp(np.append(change, 0.0))
        inner = angles[0] + (angles[-1] - angles[0]) * np.cumsum(length)[:-1] / length.sum()
        return _within(start, _of_angles(inner, coordinates), coordinates)

    found = minimize(
        lambda change: math.log(max(error(levels(change)), TINY)),
        np.zeros(len(steps) - 1),
        method="L-BFGS-B",
        bounds=[(-FARTHEST, FARTHEST)] * (len(steps) - 1),
        options={"maxiter": iterations, "eps": difference, "ftol": 1e-10},
    )
    return levels(found.x), math.exp(found.fun)


@torch.no_grad()
def oss(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    steps: int,
    sampler: str | Rule = "euler",
    cfg: Cfg = 1.0,
    positive: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Tensor:
    r"""Optimal stepsize distillation: choose few levels of a fine schedule by dynamic programming.

    The sampler runs down the fine schedule once, which gives the states y_0 = x, y_1, ..., y_N of the teacher. Then,
    for k = 1 ... n steps and every level j, the best state after k steps is

        z_k(j) = F_ij(z_(k-1)(i)),   i < j with the least mean square of F_ij(z_(k-1)(i)) - y_j,

    with the step F_ij of the sampler from level i to level j. The schedule is traced back from z_n(N). It is the best
    of all if a state nearer to y_i leads to one nearer to y_j, as for Gaussian data; the method supposes so.

    The error is the mean over the batch. The publication searches for each image by itself, as a batch of one does, and
    takes medians of the levels. Its calibration of amplitudes changes the sampler, not the schedule, and is left out.

    Args:
        denoiser, cfg, positive, negative: as in `sample`; a cfg for each step is that of the fine schedule.
        x: latents, shape (batch, *event), at `sigmas[0]`.
        sigmas: the fine schedule of N steps, e.g. 50 to 200; the result is a part of it.
        steps: n, at most N. For a sampler of one evaluation a step it takes N + n N evaluations of the batch; one of s
            takes about (s - 1) n N² / 2 more.
        sampler: deterministic, of one step: one that remembers has no steps that could be chosen by themselves.

    Returns:
        The schedule, float64 (n + 1,), with both ends of `sigmas`; `FlowTimes` for a denoiser in flow time.

    Source: Pei, Hu and Gu, Optimal Stepsize for Diffusion Sampling (2025), arXiv 2503.21774.

    Raises:
        ValueError: more steps than the fine schedule has, a rising schedule, a sampler that draws noise or remembers.
    """
    x, steps = check_state(x), check_count("steps", steps)
    refuse_history(cfg, "oss", "tries steps in another order")
    coordinates, rule, schedule = settle(denoiser, sampler, sigmas)
    check_decreasing("sigmas", schedule)
    last = len(schedule) - 1
    if steps > last:
        raise ValueError(f"steps must be at most those of sigmas, {last}, got {steps}; pass a finer schedule")
    plan = compile_plan(rule, schedule)
    if plan.is_stochastic or plan.auxiliary or any(step.reads - {"x"} for step in plan.steps):
        raise ValueError(
            f"oss needs a deterministic sampler whose steps depend on x alone, got {rule.name!r}, which draws noise or "
            "remembers; use e.g. 'euler' or 'heun'"
        )
    scales = step_cfg(cfg, schedule)
    bound = guide(denoiser, scales, positive, negative, pair=plan.is_guided, batch=len(x), coordinates=coordinates)
    plan_of = functools.cache(lambda i, j: compile_plan(rule, (schedule[i], schedule[j])))
    teacher = [x]
    for i in range(last):
        teacher.append(_Steps(plan_of, bound, teacher[-1], i).to(i + 1))
    came_from: list[dict[int, int]] = []
    states = {0: x}
    for k in range(1, steps + 1):
        reached: dict[int, tuple[float, int, Tensor]] = {}
        ends = range(k, last - steps + k + 1) if k < steps else (last,)
        for i, state in states.items():
            leave = _Steps(plan_of, bound, state, i)
            new = {j: leave.to(j) for j in ends if j > i}
            far = torch.stack([(z - teacher[j]).square().mean() for j, z in new.items()]).tolist()
            for (j, z), distance in zip(new.items(), far, strict=True):
                if j not in reached or distance < reached[j][0]:
                    reached[j] = (distance, i, z)
        came_from.append({j: i for j, (_, i, _) in reached.items()})
        states = {j: new for j, (_, _, new) in sorted(reached.items())}
    path = [last]
    for before in reversed(came_from):
        path.append(before[path[-1]])
    return _levels(np.array([schedule[i] for i in reversed(path)]), coordinates)


class _Steps:
    """The steps of a sampler from one state to many levels; they share a first evaluation that is at the state."""

    def __init__(self, plan_of: Callable[[int, int], Plan], denoiser: Guidance, x: Tensor, index: int) -> None:
        self.plan_of, self.denoiser, self.x, self.index = plan_of, denoiser, x, index
        self.first: Any = None

    def to(self, index: int) -> Tensor:
        """Return the state at another level."""
        plan = self.plan_of(self.index, index)
        shared, run = _begins_at_state(plan), stepwise(plan, self.x)
        while not run.done:
            if shared and not run.evaluations:
                self.first = self.denoiser(run.x, run.sigma) if self.first is None else self.first
                run.send(self.first)
            else:
                run.send(self.denoiser(run.x, run.sigma))
        return run.result


def _begins_at_state(plan: Plan) -> bool:
    """Tell whether the first evaluation of a step is at the state itself."""
    (step,) = plan.steps
    return bool(step.stages) and step.stages[0].sigma == step.sigma and step.stages[0].input.alias() == State("x")


def _levels(values: np.ndarray, coordinates: Coordinates) -> Tensor:
    """Return levels as a schedule."""
    levels = torch.tensor(values.tolist(), dtype=torch.float64, device="cpu")
    return FlowTimes(levels) if coordinates == "flow" else levels


def _angles(levels: np.ndarray, coordinates: Coordinates) -> np.ndarray:
    """Return `atan sigma`, of sigmas or of flow times t = sigma / (1 + sigma)."""
    return np.arctan2(levels, 1 - levels) if coordinates == "flow" else np.arctan(levels)


def _of_angles(angles: np.ndarray, coordinates: Coordinates) -> np.ndarray:
    """Return the levels of angles, the inverse of `_angles`."""
    return np.sin(angles) / (np.sin(angles) + np.cos(angles)) if coordinates == "flow" else np.tan(angles)


def _within(start: Tensor, inner: np.ndarray, coordinates: Coordinates) -> Tensor:
    """Return the levels with the ends of `start`, to the bit, and others inside."""
    return _levels(np.concatenate([start[:1].numpy(), inner, start[-1:].numpy()]), coordinates)


def _equal_angles(schedule: tuple[float, ...], coordinates: Coordinates, std: float) -> Tensor:
    """Return levels with the same ends that are uniform in `atan(sigma / std)`."""
    std = max(std, 1e-6)  # all values may be the same
    start = _levels(np.array(schedule), coordinates)
    high, low = np.arctan(np.tan(_angles(start.numpy()[[0, -1]], coordinates)) / std).tolist()
    inner = np.arctan(std * np.tan(np.linspace(high, low, len(schedule))[1:-1]))
    return _within(start, _of_angles(inner, coordinates), coordinates)


def _difference(denoiser: Denoiser, x: Tensor) -> float:
    """Return the length of differences in place of a gradient: the cube root of the rounding."""
    dtypes = (x.dtype, getattr(denoiser, "network_dtype", None) or x.dtype)
    return max(float(torch.finfo(dtype).eps) for dtype in dtypes) ** (1 / 3)
