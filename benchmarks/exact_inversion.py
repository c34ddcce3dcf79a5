"""Count the samples that `invert` inverts exactly, and its cost, beside the fixed point and plain unsampling.

    python benchmarks/exact_inversion.py --model digits --samplers euler,dpmpp_2m --steps 10,20,50 --cfg 1,3,7.5

Held-out images of an embedded model (or draws of a mixture of Gaussians), Karras schedule from sigma 80 to 0.02,
float64 by default. A sample counts as exact if the rms of its round trip is at most the tolerance. The script writes
results/inversion-<model>-<dtype>.json with one row for each cell, and skips cells that are there already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

import kinvert as ki
from kinvert import models
from kinvert.files import write_file
from kinvert.tensors import rms

RESULTS = Path(__file__).parent / "results"


def problem(name: str, dtype: torch.dtype, count: int) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """Return denoiser, images and conditioning."""
    if name == "mixture":
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(3, 16, generator=generator, dtype=dtype)
        mixture = ki.denoisers.GaussianMixture(means, torch.tensor([0.3, 0.5, 0.8], dtype=dtype))
        return mixture, mixture.sample(count, generator=generator).to(dtype), {}
    images, labels = models.held_out(name)
    denoiser = models.load(name, dtype=dtype)
    labels = labels[:count]
    conditioning = {
        "positive": {"label": labels},
        "negative": {"label": torch.full_like(labels, denoiser.null_label)},
    }
    return denoiser, images[:count].to(dtype), conditioning


def cell(
    name: str,
    sampler: str,
    method: str,
    steps: int,
    cfg: float,
    dtype: torch.dtype,
    count: int,
    tol: float | None = None,
) -> dict[str, Any]:
    """Measure one row of the table."""
    denoiser, x, conditioning = problem(name, dtype, count)
    # `steps` steps that end above 0: the last level is the image's.
    low, high = (0.1, 10.0) if name == "mixture" else (0.02, 80.0)
    sigmas = ki.schedules.karras(steps + 1, low, high)[:-1]
    base, *options = sampler.split(":")  # "dpmpp_2s_ancestral:eta=0"
    rule = ki.sampler(base, **{key: float(value) for key, value in (o.split("=") for o in options)})
    row: dict[str, Any] = {"sampler": sampler, "method": method, "steps": steps, "cfg": cfg, "samples": len(x)}
    if method == "unsample":
        back = ki.round_trip(denoiser, x, sigmas, sampler=rule, cfg=cfg, sigma_offset=0.0, **conditioning)
        error, evaluations = rms(back.reconstruction - x), torch.tensor(back.evaluations)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = ki.invert(denoiser, x, sigmas, sampler=rule, method=method, tol=tol, cfg=cfg, **conditioning)
        error, evaluations = found.round_trip_error, found.evaluations
        row |= {"tolerance": found.tolerance, "converged": int(found.converged.sum())}
        row |= {"checking_per_step": found.checking / steps}
    return row | {
        "exact_to_1e-6": int((error <= 1e-6).sum()),
        "exact_to_1e-8": int((error <= 1e-8).sum()),
        "median_error": float(error.median()),
        "worst_error": float(error.max()),
        "median_evaluations_per_step": float(evaluations.double().median()) / steps,
    }


def main() -> None:
    """Compute the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=["mixture", *models.NAMES])
    parser.add_argument("--samplers", default="euler,heun,dpm_2,dpmpp_2m,lms")
    parser.add_argument("--methods", default="auto,picard,unsample")
    parser.add_argument("--steps", default="5,10,20,50")
    parser.add_argument("--cfg", default="1")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32"])
    parser.add_argument("--tol", type=float, help="of the round trip; 1e-9 in float64 and 1e-5 in float32 by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"inversion-{args.model}-{args.dtype}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    report["versions"] = {
        "kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(),
    }  # fmt: skip
    done = {(r["sampler"], r["method"], r["steps"], r["cfg"], r["samples"]) for r in report["rows"]}
    grid = itertools.product(
        args.samplers.split(","),
        args.methods.split(","),
        map(int, args.steps.split(",")),
        map(float, args.cfg.split(",")),
    )
    for sampler, method, steps, cfg in grid:
        # Multistep samplers are solved as a whole run and take no method for single steps.
        multistep = ki.analysis.properties(sampler.partition(":")[0]).multistep
        if (sampler, method, steps, cfg, args.count) in done or (method in ("picard", "anderson") and multistep):
            continue
        row = cell(args.model, sampler, method, steps, cfg, getattr(torch, args.dtype), args.count, args.tol)
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
        write_file(path, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
