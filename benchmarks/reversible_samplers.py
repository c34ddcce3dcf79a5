"""Measure how exactly the reversible samplers run backwards, beside what `ki.analysis.amplification` predicts.

    python benchmarks/reversible_samplers.py
    python benchmarks/reversible_samplers.py edict bdia      # these again, the others as they were

From noise to an image and its auxiliary state, and back in closed form: `error` is the rms of the difference of the
latents over sigma_0. Without the auxiliary state (`alone`), a new one is started at the image. The model is `digits`
with labels, its network in float32 where the state is in half precision; Karras schedule from sigma 80 to 0.02.
`predicted` is the rounding of a state of size s_i at every level, `eps s_i amplification[i] / sigma_0`, the largest of
them, with s_i^2 = sigma_data^2 + sigma_i^2, for Gaussian data of standard deviation 0.1: given its surroundings, a
pixel varies less than over all images. Writes results/reversible.json.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.analysis import amplification
from kinvert.engine import run_state
from kinvert.inversion.reversible import invert_reversible
from kinvert.noise import white
from kinvert.tensors import rms

RESULT = Path(__file__).parent / "results" / "reversible.json"
RULES: dict[str, dict[str, Any]] = {
    "edict": {}, "edict, p=0.8": {"p": 0.8}, "bdia": {}, "bdia, gamma=0.5": {"gamma": 0.5},
    "bdia, coordinates='ve'": {"coordinates": "ve"}, "o_belm": {}, "leapfrog": {}, "reversible_heun": {},
    "mccallum_foster": {},
}  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@torch.no_grad()
def cell(name: str, steps: int, dtype: torch.dtype, count: int = 8) -> dict[str, Any]:
    """Measure one row of the table."""
    network = models.load("digits", dtype=dtype if dtype.itemsize >= 4 else torch.float32)
    labels = models.held_out("digits")[1][:count]
    wide = next(network.parameters()).dtype

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.to(wide), sigma.to(wide), label=labels)

    rule = ki.sampler(name.partition(",")[0], **RULES[name])
    sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
    plan = ki.compile_plan(rule, sigmas)
    start = white(0).bind(torch.empty(count, 1, 8, 8, dtype=torch.float64))(80.0, 0.0)
    latent = (80.0 * start).to(dtype)
    state = run_state(plan, denoiser, {"x": latent})
    image = state.pop("x")
    errors = {
        "error": invert_reversible(plan, denoiser, image, state).latent,
        "alone": invert_reversible(plan, denoiser, image).latent,
    }
    growth = zip(amplification(plan, std=0.1), plan.sigmas, strict=True)
    sizes = [a * (network.sigma_data**2 + sigma**2) ** 0.5 for a, sigma in growth]
    return {
        "sampler": name, "steps": steps, "dtype": str(dtype).removeprefix("torch."),
        "predicted": torch.finfo(dtype).eps * max(sizes) / 80.0,
        **{key: float(rms(back.double() - latent.double()).median()) / 80.0 for key, back in errors.items()},
    }  # fmt: skip


def main() -> None:
    """Measure every rule."""
    torch.set_num_threads(1)
    before = json.loads(RESULT.read_text())["rows"] if sys.argv[1:] else []
    rows = []
    for name in RULES:
        if name in (sys.argv[1:] or RULES):
            rows += [cell(name, steps, dtype) for steps in (10, 20, 50) for dtype in DTYPES]
        rows += [row for row in before if row["sampler"] == name and name not in sys.argv[1:]]
    versions = {
        "kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(),
    }  # fmt: skip
    RESULT.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
