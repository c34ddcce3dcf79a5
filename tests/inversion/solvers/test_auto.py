"""Sequences of solvers, and `Auto`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from inverting import problem_of
from problems import noise_like
from torch import Tensor

from kinvert.inversion import (
    Anderson,
    Attempt,
    Auto,
    Continuation,
    Guess,
    NewtonKrylov,
    Problem,
    Reason,
    Root,
    Sequence,
    Solver,
)
from kinvert.inversion.problem import Search


def folded(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`F(u) = u + bounded`: onto, but folded along every coordinate where strength > 1."""
    return lambda u, index: u - strength * torch.sin(u) + 0.1 * torch.cos(u.sum(1, keepdim=True))


def test_a_folded_sample_leaves_its_neighbours_alone() -> None:
    y = 3 * noise_like((4, 5), seed=3)
    together = Auto().solve(problem_of(folded(6.0), y), Guess(y))
    for i in range(4):
        alone = Auto().solve(problem_of(folded(6.0), y[i : i + 1]), Guess(y[i : i + 1]))
        torch.testing.assert_close(alone.u[0], together.u[i], rtol=1e-8, atol=1e-8)


def test_a_sequence_goes_on_where_the_last_solver_ended() -> None:
    """Solved samples cost nothing more, and the budget that one solver leaves is the next one's."""
    y, rows = noise_like((3, 5), seed=3), [0]

    def function(u: Tensor, index: Tensor) -> Tensor:
        rows[0] += len(index)
        return u + 0.1 * torch.sin(u)

    weak, strong = Attempt(Anderson(max_iterations=2)), Attempt(NewtonKrylov())
    problem = problem_of(function, y)
    root = Sequence((weak, strong, strong)).solve(problem, Guess(y))
    assert (root.residual <= 1e-12).all() and rows[0] == int(root.evaluations.sum())
    from_guess = Sequence((weak, Attempt(NewtonKrylov(), "value"))).solve(problem, Guess(y))
    assert (from_guess.evaluations >= root.evaluations).all()


def test_a_budget_too_small_for_a_step_is_the_reason() -> None:
    """One call is left, which is not enough for Newton's method: that is no stall."""
    problem = replace(problem_of(folded(6.0), 3 * noise_like((2, 5), seed=3)), budget=torch.full((2,), 2))
    for solver in (NewtonKrylov(), Sequence((Attempt(NewtonKrylov()),)), Continuation()):
        root = solver.solve(problem, Guess(problem.value))
        assert (root.reason == Reason.BUDGET).all() and (root.evaluations <= 2).all()


def test_a_solver_that_does_not_end_leaves_a_part_of_the_limit() -> None:
    left: list[int] = []

    class Spending(Solver):
        def solve(self, problem: Problem, guess: Guess) -> Root:
            search = Search(problem, guess.u)
            left.append(int(problem.budget))
            for _ in range(left[-1]):
                search.evaluate(guess.u, search.everyone)
            return search.root()

    problem = replace(problem_of(folded(6.0), 3 * noise_like((1, 5), seed=3)), budget=torch.tensor([100]))
    attempts = (Attempt(Spending(), keeps=3), Attempt(Spending(), keeps=3), Attempt(Spending()))
    root = Sequence(attempts).solve(problem, Guess(problem.value))
    assert left == [67, 20, 10] and int(root.evaluations) == 100  # the question whether it is noise takes 3 of the 33


@pytest.mark.parametrize("values", [4096, 4097])
def test_auto_keeps_a_part_for_the_last_resort_of_small_events(values: int) -> None:
    attempts = Auto().sequence(problem_of(lambda u, index: u, torch.zeros(1, values))).attempts
    assert [attempt.keeps for attempt in attempts[-3:]] == ([3, 2, None] if values == 4096 else [None] * 3)
    assert any(attempt.solver == Auto().last for attempt in attempts) == (values == 4096)
