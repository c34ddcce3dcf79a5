"""The noise of a run: where it comes from, and how a run that is resumed finds its place in it."""

from __future__ import annotations

import itertools
from typing import TypedDict

from torch import Tensor

from kinvert.engine.contract import checked_noise
from kinvert.noise import Brownian, Clipped, Noise, NoiseFunction, NoiseSource, White, bind, default_noise
from kinvert.plan import Plan

__all__ = ["Recipe", "drawn_noises", "from_recipe", "noise_after", "noise_for", "recipe_of", "source_for"]


class Recipe(TypedDict):
    """A noise source as plain data: "white" or "brownian", its seed or seeds, and `depth` of a Brownian path."""

    kind: str
    seed: int | list[int]
    depth: int | None


def source_for(plan: Plan, noise: Noise | None) -> Noise | None:
    """Return the noise source of a run, by default the rule's own kind; None for a deterministic Plan.

    A deterministic Plan thus leaves torch's global generator alone.
    """
    if not plan.is_stochastic:
        return None
    return default_noise(plan.rule.default_noise) if noise is None else noise


def noise_for(plan: Plan, noise: Noise | None, x: Tensor) -> NoiseFunction:
    """Return the noise function of a run on states like x; see `source_for`."""
    source = source_for(plan, noise)
    if source is None:
        return lambda sigma_from, sigma_to: x  # never called
    return bind(source, x, plan.noise_levels, plan.rule.noise_clip)


def drawn_noises(plan: Plan, noise: Noise | None, x: Tensor) -> tuple[Tensor, ...]:
    """Return the noises that a run on states like x draws, in order; `ki.noise.replay` plays them back.

    Raises:
        TypeError, ValueError: no noise source; a noise of another shape than x's.
    """
    draw = noise_for(plan, noise, x)
    return tuple([checked_noise(draw, interval, x).clone() for step in plan.steps for interval in step.noises])


def noise_after(plan: Plan, noise: Noise | None, x: Tensor, draws: int) -> NoiseFunction:
    """Return the noise function of a run that has drawn `draws` noises already.

    A source that starts the same stream for every run draws them again, so that all that follows is the same to the
    bit. A function of the caller's keeps its own place.
    """
    draw = noise_for(plan, noise, x)
    if _restarts(noise):
        intervals = (interval for step in plan.steps for interval in step.noises)
        for interval in itertools.islice(intervals, draws):
            draw(*interval)
    return draw


def _restarts(noise: Noise | None) -> bool:
    """Tell whether a source starts the same stream for every run."""
    return _restarts(noise.source) if isinstance(noise, Clipped) else isinstance(noise, NoiseSource)


def recipe_of(source: Noise | None) -> Recipe | None:
    """Return a source as plain data, or None if it is none of those that a few numbers describe."""
    if not isinstance(source, (White, Brownian)):
        return None
    seed = list(source.seed) if isinstance(source.seed, tuple) else source.seed
    if isinstance(source, White):
        return {"kind": "white", "seed": seed, "depth": None}
    return {"kind": "brownian", "seed": seed, "depth": source.depth}


def from_recipe(recipe: Recipe) -> White | Brownian:
    """Return the source that `recipe_of` described."""
    seed = tuple(recipe["seed"]) if isinstance(recipe["seed"], list) else recipe["seed"]
    return White(seed) if recipe["kind"] == "white" else Brownian(seed, recipe["depth"])
