r"""Sigma schedules: which noise levels a sampler visits.

A schedule of n steps is a decreasing 1-D float64 CPU tensor of n + 1 values `sigma_0 > ... > sigma_n = 0`. Exceptions,
as their docstrings say: `laplace` ends without the 0, `ddim_uniform` and `beta` may have another number of steps, and
`simple` (n > M) and `laplace` (clamping) may repeat values. A repeated sigma is a step of length 0, by which multistep
samplers divide.

Symbols: n steps, j the index of a value, `u_j = j / (n - 1)` (0 for n = 1), [sigma_min, sigma_max] the bounds, and of a
model's `Levels`: the table T of length M (ascending) and the maps t(sigma), sigma(t).

All functions raise TypeError if steps is not an int, another number is not a number, or levels is not a `Levels`. They
raise ValueError if steps < 1, if not 0 < sigma_min < sigma_max, if a shape parameter (rho, alpha, beta, ...) is not
positive and finite, and in the cases that a docstring names.

`schedule` takes the names that ComfyUI and k-diffusion use, and follows ComfyUI's rules for denoise < 1 and for
samplers that drop the penultimate sigma. The hosts compute in float32. Their values differ from these by its rounding,
which can be amplified to 2e-4 (`kl_optimal` with a large sigma_max, `vp` at small times).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kinvert._moved import renamed
from kinvert.checks import check_choice, check_number, is_number, suggestion
from kinvert.levelbase import check_levels
from kinvert.levels import Levels
from kinvert.rules.names import REGISTRIES, unknown_sampler, unknown_schedule
from kinvert.showing.registry import Registry
from kinvert.spacings import (
    between,
    bong_tangent,
    check_falling,
    check_steps,
    leading,
    linspace,
    logit_normal,
    schedule_of,
    shift_terminal,
    trailing,
    with_zero,
)

__all__ = [
    "ALIGN_YOUR_STEPS",
    "DISCARD_PENULTIMATE",
    "SCHEDULES",
    "ScheduleEntry",
    "ays",
    "beta",
    "beta57",
    "bong_tangent",
    "ddim_uniform",
    "exponential",
    "karras",
    "kl_optimal",
    "laplace",
    "leading",
    "linear_quadratic",
    "logit_normal",
    "normal",
    "polyexponential",
    "schedule",
    "sgm_uniform",
    "shift_terminal",
    "simple",
    "trailing",
    "vp",
]

# Samplers whose schedule is built with one more step and then loses its second-to-last sigma.
DISCARD_PENULTIMATE = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
# A lowest training level up to this value counts as 0: no 0 is appended after it.
ZERO = 1e-5
# The published 10-step schedules (11 sigmas), by model.
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@renamed(n="steps")
def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in sigma^(1/rho), then 0.

    `sigma_j = (A + u_j (B - A))^rho` with A = sigma_max^(1/rho) and B = sigma_min^(1/rho).

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364,
    eq. 5.
    """
    n, (low, high) = check_steps(steps), _bounds(sigma_min, sigma_max)
    rho = check_number("rho", rho, above=0)
    return between(linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho, low, high)


