"""The reference solution of the probability-flow ODE against closed forms, itself, and an independent integrator."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mixture, noise_like
from torch import Tensor

import kinvert as ki
from kinvert.models import held_out, load
from kinvert.reference import solve_ode, split_error

MIXTURE = mixture()
STD = torch.tensor([0.5, 1.0, 0.01, 3.0], dtype=torch.float64)
GAUSSIAN = ki.denoisers.Gaussian(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), STD)


def worst(x: Tensor) -> float:
    return float(x.abs().max())


# -- accuracy ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "ends", [(0.01, 80.0), (80.0, 0.01), (1.0, 2.0), (2.0, 1.0), (1e-3, 1e3), (1e3, 1e-3)], ids=str
)
def test_gaussian_closed_form(ends: tuple[float, float]) -> None:
    x = 0.3 + math.hypot(1.0, ends[0]) * noise_like((4, 4))
    exact = GAUSSIAN.ode(x, *ends)
    assert worst(solve_ode(GAUSSIAN, x, *ends) - exact) < 1e-9 * worst(exact)


@given(st.floats(-5, 5), st.floats(0.01, 5), st.floats(0.01, 80), st.floats(0.01, 80), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_any_gaussian(mean: float, std: float, a: float, b: float, seed: int) -> None:
    """Errors are relative to x, mean included, and the ODE spreads them on its way up by `spread`."""
    denoise = ki.denoisers.Gaussian(mean, std)
    x = mean + math.hypot(std, a) * noise_like((2, 3), seed)
    exact, spread = denoise.ode(x, a, b), math.hypot(std, b) / math.hypot(std, a)
    error = worst(solve_ode(denoise, x, a, b, rtol=1e-12, atol=1e-14) - exact)
    assert error < 1e-10 * max(1.0, spread) * max(1.0, worst(x))


@pytest.mark.parametrize("ends", [(1 / 64, 1.0), (0.01, 80.0), (80.0, 0.01), (1.0, 1.001), (3.0, 1.0)], ids=str)
def test_the_denoiser_is_asked_between_the_ends_only(ends: tuple[float, float]) -> None:
    """The first step that scipy before 1.14 chose for itself was tried at e^1019."""
    wide, seen = ki.denoisers.Gaussian(0.0, 5.0), list[float]()

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return wide(x, sigma)

    x = 5 * noise_like((1, 3))
    assert worst(solve_ode(watched, x, *ends, rtol=1e-12, atol=1e-14) - wide.ode(x, *ends)) < 1e-10
    assert min(ends) * (1 - 1e-12) <= min(seen) and max(seen) <= max(ends) * (1 + 1e-12)


def test_mixture_there_and_back() -> None:
    x = 10 * noise_like((8, 6), seed=3)
    data = solve_ode(MIXTURE, x, 10, 0.1)
    assert worst(solve_ode(MIXTURE, data, 0.1, 10) - x) < 1e-8
    up = solve_ode(MIXTURE, data, 0.1, 80)
    assert worst(solve_ode(MIXTURE, up, 80, 0.1) - data) < 1e-8


def test_agrees_with_two_thousand_steps_of_dormand_prince() -> None:
    """Another formula, with fixed steps in sigma: a geometric grid from 10 to 0.1."""
    x = 10 * noise_like((8, 6), seed=3)
    steps = ki.run(ki.compile_plan("dormand_prince", torch.logspace(1, -1, 2001, dtype=torch.float64)), MIXTURE, x)
    assert worst(solve_ode(MIXTURE, x, 10, 0.1) - steps) < 1e-9
    assert worst(solve_ode(MIXTURE, x, 10, 0.1, rtol=1e-13, atol=1e-15) - steps) < 1e-11


def test_tolerance_decides() -> None:
    x = 10 * noise_like((4, 6), seed=3)
    exact = solve_ode(MIXTURE, x, 10, 0.1, rtol=1e-13, atol=1e-15)
    errors = [worst(solve_ode(MIXTURE, x, 10, 0.1, rtol=rtol) - exact) for rtol in (1e-4, 1e-7, 1e-10)]
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]


def test_samplers_converge_to_it() -> None:
    x = 10 * noise_like((4, 6), seed=3)
    exact = solve_ode(MIXTURE, x, 10, 0.1)
    errors = [
        worst(ki.sample(MIXTURE, x, ki.schedules.karras(n, 0.1, 10)[:-1], sampler="heun") - exact) for n in (40, 160)
    ]
    assert errors[1] < errors[0] / 12


def test_paths_compose() -> None:
    x = 10 * noise_like((3, 6), seed=4)
    middle = solve_ode(MIXTURE, x, 10, 1)
    torch.testing.assert_close(solve_ode(MIXTURE, middle, 1, 0.1), solve_ode(MIXTURE, x, 10, 0.1), rtol=1e-9, atol=1e-9)
    assert torch.equal(solve_ode(MIXTURE, x, 10, 10), x)


# -- contract ----------------------------------------------------------------------------------------------------------
def test_samples_do_not_see_their_neighbours() -> None:
    x = noise_like((3, 6))
    x[2] *= 1e3
    together = solve_ode(MIXTURE, x, 1, 10)
    assert torch.equal(together[1:2], solve_ode(MIXTURE, x[1:2], 1, 10))


def test_the_denoiser_gets_one_sample_in_float64() -> None:
    def check(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.shape == (1, 2, 3) and x.dtype == torch.float64
        assert sigma.shape == (1,) and sigma.dtype == torch.float64
        return 0.5 * x.mul_(1.0)  # may work in place

    x = noise_like((2, 2, 3)).float()
    kept = x.clone()
    out = solve_ode(check, x, 1.0, 4.0)
    assert out.dtype == torch.float64 and out.shape == x.shape and torch.equal(x, kept)
    torch.testing.assert_close(out, 2.0 * x.double(), rtol=1e-9, atol=1e-9)  # dx/du = x/2


def test_guidance_and_conditioning_by_sample() -> None:
    """Trained network, labels, guidance 2: each sample has its own label."""
    model = load("digits", dtype=torch.float64)
    images, labels = (t[::20] for t in held_out("digits"))
    shared: dict[str, Any] = dict(cfg=2.0, positive={"label": labels}, negative={}, rtol=1e-6, atol=1e-6)
    up = solve_ode(model, images, 0.5, 5.0, **shared)
    shared["positive"] = {"label": labels[1:]}
    torch.testing.assert_close(solve_ode(model, images[1:], 0.5, 5.0, **shared), up[1:])
    shared["positive"] = {"label": labels[:1]}
    assert worst(solve_ode(model, images[1:], 0.5, 5.0, **shared) - up[1:]) > 1e-2


def test_no_dimensions_besides_the_batch() -> None:
    denoise = ki.denoisers.Gaussian(0.0, 1.0)
    x = noise_like((3,))
    torch.testing.assert_close(solve_ode(denoise, x, 1.0, 2.0), denoise.ode(x, 1.0, 2.0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=1.0), TypeError, "x must be a tensor"),
        (dict(x=torch.full((2, 6), torch.inf)), ValueError, "x has 12 NaN or infinite values"),
        (dict(sigma_from=0.0), ValueError, "sigma_from must be positive and finite, got 0.0; .*singular at 0"),
        (dict(sigma_to=0), ValueError, "sigma_to must be positive and finite, got 0; .*last positive level"),
        (dict(sigma_to=-1.0), ValueError, "sigma_to must be positive"),
        (dict(sigma_to=math.inf), ValueError, "sigma_to must be positive and finite, got inf"),
        (dict(sigma_to=math.nan), ValueError, "sigma_to must be positive and finite, got nan"),
        (dict(sigma_to=torch.tensor(1.0)), TypeError, "sigma_to must be a number"),
        (dict(rtol=1e-15), ValueError, "rtol must be .* got 1e-15; pass at least 1e-13"),
        (dict(atol=0.0), ValueError, "atol must be positive"),
        (dict(max_evals=True), TypeError, "max_evals must be a number"),
        (dict(max_evals=50), ValueError, "sample 0: max_evals are spent at sigma"),
        (dict(cfg=3.0), ValueError, "negative= is missing"),
        (dict(denoiser=None), TypeError, "denoiser must be callable"),
        (dict(denoiser=lambda x, s: x[:, 1:]), ValueError, "must return the shape of its input"),
        (dict(denoiser=lambda x, s: MIXTURE(x, s).float()), TypeError, "must return float64 .* got torch.float32"),
        (
            dict(denoiser=lambda x, s: MIXTURE(x, s) / (s > 2.0)),
            ValueError,
            "sample 0: the denoiser returned NaN or infinity at sigma 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(denoiser=MIXTURE, x=noise_like((2, 6)), sigma_from=10.0, sigma_to=0.1) | change
    with pytest.raises(error, match=message):
        solve_ode(**arguments)


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_no_more_evaluations_are_made_than_are_allowed(limit: int) -> None:
    calls = itertools.count()

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        next(calls)
        return MIXTURE(x, sigma)

    with pytest.raises(ValueError, match="max_evals are spent"):
        solve_ode(counted, noise_like((1, 6)), 10.0, 0.1, max_evals=limit)
    assert next(calls) == limit


def test_a_jump_is_found_out_or_passed() -> None:
    """A denoiser that rounds sigma to levels has jumps: the result is approximate, or an error says why there is none."""

    def rounded(x: Tensor, sigma: Tensor) -> Tensor:
        return MIXTURE(x, torch.exp(torch.round(sigma.log() * 20) / 20))

    x = noise_like((1, 6))
    with pytest.raises(ValueError, match=r"max_evals are spent.*is the denoiser smooth there|denoiser jumps there"):
        solve_ode(rounded, x, 1.0, 10.0, max_evals=2000)


# -- the error of a latent ---------------------------------------------------------------------------------------------
def split(steps: int, dtype: torch.dtype = torch.float64, sampler: str = "euler") -> Any:
    sigmas = ki.schedules.karras(steps, 0.1, 10)[:-1]
    image = MIXTURE.sample(4, torch.Generator().manual_seed(0)).to(dtype)

    def find(x: Tensor) -> Tensor:
        return ki.unsample(MIXTURE, x, sigmas, sampler=sampler, sigma_offset=0.0)

    return split_error(find, MIXTURE, image, sigmas, sampler=sampler)


def test_split_of_unsampling() -> None:
    """Euler upwards is as wrong as Euler downwards, the other way: the solver's error is twice the discretisation's."""
    few, many = split(10), split(20)
    assert few.converged.all() and few.total.shape == (4,)
    for part in (few, many):
        assert (part.total <= part.round_off + part.solver + part.discretisation).all() and (part.round_off == 0).all()
        assert ((part.solver / part.discretisation - 2).abs() < 0.4).all()
    assert ((few.discretisation / many.discretisation - 2).abs() < 0.5).all()  # order 1
    assert "exact inverse found for 4" in str(few) and "discretisation" in str(few)


def test_split_has_round_off_in_float32() -> None:
    part = split(10, torch.float32)
    assert (part.round_off > 1e-8).all() and (part.round_off < 1e-4).all()
    torch.testing.assert_close(part.solver, split(10).solver, rtol=1e-5, atol=0)


def test_split_of_an_order_two_sampler_is_smaller() -> None:
    assert (split(20, sampler="heun").discretisation < 0.2 * split(20).discretisation).all()


def test_split_refuses_a_latent_of_another_shape() -> None:
    sigmas = [10.0, 5.0, 1.0]
    with pytest.raises(ValueError, match=r"find must return a latent of image's shape \(2, 6\), got \(1, 6\)"):
        split_error(lambda x: x[:1], MIXTURE, noise_like((2, 6)), sigmas)
