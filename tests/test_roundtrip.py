"""`round_trip`: up by any way, down by the sampler, measured; what a method has no use for is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import mixture, noise_like
from publications import guidance, labelled
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import BASELINES
from kinvert.roundtrip import METHODS

SIGMAS = schedule(8)
KARRAS = ki.schedules.karras(10, 0.05, 10.0)
GAUSSIAN = ki.denoisers.Gaussian(0.3, 0.5)
OWN = {"rf_solver": "rf_solver", "fireflow": "fireflow", "dpm_solver_2": "dpmpp_2m", "extract_noise": "euler_ancestral"}
MASK = torch.tensor([1.0, 1, 1, 0, 1, 1])


def data(*shape: int) -> Tensor:
    return 0.3 + 0.5 * noise_like(shape or (2, 1, 8, 8), seed=7)


def way(method: str) -> dict[str, Any]:
    return {"method": method, "sampler": OWN.get(method, "euler")}


def test_every_way_is_listed() -> None:
    assert [*METHODS] == ["unsample", "invert", "extract_noise", *BASELINES]


@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method: str, cfg: float) -> None:
    torch.manual_seed(0)
    trip = ki.round_trip(labelled, images(4), SIGMAS, **way(method), **guidance(cfg))
    torch.testing.assert_close(trip.mse, (trip.reconstruction - images(4)).square().mean(1))
    assert trip.latent.shape == trip.reconstruction.shape == (4, 6) and trip.sigma == pytest.approx(10.0)
    torch.testing.assert_close(trip.latent_std, (trip.latent / 10.0).std(1))
    if method in ("invert", "extract_noise", "direct_inversion"):
        assert float(trip.max_error.max()) < 1e-7
    else:
        assert float(trip.max_error.max()) < 20.0


@pytest.mark.parametrize("method", ["unsample", "invert", "extract_noise"])
def test_masks_and_parts(method: str) -> None:
    rows: list[int] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return MIXTURE(x, sigma)

    given = {"noise": ki.noise.white(0)} if method == "extract_noise" else {}
    whole = ki.round_trip(MIXTURE, images(4), SIGMAS, mask=MASK, **way(method), **given)
    parts = ki.round_trip(counting, images(4), SIGMAS, mask=MASK, max_batch=2, **way(method), **given)
    assert max(rows) == 2
    torch.testing.assert_close(parts.reconstruction, whole.reconstruction, rtol=0, atol=1e-8)
    kept = (whole.reconstruction - images(4))[:, MASK == 0]
    assert float(kept.abs().max()) < (0.1 if method == "unsample" else 1e-7)


def test_a_multistep_sampler_with_invert() -> None:
    trip = ki.round_trip(MIXTURE, images(), schedule(12), sampler="dpmpp_2m", method="invert")
    assert float(trip.max_error.max()) < 1e-7
    assert trip.evaluations > 24


@pytest.mark.parametrize("sampler", ["o_belm", "bdia"])
def test_the_pair_of_a_reversible_sampler_goes_down_with_the_latent(sampler: str) -> None:
    trip = ki.round_trip(MIXTURE, images(2), SIGMAS, sampler=sampler, method="invert")
    assert float(trip.max_error.max()) < 1e-9


def test_callbacks_see_both_directions() -> None:
    """The run that checks an inversion is not the way down: `round_trip` runs it for itself."""
    seen: list[Any] = []
    trip = ki.round_trip(MIXTURE, images(2), SIGMAS, callback=seen.append)
    assert len(seen) == 16 and trip.evaluations == 16
    seen.clear()
    ki.round_trip(MIXTURE, images(2), SIGMAS, method="invert", callback=seen.append)
    assert [progress.index for progress in seen] == list(range(8))


def test_churn_has_a_noise() -> None:
    rule = ki.sampler("heun", s_churn=2.0)
    trips = [ki.round_trip(MIXTURE, images(2), SIGMAS, sampler=rule, noise=ki.noise.white(seed)) for seed in (0, 0, 1)]
    assert torch.equal(trips[0].reconstruction, trips[1].reconstruction)
    assert not torch.equal(trips[0].reconstruction, trips[2].reconstruction)


def test_flow_time() -> None:
    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return MIXTURE(x / (1.0 - t)[:, None], t / (1.0 - t))

    flow.coordinates = "flow"  # type: ignore[attr-defined]
    times = SIGMAS / (1.0 + SIGMAS)
    for method in ("invert", "extract_noise"):
        trip = ki.round_trip(flow, images(2), times, **way(method))
        assert float(trip.max_error.max()) < 1e-7


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"method": "ddim"}, "unknown method 'ddim'; did you mean 'ddim_noisy'"),
    "normalize": ({"method": "invert", "normalize": True}, "normalize and end_at_step are for method='unsample'"),
    "end_at_step": ({"method": "aidi", "end_at_step": 2}, "end_at_step are for method='unsample'; cut the schedule"),
    "sigma_offset": ({"method": "invert", "sigma_offset": 1e-3}, "sigma_offset is for method='unsample'"),
    "noise": (
        {"method": "invert", "noise": ki.noise.white(0)},
        "noise is for samplers that draw noise, and euler draws",
    ),
    "noise of a baseline": (
        {"method": "aidi", "noise": ki.noise.white(0)},
        "noise is for kinvert's own methods, got",
    ),
    "mask": ({"method": "aidi", "mask": MASK}, "mask and max_batch are for kinvert's own methods, got one for 'aidi'"),
    "max_batch": ({"method": "renoise", "max_batch": 2}, "mask and max_batch are for kinvert's own methods"),
    "sampler": ({"method": "aidi", "sampler": "heun"}, "'aidi' inverts the sampler 'euler', got sampler='heun'"),
    "own": ({"method": "rf_solver"}, "'rf_solver' inverts the sampler 'rf_solver', got sampler='euler'"),
    "deterministic": ({"method": "extract_noise"}, "euler draws no noise on this schedule"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_method_has_no_use_for_is_refused(name: str) -> None:
    given, message = BAD[name]
    rows: list[int] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return MIXTURE(x, sigma)

    with pytest.raises(ValueError, match=message):
        ki.round_trip(counting, images(2), SIGMAS, **given)
    assert not rows or name in ("sampler", "own")  # which the method itself knows


def test_warnings_point_at_the_line_of_the_user() -> None:
    with pytest.warns(RuntimeWarning, match="edict magnifies rounding") as caught:
        ki.round_trip(mixture(), images().float(), schedule(40), sampler=ki.sampler("edict", p=0.8), method="invert")
    assert [warning.filename for warning in caught] == [__file__]


def test_round_trip_reports_what_it_measures() -> None:
    x = data()
    trip = ki.round_trip(GAUSSIAN, x, KARRAS, sampler="heun", end_at_step=2)
    assert torch.equal(trip.latent, ki.unsample(GAUSSIAN, x, KARRAS, sampler="heun", end_at_step=2))
    assert torch.equal(trip.reconstruction, ki.sample(GAUSSIAN, trip.latent, KARRAS[2:], sampler="heun"))
    torch.testing.assert_close(trip.mse, (trip.reconstruction - x).square().mean((1, 2, 3)))
    torch.testing.assert_close(trip.psnr, 10 * torch.log10(4 / trip.mse))
    torch.testing.assert_close(trip.latent_std, (trip.latent / KARRAS[2]).flatten(1).std(1))
    assert trip.sigma == float(KARRAS[2])
    assert trip.evaluations == 16 + 15
    text = str(trip)
    assert "31 evaluations" in text and "psnr" in text and "latent_std" in text


@pytest.mark.parametrize("normalize", [True, "sample", "sigma"])
def test_round_trip_of_a_normalized_latent(normalize: Any) -> None:
    """A normalized latent is brought back to its noise level before it is sampled."""
    trip = ki.round_trip(GAUSSIAN, data(4, 3, 8, 8), KARRAS, sampler="heun", normalize=normalize)
    assert float(trip.psnr.min()) > 15
    assert float(trip.latent_std.mean()) == pytest.approx(1.0, abs=0.1)
