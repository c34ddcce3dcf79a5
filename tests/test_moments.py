"""Exact moments of Plans, against the closed form of the Gaussian probability-flow ODE and of sampled noise."""

from __future__ import annotations

import math

import pytest
import torch
from problems import noise_like

import kinvert as ki
from kinvert.denoisers import Gaussian
from kinvert.moments import Moments, check_flow_spread, check_kept, gaussian_law, gaussian_moments


def test_gaussian_law() -> None:
    assert gaussian_law(3.0, 2.0, 4.0) == Moments(2.0, 5.0)
    assert gaussian_law(0.5, 2.0, 1.0, "flow") == (1.0, pytest.approx(math.hypot(0.5, 0.5)))


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms", "bdia"])
def test_moments_of_deterministic_plans(name: str) -> None:
    """The result is affine in x, so two runs of the engine give its mean and standard deviation."""
    plan = ki.compile_plan(name, ki.schedules.karras(8, 0.1, 10))
    start = gaussian_law(plan.sigmas[0], 0.3, 0.5)
    at_mean, one_std = (
        float(ki.run(plan, Gaussian(0.3, 0.5), torch.full((1, 1), x, dtype=torch.float64)))
        for x in (start.mean, start.mean + start.std)
    )
    found = gaussian_moments(plan, 0.3, 0.5)
    assert (found.mean, found.std) == (pytest.approx(at_mean), pytest.approx(abs(one_std - at_mean)))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde"])
def test_moments_of_stochastic_plans(name: str) -> None:
    """`dpmpp_sde` draws two noises of one Brownian path a step."""
    plan = ki.compile_plan(name, ki.schedules.karras(8, 0.1, 10)[:-1])
    start = gaussian_law(plan.sigmas[0], 0.3, 0.5)
    x = start.mean + start.std * noise_like((1, 100_000))
    got = ki.run(plan, Gaussian(0.3, 0.5), x, ki.noise.brownian(1) if name == "dpmpp_sde" else ki.noise.white(1))
    found = gaussian_moments(plan, 0.3, 0.5)
    assert float(got.mean()) == pytest.approx(found.mean, abs=0.01)
    assert float(got.std()) == pytest.approx(found.std, rel=0.01)


def test_a_plan_that_diverges_through_flow_is_refused() -> None:
    times = [0.9999, 0.6, 0.3, 0.0]
    with pytest.raises(ValueError, match="edict through Flow .* without Flow"):
        check_flow_spread(ki.compile_plan(ki.rules.Flow(ki.sampler("edict")), times), "flow")
    check_flow_spread(ki.compile_plan(ki.sampler("edict"), [5.0, 1.0]), "ve")
    check_flow_spread(None, "flow")


def test_a_run_up_that_loses_the_masked_region_is_refused() -> None:
    check_kept(ki.compile_plan("heun", [0.1, 1.0, 5.0]), "ve")
    check_kept(None, "ve")
    with pytest.raises(ValueError, match="euler_cfg_pp cannot unsample with a mask: its unconditional image"):
        check_kept(ki.compile_plan("euler_cfg_pp", [0.1, 1.0, 5.0]), "ve")
