"""Published inversions that iterate on one equation a step: closed forms, limits, cost."""

from __future__ import annotations

import math

import pytest
import torch
from inverting import MIXTURE
from problems import order_slope
from publications import GAUSSIAN, close, guidance, images, labelled, schedule
from torch import Tensor

import kinvert as ki
from kinvert.inversion.baselines import (
    BASELINES,
    aidi,
    ddim_inversion,
    dpm_solver_inversion,
    renoise,
)
from kinvert.tensors import rms


@pytest.mark.parametrize("window", [0, 3])
def test_aidi_converges_to_the_exact_inverse(window: int) -> None:
    exact = ki.invert(MIXTURE, images(), schedule(20), tol=1e-11)
    found = aidi(MIXTURE, images(), schedule(20), iterations=200, window=window)
    assert found.converged.all()
    close(found.latent, exact.latent, 1e-7)
    few, more = (aidi(MIXTURE, images(), schedule(20), iterations=k, window=window) for k in (2, 8))
    assert (few.round_trip_error > more.round_trip_error).all() and not few.converged.any()


def test_aidi_is_the_published_fixed_point() -> None:
    """One step: u <- x_b + (a - b) d(u, a) from DDIM inversion; acceleration needs fewer iterations."""
    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    u = ddim_inversion(GAUSSIAN, images(), sigmas).latent
    for k in range(1, 6):  # an evaluation each, and none is thrown away
        u = images() + (u - GAUSSIAN(u, torch.full((4,), 2.0, dtype=torch.float64))) / 2.0
        found = aidi(GAUSSIAN, images(), sigmas, iterations=k)
        close(found.latent, u)
        assert (found.evaluations == 1 + k + found.checking).all()
    assert aidi(GAUSSIAN, images(), sigmas, iterations=5, window=2).round_trip_error.max() < 1e-9


@pytest.mark.parametrize("average", [1, 2, 4])
def test_renoise_is_the_mean_of_the_last_predictions(average: int) -> None:
    """One step; u_{k+1} = x_b + (a - b) eps_k, and the last is made with the mean of the last eps."""
    sigmas, a, b = torch.tensor([2.0, 1.0], dtype=torch.float64), 2.0, 1.0
    w = math.sqrt((1 + a * a) / (1 + b * b))
    u, predictions = w * images(), []
    for _ in range(6):
        predictions.append((u - MIXTURE(u, torch.full((4,), a, dtype=torch.float64))) / a)
        u = images() + (a - b) * predictions[-1]
    expected = images() + (a - b) * torch.stack(predictions[-average:]).mean(0)
    found = renoise(MIXTURE, images(), sigmas, iterations=5, average=average)
    close(found.latent, expected)
    assert (found.evaluations - found.checking == 6).all()  # the mean's own residual would be a seventh
    close(found.residuals[0], rms((a - b) * (predictions[-1] - predictions[-2])))


def test_averaging_damps_an_oscillation_that_the_fixed_point_keeps() -> None:
    """F' = r + (1 - r) g = 1.9 at an indefinite point of the iteration: u - u* changes its sign and falls by 0.9."""

    def steep(x: Tensor, sigma: Tensor) -> Tensor:
        return 2.8 * x  # with r = 1/2 the step is 1.9 x

    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    plain, mean = (renoise(steep, images(), sigmas, iterations=9, average=k).round_trip_error for k in (1, 2))
    close(mean / plain, torch.full_like(plain, (1 / 0.9 - 1) / 2), 1e-9)  # the mean of e / -0.9 and e


def test_dpm_solver_inversion_of_order_one_is_exact() -> None:
    found = dpm_solver_inversion(MIXTURE, images(), schedule(), iterations=500)
    assert found.converged.all() and float(found.round_trip_error.max()) <= 1e-9
    close(found.latent, ki.invert(MIXTURE, images(), schedule(), tol=1e-11).latent, 1e-7)


def test_dpm_solver_inversion_of_order_two_is_approximate() -> None:
    """It is exact where D does not change, and in one step; else its error falls with the steps, not the iterations."""
    dirac = ki.denoisers.Gaussian(0.3, 0.0)
    assert dpm_solver_inversion(dirac, images(), schedule(), order=2, iterations=500).converged.all()
    one = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert dpm_solver_inversion(MIXTURE, images(), one, order=2, iterations=500).converged.all()
    steps, x = [10, 20, 40], images(2)
    found = [dpm_solver_inversion(MIXTURE, x, schedule(n), order=2) for n in steps]
    errors = [float(f.round_trip_error.max()) for f in found]
    assert order_slope(errors, steps) > 1.5 and errors[-1] > 1e-6
    assert float(found[0].residuals.max()) < 1e-8  # the equations are solved; it is their terms that are estimated
    naive = ki.unsample(MIXTURE, x, schedule(10), sampler="dpmpp_2m", sigma_offset=0.0)
    back = ki.sample(MIXTURE, naive, schedule(10), sampler="dpmpp_2m")
    assert errors[0] < float(rms(back - x).max())


@pytest.mark.parametrize("name", ["aidi", "aidi_anderson", "dpm_solver_1", "dpm_solver_2"])
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    x = torch.cat([images(2), 3 * images(1)])
    together = BASELINES[name](labelled, x, schedule(), **guidance(1.5, 3))
    alone = BASELINES[name](labelled, x[1:2], schedule(), **guidance(1.5, 1))
    close(together.latent[1:2], alone.latent, 1e-8)


def test_a_fixed_point_that_diverges_is_returned_as_it_is() -> None:
    """The last iterate, as published, not the best one; it is not called converged."""
    sigmas = torch.tensor([4.0, 1.0], dtype=torch.float64)
    errors = [aidi(lambda x, s: 4.0 * x, images(), sigmas, iterations=k).round_trip_error for k in (1, 4, 8)]
    assert (errors[2] > errors[1]).all() and (errors[1] > errors[0]).all()
    assert not aidi(lambda x, s: 4.0 * x, images(), sigmas).converged.any()
