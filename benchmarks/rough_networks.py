"""Measure the inversion of networks that answer roughly: rounded outputs, and answers that depend on the batch size.

    python benchmarks/rough_networks.py   # writes results/rough_networks.json

Eight held-out images of the embedded model `digits` with their labels, 20 steps of the Karras schedule from sigma 80 to
0.02, states in float32, cfg 1, default tolerance (1e-5). A row gives the median and the most evaluations a step on the
way to the latent, without the certificate and the check of the rows; the median and the worst rms error of the round
trip; how many samples converged; and the reasons.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.files import write_file

RESULTS = Path(__file__).parent / "results" / "rough_networks.json"
SAMPLERS = ("euler", "heun", "dpmpp_2m", "uni_pc")
STEPS, COUNT = 20, 8
Change = Callable[[Tensor], Tensor]


def noisy(out: Tensor) -> Tensor:
    """Return the output and 1e-4 of noise, which is another for another batch size."""
    return out + 1e-4 * torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(len(out)))


NETWORKS: dict[str, Change] = {
    "exact": lambda out: out,
    "float16": lambda out: out.half().float(),
    "bfloat16": lambda out: out.bfloat16().float(),
    "batch size": noisy,
}


def row(sampler: str, network: str) -> dict[str, Any]:
    """Invert the images and return the row of the table."""
    model, (x, labels) = models.load("digits"), models.held_out("digits")

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return NETWORKS[network](model(x, sigma, label=label))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(
            denoiser, x[:COUNT], ki.schedules.karras(STEPS + 1, 0.02, 80.0)[:-1], sampler=sampler,
            positive={"label": labels[:COUNT]},
        )  # fmt: skip
    asked = 0 if found.row_checks is None else found.row_checks
    up = (found.evaluations - found.checking - asked).double() / STEPS
    error = found.round_trip_error
    return {
        "sampler": sampler,
        "network": network,
        "evaluations_per_step": round(float(up.median()), 2),
        "most_evaluations_per_step": round(float(up.max()), 2),
        "median_error": float(f"{float(error.median()):.2g}"),
        "worst_error": float(f"{float(error.max()):.2g}"),
        "converged": int(found.converged.sum()),
        "reasons": dict(sorted(Counter(reason.name for reason in found.reasons).items())),
    }


def main() -> None:
    """Measure all rows and write them."""
    rows = [row(sampler, network) for sampler in SAMPLERS for network in NETWORKS]
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_file(RESULTS, (json.dumps({"versions": versions, "samples": COUNT, "rows": rows}, indent=1) + "\n").encode())
    for one in rows:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
