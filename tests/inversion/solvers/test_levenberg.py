"""Levenberg's and Marquardt's method: exact where a fold stops the others, and small events alone."""

from __future__ import annotations

import pytest
import torch
from inverting import problem_of
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.inversion import Guess, LevenbergMarquardt, Problem, Reason, Search
from kinvert.inversion.solvers.levenberg import jacobian, secant
from kinvert.tensors import rms


def valley(u: Tensor, index: Tensor) -> Tensor:
    """`u^3 - 3 u` in each value: a valley at u = 1 whose bottom is no root of `F = -4`, and a root at -2."""
    return u**3 - 3 * u


def test_other_starts_lead_out_of_a_valley_without_a_root() -> None:
    y = torch.full((1, 2), -4.0, dtype=torch.float64)
    near = torch.full_like(y, 1.2)
    alone = LevenbergMarquardt(starts=0).solve(problem_of(valley, y), Guess(near))
    assert alone.residual.item() == pytest.approx(2.0, abs=1e-3) and alone.reason.item() == Reason.STALLED
    root = LevenbergMarquardt().solve(problem_of(valley, y), Guess(near))
    assert root.residual.item() <= 1e-12 and root.reason.item() == Reason.CONVERGED
    exact = -2.195823345445647  # the real root of u^3 - 3 u + 4
    torch.testing.assert_close(root.u, torch.full_like(y, exact), rtol=0, atol=1e-11)
    torch.testing.assert_close(root.reached, valley(root.u, torch.zeros(1)))


def test_it_converges_where_newton_from_the_same_start_does_not() -> None:
    """Rosenbrock's valley as two equations; (1, 1) is the root."""

    def banana(u: Tensor, index: Tensor) -> Tensor:
        return torch.stack([10 * (u[:, 1] - u[:, 0] ** 2), u[:, 0]], 1)

    y = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    start = Guess(torch.tensor([[-1.2, 1.0]], dtype=torch.float64))
    root = LevenbergMarquardt(starts=0).solve(problem_of(banana, y), start)
    torch.testing.assert_close(root.u, torch.ones_like(y), rtol=0, atol=1e-10)


def test_the_jacobian_is_the_derivative_and_costs_a_call_for_every_value() -> None:
    a = noise_like((5, 5), seed=1)
    problem = problem_of(lambda u, index: (u @ a.T).sin(), noise_like((2, 5), seed=2))
    u, search = noise_like((1, 5), seed=3), Search(problem, noise_like((2, 5)))
    row = torch.tensor([1])
    torch.testing.assert_close(jacobian(search, row, u), (u @ a.T).cos().mT * a, rtol=0, atol=1e-6)
    assert search.evaluations.tolist() == [0, 6]


def test_the_secant_maps_the_step_to_the_change_and_changes_nothing_across_it() -> None:
    model, step, change = noise_like((4, 4)), noise_like((4,), seed=1), noise_like((4,), seed=2)
    new = secant(model, step, change)
    torch.testing.assert_close(new @ step, change)
    across = noise_like((4,), seed=3)
    across -= (across @ step) / (step @ step) * step
    torch.testing.assert_close(new @ across, model @ across)
    assert torch.equal(secant(model, 0 * step, change), model)


def test_large_events_and_poor_budgets_are_left_alone() -> None:
    y = noise_like((2, 6))
    root = LevenbergMarquardt(max_values=5).solve(problem_of(valley, y), Guess(y))
    assert root.evaluations.tolist() == [1, 1] and (root.reason == Reason.STALLED).all()
    poor = Problem(valley, y, y.new_full((2,), 1e-12), torch.tensor([8, 30]))
    root = LevenbergMarquardt().solve(poor, Guess(y))
    assert root.evaluations[0] == 1 and 8 < root.evaluations[1] <= 30
    assert root.reason[0] == Reason.BUDGET


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_jacobian_is_of_its_own_sample_whatever_the_size_of_the_batch(count: int) -> None:
    """Six values are seven rows of one sample, with its conditioning; also beside six others, and in parts."""

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return x / (1 + sigma[:, None] ** 2) + torch.sin(x + shift)

    x, shift = 0.8 * noise_like((count, 6), seed=5), torch.linspace(0, 3, count, dtype=torch.float64)[:, None]
    found = ki.invert(denoiser, x, [3.0, 2.0, 1.4], method="levenberg", positive={"shift": shift})
    assert found.converged.all()
    again = found.sample(denoiser)
    assert (rms(again - x) <= found.allowed).all()


def test_a_multistep_run_is_solved_as_a_whole() -> None:
    denoiser, x = ki.denoisers.Gaussian(0.3, 0.7), 0.8 * noise_like((2, 6), seed=5)
    sigmas = ki.schedules.karras(6, 0.1, 10.0)[:-1]
    found = ki.invert(denoiser, x, sigmas, sampler="ipndm", method="levenberg")
    assert found.converged.all()


@pytest.mark.slow
def test_an_image_beside_a_fold_is_inverted() -> None:
    """Every other solver ends at the bottom of the fold, 2e-5 from the image; the root is at 0.03 sigma from there."""
    digits = models.load("digits", dtype=torch.float64)
    x, labels = models.held_out("digits")
    x, given = x[19:20].double(), {"positive": {"label": labels[19:20]}}
    found = ki.invert(digits, x, ki.schedules.karras(11, 0.02, 80.0)[:-1], sampler="heun", **given)
    assert found.converged.all() and found.round_trip_error.item() < 1e-9
