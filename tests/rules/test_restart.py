"""Restart: the published run, and its variances on Gaussian data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
from problems import mixture, noise_like

import kinvert as ki
from kinvert.rules import Heun, Restart

MIXTURE = mixture()
SIGMAS = [*ki.schedules.karras(9, 0.01, 20.0)[:-1].tolist(), 0.0]
State = TypeVar("State", torch.Tensor, np.ndarray)
Intervals = list[tuple[int, int, float, float]]


def published_restart(
    slope: Callable[[State, float], State],
    x: State,
    sigmas: list[float],
    noises: Iterator[State],
    intervals: Intervals,
    s_noise: float = 1.0,
) -> list[State]:
    """Xu et al.: Heun's method, and at some levels K times up by noise and down over N - 1 steps; the states."""
    chosen = {
        min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - low)): (N, K, high) for N, K, low, high in intervals
    }

    def heun(x: State, a: float, b: float) -> State:
        d = slope(x, a)
        euler = x + (b - a) * d
        return euler if b == 0 else x + (b - a) / 2 * (d + slope(euler, b))

    states = []
    for i, (a, b) in enumerate(itertools.pairwise(sigmas), start=1):
        x = heun(x, a, b)
        N, K, high = chosen.get(i, (0, 0, 0.0))
        ramp = [(high ** (1 / 7) + j / max(N - 1, 1) * (b ** (1 / 7) - high ** (1 / 7))) ** 7 for j in range(N)]
        for _ in range(K):
            x = x + math.sqrt(high**2 - b**2) * s_noise * next(noises)
            for c, d in itertools.pairwise(ramp):
                x = heun(x, c, d)
        states.append(x)
    return states


RULES: dict[str, tuple[ki.Rule, Intervals]] = {
    "default": (ki.sampler("restart"), [(3, 2, 0.06, 0.3)]),
    "longer": (Restart(Heun(), restarts=4, steps=5, s_tmin=0.2, s_tmax=3.0, s_noise=1.003), [(6, 4, 0.2, 3.0)]),
    "two intervals": (
        Restart(Restart(Heun(), restarts=1, steps=3, s_tmin=1.0, s_tmax=5.0), s_tmin=0.06, s_tmax=0.3),
        [(4, 1, 1.0, 5.0), (3, 2, 0.06, 0.3)],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_restart_is_as_published(name: str) -> None:
    rule, intervals = RULES[name]
    x, plan = 20 * noise_like((3, 6)), ki.compile_plan(rule, SIGMAS)
    noises = [noise_like((3, 6), seed) for seed in range(plan.draws)]
    got = ki.run(plan, MIXTURE, x, ki.noise.replay(noises))

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - MIXTURE(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma

    *_, want = published_restart(slope, x, SIGMAS, iter(noises), intervals, getattr(rule, "s_noise", 1.0))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert plan.draws == sum(K for _, K, _, _ in intervals)
    assert plan.evaluations == 2 * len(SIGMAS) - 3 + sum(2 * K * (N - 1) for N, K, _, _ in intervals)


@pytest.mark.parametrize("std", [0.0, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_the_variances_are_those_of_the_published_run(name: str, std: float) -> None:
    """For data N(0, std²) each state is a combination of the start and the noises: its weights, squared and added."""
    rule, intervals = RULES[name]
    plan = ki.compile_plan(rule, SIGMAS)
    start, *noises = np.eye(1 + plan.draws)
    states = published_restart(
        lambda x, sigma: x * sigma / (std**2 + sigma**2), math.hypot(std, SIGMAS[0]) * start, SIGMAS, iter(noises),
        intervals, getattr(rule, "s_noise", 1.0),
    )  # fmt: skip
    want = [float(state @ state) for state in states]
    for covariance in ("white", "brownian"):  # the noises of one Brownian path are independent too
        found = ki.analysis.marginal_variances(plan, covariance, std)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-14)


def test_a_schedule_without_such_a_level_has_no_restart() -> None:
    assert ki.compile_plan("restart", [10.0, 4.0, 0.3]).steps == ki.compile_plan("heun", [10.0, 4.0, 0.3]).steps
    assert ki.compile_plan("restart", [10.0, 4.0, 0.29]).draws == 2


def test_what_a_restart_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="restart cannot step from sigma 0.1 to 1.*run downwards; use restarts=0"):
        ki.compile_plan("restart", [0.1, 1.0])
    assert not ki.compile_plan(ki.sampler("restart").quiet(), [0.1, 1.0]).is_stochastic
    with pytest.raises(ValueError, match="needs a rule that remembers nothing"):
        ki.compile_plan(Restart(ki.sampler("dpmpp_2m")), SIGMAS)
