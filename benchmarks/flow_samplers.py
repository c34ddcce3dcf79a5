"""Measure every registered sampler on flow levels.

    python benchmarks/flow_samplers.py  # writes results/flow.json

Each is called by its name, on exact velocity networks in flow time, with the schedule `simple` of 100 steps on the
levels of Stable Diffusion 3. `ki.sample` goes down from t = 1, and `ki.unsample` up to t = 1:

* Gaussian data N(0.3, 0.5²): mean and standard deviation of the result, read off the Plan without sampling
  (`kinvert.moments`), and what they should be at the level where the Plan ends;
* a mixture of two Gaussians: the same of 10,000 samples;
* of deterministic samplers the order: the slope of the error of the standard deviation for Gaussian data against the
  number of steps, uniform in t between 0.98 and 0.1.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.moments import Moments, gaussian_law, gaussian_moments
from kinvert.sampling import rising_schedule

LEVELS = ki.levels.flow(3.0)
STEPS, COUNT = 100, 10_000
ORDER_STEPS = (20, 40, 80, 160)
FLOOR = 1e-12
DATA = Moments(0.3, 0.5)
MEANS, STDS, WEIGHTS = (-0.6, 0.5), (0.2, 0.4), (0.3, 0.7)
RESULTS = Path(__file__).parent / "results" / "flow.json"


def velocity(means: tuple[float, ...], stds: tuple[float, ...], weights: tuple[float, ...]) -> Callable[..., Tensor]:
    """Return the exact velocity `(x_t - D) / t` of a mixture of Gaussians in one dimension, a function of 1000 t."""
    m, s, w = (torch.tensor(values, dtype=torch.float64) for values in (means, stds, weights))

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None] / 1000
        variance = ((1 - t) * s) ** 2 + t**2
        away = x - (1 - t) * m
        share = (w.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(1)
        denoised = (share * (m + (1 - t) * s**2 / variance * away)).sum(1, keepdim=True)
        return (x - denoised) / t

    return network


def in_pairs(denoiser: ki.Denoiser) -> ki.Denoiser:
    """Return a denoiser that gives the pair (D, D), for CFG++."""

    def pair(x: Tensor, t: Tensor) -> ki.Guided:
        denoised = denoiser(x, t)
        assert isinstance(denoised, Tensor)
        return ki.Guided(denoised, denoised)

    pair.coordinates = "flow"  # type: ignore[attr-defined]
    return pair


def moments(x: Tensor) -> dict[str, float]:
    """Compute the moments of samples."""
    return {"mean": float(x.mean()), "std": float(x.std())}


def run(name: str, up: bool, mixture: bool) -> dict[str, float]:
    """Run a verb on samples of the noise (of the data, if up), and return mean and standard deviation of the result."""
    means, stds, weights = (MEANS, STDS, WEIGHTS) if mixture else ((DATA.mean,), (DATA.std,), (1.0,))
    denoiser: ki.Denoiser = ki.denoisers.from_velocity(velocity(means, stds, weights), LEVELS)
    if "cfg_pp" in name or "cfgpp" in name:
        denoiser = in_pairs(denoiser)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(COUNT, 1, generator=generator, dtype=torch.float64)
    times = ki.schedule("simple", STEPS, LEVELS, sampler=name)
    if not up:
        torch.manual_seed(0)  # for the sampler's own kind of noise
        return moments(ki.sample(denoiser, noise, times, sampler=name))
    index = torch.multinomial(torch.tensor(weights, dtype=torch.float64), COUNT, replacement=True, generator=generator)
    mean, std = (torch.tensor(values, dtype=torch.float64)[index, None] for values in (means, stds))
    return moments(ki.unsample(denoiser, mean + std * noise, times, sampler=name))


def exact(name: str, up: bool) -> dict[str, float]:
    """Return mean and standard deviation for Gaussian data, read off the Plan, and their exact values."""
    times = ki.schedule("simple", STEPS, LEVELS, sampler=name).tolist()
    levels = rising_schedule(times, highest=1.0) if up else times
    plan = ki.compile_plan(ki.flow_sampler(name, LEVELS), levels)
    first = gaussian_law(levels[0], *DATA, "flow")  # at 1, where Flow starts just below
    found = gaussian_moments(plan, *DATA, "flow", start=first)
    return {"mean": found.mean, "std": found.std, "t": plan.sigmas[-1]}


def order(name: str, up: bool) -> float | None:
    """Fit the slope of the error against the number of steps; None if the error is 0 or the sampler draws noise."""
    errors = {}
    for n in ORDER_STEPS:
        times = torch.linspace(0.98, 0.1, n + 1, dtype=torch.float64).tolist()
        plan = ki.compile_plan(ki.flow_sampler(name, LEVELS), times[::-1] if up else times)
        if plan.is_stochastic:
            return None
        found, wanted = gaussian_moments(plan, *DATA, "flow"), gaussian_law(plan.sigmas[-1], *DATA, "flow")
        errors[n] = abs(found.std - wanted.std) + abs(found.mean - wanted.mean)
    kept = {n: e for n, e in errors.items() if e > FLOOR}
    if len(kept) < 2:
        return None
    u, v = [math.log(n) for n in kept], [-math.log(e) for e in kept.values()]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def measure(name: str) -> dict[str, Any]:
    """Measure both directions of one sampler."""
    result: dict[str, Any] = {"rule": how(name)}
    for direction, up in (("down", False), ("up", True)):
        try:
            row: dict[str, Any] = {"mixture": run(name, up, mixture=True)}
        except ValueError as error:
            result[direction] = {"refused": str(error)}
            continue
        if name == "dpm_adaptive":  # it has no Plan
            last = float(ki.schedule("simple", STEPS, LEVELS)[-2])
            row["gaussian"] = run(name, up, mixture=False) | {"t": 1.0 if up else last}
        else:
            row["gaussian"] = exact(name, up)
            row["order"] = order(name, up)
        row["wanted"] = gaussian_law(row["gaussian"]["t"], *DATA, "flow")._asdict()
        result[direction] = row
    return result


def how(name: str) -> str:
    """Return the rule that `flow_sampler` makes of the name."""
    rule = ki.flow_sampler(name, LEVELS)
    if isinstance(rule, ki.rules.Flow):
        return "Flow"
    return "flow=True" if rule.is_in_flow else "as it is"


def main() -> None:
    """Measure all samplers, print a line for each, and write the results."""
    torch.set_num_threads(1)
    samplers = {}
    warnings.simplefilter("ignore", RuntimeWarning)  # they say what the table shows
    for name in ki.SAMPLERS:
        twin = name.removesuffix("_gpu")  # another name for the same
        samplers[name] = found = samplers[twin] if twin in samplers else measure(name)
        cells = []
        for direction in ("down", "up"):
            row = found[direction]
            if "refused" in row:
                cells.append("refused")
                continue
            slope = row.get("order")
            cells.append(
                f"{row['gaussian']['mean']:+.3f} {row['gaussian']['std']:.3f} for {row['wanted']['std']:.3f}, mixture "
                f"{row['mixture']['mean']:+.3f} {row['mixture']['std']:.3f}, order {slope and round(slope, 1)}"
            )
        print(f"{name:30} {found['rule']:9} {'; '.join(cells)}")
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    law = mixture_law()
    report = {"versions": versions, "steps": STEPS, "count": COUNT, "data": DATA, "mixture": law, "samplers": samplers}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def mixture_law() -> Moments:
    """Compute mean and standard deviation of the mixture."""
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    square = sum(w * (s**2 + m**2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    return Moments(mean, math.sqrt(square - mean**2))


if __name__ == "__main__":
    main()
