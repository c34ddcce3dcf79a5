"""Measure schedules that are computed from a denoiser, for the page of schedules.

    python benchmarks/optimal_schedules.py             # prints both tables
    python benchmarks/optimal_schedules.py round_trip  # one of them; or: oss

The embedded model `digits`, Euler's method, from sigma 80 to 0.02, float64. `round_trip`: 10 steps without guidance,
searched on 20 held-out images and measured on the 20 others. `oss`: searched with 8 latents on a Karras schedule of 100
steps, and measured on 20 other latents (seed 0) by the distance from the images of the 100 steps.
"""

from __future__ import annotations

import platform
import sys
import time
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert import models

LOW, HIGH = 0.02, 80.0
DENOISER = models.load("digits", dtype=torch.float64)
NAMES = ("karras", "exponential", "kl_optimal")


def named(steps: int) -> dict[str, Tensor]:
    """Return the schedules to compare with."""
    return {name: getattr(ki.schedules, name)(steps + 1, LOW, HIGH)[:-1] for name in NAMES}


def guidance(labels: Tensor, cfg: float) -> dict[str, Any]:
    """Return the conditioning on labels."""
    null = torch.full_like(labels, DENOISER.null_label)
    return {"cfg": cfg, "positive": {"label": labels}, "negative": {"label": null}}


def round_trip() -> None:
    """Print the rms error of the round trip, and in brackets that of the median image."""
    images, labels = models.held_out("digits")
    parts = {"searched on": slice(0, 20), "others": slice(20, 40)}
    given = {name: guidance(labels[part], 1.0) for name, part in parts.items()}
    start, begun = named(10), time.perf_counter()
    found = ki.optimal.round_trip_schedule(
        DENOISER, images[:20].double(), start["karras"], iterations=8, **given["searched on"]
    )
    print(f"round_trip_schedule, {time.perf_counter() - begun:.0f} s:", [round(s, 3) for s in found.tolist()])
    for part, rows in parts.items():
        for name, levels in {**start, "round_trip_schedule": found}.items():
            trip = ki.round_trip(DENOISER, images[rows].double(), levels, sigma_offset=0.0, **given[part])
            print(f"{part:<12}{name:<22}{trip.mse.mean().sqrt():.3f} ({trip.mse.sqrt().median():.3f})", flush=True)


def oss() -> None:
    """Print the rms distance from the images of many steps."""
    latents = HIGH * torch.randn(28, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(28) % 10
    fine = ki.schedules.karras(101, LOW, HIGH)[:-1]
    for cfg in (1.0, 3.0):
        first, others = guidance(labels[:8], cfg), guidance(labels[8:], cfg)
        many = ki.sample(DENOISER, latents[8:], fine, **others)
        for steps in (5, 10):
            begun = time.perf_counter()
            found = ki.optimal.oss(DENOISER, latents[:8], fine, steps=steps, **first)
            took = time.perf_counter() - begun
            print(f"{steps} steps, cfg {cfg:g}, {took:.0f} s:", [round(s, 2) for s in found.tolist()])
            for name, levels in {**named(steps), "oss": found}.items():
                few = ki.sample(DENOISER, latents[8:], levels, **others)
                print(f"  {name:<14}{(few - many).square().mean().sqrt():.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"kinvert {ki.__version__}, torch {torch.__version__}, python {platform.python_version()}")
    for name in sys.argv[1:] or ["round_trip", "oss"]:
        {"round_trip": round_trip, "oss": oss}[name]()
