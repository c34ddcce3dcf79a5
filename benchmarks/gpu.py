"""Time the engine on a GPU: plain, and with the denoiser, each step, or the whole run as a graph.

    python benchmarks/gpu.py

Latent sizes of Stable Diffusion 1.5, SDXL and Flux in float32, bfloat16 and float16, a denoiser of a few small kernels
(so that launches count), 50 steps. Times of a step by events, the median of the runs. Results go to
`benchmarks/results/cuda.json`. Without a GPU the same runs are timed on the CPU, where there are no graphs, and nothing
is written unless `--out` is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import RESULTS, SIGMAS, STEPS, machine, timer
from torch import Tensor

import kinvert as ki

SHAPES = {"SD 1.5": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "Flux": (1, 16, 128, 128)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "lms", "uni_pc")


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Denoise unit Gaussian data, by a handful of kernels."""
    variance = (1 + sigma**2).to(x.dtype)
    return x / variance.reshape(-1, *(1,) * (x.ndim - 1))


def runs(name: str, x: Tensor) -> dict[str, tuple[Callable[[], object], str | None]]:
    """Return the ways to run a sampler, each with the reason if there is no graph."""
    plan = ki.compile_plan(name, ki.schedules.karras(STEPS, *SIGMAS))
    noise = ki.noise.white(0)
    one, whole = ki.graphs.captured_denoiser(denoiser, x), ki.graphs.capture(plan, denoiser, x)
    each = ki.graphs.capture(plan, denoiser, x, "each")
    return {
        "denoiser alone": (lambda: [denoiser(x, torch.ones(len(x), device=x.device)) for _ in plan.steps], None),
        "plain": (lambda: ki.run(plan, denoiser, x, noise), None),
        "denoiser as a graph": (lambda: ki.run(plan, one, x, noise), one.reason),
        "each step as a graph": (lambda: each(x, noise), each.reason),
        "each step as a graph, with a callback": (lambda: each(x, noise, lambda step: None), each.reason),
        "run as a graph": (lambda: whole(x, noise), whole.reason),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no CUDA device: these are times on the CPU, without graphs")
        torch.set_num_threads(1)
    clock, rows = timer(device), list[dict[str, Any]]()
    for size, shape in SHAPES.items():
        for dtype in DTYPES:
            x = (SIGMAS[1] * torch.randn(shape, device=device)).to(dtype)
            for name in SAMPLERS:
                row: dict[str, Any] = {"latent": size, "dtype": str(dtype).removeprefix("torch."), "sampler": name}
                for how, (run, reason) in runs(name, x).items():
                    seconds = [clock(run) for _ in range(args.repetitions + 2)][2:]
                    row[how] = round(statistics.median(seconds) / STEPS * 1e6, 2) if reason is None else None
                rows.append(row)
                print(json.dumps(row))
    versions = {"kinvert": ki.__version__, "torch": torch.__version__, "python": platform.python_version()}
    report = {"machine": machine(device), "versions": versions, "steps": STEPS, "unit": "us a step", "rows": rows}
    path = args.out or (RESULTS / "cuda.json" if device == "cuda" else None)
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
