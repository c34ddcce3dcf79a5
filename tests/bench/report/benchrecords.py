"""Records of the benchmark's form whose numbers are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kinvert.jsontext import content_key

ORDERS = {"euler": 1, "heun": 2, "o_belm": 2}


NAN, INF = math.nan, math.inf


def record(
    *, count: int = 4, error: str | None = None, relative: float | None = None, spent: int | None = None, **cell: Any
) -> dict[str, Any]:
    """A record of the benchmark's form; the relative error is that of the sampler's order unless given."""
    defaults = {
        "model": "digits", "question": "reconstruction", "method": "unsample", "sampler": "euler", "options": {},
        "schedule": "karras", "steps": 20, "cfg": 1.0, "dtype": "float64", "seed": 0, "count": count,
    }  # fmt: skip
    cell = defaults | cell
    versions = {"kinvert": "1", "torch": "2", "numpy": "3", "python": "4", "machine": "m"}
    names = ("inversion_evaluations", "sampling_evaluations", "converged", "trajectory", "residuals", "latent", "error")
    found = {"key": content_key(cell), "cell": cell, "metrics": {}, "versions": versions, **dict.fromkeys(names)}
    if error is not None:
        return found | {"error": error}
    if relative is None:
        floor = {"float64": 1e-15, "float32": 1e-7}[cell["dtype"]]
        relative = max(2.0 * cell["cfg"] * cell["steps"] ** -ORDERS.get(cell["sampler"], 1), floor)
        relative = floor if cell["method"] == "invert" else relative
    decibels = 20 * math.log10(relative) if 0 < relative < INF else {0: -INF}.get(relative, relative)
    spread = [decibels + k for k in range(-(count // 2), count - count // 2)]
    sigmas = [80.0, 5.0, 0.5, 0.02]
    edges = np.linspace(-5, 5, 51)
    counts = np.round(1e4 * np.exp(-(((edges[1:] + edges[:-1]) / 2) ** 2) / 2)).astype(int)
    evaluations = cell["steps"] if spent is None else spent
    return found | {
        "metrics": {
            "nmse_db": spread, "psnr": [-d for d in spread], "mse": [relative] * count, "max_error": [relative] * count,
            "ssim": [0.5] * count, "latent_std": [1.0] * count, "latent_kurtosis": [0.25] * count,
            "distance_to_ode": [0.1] * count, "discretisation": [0.1] * count, "solver": [1e-9] * count,
            "round_off": [0.0] * count,
        },
        "inversion_evaluations": [evaluations] * count,
        "sampling_evaluations": [cell["steps"]] * count,
        "converged": [True] * count if cell["method"] == "invert" else None,
        "trajectory": {"sigma": sigmas, "error": [relative * s for s in sigmas]},
        "latent": {
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "spectrum": {"frequency": [0.125, 0.25, 0.375, 0.5], "power": [1.1, 0.9, 1.0, 1.2]},
        },
    }  # fmt: skip


def everything(tmp_path: Path) -> list[dict[str, Any]]:
    """Something for every figure."""
    found = [record(sampler=s, steps=n) for s in ORDERS for n in (10, 20, 40, 80)]
    found += [record(method="invert", steps=n, spent=9 * n) for n in (10, 20)]
    found += [record(cfg=w) for w in (2.0, 5.0)] + [record(dtype="float32"), record(method="invert", dtype="float32")]
    found += [record(question="recovery", seed=s) for s in (0, 1)]
    found += [record(sampler="bdia", options={"gamma": 0.5}, error="the latent has 4 NaN or infinite values of 256")]
    arrays = {name: np.random.default_rng(0).normal(size=(4, 1, 8, 8)) for name in ("image", "latent", "restored")}
    for one in found[:3]:
        path = tmp_path / f"{one['key']}.safetensors"
        save_file({name: value.astype(np.float32) for name, value in arrays.items()}, path)
        one["arrays"] = str(path)
    return found
