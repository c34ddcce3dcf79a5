"""Plans of all samplers, denoisers and noise for them, which the tests of the engine share."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.engine import plain_loop, run_state
from kinvert.engine.stepwise import StepwiseState

KARRAS = ki.schedules.karras(6, 0.1, 10.0)

PLANS = {name: ki.compile_plan(name, KARRAS) for name in ki.SAMPLERS if name != "dpm_adaptive"}

IN_FEW_PASSES = [
    "euler",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2s_ancestral",
    "dpmpp_2m_sde",
    "deis",
    "uni_pc",
    "er_sde",
]


def denoiser_for(plan: ki.Plan) -> ki.Denoiser:
    denoise = mixture()
    return (lambda x, sigma: ki.Guided(denoise(x, sigma), 0.9 * denoise(x, sigma))) if plan.is_guided else denoise


def plain_run(plan: ki.Plan, denoiser: ki.Denoiser, state: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    with plain_loop():
        return run_state(plan, denoiser, state, **kwargs)


def given_noise(like: Tensor) -> Callable[[float, float], Tensor]:
    """Noise that depends on the interval only."""
    return lambda a, b: math.sin(1e3 * a + b) * noise_like(tuple(like.shape)).to(like)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


# -- one evaluation at a time -------------------------------------------------------------------------------------------
MIXTURE = mixture()


def denoise(plan: ki.Plan, x: Tensor, sigma: Tensor) -> Any:
    D = MIXTURE(x, sigma)
    return ki.Guided(D, 0.9 * D) if plan.is_guided else D


def finish(run: ki.Stepwise) -> Tensor:
    while not run.done:
        run.send(denoise(run.plan, run.x, run.sigma))
    return run.result


def plainly(plan: ki.Plan, x: Tensor, noise: Any = None) -> Tensor:
    with plain_loop():
        return ki.run(plan, lambda y, sigma: denoise(plan, y, sigma), x, noise)


def start(seed: int = 0) -> Tensor:
    return 10 * noise_like((2, 6), seed)


def saved(state: StepwiseState) -> StepwiseState:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: StepwiseState = torch.load(file, weights_only=True)
    return loaded
