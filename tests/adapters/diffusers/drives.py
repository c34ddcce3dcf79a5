"""A network with a formula, and the loop of a pipeline around a scheduler: what a pipeline does, without the pipeline.

Import this module after `pytest.importorskip("diffusers")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

import kinvert as ki
from kinvert.adapters.diffusers import KinvertScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def bases() -> dict[str, Any]:
    """One scheduler of each space."""
    return {
        "ve": diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing", final_sigmas_type="sigma_min"),
        "vp": diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def network(u: Tensor, t: float) -> Tensor:
    """A smooth function of a scaled input and a timestep."""
    return 0.9 * torch.tanh(u) + 0.1 * u * math.cos(t / 300)


def noise(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drive(
    scheduler: Any,
    latents: Tensor,
    steps: int = 6,
    *,
    generator: Any = None,
    edit: Callable[[int, Tensor], Tensor] | None = None,
    set_timesteps: bool = True,
) -> Tensor:
    """Run a scheduler as pipelines do."""
    if set_timesteps:
        scheduler.set_timesteps(steps)
    x = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    options = {"generator": generator} if generator is not None else {}
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, float(t)), t, x, **options, return_dict=False)[0]
        if edit is not None:
            x = edit(i, x)
    return x


def denoiser_of(scheduler: KinvertScheduler) -> Any:
    """The denoiser that a scheduler sees in `drive`, written from the formulas."""
    course = scheduler._course_now()
    flow = course.table.space == "flow"

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        t = float(torch.tensor(course.table.timestep(level), dtype=torch.float32))
        return x - level * network(x if flow else x / math.hypot(1.0, level), t)

    denoiser.coordinates = "flow" if flow else "ve"  # type: ignore[attr-defined]
    return denoiser


def start_of(scheduler: KinvertScheduler, latents: Tensor) -> Tensor:
    """The state of kinvert that a run down begins with in `drive`."""
    course = scheduler._course_now()
    return latents * scheduler.init_noise_sigma * course.table.to_x(course.plan.sigmas[0])


# No schedule before the run, and noise before the first evaluation.
REFUSED = ("dpm_adaptive", "shark", "rex_sde")


def names() -> list[str]:
    """The samplers that a scheduler can run."""
    return [name for name in ki.SAMPLERS if name not in REFUSED and "cfg_pp" not in name and "cfgpp" not in name]
