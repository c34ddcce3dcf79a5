"""Measure inversions in a pipeline of diffusers: DDIMInverse, unsampling and the exact inverse, and their memory.

    python benchmarks/diffusers_inversion.py   # writes results/diffusers_inversion.json; needs kinvert[diffusers]

*Round trips.* The embedded model `mnist` is the network of a `DDIMPipeline` (noise levels of Stable Diffusion, noise
prediction), and 8 held-out images with their labels are the data. Guidance is in the network: `U + cfg (C - U)`. Each
image goes up and is sampled down again by the scheduler of the pipeline. A row gives the median and the worst rms error
in parts of the size of the image, the PSNR (range 2), and the evaluations on the way up, with the certificate of
`kd.invert`.

*Memory.* The most bytes of tensors as large as a latent that are alive at once during `ki.invert` of one latent, in
latents, with a denoiser of closed form, whose own tensors are not many.
"""

from __future__ import annotations

import copy
import json
import platform
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMInverseScheduler, DDIMPipeline, DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kinvert as ki
import kinvert.adapters.diffusers as kd
from kinvert import models
from kinvert.files import write_file
from kinvert.tensors import rms

RESULTS = Path(__file__).parent / "results" / "diffusers_inversion.json"
COUNT, STEPS = 8, (20, 50)
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEMORY = ("euler", "heun", "dpmpp_2m", "uni_pc")
METHODS = ("DDIMInverseScheduler", "kd.unsample", "kd.invert")


class Digits(nn.Module):
    """The embedded model as a network of diffusers: it predicts the noise at a timestep, with guidance."""

    def __init__(self, cfg: float) -> None:
        super().__init__()
        self.model, self.cfg = models.load("mnist"), cfg
        self.sigmas = ki.levels.stable_diffusion().sigmas.float()
        self.evaluations = 0

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        """Return the prediction as diffusers returns it."""
        self.evaluations += 1
        sigma = self.sigmas[timestep.reshape(-1).long()].expand(len(sample))
        level = sigma[:, None, None, None]
        x = sample * (1 + level**2).sqrt()
        denoised = self.model(x, sigma, label=class_labels)
        if self.cfg != 1:
            denoised = torch.lerp(self.model(x, sigma, label=None), denoised, self.cfg)
        return types.SimpleNamespace(sample=(x - denoised) / level)


def run(scheduler: Any, network: Digits, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Run a scheduler of diffusers, as a pipeline does."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, labels).sample, t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def round_trip(method: str, cfg: float, steps: int) -> dict[str, Any]:
    """Return a row of the round trips."""
    x, labels = (part[:COUNT] for part in models.held_out("mnist"))
    network = Digits(cfg)
    base = DDIMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = DDIMPipeline(network, base)
    call: dict[str, Any] = {"num_inference_steps": steps, "class_labels": labels}
    converged = None
    if method == "DDIMInverseScheduler":
        latents, down = run(DDIMInverseScheduler.from_config(base.config), network, x, labels, steps), pipe.scheduler
    elif method == "kd.unsample":
        latents, down = kd.unsample(pipe, x, sampler="euler", **call)
    else:
        found = kd.invert(pipe, x, sampler="euler", max_evals=40 * steps, **call)
        latents, down, converged = found.latents, found.scheduler, int(found.inversion.converged.sum())
    spent = network.evaluations if converged is None else float(found.inversion.evaluations.double().mean())
    again = run(down, network, latents, labels, steps)
    error = rms(again - x) / rms(x)
    psnr = ki.metrics.psnr(again, x, 2.0)
    return {
        "method": method, "cfg": cfg, "steps": steps, "images": COUNT, "median": float(error.median()),
        "worst": float(error.max()), "psnr": float(psnr.median()), "evaluations": spent, "converged": converged,
    }  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of tensors as large as a latent that are alive, the most at any time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.now, self.most = size, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is None or storage.nbytes() < self.size or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key: int, nbytes: int) -> None:
        """Take a storage out that is gone."""
        self.known.discard(key)
        self.now -= nbytes


@torch.no_grad()
def memory(sampler: str, steps: int) -> dict[str, Any]:
    """Return a row of the memory."""
    latent = 0.8 * torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = ki.schedules.karras(steps + 1, 0.03, 14.6)[:-1]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        gain = 0.64 / (0.64 + sigma[:, None, None, None] ** 2)
        return (gain * x + 0.2 * (1 - gain) * x.sin()).to(x.dtype)

    with Live(latent.nbytes) as live:
        found = ki.invert(denoiser, latent, levels, sampler=sampler)
    return {
        "sampler": sampler, "steps": steps, "latents": live.most / latent.nbytes,
        "evaluations": int(found.evaluations[0]), "converged": bool(found.converged[0]),
    }  # fmt: skip


def main() -> None:
    """Measure, and write the results."""
    trips, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sampler in MEMORY:
            for steps in STEPS:
                rows.append(memory(sampler, steps))
                print(rows[-1], flush=True)
        for cfg, steps in ((1.0, 20), (3.0, 20), (1.0, 50)):
            for method in METHODS:
                trips.append(round_trip(method, cfg, steps))
                print(trips[-1], flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    report = {"versions": versions, "round_trips": trips, "memory": rows}
    write_file(RESULTS, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
