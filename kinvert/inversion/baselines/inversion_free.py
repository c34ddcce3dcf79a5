"""FlowEdit: from a source to a target without an inversion, to compare edits by inversion with."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from kinvert.checks import check_count
from kinvert.coordinates import settle
from kinvert.denoisers import Denoiser, guide
from kinvert.engine import stage_sigmas
from kinvert.inversion.baselines.common import Conditioning
from kinvert.inversion.exact import check_image, falling
from kinvert.rules import Euler

__all__ = ["flow_edit"]


@torch.no_grad()
def flow_edit(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Any,
    *,
    source: Conditioning,
    target: Conditioning,
    negative: Conditioning = None,
    cfg_source: float = 1.0,
    cfg_target: float = 1.0,
    average: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""FlowEdit: move the image along the difference of two velocities, at noised copies of both ends.

    In flow time `t`, with a fresh noise n in each step and `y_t = (1 - t) x + t n`, the edit e (0 at first) moves by
    `e' = e + (t' - t) (v(y_t + e, t, target) - v(y_t, t, source))`, and the result is `x + e`. Since
    `v = (y - D) / t`, that is `e' = q e + (1 - q) (D_target - D_source)` with `q = t' / t`. A denoiser or a schedule in
    variance-exploding coordinates is run at `t = sigma / (1 + sigma)`, on the states `y_t / (1 - t)`.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning) -> denoised`.
        x: the images, shape (batch, *event), floating point.
        sigmas: decreasing noise levels. The first decides how much may change (`n_max` of the released code); the last
            is 0, or the level from which the edit is left as it is.
        source, target: the conditioning of the image, and that of the edit.
        negative: the negative conditioning of both, for guidance.
        cfg_source, cfg_target: guidance of both.
        average: noises a step over which the difference of velocities is averaged; each costs two evaluations.
        generator: of the noises; None takes torch's global generator.

    Returns:
        The edited images, of x's shape and dtype.

    Raises:
        ValueError, TypeError: as the other baselines.

    Source: Kulikov et al., FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models (2024), arXiv
    2412.08629. The plain sampling of the last steps (`n_min`) is left out; the released code has it off.
    """
    check_image(x)
    average = check_count("average", average)
    coordinates, _, schedule = settle(denoiser, Euler(), sigmas)
    flow = coordinates == "flow"
    here = guide(denoiser, cfg_source, source, negative, batch=len(x))
    there = guide(denoiser, cfg_target, target, negative, batch=len(x))
    edit = torch.zeros_like(x)
    for sigma, sigma_next in itertools.pairwise(falling(schedule)):
        (level,) = stage_sigmas([sigma], x)
        signal = 1.0 - sigma if flow else 1.0  # of the coordinates that the denoiser takes
        share = 1.0 if flow else 1.0 + sigma  # of the edit in them
        difference = torch.zeros_like(x)
        for _ in range(average):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            state = signal * x + sigma * noise
            after: Any = there(state + share * edit, level)
            before: Any = here(state, level)
            difference += (after - before) / average
        t, t_next = (s if flow else s / (1.0 + s) for s in (sigma, sigma_next))
        edit = torch.lerp(difference, edit, t_next / t)
    return x + edit