@renamed(n="steps")
def exponential(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in ln sigma, from sigma_max to sigma_min, then 0."""
    return polyexponential(steps, sigma_min, sigma_max, rho=1.0)


@renamed(n="steps")
def polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Polynomial in ln sigma, then 0.

    `ln sigma_j = ln sigma_min + (1 - u_j)^rho ln(sigma_max / sigma_min)`.
    """
    n, (low, high) = check_steps(steps), _bounds(sigma_min, sigma_max)
    ramp = linspace(1, 0, n) ** check_number("rho", rho, above=0)
    return between(low * (ramp * math.log(high / low)).exp(), low, high)


@renamed(n="steps")
def vp(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3) -> Tensor:
    """Uniform in the time of the variance-preserving SDE, then 0.

    `sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)` at n times t from 1 to eps_s.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations (2021), arXiv
    2011.13456.
    """
    beta_d, beta_min = check_number("beta_d", beta_d, above=0), check_number("beta_min", beta_min, above=0)
    t = linspace(1, check_number("eps_s", eps_s, above=0, below=1), check_steps(steps))
    return with_zero((beta_d * t**2 / 2 + beta_min * t).expm1().sqrt())


@renamed(n="steps")
def laplace(steps: int, sigma_min: float, sigma_max: float, mu: float = 0.0, beta: float = 0.5) -> Tensor:
    """Quantiles of a Laplace law of ln sigma, clamped to the bounds; n values, without a 0.

    `ln sigma_j = mu - beta sign(1/2 - u_j) ln(1 - 2 |1/2 - u_j| + 1e-5)`: n - 1 steps, the last one to about sigma_min.
    Clamping repeats values if the law reaches beyond a bound.

    Source: Hang et al., Improved Noise Schedule for Diffusion Training (2024), arXiv 2407.03297.
    """
    n, (low, high) = check_steps(steps), _bounds(sigma_min, sigma_max)
    mu, beta = check_number("mu", mu), check_number("beta", beta, above=0)
    offset = 0.5 - linspace(0, 1, n)
    log = mu - beta * offset.sign() * (1 - 2 * offset.abs() + 1e-5).log()
    return log.exp().clamp(low, high)


@renamed(n="steps")
def kl_optimal(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in the angle atan sigma, then 0.

    `sigma_j = tan((1 - u_j) atan sigma_max + u_j atan sigma_min)`: uniform time on the cosine schedule (Nichol and
    Dhariwal 2021, arXiv 2102.09672, without its offset). n = 1 gives [sigma_max, 0]; the hosts divide 0 by 0 there and
    give NaN.

    Source: Sabour et al., Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (2024), arXiv 2404.14507.
    """
    n, (low, high) = check_steps(steps), _bounds(sigma_min, sigma_max)
    return between(linspace(math.atan(high), math.atan(low), n).tan(), low, high)


@renamed(n="steps")
def ays(steps: int, model: str = "sd15") -> Tensor:
    """Align Your Steps: published sigmas, interpolated log-linearly to n + 1 values, the last 0.

    n = 10 is the published table itself. `model` is "sd15", "sdxl" or "svd" (Stable Video Diffusion).

    Source: Sabour et al., Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (2024), arXiv 2404.14507.
    """
    check_choice("model", model, ALIGN_YOUR_STEPS)
    table = np.log(ALIGN_YOUR_STEPS[model])
    at = np.linspace(0, 1, check_steps(steps) + 1)
    sigmas = torch.from_numpy(np.exp(np.interp(at, np.linspace(0, 1, len(table)), table)))
    return with_zero(sigmas[:-1])


@renamed(n="steps")
def normal(steps: int, levels: Levels) -> Tensor:
    """Uniform in network time: sigma(t) at n times from t(sigma_max) to t(sigma_min), then 0.

    If the last of them is 0 already (sigma <= 1e-5), there are n + 1 values and no other 0. Flow levels with a shift
    apply it twice at the low end, as in the hosts, since their two maps are not inverse.
    """
    n, (start, end) = check_steps(steps), _time_range(levels)
    if abs(float(levels.sigma(end))) <= ZERO:
        return schedule_of(levels, levels.sigma(linspace(start, end, n + 1)))
    return schedule_of(levels, with_zero(levels.sigma(linspace(start, end, n))))


@renamed(n="steps")
def sgm_uniform(steps: int, levels: Levels) -> Tensor:
    """Uniform in network time without its end: the first n of n + 1 times of `normal`, then 0.

    It does not contain sigma_min.
    """
    n, (start, end) = check_steps(steps), _time_range(levels)
    return schedule_of(levels, with_zero(levels.sigma(linspace(start, end, n + 1)[:-1])))


@renamed(n="steps")
def simple(steps: int, levels: Levels) -> Tensor:
    """Every (M / n)-th level from the top, `T[M - 1 - floor(j M / n)]`, then 0.

    n = M is the whole table; n > M repeats values.
    """
    n, table = check_steps(steps), check_levels(levels).sigmas
    skip = len(table) / n
    return with_zero(table[[len(table) - 1 - int(j * skip) for j in range(n)]])


@renamed(n="steps")
def ddim_uniform(steps: int, levels: Levels) -> Tensor:
    """Levels 1, 1 + s, 1 + 2 s, ... with the stride s = max(floor(M / n), 1), downwards, then 0.

    That is ceil((M - 1) / s) steps, not always n (M = 1000: n = 30 gives 31), and it starts below sigma_max. If T[1] is
    0 already (<= 1e-5), s is computed for n + 1 steps and no other 0 follows.

    Source: Song et al., Denoising Diffusion Implicit Models (2021), arXiv 2010.02502.
    """
    n, table = check_steps(steps), check_levels(levels).sigmas
    ends_at_zero = float(table[1]) <= ZERO
    stride = max(len(table) // (n + ends_at_zero), 1)
    sigmas = table[1::stride].flip(0)
    return sigmas if ends_at_zero else with_zero(sigmas)


@renamed(n="steps")
def beta(steps: int, levels: Levels, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Levels at the quantiles of a Beta(alpha, beta) law, then 0.

    `T[round(Q(1 - j / n) (M - 1))]`, rounding half to even, with the quantile function Q. Repeated indices are dropped,
    so a large n gives fewer steps (M = 1000: n = 1000 gives 847).

    Source: Lee et al., Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion Models using
    Stepwise Spectral Analysis (2024), arXiv 2407.12173.
    """
    from scipy import special  # here, because importing it takes a tenth of the time of importing torch

    n, table = check_steps(steps), check_levels(levels).sigmas
    alpha, beta = check_number("alpha", alpha, above=0), check_number("beta", beta, above=0)
    quantiles = special.betaincinv(alpha, beta, 1 - np.arange(n) / n)
    index = np.rint(quantiles * (len(table) - 1)).astype(np.int64)
    kept = np.diff(index, prepend=-1) != 0
    return with_zero(table[torch.from_numpy(index[kept])])


@renamed(n="steps")
def beta57(steps: int, levels: Levels) -> Tensor:
    """`beta` with alpha = 0.5 and beta = 0.7 (named by RES4LYF): lower noise than `beta`."""
    return beta(steps, levels, alpha=0.5, beta=0.7)


@renamed(n="steps")
def linear_quadratic(
    steps: int, levels: Levels | float, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """Linear from sigma_max for half of the steps, then quadratic down to 0.

    `sigma_j = sigma_max (1 - y_j)`; y rises linearly from 0 to theta = threshold_noise in k = linear_steps (default n
    // 2) steps; then `y_j = a j^2 + b j + a k^2` continues its value and its slope to 1: with m = n - k and delta = k -
    theta n, `a = delta / (k m^2)` and `b = theta / k - 2 delta / m^2`. n = 1 gives [sigma_max, 0].

    Source: Polyak et al., Movie Gen: A Cast of Media Foundation Models (2024), arXiv 2410.13720.

    Args:
        steps: number n of steps.
        levels: a Levels, whose sigma_max is used, or sigma_max itself.
        threshold_noise: fraction of the noise removed by the linear part.
        linear_steps: length k of the linear part.

    Raises:
        ValueError: linear_steps >= n > 1, or threshold_noise outside (0, 2 k / (n + k)): from there on the quadratic
            part would pass below 0 and come back.
    """
    n = check_steps(steps)
    sigma_max = check_number("levels", levels, above=0) if is_number(levels) else check_levels(levels).sigma_max
    if n == 1:
        return schedule_of(levels, torch.tensor([sigma_max, 0.0], dtype=torch.float64, device="cpu"))
    k = n // 2 if linear_steps is None else check_steps(linear_steps, "linear_steps")
    if k >= n:
        raise ValueError(f"linear_steps must be below n = {n}, got {k}; leave it out for n // 2")
    theta = check_number("threshold_noise", threshold_noise, above=0, below=2 * k / (n + k))
    m, delta = n - k, k - theta * n
    a, b = delta / (k * m**2), theta / k - 2 * delta / m**2
    j = torch.arange(n, dtype=torch.float64, device="cpu")
    y = torch.where(j < k, j * theta / k, a * j**2 + b * j + a * k**2)
    return schedule_of(levels, with_zero(sigma_max * (1 - y)))


@dataclass(frozen=True)
class ScheduleEntry:
    """One line of `SCHEDULES`.

    Attributes:
        name: the host's name.
        function: called with (steps, sigma_min, sigma_max), (steps, levels) or (steps), and options.
        needs: which of the three: "bounds", "levels" or "nothing".
    """

    name: str
    function: Callable[..., Tensor]
    needs: Literal["bounds", "levels", "nothing"]

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """The paper that the function's docstring names, or ""."""
        after = (self.function.__doc__ or "").partition("Source: ")[2]
        return " ".join(after.partition("\n\n")[0].split())

    @property
    def options(self) -> dict[str, Any]:
        """The names and defaults of the options that `schedule` passes on."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


def _entries(
    needs: Literal["bounds", "levels", "nothing"], *functions: Callable[..., Tensor]
) -> dict[str, ScheduleEntry]:
    return {f.__name__: ScheduleEntry(f.__name__, f, needs) for f in functions}


SCHEDULES: Registry[ScheduleEntry] = Registry(
    _entries("levels", simple, sgm_uniform, normal, ddim_uniform, beta, beta57, linear_quadratic)
    | _entries("levels", leading, trailing, logit_normal, bong_tangent)
    | _entries("bounds", karras, exponential, polyexponential, laplace, kl_optimal)
    | _entries("nothing", vp, ays),
    what="schedules",
    place="ki.SCHEDULES",
)
REGISTRIES["schedule"] = SCHEDULES


def schedule(
    name: str,
    steps: int,
    levels: Levels | None = None,
    *,
    sampler: object = None,
    denoise: float | None = 1.0,
    **options: Any,
) -> Tensor:
    """Build the schedule that hosts make from a name, a number of steps and the model.

    The bounds are the ends of the model's table. For a sampler in `DISCARD_PENULTIMATE` the schedule is built with one
    more step and loses its second-to-last value. For denoise < 1 it is built with floor(steps / denoise) steps, and its
    last steps + 1 values are kept (all of them if there are fewer). None or denoise above 0.9999 means all of the
    noise.

    Args:
        name: a key of `SCHEDULES`.
        steps: number of steps.
        levels: the model's noise levels, which every schedule of a model needs.
        sampler: the name of a sampler, or an object with the attribute `name`.
        denoise: fraction of the schedule to run, from its low-noise end.
        **options: options of the schedule's function, e.g. rho.

    Returns:
        A float64 tensor (steps + 1,), with the exceptions that the module lists; for flow levels a `levels.FlowTimes`.

    Raises:
        ValueError: an unknown name, steps or options out of range, options that give levels that are not finite or do
            not fall, or denoise outside (0, 1].
        TypeError: levels is missing or not a Levels, with what to pass, or the schedule does not have an option.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(unknown_schedule(name))
    entry, steps, levels = SCHEDULES[name], check_steps(steps), check_levels(levels)
    for option in options.keys() - entry.options.keys():
        raise TypeError(f"{name} has no option {option!r}; {suggestion(option, entry.options)}")
    denoise = 1.0 if denoise is None else check_number("denoise", denoise)
    if not 0 < denoise <= 1:
        hint = "leaves nothing to do" if denoise <= 0 else "is more than all of the noise"
        raise ValueError(f"denoise must be in (0, 1], got {denoise}, which {hint}; 1 is all of it")
    bounds = (levels.sigma_min, levels.sigma_max)
    arguments = {"levels": (levels,), "bounds": bounds, "nothing": ()}
    discard = _sampler_name(sampler) in DISCARD_PENULTIMATE
    total = steps if denoise > 0.9999 else int(steps / denoise)
    try:
        sigmas = entry.function(total + discard, *arguments[entry.needs], **options)
    except OverflowError:
        sigmas = torch.full((2,), torch.inf, dtype=torch.float64, device="cpu")
    if options:
        check_falling(name, options, sigmas)
    if discard:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return schedule_of(levels, sigmas if denoise > 0.9999 else sigmas[-(steps + 1) :])


def _bounds(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = check_number("sigma_min", sigma_min, above=0), check_number("sigma_max", sigma_max, above=0)
    if low >= high:
        raise ValueError(f"sigma_min must be below sigma_max, got {low} >= {high}; swap them")
    return low, high


def _sampler_name(sampler: object) -> str | None:
    name = sampler if sampler is None or isinstance(sampler, str) else getattr(sampler, "name", 0)
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"sampler must be a name or an object with a name, got {type(sampler).__name__}; pass e.g. 'euler'"
        )
    if isinstance(sampler, str) and sampler not in REGISTRIES["sampler"]:
        raise ValueError(unknown_sampler(sampler))  # its rule for the penultimate sigma is not known
    return name


def _time_range(levels: Levels) -> tuple[float, float]:
    table = check_levels(levels).sigmas
    return float(levels.timestep(table[-1])), float(levels.timestep(table[0]))
