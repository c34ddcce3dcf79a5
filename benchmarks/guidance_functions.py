"""Invert digits under each kind of guidance: how many come back, the cost, and how much like noise their latents are.

    python benchmarks/guidance_functions.py            # 8 digits, some minutes on one core

Euler, 20 steps after Karras from 80 to 0.02, the embedded model `digits` in float64, scale 3, at most 2000 evaluations
for a digit. Writes `results/guidance.json`, whose rows docs/guidance.md shows.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

import kinvert as ki
from kinvert.bench.measurement import versions
from kinvert.guidance import APG, CFGZeroStar, DynamicThreshold, Interval, Rescale

RESULTS = Path(__file__).parent / "results"
STEPS, SCALE = 20, 3.0
WAYS: dict[str, Any] = {
    "3.0": SCALE,
    'Rescale(3.0, 0.7, "v")': Rescale(SCALE, 0.7, "v"),
    'Rescale(3.0, 0.7, "eps")': Rescale(SCALE, 0.7, "eps"),
    'Rescale(3.0, 0.7, "x0")': Rescale(SCALE, 0.7, "x0"),
    "APG(3.0)": APG(SCALE),
    "CFGZeroStar(3.0)": CFGZeroStar(SCALE),
    "Interval(3.0, 0.3, 5.0)": Interval(SCALE, 0.3, 5.0),
    "DynamicThreshold(3.0)": DynamicThreshold(SCALE),
    'Interval(Rescale(3.0, 0.7, "v"), 0.3, 5.0)': Interval(Rescale(SCALE, 0.7, "v"), 0.3, 5.0),
}


def measured(name: str, count: int) -> dict[str, Any]:
    """Return what inverting `count` digits under a kind of guidance gives."""
    model = ki.models.load("digits", dtype=torch.float64)
    images, labels = (part[:count] for part in ki.models.held_out("digits"))
    branches = {"positive": {"label": labels}, "negative": {"label": torch.full_like(labels, model.null_label)}}
    sigmas = ki.schedules.karras(STEPS, 0.02, 80.0)[:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what did not converge is counted
        found = ki.invert(model, images.double(), sigmas, cfg=WAYS[name], max_evals=2000, **branches)
    spread = (found.latent / sigmas[0]).flatten(1).std(1)
    return {
        "guidance": name,
        "count": count,
        "converged": int(found.converged.sum()),
        "evaluations": float(found.evaluations.double().median()) / (STEPS - 1),
        "latent_std": float(spread.median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="how many digits")
    parser.add_argument("--out", type=Path, default=RESULTS / "guidance.json")
    given = parser.parse_args()
    rows = []
    for name in WAYS:
        rows.append(measured(name, given.count))
        print(rows[-1], flush=True)
    report = {"command": "python benchmarks/guidance_functions.py", "versions": versions(), "rows": rows}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
