"""The route of one-step samplers: hard steps, attempts, the step to 0, what is said of a sample without inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.bench.problems import make_problem
from kinvert.inversion import (
    Anderson,
    Auto,
    Continuation,
    Damped,
    NewtonKrylov,
    Picard,
)
from kinvert.tensors import rms


def test_picard_oscillates_where_anderson_converges() -> None:
    """Few steps: the published fixed point stalls where r + (1 - r) lmax(D') > 2."""
    close = ki.denoisers.GaussianMixture(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64), torch.tensor([0.2, 0.2], dtype=torch.float64)
    )
    x, sigmas = torch.tensor([[0.4, 0.1], [0.05, 0.2]], dtype=torch.float64), [4.0, 1.0, 0.5]
    with pytest.warns(RuntimeWarning, match="not inverted"):
        stalled = ki.invert(close, x, sigmas, method="picard")
    assert not stalled.converged.all()
    assert ki.invert(close, x, sigmas, method="auto").converged.all()


@pytest.mark.parametrize(
    "solver", [Anderson(), Damped(tau=0.5, max_iterations=2000), NewtonKrylov(), Continuation(), Picard(200), Auto()]
)
def test_solvers_agree(solver: ki.inversion.Solver) -> None:
    found = ki.invert(MIXTURE, images(), schedule(20), method=solver, tol=1e-8)
    exact = ki.invert(MIXTURE, images(), schedule(20), tol=1e-10)
    assert found.converged.all()
    torch.testing.assert_close(found.latent, exact.latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [20, 50, 100, 101])
@pytest.mark.parametrize("levels", [[2.0, 1.0], [4.0, 2.0, 1.0]])
def test_an_image_that_is_never_reached_costs_the_limit(levels: list[float], limit: int) -> None:
    """But for the last four evaluations, which are too few for another step of the search and its check."""
    x = torch.tensor([[5.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = ki.invert(
            lambda x, sigma: -x.square(), x, levels, method=Anderson(max_iterations=10**4), max_evals=limit
        )
    assert limit - 4 <= int(found.evaluations) <= limit


def test_what_has_no_preimage_is_said_to_have_none() -> None:
    """F(u) = r u + (1 - r) D(u) with D(u) = -u^2 / c never exceeds a bound, so an image above it cannot be reached."""

    def parabola(x: Tensor, sigma: Tensor) -> Tensor:
        return -x.square()

    x = torch.tensor([[0.05], [5.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"sample 1 not inverted.*step 0 \(sigma 2 -> 1\)"):
        found = ki.invert(parabola, x, [2.0, 1.0])
    assert found.converged.tolist() == [True, False]
    assert found.round_trip_error[1] > 1 and torch.isfinite(found.latent).all()
    assert "sample 1 not inverted" in str(found) and "converged        1 of 2" in str(found)
    assert found.round_trip_error[1] < 5 - 0.75 / 8  # the top of the parabola u/2 - u^2/2 is 1/8


@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, 20])
def test_strong_guidance(steps: int) -> None:
    """cfg 7.5: every image of the trained network is reached, where Anderson's method alone fails for some."""
    denoiser = models.load("digits", dtype=torch.float64)
    x, labels = (part[:4] for part in models.held_out("digits"))
    sigmas = ki.schedules.karras(steps + 1, 0.02, 80.0)[:-1]
    guided: dict[str, Any] = {
        "cfg": 7.5, "positive": {"label": labels}, "negative": {"label": torch.full_like(labels, denoiser.null_label)},
    }  # fmt: skip
    with pytest.warns(RuntimeWarning, match="not inverted.*smallest singular value"):
        plain = ki.invert(denoiser, x.double(), sigmas, method="anderson", **guided)
    found = ki.invert(denoiser, x.double(), sigmas, tol=1e-8, **guided)
    assert found.converged.all() and not plain.converged.all()
    again = ki.sample(denoiser, found.latent, sigmas, **guided)
    assert float(rms(again - x.double()).max()) <= 1e-8


@pytest.mark.parametrize("cfg", [5.0, 7.5])
def test_errors_that_the_way_down_magnifies_are_made_smaller(cfg: float) -> None:
    """At strong guidance a step's residual grows some hundred times on the way down; the second attempt allows for it."""
    problem = make_problem("mixture", 8, 0, torch.float64)
    guided: dict[str, Any] = {"cfg": cfg, "positive": problem.positive, "negative": problem.negative}
    found = ki.invert(problem.denoiser, problem.images, ki.schedules.karras(21, 0.03, 15.0)[:-1], **guided)
    assert found.converged.all()


def test_contraction_is_the_factor_of_the_fixed_point() -> None:
    """For one Gaussian D' = s^2 / (s^2 + sigma^2), and I - F' = (1 - r) (1 - D') at every state."""
    gaussian = ki.denoisers.Gaussian(torch.zeros(6, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    found = ki.invert(gaussian, images(), schedule(9), tol=1e-11)  # what the states miss is an error of the factors
    levels = schedule(9)
    r, sigma = levels[1:] / levels[:-1], levels[:-1]
    exact = (1 - r) * (1 - 0.49 / (0.49 + sigma**2))
    assert found.contraction is not None
    torch.testing.assert_close(found.contraction, exact[:, None].expand(-1, 6), rtol=1e-4, atol=1e-6)


# -- the step to sigma = 0


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_the_step_to_zero_is_inverted_when_asked(name: str) -> None:
    sigmas = ki.schedules.karras(8, 0.1, 10.0)
    assert sigmas[-1] == 0
    x = MIXTURE(images(), torch.full((6,), 0.05, dtype=torch.float64))  # what a denoiser can say
    found = ki.invert(MIXTURE, x, sigmas, sampler=name, last_step="least_change", tol=1e-8)
    assert found.converged.all()
    assert float(rms(ki.sample(MIXTURE, found.latent, sigmas, sampler=name) - x).max()) <= 1e-8


def test_least_change_is_the_nearest_of_many() -> None:
    """`D(x) = P x` with a projection P: of all x with P x = image, the image itself is nearest."""
    q = torch.linalg.qr(noise_like((6, 3), seed=1))[0]
    projection = q @ q.T

    def project(x: Tensor, sigma: Tensor) -> Tensor:
        return x @ projection

    x = images() @ projection
    found = ki.invert(project, x, [0.5, 0.0], last_step="least_change")
    assert found.converged.all()
    torch.testing.assert_close(found.latent, x, rtol=0, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="not inverted"):
        outside = ki.invert(project, images(), [0.5, 0.0], last_step="least_change")
    torch.testing.assert_close(outside.restored, images() @ projection, rtol=0, atol=1e-9)
