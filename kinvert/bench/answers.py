r"""Answer the questions that go beyond a round trip: bits, edits with a true answer, densities, uniqueness.

Every function returns metrics by name, one value for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kinvert as ki
from kinvert.bench.methods import MethodResult, Setup, apply_method
from kinvert.bench.problems import Problem
from kinvert.density import latent_log_prob
from kinvert.metrics import bit_accuracy
from kinvert.tensors import rms

__all__ = ["CHANCE", "LATENTS", "RUNS", "bit_metrics", "density_metrics", "fewest_bits", "true_edit", "uniqueness"]

CHANCE = 1e-6
"""The chance that an image without a message is taken for one that carries it."""
LATENTS = 4
"""Latents of one image after which the search for more ends."""
RUNS = 100
"""What the search for other latents of an image may cost, in runs of the sampler."""


def bit_metrics(recovered: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """Compare the signs of recovered latents with those of the true ones.

    Returns:
        `bits`: the share of signs that are right. `message`: 1 if all of them are. `detected`: 1 if so many are right
        as a random message has with a probability of at most `CHANCE`.
    """
    share = bit_accuracy(recovered, latent)
    needed = fewest_bits(latent[0].numel()) / latent[0].numel()
    return {"bits": share, "message": (share == 1).double(), "detected": (share >= needed - 1e-12).double()}


def fewest_bits(count: int, chance: float = CHANCE) -> int:
    """Return the fewest bits of `count` that must be right, so that random bits do it with at most this probability.

    Returns:
        `count + 1`, which no image reaches, if even all bits are right by chance too often.
    """
    tail = 0
    for k in range(count, -1, -1):
        tail += math.comb(count, k)
        if tail > chance * 2**count:
            return k + 1
    return 0


def true_edit(edited: Tensor, image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Compare edited images with the true ones.

    Returns:
        `edit_error`: the rms difference to the true image. `edit_gain_db`: how much smaller it is than that of the
        image before the edit. `edit_closer`: 1 if it is smaller, else 0.
    """
    error, untouched = (rms(one.double() - truth.double()) for one in (edited, image))
    return {
        "edit_error": error,
        "edit_gain_db": 20 * (untouched / error).log10(),
        "edit_closer": (error < untouched).double(),
    }


def density_metrics(
    method: str, setup: Setup, problem: Problem, image: Tensor, found: MethodResult
) -> dict[str, Tensor]:
    """Compute how likely images are, from the latents that the method finds with the right conditioning and the wrong.

    Returns:
        `bits_per_value`: `-log2 p / n` for images of n values, a density. `margin`: how many more it is with the wrong
        conditioning. `prefers_own`: 1 if it is more, else 0.
    """
    if problem.target is None:
        raise ValueError("density compares two conditionings, and this problem has no `target`, a wrong one")
    wrong = replace(setup, guidance={**setup.guidance, "positive": problem.target}, states={})
    bits = []
    for one, latent in ((setup, found), (wrong, apply_method(method, wrong, image))):
        if latent.memory or latent.noises:
            raise ValueError("density is that of a latent alone, and this method finds more than a latent")
        rule = latent.sampler or one.sampler
        value = latent_log_prob(one.denoiser, latent.latent, one.sigmas, sampler=rule, **one.guidance)
        bits.append(-value / (image[0].numel() * math.log(2)))
    margin = bits[1] - bits[0]
    return {"bits_per_value": bits[0], "margin": margin, "prefers_own": (margin > 0).double()}


def uniqueness(setup: Setup, image: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """Search for other latents of images that were made from known ones.

    Returns:
        `latents`: how many were found, the true one included, at most `LATENTS`. `unique`: 1 if it is the only one.
        `likeliest`: 1 if the true one is the likeliest of them as a draw of noise. `search_evaluations`: the cost.
    """
    plan, rows = setup.plan, []
    for k in range(len(image)):
        guidance = {name: _row(value, k, len(image)) for name, value in setup.guidance.items()}
        others = ki.inversion.preimages(
            setup.denoiser, image[k : k + 1], setup.sigmas, sampler=setup.sampler, latent=latent[k : k + 1],
            count=LATENTS, max_evals=RUNS * (plan.evaluations if plan else len(setup.sigmas)), **guidance,
        )  # fmt: skip
        density = others.log_densities
        rows.append([len(density), len(density) == 1, bool(density[0] >= density.max()), others.evaluations])
    names = ("latents", "unique", "likeliest", "search_evaluations")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1), strict=True))


def _row(value: Any, k: int, count: int) -> Any:
    """Return a scale of guidance as it is, and of conditioning the part of row k."""
    if not isinstance(value, Mapping):
        return value
    has_rows = {name: isinstance(one, Tensor) and one.ndim > 0 and len(one) == count for name, one in value.items()}
    return {name: one[k : k + 1] if has_rows[name] else one for name, one in value.items()}
