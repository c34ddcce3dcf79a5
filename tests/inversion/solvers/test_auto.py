"""Sequences of solvers, and `Auto`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from inverting import problem_of
from problems import noise_like
from torch import Tensor

from kinvert.inversion import (
    Auto,
    Guess,
)


def folded(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`F(u) = u + bounded`: onto, but folded along every coordinate where strength > 1."""
    return lambda u, index: u - strength * torch.sin(u) + 0.1 * torch.cos(u.sum(1, keepdim=True))


def test_a_folded_sample_leaves_its_neighbours_alone() -> None:
    y = 3 * noise_like((4, 5), seed=3)
    together = Auto().solve(problem_of(folded(6.0), y), Guess(y))
    for i in range(4):
        alone = Auto().solve(problem_of(folded(6.0), y[i : i + 1]), Guess(y[i : i + 1]))
        torch.testing.assert_close(alone.u[0], together.u[i], rtol=1e-8, atol=1e-8)
