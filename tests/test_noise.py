"""Noise sources: reproducible, per sample, of unit variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kinvert as ki

X = torch.zeros(4, 3, 5, dtype=torch.float32)


def test_white_is_standard_normal_and_independent() -> None:
    draw = ki.noise.white(0).bind(torch.zeros(200, 1000))
    a, b = draw(2.0, 1.0), draw(2.0, 1.0)
    n = a.numel()
    assert abs(float(a.mean())) < 5 / n**0.5
    assert abs(float(a.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((a * b).mean())) < 5 / n**0.5


def test_white_starts_again_for_every_run() -> None:
    source = ki.noise.white(3)
    first, second = source.bind(X), source.bind(X)
    assert torch.equal(first(2.0, 1.0), second(5.0, 4.0))
    assert torch.equal(first(1.0, 0.5), second(4.0, 3.0))
    assert source == ki.noise.white(3) and hash(source) == hash(ki.noise.white(3))


@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian])
def test_a_seed_per_sample_is_independent_of_the_batch(source: Callable[..., ki.noise.NoiseSource]) -> None:
    whole, alone = source([5, 6, 7, 8]).bind(X), source([7]).bind(X[:1])
    assert torch.equal(whole(1, 0)[2:3], alone(1, 0))
    assert torch.equal(whole(1, 0)[2:3], alone(1, 0))


@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian])
def test_no_seed_follows_the_global_generator(source: Callable[..., ki.noise.NoiseSource]) -> None:
    torch.manual_seed(1)
    a = source().bind(X)(1, 0)
    torch.manual_seed(1)
    assert torch.equal(a, source().bind(X)(1, 0))
    assert not torch.equal(a, source().bind(X)(1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_noise_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    assert ki.noise.white(0).bind(X.to(dtype))(1, 0).dtype == dtype
    assert ki.noise.brownian(0).bind(X.to(dtype))(1, 0).dtype == dtype
    assert ki.noise.replay([torch.ones(4, 3, 5).double()]).bind(X.to(dtype))(1, 0).dtype == dtype


def test_replay_runs_out_with_a_count() -> None:
    draw = ki.noise.replay([X, X + 1]).bind(X)
    assert torch.equal(draw(3, 2), X)
    assert torch.equal(draw(2, 1), X + 1)
    with pytest.raises(ValueError, match=r"ran out of noise at the interval 1 -> 0.5: it holds 2 tensors"):
        draw(1, 0.5)


@pytest.mark.parametrize("seed", ["7", 1.5, True, [], [1, "2"], [True]])
def test_seeds_are_ints(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        ki.noise.white(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian])
def test_seeds_have_64_bits(source: Callable[..., ki.noise.NoiseSource]) -> None:
    for seed in (-(2**63), 2**64 - 1):
        draws = [source(given).bind(X)(2.0, 1.0) for given in (seed, seed, [seed] * len(X), 0)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[3])
    for seed in (-(2**63) - 1, 2**64):
        for given in (seed, [0] * (len(X) - 1) + [seed]):
            with pytest.raises(ValueError, match="seed must have 64 bits"):
                source(given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_clipped_noise(dtype: torch.dtype) -> None:
    """Each sample at its own standard deviation; what is inside stays as it was."""
    x = torch.zeros(3, 5, 400, dtype=dtype)
    plain, cut = (ki.noise.bind(s, x)(2.0, 1.0) for s in (ki.noise.white(1), ki.noise.clipped(ki.noise.white(1), 1.5)))
    limit = 1.5 * plain.to(torch.promote_types(dtype, torch.float32)).flatten(1).std(1)[:, None, None]
    inside = plain.abs() < limit
    assert 0.8 < float(inside.double().mean()) < 0.9
    assert cut.dtype == dtype and torch.equal(cut[inside], plain[inside])
    torch.testing.assert_close(cut.abs()[~inside], limit.to(dtype).expand_as(cut)[~inside])
    alone = ki.noise.clipped(ki.noise.white([2]), 1.5).bind(x[:1])(2.0, 1.0)
    together = ki.noise.clipped(ki.noise.white([1, 2, 3]), 1.5).bind(x)(2.0, 1.0)[1:2]
    torch.testing.assert_close(alone, together, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert float(ki.noise.clipped(ki.noise.white(0), 0.5).bind(torch.zeros(500, dtype=dtype))(2, 1).abs().max()) == 0.5


def test_clipped_brownian_noise_of_a_run_has_the_levels_of_the_run() -> None:
    levels = (1.0 + 2e-6, 1.0 + 1e-6, 1.0)
    draw = ki.noise.bind(ki.noise.clipped(ki.noise.brownian(0), 2.0), X, levels)
    assert float(draw(levels[0], levels[1]).abs().max()) < 3


@pytest.mark.parametrize(
    ("std", "error"), [(0.0, ValueError), (math.inf, ValueError), ("2", TypeError), (True, TypeError)]
)
def test_clipping_wants_a_positive_number(std: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="std must be"):
        ki.noise.clipped(ki.noise.white(0), std)


@pytest.mark.parametrize("source", [ki.noise.white(4), ki.noise.white([4, 5, 6, 7]), ki.noise.brownian(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_that_is_written_in_place_is_the_noise_that_is_returned(source: Any, dtype: torch.dtype) -> None:
    returned, written = source.bind(X.to(dtype)), source.bind(X.to(dtype))
    out = torch.full_like(X, torch.nan, dtype=dtype)
    for a, b in [(3.0, 2.0), (2.0, 1.0), (1.0, 0.5)]:
        written.into(out, a, b)
        assert torch.equal(returned(a, b), out)


def test_sde_samplers_take_brownian_noise_by_default() -> None:
    x, sigmas = 10 * torch.ones(2, 3), ki.schedules.karras(6, 0.1, 10.0)
    for name in ("dpmpp_sde", "dpmpp_2m_sde"):
        assert ki.sampler(name).default_noise == "brownian"
        torch.manual_seed(3)
        by_default = ki.sample(ki.denoisers.Gaussian(0.0, 0.5), x, sigmas, sampler=name)
        torch.manual_seed(3)
        noise = ki.noise.brownian()
        assert torch.equal(by_default, ki.sample(ki.denoisers.Gaussian(0.0, 0.5), x, sigmas, sampler=name, noise=noise))
