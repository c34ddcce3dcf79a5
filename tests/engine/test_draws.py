"""The noise of a run, and its place in a run that is resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import noise_like
from runs import PLANS

import kinvert as ki
from kinvert.engine.draws import from_recipe, noise_after, recipe_of, source_for

SOURCES = [ki.noise.white(3), ki.noise.white([3, 4]), ki.noise.brownian(3), ki.noise.brownian([3, 4], depth=8)]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_recipes_describe_sources(source: Any) -> None:
    recipe = recipe_of(source)
    assert recipe is not None and from_recipe(recipe) == source


def test_other_sources_have_no_recipe() -> None:
    others = [None, ki.noise.replay([]), ki.noise.clipped(ki.noise.white(3), 1.0), lambda a, b: torch.ones(2)]
    assert [recipe_of(source) for source in others] == [None] * 4


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_noise_after_some_draws(source: Any) -> None:
    plan, x = PLANS["dpmpp_sde"], 10 * noise_like((2, 6))
    intervals = [interval for step in plan.steps for interval in step.noises]
    whole = noise_after(plan, source, x, 0)
    want = [whole(*interval) for interval in intervals]
    for drawn in range(len(intervals)):
        rest = noise_after(plan, source, x, drawn)
        assert all(torch.equal(rest(*interval), n) for interval, n in zip(intervals[drawn:], want[drawn:], strict=True))


def test_deterministic_plans_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert source_for(PLANS["heun"], None) is None
    assert torch.equal(torch.get_rng_state(), before)
