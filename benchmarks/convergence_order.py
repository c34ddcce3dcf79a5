"""Measure the order of every registered sampler.

    python benchmarks/convergence_order.py             # writes results/order.json
    python benchmarks/convergence_order.py edict bdia  # measures these again and keeps the others

The problem is the probability-flow ODE of a Gaussian mixture, whose denoiser is exact, from sigma = 10 to 0.1 on Karras
grids of n steps without a final 0, in float64. The error is the distance to a reference of order 5 on 2000 steps,
relative to its norm; the order is the least-squares slope of -log error against log n, over the errors above the
rounding floor. Noise is switched off (`Rule.quiet`), and CFG++ samplers get the pair (D, D).
"""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki

STEPS = (40, 80, 160, 320)
FLOOR = 1e-12
RESULTS = Path(__file__).parent / "results" / "order.json"


def problem() -> tuple[ki.Denoiser, Tensor]:
    """Return a mixture of three Gaussians in 6 dimensions, and 16 states at sigma = 10."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(3, 6, generator=g, dtype=torch.float64)
    mixture = ki.denoisers.GaussianMixture(means, torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64))
    return mixture, 10 * torch.randn(16, 6, generator=g, dtype=torch.float64)


def grid(n: int) -> Tensor:
    """Return a Karras grid of n steps from 10 to 0.1."""
    return ki.schedules.karras(n + 1, 0.1, 10.0)[:-1]


def measure(name: str, denoiser: ki.Denoiser, x: Tensor, reference: Tensor) -> dict[str, Any]:
    """Measure the errors by number of steps, and their slope."""
    rule = ki.sampler(name).quiet()

    def pair(y: Tensor, sigma: Tensor) -> ki.Guided:
        denoised = denoiser(y, sigma)
        assert isinstance(denoised, Tensor)
        return ki.Guided(denoised, denoised)

    errors = {}
    for n in STEPS:
        plan = ki.compile_plan(rule, grid(n))
        result = ki.run(plan, pair if plan.is_guided else denoiser, x)
        errors[n] = float((result - reference).norm() / reference.norm())
    return {
        "options": ki.sampler(name).noise_options,
        "order": slope({n: e for n, e in errors.items() if e > FLOOR}),
        "errors": errors,
    }


def slope(errors: dict[int, float]) -> float:
    """Fit the slope of -log error against log n by least squares."""
    u, v = [math.log(n) for n in errors], [-math.log(e) for e in errors.values()]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def known(results: Path) -> dict[str, Any]:
    """Return the results to keep, in the order of the registry: none unless the command names samplers."""
    kept = json.loads(results.read_text())["samplers"] if sys.argv[1:] else {}
    return {name: kept.get(name) for name in ki.SAMPLERS if name in kept or name in sys.argv[1:]}


def main() -> None:
    """Measure all samplers or those named, print a line for each, and write the results."""
    torch.set_num_threads(1)
    denoiser, x = problem()
    reference = ki.run(ki.compile_plan("dormand_prince", grid(2000)), denoiser, x)
    samplers = known(RESULTS)
    for name in sys.argv[1:] or ki.SAMPLERS:
        if name == "dpm_adaptive":  # chooses its own steps
            continue
        samplers[name] = measure(name, denoiser, x, reference)
        print(f"{name:32} {samplers[name]['order']:6.2f}   {samplers[name]['errors'][STEPS[-1]]:.1e}")
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"versions": versions, "steps": STEPS, "samplers": samplers}, indent=1, default=repr) + "\n"
    )


if __name__ == "__main__":
    main()
