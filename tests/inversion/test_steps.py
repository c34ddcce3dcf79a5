"""One equation per step: the theorem for exact denoisers, and the guesses from the states solved so far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverting import images, problem_of_step, schedule
from problems import noise_like
from torch import Tensor

import kinvert as ki
from kinvert.denoisers import guide
from kinvert.inversion import (
    Auto,
    Guess,
)
from kinvert.inversion.steps import invert_steps, raised


@given(sigma=st.floats(0.3, 8.0), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_point_has_one_preimage(sigma: float, ratio: float, seed: int) -> None:
    """Existence and uniqueness: from two starts far apart, the same solution, of a residual that vanishes."""
    y = sigma * noise_like((2, 6), seed)
    problem = replace(problem_of_step("euler", sigma, ratio * sigma, y), plan=None, denoiser=None)  # no sweeps
    far = y + 5 * sigma * noise_like((2, 6), seed + 1)
    roots = [Auto().solve(problem, Guess(start)) for start in (y, far)]
    for root in roots:
        assert float(root.residual.max()) <= 1e-12
    torch.testing.assert_close(roots[0].u, roots[1].u, rtol=1e-8, atol=1e-8 * sigma / ratio)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "rk4", "res_3s"])
def test_what_the_last_states_tell_is_expected_of_the_next(name: str) -> None:
    """A denoiser that is a polynomial of degree 2 in ln(sigma) is foreseen: each evaluation is made once."""
    coefficients = noise_like((3, 6), seed=3)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return sum((c * sigma.log()[:, None] ** k for k, c in enumerate(coefficients)), torch.zeros_like(x))

    plan, found = ki.compile_plan(name, schedule(8)), None
    for foreseen in (5, 8):  # steps; all of them where an earlier solution is given
        found = invert_steps(
            plan,
            guide(denoiser, batch=4),
            images(4),
            lambda step: torch.full((4,), 1e-9, dtype=torch.float64),
            Auto(),
            torch.full((4,), 10**6),
            found and found.states,
        )
        torch.testing.assert_close(ki.run(plan, denoiser, found.states[0]), images(4), rtol=0, atol=1e-8)
        stages = len(plan.steps[0].stages)
        assert (found.evaluations <= plan.evaluations + (8 - foreseen) * 2 * stages).all()
        assert (found.evaluations >= plan.evaluations).all()


@pytest.mark.parametrize("sigma_next", [0.1, 1.0, 3.9])
def test_the_first_guess_is_the_solution_if_the_denoiser_does_not_depend_on_x(sigma_next: float) -> None:
    """`F(u) = r u + (1 - r) m`; below r = 1/4 the guess goes as far as at 1/4, so that it does not overshoot."""
    m, y = noise_like((2, 6)), noise_like((2, 6), seed=1)
    problem = replace(problem_of_step("euler", 4.0, sigma_next, y), denoiser=None)
    guess = raised(problem, guide(lambda x, sigma: m, batch=2))
    r = max(sigma_next / 4.0, 0.25)
    torch.testing.assert_close(r * guess.u + (1 - r) * m, y, rtol=0, atol=1e-12)
