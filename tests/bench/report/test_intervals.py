"""Intervals: the exact law of a bootstrapped median, coverage, pairing, and Wilson's interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchrecords import INF, NAN, record

from kinvert.bench.report import intervals
from kinvert.bench.report.intervals import interval, lower_share, resampled, weights, wilson


def units_of(count: int, name: str = "seed 0") -> list[intervals.Unit]:
    return [(name, count, k) for k in range(count)]


def test_a_bootstrapped_median_has_its_exact_law() -> None:
    """Of 2m + 1 values the median of a resample is at most the k-th if more than m draws are among the first k."""
    n = 5
    drawn = resampled([30.0, 10.0, 20.0, 50.0, 40.0], units_of(n))
    assert set(drawn) <= {10, 20, 30, 40, 50}
    for k in range(1, n):
        exact = sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range(3, n + 1))
        deviation = math.sqrt(exact * (1 - exact) / intervals.RESAMPLES)
        assert abs((drawn <= 10 * k).mean() - exact) < 4 * deviation


def test_a_resampled_median_is_that_of_its_draws() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 5, 8):
        values = generator.normal(size=count)
        drawn = resampled(values.tolist(), units_of(count))
        expected = [np.median(np.repeat(values, times)) for times in weights(tuple(units_of(count)))]
        np.testing.assert_allclose(drawn, expected, rtol=1e-14)
        shares = resampled((values > 0).tolist(), units_of(count), share=True)
        np.testing.assert_allclose(shares, weights(tuple(units_of(count))) @ (values > 0) / count)


def test_samples_of_one_unit_are_drawn_together() -> None:
    one = [("image", 3, 0)]
    values, of = [1.0, 1.0, 2.0, 2.0, 5.0, 5.0], one * 2 + [("image", 4, 0)] * 2 + [("image", 5, 0)] * 2
    times = weights(tuple(of))
    assert (times[:, ::2] == times[:, 1::2]).all() and set(times[:, ::2].sum(1)) == {3}
    assert set(resampled(values, of)) == {1.0, 2.0, 5.0}
    assert interval(values, of) == (1, 5)
    assert interval([1.0, 2.0, 3.0], one * 3) is None  # one unit says nothing about others


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Normal data with median 0: 95% of the intervals hold it, up to the spread of 400 tries and of small samples."""
    generator, count, tries = np.random.default_rng(1), 25, 400
    held = 0
    for _ in range(tries):
        low, high = interval(generator.normal(size=count).tolist(), units_of(count)) or (NAN, NAN)
        held += low <= 0 <= high
    assert 0.92 <= held / tries <= 0.98


def test_the_range_of_few_values_holds_the_median_as_often_as_the_formula_says() -> None:
    generator, tries = np.random.default_rng(2), 4000
    values = generator.normal(size=(tries, 4))
    held = ((values.min(1) < 0) & (values.max(1) > 0)).mean()
    assert intervals.holds(4) == 0.875 and abs(held - 0.875) < 0.02
    assert intervals.holds(5) < intervals.LEVEL < intervals.holds(6)
    assert interval([4.0, 1.0, 2.0, 3.0], units_of(4)) == (1, 4)


def test_infinite_values_are_numbers_and_nan_has_no_interval() -> None:
    assert interval([-INF] * 4, units_of(4)) == (-INF, -INF)
    assert interval([-INF, -INF, -INF, 3.0], units_of(4)) == (-INF, 3)
    assert interval([1.0, NAN, 2.0], units_of(3)) is None
    low, high = resampled([-INF] * 4, units_of(4)), resampled([-INF, 1.0, 1.0, 2.0], units_of(4))
    assert lower_share(low, low) == 0 and 0 < lower_share(low, high) < 1


def test_pairing_takes_the_difficulty_of_an_image_out_of_a_difference() -> None:
    """Each value of b is 0.1 above that of a: paired it is always so, resampled apart in about half of the cases."""
    a = np.random.default_rng(3).normal(size=12) * 10
    paired = [resampled(values.tolist(), units_of(12)) for values in (a, a + 0.1)]
    assert lower_share(*paired) == 1 and lower_share(*paired[::-1]) == 0
    apart = resampled((a + 0.1).tolist(), units_of(12, "seed 1"))
    assert 0.3 < lower_share(paired[0], apart) < 0.7


def test_resamples_depend_on_the_units_alone() -> None:
    first = weights(tuple(units_of(6))).copy()
    weights.cache_clear()
    assert (weights(tuple(units_of(6))) == first).all()
    assert (weights(tuple(units_of(6, "seed 1"))) != first).any()


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(1.0, 4, 0.5101, 1.0), (0.0, 4, 0.0, 0.4899), (0.5, 10, 0.2366, 0.7634), (0.9, 100, 0.8256, 0.9448)],
)
def test_wilson(share: float, count: int, low: float, high: float) -> None:
    """Both ends solve (p - share)^2 = z^2 p (1 - p) / n."""
    found = wilson(share, count)
    assert found == pytest.approx((low, high), abs=1e-4)
    for p in found:
        assert (p - share) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count, abs=1e-6)


def test_units_are_images_where_seeds_share_them() -> None:
    a, b = (intervals.units(record(seed=seed, count=30)) for seed in (0, 1))
    assert len(set(a)) == 30 and set(a) & set(b) and a != b  # 40 images, 30 of each seed
    assert intervals.units(record(count=2, seed=5, question="recovery")) == [("seed 5", 2, 0), ("seed 5", 2, 1)]
    assert intervals.units(record(count=1, model="my:model")) == [("seed 0", 1, 0)]
