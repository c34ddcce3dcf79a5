"""The record of a cell: metrics against closed formulas, costs, trajectories, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cells import SMALL, measured

import kinvert as ki
from kinvert import bench
from kinvert.bench import METHODS, Cell
from kinvert.bench.measurement import setup_of
from kinvert.bench.problems import make_problem
from kinvert.jsontext import canonical_json
from kinvert.rules import Rule, StepBuilder, register
from kinvert.tensors import rms


def test_reconstruction_is_the_round_trip() -> None:
    record = measured(sampler="heun", steps=5)
    problem = make_problem("gaussian", 2, 0, torch.float64)
    sigmas = ki.schedules.karras(6, 0.03, 15.0)[:-1]
    trip = ki.round_trip(problem.denoiser, problem.images, sigmas, sampler="heun", sigma_offset=0.0)
    assert record["metrics"]["mse"] == trip.mse.tolist()
    assert record["metrics"]["psnr"] == trip.psnr.tolist()
    assert record["metrics"]["latent_std"] == pytest.approx(trip.latent_std.tolist())
    assert record["inversion_evaluations"] == record["sampling_evaluations"] == [10, 10]
    assert record["converged"] is None and record["error"] is None
    assert record["key"] == Cell(**SMALL | {"sampler": "heun", "steps": 5}).key


def test_the_latent_of_a_gaussian_is_known() -> None:
    """The distance to the ODE's latent, from the closed formula of the ODE's solution."""
    record = measured(sampler="heun", steps=40, dtype="float32")
    problem = make_problem("gaussian", 2, 0, torch.float32)
    setup = setup_of(Cell(**SMALL | {"sampler": "heun", "steps": 40, "dtype": "float32"}), problem)
    latent = METHODS["unsample"](setup, problem.images)
    exact = problem.denoiser.ode(problem.images.double(), setup.sigmas[-1], setup.sigmas[0])
    assert record["metrics"]["distance_to_ode"] == pytest.approx((rms(latent - exact) / 15.0).tolist(), rel=1e-6)


def test_distance_to_ode_and_its_three_parts() -> None:
    for method in ("unsample", "invert", "ddim_noisy"):
        m = {k: np.array(v) for k, v in measured(method=method, dtype="float32", steps=8)["metrics"].items()}
        assert (m["distance_to_ode"] <= m["discretisation"] + m["solver"] + m["round_off"] + 1e-12).all()
        assert (m["round_off"] > 0).all() and (m["round_off"] < 1e-4).all()
        assert (m["solver"] < 1e-8).all() == (method == "invert")
    wide = measured(method="unsample", steps=8)["metrics"]
    assert wide["round_off"] == [0.0, 0.0]
    assert wide["discretisation"] == pytest.approx(m["discretisation"].tolist(), rel=1e-3)


def test_recovery_compares_latents() -> None:
    record = measured(question="recovery", steps=5)
    problem = make_problem("gaussian", 2, 0, torch.float64)
    sigmas = ki.schedules.karras(6, 0.03, 15.0)[:-1]
    latent = 15.0 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = ki.sample(problem.denoiser, latent, sigmas)
    back = ki.unsample(problem.denoiser, image, sigmas, sigma_offset=0.0)
    m = record["metrics"]
    assert m["mse"] == pytest.approx(((back - latent) / 15).square().mean(1).tolist())
    assert "psnr" not in m and "discretisation" not in m
    exact = problem.denoiser.ode(latent, sigmas[0].item(), sigmas[-1].item())
    assert m["distance_to_ode"] == pytest.approx(rms(image - exact).tolist(), rel=1e-6)


def test_trajectory_of_errors() -> None:
    record = measured(steps=6)
    sigma, error = (record["trajectory"][key] for key in ("sigma", "error"))
    assert sigma == list(setup_of(Cell(**SMALL | {"steps": 6}), make_problem("gaussian", 2, 0, torch.float64)).sigmas)
    rmses = [math.sqrt(mse) for mse in record["metrics"]["mse"]]
    assert error[0] == 0.0 and error[-1] == pytest.approx(sorted(rmses)[0])
    back = measured(steps=6, question="recovery")["trajectory"]["error"]
    assert back[-1] == 0.0 and back[0] > back[-2] > 0
    assert measured(method="reversible", sampler="edict")["trajectory"] is None  # it is evaluated beside its state


def test_residuals_of_stepwise_solvers() -> None:
    record = measured(method="picard", steps=6)
    assert len(record["residuals"]["sigma"]) == len(record["residuals"]["error"]) == 6
    assert max(record["residuals"]["error"]) < 1e-8
    assert measured()["residuals"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "extract_noise"}, "euler draws no noise"),
        ({"method": "reversible"}, "euler carries no auxiliary state"),
        ({"sampler": "euler_ancestral"}, "euler_ancestral cannot unsample"),
        ({"sampler": "euler_ancestral", "method": "invert"}, "cannot invert euler_ancestral"),
        ({"cfg": 2.0}, "negative= is missing"),
    ],
)
def test_refusal_is_recorded_as_error(settings: dict[str, Any], message: str) -> None:
    record = measured(**settings)
    assert message in record["error"]
    assert record["metrics"] == {} and record["inversion_evaluations"] is None


def test_distribution_of_latent_and_arrays_of_images() -> None:
    record, arrays = bench.measure(Cell("digits", steps=3, count=6, dtype="float32"))
    assert {name: value.shape for name, value in arrays.items()} == dict.fromkeys(
        ("image", "latent", "restored"), (4, 1, 8, 8)
    )
    histogram, spectrum = record["latent"]["histogram"], record["latent"]["spectrum"]
    assert sum(histogram["counts"]) == 6 * 64 and len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert len(spectrum["frequency"]) == len(spectrum["power"]) == 4
    assert "patch_correlation" in record["metrics"]
    assert bench.measure(Cell(**SMALL))[1] == {} and measured()["latent"]["spectrum"] is None


@pytest.mark.parametrize(("model", "names"), [("digits", set()), ("mnist", {"ssim", "edit_ssim"})])
def test_small_images_have_no_ssim(model: str, names: set[str]) -> None:
    found = measured(model=model, steps=2, count=1, dtype="float32")["metrics"]
    assert {"ssim", "edit_ssim"} & found.keys() == names and "edit_mse" in found


@pytest.mark.parametrize(
    "settings", [{"method": "invert"}, {"method": "extract_noise", "sampler": "euler_ancestral"}], ids=str
)
def test_latents_of_the_networks_are_edited(settings: dict[str, Any]) -> None:
    """With the noises that belong to them; the measure is that of `change_class` itself."""
    settings = {"model": "digits", "steps": 5, "count": 3, "dtype": "float64"} | settings
    found = measured(**settings)["metrics"]
    assert {"edit_took", "edit_probability", "edit_mse"} <= found.keys()
    assert not any(name.startswith("edit") for name in measured(question="recovery", **settings)["metrics"])
    if settings["method"] == "invert":
        cell = Cell(**settings)
        problem = make_problem("digits", 3, 0, torch.float64)
        setup, label = setup_of(cell, problem), problem.positive["label"]
        latent = ki.invert(problem.denoiser, problem.images, setup.sigmas, positive={"label": label}).latent
        edited = ki.sample(problem.denoiser, latent, setup.sigmas, positive={"label": (label + 1) % 10})
        expected = (edited - problem.images).square().flatten(1).mean(1)
        torch.testing.assert_close(torch.tensor(found["edit_mse"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


def test_cell_does_not_depend_on_random_state_or_other_cells() -> None:
    """Neither on the cells before it nor on the state of torch's generator, which it leaves alone."""
    cell = Cell("mixture", sampler="euler_ancestral", method="ddim_clean", steps=3, count=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = canonical_json(bench.measure(cell)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    measured(model="mixture", method="invert")
    assert canonical_json(bench.measure(cell)[0]) == first


def test_registered_sampler_can_be_measured() -> None:
    try:

        @register
        @dataclass(frozen=True)
        class Own(Rule):
            name: ClassVar[str] = "own_euler"
            ode_order: ClassVar[int] = 1

            def step(self, s: StepBuilder) -> Any:
                return ki.rules.interpolate(s.x, s.denoise(s.x, s.sigma), s.sigma_next / s.sigma)

        assert measured(sampler="own_euler")["metrics"] == measured(sampler="euler")["metrics"]
        assert measured(sampler="own_euler", method="invert")["converged"] == [True, True]
    finally:
        del ki.SAMPLERS["own_euler"]
