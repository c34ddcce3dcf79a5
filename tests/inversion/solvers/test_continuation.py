"""Continuation: a solution past every fold of a bounded perturbation of the identity."""

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
    Continuation,
    Guess,
    NewtonKrylov,
    Reason,
)


def folded(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`F(u) = u + bounded`: onto, but folded along every coordinate where strength > 1."""
    return lambda u, index: u - strength * torch.sin(u) + 0.1 * torch.cos(u.sum(1, keepdim=True))


@pytest.mark.parametrize("strength", [0.5, 6.0])
def test_continuation_reaches_every_value_of_a_bounded_perturbation(strength: float) -> None:
    """What its theorem says: with or without folds, every sample, from any start; the others stall at folds."""
    y = 3 * noise_like((12, 5), seed=3)
    for start in (y, torch.zeros_like(y)):
        root = Continuation().solve(problem_of(folded(strength), y), Guess(start))
        assert float(root.residual.max()) <= 1e-12
        index = torch.arange(len(y))
        torch.testing.assert_close(folded(strength)(root.u, index), y, rtol=0, atol=1e-10)
    if strength > 1:
        for other in (NewtonKrylov(max_iterations=100), Anderson(max_iterations=100)):
            assert float(other.solve(problem_of(folded(strength), y), Guess(y)).residual.max()) > 1e-3


def test_a_limit_that_is_too_small_is_the_reason() -> None:
    y = 3 * noise_like((3, 5), seed=3)
    for limit in range(1, 10):
        problem = replace(problem_of(folded(6.0), y), budget=torch.full((3,), limit))
        root = Continuation().solve(problem, Guess(y))
        assert (root.evaluations <= limit).all() and (root.reason == Reason.BUDGET).all()
