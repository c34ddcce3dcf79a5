"""The scalar mathematics of the rules: splits, Adams weights, phi functions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import schedules

from kinvert.coefficients import (
    UNIFORM_ADAMS,
    adams,
    ancestral_split,
    deis_time,
    deis_weights,
    exponential_adams,
    flow_ancestral_split,
    ipndm_v_weights,
    left_sums,
    log_step,
    phi,
    sde_noise_scale,
)


@given(a=st.floats(1e-3, 1e3), r=st.floats(1e-12, 1.0), eta=st.floats(0.0, 3.0))
def test_ancestral_split_keeps_its_digits(a: float, r: float, eta: float) -> None:
    b = a * r
    assume(0 < b <= a)
    down, up = ancestral_split(a, b, eta)
    assert math.hypot(down, up) == pytest.approx(b, rel=1e-14)
    assert 0 <= down <= b and 0 <= up <= b
    if eta == 1:
        assert down == pytest.approx(b * b / a, rel=1e-14)


@given(t=st.floats(1e-6, 1.0), r=st.floats(0.0, 1.0), eta=st.floats(0.0, 1.0))
def test_flow_split_of_falling_steps(t: float, r: float, eta: float) -> None:
    t_next = t * r
    assume(t_next < 1)
    down, scale, up = flow_ancestral_split(t, t_next, eta)
    assert math.hypot(down * scale, up) == pytest.approx(t_next, rel=1e-9, abs=1e-300)
    assert up >= 0


def test_sde_noise_scale_of_a_rounding_step() -> None:
    for h in (-4e-16, -1e-13, 0.0, 1e-16, 1e-13):
        assert sde_noise_scale(h, 1.0) == 0.0
    with pytest.raises(ValueError, match="rising step"):
        sde_noise_scale(-1e-9, 1.0)
    assert sde_noise_scale(1e-9, 1.0) == pytest.approx(math.sqrt(2e-9), rel=1e-6)


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("z", [0.0, 1e-9, -1e-5, 0.1, -0.99, 1.01, -1.5, 3.0, -7.0, 12.0, -30.0])
def test_phi_is_its_series(k: int, z: float) -> None:
    term, total = Fraction(1, math.factorial(k)), Fraction(0)
    for n in range(200):
        total += term
        term *= Fraction(z) / (n + 1 + k)
    assert phi(k, z) == pytest.approx(float(total), rel=4e-15)


def test_phi_far_out() -> None:
    assert phi(2, -1e6) == pytest.approx(1e-6 - 1e-12, rel=1e-14)
    assert phi(3, -700.0) == pytest.approx((0.5 - (1 - 1 / 700) / 700) / 700, rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_uniform_adams_weights(k: int) -> None:
    np.testing.assert_allclose(adams([0.0, -1.0, -2.0, -3.0][:k], 0.0, 1.0), UNIFORM_ADAMS[k - 1], rtol=1e-13)


levels = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5).map(
    lambda steps: tuple(10 * math.exp(-h) for h in np.cumsum(steps))
)


@given(levels=levels)
def test_ipndm_v_weights(levels: tuple[float, ...]) -> None:
    """Exact for up to two slopes; the weights of up to three add up to the step."""
    got = ipndm_v_weights(levels)
    nodes = levels[-2::-1]
    if len(nodes) <= 2:
        np.testing.assert_allclose(got, adams(nodes, *levels[-2:]), rtol=1e-10)
    if len(nodes) <= 3:
        assert sum(got) == pytest.approx(levels[-1] - levels[-2], rel=1e-9)


def test_ipndm_v_weights_on_a_uniform_grid() -> None:
    np.testing.assert_allclose(ipndm_v_weights([3.0, 2.0, 1.0, 0.0]), [-w for w in UNIFORM_ADAMS[2]], rtol=1e-13)
    np.testing.assert_allclose(ipndm_v_weights([4.0, 3.0, 2.0, 1.0, 0.0]), [-57 / 24, 65 / 24, -43 / 24, 11 / 24])


@given(levels=levels)
def test_deis_weights(levels: tuple[float, ...]) -> None:
    """The exact weights integrate 1 exactly; the 10,000-point sum is near them, as near as its two ends allow."""
    exact, upstream = (np.array(deis_weights(levels, how)) for how in ("exact", "upstream"))
    assert sum(exact) == pytest.approx(levels[-1] - levels[-2], rel=1e-12)
    assert np.abs(upstream - exact).max() <= 1e-3 * np.abs(exact).max()


def test_deis_time_has_its_published_ends() -> None:
    """`sigma = 0.002` at `t = 0.001` and 80 at 1, and `log(1 + sigma^2)` is a parabola of t through 0."""
    assert deis_time(np.array([0.002, 80.0])).tolist() == pytest.approx([1e-3, 1.0], rel=1e-9)
    t, law = np.array([1e-3, 0.5, 1.0]), np.log1p(np.array([0.002, 80.0]) ** 2)
    middle = float(np.linalg.solve([[t[0] ** 2, t[0]], [t[2] ** 2, t[2]]], law) @ [t[1] ** 2, t[1]])
    assert float(deis_time(np.sqrt(np.expm1([middle])))[0]) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 5.0])
def test_exact_deis_weights_on_a_large_step(sigma: float) -> None:
    """One quadrature over a whole range against the sum over its parts."""
    before, end = (0.5 * sigma, sigma), 14.6
    whole = deis_weights((*before, end), "exact")
    # int l_j over a part, with the polynomials of the whole: l_1 = (t - t_i) / (t_{i-1} - t_i) is linear in t, so the
    # part's own weight of l_1 and the width, shifted to the part, add up to it.
    t_older, t_i = deis_time(np.array(before))
    points = np.geomspace(sigma, end, 41)
    total = 0.0
    for a, b in itertools.pairwise(points):
        slope_part = deis_weights((0.5 * a, a, b), "exact")[1]  # int (t - t_a) / (t_{a/2} - t_a)
        t_half, t_a = deis_time(np.array([0.5 * a, a]))
        total += slope_part * (t_half - t_a) + (t_a - t_i) * (b - a)
    assert whole[1] == pytest.approx(total / (t_older - t_i), rel=1e-10)


@given(levels=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=5), slope=st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_deis_in_log_sigma_is_exact_for_slopes_linear_in_it(levels: list[float], slope: float) -> None:
    """int (1 + c log s) ds = s (1 + c (log s - 1))."""
    sigmas = [10 * math.exp(-h) for h in itertools.accumulate(levels)]

    def antiderivative(s: float) -> float:
        return s * (1 + slope * (math.log(s) - 1))

    weights = deis_weights(tuple(sigmas), "log_sigma")
    got = sum(w * (1 + slope * math.log(s)) for w, s in zip(weights, sigmas[-2::-1], strict=True))
    want = antiderivative(sigmas[-1]) - antiderivative(sigmas[-2])
    assert got == pytest.approx(want, rel=1e-10, abs=1e-10)


@given(
    sigmas=schedules(min_steps=2, max_steps=5, zero=False),
    corrector=st.booleans(),
    rising=st.booleans(),
    rate=st.sampled_from([1.0, 1.25, 2.0, 5.0]),
)
@settings(max_examples=60, deadline=None)
def test_exponential_adams_is_exact_on_polynomials(
    sigmas: list[float], corrector: bool, rising: bool, rate: float
) -> None:
    """sum_j W_j u_j^m = rate int_0^h e^{rate (u - h)} u^m du = rate h^{m+1} m! phi_{m+1}(-rate h)."""
    levels = sigmas[::-1] if rising else sigmas
    *_, a, b = levels
    nodes = levels[::-1] if corrector else levels[-2::-1]
    h = log_step(a, b)
    weights = exponential_adams(nodes, a, b, rate)
    for m in range(len(nodes)):
        terms = [w * log_step(a, node) ** m for w, node in zip(weights, nodes, strict=True)]
        want = rate * h ** (m + 1) * math.factorial(m) * phi(m + 1, -rate * h)
        assert sum(terms) == pytest.approx(want, rel=1e-11, abs=1e-11 * sum(map(abs, terms)))


@pytest.mark.parametrize("h", [1e-6, 1e-3, 6.0, 25.0, -6.0, -25.0, 300.0])
def test_exponential_adams_of_short_and_long_steps(h: float) -> None:
    a, rate = 1.0, 2.0
    nodes = [a, math.exp(0.3), math.exp(0.9)]
    weights = exponential_adams(nodes, a, math.exp(-h), rate)
    assert sum(weights) == pytest.approx(-math.expm1(-rate * h), rel=1e-9)
    first = sum(w * log_step(a, node) for w, node in zip(weights, nodes, strict=True))
    assert first == pytest.approx(rate * h**2 * phi(2, -rate * h), rel=1e-8)


def test_left_sums() -> None:
    mean, moment = left_sums(lambda v: v, 1.0, 2.0)
    grid = [1 + k / 200 for k in range(200)]
    assert mean == pytest.approx(sum(1 / v for v in grid) / 200, rel=1e-14)
    assert moment == pytest.approx(sum((v - 2) / v for v in grid) / 200, rel=1e-14)
    assert mean == pytest.approx(math.log(2), abs=2e-3)
