"""Unsample and sample back with every sampler.

    python benchmarks/round_trips.py              # writes results/round_trip.json
    python benchmarks/round_trips.py seeds_2 lms  # measures these again and keeps the others

Ten held-out images, one of each class, and the embedded denoiser "digits", labels given, cfg 1, float32, on the Karras
schedule that each sampler gets for the model's noise levels. Samplers with noise run with it switched off
(`Rule.quiet`) in both directions. CFG++ samplers get the null label as negative. The result is the mean PSNR over the
images in dB, or null if it is not finite.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from convergence_order import known

import kinvert as ki
from kinvert import models

STEPS = (20, 50)
RESULTS = Path(__file__).parent / "results" / "round_trip.json"


def measure(name: str) -> dict[str, Any]:
    """Measure evaluations and PSNR by number of steps."""
    options, rule = ki.sampler(name).noise_options, ki.sampler(name).quiet()
    denoiser = models.load("digits")
    images, labels = models.held_out("digits")
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(denoiser.num_classes)])
    images, labels = images[first], labels[first]
    psnr: dict[int, float | None] = {}
    evaluations = {}
    for n in STEPS:
        sigmas = ki.schedule("karras", n, ki.levels.edm(denoiser.sigma_min, denoiser.sigma_max), sampler=rule)
        try:
            trip = ki.round_trip(
                denoiser, images, sigmas, sampler=rule,
                positive={"label": labels}, negative={"label": torch.full_like(labels, denoiser.null_label)},
            )  # fmt: skip
        except ValueError as error:
            return {"options": options, "error": str(error)}
        mean = float(trip.psnr.mean())
        psnr[n], evaluations[n] = mean if math.isfinite(mean) else None, trip.evaluations
    return {"options": options, "evaluations": evaluations, "psnr": psnr}


def main() -> None:
    """Measure all samplers or those named, print a line for each, and write the results."""
    torch.set_num_threads(1)
    samplers = known(RESULTS)
    for name in sys.argv[1:] or ki.SAMPLERS:
        samplers[name] = measure(name)
        print(f"{name:32} {samplers[name].get('psnr', samplers[name].get('error'))}", flush=True)
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    RESULTS.write_text(
        json.dumps({"versions": versions, "steps": STEPS, "samplers": samplers}, indent=1, default=repr) + "\n"
    )


if __name__ == "__main__":
    main()
