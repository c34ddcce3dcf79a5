"""Fixed-point iterations: plain, damped, accelerated."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverting import MIXTURE, problem_of_step
from problems import noise_like

from kinvert.inversion import (
    Anderson,
    Guess,
)


@given(sigma=st.floats(0.3, 8.0), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_damped_iteration_converges_below_the_bound(sigma: float, ratio: float, seed: int) -> None:
    """tau < 2 / (r + (1 - r) lmax(D')): here lmax is bounded by the covariance of the data over sigma^2."""
    r = ratio
    spread = torch.cdist(MIXTURE.means, MIXTURE.means).max() ** 2 / 4 + MIXTURE.std.max() ** 2
    tau = 1.0 / (r + (1 - r) * float(spread) / sigma**2)
    y = sigma * noise_like((1, 6), seed)
    iterations = math.ceil(40 / (tau * r))  # the slowest direction contracts by at least 1 - tau r
    problem = problem_of_step("euler", sigma, ratio * sigma, y, tolerance=1e-9)
    root = Anderson(window=0, tau=tau, max_iterations=iterations, growth=math.inf).solve(problem, Guess(y))
    assert float(root.residual.max()) <= 1e-9
