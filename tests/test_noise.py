"""Noise sources: reproducible, per sample, of unit variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


# -- Brownian noise ----------------------------------------------------------------------------------------------------
MANY = torch.zeros(1, 20000, dtype=torch.float64)
LEVELS = st.lists(st.floats(0.0, 120.0), min_size=3, max_size=6, unique_by=lambda sigma: round(sigma, 1))


def far_enough(levels: list[float]) -> bool:
    return all(abs(a - b) > 0.01 * max(a, b) for i, a in enumerate(levels) for b in levels[:i])


@given(levels=LEVELS.filter(far_enough), seed=st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_the_noise_of_an_interval_is_the_sum_of_its_parts(levels: list[float], seed: int) -> None:
    """Whatever is asked for first, and in whichever order: the path is a function of the seed and of sigma."""
    levels = sorted(levels, reverse=True)
    whole = ki.noise.brownian(seed).bind(X.double())(levels[0], levels[-1]) * math.sqrt(levels[0] - levels[-1])
    parts, source = 0 * X.double(), ki.noise.brownian(seed).bind(X.double())
    for a, b in itertools.pairwise(levels):
        parts = parts - source(b, a) * math.sqrt(a - b)  # n(b, a) = -n(a, b)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@given(levels=LEVELS.filter(far_enough), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_covariance_of_intervals(levels: list[float], seed: int) -> None:
    """Cov(n(a, b), n(c, d)) is the signed overlap over the root of the lengths; 0 for intervals that only touch."""
    a, b, c = levels[:3]
    draw = ki.noise.brownian(seed).bind(MANY)
    first, second = draw(a, b), draw(a, c)
    overlap = max(0.0, min(max(a, b), max(a, c)) - max(min(a, b), min(a, c)))
    sign = 1.0 if (a > b) == (a > c) else -1.0
    want = sign * overlap / math.sqrt(abs(a - b) * abs(a - c))
    bound = 6 * math.sqrt((1 + want**2) / MANY.numel())
    assert abs(float((first * second).mean()) - want) < bound
    assert abs(float(first.var()) - 1) < 6 * math.sqrt(2 / MANY.numel())
    assert abs(float(first.mean())) < 6 / math.sqrt(MANY.numel())


def test_brownian_increments_are_normal() -> None:
    """Fourth moment 3 and no outliers, also where the level of detail changes: across octaves and inside a cell."""
    draw = ki.noise.brownian(1).bind(MANY)
    for a, b in [(14.6, 0.03), (2.0, 1.0), (1.02, 1.01), (7e-5, 5e-5), (3e-5, 0.0), (1e4, 900.0)]:
        n = draw(a, b)
        assert abs(float((n**4).mean()) - 3) < 6 * math.sqrt(96 / n.numel())
        assert float(n.abs().max()) < 6


def test_ten_steps_and_a_thousand_see_one_path() -> None:
    for steps in (10, 1000):
        sigmas = ki.schedules.karras(steps, 0.03, 14.6).tolist()[:-1]
        source = ki.noise.brownian(5).bind(X.double())
        total = sum(source(a, b) * math.sqrt(a - b) for a, b in itertools.pairwise(sigmas))
        torch.testing.assert_close(total, ki.noise.brownian(5).bind(X.double())(14.6, 0.03) * math.sqrt(14.57))


def test_brownian_refuses_what_it_cannot_resolve() -> None:
    with pytest.raises(ValueError, match=r"cannot resolve the interval from 1.0001 to 1, .*ki.noise.white"):
        ki.noise.brownian(0).bind(X)(1.0001, 1.0)


def normals(path: Any, sigmas: list[float]) -> list[tuple[int, ...]]:
    """Which normal variables a run along `sigmas` draws."""
    drawn, normal = [], path.normal

    def counted(*place: int, **out: Any) -> torch.Tensor:
        drawn.append(place)
        return normal(*place, **out)

    path.normal = counted
    for a, b in itertools.pairwise(sigmas):
        path(a, b)
    return drawn


@pytest.mark.parametrize(("steps", "bound"), [(20, 3.2), (50, 2.2), (1000, 2.1)])
def test_the_cost_of_brownian_noise_is_bounded(steps: int, bound: float) -> None:
    """Normals drawn per step of a run: about two, where a tree that is searched anew draws some 40."""
    sigmas = ki.schedules.karras(steps, 0.03, 14.6).tolist()[:-1]
    drawn = normals(ki.noise.brownian(0).bind(X, tuple(sigmas)), sigmas)
    assert len(drawn) < bound * len(sigmas)
    assert len(set(drawn)) == len(drawn)  # nothing is drawn twice
    fixed = normals(ki.noise.brownian(0, depth=10).bind(X, tuple(sigmas)), sigmas)
    assert len(fixed) < 14 * len(sigmas)
    assert len(set(fixed)) == len(fixed)


@given(levels=LEVELS.filter(far_enough), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_covariance_in_a_run(levels: list[float], seed: int) -> None:
    """The law of the increments is exact when the bridges end where the levels of the run part."""
    levels = sorted(levels, reverse=True)
    draw = ki.noise.brownian(seed).bind(MANY, tuple(levels))
    increments = torch.stack([draw(a, b).flatten() for a, b in itertools.pairwise(levels)])
    covariance = increments @ increments.T / MANY.numel()
    assert float((covariance - torch.eye(len(increments))).abs().max()) < 6 * math.sqrt(2 / MANY.numel())


def test_levels_that_are_close_in_a_run() -> None:
    """Within a run there is no limit to the resolution, nor a correlation of steps that lie in one cell of level 10."""
    levels = [1.0 + 1e-6 * k for k in range(6, -1, -1)]
    draw = ki.noise.brownian(0).bind(MANY, tuple(levels))
    increments = torch.stack([draw(a, b).flatten() for a, b in itertools.pairwise(levels)])
    covariance = increments @ increments.T / MANY.numel()
    assert float((covariance - torch.eye(len(increments))).abs().max()) < 6 * math.sqrt(2 / MANY.numel())


def test_runs_of_different_length_see_nearly_one_path() -> None:
    """Exactly one with a depth; without it a difference of a few percent of the variance."""

    def total(steps: int, depth: int | None) -> torch.Tensor:
        """The increment over the upper half of a run, rounded to the levels that all runs have."""
        sigmas = [16.0 * 0.9 ** (k * 8 / steps) for k in range(2 * steps + 1)]
        draw = ki.noise.brownian(3, depth=depth).bind(MANY, tuple(sigmas))
        return sum(draw(a, b) * math.sqrt(a - b) for a, b in itertools.pairwise(sigmas[: steps + 1]))  # type: ignore[return-value]

    exact, coarse, fine = total(8, 10), total(8, None), total(64, None)
    torch.testing.assert_close(total(64, 10), exact)
    assert float(fine.var()) == pytest.approx(float(exact.var()), rel=0.05)
    assert float((fine - coarse).var() / exact.var()) < 0.02
    assert float((fine - exact).var() / exact.var()) < 0.02


ALL_LEVELS = st.lists(st.floats(0.0, 120.0), min_size=2, max_size=7, unique_by=lambda sigma: round(sigma, 1))


@given(data=st.data(), levels=ALL_LEVELS.filter(far_enough), depth=st.sampled_from([None, 8, 12]))
@settings(max_examples=80, deadline=None)
def test_every_increment_is_a_difference_of_one_path(
    data: st.DataObject, levels: list[float], depth: int | None
) -> None:
    """Whatever intervals are asked for, in whatever order and how often, in a run and outside of one."""
    seed = data.draw(st.one_of(st.integers(0, 2**63), st.just([3, 1, 4, 1])))
    known = tuple(levels) if data.draw(st.booleans(), label="in a run") else ()
    index = st.integers(0, len(levels) - 1)
    asked = data.draw(
        st.lists(st.tuples(index, index).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=12)
    )
    source = ki.noise.brownian(seed, depth=depth)

    def path(sigma: float) -> torch.Tensor:
        """W, counted from the first level, on a path of its own."""
        fresh = ki.noise.bind(source, X.double(), known)
        return 0 * X.double() if sigma == levels[0] else fresh(levels[0], sigma) * math.sqrt(abs(sigma - levels[0]))

    draw = ki.noise.bind(source, X.double(), known)
    kept = [(levels[i], levels[j], draw(levels[i], levels[j])) for i, j in asked]
    for a, b, increment in kept:
        torch.testing.assert_close(increment * math.sqrt(abs(b - a)), path(b) - path(a), rtol=1e-9, atol=1e-9)


class TwoNoises(ki.rules.Rule):
    """Noise to two levels of the step, and to its end, all from its start."""

    name = "two_noises"
    ode_order = 0

    def step(self, s: ki.rules.StepBuilder) -> Any:
        denoised = s.denoise(s.x, s.sigma)
        middles = [0.5 * (s.noise(s.sigma, r * s.sigma_next + (1 - r) * s.sigma)) for r in (0.3, 0.6)]
        return denoised + s.sigma_next / 10 * (middles[0] + middles[1]) + s.sigma_next * s.noise(s.sigma, s.sigma_next)


@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian])
@pytest.mark.parametrize("seed", [3, [7, 11]])
def test_a_rule_with_several_noises_from_one_level_has_the_law_of_its_plan(source: Any, seed: Any) -> None:
    plan = ki.compile_plan(TwoNoises(), [8.0, 4.0, 1.0])
    x = torch.zeros(2, 20000, dtype=torch.float64)
    result = ki.run(plan, lambda x, sigma: torch.zeros_like(x), x, source(seed))
    want = ki.analysis.marginal_variances(plan, "white" if source is ki.noise.white else "brownian")[-1]
    assert float(result.var() / want) == pytest.approx(1, abs=6 * math.sqrt(2 / x.numel()))


def test_brownian_noise_needs_an_interval() -> None:
    for a, b in ((2.0, 2.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="two finite noise levels"):
            ki.noise.brownian(0).bind(X, (1.0, 2.0))(a, b)


# -- streams -----------------------------------------------------------------------------------------------------------
INTERVALS = [(14.6, 10.0), (10.0, 4.0), (4.0, 0.03), (0.03, 0.0)]


def draws_of(source: Any, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    draw = source(seed).bind(torch.zeros(shape, dtype=dtype))
    return [draw(a, b).flatten() for a, b in INTERVALS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", [ki.noise.white, ki.noise.brownian, lambda seed: ki.noise.white([seed])])
def test_noise_is_independent_of_what_the_user_draws_with_the_same_integer(source: Any, dtype: torch.dtype) -> None:
    """No draw is correlated with torch.randn of the same seed or of a neighbour, from the start of the stream or on."""
    n = 1000
    users = {
        seed: torch.randn(4 * n, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in range(-1, 61)
    }
    for seed in range(60):
        drawn = torch.stack(draws_of(source, seed, (1, n), dtype))
        for other in (seed - 1, seed, seed + 1):
            correlations = drawn @ users[other].reshape(4, n).T / n
            assert float(correlations.abs().max()) < 6 / math.sqrt(n), (seed, other)


def test_the_sources_are_independent_of_each_other() -> None:
    n = 4000
    for seed in range(20):
        white, brownian = (
            torch.stack(draws_of(s, seed, (1, n), torch.float32)) for s in (ki.noise.white, ki.noise.brownian)
        )
        assert float((white @ brownian.T / n).abs().max()) < 6 / math.sqrt(n)


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50, unique=True), purpose=st.text())
@settings(max_examples=50, deadline=None)
def test_different_seeds_have_different_streams(seeds: list[int], purpose: str) -> None:
    """Of the low 32 bits too, which are all that torch's generator on a CPU looks at."""
    derived = [ki.noise.derived_seed(purpose, seed) for seed in seeds]
    assert len({one % 2**32 for one in derived}) == len(seeds)
    assert all(0 <= one < 2**63 for one in derived)


def test_seeds_that_differ_in_their_high_bits_differ() -> None:
    """torch's generator on a CPU takes them for the same."""
    draw = ki.noise.white([1, 1 + 2**32, 2**63, -1]).bind(X)(2.0, 1.0)
    assert len({tuple(one.flatten().tolist()) for one in draw}) == 4


def test_streams_are_reproducible() -> None:
    """The same in every process and on every machine: this pins the derivation."""
    assert ki.noise.derived_seed("white", 7) == 4359467319645926355
    assert ki.noise.derived_seed("brownian", 7) == 5467540385878524184


# -- clipped noise -----------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("depth", [0, 41])
def test_depth_has_a_range(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be from 1 to 40, got {depth}"):
        ki.noise.brownian(0, depth=depth)


def test_depth_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"depth must be an int, got 2\.5; 10 resolves"):
        ki.noise.brownian(0, depth=2.5)  # type: ignore[arg-type]


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
