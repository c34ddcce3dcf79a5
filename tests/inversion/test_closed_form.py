"""The route of algebraically reversible samplers: the pair, its cost, and the growth of rounding."""

from __future__ import annotations

import warnings

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import mixture
from torch import Tensor

import kinvert as ki
from kinvert import analysis
from kinvert.engine import run_state


@pytest.mark.parametrize("name", ["edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster"])
def test_reversible_samplers_are_undone_in_closed_form(name: str) -> None:
    """The latent comes with an auxiliary state; the pair gives the image to rounding."""
    plan = ki.compile_plan(name, schedule(12))
    found = ki.invert(MIXTURE, images(), schedule(12), sampler=name)
    assert found.converged.all() and float(found.round_trip_error.max()) < 1e-11
    assert set(found.memory) == set(plan.auxiliary) != set()
    again = run_state(plan.closed, MIXTURE, {"x": found.latent, **found.memory})["x"]
    torch.testing.assert_close(again, images(), rtol=1e-10, atol=1e-10)


def test_rounding_that_will_grow_is_announced() -> None:
    """EDICT with a small p over many steps, in float32: the warning names the prediction, and the result bears it out."""
    rule = ki.sampler("edict", p=0.8)
    with pytest.warns(RuntimeWarning, match="edict magnifies rounding about .* times.*higher precision or fewer steps"):
        found = ki.invert(mixture(), images().float(), schedule(40), sampler=rule)
    assert found.amplification is not None and found.amplification > 1e4
    assert "amplification" in str(found) and not found.converged.all()


@pytest.mark.parametrize("sampler", ["edict", "bdia", "o_belm", "leapfrog", "reversible_heun", "mccallum_foster"])
def test_what_a_reversible_sampler_costs_is_counted(sampler: str) -> None:
    rows = 0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(denoiser, images(2), schedule(6), sampler=sampler)
    assert int(found.evaluations.sum()) == rows
    assert (found.evaluations - torch.tensor([3, 1])).unique().numel() == 1
    assert found.checking == ki.compile_plan(sampler, schedule(6)).closed.evaluations


@pytest.mark.parametrize("sampler", ["leapfrog", "mccallum_foster", "bdia"])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_growth_is_predicted_for_data_of_a_tenth_of_the_image(sampler: str, size: float) -> None:
    sigmas = schedule(8)
    image = images(1)
    image = image * (size / image.square().mean().sqrt())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = ki.invert(MIXTURE, image, sigmas, sampler=sampler)
    want = [max(analysis.amplification(ki.compile_plan(sampler, sigmas), std=s * size)) for s in (0.095, 0.1, 0.105)]
    assert found.amplification is not None and min(want) <= found.amplification <= max(want)
    assert max(want) < 1.5 * min(want)
