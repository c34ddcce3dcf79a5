"""The battery: laws that every registered root finder obeys. A new one is tested by being registered."""

from __future__ import annotations

import pytest
import torch
from inverting import task_of
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide
from kinvert.inversion import METHODS, Guess, Problem, Reason, Solver, register_method
from kinvert.inversion.routes import ROUTES, choose
from kinvert.inversion.steps import levels_of, step_problem
from kinvert.inversion.task import UNLIMITED
from kinvert.tensors import rms

GAUSSIAN, MIXTURE = ki.denoisers.Gaussian(0.3, 0.7), mixture()
SIGMAS = ki.schedules.karras(9, 0.1, 10.0)[:-1]

methods = pytest.mark.parametrize("method", list(METHODS))


def images(count: int = 3) -> Tensor:
    return 0.8 * noise_like((count, 6), seed=5)


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_problems_are_solved_and_the_certificate_is_honest(method: str, dtype: torch.dtype) -> None:
    """For Gaussian data a step is linear. What sampling makes of the latent decides what is called converged."""
    x = images().to(dtype)
    found = ki.invert(GAUSSIAN, x, SIGMAS, method=method)
    assert found.converged.all() and found.reasons == (Reason.CONVERGED,) * 3
    assert found.latent.dtype == dtype and found.latent.shape == x.shape
    again = rms(found.sample(GAUSSIAN) - x)
    torch.testing.assert_close(again, found.round_trip_error, rtol=1e-3, atol=10 * torch.finfo(dtype).eps)
    assert (again <= found.allowed).all()


@methods
def test_every_evaluation_is_counted(method: str) -> None:
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MIXTURE(x, sigma)

    found = ki.invert(counting, images(1), SIGMAS, method=method)
    assert rows == int(found.evaluations.sum())


@methods
@pytest.mark.filterwarnings("ignore:invert:RuntimeWarning")
@pytest.mark.parametrize("most", [40, 100])
def test_a_limit_is_kept_and_says_so(method: str, most: int) -> None:
    found = ki.invert(MIXTURE, images(), SIGMAS, method=method, max_evals=most)
    assert (found.evaluations <= most).all()
    assert [reason == Reason.CONVERGED for reason in found.reasons] == found.converged.tolist()


@methods
@pytest.mark.filterwarnings("ignore:invert:RuntimeWarning")
def test_a_sample_does_not_depend_on_its_neighbours(method: str) -> None:
    x = torch.cat([images(2), 3 * images(1)])
    together, alone = (ki.invert(MIXTURE, part, SIGMAS, method=method) for part in (x, x[1:2]))
    size = float(alone.latent.abs().max())
    torch.testing.assert_close(together.latent[1:2], alone.latent, rtol=0, atol=1e-6 * size)


def problem_for(solver: Solver, y: Tensor, budget: int) -> Problem:
    """A step, or a run, that ends at y."""
    plan, denoiser = ki.compile_plan("euler", SIGMAS), guide(MIXTURE, batch=len(y))
    if solver.scope == "run":
        return task_of(plan, y, 1e-9, limit=budget).problem
    step, tolerance = plan.steps[4], y.new_full((len(y),), 1e-9)
    return step_problem(plan, step, denoiser, y, levels_of(plan, y)[4], tolerance, torch.full((len(y),), budget))


@methods
@pytest.mark.parametrize("budget", [0, 10, UNLIMITED], ids=["no budget", "little budget", "unlimited"])
def test_a_solver_is_pure_and_honest(method: str, budget: int) -> None:
    """It writes to nothing that it is given, spends no more than it may, and says what it reached."""
    solver, y = choose(method, ki.compile_plan("euler", SIGMAS))[1], images()
    problem = problem_for(solver, y, budget)
    guess = Guess(y.clone(), y[:, None].repeat(1, problem.cost, 1))
    first, second = (solver.solve(problem, guess) for _ in range(2))
    assert torch.equal(y, images()) and torch.equal(guess.u, y) and (problem.budget == budget).all()
    assert torch.equal(first.u, second.u) and torch.equal(first.evaluations, second.evaluations)
    assert first.u.shape == y.shape and first.residual.shape == first.evaluations.shape == first.reason.shape == (3,)
    assert (first.evaluations <= max(budget, 2 * problem.cost)).all()  # at the least a start and its check
    if budget == UNLIMITED:
        missed = rms(problem.function(first.u, torch.arange(3)) - problem.value)
        assert (first.residual <= problem.tolerance).all() and (missed <= 2 * problem.tolerance).all()
        assert (first.reason == Reason.CONVERGED).all()


def test_a_registered_root_finder_is_a_method_of_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = next(route for route in ROUTES if route.scope == "step")
    monkeypatch.setattr(type(steps), "methods", dict(steps.methods))
    monkeypatch.setitem(METHODS, "gentle", None)
    del METHODS["gentle"]
    make = register_method("gentle")(lambda: ki.inversion.Damped(tau=0.5))
    assert ki.invert(GAUSSIAN, images(), SIGMAS, method="gentle").converged.all()
    with pytest.raises(
        ValueError, match="method must be 'auto', 'sweeps', 'levenberg' or a Solver of runs for dpmpp_2m, got 'gentle'"
    ):
        ki.invert(GAUSSIAN, images(), SIGMAS, sampler="dpmpp_2m", method="gentle")
    with pytest.raises(ValueError, match="the method name 'gentle' is taken"):
        register_method("gentle")(make)
