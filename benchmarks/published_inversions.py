"""Measure round trips of the published inversions.

    python benchmarks/published_inversions.py               # writes results/baselines.json, the cells that are missing
    python benchmarks/published_inversions.py aidi renoise  # measures these again

Eight held-out images of the embedded model `digits` with their labels, Karras schedule from sigma 80 to 0.02, float64.
A row gives, over the images, the median and the worst rms error of the round trip, how many came back to 1e-6, and the
median of evaluations a step, the check included. `null_text` is left out: it optimises an embedding, and these models
take a label.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
from pathlib import Path

import torch

import kinvert as ki
from kinvert import models
from kinvert.files import write_file
from kinvert.inversion.baselines import BASELINES

STEPS, CFG, COUNT = (20, 50), (1.0, 3.0, 7.5), 8
RESULTS = Path(__file__).parent / "results" / "baselines.json"


def measure(name: str, steps: int, cfg: float) -> dict[str, object]:
    """Measure one row."""
    torch.manual_seed(0)  # of the noise that RF-Inversion steers to
    denoiser = models.load("digits", dtype=torch.float64)
    images, labels = (part[:COUNT] for part in models.held_out("digits"))
    sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
    found = BASELINES[name](
        denoiser, images.double(), sigmas, cfg=cfg,
        positive={"label": labels}, negative={"label": torch.full_like(labels, denoiser.null_label)},
    )  # fmt: skip
    error = found.round_trip_error
    return {
        "baseline": name,
        "steps": steps,
        "cfg": cfg,
        "samples": COUNT,
        "exact_to_1e-6": int((error <= 1e-6).sum()),
        "median_error": float(error.median()),
        "worst_error": float(error.max()),
        "median_evaluations_per_step": float(found.evaluations.double().median()) / steps,
        "latent_std": float(found.latent.std()) / 80.0,
    }


def main() -> None:
    """Compute the cells that are missing."""
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    report["versions"] = versions | {"machine": platform.machine()}
    report["rows"] = [row for row in report["rows"] if row["baseline"] not in sys.argv[1:]]
    done = {(row["baseline"], row["steps"], row["cfg"]) for row in report["rows"]}
    for cell in itertools.product(BASELINES, STEPS, CFG):
        if cell in done:
            continue
        row = measure(*cell)
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
        report["rows"].sort(key=lambda row: list(BASELINES).index(row["baseline"]))
        write_file(RESULTS, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
