"""Over every root finder: nothing that it is given is written to, every evaluation is counted, and the end has a reason."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from inverting import MIXTURE, guess_of_run, images, problem_of, problem_of_step, schedule, task_of
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.inversion import METHODS, Anderson, Auto, Guess, Problem, Reason, Root, Solver

SOLVERS = {**{name: make() for name, make in METHODS.items()}, "Auto": Auto(), "check_every": Anderson(check_every=3)}
solvers = pytest.mark.parametrize("name", SOLVERS)


def asked(solver: Solver, denoiser: Any, sampler: str = "euler", count: int = 4) -> tuple[Problem, Guess]:
    """A run or a step that ends at images of different sizes, and a guess."""
    y = images(count) * torch.logspace(-1, 0.5, count, dtype=torch.float64)[:, None]
    if solver.scope == "run":
        plan = ki.compile_plan(sampler, schedule(8))
        return task_of(plan, y, 1e-9, denoiser, limit=10**4).problem, guess_of_run(plan, y)
    problem = problem_of_step(sampler, 2.0, 1.0, y, denoiser, tolerance=1e-9)
    return problem, Guess(1.5 * y, y[:, None].repeat_interleave(problem.cost, 1))


def tensors(problem: Problem, guess: Guess) -> list[Tensor]:
    judge = problem.judge
    of_judge = () if judge is None else (judge.size, judge.share, judge.enough)
    given = (problem.value, problem.tolerance, problem.budget, *of_judge, guess.u, guess.denoised)
    return [tensor for tensor in given if tensor is not None]


@solvers
def test_problems_and_guesses_are_never_written_to(name: str) -> None:
    """Neither their tensors (values and versions) nor their fields."""
    problem, guess = asked(SOLVERS[name], MIXTURE)
    given, fields = tensors(problem, guess), dict(vars(problem))
    before = [(tensor.clone(), tensor._version) for tensor in given]
    root = SOLVERS[name].solve(problem, guess)
    assert (root.reason == Reason.CONVERGED).all()
    for tensor, (values, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version
    assert all(vars(problem)[key] is value for key, value in fields.items())
    assert set(vars(problem)) <= {*fields, "couplings"}  # which are remembered
    with pytest.raises(FrozenInstanceError):
        problem.budget = problem.value  # type: ignore[misc]


@solvers
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("budget", [None, 17])
def test_every_evaluation_of_the_denoiser_is_counted(name: str, sampler: str, budget: int | None) -> None:
    rows = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x.unique(dim=0))  # a batch is filled up with copies, which nobody is charged for
        return MIXTURE(x, sigma)

    solver = SOLVERS[name]
    problem, guess = asked(solver, counting, sampler)
    if budget is not None:
        problem = replace(problem, budget=torch.full_like(problem.budget, budget * len(problem.plan.steps)))  # type: ignore[union-attr]
    root = solver.solve(problem, guess)
    assert rows == int(root.evaluations.sum())
    assert (root.evaluations <= problem.budget).all()


@solvers
def test_a_root_is_what_it_says(name: str) -> None:
    """Its residual is that of u, its D that at u, its F(u) the function's."""
    problem, guess = asked(SOLVERS[name], MIXTURE)
    root, everyone = SOLVERS[name].solve(problem, guess), torch.arange(4)
    reached = problem.function(root.u, everyone)
    missed = (reached - problem.value).square().mean(1).sqrt()
    assert (missed <= 5 * problem.tolerance).all()  # that of sweeps is an estimate
    assert (root.residual <= problem.tolerance).all()
    if root.reached is not None:
        torch.testing.assert_close(root.reached, reached, rtol=0, atol=1e-12)
    if root.denoised is not None:
        at = MIXTURE(root.u, torch.full((4,), 2.0, dtype=torch.float64))
        torch.testing.assert_close(root.denoised, at, rtol=0, atol=1e-6)


def reason_of(solver: Solver, problem: Problem, guess: Guess) -> set[Reason]:
    root: Root = solver.solve(problem, guess)
    return {Reason(int(code)) for code in root.reason}


@solvers
def test_reasons(name: str) -> None:
    """The budget, a denoiser that fails, and nothing left to do."""
    solver = SOLVERS[name]
    problem, guess = asked(solver, MIXTURE)
    assert reason_of(solver, problem, guess) == {Reason.CONVERGED}
    few = replace(problem, budget=torch.full_like(problem.budget, 2 * problem.cost))
    assert reason_of(solver, few, guess) == {Reason.BUDGET}
    broken, guess = asked(solver, lambda x, sigma: torch.full_like(x, torch.nan))
    assert reason_of(solver, broken, guess) == {Reason.NOT_FINITE}


def test_a_solver_that_gives_up_has_stalled() -> None:
    y = 3 * noise_like((4, 5), seed=3)
    problem = problem_of(lambda u, index: u - 6 * torch.sin(u), y)
    for solver in (ki.inversion.NewtonKrylov(), Anderson(max_iterations=20)):
        root = solver.solve(problem, Guess(y))
        assert (root.reason[root.residual > 1e-12] == Reason.STALLED).all() and (root.residual > 1e-12).any()


def test_sweeps_need_a_plan() -> None:
    """A function alone cannot be swept, and the message says what is missing."""
    for make in (ki.inversion.Sweeps, ki.inversion.StepSweeps):
        with pytest.raises(ValueError, match="needs a problem that tells its Plan and its denoiser"):
            make().solve(problem_of(lambda u, index: u, images()), Guess(images()))
    with pytest.raises(ValueError, match="does not tell the Plan"):
        _ = problem_of(lambda u, index: u, images()).couplings
