"""Brownian noise: one path, the law of its increments, and what they cost."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kinvert as ki

X = torch.zeros(4, 3, 5, dtype=torch.float32)
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


@pytest.mark.parametrize("depth", [0, 41])
def test_depth_has_a_range(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be from 1 to 40, got {depth}"):
        ki.noise.brownian(0, depth=depth)


def test_depth_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"depth must be an int, got 2\.5; 10 resolves"):
        ki.noise.brownian(0, depth=2.5)  # type: ignore[arg-type]
