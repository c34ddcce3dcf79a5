"""Networks that answer roughly: the noise is recognised, costs little, and is what the verdict names."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from inverting import MIXTURE, images, schedule
from torch import Tensor

import kinvert as ki
from kinvert import models
from kinvert.inversion.noise_floor import is_confirmed, is_noise, measure_noise, small_steps
from kinvert.inversion.problem import Problem, Reason, Search
from kinvert.tensors import rms

HALVES = [torch.float16, torch.bfloat16]


@functools.cache
def network() -> models.EmbeddedDenoiser:
    return models.load("digits")


def rounded(dtype: torch.dtype) -> ki.Denoiser:
    return lambda x, sigma, **c: network()(x, sigma, **c).to(dtype).float()


def by_batch_size(x: Tensor, sigma: Tensor, **c: Any) -> Tensor:
    """Answers that depend on the number of rows, by 1e-4."""
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(len(x)))
    return network()(x, sigma, **c) + 1e-4 * noise


def inverted(denoiser: ki.Denoiser, sampler: str, dtype: torch.dtype = torch.float32) -> ki.Inversion:
    x, labels = models.held_out("digits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return ki.invert(
            denoiser, x[:4].to(dtype), ki.schedules.karras(21, 0.02, 80.0)[:-1], sampler=sampler,
            positive={"label": labels[:4]},
        )  # fmt: skip


def twice(sampler: str) -> int:
    """The evaluations of a run up and one down: the plain run, which is tried on what is not solved."""
    return 2 * ki.compile_plan(sampler, ki.schedules.karras(21, 0.02, 80.0)[:-1]).evaluations


def cost(found: ki.Inversion) -> float:
    """Median evaluations on the way to the latent."""
    assert found.row_checks is not None
    return float((found.evaluations - found.checking - found.row_checks).double().median())


MULTISTEP = pytest.param("dpmpp_2m", marks=pytest.mark.slow)  # a whole run at once: a third of the time of this file


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sampler", ["euler", "heun", MULTISTEP])
def test_rounded_networks_cost_little_and_are_told(sampler: str, dtype: torch.dtype) -> None:
    """At most half as much again as the exact network, beside the plain run; and an error of a few roundings."""
    exact, found = inverted(network(), sampler), inverted(rounded(dtype), sampler)
    assert exact.converged.all() and not found.converged.any()
    assert set(found.reasons) == {Reason.PRECISION}
    assert cost(found) <= 1.5 * cost(exact) + twice(sampler)
    assert float(found.round_trip_error.median()) <= 1.5 * torch.finfo(dtype).eps
    assert "own noise" in found.warnings[0]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_networks_that_depend_on_the_batch_size_are_inverted(sampler: str) -> None:
    """The steps are solved again with the batch that the sampler will see."""
    assert inverted(by_batch_size, sampler).converged.all()


@pytest.mark.parametrize("sampler", ["euler", MULTISTEP])
def test_wide_images_of_a_narrow_network_are_as_good_as_narrow_ones(sampler: str) -> None:
    def narrow(x: Tensor, sigma: Tensor, **c: Any) -> Tensor:
        return network()(x.float(), sigma.float(), **c).to(x.dtype)

    wide, same = inverted(narrow, sampler, torch.float64), inverted(network(), sampler)
    assert set(wide.reasons) == {Reason.PRECISION}
    assert float(wide.round_trip_error.max()) <= float(same.round_trip_error.max())
    assert cost(wide) <= 2 * cost(same) + twice(sampler)


def search_at(function: Any, u: Tensor) -> Search:
    """A search for the root of F = function whose best iterate is u, with y a little off F(u)."""
    value = function(u, None) + 1e-3
    search = Search(Problem(function, value, value.new_full((len(u),), 1e-9), torch.full((len(u),), 100)), u)
    search.residual = rms(value - function(u, None))
    return search


def test_noise_is_told_from_shape() -> None:
    """Rounding and randomness leave a second difference; a smooth function and a fold do not."""
    u = torch.linspace(0.1, 1.0, 64, dtype=torch.float64).repeat(2, 1)
    generator = torch.Generator().manual_seed(0)
    smooth = {
        "linear": lambda u, index: 0.5 * u,
        "fold": lambda u, index: u - 0.5 * u**2,
        "sine": lambda u, index: torch.sin(3 * u),
    }
    bent = {"bends": lambda u, index: u + 0.002 * torch.sin(400 * u)}  # suspected, and cleared by a longer step
    rough = {
        "half": lambda u, index: (0.5 * u).half().double(),
        "random": lambda u, index: u + 1e-3 * torch.randn(u.shape, generator=generator, dtype=u.dtype),
    }
    for function in smooth.values():
        search = search_at(function, u)
        assert torch.equal(measure_noise(search, search.everyone), torch.zeros(2, dtype=u.dtype))
        assert search.evaluations.tolist() == [3, 3]
    for function in bent.values():
        search = search_at(function, u)
        assert torch.equal(measure_noise(search, search.everyone), torch.zeros(2, dtype=u.dtype))
        assert search.evaluations.tolist() == [5, 5]
    for function in rough.values():
        search = search_at(function, u)
        assert torch.equal(measure_noise(search, search.everyone), search.residual)
        assert search.evaluations.tolist() == [5, 5]


def test_noise_must_explain_the_residual() -> None:
    one = torch.ones(())
    assert is_noise(one, one, 10 * one) and not is_noise(one, one, 50 * one) and is_noise(one, one, 50 * one, gain=10.0)
    assert not is_noise(0.01 * one, one, 0.01 * one)
    assert is_confirmed(one, 2 * one) and not is_confirmed(one, 16 * one)


def test_steps_have_their_length_and_are_alike() -> None:
    e = small_steps(torch.zeros(3, 2, 5), torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(rms(e), torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(e[1], 2 * e[0])


def test_exact_denoisers_are_not_called_rough() -> None:
    """A fold is a fold: the search ends there for another reason."""

    def folded(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x + 3.0 * torch.sin(x)

    with pytest.warns(RuntimeWarning, match="not inverted"):
        found = ki.invert(folded, images(4), schedule(6), method="newton")
    assert Reason.PRECISION not in found.reasons
    assert ki.invert(MIXTURE, images(4), schedule(6)).converged.all()
