"""Reversible samplers that draw noise: the run is undone with the noise that it drew, exactly, and never without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flowmodels import IN_FLOW, TIMES, X
from hypothesis import given, settings
from inverting import MIXTURE, images, schedule
from problems import noise_like, schedules
from torch import Tensor

import kinvert as ki
from kinvert import analysis
from kinvert.engine import drawn_noises, run_state
from kinvert.inversion.reversible import invert_reversible
from kinvert.rules import McCallumFoster, ShARK

RULES: dict[str, ki.Rule] = {
    "rex_sde": ki.sampler("rex_sde"),
    "eta 0.4": McCallumFoster(ShARK(eta=0.4), coupling="data"),
    "much coupled": McCallumFoster(ShARK(), lam=0.8, coupling="data"),
    "churned": McCallumFoster(ki.sampler("heun", s_churn=3.0)),
}
SOURCES: dict[str, ki.noise.Noise] = {
    "white": ki.noise.white(3),
    "of each sample": ki.noise.white([1, 2, 3]),
    "brownian": ki.noise.brownian(3),
    "fixed depth": ki.noise.brownian([1, 2, 3], depth=12),
}


def by_interval(sigma_from: float, sigma_to: float) -> Tensor:
    return noise_like((3, 6), seed=hash((sigma_from, sigma_to)) % 2**31)


@pytest.mark.parametrize("name", RULES)
@given(sigmas=schedules(min_steps=2, zero=False))
@settings(max_examples=10, deadline=None)
def test_a_run_is_undone_with_its_noises(name: str, sigmas: list[float]) -> None:
    """To rounding, which the inverse magnifies by as much as `amplification` says."""
    plan, x = ki.compile_plan(RULES[name], sigmas), sigmas[0] * noise_like((3, 6))
    end = run_state(plan, MIXTURE, {"x": x}, by_interval)
    undone = invert_reversible(plan, MIXTURE, end["x"], {"z": end["z"]}, drawn_noises(plan, by_interval, x))
    size = max(sigmas[0], 1.0) * max(analysis.amplification(plan, std=0.1))
    torch.testing.assert_close(undone.latent, x, rtol=0, atol=1e-11 * size)
    assert float(undone.gap.max()) < 1e-11 * size


@pytest.mark.parametrize("source", SOURCES)
def test_invert_finds_the_latent_of_an_image_for_a_given_noise(source: str) -> None:
    """The same source samples it again, from the pair of latent and auxiliary state."""
    noise, x = SOURCES[source], images(3)
    found = ki.invert(MIXTURE, x, schedule(10), sampler="rex_sde", noise=noise)
    assert found.converged.all() and float(found.round_trip_error.max()) < 1e-11
    assert len(found.noises) == 20 and set(found.memory) == {"z"}
    torch.testing.assert_close(found.sample(MIXTURE), x, rtol=0, atol=1e-11)
    plan = ki.compile_plan("rex_sde", schedule(10)).closed
    again = run_state(plan, MIXTURE, {"x": found.latent, **found.memory}, noise)["x"]
    torch.testing.assert_close(again, x, rtol=0, atol=1e-11)
    parts = ki.invert(MIXTURE, x, schedule(10), sampler="rex_sde", noise=noise, max_batch=2)
    torch.testing.assert_close(parts.latent, found.latent, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(parts.noises, found.noises, strict=True))


def test_the_latent_belongs_to_the_noise() -> None:
    x = images(3)
    one, other = (ki.invert(MIXTURE, x, schedule(8), sampler="rex_sde", noise=ki.noise.white(s)) for s in (1, 2))
    assert one.converged.all() and other.converged.all()
    assert float((one.latent - other.latent).abs().mean()) > 1.0
    with pytest.warns(RuntimeWarning, match="without its auxiliary state and noises rex_sde makes another image"):
        again = ki.sample(MIXTURE, one.latent, schedule(8), sampler="rex_sde")
    assert float((again - x).abs().max()) > 0.1


def test_it_is_saved_with_its_noises(tmp_path: Path) -> None:
    x = images(3)
    ki.invert(MIXTURE, x, schedule(6), sampler="rex_sde", noise=ki.noise.white(0)).save(tmp_path / "found.safetensors")
    torch.testing.assert_close(ki.load(tmp_path / "found.safetensors").sample(MIXTURE), x, rtol=0, atol=1e-11)


def test_flow_times_masks_and_a_way_that_is_not_checked() -> None:
    run: dict[str, Any] = {"sampler": "rex_sde", "noise": ki.noise.white(0)}
    found = ki.invert(IN_FLOW, X, TIMES[1:-1], **run)
    assert found.converged.all()
    torch.testing.assert_close(found.sample(IN_FLOW), X, rtol=0, atol=1e-9)
    x = images(3)
    mask = torch.tensor([1.0, 1, 1, 0, 0, 0])
    found = ki.invert(MIXTURE, x, schedule(8), mask=mask, **run)
    assert found.converged.all()
    torch.testing.assert_close(mask * found.sample(MIXTURE), mask * x, rtol=0, atol=1e-9)
    found = ki.invert(MIXTURE, x, schedule(8), check=False, **run)
    torch.testing.assert_close(found.sample(MIXTURE), x, rtol=0, atol=1e-11)


def test_float32_and_half_precision() -> None:
    x, run = images(3), {"sampler": "rex_sde", "noise": ki.noise.white(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rounding that will grow
        single = ki.invert(MIXTURE, x.float(), schedule(8), **run)
        half = ki.invert(lambda y, sigma: MIXTURE(y, sigma.to(y.dtype)), x.bfloat16(), schedule(8), **run)
    assert float(single.round_trip_error.max()) < 1e-3
    assert half.noises[0].dtype == half.latent.dtype == torch.bfloat16


def test_round_trips_and_edits_take_it() -> None:
    x, run = images(3), {"sampler": "rex_sde", "noise": ki.noise.brownian(0)}
    assert float(ki.round_trip(MIXTURE, x, schedule(8), method="invert", **run).max_error.max()) < 1e-10

    def labelled(y: Tensor, sigma: Tensor, shift: float) -> Tensor:
        return MIXTURE(y - shift, sigma) + shift

    one, two = {"shift": 0.0}, {"shift": 0.5}
    done = ki.edit(labelled, x, schedule(8), source=one, target=two, **run)
    found = ki.invert(labelled, x, schedule(8), positive=one, **run)
    torch.testing.assert_close(done.image, found.sample(labelled, positive=two), rtol=1e-12, atol=1e-12)
    assert float((done.image - x).abs().max()) > 0.1


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no noise": ({"sampler": "rex_sde"}, ValueError, "cannot invert rex_sde without noise: it draws noise 8 times.*noise="),
    "not reversible": (
        {"sampler": "shark", "noise": ki.noise.white(0)}, ValueError, "cannot invert shark: it draws noise.*'rex_sde'",
    ),
    "no use": ({"sampler": "heun", "noise": ki.noise.white(0)}, ValueError, "noise is for samplers that draw noise, and heun"),
    "no source": ({"sampler": "rex_sde", "noise": 3}, TypeError, "noise must be a noise source.*got int"),
    "shape": ({"sampler": "rex_sde", "noise": lambda a, b: torch.zeros(2)}, ValueError, "must return a tensor of x's shape"),
    "too few": ({"sampler": "rex_sde", "noise": ki.noise.replay([images(3)])}, ValueError, "replay ran out of noise"),
    "to zero": ({"sampler": "rex_sde", "noise": ki.noise.white(0), "zero": True}, ValueError, r"from sigma 0.1 to 0.*\[:-1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    options, sigmas = dict(options), schedule(4)
    if options.pop("zero", False):
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    with pytest.raises(error, match=message):
        ki.invert(MIXTURE, images(3), sigmas, **options)


def test_what_has_no_noise_to_take_refuses_the_sampler() -> None:
    plan, x = ki.compile_plan("rex_sde", schedule(4)), images(3)
    with pytest.raises(ValueError, match=r"rex_sde cannot undo .*it draws noise: use ki.invert"):
        analysis.explicit_inverse(plan)
    with pytest.raises(ValueError, match="noises must be those of the run, 8 of them, got 1"):
        invert_reversible(plan, MIXTURE, x, noises=[x])
    with pytest.raises(ValueError, match="recompute=True undoes steps, and rex_sde draws noise"):
        ki.run(plan, MIXTURE, x, ki.noise.white(0), recompute=True)
    found = ki.invert(MIXTURE, x, schedule(4), sampler="rex_sde", noise=ki.noise.white(0))
    with pytest.raises(ValueError, match="belongs to its noises"):
        found.differentiable(MIXTURE)


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        (ki.sampler("shark"), "eta=0"),
        (ki.sampler("restart"), "restarts=0"),
        (ki.sampler("euler", s_churn=5.0), "s_churn=0"),
    ],
)
def test_the_option_that_switches_the_noise_off_is_named(rule: ki.Rule, fix: str) -> None:
    levels = ki.schedules.karras(12, 0.02, 10.0)[:-1]
    with pytest.raises(ValueError, match=rf"use extract_noise, or ki\.sampler\('{rule.name}', {fix}\), or"):
        ki.invert(ki.denoisers.Gaussian(0.1, 0.5), torch.zeros(1, 1, 2, 2), levels, sampler=rule)
