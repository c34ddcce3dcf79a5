"""Schedules by the spacing of their levels, against their formulas written another way."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kinvert as ki
from kinvert import levels, schedules

SD, FLOW = levels.stable_diffusion(), levels.flow(3.0)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found).as_subclass(Tensor), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 7, 10, 30, 50, 1000])
def test_leading_and_trailing_are_the_spacings_of_diffusers(n: int) -> None:
    """Timesteps as its schedulers make them, and the levels at them."""
    table = SD.sigmas.numpy()
    first = (np.arange(0, n) * (1000 // n)).round()[::-1] + 1
    last = np.round(np.arange(1000, 0, -1000 / n)) - 1
    kept = first[first < 1000].astype(int)
    close(schedules.leading(n, SD), [*table[kept], 0.0])
    close(schedules.trailing(n, SD), [*table[last.astype(int)], 0.0])
    if 1000 % n == 0:
        assert torch.equal(schedules.trailing(n, SD), schedules.simple(n, SD))


def test_linspace_is_normal() -> None:
    times = torch.linspace(999, 0, 20, dtype=torch.float64)
    close(schedules.normal(20, SD)[:-1], SD.sigma(times).tolist())


def test_sd_turbo_is_the_first_of_ten_trailing_levels() -> None:
    times = torch.arange(1, 11).flip(0)[:3] * 100 - 1
    close(schedules.trailing(10, SD)[:3], SD.sigmas[times].tolist())


@given(n=st.integers(2, 40), mu=st.floats(-1, 1), std=st.floats(0.5, 3))
@settings(max_examples=25, deadline=None)
def test_logit_normal_has_equal_shares_of_its_law(n: int, mu: float, std: float) -> None:
    law = NormalDist(mu, std)
    shares = [law.cdf(math.log(s)) for s in schedules.logit_normal(n, SD, mu, std)[:-1].tolist()]
    assert np.diff(shares, 2) == pytest.approx(0, abs=1e-9)
    times = schedules.logit_normal(n, FLOW, mu, std)
    assert float(times[0]) == 1 and isinstance(times, levels.FlowTimes)
    logits = [math.inf, *(math.log(t / (1 - t)) for t in times[1:-1].tolist())]
    assert np.diff([law.cdf(v) for v in logits], 2) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 20, 21, 50])
def test_bong_tangent_as_published(n: int) -> None:
    """In steps of its author's nodes, for the ends 1, 1/2 and 0; its values there have an added 1 and a factor 1/2."""

    def stage(count: int, slope: float, pivot: int, start: float, end: float) -> list[float]:
        v = [(2 / math.pi * math.atan(-slope * (x - pivot)) + 1) / 2 for x in range(count)]
        return [(value - v[-1]) / (v[0] - v[-1]) * (start - end) + end for value in v]

    length = n + 2
    turn = int(length * 0.6)
    slope = 0.2 / (length / 40)
    expected = stage(turn, slope, turn, 1.0, 0.5)[:-1] + stage(length - turn, slope, turn - turn, 0.5, 0.0)
    close(schedules.bong_tangent(n, FLOW), expected)
    close(schedules.bong_tangent(n, SD) / SD.sigma_max, expected)
    assert len(expected) == n + 1


def test_one_step_is_the_whole_way() -> None:
    assert schedules.bong_tangent(1, SD).tolist() == [SD.sigma_max, 0.0]
    assert schedules.logit_normal(1, FLOW).tolist() == [1.0, 0.0]


def test_shift_terminal_moves_the_last_time_and_keeps_the_ends() -> None:
    times = ki.schedule("simple", 8, FLOW)
    found = schedules.shift_terminal(times, 0.1)
    assert isinstance(found, levels.FlowTimes) and float(found[0]) == 1 and float(found[-1]) == 0
    assert float(found[-2]) == pytest.approx(0.1, abs=1e-14)
    scale = (1 - times[-2]) / (1 - 0.1)  # as the schedulers have it
    close(found[:-1], (1 - (1 - times[:-1]) / scale).tolist())
    assert torch.equal(times, ki.schedule("simple", 8, FLOW))


def test_mu_of_a_resolution() -> None:
    assert levels.resolution_mu("flux", 4096) == pytest.approx(1.15, rel=1e-14)
    assert levels.resolution_mu("flux", 256) == 0.5
    assert levels.resolution_mu("ltxv", 1024) == 0.95 and levels.resolution_mu("ltxv", 4096) == pytest.approx(2.05)
    m_10, m_200 = (a * 1024 + b for a, b in ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)))
    a = (m_200 - m_10) / 190.0
    assert levels.resolution_mu("flux2", 1024, 50) == pytest.approx(a * 50 + m_200 - 200 * a, rel=1e-14)
    assert levels.resolution_mu("flux2", 5000, 50) == pytest.approx(0.00016927 * 5000 + 0.45666666, rel=1e-14)
    assert levels.flux(levels.resolution_mu("flux", 1024)).shift == pytest.approx(math.exp(0.63), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: schedules.leading(5, SD, offset=1000), ValueError, "offset must be an index of the table, below 1000"),
        (lambda: schedules.leading(5, SD, offset=-1), ValueError, "offset must"),
        (lambda: schedules.trailing(0, SD), ValueError, "steps must be at least 1"),
        (lambda: schedules.trailing(5, 14.6), TypeError, "levels"),
        (
            lambda: schedules.logit_normal(20, SD, mu=100.0),
            ValueError,
            "levels coincide.*take a larger std, or mu nearer",
        ),
        (lambda: schedules.logit_normal(5, SD, std=0), ValueError, "std must be positive"),
        (lambda: schedules.bong_tangent(3, SD, pivot=0.9), ValueError, "pivot=0.9 leaves one part of 3 steps"),
        (lambda: schedules.bong_tangent(3, SD, middle=1.0), ValueError, "middle"),
        (
            lambda: schedules.shift_terminal(ki.schedule("karras", 5, SD)),
            ValueError,
            "must be a schedule of flow times",
        ),
        (lambda: schedules.shift_terminal(ki.schedule("simple", 5, FLOW)[:-1]), ValueError, "ends at 0"),
        (lambda: schedules.shift_terminal(levels.FlowTimes([1.0, 0.0])), ValueError, "below 1"),
        (lambda: schedules.shift_terminal(ki.schedule("simple", 5, FLOW), 1.0), ValueError, "terminal"),
        (lambda: levels.resolution_mu("sd3", 1024), ValueError, "unknown model 'sd3'.*flux, flux2, ltxv"),
        (lambda: levels.resolution_mu("flux2", 1024), ValueError, "needs the number of steps"),
        (lambda: levels.resolution_mu("flux", 0), ValueError, "tokens"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
