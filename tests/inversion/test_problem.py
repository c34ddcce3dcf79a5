"""Problems, guesses, and the books of a search."""

from __future__ import annotations

import pytest
import torch
from inverting import MIXTURE, images, problem_of, problem_of_step
from torch import Tensor

import kinvert as ki
from kinvert.inversion import Guess, Reason, Search
from kinvert.tensors import rms


def test_a_problem_of_some_samples() -> None:
    """Rows of everything, and what is left of the budget; the function is told their places in the whole batch."""
    seen: list[list[int]] = []

    def function(u: Tensor, index: Tensor) -> Tensor:
        seen.append(index.tolist())
        return 2 * u

    problem = problem_of(function, images(4))
    index, spent = torch.tensor([3, 1]), torch.tensor([5, 6, 7, 8])
    part = problem.take(index, spent).take(torch.tensor([1]), torch.tensor([0, 1]))
    assert torch.equal(part.value, images(4)[1:2]) and part.budget.tolist() == [10**6 - 7]
    part.call(part.value, torch.tensor([0]))
    assert seen == [[1]]
    guess = Guess(images(4), images(4)[:, None]).take(index)
    assert torch.equal(guess.u, images(4)[index]) and guess.inputs is None
    assert guess.denoised is not None and torch.equal(guess.denoised[:, 0], images(4)[index])


@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4"])
def test_what_the_evaluations_of_a_step_return_on_average(sampler: str) -> None:
    """`F(u) = r u + (1 - r) mean(D)`, solved for the mean."""
    u = 2 * images(3)
    start = problem_of_step(sampler, 2.0, 1.0, u)
    problem = problem_of_step(sampler, 2.0, 1.0, start.function(u, torch.arange(3)))
    mean = problem.denoised(u)
    assert mean is not None
    if sampler == "euler":
        torch.testing.assert_close(mean, MIXTURE(u, torch.full((3,), 2.0, dtype=torch.float64)))
    torch.testing.assert_close(0.5 * u + 0.5 * mean, problem.value)
    assert problem_of(lambda u, index: u, u).denoised(u) is None


def test_a_step_to_zero_has_a_mean_too() -> None:
    """Its couplings do not exist, since it forgets its start; nothing asks for them."""
    problem = problem_of_step("euler", 2.0, 0.0, images(2))
    mean = problem.denoised(images(2))
    assert mean is not None and torch.equal(mean, images(2))


def test_a_search_keeps_the_best_and_counts() -> None:
    problem = problem_of(lambda u, index: u, torch.zeros(3, 2, dtype=torch.float64), 0.5)
    search = Search(problem, torch.ones(3, 2, dtype=torch.float64))
    index = torch.tensor([2, 0])
    u = torch.tensor([[0.1, 0.1], [2.0, 2.0]], dtype=torch.float64)
    f = search.evaluate(u, index)
    assert search.keep(index, u, rms(f)).tolist() == [True, True]
    assert search.evaluations.tolist() == [1, 0, 1] and search.residual.isinf().tolist() == [False, True, False]
    assert search.keep(index[:1], 5 * u[:1], torch.tensor([5.0], dtype=torch.float64)).tolist() == [False]
    assert search.open(search.everyone).tolist() == [0, 1]
    root = search.root()
    assert root.reason.tolist() == [Reason.STALLED, Reason.NOT_FINITE, Reason.CONVERGED]
    assert torch.equal(root.u[2], u[0])


# -- the reasons of an inversion -------------------------------------------------------------------------------------
def sharp(x: Tensor, sigma: Tensor) -> Tensor:
    """Folds the Euler step: its slope changes its sign."""
    return 0.5 * x + 3.0 * torch.sin(x)


def network(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth, and computed in float64."""
    scaled = x.double() / (1 + sigma[:, None].double() ** 2).sqrt()
    return torch.tanh(scaled + scaled.roll(1, 1)).to(x.dtype)


SIGMAS = ki.schedules.karras(6, 0.1, 10.0)[:-1]
each_route = pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "bdia"])
unwarned = pytest.mark.filterwarnings("ignore:(invert|tol=|.* magnifies rounding):RuntimeWarning")


@each_route
def test_what_converged_says_so(sampler: str) -> None:
    found = ki.invert(MIXTURE, images(2), SIGMAS, sampler=sampler)
    assert found.reasons == (Reason.CONVERGED,) * 2


@each_route
@unwarned
def test_a_denoiser_that_fails_is_the_reason(sampler: str) -> None:
    """Of its own sample alone."""

    def broken(x: Tensor, sigma: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad[:, None], torch.nan, MIXTURE(x, sigma))

    found = ki.invert(broken, images(2), SIGMAS, sampler=sampler, positive={"bad": torch.tensor([False, True])})
    assert found.reasons == (Reason.CONVERGED, Reason.NOT_FINITE)


@unwarned
@pytest.mark.parametrize("sampler", ["euler", "bdia"])
def test_a_tolerance_below_rounding_is_the_reason(sampler: str) -> None:
    found = ki.invert(network, images(2).float(), SIGMAS, sampler=sampler, tol=1e-9)
    assert found.reasons == (Reason.PRECISION,) * 2 and float(found.round_trip_error.max()) < 1e-6


@unwarned
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_budget_that_ran_out_is_the_reason(sampler: str) -> None:
    least = 2 * ki.compile_plan(sampler, SIGMAS).evaluations + 5
    for most in (least, 2 * least):
        found = ki.invert(network, images(2), SIGMAS, sampler=sampler, tol=1e-13, max_evals=most)
        assert found.reasons == (Reason.BUDGET,) * 2
    assert ki.invert(network, images(2), SIGMAS, sampler=sampler, tol=1e-11).converged.all()


@unwarned
def test_a_fold_is_the_reason() -> None:
    """Newton's method stalls where F' is singular; continuation goes on. The reason agrees with the derivative there."""
    x = torch.full((1, 1), 2.9, dtype=torch.float64)
    lost = ki.invert(sharp, x, [2.0, 1.0], method="newton")
    slope = 0.5 + 0.5 * (0.5 + 3.0 * torch.cos(lost.latent))
    assert lost.reasons == (Reason.FOLD,) and float(slope.abs()) < 0.05
    assert ki.invert(sharp, x, [2.0, 1.0]).reasons == (Reason.CONVERGED,)


def test_a_published_inversion_is_approximate() -> None:
    found = ki.inversion.baselines.ddim_inversion(MIXTURE, images(2), SIGMAS)
    assert found.reasons == (Reason.APPROXIMATE,) * 2


@unwarned
@pytest.mark.parametrize("max_batch", [None, 1])
def test_reasons_stand_in_the_order_of_the_batch(max_batch: int | None) -> None:
    found = ki.invert(network, images(3), SIGMAS, tol=1e-9, max_evals=60, max_batch=max_batch)
    assert len(found.reasons) == 3
    assert [reason == Reason.CONVERGED for reason in found.reasons] == found.converged.tolist()
